"""The command `lora-init env`: what a bug report needs to say about versions and machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from lora_init.cli.console import AsJson, busy, make_console, print_json
from lora_init.cli.tables import facts

_PACKAGES = (
    "lora-init", "torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "tokenizers", "numpy",
    "pandas", "typer", "matplotlib", "scikit-learn", "scipy", "gguf",
)  # fmt: skip
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE")


def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs: versions, processor, memory, GPUs, and variables that change what runs."""
    with busy("importing torch"):
        import torch
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    about = {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: _version(package) for package in _PACKAGES},
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} of them for torch",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 10**9:.0f} GB",
        "gpus": ", ".join(f"{gpu.name} {gpu.total_memory / 10**9:.0f} GB" for gpu in gpus) or "none",
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if as_json:
        print_json(about)
    else:
        make_console().print(facts(about))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
