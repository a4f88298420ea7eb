"""`collect`: the pass over the data, its stopping, and what it says about itself."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_init import LoraInitError, collect, principal_angles
from lora_init.collection.collect import Interrupted
from lora_init.layers.identity import count_parameters, fingerprint
from tests import reference
from tests.collection.test_activations import recorded
from tests.conftest import MODELS, batches_for, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


def all_rows(model, batches, name):
    return torch.cat([recorded(model, b, name)[b["attention_mask"].bool()] for b in batches])


def low_rank_inputs(n_batches, n=64, d=24, rank=3, seed=0, noise=0.05):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q
    return [
        torch.randn(n, rank, generator=generator) @ basis.T + noise * torch.randn(n, d, generator=generator)
        for _ in range(n_batches)
    ]


def two_layers():
    return nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_works_on_every_architecture(name):
    model = MODELS[name]()
    stats = collect(model, batches_for(name), rank=2)
    assert stats.provenance.stop_reason == "exhausted"
    assert stats.provenance.n_batches == 4
    for layer, spectrum in stats.items():
        assert spectrum.components.shape == (4, stats.targets[layer].in_features)
        torch.testing.assert_close(spectrum.components @ spectrum.components.T, torch.eye(4), atol=1e-5, rtol=0)
        assert 0 < float(spectrum.explained_variance_ratio.sum()) <= 1.0 + 1e-6
        assert 0 <= stats.held_out[stats.group_of[layer]] <= 1.0


@pytest.mark.parametrize("center", [True, False])
def test_the_components_are_those_of_the_recorded_rows(center):
    model, batches = tiny_llama(), batches_for("llama", n_batches=6)
    stats = collect(model, batches, rank=4, center=center)
    for name in (Q, "model.layers.1.mlp.down_proj"):
        rows = all_rows(model, batches, name)
        components, _, total = reference.pca(rows, 8, center)
        best = reference.captured(rows, components, center)
        assert reference.captured(rows, stats[name].components, center) > 0.98 * best
        assert stats[name].total_variance == pytest.approx(total, rel=1e-5)
        assert stats[name].n_samples == len(rows)


def test_the_held_out_share_is_what_earlier_batches_predict():
    model, batches = two_layers(), low_rank_inputs(3)
    stats = collect(model, batches, rank=2, rho=1.5)
    components, _, _ = reference.pca(batches[0], 3)  # the second goes to the other half
    unseen = np.asarray(batches[2] - batches[0].mean(0), dtype=np.float64)
    expected = ((unseen @ components.T) ** 2).sum() / (unseen**2).sum()
    assert stats.held_out["0"] == pytest.approx(expected, rel=1e-3)


def test_stops_as_converged_when_unseen_rows_are_captured_as_well_as_seen_ones():
    stats = collect(two_layers(), iter(low_rank_inputs(60)), rank=3)
    assert stats.provenance.stop_reason == "converged"
    assert 8 <= stats.provenance.n_batches < 20
    assert stats.held_out["0"] > 0.9


def drifting(n_other, n=64, d=256, rows=500, seed=0, power=1.0):
    """Batches with variances j^-power, the first along other directions; and rows of the later kind to test on."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for _ in range(2)]
    scale = torch.arange(1, d + 1).float() ** (-power / 2)
    drawn = [torch.randn(rows, d, generator=generator) * scale for _ in range(n + 8)]
    rotated = [batch @ kinds[i < n_other].T for i, batch in enumerate(drawn)]
    return rotated[:n], torch.cat(rotated[n:])


@pytest.mark.filterwarnings("ignore:batch")
@pytest.mark.parametrize("power", [1.0, 0.5])  # the exact components of all rows capture 0.97 where it is 0.5
@pytest.mark.parametrize(("n_other", "least"), [(0, 0.95), (1, 0.95), (4, 0.95)])  # the tolerance
def test_does_not_stop_while_the_components_still_follow_a_drift(n_other, least, power):
    batches, unseen = drifting(n_other, power=power)
    layer = nn.Sequential(nn.Linear(256, 4))
    stats = collect(layer, batches, rank=8)
    best = reference.captured(unseen, reference.pca(unseen, 16)[0])
    assert reference.captured(unseen, stats["0"].components) > least * best
    assert n_other or stats.provenance.n_batches < 16 / power  # negative: steady data stop soon


