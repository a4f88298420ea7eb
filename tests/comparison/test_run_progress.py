"""What a comparison says while it runs."""

from lora_init.comparison.compare import Progress


def record(status="finished", error=None):
    losses = [1.0, 0.5] if status == "finished" else None
    return dict(status=status, error=error, validation_loss=losses, run_seconds=61.0)


def test_one_estimate_and_a_line_for_each_run():
    lines = []
    with Progress(4, lines.append, show=False) as progress:
        progress.begin("random, 0.001, seed 0", planned=6, left=5)
        for _ in range(4):
            progress.step(120.0)
        progress.end(record())
        progress.begin("eva, 0.001, seed 0", planned=5, left=3)
        progress.step(60.0)
        progress.end(record("failed", "out of memory."))
    assert lines == [
        "5 of 6 runs left, about 10 min",
        "run 2/6 random, 0.001, seed 0: finished, loss 1.0000 -> 0.5000, 61 s",
        "run 3/5 eva, 0.001, seed 0: failed, out of memory., 61 s",
    ]


def test_the_bar_counts_the_steps_of_all_runs(capfd):
    with Progress(4, lambda text: None, show=True) as progress:
        progress.begin("random", planned=2, left=2)
        for _ in range(2):
            progress.step(1.0)
        progress.end(record("unstable", "loss nan"))
        assert (progress._bar.n, progress._bar.total) == (4, 8)
        progress.begin("eva", planned=2, left=1)
        assert (progress._bar.n, progress._bar.total) == (4, 8)
    assert "run 2/2 eva" in capfd.readouterr().err


def test_a_run_shorter_than_the_estimate_needs():
    lines = []
    with Progress(1, lines.append, show=False) as progress:
        progress.begin("random", planned=1, left=1)
        progress.step(5.0)
    assert lines == ["1 of 1 runs left, about 5 s"]
