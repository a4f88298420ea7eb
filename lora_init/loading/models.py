"""A model directory or hub id -> the model in the class it was saved as, its tokenizer, and PEFT's task type."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_init.errors import LoraInitError, did_you_mean, first_line, in_one_line, require
from lora_init.loading.batches import padding_token
from lora_init.loading.hub import check_hub, stay_offline

# Endings of a class name in `config.architectures`, the first that fits: PEFT's task type and transformers' Auto class.
# So the order matters: the last one fits nearly all of them.
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
CLASS_OF_TASK = {task: auto_class for task, auto_class in _KINDS.values() if task}
TASK_TYPES = tuple(CLASS_OF_TASK)
DTYPES = ("auto", "float32", "bfloat16", "float16")
# How a model can be quantized while it is loaded: what transformers takes as `quantization_config`.
QUANTIZATIONS = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
# What a weight of a linear layer then takes: 4 bits and a float32 for each block of 64, or 8 bits.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}
_HEADS = ("classifier", "score")  # of a classifier, which are trained whole
# A directory without any of these has no tokenizer; transformers would make an empty one for some kinds of model.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "sentencepiece*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class LoadedModel:
    """A model as the command line needs it, in evaluation mode on its device."""

    model: Any
    tokenizer: Any
    task_type: str | None  # PEFT's, or None where PEFT has none for this kind of model
    seq2seq: bool  # an encoder-decoder: prompts go to the encoder, completions to the decoder
    drawn: frozenset[str] = frozenset()  # parameters that the checkpoint lacks, or has in another shape: random


@dataclass(frozen=True)
class ModelSource:
    """A model whose configuration and tokenizer are read and whose weights are not, so that data can be read first."""

    name: str
    config: Any
    tokenizer: Any
    task_type: str | None  # PEFT's, or None where PEFT has none for this kind of model
    auto_class: str  # transformers' Auto class for it
    options: dict[str, Any] = field(repr=False)  # of every `from_pretrained`
    saved_as: str  # class that takes the place of the Auto class; empty if none may

    @property
    def seq2seq(self) -> bool:
        """Whether it is an encoder-decoder."""
        return bool(self.config.is_encoder_decoder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes that the configuration names, in the order of the head's outputs."""
        return classes_of(self.config)

    def empty(self) -> Any:
        """Build it without weights; None where transformers has no such class, or code that comes with it is run."""
        import transformers

        if self.options["trust_remote_code"]:
            return None
        return on_meta(getattr(transformers, self.saved_as, getattr(transformers, self.auto_class)), self.config)

    def load(
        self,
        *,
        dtype: str = "auto",
        device: str = "auto",
        seed: int = 0,
        n_labels: int | None = None,
        quantize: str | None = None,
    ) -> LoadedModel:
        """Read the weights, in the class that they were saved as, or for a task in that for the task.

        With `n_labels` a head of another size is replaced, drawn by `seed`, and the model learns the padding token.
        """
        place = find_device(device)
        self.check_quantized(quantize)
        if dtype not in DTYPES:
            raise LoraInitError(f"dtype {dtype!r} is unknown. {did_you_mean(str(dtype), DTYPES)}")
        import torch
        import transformers

        quantized = quantize is not None or getattr(self.config, "quantization_config", None) is not None
        options = self.options | {"dtype": self._dtype(dtype, place, quantize)}
        if n_labels is not None:
            # transformers would choose the problem by the type of the labels, and by their number.
            options |= {"num_labels": n_labels, "ignore_mismatched_sizes": True}
            options["problem_type"] = "single_label_classification"
        if quantize is not None:
            options["quantization_config"] = dict(QUANTIZATIONS[quantize])
            if n_labels is not None:  # a head that the checkpoint lacks is not left alone otherwise
                options["quantization_config"]["llm_int8_skip_modules"] = list(_HEADS)
        if quantized:
            options["device_map"] = {"": place}  # quantized weights cannot move afterwards
        torch.manual_seed(seed)  # of weights that the checkpoint lacks, such as a new head
        load = getattr(transformers, self.saved_as, getattr(transformers, self.auto_class)).from_pretrained
        model, loading = _guarded(self.name, load, output_loading_info=True, **options)
        if n_labels is not None:
            # A decoder's head reads the last token that is no padding, and refuses batches if it knows none.
            model.config.pad_token_id = padding_token(self.tokenizer)
        if not quantized:
            model.to(place)
            # Only now are the type of the weights and their size known.
            n_bytes = 4 * sum(p.numel() for p in model.parameters())
            if dtype == "auto" and is_better_in_float32(model.dtype, place, n_bytes):
                model.float()
        drawn = _drawn_weights(self.name, model, loading)
        return LoadedModel(model.eval(), self.tokenizer, self.task_type, self.seq2seq, drawn)

    def _dtype(self, dtype: str, place: Any, quantize: str | None) -> Any:
        """Choose the type of the weights that are loaded; under quantization, of those that are not quantized."""
        import torch

        if dtype != "auto":
            return getattr(torch, dtype)  # a name of DTYPES
        # Quantized weights cannot be brought into another type after they are loaded.
        saved_in = getattr(self.config, "dtype", None)
        if quantize is not None and is_better_in_float32(saved_in, place):
            return torch.float32
        return dtype

    def check_quantized(self, quantize: str | None, needed: bool = False) -> None:
        """Refuse what cannot be quantized while it is loaded, and what is not where it is needed."""
        is_quantized = getattr(self.config, "quantization_config", None) is not None
        if needed and not is_quantized and quantize is None:
            raise LoraInitError(f"model {self.name!r} is not quantized, so nothing is to correct. Pass --quantize nf4.")
        if quantize is None:
            return
        if quantize not in QUANTIZATIONS:
            raise LoraInitError(f"{{quantize}} is unknown. {did_you_mean(quantize, QUANTIZATIONS)}", quantize=quantize)
        require("bitsandbytes")
        if is_quantized:
            raise LoraInitError(f"model {self.name!r} is quantized already. Leave --quantize out.")


