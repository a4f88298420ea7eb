"""`lora-init merge`: what it writes, prints and refuses."""

import json

import pytest
from typer.testing import CliRunner

from lora_init import Statistics, allocate_ranks
from lora_init.cli import app as cli
from tests.commands import assert_one_line_error
from tests.conftest import batches_for
from tests.statistics.made import passed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("merge")
    passed(batches=batches_for("llama", n_batches=3), data="chat").save(home / "a")
    passed(batches=batches_for("llama", n_batches=2, seed=1), data="code").save(home / "b")
    passed(batches=batches_for("llama", seed=2), data="").save(home / "c")
    passed(center=False).save(home / "uncentred")
    for seed, name in enumerate(("g", "h")):
        passed(targets=["q_proj"], batches=batches_for("llama", seed=seed), gradients=True).save(home / name)
    return home


@pytest.fixture
def run(home, tmp_path):
    def run(*arguments, output="out"):
        words = [str(home / word) if (home / str(word)).exists() else str(word) for word in arguments]
        return CliRunner().invoke(cli.app, ["merge", *words, "-o", str(tmp_path / output)], env={"COLUMNS": "200"})

    return run


def test_it_writes_what_merge_returns(run, home, tmp_path):
    result = run("a", "b", "c", "--weights", "0.5,0.3,0.2", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    stats = [Statistics.load(home / name) for name in "abc"]
    expected, found = stats[0].merge(*stats[1:], weights=[0.5, 0.3, 0.2]), Statistics.load(tmp_path / "out")
    assert found.provenance == expected.provenance
    for name in expected:
        assert found.total_variance(name) == expected.total_variance(name)
        assert found.explained_variance(name).tolist() == expected.explained_variance(name).tolist()
    assert allocate_ranks(found, rank=4).total_rank == 4 * len(found)
    content = json.loads(result.stdout)
    assert content == json.loads(CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert content["path"] == str(tmp_path / "out") and content["n_batches"] == 9
    assert content["n_samples"] == sum(one.provenance.n_samples for one in stats) == found.provenance.n_samples
    assert content["data"] == "0.5 x chat; 0.3 x code; 0.2 x not described"


def test_what_is_there_stays_unless_told(run, home, tmp_path):
    (tmp_path / "out").write_bytes((home / "c").read_bytes())
    assert_one_line_error(run("a", "b"), "exists", "--overwrite")
    assert (tmp_path / "out").read_bytes() == (home / "c").read_bytes()
    assert run("a", "b", "--overwrite").exit_code == 0
    (tmp_path / "mine").write_text("mine")
    assert_one_line_error(run("a", "b", "--overwrite", output="mine"), "is no statistics file, so it is never repl")
    assert (tmp_path / "mine").read_text() == "mine"
    # A file may be merged into itself.
    (tmp_path / "own").write_bytes((home / "c").read_bytes())
    assert run(tmp_path / "own", "a", "--overwrite", output="own").exit_code == 0
    assert Statistics.load(tmp_path / "own").provenance.n_batches == 7
    (tmp_path / "directory").mkdir()
    assert_one_line_error(
        run("a", "b", "--overwrite", output="directory"), "directory is a directory, and a file is needed"
    )
    assert_one_line_error(run("a", "b", output="own/below"), "there is no directory")


@pytest.mark.parametrize(("more", "printed"), [([], True), (["-q"], False), (["-q", "--json"], True)])
def test_quiet_leaves_out_what_was_written_but_not_the_json_that_was_asked_for(run, tmp_path, more, printed):
    done = run("a", "b", *more)
    assert (done.exit_code, bool(done.stdout)) == (0, printed) and (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["a"], "one part alone"),
    (["a", "b", "--weights", "0.7,0.2"], "their sum is 0.9, expected positive numbers whose sum is 1"),
    (["a", "b", "--weights", "1.2,-0.2"], "expected positive numbers"),
    (["a", "b", "--weights", "0.7,0.2,0.1"], "3 for 2 parts"),
    (["a", "b", "--weights", "0.7;0.3"], "expected numbers separated by commas"),
    (["a", "b", "--weights", ""], "expected numbers separated by commas"),
    (["a", "uncentred"], "uncentred was made with center=False"),
    (["a", "b", "a"], "hold the same rows"),
    (["a", "nothing"], "is not a file"),
])  # fmt: skip
def test_what_is_refused_is_not_written(run, tmp_path, arguments, words):
    assert_one_line_error(run(*arguments), words)
    assert not (tmp_path / "out").exists()
