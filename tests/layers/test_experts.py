"""Fused parameters of experts: rows by the router's choice, their fallback, and the adapter that PEFT reads."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_init import LoraInitError, allocate_ranks, build_adapter, collect, find_targets
from lora_init.cli.describe import describe
from lora_init.collection.activations import ActivationHooks
from lora_init.errors import LoraInitWarning
from lora_init.layers.masks import TokenMasks
from lora_init.layers.rows import routed
from lora_init.layers.targets import read_target
from tests.collection.made import run
from tests.conftest import batches_for, refused, tiny_gpt2, tiny_llama
from tests.layers.made import BOTH, MODELS, gpt_oss, mixtral
from tests.versions import needs_experts_by_peft

pytestmark = needs_experts_by_peft
every_model = pytest.mark.parametrize("name", MODELS)


def batches(n_batches=6):
    return [
        {key: batch[key] for key in ("input_ids", "attention_mask")}
        for batch in batches_for("llama", n_batches=n_batches)
    ]


class Watched(TorchFunctionMode):
    """See what is multiplied by each expert's own matrix in transformers' plain loop."""

    def __init__(self, parameter):
        super().__init__()
        self.matrices = list(parameter.detach())
        self.rows = {expert: [] for expert in range(len(parameter))}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.functional.linear, torch.Tensor.matmul, torch.matmul, torch.Tensor.__matmul__):
            for expert, matrix in enumerate(self.matrices):
                if matrix.shape == args[1].shape and torch.equal(matrix, args[1]):
                    self.rows[expert].append(args[0].detach())
        return function(*args, **(kwargs or {}))


def seen_by_experts(model, batch, parameter):
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")
    with torch.no_grad(), Watched(plain.get_parameter(parameter)) as watched:
        plain(**batch)
    return {expert: torch.cat(rows) for expert, rows in watched.rows.items() if rows}


def in_order(rows):
    """Sort rows: the plain loop takes a token's first choices before its second ones."""
    return rows[rows[:, 0].argsort()]


@every_model
@pytest.mark.parametrize("ending", BOTH)
def test_each_expert_gets_what_its_matrix_multiplies(name, ending):
    model, batch = MODELS[name](), batches(1)[0]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    parameter = f"model.layers.1.mlp.{ending}"
    rows = {}
    module = model.get_submodule(parameter.rpartition(".")[0])
    with ActivationHooks(model, {parameter: module}, TokenMasks(model, "attention")) as hooks:
        run(hooks, batch, lambda group, given: rows.setdefault(group, given.clone()))
    expected = seen_by_experts(model, batch, parameter)
    assert {group for group in rows if group != parameter} == {f"{parameter}.{expert}" for expert in expected}
    for expert, those in expected.items():
        torch.testing.assert_close(in_order(rows[f"{parameter}.{expert}"]), in_order(those), atol=1e-5, rtol=1e-4)
    assert len(torch.cat(list(expected.values()))) == 2 * batch["input_ids"].numel()  # two experts a token
    # All together: the moments of every row that any expert multiplied.
    pooled, every = rows[parameter], torch.cat(list(expected.values()))
    torch.testing.assert_close(pooled.mean(0), every.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pooled.T @ pooled / len(pooled), every.T @ every / len(every), atol=1e-5, rtol=1e-3)


@every_model
def test_padding_does_not_count(name):
    model, batch = MODELS[name](), batches(1)[0]
    stats = collect(model, [batch], rank=2, target_parameters=BOTH)
    n_tokens = int(batch["attention_mask"].sum())
    for layer in ("0", "1"):
        up, down = (f"model.layers.{layer}.mlp.{ending}" for ending in BOTH)
        assert stats[up].n_samples == n_tokens  # the same rows for each of the experts that a token goes to
        assert stats[down].n_samples == 2 * n_tokens
        assert sum(s.n_samples for key, s in stats.groups.items() if key.startswith(f"{up}.")) == 2 * n_tokens


def test_how_well_new_rows_are_captured_is_known_of_each_input():
    """Of each expert's rows, too, as files and tables have it."""
    stats = collect(mixtral(), batches(), ["q_proj"], rank=2, target_parameters=BOTH)
    assert stats.held_out.keys() == stats.groups.keys() > {*stats}
    assert all(0.0 < share <= 1.0 for share in stats.held_out.values())


