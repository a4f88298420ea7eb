"""Which tests run which lines of the library: a plugin of pytest, and what `benchmarks.mutants` reads of its data.

    python -m pytest -p benchmarks.covering        with COVERED=FOLDER and `sitecustomize.py` of this text on the path

Each line that runs is noted with the test that runs it. What a fixture of several tests runs is noted under the
fixture's name, and counts for all tests that use it; so does what runs in the processes that tests start.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import coverage
import pytest

FOLDER = Path(os.environ.get("COVERED", "."))
# A process that a test starts runs this. Its name for the test is what pytest has put into the environment by then.
SITE = """
import os
if "COVERAGE_PROCESS_START" in os.environ:
    import coverage
    coverage.process_startup()
"""
_SETTINGS = """
[run]
data_file = {data}
parallel = true
source = {source}
concurrency = multiprocessing, thread
patch = _exit
context = process ${{PYTEST_CURRENT_TEST-}}
disable_warnings = no-data-collected, module-not-measured, module-not-imported, couldnt-parse, already-imported
"""
_FIXTURE, _PROCESS = "fixture ", "process "


class _Noting:
    """Note lines under the name of the running test or fixture, and how long each test takes.

    All is on the disk when a test has ended, so that a measurement that was stopped goes on where it was.
    """

    def __init__(self) -> None:
        self._measured = coverage.Coverage(
            data_file=FOLDER / "data", data_suffix=True, source=[str(_source())], config_file=False
        )
        self._measured.start()

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        done = _tests(FOLDER)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        began = sum(os.times()[:4])  # of a processor, also of processes that have ended: others may be busy
        self._measured.switch_context(item.nodeid)
        tracer = sys.gettrace()
        try:
            return (yield)
        finally:
            sys.settrace(tracer)  # a test may have had its own; without this one nothing is measured from there on
            self._measured.switch_context("")
            row = {"test": item.nodeid, "seconds": round(sum(os.times()[:4]) - began, 3)}
            row["fixtures"] = [*getattr(item, "fixturenames", ())]
            with (FOLDER / f"tests-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        self._measured.switch_context(f"{_FIXTURE}{fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._measured.switch_context(test)

    def pytest_sessionfinish(self) -> None:
        self._measured.stop()
        self._measured.save()
        ours = ("lora_init", "tests", "benchmarks", "docs", "conftest", "examples")
        loaded = [name for name in sys.modules if name.partition(".")[0] not in ours]
        (FOLDER / f"modules-{os.getpid()}.json").write_text(json.dumps(loaded), encoding="utf-8")


def _tests(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what is known of each test."""
    lines = [line for path in sorted(folder.glob("tests-*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return {one.pop("test"): one for one in map(json.loads, lines)}


def _source() -> Path:
    return Path.cwd() / "lora_init"


def pytest_configure(config: Any) -> None:
    """Measure in each process that runs tests, and in those that they start."""
    settings = FOLDER / "settings.ini"
    settings.write_text(_SETTINGS.format(data=FOLDER / "data", source=_source()), encoding="utf-8")
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(_Noting())


class Covered:
    """What was measured.

    Attributes:
        seconds: How long each test takes of a processor, by name.
        modules: What the tests have imported of other packages, in the order of imports.
    """

    def __init__(self, file: Path) -> None:
        kept = json.loads(file.read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = kept["tests"]
        self.modules: list[str] = kept["modules"]
        self._names = [*self.seconds]
        self._lines: dict[str, dict[str, list[int]]] = kept["lines"]

    def by(self, file: str, first: int, last: int) -> set[str]:
        """Return the tests that run any of these lines."""
        lines = self._lines.get(file, {})
        numbers = {number for line in range(first, last + 1) for number in lines.get(str(line), ())}
        return {self._names[number] for number in numbers}


def gather(root: Path, folder: Path, target: Path) -> None:
    """Combine what all processes have measured, and write it into one file."""
    both = coverage.Coverage(data_file=folder / "all", config_file=False)
    both.combine([str(path) for path in folder.glob("data.*")], keep=True)
    tests = _tests(folder)
    number = {name: place for place, name in enumerate(tests)}
    using = defaultdict(set)
    for name, test in tests.items():
        for fixture in test["fixtures"]:
            using[fixture].add(number[name])
    # The server of tests/processes.py has the name of the test that came first, whoever runs processes there.
    sharing = _using_processes(root)
    in_processes = {place for name, place in number.items() if name.partition("::")[0] in sharing}

    def meant(context: str) -> set[int]:
        if context.startswith(_FIXTURE):
            return using[context.removeprefix(_FIXTURE)]
        if context.startswith(_PROCESS):
            name = context.removeprefix(_PROCESS).rpartition(" ")[0]
            return in_processes if name.partition("::")[0] in sharing else {number[name]} if name in number else set()
        return {number[context]} if context in number else set()

    data = both.get_data()
    meaning = {context: meant(context) for context in data.measured_contexts()}
    lines: dict[str, dict[str, list[int]]] = {}
    for path in data.measured_files():
        named = data.contexts_by_lineno(path).items()
        file = Path(path).relative_to(root / "lora_init").as_posix()
        lines[file] = {str(line): sorted(set().union(*map(meaning.__getitem__, names))) for line, names in named}
    seconds = {name: test["seconds"] for name, test in tests.items()}
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("modules-*.json"))]
    modules = [*dict.fromkeys(name for part in parts for name in part)]
    target.write_text(json.dumps({"lines": lines, "tests": seconds, "modules": modules}), encoding="utf-8")


def _using_processes(root: Path) -> set[str]:
    words = ("from tests import processes", "from tests.processes import")
    files = {path: path.read_text(encoding="utf-8") for path in (root / "tests").rglob("*.py")}
    return {path.relative_to(root).as_posix() for path, text in files.items() if any(word in text for word in words)}
