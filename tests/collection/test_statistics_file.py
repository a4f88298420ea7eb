"""One file for a pass: used if it is complete, gone on with if it is not, and refused if it is of something else."""

import itertools
import os
import signal
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lora_init import LoraInitError, Statistics, collect
from lora_init.collection import loop
from lora_init.collection.collect import Interrupted, OtherSettingsError
from tests import reference
from tests.collection.made import all_rows
from tests.conftest import MODELS, batches_for, refused

SETTINGS = {"rank": 4, "tolerance": 0.0, "data": "some data"}


def model(name="llama"):
    torch.manual_seed(5)
    return MODELS[name]()


def interrupted_after(n, batches):
    yield from batches[:n]
    raise KeyboardInterrupt


def interrupt(file, n=3, name="llama", **changes):
    """Leave the file of a pass that was interrupted after `n` batches."""
    with pytest.raises(Interrupted):
        collect(
            model(name), interrupted_after(n, batches_for(name, n_batches=6)), statistics=file, **SETTINGS | changes
        )


class Counting:
    """A forward function that counts how often the model runs."""

    def __init__(self):
        self.n = 0

    def __call__(self, model, batch):
        self.n += 1
        model(**batch)


def own_loss(output, batch):
    return output.loss


def test_the_limit_of_batches_counts_those_before_an_interruption(tmp_path):
    file = tmp_path / "stats"
    interrupt(file, 4, max_batches=5)
    again = collect(model("llama"), batches_for("llama", n_batches=6), statistics=file, **SETTINGS | {"max_batches": 5})
    assert again.provenance.n_batches == 5


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("center", [True, False])
def test_a_pass_that_was_interrupted_goes_on_after_the_batches_it_has_used(name, center, tmp_path):
    batches, file = batches_for(name, n_batches=6), tmp_path / "stats"
    interrupt(file, 4, name, center=center, forward=Counting())
    partial = Statistics.load(file).provenance
    assert (partial.complete, partial.n_batches, partial.stop_reason) == (False, 4, "interrupted")
    counting = Counting()
    resumed = collect(model(name), batches, statistics=file, **SETTINGS, center=center, forward=counting)
    assert counting.n == 2
    whole = collect(model(name), batches, **SETTINGS, center=center)
    assert whole.provenance.center is center
    assert Statistics.load(file).provenance == resumed.provenance
    made = resumed.provenance
    assert (made.complete, made.n_batches, made.stop_reason) == (True, 6, "exhausted")
    for layer in whole:
        assert resumed[layer].n_samples == whole[layer].n_samples
        assert resumed.total_variance(layer) == pytest.approx(whole.total_variance(layer), rel=1e-5)
    if name == "llama":
        again = model(name)
        for layer in whole:  # two parts lose what the first has left out
            rows = all_rows(again, batches, layer)
            best = reference.captured(rows, reference.pca(rows, 4, center)[0], center)
            assert reference.captured(rows, resumed[layer].components[:4], center) > 0.95 * best


def test_gradients_and_what_needs_the_weights_go_on_too(tmp_path):
    batches, file = batches_for("llama", n_batches=6), tmp_path / "stats"
    interrupt(file, 4, gradients=True)
    resumed = collect(model(), batches, statistics=file, **SETTINGS, gradients=True)
    whole = collect(model(), batches, **SETTINGS, gradients=True)
    assert resumed.provenance.n_labels == whole.provenance.n_labels
    for name in whole:
        a, b = resumed.gradient(name), whole.gradient(name)
        torch.testing.assert_close(a.output_moment, b.output_moment, rtol=1e-5, atol=1e-12)
        assert a.importance == pytest.approx(b.importance, rel=0.1)  # of sums truncated in other places


def test_a_complete_file_is_used_without_running_the_model(tmp_path):
    file, counting = tmp_path / "stats", Counting()
    settings = SETTINGS | {"statistics": file, "forward": counting}
    whole = collect(model(), batches_for("llama"), **settings)
    content = file.read_bytes()
    again = collect(model(), batches_for("llama"), **settings)
    assert counting.n == 4 and file.read_bytes() == content and again.provenance == whole.provenance
    collect(model(), batches_for("llama"), **settings, overwrite=True)
    assert counting.n == 8


