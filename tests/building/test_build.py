"""From statistics and ranks to an adapter: which ranks there are, and what is refused, before any data is read."""

import math
import re
import runpy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_init
from lora_init import LoraInitError, allocate_ranks, build_adapter, collect
from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.init_config import Shape
from lora_init.building.build import buildable_start, check_adapter_options, check_experts, rank_with_frozen_a
from lora_init.layers.targets import Target
from lora_init.planning.allocate import RankAllocation
from lora_init.starts.initializers import as_large_as_random, error_seen
from lora_init.statistics.spectrum import Spectrum
from tests.adapters.made import TASKS, logits, lora_layers, made_up_statistics
from tests.conftest import MODELS, batches_for, refused, tiny_llama

peft = pytest.importorskip("peft")


def energies_of(stats, init, rows):
    """Mean of |A x|^2 over the very rows that the statistics are of, by layer."""
    return {name: float((rows[name] @ init.weights[name].a.double().T).square().sum(1).mean()) for name in stats}


@pytest.mark.parametrize("method", ["eva", "orthogonal", "eva-grad", "natural-gradient"])
@pytest.mark.parametrize("center", [True, False])
def test_a_lets_as_much_through_in_each_layer_as_random_does(method, center):
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 5)).double()
    data = torch.randn(256, 12).double() * torch.logspace(0, -3, 12) + 2.0
    loss = dict(forward=lambda model, x: model(x), loss=lambda y, x: y.square().mean(), gradients=True)
    stats = collect(model, [data[:128], data[128:]], rank=4, center=center, **loss)
    rows = {"0": data, "2": model[1](model[0](data)).detach()}
    wanted = {name: 4 / 3 * float(x.square().sum(1).mean()) / x.shape[1] for name, x in rows.items()}
    of_random = [energies_of(stats, build_adapter(stats, 4, "random", seed=seed), rows) for seed in range(300)]
    for name, energy in energies_of(stats, build_adapter(stats, 4, method), rows).items():
        # What is outside of 8 components is taken to be isotropic; 300 draws of random have their error.
        assert energy == pytest.approx(wanted[name], rel=0.02)
        assert sum(one[name] for one in of_random) / 300 == pytest.approx(wanted[name], rel=0.15)
    unit = build_adapter(stats, 4, method, unit_rows=True)
    for own in unit.weights.values():
        assert torch.allclose(own.a @ own.a.T, torch.eye(4), atol=1e-5)
    assert unit.unit_rows and not build_adapter(stats, 4, method).unit_rows


def test_a_is_sized_by_what_the_layer_reads_and_not_by_its_variance_alone():
    mean = torch.tensor([0.0, 30.0, 0.0, 0.0])
    far = Spectrum(torch.eye(4)[:2], torch.tensor([4.0, 1.0]).double(), 5.0, mean, 50)
    rows = torch.eye(4)[:2]  # the second one reads the mean: |A x|^2 is 4 + 1 + 30^2 at size 1
    size = float(as_large_as_random(far, rows)[0, 0])
    assert size**2 * 905 == pytest.approx(2 / 12 * 905, rel=1e-4)


def test_a_in_directions_without_variance_stays_of_a_bounded_length():
    flat = Spectrum(torch.eye(6)[:2], torch.tensor([4.0, 1.0]).double(), 5.0 + 1e-12, torch.zeros(6), 50)
    sized = as_large_as_random(flat, torch.eye(6)[4:])  # the data has next to nothing there
    assert float(sized.norm()) == pytest.approx(10 * (2 / 3) ** 0.5, rel=1e-4)
    assert torch.equal(as_large_as_random(flat, torch.zeros(2, 6)), torch.zeros(2, 6))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(method="pissa"), "method='pissa' is unknown. Choose from eva, random, random-scaled, gaussian, orth"),
    (dict(method="random", whiten=True), "whiten=True is for the start eva"),
    (dict(method="gaussian", unit_rows=True), "unit_rows=True with method='gaussian': its rows have a size"),
    (dict(method="eva", errors={}), "errors= with method='eva': it corrects no base"),
    (dict(lora_alpha=0), "lora_alpha=0, expected a number above 0"),
    (dict(lora_alpha=float("nan")), "lora_alpha=nan, expected a number above 0"),
    (dict(lora_dropout=1.0), "lora_dropout=1.0 must be"),
    (dict(ranks=-1), "ranks=-1, expected a whole number"),
    (dict(ranks=2.5), "ranks=2.5, expected a whole number"),
    (dict(ranks=True), "ranks=True, expected a whole number"),
    (dict(ranks=0), "all 14 layers have rank 0"),
    (dict(ranks={"model.layers.0.self_attn.qproj": 2}), "'model.layers.0.self_attn.qproj'.*Closest.*q_proj'"),
    (dict(ranks={"model.layers.0.self_attn.q_proj": 33}), "q_proj': rank 33 is larger than its input width 32"),
    (dict(ranks={"model.layers.0.self_attn.q_proj": 9}), "q_proj': rank 9 needs 9 components.*hold 8"),
    (dict(ranks={"model.layers.0.self_attn.q_proj": "4"}), "q_proj': rank='4', expected a whole number of at least 0"),
    (dict(ranks={}), "all 14 layers have rank 0"),
])  # fmt: skip
def test_impossible_requests_are_refused(arguments, message):
    stats = made_up_statistics(tiny_llama())
    refused(message, build_adapter, stats, **{"ranks": 4} | arguments)


