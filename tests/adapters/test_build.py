"""The adapter on a model: exactly the planned layers, ranks and scalings, or the model as it was."""

import math
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_init
from lora_init.adapters.build import build_adapter, check_adapter_options, rank_with_frozen_a
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.layers.targets import find_targets
from lora_init.planning.allocate import RankAllocation, allocate_ranks
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Provenance, Statistics
from tests.conftest import MODELS, batches_for, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

peft = pytest.importorskip("peft")

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "vit": None}


def made_up_statistics(model, target_modules="all-linear", k=8, task_type=None, model_id="", n_samples=500, **options):
    """Statistics with random orthonormal components: what they say doesn't matter to the adapter."""
    targets = find_targets(model, target_modules, task_type=task_type, **options)
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for name, target in targets.layers.items():
        width = target.in_features
        rows = torch.linalg.qr(torch.randn(width, min(k, width), generator=generator)).Q.T.contiguous()
        variances = torch.arange(len(rows), 0, -1).double()
        groups[name] = Spectrum(rows, variances, float(variances.sum()) * 2, torch.zeros(width), n_samples)
    return Statistics(
        groups=groups,
        group_of={name: name for name in groups},
        targets=targets.layers,
        unsupported=targets.unsupported,
        provenance=Provenance(
            model_id=model_id,
            model_class=type(model).__name__,
            fingerprint="",
            target_modules=target_modules,
            task_type=task_type,
            rank=4,
            n_samples=n_samples,
        ),
    )


def uneven(stats, rank=4):
    """A plan with every rank from 0 to 7, average `rank`."""
    return RankAllocation({name: i % 8 for i, name in enumerate(stats)}, rank, dict(stats.targets))


def logits(model, batch):
    with torch.no_grad():
        return next(v for k, v in model(**batch).items() if k in ("logits", "last_hidden_state"))


