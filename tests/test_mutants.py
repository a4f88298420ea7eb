"""The faults that `benchmarks.mutants` draws, and how it says whether tests catch them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.stats import binomtest

from benchmarks import covering, mutants
from benchmarks.mutations import differs
from benchmarks.mutations import mutants as all_mutants

CHANGES = {
    "def f(a, b):\n    return a < b": {"a <= b", "a >= b"},
    "def f(a, b):\n    return a - (b + 1)": {"a + (b + 1)", "b - 1", "2"},
    "def f(a, *, b=True):\n    pass": {"False"},
    "def f(a, b):\n    return a and not b": {"(a or not b)", "(a)", "(not b)", "b"},
    "def f(a, b):\n    return g(a, b, c=a)": {"b, a", ""},
    "def f(a):\n    a = a.float()\n    a.b = 1": {"pass", "a.bfloat16", "2"},
    "def f(a):\n    if a:\n        raise ValueError('in words')": {"True", "False", "pass"},
    "def f(a):\n    with g(), h() as b:\n        pass": {"__import__('contextlib').nullcontext()"},
    "def f(a):\n    return {'k': a, 'l': a}": {"'kX'", "'lX'", ""},
    "def f(a):\n    return [b for b in a if b]": {"True"},
    "@cache\ndef f(a):\n    'Words.'\n    return min(a)": {"(lambda function: function)", "max"},
    "def f(a):\n    return isinstance(a, int)": set(),
    "import os\nlimit: int = 3\n__all__ = ['limit']": {"4"},
}
RESTORED = """
def f(a):
    try:
        yield
    finally:
        a.restore()
"""


@pytest.mark.parametrize("text", CHANGES)
def test_each_change_is_a_small_one(tmp_path, text):
    (tmp_path / "ä.py").write_text(f"# ä\n{text}\n", encoding="utf-8")
    found = all_mutants(tmp_path, "ä.py")
    assert {one.after for one in found} == CHANGES[text]
    assert all(differs(one, f"# ä\n{text}\n") for one in found)


def test_finally_is_emptied_or_skipped_after_an_exception(tmp_path):
    (tmp_path / "f.py").write_text(RESTORED)
    found = {one.after.split()[0]: one.applied(RESTORED) for one in all_mutants(tmp_path, "f.py")}
    assert found["pass"] == RESTORED.replace("a.restore()", "pass")
    for text, done in (RESTORED, 2), (found["except"], 1), (found["pass"], 0):
        names = {}
        exec(text, names)
        restored = []
        a = type("A", (), {"restore": lambda self, restored=restored: restored.append(1)})()
        for error in (None, KeyError):
            steps = names["f"](a)
            next(steps)
            with pytest.raises(error or StopIteration):
                steps.throw(error) if error else next(steps)
        assert len(restored) == done


@pytest.mark.parametrize(("caught", "n"), [(0, 10), (7, 10), (300, 300)])
def test_the_interval_is_wilsons(caught, n):
    interval = binomtest(caught, n).proportion_ci(0.95, "wilson")
    assert mutants.wilson(caught, n) == pytest.approx(tuple(interval), abs=1e-6)


TESTS = """
import subprocess, sys
import pytest
from lora_init.half import half, other
@pytest.fixture(scope="module")
def one():
    return other(1)
def test_half(one): assert half(2) == 1
def test_one(one): assert one == 1
def test_process(): subprocess.run([sys.executable, "-c", "from lora_init.half import other; other(3)"], check=True)
"""


@pytest.mark.slow
def test_lines_are_noted_with_the_tests_that_run_them_also_after_an_interruption(tmp_path):
    """By themselves, through a fixture that they share, and in processes that they start."""
    root, data = tmp_path / "project", tmp_path / "data"
    for folder in (root / "lora_init", root / "tests", data):
        folder.mkdir(parents=True)
    (root / "lora_init" / "__init__.py").touch()
    (root / "lora_init" / "half.py").write_text("def half(x):\n    return x / 2\ndef other(x):\n    return x\n")
    (root / "tests" / "test_half.py").write_text(TESTS)
    (root / "sitecustomize.py").write_text(covering.SITE)
    about = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "PYTEST"))}
    paths = [root, Path(covering.__file__).parents[1], *filter(None, sys.path)]
    about |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "COVERED": str(data)}
    about["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take half of the time
    for some, status in (["tests/test_half.py::test_half"], 0), ([], 0), ([], 5):  # the third time none is left
        words = ["-q", "-p", "benchmarks.covering", "-p", "no:cacheprovider", *some]
        done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=root, env=about, check=False)
        assert done.returncode == status
    covering.gather(root, data, tmp_path / "covered.json")
    covered = covering.Covered(tmp_path / "covered.json")
    half, one, process = (f"tests/test_half.py::test_{name}" for name in ("half", "one", "process"))
    assert [*covered.seconds] == [half, one, process] and "json" in covered.modules
    assert covered.by("half.py", 2, 2) == {half}
    assert covered.by("half.py", 4, 4) == {half, one, process}
    assert covered.by("half.py", 5, 9) == set()


class _Covered:
    def __init__(self, *tests):
        self.seconds = dict.fromkeys(tests, 0.1)

    def by(self, file, first, last):
        return {*self.seconds}


@pytest.mark.slow
def test_a_test_that_fails_only_with_the_mutant_catches_it(tmp_path, monkeypatch):
    """Nothing of the project itself changes, and a test that fails anyway catches nothing."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take half of the time
    (tmp_path / "lora_init").mkdir()
    (tmp_path / "tests").mkdir()
    text = "def half(x):\n    return x / 2\n\n\ndef seen(x):\n    return x > 3\n"
    (tmp_path / "lora_init" / "half.py").write_text(text)
    (tmp_path / "lora_init" / "__init__.py").write_text("")
    (tmp_path / "tests" / "test_half.py").write_text(
        "from lora_init.half import half, seen\n"
        "def test_wrong(): assert half(2) == 5\n"
        "def test_half(): assert half(2) == 1\n"
        "def test_seen(): assert seen(4)\n"
    )
    tests = [f"tests/test_half.py::test_{name}" for name in ("wrong", "half", "seen")]
    planter = mutants._Planter(_Covered(*tests), tmp_path, 60.0)
    found = {one.after: planter.catch(one)[0] for one in all_mutants(tmp_path / "lora_init", "half.py")}
    assert found == {"x * 2": tests[1], "3": tests[1], "x >= 3": "survives", "x <= 3": tests[2], "4": tests[2]}
    assert (tmp_path / "lora_init" / "half.py").read_text() == text


def test_equivalent_ones_do_not_count():
    results = [
        {"id": name, "file": f"{name}.py", "kind": "argument", "caught_by": caught_by}
        for name, caught_by in [("a", "tests/test_a.py::test"), ("b", "survives"), ("c", "survives")]
    ]
    text = mutants.table(results, {"c": {"verdict": "equivalent"}})
    assert "3 drawn: 1 are equivalent, 0 in lines that no test runs." in text
    assert "| all | 2 | 1 | 50% | 9% to 91% |" in text
