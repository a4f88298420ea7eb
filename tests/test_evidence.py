"""What the project says that it measured: committed runs, and what is made from them."""

import shutil

import pytest

from benchmarks.evidence import RESULTS
from lora_init.comparison import report
from lora_init.comparison.runs import PACKED, SETTINGS_FILE, read_runs

STUDIES = sorted(file.parent.name for file in RESULTS.glob(f"*/{SETTINGS_FILE}"))
QUICK = ["bank-disflqa", "targets-siqa"]
AGAIN = "Run `python -m benchmarks.evidence`."


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_one_file_of_runs(study):
    assert sorted(path.name for path in (RESULTS / study).iterdir() if path.suffix.startswith(".json")) == sorted(
        [PACKED, SETTINGS_FILE]
    ), AGAIN
    assert not (RESULTS / study / "runs").exists(), AGAIN
    runs = read_runs(RESULTS / study)
    assert len(runs) == len((RESULTS / study / PACKED).read_bytes().splitlines()) >= 15


@pytest.mark.parametrize("study", QUICK)
def test_its_report_is_what_the_runs_say(study, tmp_path, monkeypatch):
    for name in (PACKED, SETTINGS_FILE):
        shutil.copy(RESULTS / study / name, tmp_path)
    monkeypatch.setattr(report, "pictures", lambda _: {file.stem: b"" for file in (RESULTS / study).glob("*.png")})
    report.write_report(tmp_path)
    committed = (RESULTS / study / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == committed, AGAIN
