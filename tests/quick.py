"""Run the tests that cover what was changed since the last commit, or the files that are named: `make quick`."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import lora_init

ROOT = Path(__file__).resolve().parent.parent


def covering(file):
    """Return the test files that cover a file, the nearest first.

    A file of the library is covered by the test file of its name, then by those of its package that import it, then by
    all others of its package. A helper of tests is covered by the test files that import it.
    """
    path = Path(file)
    module = ".".join(path.with_suffix("").parts)
    if path.parts[0] == "lora_init":
        own = Path("tests", *path.parts[1:]).with_name(f"test_{path.name}")
        near = [test for test in test_files() if Path(test).parent == own.parent]
        return sorted(near, key=lambda test: (test != own.as_posix(), module not in imported(test), test))
    if path.name == "conftest.py":
        return [test for test in test_files() if path.parent in Path(test).parents]
    return [file] if file in test_files() else importing(module)


def importing(module):
    """Return the test files that import a module, or a public name of it."""
    return [test for test in test_files() if module in imported(test)]


@cache
def test_files():
    """Return all test files, relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))


@cache
def imported(test):
    """Collect the modules that a test file imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / test).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lora_init":
            found.add(f"lora_init.{node.attr}")
    return found | {home for name, home in lora_init._HOMES.items() if f"lora_init.{name}" in found}


def changed():
    """Return the files that differ from the last commit, new ones too."""
    found = []
    for words in ("diff --name-only HEAD", "ls-files --others --exclude-standard"):
        done = subprocess.run(["git", *words.split()], cwd=ROOT, check=True, capture_output=True, text=True)
        found += done.stdout.split()
    return found


def main():
    files = sys.argv[1:] or changed()
    tests = list(dict.fromkeys(test for file in files for test in covering(file)))
    print(f"{len(files)} files changed, which {len(tests)} test files cover")
    options = ["-n", "auto", "--dist", "worksteal", "-m", "not slow", "tests/test_structure.py", *tests]
    sys.exit(subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
