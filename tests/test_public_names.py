"""What `lora_init` shows to a user, to an editor and to mypy."""

import logging
import subprocess
import sys
from pathlib import Path

import lora_init

SOURCE = Path(lora_init.__file__)


def test_dir_shows_public_names_alone_and_importing_them_takes_no_torch():
    program = "import sys, lora_init; print(*dir(lora_init)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names, torch = done.stdout.splitlines()
    assert names.split() == sorted([*lora_init.__all__, "__version__"]) and torch == "False"
    assert all(getattr(lora_init, name) for name in lora_init.__all__)


def test_mypy_sees_every_name_with_its_type_and_a_misspelt_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import lora_init\n"
        "plan: int = lora_init.allocate_ranks(lora_init.Statistics.load('s'))\n"
        "lora_init.build_adaptor\n" + "".join(f"lora_init.{name}\n" for name in lora_init.__all__)
    )
    # From the root of the repository: its settings and its cache.
    command = [sys.executable, "-m", "mypy", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SOURCE.parents[1], check=False)
    errors = [line for line in done.stdout.splitlines() if f"{script.name}:" in line and ": error: " in line]
    assert len(errors) == 2, done.stdout
    assert 'expression has type "RankAllocation", variable has type "int"' in errors[0]
    assert 'Module has no attribute "build_adaptor"' in errors[1]


def test_what_bitsandbytes_misses_is_no_concern_of_a_user(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no module")
    logger.warning("another thing")
    assert caplog.messages == ["another thing"]