def test_what_can_be_known_before_the_pass_is_refused_before_it(tmp_path):
    def unread():
        raise AssertionError("a batch was read")
        yield

    for arguments, message in (
        (dict(method="pisa"), "method='pisa' is unknown"),
        (dict(method="eva_grad"), "Did you mean eva-grad"),
        (dict(gamma=2.0), "gamma=2.0 with method='eva'"),
        (dict(method="lora-one", gamma=0.0), "gamma=0.0"),
        (dict(method="random", whiten=True), "whiten=True"),
        (dict(lora_alpha=float("inf")), "lora_alpha=inf"),
        (dict(lora_dropout=-0.1), "lora_dropout=-0.1"),
        (dict(modules_to_save="lm_head"), "modules_to_save='lm_head', expected a list of texts"),
        (dict(modules_to_save=["lm_haed"]), "'lm_haed' is no module of LlamaForCausalLM. Closest: lm_head"),
    ):
        refused(message, lora_init.initialize, tiny_llama(), unread(), **arguments)
        if "modules_to_save" not in arguments or isinstance(arguments["modules_to_save"], str):
            with pytest.raises(LoraInitError, match=message):
                start = buildable_start(arguments.get("method", "eva"))
                check_adapter_options(start, Shape(**{k: v for k, v in arguments.items() if k != "method"}))
    build_adapter(made_up_statistics(tiny_llama()), 2).save_pretrained(tmp_path / "there")
    eva = buildable_start("eva")
    with pytest.raises(LoraInitError, match=r"there exists and is not empty.*overwrite=True"):
        check_adapter_options(eva, Shape(), output=tmp_path / "there")
    check_adapter_options(eva, Shape(), output=tmp_path / "there", overwrite=True)
    (tmp_path / "there" / "thesis.tex").write_text("x")
    with pytest.raises(LoraInitError, match=r"holds more than an adapter \(thesis.tex\)"):
        check_adapter_options(eva, Shape(), output=tmp_path / "there", overwrite=True)
    check_adapter_options(eva, Shape(), output=tmp_path / "new")


def test_a_frozen_a_leaves_its_parameters_to_b():
    stats = made_up_statistics(tiny_llama(), k=20)
    rank = rank_with_frozen_a(stats.targets.values(), 4)
    both, frozen = build_adapter(stats, 4), build_adapter(stats, rank, freeze_a=True)
    assert both.n_parameters() - build_adapter(stats, 1, freeze_a=True).n_parameters() < frozen.n_parameters()
    assert frozen.n_parameters() <= both.n_parameters()


