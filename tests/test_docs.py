"""Every Python and shell block of the README and of docs/ runs, page by page, with a tiny model and tiny data."""

import ast
import os
import re
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lora_init
from docs import tables
from lora_init.cli import app as cli
from lora_init.starts.starts import STARTS
from tests.pages import DATA, ENCODER, LARGE, MODEL, TEMPLATE, home  # noqa: F401

ROOT = Path(__file__).parent.parent
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
OTHERS = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md", "benchmarks/LOG.md",
    "benchmarks/STUDIES.md", "benchmarks/VERSIONS.md",
]  # fmt: skip
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in OTHERS + DOCS}
BLOCK = re.compile(r"^```([\w{}-]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = [page for page in ["README.md", *DOCS] if re.search(r"^```(python|bash)$", TEXTS[page], re.MULTILINE)]
# These run as they stand. The others say "as before": they find a model, batches and statistics under those names.
COMPLETE = ("README.md", "docs/getting-started.md")

# Budgets and lengths as they fit the tiny model.
SMALLER = (
    (r"--n 64", "--n 8 --length 8"),
    (r"head -n 36", "head -n 12"),
    (r"range\(20\)", "range(9)"),
    (r"\b1M\b", "3k"),
    (r"\b5M\b", "5k"),
    (
        r"lora-init compare",
        "lora-init compare --steps 2 --seeds 1 --learning-rates 1e-3 --selection-samples 8 --report-samples 8",
    ),
    (
        r'starts=\("random", "eva"\)',
        r"\g<0>, steps=2, seeds=2, learning_rates=[1e-3], selection_samples=8, report_samples=8",
    ),
    (r"(max_steps|num_train_epochs)=\d+", r"\g<1>=2"),
    (r'report_to="none",$', 'report_to="none", max_steps=2,'),
    (r'report_to="none", max_steps=2,(?!\n +bf16)', r"\g<0> bf16=False,"),
)


# Gradients of a tiny classifier of three classes have two directions in its last layers.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* layers get fewer ranks than asked for")
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page, home, tmp_path, monkeypatch):  # noqa: F811
    run_blocks(page, TEXTS[page], home, tmp_path, monkeypatch)


@pytest.mark.filterwarnings("ignore:.* layers get fewer ranks than asked for", "ignore:.*left out without a label")
def test_a_table_with_gaps_is_classified_by_the_classes_of_the_adapter(home, tmp_path, monkeypatch):  # noqa: F811
    page = "docs/classify-a-csv.md"
    made = 'rows.to_csv("tickets.csv", index=False)'
    gaps = f'rows.loc[::9, "category"] = None\nrows.loc[[2, 3], "category"] = ["1", "rare"]\n{made}'
    assert made in TEXTS[page]
    run_blocks(page, TEXTS[page].replace(made, gaps), home, tmp_path, monkeypatch)


def run_blocks(page, whole, home, tmp_path, monkeypatch):  # noqa: F811
    if page != "docs/comparing-starts.md":  # drawing takes longer than these comparisons
        monkeypatch.setattr("lora_init.comparison.report.pictures", lambda summary: {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in (MODEL, LARGE, ENCODER):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(home / name)
    names = {"__name__": "__main__"}
    if page not in COMPLETE:
        for file in (DATA, "stats.safetensors"):
            (tmp_path / file).write_bytes((home / file).read_bytes())
        tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
        batches = lora_init.load_batches(DATA, tokenizer, template=TEMPLATE)
        stats = lora_init.Statistics.load("stats.safetensors")
        names |= dict(lora_init=lora_init, tokenizer=tokenizer, model=model, batches=batches, stats=stats)
    for block in BLOCK.finditer(whole):
        language, text = block.groups()
        for pattern, smaller in SMALLER:
            text = re.sub(pattern, smaller, text, flags=re.MULTILINE)
        if language == "python":
            before = whole[: block.start()].count("\n") + 1  # so that a traceback names the line of the page
            exec(compile("\n" * before + text, str(ROOT / page), "exec"), names)
        elif language == "bash":
            for command in commands(text):
                run(command)


def commands(text):
    """Split a shell block into its commands: a line, with those that a backslash or an open quote adds to it."""
    command = ""
    for line in text.replace("\\\n", " ").splitlines():
        command += line
        if command.count("'") % 2:
            command += "\n"
        elif command.strip():
            yield command
            command = ""


def run(command):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        assert words[2] == "-e" and words[3].partition("[")[0] == "."
    elif words[0] in ("lora-init", "torchrun", "accelerate"):  # here in one process; tests/collection/ has two
        start = 1 if words[0] == "lora-init" else words.index("lora_init") + 1
        found = ([*map(str, sorted(Path().glob(word)))] if "*" in word else [word] for word in words[start:])
        result = CliRunner().invoke(cli.app, [*chain.from_iterable(found)])
        assert result.exit_code == 0, f"{command}\n{result.stderr}"
    else:
        subprocess.run(["bash", "-ec", command], check=True)


def test_no_block_sets_a_rate_that_a_forward_pass_tells():
    """Blocks take the measured rate, or one that `init` printed; where alpha is named it is twice the rank."""
    for page in {"README.md", *DOCS} - {"docs/comparing-starts.md"}:
        code = "".join(text for language, text in BLOCK.findall(TEXTS[page]) if language in ("python", "bash"))
        assert all(int(alpha) == 2 * int(rank) for rank, alpha in re.findall(r"r=(\d+), lora_alpha=(\d+)", code)), page
        assert not re.findall(r"learning.rate[= ][\d.e-]+(?!.*what `init` printed)", code), page


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 120


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", TEXTS[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), anchor


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_commands_named_there_exist(page):
    for path in re.findall(r"`((?:examples|tests|benchmarks|lora_init)/[\w./]+)`", TEXTS[page]):
        assert page == "benchmarks/LOG.md" or (ROOT / path).exists(), path
    for name in set(re.findall(r"`lora-init (\w+)", TEXTS[page])):
        assert CliRunner().invoke(cli.app, [name, "--help"]).exit_code == 0, name


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/python.md"], re.MULTILINE)
    assert sorted(listed) == lora_init.__all__


@pytest.mark.parametrize("page", DOCS)
def test_tables_are_what_the_code_says(page):
    assert tables.fresh(TEXTS[page]) == TEXTS[page], "Run `python docs/tables.py`."


def test_what_a_page_shows_of_the_code_is_the_code():
    own = (ROOT / "examples/own_start/own_start.py").read_text(encoding="utf-8")
    assert own[own.index("from lora_init import") :] in TEXTS["docs/own-starts.md"]
    assert cli.FOUR_THINGS in TEXTS["docs/command-line.md"]


def test_pages_are_few_and_short_and_whole_on_a_code_host():
    assert len(DOCS) <= 21 and "docs/index.md" in DOCS  # which is the table of contents
    assert sum(len(TEXTS[page].split()) for page in DOCS) <= 21_600
    assert set(re.findall(r"\]\((\S+?\.md)\)", TEXTS["docs/index.md"])) == {*map(_name, DOCS)} - {"index.md"}
    for page in DOCS:
        title, first = TEXTS[page].split("\n\n")[:2]
        assert title.startswith("# ") and (page == "docs/index.md" or first[0].isalpha()), page
        assert not re.search(r"\{\{|^:::|^```\{|^\.\. |\{\w+\}`|^: ", TEXTS[page], re.MULTILINE), page


def _name(page):
    return page.removeprefix("docs/")


def _anchor(heading):
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


# A sentence that tells a reader what to take. Measured numbers stand in tables, or in sentences without such a verb.
TELLS = r"(?:^|[.:;|(*] *|\b(?:and|so|or|then|please) )(?:train|take|try|use|set|keep|choose|prefer|start)\b"
ADVICE = {
    "rate": rf"(?i){TELLS}[^.|]*\b\d(?:\.\d+)?e-\d\b",
    "alpha": rf"(?i){TELLS}[^.|]*alpha[^.|]*(?:\btwice\b|\btimes\b|\b\d+ ?x\b|\bequal\b|= ?\d)",
    "start": rf"(?i){TELLS}[^.|]*`(?:{'|'.join(start.name for start in STARTS if start.name != 'random')})`",
}


@pytest.mark.parametrize(("what", "sentence"), ADVICE.items())
def test_an_advice_stands_on_one_page(what, sentence):
    assert re.search(sentence, {"rate": "Train at 2e-4.", "alpha": "So set lora_alpha to twice the rank.",
                                "start": "For text, and so take `eva`."}[what])  # fmt: skip
    texts = {page: BLOCK.sub("", TEXTS[page]) for page in ["README.md", *DOCS]}
    found = {page: re.findall(rf"[^\n]*{sentence[4:]}[^\n]*", text, re.I) for page, text in texts.items()}
    assert len({page: lines for page, lines in found.items() if lines}) <= 1, found


def test_error_lines_of_the_troubleshooting_page_are_the_librarys():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "lora_init").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    said = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    lines = re.findall(r"^\| `([^`]+)` \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    assert len(lines) >= 12
    for piece in (piece.strip() for line in lines for piece in line.split("...")):
        assert any(piece in text for text in said), piece


def test_the_citation_is_of_this_version():
    assert f"\nversion: {lora_init.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_each_goal_of_the_readme_is_reached_in_few_words():
    """The README, and the page or the part of a page that it sends one to."""
    goals = re.findall(r"^\| .*\]\((docs/[\w-]+\.md)#?([^)]*)\) \|$", TEXTS["README.md"], re.MULTILINE)
    assert len(goals) >= 4
    for page, anchor in goals:
        parts = re.split(r"^## ", TEXTS[page], flags=re.MULTILINE)
        part = next((part for part in parts if anchor and _anchor(part.partition("\n")[0]) == anchor), TEXTS[page])
        shown = [re.sub("<!--.*?-->", "", text) for text in (TEXTS["README.md"], part)]  # comments are for tests
        assert sum(len(text.split()) for text in shown) <= 2_500, page


def test_nouns_are_said():
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in ["README.md", *DOCS]]
    files = [path for kind in ("py", "jinja") for path in (ROOT / "lora_init").rglob(f"*.{kind}")]
    texts += [path.read_text(encoding="utf-8") for path in files]
    n_found = sum(len(re.findall(r"(?i)\bth(?:at|ose) of\b", text)) for text in texts)
    assert n_found <= 40, "write the noun for `that of` and `those of`; `git diff` shows which are new"