@pytest.fixture(scope="module")
def content_of(tmp_path_factory):
    """What the file of a complete pass holds, and of one that was interrupted."""
    folder = tmp_path_factory.mktemp("passes")
    collect(model(), batches_for("llama", n_batches=6), statistics=folder / "True", forward=Counting(), **SETTINGS)
    interrupt(folder / "False", forward=Counting())
    return {complete: (folder / str(complete)).read_bytes() for complete in (True, False)}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(("changes", "expected"), [
    ({"rank": 3}, r"stats was made with rank 4, and 3 is asked for\. Pass overwrite=True to begin again, or use"),
    ({"rho": 1.0}, r"with rho 2\.0, and 1\.0"),
    ({"seed": 1}, "with seed 0, and 1"),
    ({"center": False}, "with center True, and False"),
    ({"token_mask": "labels"}, "with token_mask 'attention', and 'labels'"),
    ({"tolerance": 0.1}, r"with tolerance 0\.0, and 0\.1"),
    ({"max_batches": 5}, "with max_batches 64, and 5"),
    ({"data": "other"}, "with data 'some data', and 'other'"),
    ({"target_modules": ["q_proj"]}, r"with layers '14 \(\w+\)', and '2 \(\w+\)'"),
    ({"gradients": True}, "with gradients False, and True"),
    ({"batches": batches_for("llama", seed=1)}, "from other data: the batches are other ones"),
])  # fmt: skip
def test_other_settings_data_and_models_are_refused(complete, changes, expected, content_of, tmp_path):
    file, counting = tmp_path / "stats", Counting()
    content, changes = content_of[complete], dict(changes)
    file.write_bytes(content)
    batches = changes.pop("batches", batches_for("llama", n_batches=6))
    with pytest.raises(OtherSettingsError, match=expected):
        collect(model(), batches, statistics=file, forward=counting, **SETTINGS | changes)
    assert file.read_bytes() == content and counting.n == 0


def test_batches_beyond_those_that_a_pass_may_read_are_not_compared(tmp_path):
    file, batches, counting = tmp_path / "stats", batches_for("llama", n_batches=6), Counting()
    asked = SETTINGS | {"max_batches": 3, "statistics": file, "forward": counting}
    for some in (batches, batches[:3], [*batches[:3], *batches_for("llama", seed=1)]):
        assert collect(model(), some, **asked).provenance.n_batches == counting.n == 3
    with pytest.raises(OtherSettingsError, match="from other data"):
        collect(model(), [*batches[:2], batches[3]], **asked)


class Held:
    """A batch of one's own, which holds what the model takes."""

    def __init__(self, batch):
        self.batch, self.whole = batch, self


def test_batches_of_ones_own_class_and_merged_files_are_held_against_other_data(tmp_path):
    one, other = ([Held(batch) for batch in batches_for("llama", n_batches=2, seed=seed)] for seed in (0, 1))
    own = dict(forward=lambda model, held: model(**held.batch), **SETTINGS)
    collect(model(), one, statistics=tmp_path / "own", **own)
    assert collect(model(), one, statistics=tmp_path / "own", **own).provenance.n_batches == 2
    with pytest.raises(OtherSettingsError, match="from other data: the batches are other ones"):
        collect(model(), other, statistics=tmp_path / "own", **own)
    collect(model(), one, **own).merge(collect(model(), other, **own)).save(tmp_path / "merged")
    with pytest.raises(OtherSettingsError, match="does not say which batches it was made from"):
        collect(model(), one, statistics=tmp_path / "merged", **own | {"data": "some data"})


def test_the_same_weights_that_compute_otherwise_are_another_model(tmp_path):
    """A context extended in config.json leaves the weights as they were, and changes what each layer reads."""
    file, other = tmp_path / "stats", model()
    collect(model(), batches_for("llama"), statistics=file, **SETTINGS)
    other.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(OtherSettingsError, match=r"with config.rope_parameters.rope_theta 10000.0, and 5.0 is asked"):
        collect(other, batches_for("llama"), statistics=file, **SETTINGS)


@pytest.mark.parametrize(
    ("token_mask", "complete", "used"),
    [("attention", True, True), ("attention", False, False), ("labels", True, False)],
)
def test_a_file_with_gradients_serves_a_pass_without_if_it_has_the_same_rows(token_mask, complete, used, tmp_path):
    """With gradients, labels count one token before; and going on without them would drop those that there are."""
    file, batches = tmp_path / "stats", batches_for("llama", n_batches=6)
    settings, with_gradients = SETTINGS | {"token_mask": token_mask}, {"gradients": True, "loss": own_loss}
    if complete:
        collect(model(), batches, statistics=file, **settings, **with_gradients)
    else:
        interrupt(file, token_mask=token_mask, **with_gradients)
    content = file.read_bytes()
    if used:
        assert collect(model(), batches, statistics=file, **settings).provenance.gradients
    else:
        with pytest.raises(OtherSettingsError, match="with gradients True, and False is asked for"):
            collect(model(), batches, statistics=file, **settings)
    assert file.read_bytes() == content