def test_fewer_directions_than_rank_give_the_rank_that_there_is():
    """One rule for ten rows and for one: what there is, with a warning, and an error only where there is nothing."""
    stats = made_up_statistics(tiny_llama(), k=3, n_samples=4)
    with pytest.warns(UserWarning, match=r"14 of 14 layers get fewer ranks than asked for.*3 of 4.*More data"):
        init = build_adapter(stats, 4)
    assert set(init.ranks.values()) == {3} and init.scaling == 8 / 4
    assert {layer.scaling["default"] for layer in lora_layers(init.apply(tiny_llama())).values()} == {2.0}
    model = nn.Sequential(nn.Linear(8, 8))
    for n_rows, expected in ((10, 4), (3, 2), (2, 1)):
        stats = collect(model, [torch.randn(n_rows, 8)], rank=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert build_adapter(stats, 4).ranks == {"0": expected}
        assert len(caught) == (expected < 4)
    gradients = dict(gradients=True, loss=lambda output, batch: output.square().sum())
    stats = collect(model, [torch.randn(2, 8)], rank=4, **gradients)
    for method in ("eva-grad", "grad-a", "lora-one", "natural-gradient"):  # as many as there were rows
        with pytest.warns(UserWarning, match="fewer ranks"):
            assert build_adapter(stats, 4, method).ranks == {"0": 2}
    refused("no direction in any layer", build_adapter, collect(model, [torch.randn(1, 8)], rank=4), 4)
    assert build_adapter(collect(model, [torch.randn(1, 8)], rank=4), 4, "random").ranks == {"0": 4}


def test_fewer_directions_than_rank_leave_a_multiple_of_a_convolutions_groups():
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2))
    stats = collect(model, [torch.randn(1, 4, 6)], ["0"], rank=4)
    with pytest.warns(UserWarning, match=r"2 of 4"):
        init = build_adapter(stats, 4)
    assert stats["0"].n_components == 3 and init.ranks == {"0": 2}
    lora_layers(init.apply(model))["0"](torch.randn(1, 4, 6))


def test_a_layer_whose_rows_are_all_alike_is_left_out_of_the_adapter():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight)
    stats = collect(model, [torch.randn(16, 4)], rank=4)
    with pytest.warns(UserWarning, match=r"^1 of 2 layers get fewer ranks .* \(first: '1', 0 of 4\)"):
        init = build_adapter(stats, 4)  # as many as the layer is wide
    assert init.ranks == {"0": 4} and init.left_out == ("1",) and init.rank == 4


def test_a_plan_for_another_model_is_refused():
    stats = made_up_statistics(nn.Sequential(nn.Linear(4, 4)), ["0"])
    one, other = (replace(stats, provenance=replace(stats.provenance, fingerprint=f)) for f in ("f1", "f2"))
    refused("the plan was made for .* another: ", build_adapter, other, allocate_ranks(one, rank=2))


def test_one_layer_alone_has_the_average_rank():
    init = build_adapter(made_up_statistics(nn.Sequential(nn.Linear(8, 4)), ["0"]), 3)
    assert (init.rank, init.lora_alpha) == (3, 6)


@pytest.mark.parametrize("thing", [tiny_llama, lambda: "stats.safetensors"])
def test_build_adapter_takes_statistics_first(thing):
    said = refused(r"^build_adapter\(\) takes statistics first and got a", build_adapter, thing(), 4)
    assert type(thing()).__name__ in said and "Statistics.load() reads a file" in said


def test_a_correction_needs_the_error_of_each_layer():
    stats = made_up_statistics(tiny_llama(), ["q_proj"])
    first, second = stats
    errors = {first: torch.randn(32, 32)}
    for given, missing in ((None, first), ({}, first), (errors, second)):
        words = (
            f"^layer '{missing}': start 'qera' corrects what quantization took from its weight. Pass errors=, such as"
        )
        refused(words, build_adapter, stats, 2, "qera", errors=given)
    wide = errors | {second: torch.randn(32, 48)}
    words = f"^layer '{second}': its error is {re.escape('[32, 48], expected [32, 32]')}, all finite"
    refused(words, build_adapter, stats, 2, "qera", errors=wide)


Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(("ranks", "expected", "rank"), [
    ({K: 2, Q: 4}, {Q: 4, K: 2}, 3),
    ({K: 3, Q: 4}, {Q: 4, K: 3}, 4),  # 3.5, rounded to the even one
    ({Q: 1, K: 0}, {Q: 1}, 1),  # 0.5
    (RankAllocation({Q: 1, K: 2}, 5), {Q: 1, K: 2}, 5),
    (RankAllocation({Q: 2, K: 2}, 0), {Q: 2, K: 2}, 2),
])  # fmt: skip
def test_the_scaling_is_relative_to_the_average_rank(ranks, expected, rank):
    stats = made_up_statistics(tiny_llama(), ["q_proj", "k_proj"])
    init = build_adapter(stats, ranks)
    assert [*init.ranks.items()] == [*expected.items()]
    assert (init.rank, init.lora_alpha, init.scaling) == (rank, 2.0 * rank, 2.0)
    assert init.left_out == tuple(name for name in stats if name not in expected)
    assert [*init.targets] == [*init.explained] == [*init.weights] == [*expected]
    # The made-up variances are 8, 7, ..., half of the whole variance.
    assert init.explained == pytest.approx({n: sum(range(8, 8 - r, -1)) / 72 for n, r in expected.items()})


