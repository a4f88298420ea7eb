"""The registry of engines: all that is known of one stands in its `Engine`. Importing this file imports no torch.

Everything else asks the registry: `export`, its help, what `inspect` and `init` say about serving. To add an engine,
add an `Engine` to `ENGINES`, with a function for its form if it loads no PEFT directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

from lora_init.errors import LoraInitError, did_you_mean

if TYPE_CHECKING:
    from lora_init.serving.base import Base
    from lora_init.serving.trained import Trained

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank of vLLM may be
_WRITERS = "lora_init.serving.writers"
_EXPERTS = "lora_init.serving.experts"
_PEFT_DIRECTORY = f"{_WRITERS}:write_peft"


@dataclass(frozen=True)
class Engine:
    """An engine, and all that is known of what it loads."""

    title: str  # its name in sentences
    command: str  # how it serves the adapter, with {base}, {path}, {name} and {rank} to fill in
    # where its API begins by default, as options of `lora-init verify`; empty where there is no server
    server: str = ""
    # writes its form of an adapter of one scaling into an empty directory, or where `is_file` a file; takes the path,
    # a `Trained` and a `Base`. This and `check` are functions, or `"module:name"`, imported when it is called
    write: Callable[[Path, Trained, Base], None] | str = _PEFT_DIRECTORY
    # refuses, before the work, a `Trained` or a `Base` whose layers have no name in its form
    check: Callable[[Trained, Base], object] | str | None = None
    # brings an adapter of fused experts into the names and shapes that it has for them, by a `Trained` and a `Base`;
    # likewise. None if it takes none
    experts: Callable[[Trained, Base], Trained] | str | None = None
    is_file: bool = False  # whether its form is a GGUF file and not a directory
    libraries: tuple[str, ...] = ()  # what it needs of the extras
    bytes_each: int | None = None  # bytes of one parameter where that is not the adapter's own type
    dora: bool = False  # whether it takes DoRA in its form
    ranks: bool = False  # whether it takes layers of different ranks in its form
    # what it reads as PEFT does in a directory that PEFT wrote: `"lora"` with one rank and one scaling, rsLoRA, ranks
    # by pattern. Nothing if it loads no such directory
    reads: tuple[Literal["lora", "use_rslora", "rank_pattern"], ...] = ()
    allows: Callable[[int], bool] = lambda rank: True  # tells the ranks that it takes
    allowed: str = "every rank"  # these in words
    several: str = ""  # what stands between adapters at the end of `command`; empty if it serves one
    option: str = ""  # what it must be told for an adapter as it is, with {rank} to fill in

    @property
    def writes_peft(self) -> bool:
        """Whether its form is a PEFT directory."""
        return self.write == _PEFT_DIRECTORY

    def name_with(self, rank: int) -> str:
        """Name it with what it must be told for an adapter with this rank."""
        return f"{self.title} ({self.option.format(rank=vllm_rank(rank))})" if self.option else self.title

    def write_form(self, path: Path, trained: Trained, base: Base) -> None:
        """Write its form of an adapter."""
        trained = self.with_experts(trained, base)
        _resolved(self.write)(path, trained, base)

    def with_experts(self, trained: Trained, base: Base) -> Trained:
        """Bring fused experts into its names and shapes; an adapter without them as it is."""
        if self.experts is None or not any(layer.experts for layer in trained.layers.values()):
            return trained
        adapted: Trained = _resolved(self.experts)(trained, base)
        return adapted

    def check_names(self, trained: Trained, base: Base) -> None:
        """Refuse what has no name in its form."""
        trained = self.with_experts(trained, base)
        if self.check is not None:
            _resolved(self.check)(trained, base)


def _resolved(function: Callable[..., Any] | str) -> Callable[..., Any]:
    made: Callable[..., Any] = resolve_name(function) if isinstance(function, str) else function
    return made


def vllm_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank with room for a rank; the rank itself if there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), rank)


def _is_not_padded(rank: int) -> bool:
    """Return whether TGI's and LoRAX's kernels have a rank.

    Both pad others, and then divide alpha by the padded rank in all kinds of layers but the first.
    """
    return rank == 8 or rank % 16 == 0


PEFT = Engine(
    "PEFT",
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {path})",
    dora=True,
    ranks=True,
)
_LOCAL = "--url http://127.0.0.1"
_TGI = Engine(
    "TGI",
    "text-generation-launcher --model-id {base} --lora-adapters {name}={path}",
    server=f"{_LOCAL}:3000/v1 --model {{name}}",
    reads=("lora", "use_rslora"),
    several=",",
    allows=_is_not_padded,
    allowed="rank 8 or a multiple of 16",
)
ENGINES = {
    "vllm": Engine(
        "vLLM",
        "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={path}",
        server=f"{_LOCAL}:8000/v1 --model {{name}}",
        experts=f"{_EXPERTS}:for_vllm",
        ranks=True,
        # Tried with 0.32: patterns are read rightly where the largest rank has room.
        reads=("lora", "use_rslora", "rank_pattern"),
        allows=lambda rank: rank <= VLLM_RANKS[-1],
        allowed=f"at most rank {VLLM_RANKS[-1]}",
        several=" ",
        option="--max-lora-rank {rank}",
    ),
    "sglang": Engine(
        "SGLang",
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
        "--lora-paths {name}={path}",
        server=f"{_LOCAL}:30000/v1 --model {{name}}",
        experts=f"{_EXPERTS}:by_expert",
        reads=("lora",),  # 0.5.23 computes lora_alpha / r and reads no pattern
        several=" ",
    ),
    "llama.cpp": Engine(
        "llama.cpp",
        "llama-server --model BASE.gguf --lora {path}",
        server=f"{_LOCAL}:8080/v1",
        write=f"{_WRITERS}:write_gguf",
        check=f"{_WRITERS}:gguf_names",
        experts=f"{_EXPERTS}:for_gguf",
        is_file=True,
        libraries=("gguf",),
        bytes_each=4,
        ranks=True,
        reads=("lora",),
    ),
    "ollama": Engine(
        "Ollama",
        "ollama create {name} --file {path}/Modelfile",
        server=f"{_LOCAL}:11434/v1 --model {{name}}:latest",
        write=f"{_WRITERS}:write_ollama",
        check=f"{_WRITERS}:gguf_names",
        experts=f"{_EXPERTS}:for_gguf",
        libraries=("gguf",),
        bytes_each=4,
        ranks=True,
        reads=("lora",),
    ),
    "tgi": _TGI,
    "lorax": replace(  # which began as TGI
        _TGI,
        title="LoRAX",
        several="",
        command="lorax-launcher --model-id {base} --adapter-id {path} --adapter-source local",
        server=f"{_LOCAL}:3000/v1 --model {{path}}",
    ),
    "mlx": Engine(
        "MLX",
        "mlx_lm.server --model {base} --adapter-path {path}",
        server=f"{_LOCAL}:8080/v1",
        write=f"{_WRITERS}:write_mlx",
        check=f"{_WRITERS}:check_mlx",
        experts=f"{_EXPERTS}:for_mlx",
        dora=True,
    ),
}


def check_rank(name: str | None, rank: int) -> None:
    """Refuse a rank that an engine does not take."""
    engine = find_engine(name)
    if not engine.allows(rank):
        raise LoraInitError(f"{name} takes {engine.allowed}, and this is {rank}. Choose one by {{rank}}.", rank=...)


def find_engine(name: str | None) -> Engine:
    """Look an engine up; None is PEFT itself."""
    if name is None:
        return PEFT
    if not isinstance(name, str) or name not in ENGINES:
        raise LoraInitError(f"engine {name!r} is unknown. {did_you_mean(str(name), ENGINES)}")
    return ENGINES[name]