def lora_layers(peft_model):
    from peft.tuners.lora import LoraLayer

    return {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def snapshot(model):
    """Everything about a model that a failed `apply` could leave behind."""
    return (
        {name: (id(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()},
        sorted(vars(model)),
    )


def same(before, after):
    weights = all(torch.equal(before[1][n][2], after[1][n][2]) for n in before[1])
    flags = {n: v[:2] for n, v in before[1].items()} == {n: v[:2] for n, v in after[1].items()}
    return before[0] == after[0] and flags and weights and before[2] == after[2]


# On a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eva", "random", "gaussian", "orthogonal"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_output_is_unchanged_bit_for_bit(name, method):
    model, batch = MODELS[name](), batches_for(name, 1)[0]
    stats = made_up_statistics(model, task_type=TASKS[name])
    before = logits(model, batch)
    peft_model = build_adapter(stats, uneven(stats), method=method).apply(model)
    assert torch.equal(before, logits(peft_model, batch))
    # and it would not be, were B not zero
    for layer in lora_layers(peft_model).values():
        nn.init.ones_(layer.lora_B["default"].weight)
    assert not torch.equal(before, logits(peft_model, batch))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_apply_makes_exactly_the_planned_layers(name, use_rslora):
    model = MODELS[name]()
    stats = made_up_statistics(model, task_type=TASKS[name])
    plan = uneven(stats)
    init = build_adapter(stats, plan, lora_alpha=10, use_rslora=use_rslora)
    peft_model = init.apply(model)
    layers = lora_layers(peft_model)
    assert {n: layer.r["default"] for n, layer in layers.items()} == {n: r for n, r in plan.items() if r > 0}
    assert {layer.scaling["default"] for layer in layers.values()} == {10 / (2.0 if use_rslora else 4)}
    for layer_name, (a, b) in init.weights.items():
        weight_a, weight_b = layers[layer_name].lora_A["default"].weight, layers[layer_name].lora_B["default"].weight
        assert torch.equal(weight_a, a) and torch.equal(weight_b, b)
        assert weight_a.requires_grad and weight_b.requires_grad
    trainable = sum(p.numel() for n, p in peft_model.named_parameters() if p.requires_grad and "lora_" in n)
    assert trainable == init.n_parameters() == plan.parameters
    assert sorted(init.left_out) == sorted(n for n, r in plan.items() if r == 0)


@pytest.mark.parametrize("alpha", [1, 16, 32, 7.5])
@pytest.mark.parametrize("base", [3, 6, 7, 16])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scaling_is_the_same_in_every_layer(alpha, base, use_rslora):
    model = tiny_llama()
    stats = made_up_statistics(model, k=32)
    plan = RankAllocation({n: 1 + 2 * i for i, n in enumerate(stats)}, base)
    layers = lora_layers(build_adapter(stats, plan, lora_alpha=alpha, use_rslora=use_rslora).apply(model))
    expected = alpha / (math.sqrt(base) if use_rslora else base)
    for layer in layers.values():
        assert math.isclose(layer.scaling["default"], expected, rel_tol=1e-15)  # at most the last bit of a float


def test_each_pattern_key_matches_exactly_one_module():
    model = tiny_t5()
    stats = made_up_statistics(model)
    config = build_adapter(stats, uneven(stats)).to_peft_config()
    names = [name for name, _ in model.named_modules()]
    assert config.rank_pattern and set(config.rank_pattern) == set(config.alpha_pattern)
    for key in config.rank_pattern:
        assert key.startswith("^") and len([n for n in names if re.match(rf"(.*\.)?({key})$", n)]) == 1
    assert config.init_lora_weights is True and config.eva_config is None


def test_the_same_ending_in_encoder_and_decoder_is_told_apart():
    model = tiny_t5()
    stats = made_up_statistics(model)
    plan = {n: 5 if n.startswith("encoder") and n.endswith("q") else 2 if n.endswith("DenseReluDense.wo") else 0
            for n in stats}  # fmt: skip
    layers = lora_layers(build_adapter(stats, plan).apply(model))
    assert {n: layer.r["default"] for n, layer in layers.items()} == {n: r for n, r in plan.items() if r}


class Tower(nn.Module):
    """Names that are endings of one another, which PEFT's list of targets can't tell apart."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(8, 8)}) for _ in "ab")})  # noqa: E731
        self.layers = block()["layers"]
        self.encoder = block()

    def forward(self, x):
        for part in [*self.layers, *self.encoder["layers"]]:
            x = part["mlp"](x).relu()
        return x


@pytest.mark.parametrize("plan", [{"layers.1.mlp": 3}, {"layers.1.mlp": 3, "encoder.layers.0.mlp": 2}])
def test_a_name_that_ends_another_one_selects_only_itself(plan, tmp_path):
    stats = made_up_statistics(Tower())
    init = build_adapter(stats, plan)
    assert set(lora_layers(init.apply(Tower()))) == set(plan)
    init.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(Tower(), tmp_path / "a")
    assert {n: layer.r["default"] for n, layer in lora_layers(loaded).items()} == plan


def test_a_name_that_ends_an_unknown_module_selects_only_itself(tmp_path):
    stats = made_up_statistics(Tower(), target_modules=r"layers\.1\.mlp")  # says nothing about encoder.layers.1.mlp
    init = build_adapter(stats, 3)
    init.save_pretrained(tmp_path / "a", model=Tower())
    assert set(lora_layers(init.apply(Tower()))) == {"layers.1.mlp"}
    assert set(lora_layers(peft.PeftModel.from_pretrained(Tower(), tmp_path / "a"))) == {"layers.1.mlp"}


def test_a_short_name_that_ends_an_unknown_module_selects_only_itself(tmp_path):
    def model():
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8)))

    stats = made_up_statistics(model(), target_modules="0")  # "1.0" is a ReLU and not in the statistics
    init = build_adapter(stats, 2)
    init.save_pretrained(tmp_path / "a")
    assert set(lora_layers(init.apply(model()))) == {"0"}
    assert set(lora_layers(peft.PeftModel.from_pretrained(model(), tmp_path / "a"))) == {"0"}


def test_many_layers_survive_pefts_condensing_of_target_modules():
    """From 20 names on PEFT replaces the list by endings; layers of rank 0 must not come back by that."""
    model = tiny_llama(num_hidden_layers=6)
    stats = made_up_statistics(model)
    plan = {n: 0 if i % 5 == 0 else 3 for i, n in enumerate(stats)}
    assert len(plan) >= 20
    assert set(lora_layers(build_adapter(stats, plan).apply(model))) == {n for n, r in plan.items() if r}


def test_conv1d_and_linear_in_one_model(recwarn):
    model, batch = tiny_gpt2(), batches_for("gpt2", 1)[0]
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied, or merging would change both
    stats = made_up_statistics(model, ["c_attn", "lm_head"])
    before = logits(model, batch)
    peft_model = build_adapter(stats, 4).apply(model)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    for layer in lora_layers(peft_model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    changed = logits(peft_model, batch)
    assert not torch.allclose(before, changed)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), changed, rtol=1e-4, atol=1e-4)  # float32, merged in another order


def test_a_model_in_evaluation_mode_stays_there_and_dropout_with_it():
    model = tiny_llama()
    stats = made_up_statistics(model)
    peft_model = build_adapter(stats, 4, lora_dropout=0.5).apply(model)
    assert not any(module.training for module in peft_model.modules())
    peft_model.train()
    assert all(layer.lora_dropout["default"].training for layer in lora_layers(peft_model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_float32_adapters_and_the_same_output(dtype):
    model, batch = tiny_llama().to(dtype), batches_for("llama", 1)[0]
    stats = made_up_statistics(model)
    before = logits(model, batch)
    peft_model = build_adapter(stats, uneven(stats)).apply(model)
    assert {p.dtype for n, p in peft_model.named_parameters() if "lora_" in n} == {torch.float32}
    assert torch.equal(before, logits(peft_model, batch))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_dora_keeps_the_output_too(name):
    """The magnitudes are the norms of the same weights that they are divided by, so their ratio is exactly 1."""
    model, batch = MODELS[name](), batches_for(name, 1)[0]
    stats = made_up_statistics(model, task_type=TASKS[name])
    before = logits(model, batch)
    assert torch.equal(before, logits(build_adapter(stats, uneven(stats), use_dora=True).apply(model), batch))


def test_dora_in_bfloat16_keeps_the_output_within_rounding():
    model, batch = tiny_llama().bfloat16(), batches_for("llama", 1)[0]
    stats = made_up_statistics(model)
    before = logits(model, batch)
    after = logits(build_adapter(stats, 4, use_dora=True).apply(model), batch)
    torch.testing.assert_close(after, before, rtol=2**-6, atol=2**-6)  # magnitudes keep bfloat16's 8 bits


def test_embeddings_keep_pefts_own_initialisation():
    model, batch = tiny_llama(tie_word_embeddings=False), batches_for("llama", 1)[0]
    stats = made_up_statistics(model, ["embed_tokens", "q_proj"])
    assert list(stats.unsupported) == ["model.embed_tokens"]
    before = logits(model, batch)
    peft_model = build_adapter(stats, 4).apply(model)
    layers = lora_layers(peft_model)
    assert set(layers) == {"model.embed_tokens", *stats}
    assert layers["model.embed_tokens"].lora_embedding_B["default"].abs().sum() > 0
    assert torch.equal(before, logits(peft_model, batch))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x)


def test_a_layer_that_never_ran_is_adapted_by_peft():
    model = Experts()
    stats = lora_init.collect(model, [torch.randn(40, 8)], rank=2, rho=2.0)
    init = build_adapter(stats, 2)
    layers = lora_layers(init.apply(model))
    assert {n: layer.r["default"] for n, layer in layers.items()} == {"experts.0": 2, "experts.1": 2}
    assert torch.equal(layers["experts.0"].lora_A["default"].weight, stats["experts.0"].components[:2])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_initialize_does_all_of_it_in_one_call(name):
    batches = batches_for(name, 6)
    model = MODELS[name]()
    before = logits(model, batches[0])
    exclude = ["classifier", "score"]
    stats = lora_init.collect(model, batches, rank=3, rho=2.0, seed=1, exclude_modules=exclude, task_type=TASKS[name])
    ranks = lora_init.allocate_ranks(stats, rank=3, rho=2.0)
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


def test_ranks_default_to_an_allocation_at_the_rank_of_the_statistics():
    stats = lora_init.collect(tiny_llama(), batches_for("llama", 4), rank=3, rho=2.0)
    assert build_adapter(stats).ranks == {n: r for n, r in lora_init.allocate_ranks(stats, rank=3).items() if r}


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(method="pissa"), "method='pissa' is unknown.*'eva', 'random', 'random-scaled', 'gaussian', 'orthogonal'"),
        (dict(method="random", whiten=True), "whiten=True needs method='eva'"),
        (dict(lora_alpha=0), "lora_alpha=0 must be a positive number"),
        (dict(lora_alpha=float("nan")), "lora_alpha=nan must be"),
        (dict(lora_dropout=1.0), "lora_dropout=1.0 must be"),
        (dict(ranks=-1), "ranks=-1 must be a whole number"),
        (dict(ranks=2.5), "ranks=2.5 must be a whole number"),
        (dict(ranks=True), "ranks=True must be a whole number"),
        (dict(ranks=0), "all 14 layers have rank 0"),
        (dict(ranks={"model.layers.0.self_attn.qproj": 2}), "'model.layers.0.self_attn.qproj'.*Closest.*q_proj'"),
        (dict(ranks={"model.layers.0.self_attn.q_proj": 33}), "q_proj': rank 33 is larger than its input width 32"),
        (dict(ranks={"model.layers.0.self_attn.q_proj": 9}), "q_proj': rank 9 needs 9 components.*hold 8"),
        (dict(ranks={"model.layers.0.self_attn.q_proj": "4"}), "q_proj': rank '4' must be a whole number"),
        (dict(ranks={}), "all 14 layers have rank 0"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    stats = made_up_statistics(tiny_llama())
    with pytest.raises(LoraInitError, match=message):
        build_adapter(stats, **({"ranks": 4} | arguments))


def test_what_can_be_known_before_the_pass_is_refused_before_it(tmp_path):
    def unread():
        raise AssertionError("a batch was read")
        yield

    for arguments, message in (
        (dict(method="pisa"), "method='pisa' is unknown"),
        (dict(method="eva_grad"), "Did you mean 'eva-grad'"),
        (dict(gamma=2.0), "gamma=2.0 with method='eva'"),
        (dict(method="lora-one", gamma=0.0), "gamma=0.0"),
        (dict(method="random", whiten=True), "whiten=True"),
        (dict(lora_alpha=float("inf")), "lora_alpha=inf"),
        (dict(lora_dropout=-0.1), "lora_dropout=-0.1"),
        (dict(modules_to_save="lm_head"), "must be a list of names"),
        (dict(modules_to_save=["lm_haed"]), "'lm_haed' is no module of LlamaForCausalLM. Closest: lm_head"),
    ):
        with pytest.raises(LoraInitError, match=message):
            lora_init.initialize(tiny_llama(), unread(), **arguments)
        if "modules_to_save" not in arguments or isinstance(arguments["modules_to_save"], str):
            with pytest.raises(LoraInitError, match=message):
                check_adapter_options(**arguments)
    build_adapter(made_up_statistics(tiny_llama()), 2).save_pretrained(tmp_path / "there")
    with pytest.raises(LoraInitError, match=r"there exists and is not empty.*--overwrite"):
        check_adapter_options(output=tmp_path / "there")
    check_adapter_options(output=tmp_path / "there", overwrite=True)
    (tmp_path / "there" / "thesis.tex").write_text("x")
    with pytest.raises(LoraInitError, match=r"holds more than an adapter \(thesis.tex\)"):
        check_adapter_options(output=tmp_path / "there", overwrite=True)
    check_adapter_options(output=tmp_path / "new")


def test_what_is_no_plain_model_or_no_statistics_is_one_clear_line(tmp_path):
    peft_model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    init = build_adapter(made_up_statistics(tiny_llama()), 2)
    batches = batches_for("llama", 1)
    takers = (
        lambda model: lora_init.initialize(model, batches),
        init.apply,
        lambda model: lora_init.find_step_size(model, lambda gamma: init, lambda model: 1.0),
        lambda model: lora_init.correct_base(model, tmp_path),
    )
    for take in takers:
        with pytest.raises(LoraInitError, match=r"takes a model, and 'org/name' is only its name. Load it first"):
            take("org/name")
        with pytest.raises(LoraInitError, match=r"PeftModel.* already has an adapter"):
            take(peft_model)
        with pytest.raises(LoraInitError, match="takes a model in this place and got a list"):
            take(batches)
    with pytest.raises(LoraInitError, match=r"takes statistics first and got a LlamaForCausalLM.*Statistics.load"):
        build_adapter(tiny_llama(), 2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_frozen_a(name, tmp_path):
    """A keeps its values, B alone is trained, less is kept for the backward pass, and PEFT's file is as always."""
    stats = made_up_statistics(MODELS[name](), task_type="CAUSAL_LM")
    init = build_adapter(stats, 3, freeze_a=True)
    assert init.n_parameters() == sum(b.numel() for _, b in init.weights.values())
    batch, kept = batches_for(name, 1)[0], {}
    for frozen, adapter in ((True, init), (False, build_adapter(stats, 3))):
        model = adapter.apply(MODELS[name]()).train()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {".lora_A." in n for n in trained} == ({False} if frozen else {True, False})
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.n_parameters()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = model(**batch).loss
        kept[frozen] = sum({t.data_ptr(): t.numel() for t in saved}.values())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss.backward()
        optimizer.step()
        assert sum(s["exp_avg"].numel() for s in optimizer.state.values()) == adapter.n_parameters()
        same_a = [
            torch.equal(layer.lora_A["default"].weight, adapter.weights[n][0])
            for n, layer in lora_layers(model).items()
        ]
        assert all(same_a) if frozen else not any(same_a)
        assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())
    assert kept[True] < kept[False]
    init.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "a", is_trainable=True)
    assert any(p.requires_grad for n, p in loaded.named_parameters() if ".lora_A." in n)  # PEFT has no setting for it
    card = (tmp_path / "a" / "README.md").read_text()
    lines = card[card.index("for name, parameter") : card.index("```\n", card.index("for name, parameter"))]
    exec(lines, {"model": loaded})
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n in trained if ".lora_B." in n}