class Rows(torch.utils.data.Dataset):
    """Batches of which one cannot be read."""

    def __init__(self, batches, broken):
        self.batches, self.broken = batches, broken

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("the file is damaged")
        return self.batches[index]


class Failing(Counting):
    """A forward function that does not take one batch."""

    def __init__(self, bad):
        super().__init__()
        self.bad = bad

    def __call__(self, model, batch):
        super().__call__(model, batch)
        if torch.equal(batch["input_ids"], self.bad["input_ids"]):
            raise ZeroDivisionError


GOES_ON = "skip_bad_batches=1 goes on without it."


def infinite(output, batch):
    return output.loss * (float("inf") if batch["input_ids"][0, 0] == 1 else 1.0)


@pytest.mark.parametrize(("way", "kind", "text"), [
    ("reading", OSError, "the file is damaged"),
    ("forward", ZeroDivisionError, None),
    ("loss", LoraInitError, rf"^batch 4: the loss is inf.*{GOES_ON}$"),
])  # fmt: skip
def test_an_error_keeps_what_was_complete(way, kind, text, tmp_path):
    batches, file = batches_for("llama", n_batches=6), tmp_path / "stats"
    others = batches[:4] + batches[5:]
    batches[4]["input_ids"][0, 0] = 1  # nowhere else
    data = torch.utils.data.DataLoader(Rows(batches, 4 if way == "reading" else -1), batch_size=None)
    of_way = {"reading": {}, "forward": {"forward": Failing(batches[4])}, "loss": {"gradients": True, "loss": infinite}}
    options = SETTINGS | of_way[way]
    for _ in range(2):  # when it goes on it comes to the same batch
        with warnings.catch_warnings(record=True) as said, pytest.raises(kind, match=text) as caught:
            warnings.simplefilter("always")
            collect(model(), data, statistics=file, **options)
        named = [] if kind is LoraInitError else [f"batch 4 failed: {kind.__name__}. {GOES_ON}"]
        assert [str(one.message) for one in said] == named
        for made in (caught.value.statistics.provenance, Statistics.load(file).provenance):
            assert (made.complete, made.n_batches, made.stop_reason) == (False, 4, "failed")
    stats = collect(model(), data, statistics=file, skip_bad_batches=1, **options)
    made, clean = stats.provenance, collect(model(), others, **options)
    assert (made.complete, made.n_batches, made.settings["bad_batches"], made.settings["used"]) == (True, 5, 1, [6])
    assert any("1 of 2 batches failed and were left out. batch 4: " in note for note in made.notes)
    assert made.n_labels == clean.provenance.n_labels
    for name in clean:
        torch.testing.assert_close(stats[name].mean, clean[name].mean, atol=1e-6, rtol=1e-5)
        assert stats.total_variance(name) == pytest.approx(clean.total_variance(name), rel=1e-5)


def test_what_may_fail_counts_over_all_passes_of_a_file(tmp_path):
    batches, file = batches_for("llama", n_batches=8), tmp_path / "stats"
    for i in (2, 5):
        batches[i]["input_ids"][0, 0] = 1  # nowhere else
    options = SETTINGS | dict(gradients=True, loss=infinite, statistics=file)
    said = "batch 5: the loss is inf.*skip_bad_batches=2"
    for _ in range(3):
        refused(said, collect, model(), batches, skip_bad_batches=1, **options)
        assert Statistics.load(file).provenance.n_batches == 4
    assert collect(model(), batches, skip_bad_batches=2, **options).provenance.n_batches == 6


def test_a_second_pass_with_the_same_file_is_refused(tmp_path):
    file, here = tmp_path / "stats", []

    def stream():
        for batch in batches_for("llama"):
            if not here:
                here.append(sorted(tmp_path.iterdir()))
                with pytest.raises(LoraInitError, match=rf"stats is in use by process {os.getpid()} on .* Wait until"):
                    collect(model(), batches_for("llama"), statistics=file, **SETTINGS)
                assert sorted(tmp_path.iterdir()) == here[0]
            yield batch

    collect(model(), stream(), statistics=file, **SETTINGS)
    assert here and Statistics.load(file).provenance.complete and list(tmp_path.iterdir()) == [file]


def test_a_place_that_cannot_be_written_is_said_before_the_pass(tmp_path):
    counting = Counting()
    for file, expected in (
        (tmp_path / "none" / "stats", "there is no directory .*none. Create it first"),
        (tmp_path, "a file is needed"),
    ):
        refused(expected, collect, model(), batches_for("llama"), statistics=file, forward=counting, **SETTINGS)
    assert counting.n == 0 and not list(tmp_path.iterdir())


