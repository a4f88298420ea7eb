"""What the tests catch: plant the faults of `benchmarks/faults.py`, one at a time, and write down which test fails.

    python -m benchmarks.planted_faults [--quick] [FILE ...]

Each goes into a copy of the project, where the tests run that cover its file, until one fails: first those that `make
quick` runs; without --quick then all others of its package or that import it or a file that does, then the slow ones.
`results/planted_faults.json` has a line for each fault. Those that were caught are not planted again, unless their file
is named.

Why no tool: mutmut and cosmic-ray plant thousands of small faults, most of them equal to the original or caught at
once, and start Python for each; a hundred that somebody would make are read by people. Here each is run in a fork of a
process that has loaded torch and transformers already.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.faults import FAULTS
from tests import quick

RESULTS = quick.ROOT / "benchmarks" / "results" / "planted_faults.json"
_LARGE = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert", "peft", "datasets",
    "pandas", "scipy.stats", "hypothesis", "typer.testing", "pytest", "_pytest.assertion.rewrite",
)  # fmt: skip
_SECONDS = 600  # for one set of tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="plant those of these files again, such as layers/masks.py")
    parser.add_argument("--quick", action="store_true", help="run the tests of `make quick` alone")
    asked = parser.parse_args()
    known = [json.loads(line) for line in _lines()]
    found = {tuple(one[:4]): one for one in known if "::" in one[4] and one[0] not in asked.files}
    wanted = [(file, *fault) for file, faults in FAULTS.items() for fault in faults]
    for name in _LARGE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(quick.ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "work"))
        compileall.compile_dir(copy / "lora_init", quiet=1)
        for number, fault in enumerate(wanted):
            if fault not in found and (not asked.files or fault[0] in asked.files):
                began = time.perf_counter()
                caught_by = catch(copy, *fault, quick_alone=asked.quick)
                found[fault] = [*fault, caught_by, round(time.perf_counter() - began, 1)]
                print(f"{number + 1} of {len(wanted)}: {fault[0]}, {fault[1]}: {caught_by}", flush=True)
                RESULTS.write_text("".join(json.dumps(found[one]) + "\n" for one in wanted if one in found))
    report([found[one] for one in wanted if one in found])


def _lines() -> list[str]:
    return RESULTS.read_text().splitlines() if RESULTS.exists() else []


def report(found: Sequence[Sequence[Any]]) -> None:
    """Print how many faults were caught, by which tests, and name those that were not."""
    near = sum(one[4].split("::")[0] in quick.covering(f"lora_init/{one[0]}") for one in found)
    room = sum(one[4].split("/")[1:2] == one[0].split("/")[:1] for one in found)
    caught = sum("::" in one[4] for one in found)
    print(f"{len(found)} faults: {caught} caught, {room} by a test of the package, {near} by `make quick`")
    for file, kind, before, _, caught_by, _ in found:
        if "::" not in caught_by:
            print(f"{file}, {kind}: {caught_by}: {before}")
    print(Counter(one[4].partition("::")[0] for one in found).most_common(10))


def catch(copy: Path, file: str, kind: str, before: str, after: str, quick_alone: bool = False) -> str:
    """Plant a fault; return the test that fails first, or "not caught", or "not found": its text is not there once."""
    path = copy / "lora_init" / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(before) != 1:
        return "not found"
    path.write_text(text.replace(before, after), encoding="utf-8")
    try:
        for words, tests in islice(_sets(f"lora_init/{file}"), 1 if quick_alone else None):
            if tests and (failed := _run(copy, words, tests)):
                return failed
    finally:
        path.write_text(text, encoding="utf-8")
    return "not caught"


def _sets(file: str) -> Iterator[tuple[str, list[str]]]:
    """Sort the test files that cover a file, by how near they are."""
    near = quick.covering(file)
    yield "not slow", near
    modules = {".".join(Path(file).with_suffix("").parts)}
    modules |= {".".join(Path(user).with_suffix("").parts) for user in _users(file)}
    far = [test for module in sorted(modules) for test in quick.importing(module) if test not in near]
    room = [test for test in quick.test_files() if test.split("/")[1] == file.split("/")[1] and test not in near]
    far = list(dict.fromkeys([*room, *far]))
    yield "not slow", far
    yield "slow", near + far


def _users(file: str) -> list[str]:
    module = ".".join(Path(file).with_suffix("").parts)
    files = [path.relative_to(quick.ROOT).as_posix() for path in (quick.ROOT / "lora_init").rglob("*.py")]
    return [one for one in files if module in quick.imported(one)]


def _run(copy: Path, words: str, tests: list[str]) -> str:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, copy, words, tests))
    child.start()
    theirs.close()
    failed = f"{tests[0]}::does not end"
    with suppress(EOFError):
        if ours.poll(_SECONDS):
            failed = ours.recv()
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # with the processes that tests have started
    child.join()
    return failed


class _First:
    """Remember the first test that fails."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.name = self.name or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: Any) -> None:
        self.name = self.name or (f"{report.nodeid}::import" if report.failed else "")


def _child(pipe: Any, copy: Path, words: str, tests: list[str]) -> None:
    os.setsid()
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("lora_init", "tests", "benchmarks", "docs")
    ]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    os.environ |= {"PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.chdir(copy)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import pytest

    first = _First()
    pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", words, *tests], plugins=[first])
    pipe.send(first.name)
    os._exit(0)


if __name__ == "__main__":
    main()
