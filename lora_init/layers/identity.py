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
    count = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs two 4-bit weights into a byte
        if state is None:
            count += parameter.numel()
        else:
            count += state.shape.numel()
    return count


def dtype_of(model: nn.Module) -> str:
    """Return the type of a model's first weight that is no integer, such as `"bfloat16"`; empty if there is none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # quantized weights are integers
            return str(parameter.dtype).removeprefix("torch.")
    return ""


def fingerprint(model: nn.Module) -> str:
    """Compute a hash that tells models apart, of the names and shapes of the weights and of 16 values of each.

    It has 32 hexadecimal digits. Values are rounded to bfloat16, so that one checkpoint gives one fingerprint in
    float32 and in bfloat16.
    """
    return digest_of_weights(weights(unwrapped(model)))


def digest_of_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes and 16 values of each weight, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, weight in tensors:
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
        # A weight on meta has no values.
        if weight.device.type != "meta" and weight.numel():
            try:
                flat = weight.reshape(-1)
            except NotImplementedError:  # a quantized weight in a tensor class of its own, such as torchao's
                flat = weight.dequantize().reshape(-1)
            # float64 is exact up to 2^53 entries; float32 would not be beyond 2^24.
            places = torch.linspace(0, flat.numel() - 1, 16, dtype=torch.float64).long()
            values = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
            # As integers, since numpy has no bfloat16.
            digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


# Entries of a configuration that change nothing of what a layer reads: where the model comes from, how it is stored,
# the form of its output, what only training uses, and labels.
_IDLE = re.compile(
    r"_|(name_or_path|architectures|transformers_version|(torch_)?dtype|use_cache|return_dict|(id2label|label2id)|"
    r"problem_type|quantization_config|initializer_\w+|output_(hidden_states|attentions|router_logits)|((forced_)?[be]os|pad|sep|cls|unk)_token_id|"
    r"(?!token_)\w*dropout\w*|\w*_pdrop|layerdrop|mask_(time|feature)_\w+|ctc_\w+|chunk_size_feed_forward|"
    r"pretraining_tp|router_jitter_noise|router_aux_loss_coef)$"
)


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return what decides, beside the weights, how a model computes, such as `{"config.rms_norm_eps": 1e-05}`.

    A fingerprint covers the weights alone; the same weights with another `rope_theta` give other inputs to each layer.
    Entries of a nested configuration have names with dots. Buffers that are saved, as the means of a batch norm, are
    one entry, a hash like the fingerprint. Tokens that decide what modules compute are entries, too: RoBERTa counts
    positions from the padding, and CLIP reads its description of a text at the token that ends it.
    """
    plain = unwrapped(model)
    entries: dict[str, Any] = {}
    for name, config in _outermost_configs(plain).items():
        entries.update(_flat(name, config))
    entries |= _tokens_of_modules(plain)
    buffers = _saved_buffers(plain)
    if buffers:
        entries["config.saved buffers"] = digest_of_weights(buffers)
    return entries


def _saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List the floating-point buffers that a checkpoint has; others are computed anew when a model is made.

    Empty if one is on meta: without its values nobody knows whether it is the same.
    """
    saved = model.state_dict(keep_vars=True)
    buffers = []
    for name, buffer in model.named_buffers():
        plain = plain_name(name)
        if name in saved and buffer.is_floating_point() and ".lora_" not in plain:  # the base's, not an adapter's
            if buffer.is_meta:
                return []
            buffers.append((plain, buffer))
    return buffers


def _outermost_configs(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """Find the configurations that no other one includes: a user's module may hold several models.

    The first is called `config`. A configuration of diffusers is a mapping and covers all of its model; a mapping that
    a user's module has as `config` says nothing of the models inside, so theirs are taken, too.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    covered: list[str] = []  # modules whose configuration includes the ones of their parts
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        is_mapping = isinstance(config, Mapping)
        inside = any(is_below(name, owner) for owner in covered)
        if inside or not (is_mapping or hasattr(config, "to_dict")):
            continue
        key = f"config.{plain_name(name)}" if configs else "config"
        configs[key] = config if is_mapping else config.to_dict()
        if not is_mapping or type(config).__module__.startswith("diffusers."):
            covered.append(name)
    return configs


def _tokens_of_modules(model: nn.Module) -> dict[str, int]:
    """Return the tokens that modules compute with: of padding, of a text's end, and between its parts.

    A classifier reads a text at its last token before the padding, or at the token that ends it, by its configuration.
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
        if hasattr(model, head):
            tokens[f"config.{key} of {head}"] = getattr(texts, key, None)
    for name, module in model.named_modules():
        own, place = vars(module), plain_name(name) or "the model"
        if "position" in name:  # other embeddings only leave the row of this token untrained
            tokens[f"config.padding of {place}"] = getattr(module, "padding_idx", None)
        for what, key in (("end", "eos_token_id"), ("padding of texts", "pad_index"), ("parting", "sep_token_id")):
            tokens[f"config.{what} of {place}"] = own.get(key)
    # Some have a list of tokens, or none: what is not one number is not compared.
    return {name: token for name, token in tokens.items() if isinstance(token, int)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a nested configuration that decide what is computed, under names with dots."""
    if isinstance(value, Mapping):
        if name != "config":
            yield name, "given"  # and not None
        for key, inner in value.items():
            if not _IDLE.match(str(key)):
                yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, tuple):
        yield name, list(value)  # as a file of JSON has it, in which it is compared
    elif value is None or isinstance(value, (bool, int, float, str, list)):
        yield name, value


def differing_config(recorded: Any, config: Mapping[str, Any]) -> str:
    """Describe the first entry of a configuration that differs from a record; return an empty text if all agree.

    Another version of transformers may have other entries, so an entry that one side lacks is no difference. A
    dictionary that is no configuration itself, such as `rope_parameters`, holds what is set: there it is one.
    """
    if not isinstance(recorded, Mapping):
        recorded = {}
    names = dict.fromkeys(config)
    for name in recorded:
        if name.startswith("config."):
            names.setdefault(name)
    for name in names:
        owner = name.rpartition(".")[0]
        # A nested configuration names its kind of model; a dictionary does not, and both sides must have it.
        is_whole = recorded.get(owner) == config.get(owner) == "given" and f"{owner}.model_type" not in config
        there = (name in recorded and name in config) or is_whole
        if there and recorded.get(name) != config.get(name):
            return f"{name.removeprefix('config.')} {recorded.get(name)!r:.60} instead of {config.get(name)!r:.60}"
    return ""
