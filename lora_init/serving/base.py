"""The base model of an adapter: the names and widths of its layers, and the adapter merged into its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_init.errors import LoraInitError, first_line
from lora_init.files import read_json, write_json
from lora_init.layers.targets import PREFIX, is_conv1d
from lora_init.serving.trained import LINEAR, Trained

# Tensors of a merged model go into files of about this size, and no more of them are in memory at once.
SHARD_BYTES = 2 * 10**9
INDEX_FILE = "model.safetensors.index.json"
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".index.json", "README.md")


@dataclass(frozen=True, eq=False)
class Base:
    """A base model without its weights.

    Attributes:
        source: Directory or hub id.
        model: The model on the meta device.
        widths: d_in and d_out of each linear layer and embedding by name, in model order.
    """

    source: str
    model: Any
    widths: Mapping[str, tuple[int, int]]

    @property
    def config(self) -> Any:
        """Its configuration; of a multimodal model that of the part which reads text."""
        return self.model.config.get_text_config()

    @property
    def architecture(self) -> str:
        """The class that the checkpoint was saved as."""
        return str((self.model.config.architectures or [type(self.model).__name__])[0])

    @property
    def embeddings(self) -> tuple[str, str]:
        """Names of the input embedding and of the output embedding, empty where there is none."""
        names = {id(module): name for name, module in self.model.named_modules()}
        first, last = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        return names.get(id(first), ""), names.get(id(last), "")

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one tensor."""
        return bool(self.model.config.tie_word_embeddings) and all(self.embeddings)


def read_base(source: str, trained: Trained) -> Base:
    """Build the base model on the meta device, in the class that the adapter's names are of.

    Args:
        source: Directory with a config.json, or hub id.
        trained: The adapter.

    Raises:
        LoraInitError: There is no such model, or it has not got the layers that the adapter is for.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(Path(source).expanduser()))
    except (OSError, ValueError, KeyError) as error:
        raise LoraInitError(
            f"the base model {source!r} cannot be read: {first_line(error)} Name it by base=."
        ) from error
    mapping = trained.config.get("auto_mapping") or {}
    auto_classes = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    classes = (mapping.get("base_model_class", ""), *(config.architectures or ()), *auto_classes)
    problem = ""
    for name in dict.fromkeys(classes):
        made = _on_meta(getattr(transformers, name, None), config)
        if made is None:
            continue
        layers = ((n, m) for n, m in made.named_modules() if isinstance(m, (nn.Embedding, nn.Linear)) or is_conv1d(m))
        widths = {name: _widths(module) for name, module in layers}
        difference = _difference(trained, widths)
        if difference is None:
            return Base(source, made, widths)
        problem = problem or f"{difference} {type(made).__name__} {source!r}"
    problem = problem or f"{source!r} is of a class that transformers does not know"
    raise LoraInitError(f"{problem}. Name the model that the adapter was trained on by base=.")


def _on_meta(model_class: Any, config: Any) -> nn.Module | None:
    make: Any = getattr(model_class, "from_config", model_class)  # Auto classes have it
    try:
        with torch.device("meta"):
            model: nn.Module = make(config)
    except (ValueError, AttributeError, TypeError):  # no such class, or no such head for this kind of model
        return None
    return model


def _widths(module: Any) -> tuple[int, int]:
    first, second = module.weight.shape
    return (int(first), int(second)) if _is_transposed(module) else (int(second), int(first))


def _is_transposed(module: nn.Module) -> bool:
    """Tell whether the weight is [d_in, d_out]."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def _difference(trained: Trained, widths: Mapping[str, tuple[int, int]]) -> str | None:
    """Say which layer of the adapter is not in the model, or of other widths there."""
    for name, layer in trained.layers.items():
        if name not in widths:
            return f"the adapter's layer {name!r} is no linear layer or embedding of"
        if layer.widths != widths[name]:
            return "the adapter's layer {!r} is {} -> {}, and {} -> {} in".format(name, *layer.widths, *widths[name])
    return None


