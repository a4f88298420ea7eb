"""Which model this is: a fingerprint of its weights, what its configuration computes, how many parameters it has."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lora_init.layers.wrappers import is_below, plain_name, unwrapped, weights


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, each shared one once, 4-bit weights by their unpacked size."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)


def dtype_of(model: nn.Module) -> str:
    """Return the type of a model's first weight that is no integer, such as `"bfloat16"`; empty if there is none."""
    return next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "")


def fingerprint(model: nn.Module) -> str:
    """Compute what tells models apart: a hash of the names and shapes of the weights and of 16 values of each.

    They are 32 hexadecimal digits. Values are rounded to bfloat16, so that one checkpoint gives one fingerprint in
    float32 and in bfloat16.
    """
    return _digest_of(weights(unwrapped(model)))


def _digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, weight in tensors:
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
        if weight.device.type != "meta" and weight.numel():
            try:
                flat = weight.reshape(-1)
            except NotImplementedError:  # a quantized weight in a tensor class of its own, such as torchao's
                flat = weight.dequantize().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, 16, dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


# Names in a configuration that change nothing of what a layer reads: whence it comes, how it is stored or answers, what
# only training uses, and labels.
_IDLE = re.compile(
    r"_|(name_or_path|architectures|transformers_version|(torch_)?dtype|use_cache|return_dict|(id2label|label2id)|"
    r"problem_type|quantization_config|initializer_\w+|output_(hidden_states|attentions|router_logits)|((forced_)?[be]os|pad|sep|cls|unk)_token_id|"
    r"(?!token_)\w*dropout\w*|\w*_pdrop|layerdrop|mask_(time|feature)_\w+|ctc_\w+|chunk_size_feed_forward|"
    r"pretraining_tp|router_jitter_noise|router_aux_loss_coef)$"
)


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return what decides, beside the weights, how a model computes, such as `{"config.rms_norm_eps": 1e-05}`.

    A fingerprint knows the weights alone; the same weights with another `rope_theta` give other inputs to each layer.
    Entries of a nested configuration have names with dots. Buffers that are saved, as the means of a batch norm, are
    one entry, a hash like the fingerprint. So are tokens that decide what modules compute: positions are counted from
    the padding in RoBERTa, and what CLIP says of a text stands at its end.
    """
    plain = unwrapped(model)
    entries = {key: value for name, config in _outermost_configs(plain).items() for key, value in _flat(name, config)}
    entries |= _tokens_of_modules(plain)
    saved = plain.state_dict(keep_vars=True)
    buffers = [(plain_name(name), one) for name, one in plain.named_buffers() if name in saved]
    floating = [(name, one) for name, one in buffers if one.is_floating_point() and ".lora_" not in name]
    is_known = floating and not any(one.is_meta for _, one in floating)
    return entries | ({"config.saved buffers": _digest_of(floating)} if is_known else {})


def _outermost_configs(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """Find the configurations that no other holds: a module of one's own may hold several models.

    The first is called `config`. Those of diffusers are mappings; a mapping of one's own says nothing of models inside.
    """
    found: dict[str, Mapping[str, Any]] = {}
    whole: list[str] = []
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        is_mapping = isinstance(config, Mapping)
        inside = any(is_below(name, owner) for owner in whole)
        if inside or not (is_mapping or hasattr(config, "to_dict")):
            continue
        found["config" if not found else f"config.{plain_name(name)}"] = config if is_mapping else config.to_dict()
        if not is_mapping or type(config).__module__.startswith("diffusers."):
            whole.append(name)
    return found


def _tokens_of_modules(model: nn.Module) -> dict[str, int]:
    """Return the tokens that modules keep: the padding of embeddings of positions or of a text, its parts and its end.

    A classifier takes the last token before the padding, or the one at the end, by its configuration.
    """
    tokens: dict[str, Any] = {}
    config: Any = getattr(model, "config", None)
    texts = config
    with suppress(AttributeError, ValueError):  # of several texts, or none
        texts = config.get_text_config()
    heads = {"score": "pad_token_id", "classification_head": "eos_token_id"}
    if getattr(config, "model_type", None) == "ctrl":
        heads["classifier"] = "pad_token_id"
    for head, key in heads.items():
        tokens[f"config.{key} of {head}"] = getattr(texts, key, None) if hasattr(model, head) else None
    for name, module in model.named_modules():
        own, place = vars(module), plain_name(name) or "the model"
        tokens[f"config.padding of {place}"] = getattr(module, "padding_idx", None) if "position" in name else None
        for what, key in (("end", "eos_token_id"), ("padding of texts", "pad_index"), ("parting", "sep_token_id")):
            tokens[f"config.{what} of {place}"] = own.get(key)
    return {name: token for name, token in tokens.items() if isinstance(token, int)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if name != "config":
            yield name, "given"  # and not None
        for key, inner in value.items():
            if not _IDLE.match(str(key)):
                yield from _flat(f"{name}.{key}", inner)
    elif value is None or isinstance(value, (bool, int, float, str, list, tuple)):
        yield name, list(value) if isinstance(value, tuple) else value


def differing_config(recorded: Any, config: Mapping[str, Any]) -> str:
    """Return in words the first entry of a configuration that a record has otherwise; empty if all agree.

    Another version of transformers may know other entries, so one that a side lacks says nothing; but for entries of a
    dictionary that is no configuration itself, such as `rope_parameters`, which holds what is set.
    """
    recorded = recorded if isinstance(recorded, Mapping) else {}
    for name in dict.fromkeys([*config, *(one for one in recorded if one.startswith("config."))]):
        owner = name.rpartition(".")[0]
        is_whole = recorded.get(owner) == config.get(owner) == "given" and f"{owner}.model_type" not in config
        there = (name in recorded and name in config) or is_whole
        if there and recorded.get(name) != config.get(name):
            return f"{name.removeprefix('config.')} {recorded.get(name)!r:.60} instead of {config.get(name)!r:.60}"
    return ""