def _drawn_weights(name: str, model: Any, loading: Mapping[str, Any]) -> frozenset[str]:
    """Name the weights that a checkpoint lacks or has in another shape; refuse one that lacks most of them."""
    names = set(loading["missing_keys"])
    for key in loading["mismatched_keys"]:
        # A name, or by the release of transformers a name and both shapes.
        names.add(key if isinstance(key, str) else key[0])
    drawn = frozenset(names)
    n_weights = len(list(model.parameters()))
    # A new head alone is no more than a few of them.
    if 2 * len(drawn) > n_weights:
        raise LoraInitError(
            f"model {name!r} lacks {len(drawn)} of {n_weights} weights, such as {min(drawn)}, which would be "
            "random. Name a whole checkpoint."
        )
    return drawn


def on_meta(model_class: Any, config: Any, trust_remote_code: bool = False) -> Any:
    """Build a model without weights; None where there is no such class, or it does not go with the configuration."""
    import torch

    make: Any = getattr(model_class, "from_config", None)  # Auto classes have it
    if make is not None:
        make = partial(make, trust_remote_code=trust_remote_code)
    elif getattr(model_class, "config_class", None) is not None:
        make = model_class
    try:
        with torch.device("meta"):  # shapes alone: nothing is allocated
            return make(config)
    except (ValueError, AttributeError, TypeError):
        return None


def classes_of(config: Any) -> tuple[str, ...]:
    """Return the names of a configuration's classes, in the order of the head's outputs."""
    return tuple(name for _, name in sorted((getattr(config, "id2label", None) or {}).items()))


def check_model_source(source: str) -> None:
    """Refuse, before anything large is imported, what can be no model or cannot be had."""
    if not _check_source(source) and not check_hub(source, "model"):
        stay_offline()


