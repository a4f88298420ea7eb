"""How adapters are written: a PEFT directory, and what mlx-lm, llama.cpp and Ollama load."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lora_init.adapters.directory import CONFIG_FILE, write_files
from lora_init.errors import LoraInitError, require
from lora_init.files import write_json
from lora_init.layers.grid import place_of
from lora_init.planning.lora_config import alpha_for
from lora_init.serving.base import Base
from lora_init.serving.trained import Trained, config_of

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
    "MixtralForCausalLM": ("llama", True),
    "Qwen2MoeForCausalLM": ("qwen2moe", False),
    "Qwen3MoeForCausalLM": ("qwen3moe", False),
    "Qwen3NextForCausalLM": ("qwen3next", False),
    "Gemma4ForCausalLM": ("gemma4", False),
    "OlmoeForCausalLM": ("olmoe", False),
    "GptOssForCausalLM": ("gpt-oss", False),
    "GraniteMoeForCausalLM": ("granitemoe", True),
    "GraniteMoeSharedForCausalLM": ("granitemoe", True),
    "Dots1ForCausalLM": ("dots1", False),
    "Glm4MoeForCausalLM": ("glm4moe", False),
    "Ernie4_5_MoeForCausalLM": ("ernie4_5-moe", False),
    "DeepseekV2ForCausalLM": ("deepseek2", False),
    "DeepseekV3ForCausalLM": ("deepseek2", False),
    "Lfm2MoeForCausalLM": ("lfm2moe", False),
    "ExaoneMoEForCausalLM": ("exaone-moe", False),
    "ExaoneMoeForCausalLM": ("exaone-moe", False),
}


# What llama.cpp multiplies without an adapter, and without a word: of DeepSeek, b11549 served these as the base.
_NO_ADAPTER_IN_GGUF = {
    "deepseek2": ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "qwen3next": ("in_proj_qkvz",),  # cut in two there, so the server does not start
}
_GGUF_EXPERTS = {
    "gate_proj": "FFN_GATE_EXP", "up_proj": "FFN_UP_EXP", "gate_up_proj": "FFN_GATE_UP_EXP",
    "down_proj": "FFN_DOWN_EXP",
}  # fmt: skip
_NOT_IN_MLX = ("Gemma4ForCausalLM", "Qwen3NextForCausalLM")


def _names_in_gguf(base: Base, but: Collection[str] = ()) -> tuple[str, bool]:
    """Look up what GGUF calls the architecture, and whether q and k are sorted there."""
    known = [architecture for architecture in _ARCHITECTURES if architecture not in but]
    if base.architecture not in known:
        raise LoraInitError(
            f"{base.source!r} is a {base.architecture}, whose names in GGUF and MLX are not known here. Known are "
            f"{', '.join(known)}. For others use {{merge_into}}, and the engine's own converter.",
            merge_into=...,
        )
    return _ARCHITECTURES[base.architecture]


def gguf_names(trained: Trained, base: Base) -> dict[str, str]:
    """Look up what GGUF calls the layers; refuse one that has no name there."""
    require("gguf")
    import gguf

    architecture, _ = _names_in_gguf(base)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(number, base.config.num_hidden_layers)
    names: dict[str, str] = {}
    for layer, adapter in trained.layers.items():
        owner, _, end = layer.rpartition(".")
        if end in _NO_ADAPTER_IN_GGUF.get(architecture, ()):
            raise LoraInitError(
                f"layer {layer!r} of {base.architecture}: llama.cpp applies no adapter to it. Leave it out of "
                "training, or use {merge_into}.",
                merge_into=...,
            )
        name = known.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if adapter.experts and end in _GGUF_EXPERTS:
            tensor = gguf.MODEL_TENSOR[_GGUF_EXPERTS[end]]
            name = f"{gguf.TENSOR_NAMES[tensor].format(bid=place_of(owner)[1])}.weight"
        if name is None:
            raise LoraInitError(
                f"layer {layer!r} of {base.architecture} has no name in GGUF. Use {{merge_into}}.", merge_into=...
            )
        names[layer] = name
    return names


def _in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Sort the rows of each head from first half and second half to pairs of one of each.

    Rotary positions turn pairs of rows. transformers pairs a row with one half a head away, and llama.cpp, for these
    architectures, with the next one; its converter sorts the rows of the weights accordingly.
    """
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)  # [head, half, place, rank]
    return halves.transpose(1, 2).reshape(rows.shape)


