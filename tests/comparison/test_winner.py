"""best/: the trained adapter of the best start, the very one of its run, never replaced unasked."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_init.comparison import workbench
from lora_init.comparison.runs import Run
from lora_init.comparison.training import evaluate
from tests.comparison.test_compare import compare, set_up_bench
from tests.comparisons import make_home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("winner"))


def test_the_adapter_of_the_best_start_is_kept_once_and_not_replaced(home, tmp_path, monkeypatch):
    lines, out = [], tmp_path / "out"
    found = compare(home, out, starts=["random", "orthogonal"], learning_rates=[1e-2], say=lines.append)
    kept = json.loads((out / "best" / "run.json").read_text())
    twin = next(run for run in found.records if Run.of(run) == Run.of(kept))
    assert kept["report_loss"] == twin["report_loss"] and kept["start"] == found.summary.start == "random"
    assert twin["selection_loss"] == min(run["selection_loss"] for run in found.records if run["start"] == "random")
    bench = set_up_bench(home, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "llama"), out / "best")
    assert evaluate(model, bench.task, bench.task.report).loss == pytest.approx(kept["report_loss"][-1], rel=1e-5)
    card = (out / "best" / "README.md").read_text()
    assert "library_name: peft" in card and "`random` on" in card and "No start is shown to be better" in card
    assert len(lines) == len(found.records)  # nothing to say about it
    # Another best run leaves it as it is, and says so.
    before = {file.name: file.read_bytes() for file in (out / "best").iterdir()}
    (out / "best" / "run.json").write_text(json.dumps(kept | {"start": "eva"}))
    monkeypatch.setattr(workbench, "train", None)  # nothing is trained
    compare(home, out, starts=["random", "orthogonal"], learning_rates=[1e-2], say=lines.append)
    assert f"holds eva, 0.01, seed {kept['seed']} and stays; the best is now random, 0.01, seed" in lines[-1]
    after = {file.name: file.read_bytes() for file in (out / "best").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"run.json"}


def test_the_adapter_of_changed_weights_is_not_kept(home, tmp_path):
    lines = []
    runs = dict(starts=["random", "pissa"], learning_rates=[1e-2], seeds=2)
    real = compare(home, tmp_path / "out", **runs)
    for file in (tmp_path / "out" / "runs").glob("pissa*"):
        record = json.loads(file.read_text())
        losses = next(
            run["report_loss"] for run in real.records if (run["start"], run["seed"]) == ("random", record["seed"])
        )
        file.write_text(json.dumps(record | {"report_loss": [*losses[:-1], losses[-1] - 1.0]}))
    for file in (tmp_path / "out" / "best").iterdir():
        file.unlink()
    found = compare(home, tmp_path / "out", **runs, say=lines.append)
    assert found.summary.start == "pissa" and not list((tmp_path / "out" / "best").iterdir())
    assert lines[-1] == "pissa changes the weights of the model, so its trained adapter is not kept."
    # What is better at equal steps has made random train for twice as many.
    assert [run["evaluation_points"] for run in found.records if run["start"] == "random+12-steps"] == [[0, 12]] * 2
    assert found.summary.equal_time[0].startswith("At equal total time, pissa: ")


def test_numbers_of_statistics_batches_are_compared(home, tmp_path):
    found = compare(
        home, tmp_path / "out", starts=["random", "eva-rho1"], learning_rates=[1e-2], seeds=1, statistics_batches=[2, 8]
    )
    starts = [run["start"] for run in found.records]
    assert starts == ["random", "eva-rho1+2-batches", "eva-rho1+8-batches"]
    files = sorted(file.name for file in (tmp_path / "out" / "statistics").iterdir())
    assert files == ["seed0-centred-2.safetensors", "seed0-centred-8.safetensors"]
    stats = [set_up_bench(home, tmp_path / "out").statistics(0, True, False, n) for n in (2, 8)]
    assert [next(iter(one.groups.values())).n_samples for one in stats] == [2 * 24, 8 * 24] or (
        stats[0].groups.keys() == stats[1].groups.keys()
        and not torch.equal(*(next(iter(one.groups.values())).components[:1] for one in stats))
    )
    more = compare(
        home, tmp_path / "out", starts=["random", "eva-rho1"], learning_rates=[1e-2], seeds=1, statistics_batches=[2, 4]
    )
    assert {run["start"] for run in more.records} == {*starts, "eva-rho1+4-batches"}