@every_model
def test_the_adapter_changes_nothing_and_loads_in_peft(name, tmp_path):
    model = MODELS[name]()
    before = model(**batches(1)[0]).logits.detach()
    stats = collect(model, batches(), rank=2, target_parameters=BOTH)
    plan = allocate_ranks(stats, rank=2)
    init = build_adapter(stats, plan)
    init.save_pretrained(tmp_path / "adapter", model=model)
    assert plan.megabytes() * 10**6 == sum(tensor.nbytes for pair in init.weights.values() for tensor in pair)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter", is_trainable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        peft_model = init.apply(model)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in peft_model.state_dict().items())
    for adapted in (peft_model, loaded):
        assert torch.equal(adapted(**batches(1)[0]).logits, before)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert trainable == plan.parameters == init.n_parameters()
    about = describe(tmp_path / "adapter")
    assert about["ranks"] == {layer: rank for layer, rank in plan.items() if rank}
    assert about["parameters"] == plan.parameters


@every_model
@pytest.mark.parametrize("ending", BOTH)
def test_pefts_update_of_an_expert_reads_that_experts_directions(name, ending):
    model = MODELS[name]()
    stats = collect(model, batches(12), ["q_proj"], rank=2, target_parameters=BOTH)
    peft_model = build_adapter(stats, 2).apply(model)
    parameter = f"model.layers.0.mlp.{ending}"
    wrappers = [m for n, m in peft_model.named_modules() if isinstance(m, ParamWrapper) and "layers.0" in n]
    wrapper = next(m for m in wrappers if m.parameter_name == ending.split(".")[1])
    nn.init.normal_(wrapper.lora_B["default"].weight)
    update = wrapper.get_delta_weight("default").detach()  # as the parameter is laid out
    update = update.mT if name == "gpt_oss" else update  # [experts, d_out, d_in]
    for own, change in zip(stats.of_experts(parameter), update, strict=True):
        directions = own.components[:2]
        torch.testing.assert_close(change @ directions.T @ directions, change, atol=1e-5, rtol=1e-4)
    # Negative: not those of another expert.
    other = stats.of_experts(parameter)[1].components[:2]
    assert (update[0] @ other.T @ other - update[0]).norm() > 0.1 * update[0].norm()


def test_an_expert_without_enough_rows_starts_from_those_of_all():
    model = mixtral(num_local_experts=6)
    weight = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():  # two of the first four always score above 0, so the last two are never among the best two
        weight[2:4] = -weight[:2]
        weight[4:] = 0.0
    stats = collect(model, batches(), rank=2, target_parameters=BOTH)
    up = "model.layers.0.mlp.experts.gate_up_proj"
    least = 2 * stats[up].n_components
    few = stats.experts_with_few_rows(up)
    assert few == [4, 5]
    assert f"{up}.4" not in stats.groups
    (note,) = (note for note in stats.provenance.notes if note.startswith(f"{up} and 1 other layer:"))
    assert f"2 of 6 experts read fewer than {least} rows" in note
    assert note.endswith("start from the rows of all experts: 4, 5 in the first.")
    a = build_adapter(stats, 2, unit_rows=True).weights[up][0].reshape(6, 2, 32)
    for expert in range(6):
        source = stats[up] if expert in few else stats.groups[f"{up}.{expert}"]
        assert torch.equal(a[expert], source.components[:2])
    drawn = build_adapter(stats, 2, "random").weights[up].a.reshape(6, -1)
    assert not torch.equal(drawn[0], drawn[1])
    # Some rows, but fewer than two for each of the components to be found: those of all too.
    stats = collect(model, batches(1), rank=8, target_parameters=BOTH)
    assert 0 < stats.groups[f"{up}.0"].n_samples < 2 * stats[up].n_components
    assert 0 in stats.experts_with_few_rows(up)


def test_all_linear_says_that_fused_experts_are_left_out_and_how_to_take_them():
    with pytest.warns(LoraInitWarning, match="fused experts hold"):
        (note,) = (n for n in collect(mixtral(), batches(2), rank=2).provenance.notes if "fused" in n)
    share = sum(p.numel() for n, p in mixtral().named_parameters() if "experts" in n) / mixtral().num_parameters()
    assert note == (
        f"fused experts hold {share:.0%} of the weights and get no adapter: "
        "target_parameters=['experts.down_proj', 'experts.gate_up_proj'] adds it."
    )
    listed = list(find_targets(mixtral()).layers)  # the same in other words
    assert note in collect(mixtral(), batches(2), listed, rank=2).provenance.notes
    both, chosen = dict(target_parameters=BOTH), dict(target_modules=["q_proj"])
    for model, settings in ((mixtral(), both), (mixtral(), chosen), (tiny_llama(), {})):
        assert not any("fused" in n for n in collect(model, batches(2), rank=2, **settings).provenance.notes)


