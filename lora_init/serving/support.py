"""Whether an engine takes an adapter: as it is, or in the form that `export` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lora_init.adapters.directory import LORA_A, LORA_B
from lora_init.errors import LoraInitError
from lora_init.layers.grid import layer_grid
from lora_init.layers.targets import PREFIX
from lora_init.loading.models import kind_of
from lora_init.planning.lora_config import scaling_of
from lora_init.serving.base import Base, config_class_of, read_base, with_changed_copies
from lora_init.serving.engines import ENGINES, PEFT, Engine, check_rank, find_engine, vllm_rank
from lora_init.serving.experts import is_single
from lora_init.serving.trained import (
    EMBEDDING,
    MAGNITUDE,
    OTHER_UPDATES,
    Trained,
    read_trained,
    scalings,
    subtract,
    with_parameters,
)

# Kinds of model that write no text, in words.
WRITE_NO_TEXT = {
    "SEQ_CLS": "a classifier", "TOKEN_CLS": "a classifier of tokens", "QUESTION_ANS": "a model that finds answers",
    "FEATURE_EXTRACTION": "an encoder",
}  # fmt: skip
_IN_TWO_PARTS = "SEQ_2_SEQ_LM"  # PEFT's name for encoder-decoder models, whose text engines write without adapters
_OF_EXPERTS = "adapter of experts"
_NO_EXPERTS = f"takes no {_OF_EXPERTS}"
_HEADS = ("lm_head", "embed_out")  # names of output embeddings in transformers, GPT-NeoX's last
_COPY = ".base_layer.weight"  # ends the name of a weight of the base that PEFT stores with the adapter of a head
# What an adapter may be trained with that neither an engine nor a merged model does.
_PEFT_ALONE = ("alora_invocation_tokens", "trainable_token_indices", "lora_bias", *OTHER_UPDATES)


def serving_note(
    ranks: Mapping[str, int], config: Mapping[str, Any], tensors: Iterable[str] = (), base_change: str = ""
) -> str:
    """Write which engines take an adapter with these ranks as it is, and which need `lora-init export`.

    `ranks` has 0 for a layer that could have an adapter and has none. Without a `lora_alpha` in `config` all layers
    have one scaling.

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
    if reason := _why_peft_alone(config):
        return f"PEFT takes this adapter as it is. {reason}"
    extra = _rarest_extra(config, tensors)
    if extra is not None:
        note = "PEFT takes this adapter as it is."
        if some := [engine.title for engine in ENGINES.values() if _exports(engine, extra)]:
            note += f" {_with_verb(some, 'need')} `lora-init export`."
        return f"{note} Others take no {extra}: `lora-init export --merge-into MODEL`."
    if not any(ranks.values()):
        return "No layer has an adapter, so there is nothing to serve."
    note = _which_take(ranks, config)
    if any(name.endswith(_COPY) for name in tensors):
        note += " Where the weight of the base in it was changed before training (--engine compares), PEFT alone does."
    for name, rank in ranks.items():
        if rank and name.rpartition(".")[2] in _HEADS:
            note += f" But not where {name!r} shares its weight with the input embedding, as `inspect --engine` tells."
    return note


def _why_peft_alone(config: Mapping[str, Any]) -> str:
    """Write why no engine serves an adapter for this task or class, or trained in this way; empty if one does."""
    if reason := _why_no_text(config):
        return reason
    for key in _PEFT_ALONE:
        if config.get(key):
            return f"It was trained with {key}, which no other does."
    return ""


def _why_no_text(config: Mapping[str, Any]) -> str:
    """Write why no engine writes text with an adapter: by its task, or by the class that PEFT notes in place of one."""
    task, name = config.get("task_type"), (config.get("auto_mapping") or {}).get("base_model_class")
    if kind := WRITE_NO_TEXT.get(str(task)):
        return f"It is of {kind}, and the engines of `lora-init export` write text."
    if task == _IN_TWO_PARTS:
        return "No engine is known to serve adapters of an encoder-decoder model."
    if not task and name and not _may_write_text(name):
        return f"No engine is known to serve adapters of {name}."
    return ""


def _may_write_text(name: str) -> bool:
    """Return whether models of a class write text without an encoder; True of one that transformers does not have."""
    config_class = config_class_of(name)
    if config_class is None:
        return True
    # Other kinds do not depend on it, and not every configuration can be made without arguments.
    kind = kind_of(name, name.endswith("ForConditionalGeneration") and config_class().is_encoder_decoder)
    return kind is not None and kind[0] == "CAUSAL_LM"


def _which_take(ranks: Mapping[str, int], config: Mapping[str, Any]) -> str:
    """Write which engines take plain LoRA of these ranks as it is, and which need an export."""
    alike = _Uniformity.of(ranks, config)
    ready, never, others = [PEFT.title], [], []
    for engine in ENGINES.values():
        reason = _why_not(engine, ranks, config, alike)
        if not reason:
            ready.append(engine.name_with(alike.largest))
        elif reason == _NO_EXPERTS:
            never.append(engine.title)
        else:
            others.append(engine.title)
    note = f"{_with_verb(ready, 'take')} this adapter as it is. {_with_verb(others, 'need')} `lora-init export`."
    if never:
        note += f" {_listed(never)} take no {_OF_EXPERTS}: `lora-init export --merge-into MODEL`."
    return note


