"""`collect`: the pass over the data, its stopping, and what it says about itself."""

import copy
import math
import platform
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_init
from lora_init import LoraInitError, collect, find_targets
from lora_init.collection.collect import check_targets
from lora_init.layers.identity import fingerprint, model_config
from tests import reference
from tests.collection.made import all_rows, low_rank_inputs, two_layers
from tests.conftest import MODELS, batches_for, refused, tiny_llama

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_works_on_every_architecture(name):
    model = MODELS[name]()
    stats = collect(model, batches_for(name), rank=2)
    assert stats.provenance.stop_reason == "exhausted"
    assert stats.provenance.n_batches == 4
    seconds = stats.provenance.seconds.values()
    assert sum(seconds) > 0 and all(round(value, 3) == value for value in seconds)
    for layer, spectrum in stats.items():
        assert spectrum.components.shape == (4, stats.targets[layer].in_features)
        torch.testing.assert_close(spectrum.components @ spectrum.components.T, torch.eye(4), atol=1e-5, rtol=0)
        assert 0 < float(spectrum.explained_variance_ratio.sum()) <= 1.0 + 1e-6
        assert 0 <= stats.held_out[stats.group_of[layer]] <= 1.0


@pytest.mark.parametrize(("name", "given", "task"), [
    ("bert", None, "SEQ_CLS"), ("bert", "FEATURE_EXTRACTION", "FEATURE_EXTRACTION"), ("llama", None, None),
])  # fmt: skip
def test_a_classifier_is_told_by_its_class_unless_the_task_is_given(name, given, task):
    model = copy.deepcopy(MODELS[name]())
    stats = collect(model, batches_for(name), rank=2, max_batches=1, task_type=given)
    assert stats.provenance.task_type == task


def test_the_output_embedding_is_a_target_like_any_other():
    assert "lm_head" in collect(tiny_llama(), batches_for("llama"), ["lm_head", "q_proj"], rank=2)


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


def test_the_same_seed_gives_the_same_bits():
    a, b = (collect(tiny_same(), batches_for("llama"), rank=4, seed=3) for _ in range(2))
    assert all(torch.equal(a[name].components, b[name].components) for name in a)


def tiny_same():
    torch.manual_seed(5)
    return tiny_llama()


def test_the_model_is_as_before_also_after_an_exception():
    model, batches = tiny_llama().train(), batches_for("llama")
    weights = copy.deepcopy(model.state_dict())
    batches[2]["attention_mask"] = torch.zeros(4, 11)
    refused(r"^batch 2: attention_mask has shape \(4, 11\)", collect, model, batches, rank=2)
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
    assert stats.sizes == others.sizes and stats.provenance.n_labels == others.provenance.n_labels
    assert all(torch.equal(stats[name].components, others[name].components) for name in others)
    (note,) = stats.provenance.notes
    assert note.startswith("1 of 4 batches were passed over. batch 2: the mask keeps 0 of 48 tokens")
    refused(r"^batch 0: the mask keeps 0 of", collect, tiny_llama(), [batches[2]] * 2, **options)


def test_of_batches_that_add_nothing_the_first_reason_is_told():
    """Of those of which nothing counts, and of those that fail; each names its batch once."""
    batches = batches_for("llama", 6)
    for empty in (1, 3):
        batches[empty]["attention_mask"] = torch.zeros(4, 12).long()
    for bad in (2, 4):
        batches[bad]["input_ids"] = torch.full((4, 12), 99)
    passed, failed = collect(tiny_llama(), batches, rank=2, skip_bad_batches=2).provenance.notes
    assert passed.startswith("2 of 6 batches were passed over. batch 1: the mask keeps 0 of 48 tokens")
    assert failed.startswith("2 of 6 batches failed and were left out. batch 2: index out of range")