def plan_merge(base: Base, trained: Trained) -> dict[str, tuple[Path, str]]:
    """Find what a merged model is made from, and refuse now what could not be merged later.

    Returns:
        For each tensor of the merged model, the file that it comes from and its name there. The name is another one for
        an output embedding that was the input embedding and is no longer.

    Raises:
        LoraInitError: The checkpoint is not there in safetensors files, is quantised, or lacks a tensor; or the adapter
            has parts that no merge of weights can hold.
    """
    sources = {name: (file, name) for name, file in _checkpoint(base.source).items()}
    first, last = (f"{name}.weight" for name in base.embeddings)
    wanted = [f"{name}.weight" for name in trained.layers] + [key.removeprefix(PREFIX) for key in trained.others]
    problem = None
    if base.tied and first in sources and last not in sources and {first, last} & set(wanted):
        sources[last] = sources[first]
        problem = "ensure_weight_tying keeps two adapters equal" if trained.config.get("ensure_weight_tying") else None
    missing = [name for name in wanted if name not in sources]
    if missing:
        problem = f"{base.source!r} has no tensor {missing[0]!r} in its checkpoint"
    elif any(layer.magnitude is not None and layer.ends != LINEAR for layer in trained.layers.values()):
        problem = "DoRA on an embedding gives lengths to columns"
    if problem is not None:
        raise LoraInitError(
            f"{problem}, so it is not merged here. PEFT's merge_and_unload() on the loaded model does it."
        )
    return sources


def write_merged(directory: Path, trained: Trained, base: Base, sources: Mapping[str, tuple[Path, str]]) -> None:
    """Write the merged model with its tokenizer: tensor by tensor, each in the type that it had."""
    folder = next(file.parent for file, _ in sources.values())
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, directory / path.name)
    untied = any(name != source for name, (_, source) in sources.items())
    config = read_json(folder / "config.json")
    write_json(directory / "config.json", config | ({"tie_word_embeddings": False} if untied else {}))
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    for name, (path, source) in sources.items():
        with safe_open(path, framework="pt") as file:
            shard[name] = _merged(name, file.get_tensor(source), trained, base)
        if len(shard) + len(index) == len(sources) or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            part = f"model-{len(set(index.values())) + 1:05}.safetensors"
            save_file(shard, directory / part, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, part)
            shard = {}
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": index})


def _merged(name: str, weight: Tensor, trained: Trained, base: Base) -> Tensor:
    """Add scaling * B A to a weight, in float32, and with DoRA give each row its length."""
    if PREFIX + name in trained.others:
        return trained.others[PREFIX + name].to(weight.dtype)
    layer = trained.layers.get(name.removesuffix(".weight"))
    if layer is None:
        return weight
    transposed = _is_transposed(base.model.get_submodule(name.removesuffix(".weight")))
    plain = weight.float().T if transposed else weight.float()
    merged = plain + layer.scaling * (layer.b.float() @ layer.a.float())
    if layer.magnitude is not None:
        merged *= layer.magnitude.float()[:, None] / torch.linalg.norm(merged, dim=1, keepdim=True)
    return (merged.T if transposed else merged).to(weight.dtype).contiguous()


def _checkpoint(source: str) -> dict[str, Path]:
    """Find the file of each tensor of a checkpoint."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(source, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5", "*/*"]))
    if "quantization_config" in read_json(directory / "config.json"):
        raise LoraInitError(f"{source!r} is quantised. Merge into the model that it was made from.")
    if (directory / INDEX_FILE).is_file():
        return {name: directory / file for name, file in read_json(directory / INDEX_FILE)["weight_map"].items()}
    path = directory / "model.safetensors"
    if not path.is_file():
        raise LoraInitError(f"{source!r} has no model.safetensors. Only safetensors checkpoints are merged into.")
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)