def test_a_frozen_a_leaves_its_parameters_to_b():
    stats = made_up_statistics(tiny_llama(), k=20)
    rank = rank_with_frozen_a(stats.targets.values(), 4)
    both, frozen = build_adapter(stats, 4), build_adapter(stats, rank, freeze_a=True)
    assert both.n_parameters() - build_adapter(stats, 1, freeze_a=True).n_parameters() < frozen.n_parameters()
    assert frozen.n_parameters() <= both.n_parameters()


def test_an_adapter_is_shown_in_a_line_and_as_a_table():
    init = build_adapter(
        made_up_statistics(tiny_llama()), {"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 6}
    )
    assert repr(init) == "AdapterInit(eva: 2 layers of rank 2 to 6, r=4, scaling 4, 608 trainable parameters)"
    table = init.to_pandas()
    assert list(table["rank"]) == [2, 6] and table["parameters"].sum() == init.n_parameters()
    page = init._repr_html_()
    assert "model.layers.1.mlp.up_proj" in page and "AdapterInit" in page


def test_fewer_directions_than_rank_give_the_rank_that_there_is():
    """One rule for ten rows and for one: what there is, with a warning, and an error only where there is nothing."""
    stats = made_up_statistics(tiny_llama(), k=3, n_samples=4)
    with pytest.warns(UserWarning, match=r"14 of 14 layers get fewer ranks than asked for.*3 of 4.*More data"):
        init = build_adapter(stats, 4)
    assert set(init.ranks.values()) == {3} and init.scaling == 16 / 4
    assert {layer.scaling["default"] for layer in lora_layers(init.apply(tiny_llama())).values()} == {4.0}
    model = nn.Sequential(nn.Linear(8, 8))
    for n_rows, expected in ((10, 4), (3, 2), (2, 1)):
        stats = collect(model, [torch.randn(n_rows, 8)], rank=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert build_adapter(stats, 4).ranks == {"0": expected}
        assert len(caught) == (expected < 4)
    with pytest.raises(LoraInitError, match="no direction in any layer"):
        build_adapter(collect(model, [torch.randn(1, 8)], rank=4), 4)
    assert build_adapter(collect(model, [torch.randn(1, 8)], rank=4), 4, "random").ranks == {"0": 4}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_llama(num_hidden_layers=1), r"'model.layers.1.self_attn.q_proj' .* not in LlamaForCausalLM"),
        (lambda: tiny_llama(intermediate_size=64), r"gate_proj': the stat.* Linear 32 -> 48, .* Linear 32 -> 64"),
        (tiny_gpt2, "layer 'model.layers.0.self_attn.q_proj' of the statistics .* is not in GPT2LMHeadModel"),
    ],
)
def test_another_model_is_refused_and_left_alone(other, message):
    init = build_adapter(made_up_statistics(tiny_llama()), 4)
    model = other()
    before = snapshot(model)
    with pytest.raises(LoraInitError, match=message):
        init.apply(model)
    assert same(before, snapshot(model))