def open_model(source: str, *, task_type: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Read configuration and tokenizer of a directory or hub id, for a task or what it was saved for."""
    check_task_type(task_type)
    local = _check_source(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not local and not check_hub(source, "model"):
        options["local_files_only"] = True
    import transformers

    config = _guarded(source, transformers.AutoConfig.from_pretrained, **options)
    found_task, auto_class = task_and_class(source, config, task_type)
    if local and not _has_tokenizer(Path(source).expanduser()):
        raise LoraInitError(
            f"model {source!r} has no tokenizer beside it. Save the tokenizer of the base model there: "
            "AutoTokenizer.from_pretrained(BASE).save_pretrained(DIRECTORY)."
        )
    tokenizer = _guarded(source, transformers.AutoTokenizer.from_pretrained, **options)
    saved_as = ""
    if not task_type and not trust_remote_code:  # remote code is reached only through the Auto classes
        architectures = getattr(config, "architectures", None) or [""]
        saved_as = architectures[0]
    return ModelSource(source, config, tokenizer, found_task, auto_class, options, saved_as)


def _has_tokenizer(directory: Path) -> bool:
    for pattern in _TOKENIZER_FILES:
        first = next(directory.glob(pattern), None)
        if first is not None:
            return True
    return False


def load_model(
    source: str,
    *,
    task_type: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> LoadedModel:
    """Load a language model and its tokenizer; arguments as for `open_model` and `ModelSource.load`."""
    return open_model(source, task_type=task_type, trust_remote_code=trust_remote_code).load(**options)


def find_device(device: str) -> Any:
    """Find a torch device by name; `"auto"` is the first GPU if there is one."""
    import torch

    if device == "auto":
        device = _best_device()
    try:
        place = torch.device(device)
        torch.empty(0, device=place)  # a name that torch knows may still be of a device that is not here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        if reason.startswith("Expected one of"):  # two dozen names, of which most are for nobody
            reason = "expected auto, cpu, cuda, cuda:1 or mps."
        raise LoraInitError(f"device {device!r} cannot be used here: {reason}") from error
    return place


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        local_rank = os.environ.get("LOCAL_RANK", "")
        if local_rank.isdecimal():  # of torchrun: one GPU for each process
            return f"cuda:{int(local_rank) % torch.cuda.device_count()}"
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def is_better_in_float32(dtype: Any, place: Any, n_bytes: int = 0) -> bool:
    """Return whether to run a model of half precision in float32: where the processor emulates the other.

    One without AVX-512 took 7.6 times as long for a matrix product in bfloat16 as in float32, and 6.2 times in float16.
    It is not done if the weights would then take `n_bytes` of more than half of the memory.
    """
    import torch

    if dtype not in (torch.bfloat16, torch.float16) or place.type != "cpu":
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and 2 * n_bytes <= _memory()


def _memory() -> int:
    """Read how many bytes of memory this machine has; 0 if that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return 0


def _check_source(source: str) -> bool:
    """Refuse what can be no model; return whether it is a directory here."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return True
        reason = f"model {source!r} has no config.json"
        if (path / "adapter_config.json").is_file():
            reason += ": it is an adapter. Name its base model"
        raise LoraInitError(f"{reason}. A model directory as save_pretrained() writes it is needed.")
    if path.exists():
        raise LoraInitError(f"model {source!r} is a file. Name the directory that it lies in.")
    # A hub id is a name, or an owner and a name: anything else was meant as a path.
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or "\\" in source or not source.strip():
        raise LoraInitError(f"model {source!r}: no such directory.")
    return False


def task_and_class(source: str, config: Any, task_type: str | None) -> tuple[str | None, str]:
    """Return the `task_type` of PEFT and the auto class of transformers that a configuration asks for."""
    if task_type is not None:
        return task_type, CLASS_OF_TASK[task_type]
    architecture = (getattr(config, "architectures", None) or ["ForCausalLM"])[0]
    kind = kind_of(architecture, config.is_encoder_decoder)
    if kind is None:
        raise LoraInitError(
            f"model {source!r} is a {architecture}, which the command line cannot feed: it reads text only. "
            "In Python, lora_init.collect takes any model and any batches."
        )
    return kind


def kind_of(architecture: str, is_encoder_decoder: bool) -> tuple[str | None, str] | None:
    """Return PEFT's task type and transformers' Auto class of a class of models; None if they are not known."""
    kind = next((kind for ending, kind in _KINDS.items() if architecture.endswith(ending)), None)
    # A multimodal model generates too, but has no encoder that takes the text.
    if kind is not None and kind[0] == "SEQ_2_SEQ_LM" and not is_encoder_decoder:
        return "CAUSAL_LM", "AutoModelForImageTextToText"
    return kind


def check_task_type(task_type: Any) -> None:
    """Refuse a task type that PEFT does not have; None is one that is not given."""
    if task_type is not None and task_type not in TASK_TYPES:
        raise LoraInitError(f"task type {task_type!r} is unknown. {did_you_mean(str(task_type), TASK_TYPES)}")


def task_of(model: Any) -> str | None:
    """Return PEFT's task type for the class of a model; None without one, or if its wrapper cannot call the model."""
    config = getattr(model, "config", None)
    kind = kind_of(type(model).__name__, bool(getattr(config, "is_encoder_decoder", False)))
    # PEFT's wrapper of a task passes `input_ids`, which a model of sound or of pictures does not take.
    reads_tokens = "input_ids" in inspect.signature(type(model).forward).parameters
    if kind is None or not reads_tokens:
        return None
    return kind[0]


def _guarded(source: str, load: Any, **options: Any) -> Any:
    """Call a `from_pretrained`, and turn what it raises into one line about the model."""
    from safetensors import SafetensorError

    path = Path(source).expanduser()
    try:
        return load(str(path) if path.is_dir() else source, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise LoraInitError(
                f"model {source!r} needs code that comes with it. Read that code, then pass --trust-remote-code."
            ) from error
        if "for this kind of AutoModel" in str(error):  # which lists the hundreds that there are
            raise LoraInitError(
                f"model {source!r} cannot be loaded for this task type: its kind has no head for it."
            ) from error
        raise LoraInitError(f"model {source!r} cannot be loaded: {in_one_line(error)}") from error
