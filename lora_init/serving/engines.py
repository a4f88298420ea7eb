"""What each engine takes, how it is told to serve an adapter, and how its files are written."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lora_init.adapters.peft_model import CONFIG_FILE, LORA_A, LORA_B, WEIGHTS_FILE
from lora_init.errors import LoraInitError, did_you_mean, require
from lora_init.files import write_json
from lora_init.layers.grid import layer_grid
from lora_init.layers.targets import PREFIX
from lora_init.planning.plan import alpha_for, scaling_of
from lora_init.serving.base import Base
from lora_init.serving.trained import EMBEDDING, MAGNITUDE, OTHER_UPDATES, Trained, config_of, scalings

# What an adapter may be trained with that neither an engine nor a merged model does.
_PEFT_ALONE = ("alora_invocation_tokens", "trainable_token_indices", "lora_bias", *OTHER_UPDATES)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank of vLLM may be


@dataclass(frozen=True)
class Engine:
    """What an engine loads.

    Attributes:
        command: How it serves the adapter, with {base}, {path}, {name} and {rank} to fill in.
        write: Writes its form of an adapter of one scaling into an empty directory; for llama.cpp, a file.
        dora: Whether it takes DoRA.
        ranks: Whether it takes layers of different ranks.
        bytes_each: Bytes of one parameter where that is not the adapter's own type.
        server: Where its API begins by default, as options of `lora-init verify`; empty where there is no server.
    """

    command: str
    write: Callable[[Path, Trained, Base], None]
    dora: bool = False
    ranks: bool = False
    bytes_each: int | None = None
    server: str = ""


def _beyond_lora(trained: Trained, base: Base) -> Iterator[str]:
    """Describe what an adapter has besides A, B and magnitudes of linear layers."""
    tied = base.embeddings[1] if base.tied else None
    for name, layer in trained.layers.items():
        if layer.ends == EMBEDDING:
            yield f"an adapter of the embedding {name!r}"
        if layer.experts:
            yield f"an adapter of the parameter {name!r} of {layer.experts} experts"
        if name == tied:
            yield f"an adapter of {name!r}, whose weight is also that of the input embedding"
    for key in trained.others:
        yield f"a tensor that is no adapter ({key.removeprefix(PREFIX)!r}, of modules_to_save or the like)"
    yield from (key for key in ("alora_invocation_tokens", "trainable_token_indices") if trained.config.get(key))


def _is_padded(rank: int) -> bool:
    """Tell the ranks that TGI's and LoRAX's kernels don't have.

    Both pad them, and then divide alpha by the padded rank in all kinds of layers but the first.
    """
    return rank != 8 and rank % 16 != 0


def check_rank(name: str | None, rank: int) -> None:
    """Refuse a rank that an engine does not take.

    Raises:
        LoraInitError: It does not.
    """
    if name == "vllm" and rank > VLLM_RANKS[-1]:
        raise LoraInitError(f"vllm takes at most rank {VLLM_RANKS[-1]}, and this is {rank}. Compress it by rank=.")
    if name in ("tgi", "lorax") and _is_padded(rank):
        raise LoraInitError(f"{name} takes rank 8 or a multiple of 16, and this is {rank}. Choose one by rank=.")


def serving_note(
    ranks: Mapping[str, int], config: Mapping[str, Any], tensors: Iterable[str] = (), base_change: str = ""
) -> str:
    """Say which engines take an adapter with these ranks as it is, and which need `lora-init export`.

    Args:
        ranks: Of every layer that could have an adapter, 0 where it has none.
        config: adapter_config.json, or what is known of it. Without a `lora_alpha` all layers have one scaling.
        tensors: Names of the tensors in its file.
        base_change: The start that changed the plain weights of its base, from `base_change_of`.

    Example:
        >>> print(serving_note({"h.0.up": 4, "h.1.up": 12}, {}))
        PEFT and vLLM (--max-lora-rank 16) take this adapter as it is.
        SGLang, llama.cpp, Ollama, TGI, LoRAX and MLX need `lora-init export`.
    """
    if base_change:
        return (
            f"It began as {base_change}, which changes the base weights, so no engine takes it as it is. "
            "`lora-init export --start DIRECTORY`, of the adapter before training, converts it."
        )
    alone = next((key for key in _PEFT_ALONE if config.get(key)), None)
    if alone is not None:
        return f"PEFT takes this adapter as it is. It was trained with {alone}, which no other does."
    beyond = next(_beyond_layers(config, tensors), None)
    if beyond is not None:
        mlx = "MLX needs `lora-init export`. " if beyond == "DoRA" else ""
        return f"PEFT takes this adapter as it is. {mlx}Others take no {beyond}: `lora-init export --merge-into MODEL`."
    most = max(ranks.values(), default=0)
    if not most:
        return "No layer has an adapter, so there is nothing to serve."
    grid = layer_grid(ranks)
    kinds = [{ranks[name] for name in grid.of_kind(kind).values()} for kind in grid.kinds]
    named = int(config.get("r") or most)
    scales = set(scalings(config, ranks).values()) if "lora_alpha" in config else set()
    # Engines have one scaling, that of the config, whatever patterns say. No alpha makes some exactly the same.
    scales_alike = all(
        math.isclose(scale, scaling_of(config["lora_alpha"], named, bool(config.get("use_rslora"))), rel_tol=1e-6)
        for scale in scales
    )
    whole = not config.get("layers_to_transform") and named == most  # blocks of which no name is known lack theirs
    is_uniform = scales_alike and whole and all(kind in ({0}, {most}) for kind in kinds)
    vllm = next((f" (--max-lora-rank {rank})" for rank in VLLM_RANKS if rank >= max(most, named) and scales_alike), "")
    ready = {"PEFT": True, f"vLLM{vllm}": bool(vllm)}
    # These three divide alpha by the rank, whatever use_rslora says.
    ready |= dict.fromkeys(("SGLang", "llama.cpp", "Ollama"), is_uniform and not config.get("use_rslora"))
    ready |= dict.fromkeys(("TGI", "LoRAX"), is_uniform and not _is_padded(most)) | {"MLX": False}
    as_it_is, others = ([name for name, takes in ready.items() if takes is wanted] for wanted in (True, False))
    return (
        f"{_listed(as_it_is)} take{'s' * (len(as_it_is) == 1)} this adapter as it is. "
        f"{_listed(others)} need{'s' * (len(others) == 1)} `lora-init export`."
    )


def _beyond_layers(config: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[str]:
    """Describe what an adapter directory has besides A and B of linear layers."""
    if config.get("target_parameters"):
        yield "adapter of experts"
    known = (LORA_A, LORA_B, f".{MAGNITUDE}")
    # With an adapter of an embedding or head PEFT stores a copy of the base's own weight.
    others = (name for name in tensors if not name.endswith((*known, ".base_layer.weight")))
    yield from (f"tensor {name.removeprefix(PREFIX)!r}" for name in others)
    if config.get("bias") not in (None, "none"):
        yield f"bias={config['bias']!r}"
    if config.get("use_dora"):
        yield "DoRA"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def check_engine(name: str, engine: Engine, trained: Trained, base: Base) -> None:
    """Refuse what an engine would refuse, or would read as something else.

    Raises:
        LoraInitError: The adapter has more than the engine takes.
    """
    if engine is PEFT:
        return
    beyond = "DoRA" if trained.dora and not engine.dora else next(_beyond_lora(trained, base), None)
    if beyond is not None:
        merged = "Write a whole model instead: merge_into=, without an engine."
        remedy = "Serve it with PEFT." if trained.config.get("alora_invocation_tokens") else merged
        raise LoraInitError(f"{name} does not take {beyond}. {remedy}")
    if trained.dora and any(layer.magnitude is None for layer in trained.layers.values()):
        raise LoraInitError(f"{name} takes DoRA in every layer or in none. Use merge_into=, without an engine.")
    if engine.write is write_mlx:
        _names_in_gguf(base)
    if engine.bytes_each:
        _gguf_names(trained, base)


# Architectures whose tensors keep their names in MLX, and have known ones in GGUF: there under these names. True where
# llama.cpp's converter sorts the rows of q and k, because rotary positions pair them differently there.
_ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "GemmaForCausalLM": ("gemma", False),
    "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False),
    "PhiForCausalLM": ("phi2", False),
    "Phi3ForCausalLM": ("phi3", False),
}


def _names_in_gguf(base: Base) -> tuple[str, bool]:
    """Look up what GGUF calls the architecture, and whether q and k are sorted there."""
    if base.architecture not in _ARCHITECTURES:
        raise LoraInitError(
            f"{base.source!r} is a {base.architecture}, whose names in GGUF and MLX are not known here. Known are "
            f"{', '.join(_ARCHITECTURES)}. For others use merge_into=, and the engine's own converter."
        )
    return _ARCHITECTURES[base.architecture]


def _gguf_names(trained: Trained, base: Base) -> dict[str, str]:
    """Give the name in GGUF of each layer's weight."""
    require("gguf")
    import gguf

    architecture, _ = _names_in_gguf(base)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, base.config.num_hidden_layers)
    names: dict[str, str] = {}
    for layer in trained.layers:
        name = known.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise LoraInitError(f"layer {layer!r} of {base.architecture} has no name in GGUF. Use merge_into=.")
        names[layer] = name
    return names


