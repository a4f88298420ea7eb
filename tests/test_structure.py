"""The packages of lora_init: imports between them go one way, and only some of them know PEFT."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_init
from lora_init.starts.starts import FROM_BANK, compared_names

PACKAGE = Path(__file__).parent.parent / "lora_init"
# Each package may import from those it names, and from the files of the root.
MAY_IMPORT = {
    "layers": set(),
    "loading": set(),
    "statistics": {"layers"},
    "collection": {"layers", "loading", "statistics"},
    "planning": {"layers", "statistics"},
    "starts": {"planning", "statistics"},
    "rates": {"layers", "statistics"},
    "adapters": {"layers", "loading", "statistics", "collection", "planning", "starts", "rates"},
    "trainers": {"layers", "loading", "collection", "starts", "rates", "adapters"},
}
MAY_IMPORT["building"] = {*MAY_IMPORT}
MAY_IMPORT["serving"] = {"layers", "loading", "statistics", "collection", "planning", "starts", "adapters"}
MAY_IMPORT["keep"] = MAY_IMPORT["serving"] | {"serving"}
MAY_IMPORT["bank"] = {*MAY_IMPORT["building"], "building", "serving"}
MAY_IMPORT["comparison"] = {*MAY_IMPORT}
MAY_IMPORT["training"] = {*MAY_IMPORT} - {"bank", "comparison"}
MAY_IMPORT["plots"] = {"layers", "statistics", "planning"}
MAY_IMPORT["cli"] = {*MAY_IMPORT}
ROOT_FILES = {"__init__", "__main__", "errors", "files", "on_demand", "packages", "third_party_internals", "progress"}
KNOW_PEFT = {"adapters", "building", "serving", "keep", "comparison"}
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("*/**/*.py"))


@cache
def nodes(file, left_out=None):
    """List the nodes of a file, of which a visitor may leave some out."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return [*ast.walk(left_out().visit(tree) if left_out else tree)]


@cache
def modules(file, left_out=None):
    """Collect the modules that a file takes names from."""
    return {node.module for node in nodes(file, left_out) if isinstance(node, ast.ImportFrom) and node.module}


def imports(file):
    yield from modules(file)
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_packages_are_those_listed():
    assert {file.split("/")[0] for file in FILES} == set(MAY_IMPORT)
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES


@pytest.mark.parametrize("file", FILES)
def test_imports_between_packages_go_one_way(file):
    """Nor does a string name a module higher up, for somebody else to import."""
    package = file.split("/")[0]
    ours = {name.split(".")[1] for name in imports(file) if name.startswith("lora_init.")}
    constants = (node.value for node in nodes(file) if isinstance(node, ast.Constant))
    ours |= {name for text in constants for name in re.findall(r"\blora_init\.(\w+)\.", str(text))} & {*MAY_IMPORT}
    assert ours <= MAY_IMPORT[package] | {package, *ROOT_FILES}


def test_no_test_imports_from_a_test():
    """Helpers stand in helper files, `made.py` of each folder: a test can be moved or deleted alone."""
    tests = Path(__file__).parent
    imported = re.compile(r"^\s*(?:from|import) +tests\.[\w.]*\btest_\w+", re.MULTILINE)
    found = {path.name: imported.findall(path.read_text(encoding="utf-8")) for path in tests.rglob("*.py")}
    assert not {name: lines for name, lines in found.items() if lines}


class _AtRunTime(ast.NodeTransformer):
    """Leave out what only type checkers import."""

    def visit_If(self, node):
        for_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if for_types else self.generic_visit(node)


def graph(left_out=None):
    """Map each file to those that it imports, also in a function."""
    imported = {file: {name.removeprefix("lora_init.") for name in modules(file, left_out)} for file in FILES}
    return {file.removesuffix(".py").replace("/", "."): names for file, names in imported.items()}


# Files of which one takes what the other makes, and names its type alone.
FOR_TYPES = {
    ("adapters.adapter_init", "adapters.card"),
    ("adapters.adapter_init", "adapters.peft_model"),
    ("collection.loop", "collection.processes"),
    ("statistics.merging", "statistics.statistics"),
}


def test_files_import_each_other_in_no_circle_and_for_types_only_these():
    TopologicalSorter(graph(_AtRunTime)).prepare()  # raises CycleError, with the circle
    every = graph()
    assert {(a, b) for a in every for b in every[a] if a < b and a in every.get(b, ())} == FOR_TYPES


