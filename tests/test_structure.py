"""The file tree in the README lists every module, and each imports only modules above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TREE = re.search(r"```text\nlora_init/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
ORDER = re.findall(r"^  (\w+)\.py ", TREE, re.MULTILINE)
MODULES = sorted(path.stem for path in (ROOT / "lora_init").glob("*.py"))
MAY_IMPORT_PEFT = {
    "attach", "adapter_init", "initialization", "eva_inputs", "eva_weights", "eva_loop", "peft_eva",
    "adapter_loading", "prepared", "peft_starts", "own_starts", "starts", "intruders",
}  # fmt: skip


def imports(module):
    for node in ast.walk(ast.parse((ROOT / "lora_init" / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_readme_lists_every_module_once():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_above_it(module):
    above = ORDER[: ORDER.index(module)] if module in ORDER else []
    ours = {name.split(".")[1] for name in imports(module) if name.startswith("lora_init.")}
    assert ours <= set(above), f"{module} imports {sorted(ours - set(above))}"


def test_only_the_adapter_rooms_import_peft():
    importers = {module for module in MODULES if any(name.split(".")[0] == "peft" for name in imports(module))}
    assert importers <= MAY_IMPORT_PEFT