def test_data_that_are_sorted_are_a_warning():
    batches, _ = drifting(6, n=12)
    with pytest.warns(UserWarning, match="batch 6: far less of it is captured .* in 1 of 1 inputs.*Shuffle the data"):
        collect(nn.Sequential(nn.Linear(256, 4)), batches, rank=8)


def test_does_not_converge_on_noise_with_a_strict_tolerance():
    noise = [torch.randn(16, 24, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    stats = collect(two_layers(), noise, rank=3, tolerance=0.0, max_batches=30)
    assert (stats.provenance.stop_reason, stats.provenance.n_batches) == ("max_batches", 30)


def test_a_layer_that_is_not_done_keeps_the_pass_going_for_all():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.easy, self.hard = nn.Linear(24, 2), nn.Linear(24, 2)

        def forward(self, easy, hard):
            return self.easy(easy) + self.hard(hard)

    batches = [
        {"easy": easy, "hard": torch.randn(64, 24, generator=torch.Generator().manual_seed(i)) * 2**i}
        for i, easy in enumerate(low_rank_inputs(20, noise=0.0))
    ]
    stats = collect(Two(), batches, rank=3)
    assert (stats.provenance.stop_reason, stats["easy"].n_samples) == ("exhausted", 20 * 64)
    assert collect(Two(), batches, "easy", rank=3).provenance.n_batches == 8


def spread_rows(n, rows, d=256, seed=0):
    """Batches of rows with variances 1/j, without drift, and rows to test on."""
    batches, _ = drifting(0, n=n, d=d, rows=rows, seed=seed)
    return batches, drifting(0, n=8, d=d, seed=seed)[1]


def share_kept(stats, unseen):
    best = reference.captured(unseen, reference.pca(unseen, 16)[0])
    return float(reference.captured(unseen, stats["0"].components) / best)


def test_few_rows_a_batch_are_not_enough():
    """One row for each example, as an answer of one token has."""
    layer = nn.Sequential(nn.Linear(256, 4))
    (few, unseen), (many, _) = spread_rows(64, 20), spread_rows(64, 200)
    of_few, of_many = collect(layer, few, rank=8), collect(layer, many, rank=8)
    assert of_many.provenance.n_batches < 20 and of_few.provenance.n_batches > 3 * of_many.provenance.n_batches
    assert min(share_kept(of_few, unseen), share_kept(of_many, unseen)) > 0.95


def test_many_rows_of_few_texts_are_not_enough():
    """Rows of a batch lie near three directions of its own; the same rows, mixed, are enough."""
    batches, _ = spread_rows(40, 200)
    generator = torch.Generator().manual_seed(0)
    long = [rows[:3][torch.randint(0, 3, (200,), generator=generator)] + 0.1 * rows for rows in batches]
    mixed = torch.cat(long)
    mixed = mixed[torch.randperm(len(mixed), generator=generator)].split(200)
    layer = nn.Sequential(nn.Linear(256, 4))
    assert collect(layer, long, rank=8).provenance.stop_reason == "exhausted"
    assert collect(layer, list(mixed), rank=8).provenance.n_batches < 20


@pytest.mark.parametrize("times", [2, 4])  # of eight times the same there is nothing else to be seen
def test_repeated_rows_are_not_enough(times):
    """Both halves have the same rows, and agree; the next rows are captured worse than those."""
    batches, unseen = spread_rows(25, 20)
    stats = collect(nn.Sequential(nn.Linear(256, 4)), [rows for rows in batches for _ in range(times)], rank=8,
                    max_batches=400)  # fmt: skip
    assert stats.provenance.n_batches > 24
    assert share_kept(stats, unseen) > 0.95


def test_reads_no_more_batches_than_it_may():
    drawn = []

    def stream():
        for batch in low_rank_inputs(10):
            drawn.append(1)
            yield batch

    collect(two_layers(), stream(), rank=2, max_batches=3)
    assert len(drawn) == 3


def test_the_same_seed_gives_the_same_bits():
    a, b = (collect(tiny_same(), batches_for("llama"), rank=4, seed=3) for _ in range(2))
    assert all(torch.equal(a[name].components, b[name].components) for name in a)


def tiny_same():
    torch.manual_seed(5)
    return tiny_llama()


def test_layers_of_one_group_do_not_share_storage():
    stats = collect(tiny_llama(), batches_for("llama"), rank=2)
    q, k = stats[Q], stats[Q.replace("q_proj", "k_proj")]
    assert torch.equal(q.components, k.components)
    q.components.zero_()
    assert k.components.abs().sum() > 0
    assert stats[Q].components.abs().sum() > 0


def test_the_model_is_as_before_also_after_an_exception():
    model, batches = tiny_llama().train(), batches_for("llama")
    weights = copy.deepcopy(model.state_dict())
    batches[2]["attention_mask"] = torch.zeros(4, 11)
    with pytest.raises(LoraInitError, match=r"^batch 2: attention_mask has shape \(4, 11\)"):
        collect(model, batches, rank=2)
    assert model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("gradients", [False, True])
def test_a_batch_of_which_nothing_counts_is_passed_over(gradients):
    batches = batches_for("llama", 4)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batches[2]["labels"][:] = -100
    model, options = tiny_llama(), dict(token_mask="labels", rank=2, gradients=gradients)
    stats, others = (collect(model, some, **options) for some in (batches, [*batches[:2], batches[3]]))
    assert stats.provenance.n_batches == 4 and stats.provenance.n_samples == others.provenance.n_samples
    assert all(torch.equal(stats[name].components, others[name].components) for name in others)
    (note,) = stats.provenance.notes
    assert note.startswith("1 of 4 batches were passed over. batch 2: the mask keeps 0 of 48 tokens")
    with pytest.raises(LoraInitError, match=r"^batch 0: the mask keeps 0 of"):
        collect(tiny_llama(), [batches[2]] * 2, **options)


def test_nan_is_reported_with_layer_count_and_row():
    model, batches = two_layers(), low_rank_inputs(3)
    batches[1][17:20] = float("nan")
    with pytest.raises(LoraInitError, match=r"batch 1: layer '0': 3 of 64 rows contain NaN or inf \(first at row 17\)"):
        collect(model, batches, rank=2)


def test_padding_may_hold_nan():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(24, 2)

        def forward(self, x, attention_mask):
            return self.q(x.masked_fill(attention_mask[..., None] == 0, float("nan")))

    mask = torch.ones(4, 16).long()
    mask[:, 12:] = 0
    batches = [{"x": rows.view(4, 16, 24), "attention_mask": mask} for rows in low_rank_inputs(3)]
    stats = collect(Embedded(), batches, rank=2)
    assert stats["q"].n_samples == 3 * 4 * 12


def test_interrupted_keeps_the_batches_that_were_complete():
    def stream():
        yield from low_rank_inputs(3)
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        collect(two_layers(), stream(), rank=2)
    stats = caught.value.statistics
    assert (stats.provenance.stop_reason, stats.provenance.n_batches) == ("interrupted", 3)
    expected = collect(two_layers(), low_rank_inputs(3), rank=2)
    assert principal_angles(stats["0"].components, expected["0"].components).max() < 1e-5

    def at_once():
        raise KeyboardInterrupt
        yield

    with pytest.raises(Interrupted) as caught:
        collect(two_layers(), at_once(), rank=2)
    assert caught.value.statistics is None


@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_that_first_ran_in_an_interrupted_batch_is_as_if_it_never_ran(gradients):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late, self.n = nn.Linear(24, 24), nn.Linear(24, 2), 0

        def forward(self, x):
            self.n += 1
            y = self.early(x)
            if self.n < 3:
                return y
            self.late(y)
            raise KeyboardInterrupt

    loss = {"gradients": True, "loss": lambda output, batch: output.square().mean()} if gradients else {}
    with pytest.raises(Interrupted) as caught:
        collect(Late(), low_rank_inputs(5), rank=2, **loss)
    stats = caught.value.statistics
    assert list(stats) == ["early"] and stats.provenance.n_batches == 2
    assert stats.provenance.notes == ["late: never ran; PEFT's own initialisation."]


def test_layers_that_never_run_are_said_and_those_that_run_twice_count_twice():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never = nn.Linear(24, 24), nn.Linear(24, 2)

        def forward(self, x):
            return self.twice(self.twice(x))

    stats = collect(Odd(), low_rank_inputs(3), rank=2)
    assert list(stats) == ["twice"]
    assert stats.unsupported == {"never": "Linear"}
    assert stats["twice"].n_samples == 3 * 64 * 2
    assert "never: never ran; PEFT's own initialisation." in stats.provenance.notes


def test_fewer_rows_than_components_are_used_and_said():
    stats = collect(two_layers(), [torch.randn(5, 24)], rank=8)
    assert stats["0"].n_components == 4
    assert any("0: 5 rows span only 4 of 16 components" in note for note in stats.provenance.notes)
    assert math.isnan(stats.held_out["0"])


def test_mistakes_get_one_clear_line():
    model = two_layers()
    for settings in (
        {"rank": "8"},
        {"rank": 2.5},
        {"rho": math.inf},
        {"tolerance": math.nan},
        {"seed": "a"},
        {"seed": 2**70},
    ):
        ((name, value),) = settings.items()
        with pytest.raises(LoraInitError, match=f"^{name}={value!r}, expected a (whole )?number of at least"):
            collect(model, low_rank_inputs(2), **{"rank": 2, **settings})
    with pytest.raises(LoraInitError, match="center='no', expected True or False"):
        collect(model, low_rank_inputs(2), rank=2, center="no")
    with pytest.raises(LoraInitError, match="the data is empty"):
        collect(model, [], rank=2)
    with pytest.raises(LoraInitError, match="no targeted layer received rows in 2 batches"):
        collect(model, [torch.randn(0, 24)] * 2, rank=2)
    with pytest.raises(LoraInitError, match=r"a list of 'input_ids', expected a tensor.*return_tensors='pt'"):
        collect(tiny_llama(), [{"input_ids": [[3, 4, 5]]}], rank=2)
    with pytest.raises(LoraInitError, match=r"a PeftModel with an adapter.* give collect the plain model"):
        collect(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), batches_for("llama"), rank=2)
    with pytest.raises(LoraInitError, match="rank=0"):
        collect(model, low_rank_inputs(2), rank=0)
    with pytest.raises(LoraInitError, match=r"rho=0\.5"):
        collect(model, low_rank_inputs(2), rho=0.5)
    with pytest.raises(LoraInitError, match="layer '0': rank=25 is larger than its input width 24"):
        collect(model, low_rank_inputs(2), rank=25)
    with pytest.raises(LoraInitError, match="max_batches=0"):
        collect(model, low_rank_inputs(2), rank=2, max_batches=0)

    def exhausted(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    with pytest.raises(LoraInitError, match=r"out of memory\. Use a smaller batch"):
        collect(model, low_rank_inputs(2), rank=2, forward=exhausted)


def test_what_can_be_refused_is_refused_before_any_batch_is_read():
    def stream():
        pytest.fail("a batch was read")
        yield

    convolution = nn.Sequential(nn.Conv2d(2, 4, 3))
    for model, options in ((two_layers(), {"token_mask": "all"}), (convolution, {"gradients": True})):
        with pytest.raises(LoraInitError, match=r"token_mask='all'|gradient statistics are for linear layers"):
            collect(model, stream(), [name for name, _ in model.named_children()][:1], rank=2, **options)


def test_somebody_elses_error_is_passed_on():
    def broken(model, batch):
        raise RuntimeError("broken inside")

    with pytest.raises(RuntimeError, match="broken inside"):
        collect(two_layers(), low_rank_inputs(2), rank=2, forward=broken)


def test_the_progress_bar_is_quiet_unless_asked(capsys):
    collect(two_layers(), low_rank_inputs(3), rank=2)
    assert capsys.readouterr().err == ""
    collect(two_layers(), low_rank_inputs(9), rank=2, progress=True)
    assert "the start would keep" in capsys.readouterr().err


def test_time_is_accounted_for():
    seconds = collect(tiny_llama(), batches_for("llama"), rank=2).provenance.seconds
    assert set(seconds) == {"forward", "decomposition", "data"}
    assert seconds["forward"] > 0 < seconds["decomposition"]


def test_fingerprints_tell_models_apart_but_not_precisions():
    model = tiny_same()
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).to(torch.bfloat16))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0
    assert fingerprint(model) != fingerprint(other)
    assert fingerprint(tiny_llama(num_hidden_layers=1)) != fingerprint(tiny_llama())