def _pairs_together(rows: Tensor, heads: int) -> Tensor:
    """Sort the rows of each head from first half and second half to pairs of one of each."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)  # [head, half, place, rank]
    return halves.transpose(1, 2).reshape(rows.shape)


def write_peft(path: Path, trained: Trained, base: Base) -> None:
    """Write a PEFT directory; patterns only where ranks differ."""
    save_file(trained.tensors(), path / WEIGHTS_FILE, metadata={"format": "pt"})
    plain = [name for name, layer in trained.layers.items() if not layer.experts]
    write_json(path / CONFIG_FILE, config_of(trained, _target_modules(base, plain)))


def _target_modules(base: Base, layers: Collection[str]) -> list[str]:
    """Name layers by the ends of their names where these select no others of the base, else in full."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    selected = {name for name, _ in base.model.named_modules() if name.rpartition(".")[2] in endings}
    return endings if selected == set(layers) else list(layers)


def write_mlx(path: Path, trained: Trained, base: Base) -> None:
    """Write what mlx-lm loads: A and B transposed, DoRA's magnitude as m, and the names of the layers in full."""
    tensors = {}
    for name, layer in trained.layers.items():
        tensors[f"{name}.lora_a"] = layer.a.T.contiguous()
        tensors[f"{name}.lora_b"] = layer.b.T.to(layer.a.dtype).contiguous()
        tensors |= {} if layer.magnitude is None else {f"{name}.m": layer.magnitude}
    save_file(tensors, path / "adapters.safetensors")
    parameters = {"rank": trained.rank, "scale": trained.scaling, "dropout": 0.0, "keys": list(trained.layers)}
    kind = "dora" if trained.dora else "lora"
    config = {"model": base.source, "fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    write_json(path / CONFIG_FILE, config)


def write_ollama(path: Path, trained: Trained, base: Base) -> None:
    """Write a GGUF adapter and a Modelfile beside it."""
    write_gguf(path / "adapter.gguf", trained, base)
    directory = Path(base.source).expanduser()  # what is relative in a Modelfile is so to the Modelfile
    source = directory.resolve() if directory.is_dir() else base.source
    (path / "Modelfile").write_text(f"FROM {source}\nADAPTER ./adapter.gguf\n", encoding="utf-8")


def write_gguf(path: Path, trained: Trained, base: Base) -> None:
    """Write a GGUF adapter, float32.

    llama.cpp scales each pair by alpha / rank with one alpha for all and the rank of the pair itself, so that a layer
    with fewer ranks would act too strongly: its B is multiplied by the opposite.
    """
    import gguf

    alpha = alpha_for(trained.scaling, trained.rank)
    architecture, sorts = _names_in_gguf(base)
    heads = {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads} if sorts else {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, new in _gguf_names(trained, base).items():
        layer, ending = trained.layers[name], name.rpartition(".")[2]
        b = layer.b.float() * (layer.scaling * layer.rank / alpha)
        b = _pairs_together(b, heads[ending]) if ending in heads else b
        writer.add_tensor(f"{new}.lora_a", layer.a.float().contiguous().numpy())
        writer.add_tensor(f"{new}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:  # numpy loses what does not fit at the end of a full disk without a word
        gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


PEFT = Engine(
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {path})", write_peft, dora=True, ranks=True
)
_LOCAL = "--url http://127.0.0.1"
ENGINES = {
    "vllm": Engine(
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={path}", write_peft, ranks=True,
        server=f"{_LOCAL}:8000/v1 --model {{name}}",
    ),
    "sglang": Engine(
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
        "--lora-paths {name}={path}",
        write_peft, server=f"{_LOCAL}:30000/v1 --model {{name}}",
    ),
    "tgi": Engine(
        "text-generation-launcher --model-id {base} --lora-adapters {name}={path}", write_peft,
        server=f"{_LOCAL}:3000/v1 --model {{name}}",
    ),
    "lorax": Engine(
        "lorax-launcher --model-id {base} --adapter-id {path} --adapter-source local", write_peft,
        server=f"{_LOCAL}:3000/v1 --model {{path}}",
    ),
    "llama.cpp": Engine(
        "llama-server --model BASE.gguf --lora {path}", write_gguf, ranks=True, bytes_each=4,
        server=f"{_LOCAL}:8080/v1",
    ),
    "ollama": Engine(
        "ollama create {name} --file {path}/Modelfile", write_ollama, ranks=True, bytes_each=4,
        server=f"{_LOCAL}:11434/v1 --model {{name}}:latest",
    ),
    "mlx": Engine(
        "mlx_lm.server --model {base} --adapter-path {path}", write_mlx, dora=True, server=f"{_LOCAL}:8080/v1"
    ),
}  # fmt: skip


def find_engine(name: str | None) -> Engine:
    """Look an engine up; None is PEFT itself.

    Raises:
        LoraInitError: It is unknown.
    """
    if name is None:
        return PEFT
    if name not in ENGINES:
        raise LoraInitError(f"engine {name!r} is unknown. {did_you_mean(name, ENGINES)}")
    return ENGINES[name]
