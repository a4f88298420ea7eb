"""How many faults that nobody has thought of the tests catch: `make mutants N=50 SEED=7`.

    python -m benchmarks.mutants draw --n 50 --seed 7 [--processes 2] [--seconds 60]
    python -m benchmarks.mutants report

A mutant is a small change of the library (`mutations.py`). Lines are drawn at random from all that can be changed, then
a kind of change, then one of its kind. What stands in a line that no test runs is counted apart. Each other is planted
in a copy of the project, where the tests that run its line (`covering.py`) are run until one fails: first those of its
file, then of its package, then the others, in a fork of a process that has loaded torch and the other libraries
already. A test that stands still is a failure, too. What no test of `--seconds` seconds in all has caught survives.

The first call measures which tests run which lines, in twice the time of `make test`; interrupted, it goes on. That is
kept in `.mutants/`, and made anew when that folder is removed. Results go to `results/mutants/SEED.jsonl`, one line a
mutant; an interrupted draw goes on. What survives is judged by hand in `results/mutants/judged.jsonl`: {"id",
"verdict", "why"}, where a verdict is "equivalent" (no user could tell), "gap" (a test is missing) or the test that
catches it now.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.mutations import Mutant, differs, mutants
from tests import quick

ROOT = quick.ROOT
RESULTS = ROOT / "benchmarks" / "results" / "mutants"
KEPT = ROOT / ".mutants"
SURVIVES, NEVER_RUN = "survives", "no test runs it"
_OURS = ("lora_init", "tests", "benchmarks", "docs", "demo_assets")
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# The allocator that pyarrow brings would start a thread, and a process that forks has one alone.
_ALLOCATOR = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
_STAND_STILL = 120.0  # a test may take that many seconds more than twenty times what it took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["draw", "report"])
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0, help="of tests, at most, for one mutant")
    parser.add_argument("--only", nargs="*", default=[""], help="those of these packages, the others later")
    parser.add_argument("--again", action="store_true", help="only those of the seed that survived")
    asked = parser.parse_args()
    if asked.what == "draw":
        draw(asked)
        print(table(_results(RESULTS / f"{asked.seed}.jsonl"), _judged()))
    else:
        print(report())


def draw(asked: argparse.Namespace) -> None:
    """Plant the mutants of a seed that have no result yet."""
    from benchmarks.covering import Covered

    if not (KEPT / "covered.json").exists():
        measure()
    covered = Covered(KEPT / "covered.json")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{asked.seed}.jsonl"
    done = {one["id"]: one for one in _results(file)}
    again = {name for name, one in done.items() if not _is_caught(one)} if asked.again else set()
    todo = [one for one in sample(asked.n, asked.seed) if _id(one) not in done or _id(one) in again]
    todo = [one for one in todo if one.file.startswith(tuple(asked.only))]
    os.environ.update(_ENVIRONMENT | _ALLOCATOR)
    for name in covered.modules:
        with suppress(Exception):
            importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    share = [todo[number :: asked.processes] for number in range(asked.processes)]
    workers = [context.Process(target=_work, args=(covered, one, file, asked.seconds)) for one in share]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def sample(n: int, seed: int) -> list[Mutant]:
    """Draw from all lines: a line, a kind, one of that kind; no line twice."""
    generator = random.Random(seed)
    lines = defaultdict(lambda: defaultdict(list))  # type: ignore[var-annotated]
    for one in everything():
        lines[one.file, one.line][one.kind].append(one)
    texts: dict[str, str] = {}
    drawn: list[Mutant] = []
    order = sorted(lines)
    generator.shuffle(order)
    for place in order:
        if len(drawn) == n:
            break
        kinds = lines[place]
        one = generator.choice(kinds[generator.choice(sorted(kinds))])
        text = texts.setdefault(one.file, (ROOT / "lora_init" / one.file).read_text(encoding="utf-8"))
        if differs(one, text):
            drawn.append(one)
    return drawn


def everything() -> list[Mutant]:
    """Return every mutant of the library."""
    root = ROOT / "lora_init"
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [one for file in files for one in mutants(root, file)]


def _id(mutant: Mutant) -> str:
    return f"{mutant.file}:{mutant.line}: {mutant.before} -> {mutant.after}"


def measure() -> None:
    """Run all tests in a copy, and note which of them run which lines. What was interrupted goes on."""
    from benchmarks import covering

    data, copy = KEPT / "data", KEPT / "project"
    data.mkdir(parents=True, exist_ok=True)
    if not copy.exists():
        _copy(KEPT)
        (copy / "sitecustomize.py").write_text(covering.SITE, encoding="utf-8")
    paths = os.pathsep.join([str(copy), *sys.path])
    about = os.environ | _ENVIRONMENT | {"PYTHONPATH": paths, "COVERED": str(data)}
    words = ["-p", "benchmarks.covering", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=copy, env=about, check=False)
    if done.returncode == 1:  # a test that fails in any case is run anew for each mutant that it seems to catch
        sys.exit("Tests fail without a mutant, see above. Mend them, and remove .mutants.")
    if done.returncode not in (0, 5):  # all passed, none was left
        sys.exit("The measurement was interrupted. The same command goes on with it.")
    covering.gather(copy, data, KEPT / "covered.json")
    shutil.rmtree(data)
    shutil.rmtree(copy)


def _copy(folder: Path) -> Path:
    copy = folder / "project"
    left = shutil.ignore_patterns(".git", ".venv*", ".mutants", "*_cache", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left)
    return copy


def _work(covered: Any, mutants: Sequence[Mutant], file: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        planter = _Planter(covered, _copy(Path(folder)), seconds)
        for one in mutants:
            began = time.perf_counter()
            caught_by, n_tests = planter.catch(one)
            row = {"id": _id(one), "file": one.file, "line": one.line, "kind": one.kind, "caught_by": caught_by}
            row |= {"tests": n_tests, "seconds": round(time.perf_counter() - began, 1)}
            with file.open("a", encoding="utf-8") as results:
                results.write(json.dumps(row) + "\n")
            print(f"{row['seconds']:6.1f} s  {row['id'][:150]!r}: {caught_by}", flush=True)


class _Planter:
    """Plant one mutant after another in a copy of the project."""

    def __init__(self, covered: Any, copy: Path, seconds: float) -> None:
        self._covered, self._copy, self._seconds = covered, copy, seconds
        self._sound: dict[str, bool] = {}  # whether a test that has failed passes without a mutant
        self._of_files: dict[str, set[str]] = {}
        self._written = 0

    def catch(self, mutant: Mutant) -> tuple[str, int]:
        """Return the test that fails first, or why there is none; and how many tests were to run."""
        tests = self._tests(mutant)
        if not tests:
            return NEVER_RUN, 0
        path = self._copy / "lora_init" / mutant.file
        text = path.read_text(encoding="utf-8")
        self._write(path, mutant.applied(text))
        try:
            for portion in self._portions(mutant.file, tests):
                left = portion
                while left and (failed := self._run(left)):
                    if self._is_sound(failed, path, text, mutant):
                        return failed, len(tests)
                    left = [test for test in left if test != failed]
        finally:
            self._write(path, text)
        return SURVIVES, len(tests)

    def _write(self, path: Path, text: str) -> None:
        """Write the file with a time of its own: what Python has compiled it takes for the same by time and size."""
        path.write_text(text, encoding="utf-8")
        self._written += 1
        os.utime(path, (self._written, self._written))

    def _is_sound(self, failed: str, path: Path, text: str, mutant: Mutant) -> bool:
        if failed not in self._covered.seconds:
            return True  # as a file is imported
        if failed not in self._sound:
            self._write(path, text)
            self._sound[failed] = not self._run([failed])
            self._write(path, mutant.applied(text))
        return self._sound[failed]

    def _tests(self, mutant: Mutant) -> list[str]:
        """Return the tests that run its line; of what runs at import those that run anything of the file."""
        if not mutant.imported:
            found = self._covered.by(mutant.file, *mutant.ran_by)
        else:
            found = self._of_file(mutant.file) or {
                test for user in _users(mutant.file) for test in self._of_file(user)
            }  # fmt: skip
        return sorted(found, key=self._covered.seconds.__getitem__)

    def _of_file(self, file: str) -> set[str]:
        if file not in self._of_files:
            tree = ast.parse((ROOT / "lora_init" / file).read_text(encoding="utf-8"))
            functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            ranges = [(node.body[0].lineno, node.body[-1].end_lineno or 0) for node in functions]
            self._of_files[file] = {test for one in ranges for test in self._covered.by(file, *one)}
        return self._of_files[file]

    def _portions(self, file: str, tests: list[str]) -> Iterator[list[str]]:
        """Sort tests by how near they are, and end where the limit is reached. Those of a test file stay together."""
        path = Path("tests", file)
        own, room = path.with_name(f"test_{path.name}").as_posix(), path.parent.as_posix()
        near = [test for test in tests if test.partition("::")[0] == own]
        doctests = [test for test in tests if test.startswith(f"lora_init/{file}")]
        of_room = [test for test in tests if test.startswith(f"{room}/") and test not in near]
        far = [test for test in tests if not test.startswith((f"{room}/", f"lora_init/{file}"))]
        left = self._seconds
        for some in ([*near, *doctests], of_room, far):
            taken = []
            for test in some:
                left -= self._covered.seconds[test]
                if left < 0:
                    break
                taken.append(test)
            yield _by_file(taken)

    def _run(self, tests: list[str]) -> str:
        """Run tests in a fork; return the first that fails or stands still."""
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, self._copy, tests))
        child.start()
        theirs.close()
        running, allowed = f"{tests[0]}::import", 2 * _STAND_STILL
        failed = ""
        with suppress(EOFError):
            while ours.poll(allowed):
                word, name = ours.recv()
                if word == "ends":
                    failed = name
                    break
                running, allowed = name, _STAND_STILL + 20 * self._covered.seconds.get(name, 0.0)
            else:
                failed = running
        with suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)  # with the processes that tests have started
        child.join()
        return failed


def _by_file(tests: list[str]) -> list[str]:
    """Keep the tests of a file together, the file with the quickest test first."""
    files: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        files[test.partition("::")[0]].append(test)
    return [test for some in files.values() for test in some]


def _users(file: str) -> list[str]:
    module = ".".join(Path("lora_init", file).with_suffix("").parts)
    root = ROOT / "lora_init"
    files = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    return [one for one in files if module in quick.imported(f"lora_init/{one}")]


class _First:
    """Send the name of each test that begins, and that of the first that fails; keep the order that was asked for."""

    def __init__(self, pipe: Any, tests: list[str]) -> None:
        self._pipe, self._order = pipe, {test: place for place, test in enumerate(tests)}
        self.name = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self._order.get(item.nodeid, 0))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._pipe.send(("begins", nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.name = self.name or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report: Any) -> None:
        self.name = self.name or (f"{report.nodeid}::import" if report.failed else "")


def _child(pipe: Any, copy: Path, tests: list[str]) -> None:
    os.setsid()
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    sys.path[:] = [str(copy), *(one for one in sys.path if one not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(copy)
    os.chdir(copy)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(quiet, stream)
    import pytest

    first = _First(pipe, tests)
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[first])
    # A file of fixtures that cannot be imported ends pytest before any test is reported.
    broken = f"{tests[0]}::import" if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else ""
    pipe.send(("ends", first.name or broken))
    os._exit(0)


def _results(file: Path) -> list[dict[str, Any]]:
    """Return one result for each mutant, the newest."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [*{one["id"]: one for one in map(json.loads, lines)}.values()]