def check_mlx(trained: Trained, base: Base) -> None:
    """Refuse a base whose names in MLX are not known."""
    _names_in_gguf(base, but=_NOT_IN_MLX)


def write_peft(path: Path, trained: Trained, base: Base) -> None:
    """Write a PEFT directory; patterns only where ranks differ."""
    plain = [name for name, layer in trained.layers.items() if not layer.experts]
    write_files(path, trained.tensors(), config_of(trained, _target_modules(base, plain)))


def _target_modules(base: Base, layers: Collection[str]) -> list[str]:
    """Name layers by the ends of their names where these select no others of the base, else in full."""
    endings = sorted({name.rpartition(".")[2] for name in layers})
    modules = {name for name, _ in base.model.named_modules()}
    if any(name not in modules for name in layers):  # single experts, as the base has them no longer
        return endings
    selected = {name for name in modules if name.rpartition(".")[2] in endings}
    return endings if selected == set(layers) else list(layers)


def write_mlx(path: Path, trained: Trained, base: Base) -> None:
    """Write what mlx-lm loads: A and B transposed, DoRA's magnitude as m, and the names of the layers in full."""
    tensors = {}
    for name, layer in trained.layers.items():
        a, b = layer.a, layer.b
        if not layer.experts:  # -> [d_in, r] and [r, d_out]; mlx-lm has experts as they are here
            a, b = a.T, b.T
        tensors[f"{name}.lora_a"] = a.contiguous()
        tensors[f"{name}.lora_b"] = b.to(layer.a.dtype).contiguous()
        if layer.magnitude is not None:
            tensors[f"{name}.m"] = layer.magnitude
    save_file(tensors, path / "adapters.safetensors")
    parameters = {"rank": trained.rank, "scale": trained.scaling, "dropout": 0.0, "keys": list(trained.layers)}
    kind = "dora" if trained.dora else "lora"
    # -1 is for all blocks: "keys" names the layers.
    config = {"model": base.source, "fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    write_json(path / CONFIG_FILE, config)


def write_ollama(path: Path, trained: Trained, base: Base) -> None:
    """Write a GGUF adapter and a Modelfile beside it."""
    write_gguf(path / "adapter.gguf", trained, base)
    directory = Path(base.source).expanduser()  # what is relative in a Modelfile is so to the Modelfile
    source = directory.resolve() if directory.is_dir() else base.source  # or the name of a model
    (path / "Modelfile").write_text(f"FROM {source}\nADAPTER ./adapter.gguf\n", encoding="utf-8")


def write_gguf(path: Path, trained: Trained, base: Base) -> None:
    """Write a GGUF adapter, float32.

    llama.cpp scales each pair by alpha / rank with one alpha for all and the rank of the pair itself, so that a layer
    with fewer ranks would act too strongly: its B is multiplied by the opposite.
    """
    import gguf

    alpha = alpha_for(trained.scaling, trained.rank)
    architecture, sorts = _names_in_gguf(base)
    heads = {}  # how many there are in layers whose rows are sorted
    if sorts:
        heads = {"q_proj": base.config.num_attention_heads, "k_proj": base.config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, new in gguf_names(trained, base).items():
        layer, ending = trained.layers[name], name.rpartition(".")[2]
        b = layer.b.float() * (layer.scaling * layer.rank / alpha)
        if ending in heads:  # the outputs of q and k are the rows of B
            b = _in_pairs(b, heads[ending])
        # [r, d_in] and [d_out, r], as PyTorch has them: GGUF counts axes from the last.
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