def test_tied_weights_count_once():
    tied, free = tiny_llama(tie_word_embeddings=True), tiny_llama()
    assert count_parameters(free) - count_parameters(tied) == 64 * 32


class OfUnknownLength(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from low_rank_inputs(3)


def test_a_loader_over_data_without_a_length():
    loader = torch.utils.data.DataLoader(OfUnknownLength(), batch_size=None)
    assert collect(two_layers(), loader, rank=3).provenance.n_batches == 3


# What once gave other rows than those that were read


class Attention(nn.Module):
    """Self-attention or, with `mem`, cross-attention."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mem=None):
        return self.q(x) + self.k(x if mem is None else mem)


def test_layers_that_read_the_same_in_some_batches_only():
    alone, with_memory = {"x": torch.randn(4, 8)}, {"x": torch.randn(4, 8), "mem": 100 + torch.randn(4, 8)}
    with pytest.raises(LoraInitError, match=r"batch 1: layers 'q' and 'k' read the same tensor in batches before"):
        collect(Attention(), [alone, with_memory], rank=2)
    stats = collect(Attention(), [with_memory, alone], rank=2)
    torch.testing.assert_close(stats["q"].mean, torch.cat([with_memory["x"], alone["x"]]).mean(0))
    torch.testing.assert_close(stats["k"].mean, torch.cat([with_memory["mem"], alone["x"]]).mean(0))


def test_a_forward_of_the_callers_may_run_the_model_twice():
    batches = [{"chosen": torch.randint(3, 60, (4, 6)), "rejected": torch.randint(3, 60, (4, 6))}]
    stats = collect(
        tiny_llama(),
        batches,
        rank=2,
        forward=lambda model, b: [model(input_ids=b[name]) for name in ("chosen", "rejected")],
    )
    assert {spectrum.n_samples for spectrum in stats.values()} == {48}


def test_labels_are_left_to_a_model_that_is_not_of_transformers():
    class Guided(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(9, 8), nn.Linear(8, 8)

        def forward(self, x, labels):
            return self.layer(x + self.embed(labels))

    model, batch = Guided(), {"x": torch.randn(5, 8), "labels": torch.arange(5)}
    stats = collect(model, [batch], ["layer"], rank=2)
    torch.testing.assert_close(stats["layer"].mean, (batch["x"] + model.embed(batch["labels"])).mean(0))


def test_a_tensor_of_inference_mode_that_is_changed_in_place_is_another():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        @torch.inference_mode()
        def forward(self, x):
            h = x * 1
            return self.a(h) + self.b(h.mul_(3))

    x = torch.randn(6, 8)
    stats = collect(InPlace(), [x], rank=2)
    torch.testing.assert_close(stats["b"].mean, 3 * stats["a"].mean)


def test_padding_that_torchs_encoder_leaves_out_does_not_count():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(4, 10, 16), torch.arange(10) >= torch.tensor([[5], [6], [7], [8]])
    stats = collect(model, [(x, padding)], rank=2, forward=lambda model, b: model(b[0], src_key_padding_mask=b[1]))
    assert {spectrum.n_samples for spectrum in stats.values()} == {26}