def _judged() -> dict[str, dict[str, str]]:
    return {one["id"]: one for one in _results(RESULTS / "judged.jsonl")}


def _is_caught(one: dict[str, Any]) -> bool:
    return one["caught_by"] not in (SURVIVES, NEVER_RUN)


def wilson(caught: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) for a share."""
    z = 1.959964
    center = (caught + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (caught * (n - caught) / n + z * z / 4) ** 0.5
    return max(0.0, center - half), min(1.0, center + half)


def table(results: Sequence[dict[str, Any]], judged: dict[str, dict[str, str]]) -> str:
    """Return the figures of a sample, by package and by kind of change, in Markdown."""
    equal = sum(judged.get(one["id"], {}).get("verdict") == "equivalent" for one in results)
    never = sum(one["caught_by"] == NEVER_RUN for one in results)
    counted = [one for one in results if judged.get(one["id"], {}).get("verdict") != "equivalent"]
    lines = ["| | mutants | caught | % | 95 % interval |", "| --- | ---: | ---: | ---: | ---: |"]
    rows = [("all", counted)]
    for key in (lambda one: one["file"].partition("/")[0].replace(".py", ""), lambda one: one["kind"]):
        groups = defaultdict(list)
        for one in counted:
            groups[key(one)].append(one)
        rows += sorted(groups.items())
    for name, some in rows:
        caught, n = sum(map(_is_caught, some)), len(some)
        low, high = wilson(caught, n)
        lines.append(f"| {name} | {n} | {caught} | {caught / n:.0%} | {low:.0%} to {high:.0%} |")
    return "\n".join([f"{len(results)} drawn: {equal} are equivalent, {never} in lines that no test runs.", "", *lines])


def report() -> str:
    """Return the tables of all samples, and what survives with the reason."""
    judged, text = _judged(), []
    for file in sorted(RESULTS.glob("[0-9]*.jsonl")):
        results = _results(file)
        text += [f"## Seed {file.stem}", table(results, judged)]
        left = [one for one in results if not _is_caught(one)]
        text += [f"- `{one['id']}`: {judged.get(one['id'], {}).get('why', 'not judged')}" for one in left]
        verdicts = Counter(judged.get(one["id"], {}).get("verdict", "not judged") for one in left)
        text.append(str(dict(verdicts)))
    return "\n\n".join(text)


if __name__ == "__main__":
    main()
