"""What the project says that it measured: committed runs, and what is made from them."""

import re
import shutil

import pytest

from benchmarks import figures
from benchmarks.evidence import RESULTS
from lora_init.comparison import report
from lora_init.comparison.runs import PACKED, SETTINGS_FILE, read_runs

STUDIES = sorted(file.parent.name for file in RESULTS.glob(f"*/{SETTINGS_FILE}"))
# Studies of fewer runs than any other, and how many.
SMALL = {
    "enough-openbookqa": 6,
    "fresh-300-steps-minilm-specialties": 10,
    "fresh-bfloat16-siqa": 12,
    "fresh-hellaswag": 8,
    "fresh-openbookqa": 11,
    "fresh-rank-16-minilm-specialties": 10,
    "fresh-siqa": 6,
    "gemma-openbookqa": 14,
    "quantised-minilm-medical-subjects": 9,
}
QUICK = ["bank-disflqa", "targets-siqa"]
pytestmark = pytest.mark.skipif(not STUDIES, reason="the source distribution has no runs")
AGAIN = "Run `python -m benchmarks.evidence`."


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_one_file_of_runs(study):
    assert sorted(path.name for path in (RESULTS / study).iterdir() if path.suffix.startswith(".json")) == sorted(
        [PACKED, SETTINGS_FILE]
    ), AGAIN
    assert not (RESULTS / study / "runs").exists(), AGAIN
    runs = read_runs(RESULTS / study)
    assert len(runs) == len((RESULTS / study / PACKED).read_bytes().splitlines()) >= SMALL.get(study, 15)


def test_results_name_no_path_of_the_machine_that_made_them():
    files = [path for path in RESULTS.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    path = re.compile(r"""(?<![\w.])/(home|root|tmp|work|Users|mnt|var)/""")
    assert len(files) > 100 and not [file for file in files if path.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("study", QUICK)
def test_its_report_is_what_the_runs_say(study, tmp_path, monkeypatch):
    for name in (PACKED, SETTINGS_FILE):
        shutil.copy(RESULTS / study / name, tmp_path)
    monkeypatch.setattr(
        report, "pictures", lambda _: {file.stem: dict(svg=b"", png=b"") for file in (RESULTS / study).glob("*.png")}
    )
    report.write_report(tmp_path)
    committed = (RESULTS / study / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == committed, AGAIN


def test_figures_are_what_the_runs_say():  # one test for all pages: they share what is computed
    """Behind a figure stands `<!-- figure: ... -->`, see `benchmarks.figures`."""
    stale = []
    for page in figures.PAGES:
        found = list(figures.figures((figures.ROOT / page).read_text(encoding="utf-8")))
        assert found, page
        stale += [f"{page}:{one.line}: {one.text} is {one.right}, {one.expression}" for one in found if one.is_stale]
    assert not stale, AGAIN


def test_a_figure_is_written_as_it_stands_there():
    said = "<!-- figure: cited(2000, 0.126, 0.4), cited(3e-3), cited(7) -->"
    text = f"ends +1,234.5 %, **−0.25** to 3 (5e-4) above 7{said}"
    right = f"ends +2,000.0 %, **+0.13** to 0 (3e-3) above 7{said}"
    assert figures.corrected(text) == right and figures.corrected(right) == right
    with pytest.raises(ValueError, match=r"line 1: cited.*: 2 values, and 1 numbers before it"):
        list(figures.figures("1 <!-- figure: cited(1) --> 2 <!-- figure: cited(1, 2) -->"))
    with pytest.raises(ValueError, match="headroom-siqa has no finished run of random at 7"):
        list(figures.figures('3.1 <!-- figure: loss("headroom-siqa", "random", rate=7.0) -->'))