def test_mistakes_get_one_clear_line():
    model = mixtral()
    words = (
        r"^target_parameters=\['experts\.w1'\] matches no parameter of MixtralForCausalLM\. Parameters of "
        r"three dimensions: down_proj \(of 4 experts\), gate_up_proj \(of 4 experts\), which are adapted whole\.$"
    )
    refused(words, find_targets, model, target_parameters=["experts.w1"])
    refused(r"It has no fused experts", find_targets, tiny_llama(), target_parameters=["experts.w1"])
    refused("must be a list of names", find_targets, model, target_parameters="experts.down_proj")
    model.own = torch.nn.Parameter(torch.zeros(2, 4, 4))  # of the model itself, which PEFT cannot wrap
    refused(r"\['own'\] matches no parameter", find_targets, model, target_parameters=["own"])
    # A name ends where a word does.
    refused(r"\['up_proj'\] matches no parameter", find_targets, mixtral(), target_parameters=["up_proj"])
    refused("PEFT takes one of the two", find_targets, model, target_parameters=["q_proj.weight"])
    with pytest.raises(LoraInitError, match=r"gate_up_proj_bias' of shape \(4, 48\), which is no weight"):
        find_targets(gpt_oss(), target_parameters=["experts.gate_up_proj_bias"])
    stats = collect(model, batches(2), rank=2, target_parameters=BOTH)
    refused(r"does not adapt parameters with lora_dropout=0\.1", build_adapter, stats, 2, lora_dropout=0.1)
    refused(r"does not adapt parameters with use_dora=True", build_adapter, stats, 2, use_dora=True)
    with pytest.raises(LoraInitError, match=r"layer 'model.layers.0.mlp.experts.gate_up_proj' of the statistics"):
        build_adapter(stats, {name: 2 for name in stats if "experts" in name}).apply(tiny_gpt2())
    refused("leaves no layer", find_targets, model, ["q_proj"], exclude_modules=["q_proj"])
    for exclude in (".*experts.*", ["experts"], BOTH):
        with pytest.warns(UserWarning) as said:
            found = find_targets(model, [], exclude_modules=exclude, target_parameters=BOTH)
        texts = [str(one.message) for one in said]
        assert len(texts) == (2 if exclude is BOTH else 1), texts
        assert all("leaves out modules, as in PEFT, and not the parameter model.layers." in text for text in texts)
        assert len(found.layers) == 4


def test_tokens_and_their_experts_are_found_among_whatever_a_module_is_called_with():
    hidden, chosen = torch.randn(2, 3, 8), torch.randint(0, 4, (2, 3, 2))
    weights = torch.rand(2, 3, 2)
    for args, kwargs in (
        ((hidden, chosen, weights), {}),
        ((hidden,), dict(router_weights=weights, top_k_index=chosen)),
        ((None, "x", hidden), dict(flag=True, top_k_index=chosen, other=chosen + 1)),
    ):
        rows, experts = routed("m", args, kwargs)
        assert torch.equal(rows, hidden.flatten(0, 1)) and torch.equal(experts, chosen.flatten(0, 1))
    for args in ((hidden,), (chosen,), (hidden[:1], chosen), (None,)):
        said = "^'m': its module was not called with hidden states and the experts chosen for each. Leave it out of"
        refused(said, routed, "m", args, {})


def test_the_number_of_experts_is_read_back_from_what_files_have_of_a_layer():
    found = find_targets(mixtral(), ["q_proj"], target_parameters=BOTH).layers
    layer = next(target for name, target in found.items() if name.endswith("down_proj"))
    assert layer.extras() == {"experts": 4}
    assert read_target(layer.name, layer.kind, layer.in_features, layer.out_features, {"experts": 4}) == layer


def test_parameters_are_in_the_order_of_the_model_whatever_the_order_asked_for():
    wanted = [find_targets(mixtral(), ["q_proj"], target_parameters=keys).layers for keys in (BOTH, BOTH[::-1])]
    assert [*wanted[0]] == [*wanted[1]]


def test_each_expert_draws_numbers_of_its_own():
    stats = collect(mixtral(), batches(), rank=2, target_parameters=BOTH)
    for name, layer in build_adapter(stats, 2, "random").weights.items():
        if stats.targets[name].experts:
            first, second = layer.a.unflatten(0, (-1, 2))[:2]
            assert not torch.allclose(first, second)