def export_options(config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """Return the options with which `export` writes an adapter, for an engine where one takes it; None if it cannot."""
    if any(config.get(key) for key in _PEFT_ALONE):
        return None
    if _why_no_text(config):  # PEFT's own directory
        return ""
    extra = _rarest_extra(config, tensors)
    engines = [name for name, engine in ENGINES.items() if extra is None or _exports(engine, extra)]
    if not engines:
        return "--merge-into MODEL"
    return f"--engine {'vllm' if 'vllm' in engines else engines[0]}"


def _exports(engine: Engine, extra: str) -> bool:
    """Return whether `export` has a form for an engine of what an adapter has besides A and B of linear layers."""
    if extra == "DoRA":
        return engine.dora
    return engine.experts is not None and extra == _OF_EXPERTS


def _rarest_extra(config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """Return what fewest engines take of what `_extras` describes; None if there is nothing."""
    extras = [*_extras(config, tensors)]
    for extra in extras:
        if extra != _OF_EXPERTS:  # for which most engines have a form
            return extra
    return extras[0] if extras else None


def why_not_as_it_is(engine: Engine, ranks: Mapping[str, int], config: Mapping[str, Any]) -> str:
    """Describe what in ranks and scalings an engine does not take as it is; empty if it takes all."""
    return _why_not(engine, ranks, config, _Uniformity.of(ranks, config))


@dataclass(frozen=True)
class _Uniformity:
    """In what the layers of an adapter are alike: computed once, and held against every engine."""

    largest: int  # rank that an engine must have room for
    scalings: bool  # whether all layers have the scaling of the config
    ranks: bool  # whether of each kind of layers all have the rank of the config, or none has an adapter

    @classmethod
    def of(cls, ranks: Mapping[str, int], config: Mapping[str, Any]) -> _Uniformity:
        """Compare the layers. Raises an error for a damaged pattern, whatever the engine."""
        most = max(ranks.values(), default=0)
        named = int(config.get("r") or most)  # patterns may give every layer another rank
        one_scaling = "lora_alpha" not in config or _scales_alike(config, ranks, named)
        whole = not config.get("layers_to_transform") and named == most  # blocks of which no name is known lack theirs
        return cls(max(most, named), one_scaling, whole and _one_rank_a_kind(ranks, most))


def _why_not(engine: Engine, ranks: Mapping[str, int], config: Mapping[str, Any], alike: _Uniformity) -> str:
    if not engine.reads:
        return "reads no directory of PEFT"
    if of_experts := _why_not_experts(engine, ranks, config):
        return of_experts
    if not engine.allows(alike.largest):
        return f"takes {engine.allowed}, and this is {alike.largest}"
    if config.get("use_rslora") and "use_rslora" not in engine.reads:
        return "does not read use_rslora"
    if not alike.scalings:
        return "reads one scaling, and here layers have their own"
    if not alike.ranks and "rank_pattern" not in engine.reads:
        return "takes one rank for every layer of a kind"
    return ""


def _why_not_experts(engine: Engine, ranks: Mapping[str, int], config: Mapping[str, Any]) -> str:
    """Describe why an engine does not take adapters of experts as they are; empty if it does, or there are none."""
    if config.get("target_parameters"):
        return "has a form of its own for experts, and drops or refuses PEFT's"
    if not any(map(is_single, ranks)) or (engine.experts and engine.writes_peft):
        return ""
    return "has a form of its own for experts" if engine.experts else _NO_EXPERTS


def _one_rank_a_kind(ranks: Mapping[str, int], rank: int) -> bool:
    """Return whether of each kind of layers all have this rank, or none has an adapter."""
    # TGI and LoRAX stack all layers of a kind: one that differs fails, or drops the whole kind.
    for layers in layer_grid(ranks).by_kind.values():
        if {ranks[name] for name in layers.values()} not in ({0}, {rank}):
            return False
    return True


def _scales_alike(config: Mapping[str, Any], ranks: Mapping[str, int], rank: int) -> bool:
    """Return whether all layers have the scaling of the config: engines have no other, whatever patterns say."""
    scales = set(scalings(config, ranks).values())
    if not scales:
        return True
    scale = scaling_of(config["lora_alpha"], rank, bool(config.get("use_rslora")))
    return all(math.isclose(other, scale, rel_tol=1e-6) for other in scales)  # no alpha makes some exactly the same


def _extras(config: Mapping[str, Any], tensors: Iterable[str]) -> Iterator[str]:
    """Describe what an adapter directory has besides A and B of linear layers."""
    if config.get("target_parameters"):
        yield _OF_EXPERTS
    # With an adapter of an embedding or head PEFT stores a copy of the base's own weight.
    known = (LORA_A, LORA_B, f".{MAGNITUDE}", _COPY)
    for name in tensors:
        if not name.endswith(known):
            yield f"tensor {name.removeprefix(PREFIX)!r}"
    if config.get("bias") not in (None, "none"):
        yield f"bias={config['bias']!r}"
    if config.get("use_dora"):
        yield "DoRA"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _with_verb(words: list[str], verb: str) -> str:
    if len(words) == 1:
        verb += "s"
    return f"{_listed(words)} {verb}"


def try_export(
    engine: str, directory: Path, source: str, renames: Mapping[str, str], trust_remote_code: bool = False
) -> tuple[str, tuple[str, ...]]:
    """Return why `export` refuses to write an adapter for an engine, empty if it writes it; and what it then says."""
    try:
        trained = read_trained(directory, None, renames)
        trained, base = on_base(engine, trained, source, trust_remote_code=trust_remote_code)
        check_rank(engine, vllm_rank(trained.rank))  # which `export` chooses if none is given
    except LoraInitError as error:
        return error.spelled(lambda name, _: f"`lora-init export --{name.replace('_', '-')}`"), ()
    return "", note_without_text(engine, base)


def note_without_text(engine: str | None, base: Base) -> tuple[str, ...]:
    """Say of a base without an output embedding, such as an encoder, that nobody knows whether an engine takes it."""
    if engine and not base.embeddings[1]:
        return (f"its base writes no text: whether {engine} serves an adapter of such a model was not tried",)
    return ()


def on_base(
    engine: str | None, trained: Trained, source: str, start: str | Path | None = None,
    origin: Mapping[str, Any] = MappingProxyType({}), trust_remote_code: bool = False,
) -> tuple[Trained, Base]:  # fmt: skip
    """Put an adapter on its base without weights, less its start if one is named; refuse what an engine does not take.

    `origin` is what the adapter says of its start.
    """
    model = read_base(source, trained, engine is not None, trust_remote_code)
    mapping = trained.config.get("auto_mapping") or {}
    # The checkpoint's class has these names by now, so PEFT must not load another one for them.
    if engine and mapping.get("base_model_class") not in (None, type(model.model).__name__):
        trained = replace(trained, config={**trained.config, "auto_mapping": None})
    trained, changed_base = with_parameters(trained, model.parameters), None
    if start is not None:  # named as its own start, so that it is not asked for one
        before = with_parameters(read_trained(start, start), model.parameters)
        trained = subtract(trained, before, origin, str(start))
        if not origin.get("error_size"):  # else the start corrected a quantized base, which it left as it was
            changed_base = before
    trained = with_changed_copies(trained, model, changed_base)
    check_engine(engine or PEFT.title, find_engine(engine), trained, model)
    return trained, model


def check_engine(name: str, engine: Engine, trained: Trained, base: Base) -> None:
    """Refuse what an engine would refuse, or would read as something else."""
    if engine is PEFT:  # which trained it
        return
    extra = next(_not_taken(engine, trained, base), None)
    if base.model.config.is_encoder_decoder:
        extra = "adapters of an encoder-decoder model"
    if extra is not None:
        remedy = "Write a whole model instead by {merge_into}, without an engine."
        if trained.config.get("alora_invocation_tokens"):  # merged, it would act on every token
            remedy = "Serve it with PEFT."
        elif trained.config.get("trainable_token_indices"):
            remedy = "Serve it with PEFT, or save the whole model that its merge_and_unload() returns."
        raise LoraInitError(f"{name} does not take {extra}. {remedy}", merge_into=...)
    copied = next(iter(trained.copies.keys() & trained.others.keys()), None)
    if copied is not None:
        raise LoraInitError(
            f"{name} has the weights of its base alone, and {copied.removeprefix(PREFIX)!r} in the adapter is not that "
            f"of {base.source!r}, as after new tokens, or there are no safetensors here to compare it with. Serve it "
            "with PEFT; or save the base that it was trained on, and name that by {base}.",
            base=...,
        )
    # mlx-lm has one kind for all layers, "lora" or "dora".
    if trained.dora and any(layer.magnitude is None for layer in trained.layers.values()):
        raise LoraInitError(
            f"{name} takes DoRA in every layer or in none. Use {{merge_into}}, without an engine.", merge_into=...
        )
    engine.check_names(trained, base)


def _not_taken(engine: Engine, trained: Trained, base: Base) -> Iterator[str]:
    """Describe what an adapter has that an engine does not take, besides A and B of linear layers."""
    if trained.dora and not engine.dora:
        yield "DoRA"
    tied = base.embeddings[1] if base.tied else None
    for name, layer in trained.layers.items():
        if layer.ends == EMBEDDING:
            yield f"an adapter of the embedding {name!r}"
        if is_single(name) and not engine.experts:
            yield f"an adapter of the expert {name!r}"
        if layer.experts and not (engine.experts and layer.experts > 1):  # one is no expert, but a router
            yield f"an adapter of the parameter {name!r} of {layer.experts} experts"
        if name == tied:
            yield f"an adapter of {name!r}, whose weight is also the input embedding's"
    for key in sorted(trained.others.keys() - trained.copies.keys()):
        yield f"a tensor that is no adapter ({key.removeprefix(PREFIX)!r}, of modules_to_save or the like)"
    for key in ("alora_invocation_tokens", "trainable_token_indices"):
        if trained.config.get(key):
            yield key
