"""What `lora_init` shows to a user, to an editor and to mypy."""

import ast
import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import lora_init
from lora_init.adapters.asked import Options

SOURCE = Path(lora_init.__file__)


def test_dir_shows_public_names_alone_and_importing_them_takes_no_torch():
    program = "import sys, lora_init; print(*dir(lora_init)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, torch = done.stdout.splitlines()
    assert names.split() == sorted([*lora_init.__all__, "__version__"]) and torch == "False"
    assert all(getattr(lora_init, name) for name in lora_init.__all__)


def test_editors_and_mypy_see_the_names_that_are_resolved():
    block = next(node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == lora_init._HOMES


def test_mypy_sees_every_name_and_option(tmp_path):
    every = ", ".join(f"{one.name}=some" for one in fields(Options))
    script = tmp_path / "caller.py"
    script.write_text(
        "from typing import Any\n"
        "import torch\n"
        "import lora_init\n"
        "from lora_init import Statistics, build_adapter, collect, initialize\n"
        "def use(model: torch.nn.Module, some: Any, stats: Statistics) -> None:\n"
        f"    initialize(model, some, method='eva', tokenizer=some, config=None, adapter_name='mine', {every})\n"
        "    initialize(model, [], 8, 1.0, 'eva', lora_alpha=16, target_modules=['q_proj'], center=False)\n"
        "    initialize(some)\n"
        "    collect(model, [], rank=8, seed=1)\n"
        "    build_adapter(stats, 8, lora_alpha=16)\n"
        "    initialize(model, [], rnak=8)\n"
        "    initialize(model, [], rank='8')\n"
        "    collect(model, [], rnak=8)\n"
        "    build_adapter(stats, rnak=8)\n"
        "    plan: int = lora_init.allocate_ranks(stats)\n"
        "    lora_init.build_adaptor\n" + "".join(f"    lora_init.{name}\n" for name in lora_init.__all__)
    )
    command = [sys.executable, "-m", "mypy", str(script)]  # with the settings and the cache of this repository
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE.parents[1], check=False)
    errors = [line for line in done.stdout.splitlines() if "caller.py:" in line and ": error: " in line]
    expected = [
        '"rnak" for "initialize"', 'incompatible type "str"; expected "int"', '"rnak" for "collect"',
        '"rnak" for "build_adapter"', 'expression has type "RankAllocation", variable has type "int"',
        'Module has no attribute "build_adaptor"',
    ]  # fmt: skip
    assert len(errors) == len(expected), done.stdout + done.stderr
    assert all(what in error for what, error in zip(expected, errors, strict=True)), errors


def test_what_bitsandbytes_misses_is_no_concern_of_a_user(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("another thing")
    assert caplog.messages == ["another thing"]