def test_without_ranks_each_layer_has_the_one_that_the_statistics_are_for():
    init = build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), use_rslora=True)
    assert {*init.ranks.values()} == {4} and (init.rank, init.lora_alpha, init.scaling) == (4, 4.0, 2.0)
    assert (init.seed, init.gamma, init.dtype, init.errors, init.error_size) == (0, None, "float32", {}, 0.0)


def test_a_budget_in_megabytes_decides_the_type_that_is_saved(tmp_path):
    stats = made_up_statistics(tiny_llama(), ["q_proj"])
    ranks = allocate_ranks(stats, megabytes=0.002, dtype="float16")
    init = build_adapter(stats, ranks)
    path = init.save_pretrained(tmp_path / "adapter")
    assert init.dtype == "float16" and {of for _, of in AdapterDirectory(path).header.values()} == {"F16"}
    assert build_adapter(stats, allocate_ranks(stats, rank=2)).dtype == "float32"


@pytest.mark.parametrize(("rank", "instead"), [(1, 2), (3, 2), (5, 4)])
def test_a_rank_that_groups_do_not_divide_is_refused_with_the_next_one_below(rank, instead):
    stats = made_up_statistics(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), ["0"])
    words = (
        f"layer '0': rank {rank} is no multiple of its 2 groups, which PEFT needs. Give it {instead}, or exclude it."
    )
    assert refused(".", build_adapter, stats, rank) == words


def test_what_is_trained_whole_or_not_selected_has_no_adapter():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8)

    stats = made_up_statistics(Net(), ["a", "b", "table"])
    assert stats.unsupported == {"table": "Embedding"}
    for options, layers, unsupported in (
        ({}, ["a", "b"], {"table": "Embedding"}),
        (dict(modules_to_save=["table", "b"]), ["a"], {}),
        (dict(config=peft.LoraConfig(r=2, target_modules=["b"])), ["b"], {}),
        (dict(config=peft.LoraConfig(r=2, target_modules=["b", "table"])), ["b"], {"table": "Embedding"}),
        (dict(config=peft.LoraConfig(r=1, target_modules=["b"]), ranks={"a": 0, "b": 2}), ["b"], {}),
    ):
        init = build_adapter(stats, **{"ranks": 2} | options)
        assert ([*init.weights], init.unsupported) == (layers, unsupported)
        assert init.left_out == tuple(name for name in ("a", "b") if name not in layers)
        assert init.rank == (1 if "ranks" in options else 2)  # of two layers of which one has none


def test_a_layer_of_unknown_size_is_no_part_of_the_rate():
    stats = collect(tiny_llama(), batches_for("llama"), rank=4)
    _, *others = stats.sizes
    partly = replace(stats, sizes={name: stats.sizes[name] for name in others})
    assert [*build_adapter(partly, 4, "random").responses] == others


@pytest.mark.parametrize(("method", "given", "gamma"), [
    ("eva", None, None), ("lora-ga", None, 16.0), ("lora-one", None, 1024.0), ("lora-one", 2.0, 2.0),
])  # fmt: skip
def test_the_size_of_a_step_is_the_one_given_or_that_of_the_start(method, given, gamma):
    model = nn.Sequential(nn.Linear(12, 9)).double()
    loss = dict(forward=lambda model, x: model(x), loss=lambda y, x: y.square().mean(), gradients=True)
    stats = collect(model, [torch.randn(32, 12).double() for _ in range(2)], rank=4, **loss)
    assert build_adapter(stats, 2, method, gamma=given).gamma == gamma


def test_a_correction_says_how_far_the_errors_moved_the_output_before_and_after():
    stats = made_up_statistics(tiny_llama(), ["q_proj"])
    errors = {name: torch.randn(32, 32) for name in stats}
    init = build_adapter(stats, 2, "qera", errors=errors, lora_alpha=3)
    for name, (a, b) in init.weights.items():
        left = errors[name] - 1.5 * b @ a
        assert init.errors[name] == pytest.approx([error_seen(stats[name], one) for one in (errors[name], left)])
    assert [*init.errors] == [*stats]
    exact = build_adapter(stats, 2, "qera", errors={name: one.double() for name, one in errors.items()}, lora_alpha=3)
    assert [*exact.errors.values()] == [pytest.approx(moved, rel=1e-5) for moved in init.errors.values()]
    assert init.error_size == pytest.approx(float(sum(one.square().sum() for one in errors.values())) ** 0.5)


def target(name, kind="Parameter", experts=2):
    return Target(name, kind, 8, 8, experts=experts)