def test_killed_anywhere_it_goes_on_from_a_whole_file(tmp_path):
    """Killed in the middle of writing, between two batches, and again until it is through."""
    file, at = tmp_path / "stats", []
    expected = collect(model(), batches_for("llama", n_batches=12), **SETTINGS)
    for kill_at in ("write", "batch", "write", "batch", None):
        child = os.fork()
        if child == 0:
            try:
                _go_on(file, kill_at)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) is (kill_at is not None)
        made = Statistics.load(file) if file.exists() else None
        at.append(0 if made is None else made.provenance.n_batches)
    assert at == sorted(at) and at[-1] == 12 and len(set(at)) > 2
    made = Statistics.load(file)
    assert made.provenance.complete
    for name in expected:
        assert made[name].n_samples == expected[name].n_samples
    assert [entry.name for entry in tmp_path.iterdir()] == ["stats"]  # what the killed have left is swept up


@pytest.mark.parametrize(("every", "often"), [(60.0, False), (-1.0, True)])
def test_a_file_is_written_about_once_a_minute_and_at_the_end(every, often, tmp_path, monkeypatch):
    """Each write takes the whole of the statistics to the disk: after every batch, that would be most of the pass."""
    written, real = [], Statistics.save
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    monkeypatch.setattr(Statistics, "save", lambda self, path, *more: written.append(1) or real(self, path, *more))
    collect(MODELS["llama"](), batches_for("llama", n_batches=6), ["q_proj"], rank=2, statistics=tmp_path / "stats")
    assert (len(written) > 3) if often else len(written) == 1


def test_a_file_is_written_again_a_minute_after_it_was_written(tmp_path, monkeypatch):
    """By a clock that is read at the start, in each step and after each writing, and goes on by 25 s each time."""
    now, at, real = itertools.count(0.0, 25.0), [], Statistics.save

    def save(self, path, *more):
        at.append(self.provenance.n_batches)
        return real(self, path, *more)

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: 0.0, monotonic=lambda: next(now)))
    monkeypatch.setattr(Statistics, "save", save)
    for file in (None, tmp_path / "stats"):
        collect(model(), batches_for("llama", n_batches=7), ["q_proj"], rank=2, tolerance=0.0, statistics=file)
        assert at == ([] if file is None else [2, 5, 7])


def test_of_no_batch_nothing_is_written(tmp_path, monkeypatch):
    def interrupted(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        collect(model(), batches_for("llama"), statistics=tmp_path / "stats", forward=interrupted, **SETTINGS)
    assert caught.value.statistics is None and not list(tmp_path.iterdir())


def test_a_pass_that_was_interrupted_after_all_batches_has_no_more_to_read(tmp_path):
    interrupt(tmp_path / "stats", 6)
    made = collect(model(), batches_for("llama", n_batches=6), statistics=tmp_path / "stats", **SETTINGS).provenance
    assert (made.complete, made.n_batches, made.stop_reason) == (True, 6, "exhausted")
    assert Statistics.load(tmp_path / "stats").provenance == made


def test_a_file_that_does_not_say_a_setting_is_of_the_same(tmp_path):
    batches, file = batches_for("llama"), tmp_path / "stats"
    old = collect(model(), batches, statistics=file, **SETTINGS)
    settings = {name: value for name, value in old.provenance.settings.items() if name != "rho"}
    replace(old, provenance=replace(old.provenance, settings=settings)).save(file)
    assert collect(model(), batches, statistics=file, **SETTINGS, rho=1.5).provenance.settings == settings


def test_a_file_that_cannot_be_written_is_a_warning_and_the_pass_goes_on(tmp_path, monkeypatch):
    def full(self, path, *more):
        raise LoraInitError(f"{path}: no space left.")

    monkeypatch.setattr(Statistics, "save", full)
    with pytest.warns(UserWarning, match=r"stats: no space left\. The statistics are not kept in that file"):
        found = collect(model(), batches_for("llama"), statistics=tmp_path / "stats", **SETTINGS)
    assert found.provenance.n_batches == 4 and not list(tmp_path.iterdir())


def _go_on(file, kill_at):
    loop.SAVE_EVERY = 0.0
    synced, read, fsync = [], [], os.fsync

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def sync(descriptor):
        synced.append(1)
        if kill_at == "write" and len(synced) == 3:
            kill()
        fsync(descriptor)

    def stream():
        for batch in batches_for("llama", n_batches=12):
            read.append(1)
            if kill_at == "batch" and len(synced) == 3:
                kill()
            yield batch

    os.fsync = sync
    collect(model(), stream(), statistics=file, **SETTINGS)
