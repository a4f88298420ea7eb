"""What `lora_init` shows to a user, to an editor and to mypy."""

import ast
import logging
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import lora_init
from lora_init.adapters.init_config import Options

SOURCE = Path(lora_init.__file__)
CALLER = Path(__file__).with_name("caller.py")


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


def test_mypy_sees_every_option():
    """`make check` reads the call there, and refuses what is misspelt or of another type beside it."""
    call = next(node for node in ast.walk(ast.parse(CALLER.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    missing = sorted({one.name for one in fields(Options)} - {one.arg for one in call.keywords})
    assert not missing, f"add {', '.join(f'{name}=some' for name in missing)} to the first call in {CALLER.name}"


def test_what_bitsandbytes_misses_is_no_concern_of_a_user(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("another thing")
    assert caplog.messages == ["another thing"]