@pytest.mark.parametrize(("shape", "targets", "what"), [
    (Shape(use_dora=True), [target("x")], "use_dora=True"),
    (Shape(lora_dropout=0.1), [target("q", "Linear", 0), target("x"), target("y")], "lora_dropout=0.1"),
    (Shape(), [target("x"), target("c", "Conv1D", 0)], "transformers' Conv1D layers in the same adapter"),
    (Shape(use_rslora=True), [target("x"), target("q", "Linear", 0)], None),
    (Shape(use_dora=True, lora_dropout=0.1), [target("q", "Linear", 0), target("c", "Conv1D", 0)], None),
    (Shape(use_dora=True), [], None),
])  # fmt: skip
def test_what_peft_does_not_do_with_experts_is_refused(shape, targets, what):
    if what is None:
        check_experts(targets, shape)
    else:
        words = f"'x': PEFT does not adapt parameters with {what}. Leave out one of the two."
        assert refused(".", check_experts, targets, shape) == words


@pytest.mark.parametrize(("method", "shape", "words"), [
    ("lora-one", dict(unit_rows=True), "unit_rows=True with method='lora-one': its rows have a size of their own."),
    ("random", dict(unit_rows=True), "unit_rows=True with method='random': its rows have a size of their own."),
    ("lora-one", dict(gamma=math.inf), "gamma=inf with method='lora-one': it is a positive number, for 'natural-gra"),
    ("qera", dict(gamma=1.0),
     "gamma=1.0 with method='qera': it is a positive number, for 'natural-gradient-step', 'lora-ga', 'lora-one'."),
    ("orthogonal", dict(whiten=True), "whiten=True is for the start eva; method='orthogonal' has no variances to divi"),
    ("lora-ga", dict(use_dora=True), "method='lora-ga' starts with B other than zero, and DoRA's magnitudes are those"),
    ("eva", dict(lora_dropout=-0.1), "lora_dropout=-0.1 must be at least 0 and less than 1."),
    ("eva", dict(lora_alpha=0.0), "lora_alpha=0.0, expected a number above 0"),
    ("orthogonal", dict(unit_rows=True, lora_dropout=0.0, use_dora=True, lora_alpha=1e-3), None),
    ("eva", dict(whiten=True, lora_dropout=0.99), None),
    ("lora-ga", dict(gamma=1e-3), None),
])  # fmt: skip
def test_a_form_that_a_start_cannot_have_is_refused(method, shape, words):
    if words is None:
        check_adapter_options(buildable_start(method), Shape(**shape))
    else:
        assert refused(".", check_adapter_options, buildable_start(method), Shape(**shape)).startswith(words)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_initialize_does_all_of_it_in_one_call(name):
    batches = batches_for(name, 6)
    model = MODELS[name]()
    before = logits(model, batches[0])
    exclude = ["classifier"] if name in ("bert", "vit") else None
    stats = lora_init.collect(model, batches, rank=3, rho=2.0, seed=1, exclude_modules=exclude, task_type=TASKS[name])
    ranks = lora_init.allocate_ranks(stats, rank=3, rho=1.0)
    expected = build_adapter(stats, ranks, lora_alpha=8, use_rslora=True, seed=1)
    peft_model = lora_init.initialize(
        model, batches, rank=3, lora_alpha=8, use_rslora=True, seed=1, adapter_name="mine", exclude_modules=exclude,
        task_type=TASKS[name],
    )  # fmt: skip
    assert list(peft_model.peft_config) == ["mine"] and torch.equal(before, logits(peft_model, batches[0]))
    layers = lora_layers(peft_model)
    assert set(layers) == set(expected.weights)
    for layer_name, (a, _) in expected.weights.items():
        assert torch.equal(layers[layer_name].lora_A["mine"].weight, a)
        assert layers[layer_name].scaling["mine"] == pytest.approx(8 / 3**0.5)


@pytest.mark.parametrize(("example", "arguments"), [
    ("quickstart", []),
    ("sft_trl", ["--steps", "8"]),
    ("sft_trl", ["--steps", "12", "--freeze-a"]),
    ("dpo_trl", ["--steps", "16", "--learning-rate", "5e-3"]),
])  # fmt: skip
def test_the_examples_run_and_learn(example, arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [example, *arguments])
    monkeypatch.chdir(tmp_path)
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    runpy.run_path(str(examples / f"{example}.py"), run_name="__main__")
    losses = [float(number) for number in re.findall(r"(?:loss|->) (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) >= 2 and losses[-1] < losses[0] and not list(tmp_path.iterdir())
