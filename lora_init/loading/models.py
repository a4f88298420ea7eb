"""A model directory or hub id -> the model in the class it was saved as, its tokenizer, and PEFT's task type."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_init.errors import LoraInitError, first_line

# Endings of a class name in `config.architectures`, the first that fits: PEFT's task type and transformers' Auto class.
_KINDS = {
    "ForSequenceClassification": ("SEQ_CLS", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("TOKEN_CLS", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
    "ForMaskedLM": (None, "AutoModelForMaskedLM"),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    "ForCausalLM": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "LMHeadModel": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "Model": ("FEATURE_EXTRACTION", "AutoModel"),
}
_CLASS_OF_TASK = {task: auto_class for task, auto_class in _KINDS.values() if task}
TASK_TYPES = tuple(_CLASS_OF_TASK)
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """What the command line needs of a model.

    Attributes:
        model: The model in evaluation mode on its device.
        tokenizer: Its tokenizer.
        task_type: PEFT's task type, or None where PEFT has none for this kind of model.
        seq2seq: Whether it is an encoder-decoder: prompts go to the encoder, completions to the decoder.
        drawn: Names of the parameters that the checkpoint lacks, or has in another shape: they are random.
    """

    model: Any
    tokenizer: Any
    task_type: str | None
    seq2seq: bool
    drawn: frozenset[str] = frozenset()


def load_model(
    source: str,
    *,
    task_type: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
    n_labels: int | None = None,
) -> LoadedModel:
    """Load a language model and its tokenizer.

    The class is the one that the checkpoint was saved as. With `task_type` it is the class for that task, and a head
    that the checkpoint lacks starts at random from `seed`.

    Args:
        source: A directory with a config.json, or a hub id.
        task_type: One of `TASK_TYPES`. Default: what the checkpoint's class is for.
        dtype: One of `DTYPES`; `"auto"` keeps the checkpoint's.
        device: A torch device; `"auto"` is the first GPU if there is one.
        trust_remote_code: Allow code that comes with the model to run.
        seed: Seed of weights that the checkpoint lacks.
        n_labels: Classes of a classifier; a head of another size in the checkpoint is replaced.

    Raises:
        LoraInitError: There is no such model, it cannot be read, runs code of its own, or does not read text; or an
            argument is none of the values above.
    """
    if task_type is not None and task_type not in TASK_TYPES:
        raise LoraInitError(f"task type {task_type!r} is unknown. Choose one of {', '.join(TASK_TYPES)}.")
    if dtype not in DTYPES:
        raise LoraInitError(f"dtype {dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
    place = _find_device(device)
    _check_source(source)

    import torch
    import transformers

    code = {"trust_remote_code": trust_remote_code}
    config = _guarded(source, transformers.AutoConfig.from_pretrained, **code)
    found_task, auto_class = _kind(source, config, task_type)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    # Remote code is reached only through the Auto classes.
    saved_as = None if task_type or trust_remote_code else getattr(transformers, architecture, None)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if saved_as is None:
        options |= code
    if n_labels is not None:
        options |= {"num_labels": n_labels, "ignore_mismatched_sizes": True}
    if getattr(config, "quantization_config", None) is not None:
        options["device_map"] = {"": place}  # quantised weights cannot move afterwards
    # The tokenizer first: it is quick to fail.
    tokenizer = _guarded(source, transformers.AutoTokenizer.from_pretrained, **code)
    torch.manual_seed(seed)
    load = (saved_as or getattr(transformers, auto_class)).from_pretrained
    model, loading = _guarded(source, load, output_loading_info=True, **options)
    reshaped = (key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])
    if "device_map" not in options:
        model.to(place)
    drawn = frozenset([*loading["missing_keys"], *reshaped])
    return LoadedModel(model.eval(), tokenizer, task_type or found_task, bool(config.is_encoder_decoder), drawn)


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model alone.

    Raises:
        LoraInitError: See `load_model`.
    """
    _check_source(source)
    import transformers

    return _guarded(source, transformers.AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)


def _find_device(device: str) -> Any:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if device == "cuda" and os.environ.get("LOCAL_RANK", "").isdecimal():  # of torchrun: one GPU for each process
            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LoraInitError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    return place


def _check_source(source: str) -> None:
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            raise LoraInitError(
                f"model {source!r} has no config.json{': it is an adapter. Name its base model' if adapter else ''}. "
                "A model directory as save_pretrained() writes it is needed."
            )
    elif path.exists():
        raise LoraInitError(f"model {source!r} is a file. Name the directory that it lies in.")
    elif source.startswith((".", "~", "/")) or source.count("/") > 1 or "\\" in source or not source.strip():
        raise LoraInitError(f"model {source!r}: no such directory.")


def _kind(source: str, config: Any, task_type: str | None) -> tuple[str | None, str]:
    if task_type is not None:
        return task_type, _CLASS_OF_TASK[task_type]
    architecture = (getattr(config, "architectures", None) or ["ForCausalLM"])[0]
    kind = next((kind for ending, kind in _KINDS.items() if architecture.endswith(ending)), None)
    if kind is None:
        raise LoraInitError(
            f"model {source!r} is a {architecture}, which the command line cannot feed: it reads text only. "
            "In Python, lora_init.collect takes any model and any batches."
        )
    # A multimodal model generates too, but has no encoder that takes the text.
    if kind[0] == "SEQ_2_SEQ_LM" and not config.is_encoder_decoder:
        return "CAUSAL_LM", "AutoModelForImageTextToText"
    return kind


def _guarded(source: str, load: Any, **options: Any) -> Any:
    """Call a `from_pretrained`, and turn what it raises into one line about the model."""
    from safetensors import SafetensorError

    try:
        return load(str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise LoraInitError(
                f"model {source!r} needs code that comes with it. Read that code, then pass --trust-remote-code."
            ) from error
        if isinstance(error, OSError) and not Path(source).expanduser().is_dir():
            offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "on", "true", "yes"}
            raise LoraInitError(
                f"model {source!r} is no directory here and not in the hub's cache, and the hub "
                + ("is not asked, because HF_HUB_OFFLINE is set." if offline else f"says: {first_line(error)}")
            ) from error
        raise LoraInitError(f"model {source!r} cannot be loaded: {first_line(error)}") from error
