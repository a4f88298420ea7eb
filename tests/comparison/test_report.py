"""report.html, report.md and pictures: every number is in them, nothing from outside, whatever is missing."""

import json
import re
from html.parser import HTMLParser

import pytest

from lora_init.comparison.compare import Comparison
from lora_init.comparison.findings import summarise
from lora_init.comparison.plots import looks
from lora_init.comparison.report import describe_directory, write_report
from lora_init.errors import LoraInitError
from tests.comparisons import broken, planted, record, write

HOSTILE = '<script>alert("1")</script>|*_$x^2$'


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not match."""

    VOID = ("meta", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    runs = planted({"eva": -0.01, HOSTILE: 0.004})
    folder = write(tmp_path_factory.mktemp("full"), runs, note=HOSTILE, model=HOSTILE)
    return runs, folder, write_report(folder)


def test_the_page_has_every_run_and_every_setting_and_needs_nothing_else(full):
    runs, folder, files = full
    text = (folder / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.words)
    for run in runs:
        for loss in run["report_loss"]:
            assert f"{loss:.4f}" in words
    for setting in ("2.13.0", "lora-init compare tiny/model siqa.jsonl", "fingerprint", "siqa.jsonl, 800 rows"):
        assert setting in words
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.links) == sum(file.suffix == ".png" for file in files)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text


def test_a_comparison_is_short_in_text_a_table_in_html_and_a_figure(full):
    runs, folder, files = full
    settings = json.loads((folder / "settings.json").read_text())
    found = Comparison(folder, settings, runs, [], summarise(runs, settings), files)
    assert repr(found).startswith(f"Comparison({len(runs)} of 0 runs in {folder}: ") and len(repr(found)) < 1000
    html = found._repr_html_()
    assert html.startswith("<p>Comparison(") and "difference</th>" in html and "<script" not in html
    assert len(found.to_pandas()) == len(runs)
    assert len(found.plot().axes[0].get_yticks()) == 2
    with pytest.raises(LoraInitError, match="no start has been compared with random yet"):
        Comparison(folder, settings, [], [], summarise([], settings), []).plot()


def test_verdicts_come_before_everything_else(full):
    for name, picture in (("report.html", "<img"), ("report.md", "![")):
        text = (full[1] / name).read_text()
        assert text.index("Use eva: its final loss") < text.index(picture) < text.index("eva is better; ")


def test_text_from_users_is_text_everywhere(full):
    _, folder, _ = full
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    markdown = (folder / "report.md").read_text()
    assert "<script" not in markdown.replace("\\<script", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) >= 3 for row in rows)
    hostile = [row for row in rows if "script" in row]
    assert hostile
    assert all(r"\|\*\_" in row for row in hostile)


def test_markdown_has_a_picture_for_each_png_and_every_run(full):
    runs, folder, files = full
    markdown = (folder / "report.md").read_text()
    pngs = {path.name for path in files if path.suffix == ".png"}
    names = ("learning_curves", "learning_rates", "differences", "forgetting")
    assert pngs == {f"{name}.png" for name in names} == set(re.findall(r"\]\((.*?\.png)\)", markdown))
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pngs)
    assert all(f"{run['report_loss'][-1]:.4f}" in markdown for run in runs)


def test_a_second_report_of_the_same_runs_is_the_same(full):
    _, folder, files = full
    before = {path: path.read_bytes() for path in files}
    assert {path: path.read_bytes() for path in write_report(folder)} == before
    assert {path.name for path in folder.iterdir()} == {*(path.name for path in files), "runs", "settings.json"}


def test_a_description_is_plain_values(full):
    runs, folder, _ = full
    found = describe_directory(folder)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found | {"what": "comparison"}))
    assert found["runs"] == {"finished": len(runs)} and found["settings"]["rank"] == 8
    assert found["starts"]["eva"]["learning_rate"] == 1e-3 and 0.1 < found["starts"]["eva"]["loss"] < 0.2
    assert found["verdicts"][0]["outcome"] == "better" and found["notes"]


PARTIAL = {
    "nothing": ([], "No run has ended yet"),
    "one run": ([record()], "Not run yet: eva."),
    "random alone": (planted({}), "Not run yet: eva."),
    "no random": ([run for run in planted({"eva": 0}) if run["start"] != "random"], "compared with random"),
    "one seed": (planted({"eva": 0}, seeds=(0,)), "no statement possible with 1 run"),
    "one rate": (planted({"eva": 0}, rates=(1e-3,)), "But it was run at 1e-3 only, so it is not known to be tuned."),
    "all failed": (
        [broken("failed", "out of memory", start=s) for s in ("random", "eva")],
        "2 runs failed (out of memory): random, eva.",
    ),
    "all unstable": ([broken("unstable", "nan", start=s) for s in ("random", "eva")], "is unstable at 1e-3"),
    "without extras": (
        [run | dict.fromkeys(("metrics", "metrics_before", "retain_loss")) for run in planted({"eva": 0})],
        "no difference shown",
    ),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_directories_give_a_valid_report_that_says_what_is_missing(name, tmp_path):
    runs, said = PARTIAL[name]
    files = write_report(write(tmp_path / "run", runs))
    page = (tmp_path / "run" / "report.html").read_text()
    assert said in " ".join(Page(page).words)
    assert all(path.stat().st_size for path in files)
    assert describe_directory(tmp_path / "run")["runs"] == ({} if not runs else {runs[0]["status"]: len(runs)})


def test_many_starts_keep_looks_of_their_own_and_their_own_always():
    names = ["eva", "eva-rho1", "eva-ranks", "orthogonal", "gaussian", "eva-uncentred", "eva-frozen-a", "pissa",
             "olora", "corda", "loftq", "mine", "yours"]  # fmt: skip
    styles = looks(["random", *names])
    assert len({styles[name] for name in ["random", *names]}) == len(names) + 1
    assert looks(["pissa", "random"])["pissa"] == styles["pissa"]


def test_without_settings_there_is_one_clear_error(tmp_path):
    for asked in (write_report, describe_directory):
        with pytest.raises(LoraInitError, match=r"settings\.json: cannot be read.*Name the directory of a comparison"):
            asked(tmp_path)