@pytest.mark.parametrize(("rank", "rho", "kept"), [
    (7, 1.1, 8), (3, 1.1, 3), (3, 1.5, 4), (5, 1.5, 8), (11, 2.0, 22), (12, 2.0, 24), (16, 2.0, 24),
])  # fmt: skip
def test_components_are_rho_times_the_rank_to_the_nearest_number_and_no_more_than_the_width(rank, rho, kept):
    rows = [torch.randn(64, 24) for _ in range(2)]
    assert collect(nn.Sequential(nn.Linear(24, 4)), rows, rank=rank, rho=rho)["0"].n_components == kept


def test_nan_is_reported_with_layer_count_and_row():
    model, batches = two_layers(), low_rank_inputs(3)
    batches[1][17:20] = float("nan")
    refused(r"batch 1: layer '0': 3 of 64 rows contain NaN or inf \(first at row 17\)", collect, model, batches, rank=2)


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


def test_layers_that_never_run_are_said_and_those_that_run_twice_count_twice():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.never, self.nor = nn.Linear(24, 24), nn.Linear(24, 2), nn.Linear(24, 2)

        def forward(self, x):
            return self.twice(self.twice(x))

    stats = collect(Odd(), low_rank_inputs(3), rank=2)
    assert list(stats) == ["twice"]
    assert stats.unsupported == {"never": "Linear", "nor": "Linear"}
    assert stats["twice"].n_samples == 3 * 64 * 2
    assert stats.provenance.notes == ["never and 1 other layer: never ran; PEFT's own initialization."]


