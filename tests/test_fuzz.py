"""A few hundred of the mutations that `python -m tests.fuzz` makes by the thousand."""

from tests import fuzz


def test_damaged_files_give_one_line():
    failures = fuzz.run(300, seed=7)
    assert not failures, "\n".join(failures)


def test_the_mutations_do_damage(monkeypatch):
    """Else the test above would show nothing: a reader that trusts its file is caught."""
    monkeypatch.setitem(fuzz.USES, "plan", lambda path: fuzz.json.loads(path.read_text(encoding="utf-8"))["layers"])
    assert any(failure.startswith("plan") for failure in fuzz.run(60))