class _AtImport(_AtRunTime):
    """Leave out, too, what functions import when they are called."""

    def visit_FunctionDef(self, node):
        return None


# What few use, and which packages import it then. Public names and `on_demand.py` name the rest of its users.
FEW_USE = {"bank": {"cli", "comparison"}, "plots": {"cli"}, "serving.intruders": {"cli"}, "serving.watch": set()}


@pytest.mark.parametrize("rare", FEW_USE)
def test_what_few_use_is_imported_when_it_is_used(rare):
    """Deleted with its lines in `on_demand.py` and among the public names, it leaves every other file importable."""
    for file in FILES:
        package, module = file.split("/")[0], file.removesuffix(".py").replace("/", ".")
        if not f"{module}.".startswith(f"{rare}."):
            at_import, runs = modules(file, _AtImport), modules(file, _AtRunTime)
            assert not any(f"{name}.".startswith(f"lora_init.{rare}.") for name in at_import)
            assert package in FEW_USE[rare] or not any(f"{name}.".startswith(f"lora_init.{rare}.") for name in runs)


def test_only_the_packages_about_adapters_import_peft():
    importers = {file.split("/")[0] for file in FILES if any(name.split(".")[0] == "peft" for name in imports(file))}
    assert importers <= KNOW_PEFT


# Words that are names of starts and stand for something else there.
OTHERWISE = {
    "adapters/peft_eva.py": {"eva"},  # PEFT's value of init_lora_weights
    "planning/allocate.py": {"eva"},  # a policy, as in the two below
    "planning/policies.py": {"eva"},
    "cli/ranks.py": {"eva"},
    "comparison/compare.py": {"full"},  # a sweep, as in the two below
    "comparison/runs.py": {"full"},
    "cli/compare.py": {"full"},
    "comparison/plots.py": {"full"},  # how a marker is filled
}


@pytest.mark.parametrize("file", [file for file in FILES if file != "starts/starts.py"])
def test_names_of_starts_stand_in_the_registry_alone(file):
    strings = {node.value for node in nodes(file) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert strings & {*compared_names(), FROM_BANK} <= OTHERWISE.get(file, set())


def test_functions_below_the_public_ones_have_at_most_eight_parameters():
    found = {}
    for file in (file for file in FILES if not file.startswith("cli/")):
        for node in nodes(file):
            if isinstance(node, ast.FunctionDef) and node.name not in lora_init.__all__:
                taken = [*node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
                n = len([one for one in taken if one is not None and one.arg not in ("self", "cls")])
                found |= {node.name: n} if n > 8 else {}
    assert found == {}


def test_functions_unfold():
    """Radon counts as a reader does: comprehensions, conditional expressions, `and` and `or` are branches, too."""
    visit = pytest.importorskip("radon.complexity").cc_visit
    found = set()
    for file in (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")):
        blocks = visit((PACKAGE / file).read_text(encoding="utf-8"))
        functions = [one for one in blocks if not hasattr(one, "methods")]
        found |= {f"{file}: {one.name}" for one in functions if one.complexity > 15}
    assert not found


def test_the_integration_of_any_trainer_knows_none_of_trl():
    assert not re.findall(r"TRL|[A-Z]{3}Trainer", (PACKAGE / "trainers/trainers.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", [*FILES, *(f"{name}.py" for name in sorted(ROOT_FILES))])
def test_text_is_read_and_written_in_utf8_on_every_machine(file):
    unsaid = []
    for node in nodes(file):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        mode = [one.value for one in node.args if isinstance(one, ast.Constant)]
        text = node.func.attr in ("read_text", "write_text") or (node.func.attr == "open" and "w" in mode)
        said = any(keyword.arg == "encoding" for keyword in node.keywords) or "utf-8" in mode
        if text and not said:
            unsaid.append(node.lineno)
    assert not unsaid


# What holds something while it grows: a pass, a run, a log.
CHANGE = {
    "adapters/peft_eva.py", "cli/console.py", "collection/backward.py", "collection/loop.py", "comparison/runs.py",
    "comparison/training.py", "comparison/workbench.py", "comparison/workers.py",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_what_a_dataclass_holds_stays(file):
    """Values are made anew, by `replace`; the files named above have others."""
    if file in CHANGE:
        return
    for node in nodes(file):
        if isinstance(node, ast.ClassDef):
            made = [one for one in node.decorator_list if "dataclass" in ast.unparse(one)]
            assert all("frozen=True" in ast.unparse(one) for one in made), node.name