def test_layers_with_few_directions_are_one_note():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other, self.narrow = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(8, 2)

        def forward(self, x):
            return self.one(x), self.other(x * torch.arange(24).lt(6)), self.narrow(x[..., :8] * 0 + x[..., :1])

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 3, 24, generator=generator) for _ in range(4)]
    notes = collect(Two(), batches, rank=8).provenance.notes
    assert notes == [
        "one and 1 other layer: 12 rows span only 6 to 11 of 16 components.",
        "narrow: 12 rows span only 1 of 8 components.",
    ]


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
    for name in ("center", "gradients", "overwrite"):
        refused(f"^{name}='no', expected True or False", collect, model, low_rank_inputs(2), rank=2, **{name: "no"})
    refused("^skip_bad_batches=-1, expected a ", collect, model, low_rank_inputs(2), rank=2, skip_bad_batches=-1)
    refused(f"^seed={-(2**63) - 1}, expected a ", collect, model, low_rank_inputs(2), rank=2, seed=-(2**63) - 1)
    assert collect(model, low_rank_inputs(2), rank=2, seed=-(2**63)).provenance.seed == -(2**63)
    said = "^loss= is for gradients=True; without gradients no loss is computed.$"
    refused(said, collect, model, low_rank_inputs(2), rank=2, loss=lambda output, batch: output.sum())
    refused("the data is empty", collect, model, [], rank=2)
    refused("no targeted layer received rows in 2 batches", collect, model, [torch.randn(0, 24)] * 2, rank=2)
    with pytest.raises(LoraInitError, match=r"a list of 'input_ids', expected a tensor.*return_tensors='pt'"):
        collect(tiny_llama(), [{"input_ids": [[3, 4, 5]]}], rank=2)
    with pytest.raises(LoraInitError, match=r"a PeftModel with an adapter.*Give it the plain model"):
        collect(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), batches_for("llama"), rank=2)
    refused("rank=0", collect, model, low_rank_inputs(2), rank=0)
    refused(r"rho=0\.5", collect, model, low_rank_inputs(2), rho=0.5)
    refused("layer '0': rank=25 is larger than its input width 24", collect, model, low_rank_inputs(2), rank=25)
    refused("max_batches=0", collect, model, low_rank_inputs(2), rank=2, max_batches=0)
    with pytest.raises(LoraInitError, match=r"forward= takes \(model\), and is called with \(model, batch\)"):
        collect(model, low_rank_inputs(2), rank=2, forward=lambda model: 0)
    with pytest.raises(LoraInitError, match=r"loss= is 'mse', expected a function of \(output, batch\)"):
        collect(model, low_rank_inputs(2), rank=2, gradients=True, loss="mse")
    refused("collect got a list for the batches", collect, model, [1, 2], rank=2)
    refused(r"collect got a str for the model, expected a torch.nn.Module\. Load it first", collect, "gpt2", [], rank=2)
    with pytest.raises(LoraInitError, match=r"^batch 0: index out of range in self"):
        collect(tiny_llama(), [{"input_ids": torch.full((1, 4), 9999)}], rank=2)

    def exhausted(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    refused(r"out of memory\. Use a smaller batch", collect, model, low_rank_inputs(2), rank=2, forward=exhausted)


def test_a_task_that_peft_does_not_have_is_refused():
    said = refused("task type", collect, tiny_llama(), batches_for("llama"), rank=2, task_type="CAUSAL")
    assert said.startswith("task type 'CAUSAL' is unknown. Did you mean CAUSAL_LM? Choose from ")


def test_what_a_pass_says_of_itself():
    """All of its record but hashes and times; what was given as a set or a tuple is a sorted list."""
    model, batches = tiny_llama(), batches_for("llama", n_batches=3)
    model.config.name_or_path = "some/model"
    made = collect(
        model, batches, ("v_proj", "q_proj"), exclude_modules=("up_proj", "layers.1.self_attn.v_proj"),
        task_type="CAUSAL_LM", rank=3, rho=1.5, center=False, token_mask="labels", max_batches=np.int64(2),
        tolerance=0.5, seed=7, data="rows", skip_bad_batches=1,
    ).provenance  # fmt: skip
    found = asdict(made)
    n_rows = sum(int((batch["labels"] != -100).sum()) for batch in batches[:2])
    settings = found.pop("settings")
    assert found.pop("seconds").keys() == {"forward", "decomposition", "data"} and 0 < found.pop("keeps") <= 1
    assert found.pop("versions") == {
        "lora_init": lora_init.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    assert found == dict(
        model_id="some/model", model_class="LlamaForCausalLM", fingerprint=fingerprint(model),
        target_modules=["q_proj", "v_proj"], target_parameters=None, n_parameters=model.num_parameters(), n_linear=14,
        exclude_modules=["layers.1.self_attn.v_proj", "up_proj"], task_type="CAUSAL_LM", data="rows", center=False,
        token_mask="labels", seed=7, rank=3, n_batches=2, n_samples=n_rows, stop_reason="max_batches", notes=[],
        gradients=False, n_labels=0, complete=True, quantisation=None,
    )  # fmt: skip
    for name in ("first_batch", "batches", "layers"):
        assert isinstance(settings.pop(name), str)
    assert {name: value for name, value in settings.items() if not name.startswith("config")} == dict(
        dtype="float32", heads=[], rho=1.5, max_batches=2, tolerance=0.5, forward=None, common_loader=False, used=[2],
        bad_batches=0,
    )  # fmt: skip
    assert model_config(model).items() <= settings.items()


class Squares:
    def __call__(self, output, batch):
        return output.square().mean()


def test_a_pass_without_a_description_says_nothing_of_its_data():
    for data in ("", None):
        assert collect(two_layers(), low_rank_inputs(1), rank=2, data=data).provenance.data == ""


def test_rows_of_a_pass_are_those_of_the_layer_that_read_most():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.first = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            return self.first(self.all(x)[:8])

    stats = collect(Pooled(), low_rank_inputs(3), rank=2)
    assert (stats["all"].n_samples, stats["first"].n_samples, stats.provenance.n_samples) == (192, 24, 192)


class Pair(nn.Linear):
    """A layer that returns more than what it computes."""

    def forward(self, x):
        return super().forward(x), x


def test_a_layer_whose_output_is_no_tensor_has_no_size_of_it():
    model = nn.Sequential(Pair(24, 24), nn.Linear(24, 4))
    stats = collect(model, low_rank_inputs(2), rank=2, forward=lambda model, batch: model[1](model[0](batch)[0]))
    assert list(stats) == ["0", "1"] and list(stats.sizes) == ["1"]


def test_a_layer_that_runs_in_some_batches_only_holds_no_other_up():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.all = nn.Linear(24, 2), nn.Linear(24, 2)

        def forward(self, x):
            n.append(1)
            odd = self.odd(x) if len(n) % 2 else 0.0
            return self.all(x * 1.0) + odd

    n = []
    stats = collect(Odd(), low_rank_inputs(6), rank=2)
    assert (stats["odd"].n_samples, stats["all"].n_samples) == (3 * 64, 6 * 64)
    assert set(stats.held_out) == {"odd", "all"} and not any(map(math.isnan, stats.held_out.values()))


@pytest.mark.parametrize("rho", [1.0, 3.0])
def test_gradients_have_two_triplets_a_rank_at_least(rho):
    asked = dict(rank=3, rho=rho, gradients=True, loss=lambda output, batch: output.square().mean())
    stats = collect(nn.Sequential(nn.Linear(24, 24)), [torch.randn(64, 24) for _ in range(4)], **asked)
    assert stats["0"].components.shape[0] == 3 * rho
    assert len(stats.gradient("0").singular_values) == max(6, 3 * rho)


def test_functions_are_known_by_their_names_and_layers_by_a_hash():
    def named(model, batch):
        return model(batch)

    batches = low_rank_inputs(2)

    def settings(model, targets="all-linear", **options):
        return collect(model, batches, targets, rank=2, **options).provenance.settings

    made = settings(two_layers(), forward=named, gradients=True, loss=Squares())
    assert made["forward"].endswith("<locals>.named") and made["loss"] == "Squares"
    both = settings(two_layers())
    assert "loss" not in both and both["forward"] is None and both["layers"] == made["layers"]
    assert re.fullmatch(r"2 \([0-9a-f]{8}\)", both["layers"])
    wide = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))
    odd = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4), nn.Embedding(3, 2))
    found = [both["layers"], settings(wide)["layers"], settings(two_layers(), ["0"])["layers"]]
    found.append(settings(odd, ["0", "2", "3"], forward=lambda model, batch: model[:3](batch))["layers"])
    assert len({*found}) == 4 and [text[0] for text in found] == list("2212")


