"""The floors: benchmarks/VERSIONS.md names them, and they are no higher than the tools beside this package allow."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "benchmarks/VERSIONS.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ")
]
OLDEST = {row[0]: row[1] for row in ROWS if len(row) == 4 and row[0]}
TOOLS = {row[0]: row[2:] for row in ROWS if len(row) == 6 and row[0]}


def test_the_page_names_the_floors():
    pytest.importorskip("tomllib", reason="Python has it since 3.11")
    words = [sys.executable, "tests/oldest.py"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    pinned = {(one := Requirement(line)).name: str(one.specifier) for line in reversed(done.stdout.splitlines())}
    assert set(pinned) >= {"transformers", "peft", "datasets", "trl", "scipy"} and "torch" not in pinned
    assert {name: f"=={oldest}" for name, oldest in OLDEST.items() if name != "torch"}.items() <= pinned.items()
    assert f'"torch>={OLDEST["torch"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("tool", ["axolotl", "LLaMA-Factory", "unsloth", "ms-swift", "TRL"])
def test_the_floors_are_no_higher_than_what_a_tool_allows(tool):
    for name, highest in zip(("torch", "transformers", "peft", "datasets"), TOOLS[tool], strict=True):
        assert Version(OLDEST[name]) <= Version(highest), name