def test_another_kind_of_layer_is_refused():
    class Holder(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c = c

    from transformers.pytorch_utils import Conv1D

    init = build_adapter(made_up_statistics(Holder(nn.Linear(8, 8))), 2)
    with pytest.raises(LoraInitError, match="have Linear 8 -> 8, Holder has Conv1D 8 -> 8"):
        init.apply(Holder(Conv1D(8, 8)))
    with pytest.raises(LoraInitError, match="have Linear 8 -> 8, Holder has Embedding"):
        init.apply(Holder(nn.Embedding(8, 8)))


def test_a_model_that_has_an_adapter_is_refused():
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model), 4)
    peft_model = init.apply(model)
    for again in (peft_model, model):
        with pytest.raises(LoraInitError, match="already has an adapter"):
            init.apply(again)
    restored = peft_model.unload()
    assert isinstance(init.apply(restored), peft.PeftModel)


@pytest.mark.parametrize("adapter_name", ["", "a.b", "lora"])
def test_impossible_adapter_names_are_refused(adapter_name):
    init = build_adapter(made_up_statistics(tiny_llama()), 4)
    with pytest.raises(LoraInitError, match="adapter_name"):
        init.apply(tiny_llama(), adapter_name)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(monkeypatch, error):
    from peft.tuners.lora import LoraModel

    model, batch = tiny_llama(), batches_for("llama", 1)[0]
    model.model.embed_tokens.weight.requires_grad = False
    before, output = snapshot(model), logits(model, batch)
    init = build_adapter(made_up_statistics(model), 4)
    create, calls = LoraModel._create_and_replace, []

    def fail_at_the_fifth(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return create(self, *args, **kwargs)

    monkeypatch.setattr(LoraModel, "_create_and_replace", fail_at_the_fifth)
    with pytest.raises(type(error)):
        init.apply(model)
    assert same(before, snapshot(model)) and torch.equal(output, logits(model, batch))
    monkeypatch.undo()
    assert isinstance(init.apply(model), peft.PeftModel)


def test_layers_that_peft_keeps_for_the_task_are_left_alone():
    """PEFT trains everything called `classifier` whole for SEQ_CLS and adapts nothing inside it."""
    model = tiny_bert()
    stats = made_up_statistics(model, ["query", "classifier"], task_type="SEQ_CLS")
    peft_model = build_adapter(stats, 2).apply(model)
    adapted = {name for name, module in peft_model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.{name}" for name in stats}
    assert not any("classifier" in name for name in adapted)
    assert all(p.requires_grad for n, p in peft_model.named_parameters() if "modules_to_save" in n)


def test_a_plan_for_another_model_is_refused():
    stats, others = (collect(tiny_llama(), batches_for("llama"), rank=2) for _ in range(2))  # same names, other weights
    assert stats.provenance.fingerprint != others.provenance.fingerprint
    plan = allocate_ranks(stats, rank=2)
    with pytest.raises(LoraInitError, match="and this is another"):
        build_adapter(others, plan)
    build_adapter(stats, plan)


# In training ---------------------------------------------------------------------------------------------------------


def test_it_trains_in_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    peft_model = build_adapter(made_up_statistics(model), 4, lora_dropout=0.1).apply(model)
    rows = [{k: v[i] for k, v in b.items()} for b in batches_for("llama", 2) for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, learning_rate=1e-2, per_device_train_batch_size=8, report_to=[],
        logging_steps=5, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=peft_model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1  # eight sequences of noise, learnt by heart


def test_it_trains_in_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    model = tiny_llama()
    peft_model = build_adapter(made_up_statistics(model, task_type="CAUSAL_LM"), 4).apply(model)
    before = {n: p.detach().clone() for n, p in peft_model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=30, learning_rate=1e-2, per_device_train_batch_size=4, report_to=[],
        logging_steps=5, save_strategy="no", disable_tqdm=True, use_cpu=True, max_length=32, bf16=False,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_dict({"text": ["a b c d e f g h", "b c d e f g h i", "c d e f g h i j", "d e f g h i j k"]})
    trainer = trl.SFTTrainer(model=peft_model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2  # four sentences, learnt by heart
    changed = {n for n, p in peft_model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n for n in changed)


def tiny_tokenizer():
    """A tokenizer of single letters, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wide = dict(hidden_size=64, intermediate_size=128)  # 4-bit blocks hold 64 numbers
    tiny_llama(**wide).save_pretrained(tmp_path / "model")
    stats = made_up_statistics(tiny_llama(**wide), task_type="CAUSAL_LM")
    init = build_adapter(stats, uneven(stats))
    batch = batches_for("llama", 1)[0]

    def quantised():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map="cpu", dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        )  # fmt: skip

    model = quantised()
    before = logits(model, batch)
    assert torch.equal(before, logits(init.apply(model), batch))
    # in training mode from the start: bitsandbytes repacks 4-bit weights at the first evaluation on a CPU
    peft_model = init.apply(quantised()).train()
    peft_model(**batch).loss.backward()
    layers = lora_layers(peft_model)
    assert set(layers) == set(init.ranks)
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in layers.values())


@pytest.mark.parametrize(("example", "arguments"), [("quickstart", []), ("sft_trl", ["--steps", "8"])])
def test_the_examples_run_and_learn(example, arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", [example, *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / f"{example}.py"), run_name="__main__")
    losses = [float(number) for number in re.findall(r"(?:loss|->) (\d+\.\d+)", capsys.readouterr().out)]
    assert len(losses) >= 2 and losses[-1] < losses[0] and not list(tmp_path.iterdir())