def test_layers_that_no_rank_fits_are_counted():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 4))
    words = (
        r"^layer '0': rank=4 is larger than its input width 3 \(2 such layers\). Use a smaller rank, or exclude them.$"
    )
    refused(words, check_targets, model, find_targets(model), 4)
    check_targets(model, find_targets(model), 2)
    model[0].weight.full_tensor = lambda: None
    words = "^Sequential is split by tensor parallelism: in each process a layer reads only a part of its input."
    refused(words, check_targets, model, find_targets(model), 2)


def test_statistics_of_one_batch_know_no_halves():
    made = collect(two_layers(), low_rank_inputs(1), rank=2).provenance
    assert made.keeps is None and (made.n_batches, made.n_samples, made.stop_reason) == (1, 64, "exhausted")
    assert made.settings["max_batches"] == 64 and made.settings["tolerance"] == 0.05 and made.rho == 2.0


# What once gave other rows than those that were read


class Attention(nn.Module):
    """Self-attention or, with `mem`, cross-attention."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, mem=None):
        return self.q(x) + self.k(x if mem is None else mem)


def test_a_forward_of_the_callers_may_run_the_model_twice():
    batches = [{"chosen": torch.randint(3, 60, (4, 6)), "rejected": torch.randint(3, 60, (4, 6))}]
    stats = collect(
        tiny_llama(),
        batches,
        rank=2,
        forward=lambda model, b: [model(input_ids=b[name]) for name in ("chosen", "rejected")],
    )
    assert {spectrum.n_samples for spectrum in stats.values()} == {48}
