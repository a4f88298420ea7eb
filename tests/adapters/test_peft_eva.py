"""The drop-ins: where PEFT's EVA is right they agree with it, and where it is wrong they don't. Both is shown."""

import inspect
import itertools
import re
import warnings

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import eva as theirs
from torch import nn

import lora_init
from lora_init.adapters import peft_eva as ours
from lora_init.errors import LoraInitWarning
from lora_init.planning.lora_config import from_patterns
from lora_init.statistics.spectrum import principal_angles
from tests.adapters.made import same, snapshot
from tests.conftest import batches_for, refused, tiny_llama
from tests.processes import run

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_model.model."
Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def config(rho=2.0, tau=0.99, r=4, target_modules=PROJECTIONS, eva=None, **options):
    eva_config = EvaConfig(rho=rho, tau=tau, **(eva or {}))
    return LoraConfig(
        r=r, target_modules=target_modules, init_lora_weights="eva", eva_config=eva_config, **options
    )  # fmt: skip


def structured_llama():
    """A Llama whose activations have falling variances, so that two methods can agree on the leading directions."""
    torch.manual_seed(0)
    model = tiny_llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and name != "lm_head.weight":
                u, s, vt = torch.linalg.svd(weight, full_matrices=False)
                fall, scale = (2.0, 30.0) if "embed" in name else (1.7, 1.0)
                weight.copy_((u * scale * fall ** -torch.arange(len(s)).float()) @ vt)
    return model


def wrap(model, peft_config, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization")
        return get_peft_model(model, peft_config, **options)


def layers_of(peft_model):
    return {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def quietly(function, *args, **options):
    return function(*args, show_progress_bar=False, **options)


def ranks(state):
    return {name.removeprefix(PREFIX): len(a) for name, a in state.items()}


# The same call, the same result --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["get_eva_state_dict", "initialize_lora_eva_weights"])
def test_the_signatures_are_pefts(name):
    mine, other = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(p.name, p.kind) for p in mine.values()] == [(p.name, p.kind) for p in other.values()]
    for key in mine:  # defaults: the same values, and functions of the same names
        assert getattr(mine[key].default, "__name__", mine[key].default) == getattr(
            other[key].default, "__name__", other[key].default
        )
    assert getattr(lora_init, name) is getattr(ours, name)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_they_find_the_same_directions_and_ranks(rho, wrapped):
    """One batch again and again, so that both see the same rows whenever they stop."""
    model, settings = structured_llama(), config(rho, tau=0.999)
    batches = batches_for("llama", 1, batch_size=32) * 12
    if wrapped:
        model, settings = wrap(model, settings), None
    mine = quietly(ours.get_eva_state_dict, model, batches, settings)
    other = quietly(theirs.get_eva_state_dict, model, batches, settings)
    assert mine.keys() == other.keys() and all(name.startswith(PREFIX) is wrapped for name in mine)
    for name in mine:
        assert mine[name].dtype == torch.float32  # PEFT's turn float64 from the second batch on
        shared = min(len(mine[name]), len(other[name]))
        # neighbouring variances differ by a factor of 3 to 4, and PEFT's svd_lowrank is a sketch: measured below 0.002
        assert principal_angles(mine[name][:shared], other[name][:shared]).max() < 0.01
    # q, k and v tie, and PEFT's sort breaks ties at random: the ranks agree per input, not per layer
    for block, read in itertools.product("01", ("q_proj|k_proj|v_proj", "o_proj", "gate_proj|up_proj", "down_proj")):
        group = [name for name in mine if re.search(rf"layers\.{block}\..*\.({read})$", name)]
        assert sorted(len(mine[n]) for n in group) == sorted(len(other[n]) for n in group)


@pytest.mark.parametrize("adjust", [True, False])
def test_they_leave_the_same_model(adjust):
    batches = batches_for("llama", 1, batch_size=32) * 12
    result = []
    for module in (ours, theirs):
        base = structured_llama()
        before = base(**batches[0]).logits
        model = wrap(base, config(eva={"adjust_scaling_factors": adjust}, lora_alpha=16))
        state = quietly(theirs.get_eva_state_dict, model, batches)
        returned = module.initialize_lora_eva_weights(model, eva_state_dict=state)
        assert returned is None and torch.equal(model(**batches[0]).logits, before)
        result.append(model)
    mine, other = (layers_of(model) for model in result)
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].r == other[name].r and mine[name].scaling == other[name].scaling
        assert torch.equal(mine[name].lora_A["default"].weight, other[name].lora_A["default"].weight)
        assert mine[name].lora_A["default"].weight.requires_grad
    assert len({layer.scaling["default"] for layer in mine.values()}) == 1 or not adjust
    # the configs describe the same adapter, ours with one key for all layers of a rank
    names = mine
    mine, other = (model.peft_config["default"] for model in result)
    for pattern in ("rank_pattern", "alpha_pattern"):
        assert from_patterns(getattr(mine, pattern), names, None) == from_patterns(getattr(other, pattern), names, None)
    assert 0 < len(mine.rank_pattern) < len(other.rank_pattern)


def of_both(name, *arguments, **options):
    """Call PEFT's function and ours, on models of their own that `arguments` make; return what each refuses it with."""
    refused_with = []
    for module in (theirs, ours):
        with pytest.raises(ValueError) as caught:
            quietly(getattr(module, name), *(make() for make in arguments), **options)
        refused_with.append(str(caught.value))
    return refused_with


def two_active():
    model = wrap(tiny_llama(), config())
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])
    return model


def other_start():
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=PROJECTIONS))


NAMED = {"prepare_layer_inputs_fn": {"nowhere": theirs.prepare_layer_inputs_fn_language_modeling}}


@pytest.mark.parametrize(("name", "arguments", "options", "words"), [
    ("get_eva_state_dict", [tiny_llama, list], {}, "^peft_config is required if model is not a PeftModel$"),
    ("get_eva_state_dict", [tiny_llama, list, config], {}, "^dataloader is empty$"),
    ("get_eva_state_dict", [tiny_llama, lambda: batches_for("llama", 1), config], NAMED,
     "^prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: .*nowhere"),
    ("initialize_lora_eva_weights", [tiny_llama, list], {}, "^model must be a PeftModel$"),
    ("initialize_lora_eva_weights", [two_active, list], {}, "only works with a single active adapter$"),
    ("initialize_lora_eva_weights", [other_start, list], {}, "can only be used with `init_lora_weights='eva'`$"),
    ("initialize_lora_eva_weights", [lambda: wrap(tiny_llama(), config())], {},
     "^dataloader is required if eva_state_dict is not provided$"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(eva initialization|[Mm]ultiple|second|already)")
def test_what_peft_refuses_is_refused_in_its_words(name, arguments, options, words):
    for said in of_both(name, *arguments, **options):
        assert re.search(words, said)


def test_without_a_config_of_eva_pefts_defaults_count():
    """A config without one is not changed, whether it is an argument or the model's."""
    batches, defaults = batches_for("llama", 2), EvaConfig()
    wanted = quietly(ours.get_eva_state_dict, structured_llama(), batches, config(defaults.rho, defaults.tau))
    for wrapped in (False, True):
        model, given = structured_llama(), config(defaults.rho, defaults.tau)
        if wrapped:
            model = wrap(model, given)
        given.eva_config = None
        state = quietly(ours.get_eva_state_dict, model, batches, *([] if wrapped else [given]))
        assert given.eva_config is None and ranks(state) == ranks(wanted)


# The settings do what they say ---------------------------------------------------------------------------------------


def counted(model, calls):
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    return model


@pytest.mark.parametrize(("tau", "expected"), [(0.0, 8), (1.0, 20)])
def test_tau_decides_when_to_stop(tau, expected):
    calls = []
    quietly(ours.get_eva_state_dict, counted(tiny_llama(), calls), batches_for("llama", 20), config(tau=tau))
    assert len(calls) == expected


def test_a_larger_tau_reads_on():
    counts = []
    for tau in (0.88, 0.92):
        torch.manual_seed(0)
        calls, settings = [], config(1.0, tau=tau, target_modules=["q_proj"])
        quietly(ours.get_eva_state_dict, counted(tiny_llama(), calls), batches_for("llama", 40), settings)
        counts.append(len(calls))
    assert 8 < counts[0] < counts[1] < 40


@pytest.mark.parametrize("rho", [1.0, 1.2, 1.5, 2.0, 5000.0])
def test_rho_bounds_the_ranks_and_the_budget_is_kept(rho):
    got = ranks(quietly(ours.get_eva_state_dict, tiny_llama(), batches_for("llama", 8), config(rho)))
    assert sum(got.values()) == 4 * 14 and max(got.values()) <= round(4 * rho)
    assert rho > 1 or set(got.values()) == {4}
    assert rho > 1.5 or max(got.values()) == round(4 * rho)  # which some layer comes to


@pytest.mark.parametrize("wrapped", [False, True])
def test_each_layer_has_the_rank_that_the_config_gives_it_and_rho_moves_them_between_layers(wrapped):
    """By a pattern, which may begin with ^, whether the model has PEFT's prefix or not."""
    patterns = {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 1}
    for rho in (1.0, 2.0):
        model = tiny_llama()
        settings = config(rho, r=2, target_modules=["q_proj", "v_proj"], rank_pattern=patterns)
        if wrapped:
            model, settings = wrap(model, settings), None
        found = ranks(quietly(ours.get_eva_state_dict, model, batches_for("llama", 2), settings))
        configured = {name: 1 if "v_proj" in name else 3 if name == Q else 2 for name in found}
        assert len(found) == 4 and sum(found.values()) == sum(configured.values()) == 7
        assert found == configured or rho > 1
        assert all(rank <= rho * configured[name] for name, rank in found.items())


def test_whitened_rows_are_pefts():
    """But for one number: it grows with the number of rows, and PEFT stops elsewhere."""
    batches, states = batches_for("llama", 1, batch_size=32) * 12, []
    for module in (ours, theirs):
        settings = config(1.0, tau=0.999, r=2, target_modules=["q_proj"], eva={"whiten": True})
        states.append(quietly(module.get_eva_state_dict, structured_llama(), batches, settings))
    for mine, other in zip(states[0].values(), states[1].values(), strict=True):
        (first, second), (their_first, their_second) = mine.norm(dim=1), other.norm(dim=1)
        assert 1.2 < float(second / first) == pytest.approx(float(their_second / their_first), rel=0.02)


def test_what_layers_read_is_what_they_read_without_the_adapter():
    model, batches = wrap(structured_llama(), config(1.0)), batches_for("llama", 2)
    before = quietly(ours.get_eva_state_dict, model, batches)
    for layer in layers_of(model).values():
        nn.init.normal_(layer.lora_B["default"].weight)
    after = quietly(ours.get_eva_state_dict, model, batches)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_adapter_that_is_named_is_the_one_that_is_initialized():
    model = wrap(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", config(1.0, r=3, target_modules=["v_proj"]))
    model.set_adapter("second")
    q_proj = layers_of(model)[Q].lora_A["default"].weight.clone()
    batches, foreign = batches_for("llama", 2), {Q: torch.ones(5, 32)}
    state = quietly(ours.get_eva_state_dict, model, batches, adapter_name="second")
    assert ranks(state) == {V: 3, V.replace("layers.0", "layers.1"): 3}
    # A tensor of a layer that has another adapter alone is of no use.
    ours.initialize_lora_eva_weights(model, eva_state_dict=state | foreign, adapter_name="second")
    layers = layers_of(model)
    assert torch.equal(layers[V].lora_A["second"].weight, state[PREFIX + V])
    assert model.active_adapters == ["second"] and torch.equal(layers[Q].lora_A["default"].weight, q_proj)
    again = quietly(ours.initialize_lora_eva_weights, model, batches, adapter_name="second")
    assert again is None and torch.equal(layers_of(model)[V].lora_A["second"].weight, state[PREFIX + V])


class Pooled(nn.Module):
    """A layer that is called by a keyword, and one that reads the first token of each text alone."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.pooler = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        self.proj(input=hidden)
        return self.pooler(hidden[:, 0])


def test_a_layer_that_reads_no_tokens_counts_whole_and_inputs_may_be_named():
    model, batches = Pooled(), batches_for("llama", 4, batch_size=8)
    settings = config(1.0, tau=1.0, r=3, target_modules=["proj", "pooler"])
    with torch.no_grad():
        hidden = torch.cat([model.embed(batch["input_ids"]) for batch in batches]).double()
    kept = torch.cat([batch["attention_mask"] for batch in batches]) == 1
    rows = {"proj": hidden[kept], "pooler": hidden[:, 0]}
    state = quietly(ours.get_eva_state_dict, model, batches, settings)
    assert state.keys() == rows.keys()
    for name, a in state.items():
        assert principal_angles(a, exact_components(rows[name], 3)).max() < 0.02
    own = {"pooler": lambda inputs, batch, name: inputs[0][:4]}
    state = quietly(ours.get_eva_state_dict, model, batches, settings, prepare_layer_inputs_fn=own)
    first_four = hidden[:, 0].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    assert principal_angles(state["pooler"], exact_components(first_four, 3)).max() < 0.02


class Backwards(nn.Module):
    """Two layers that read the same numbers, and run in another order than they stand in."""

    def __init__(self):
        super().__init__()
        self.embed, self.second, self.first = nn.Embedding(64, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, input_ids, **_):
        hidden = self.embed(input_ids)
        return self.first(hidden.clone()) + self.second(hidden.clone())


def test_ties_go_to_the_layer_that_stands_earlier_in_the_model_whichever_runs_first():
    settings = config(2.0, tau=0.5, r=1, target_modules=["first", "second"], rank_pattern={"first": 2})
    state = quietly(ours.get_eva_state_dict, Backwards(), batches_for("llama", 8), settings)
    # Of each layer the first direction, and the budget of three leaves one that both could have.
    assert [(name, len(a)) for name, a in state.items()] == [("second", 2), ("first", 1)]


@pytest.mark.parametrize("shown", [True, False, None])
def test_progress_is_shown_unless_it_is_not_asked_for(shown, capsys):
    asked = {} if shown is None else {"show_progress_bar": shown}
    settings = config(target_modules=["q_proj"])
    ours.get_eva_state_dict(tiny_llama(), batches_for("llama", 2), settings, **asked)
    ours.initialize_lora_eva_weights(wrap(tiny_llama(), settings), batches_for("llama", 2), **asked)
    assert capsys.readouterr().err.count("2/2") == (0 if shown is False else 2)


def embedding_rows(model, batches, keep):
    """What the first layer reads, normalised by its norm layer, of the tokens to keep."""
    with torch.no_grad():
        inputs = [model.model.layers[0].input_layernorm(model.model.embed_tokens(b["input_ids"])) for b in batches]
    return torch.cat([x[keep(b)] for x, b in zip(inputs, batches, strict=True)]).double()


def exact_components(rows, k):
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:k]


MASKS = [
    ({}, lambda b: (b["attention_mask"] == 1) & (b["labels"] != -100)),
    ({"label_mask_value": 7}, lambda b: (b["attention_mask"] == 1) & (b["labels"] != 7)),
    ({"use_label_mask": False}, lambda b: b["attention_mask"] == 1),
]


@pytest.mark.parametrize(("eva", "keep"), MASKS)
def test_the_masks_choose_the_tokens(eva, keep):
    model, batches = structured_llama(), batches_for("llama", 8, batch_size=8)
    for batch in batches:  # which tokens have labels depends on the tokens, or the masks would change little
        batch["labels"][batch["input_ids"] < 24] = -100
        batch["labels"][batch["input_ids"] > 44] = 7
    state = quietly(ours.get_eva_state_dict, model, batches, config(1.0, tau=1.0, eva=eva))
    exact = exact_components(embedding_rows(model, batches, keep), 4)
    assert principal_angles(state[Q], exact).max() < 0.02  # eight steps of an incremental SVD, against the exact one
    for other in (other for _, other in MASKS if other is not keep):
        assert principal_angles(state[Q], exact_components(embedding_rows(model, batches, other), 4)).max() > 0.1


def test_a_layer_that_never_runs_leaves_its_rank_to_nobody():
    model = structured_llama()
    model.model.layers[0].spare_proj = nn.Linear(32, 32)
    state = quietly(
        ours.get_eva_state_dict, model, batches_for("llama"), config(target_modules=["q_proj", "spare_proj"])
    )
    assert sum(map(len, state.values())) == 2 * 4 and not any("spare" in name for name in state)


def test_an_input_that_is_no_tensor_is_named():
    functions = ours._Functions(config(), None, None, theirs.prepare_layer_inputs_fn_language_modeling)
    assert "layer 'q'" in refused("", functions.rows, "q", (["no tensor"],), {})


def test_functions_of_the_callers_decide_about_rows():
    model, batches, names = structured_llama(), batches_for("llama", 6, batch_size=8), []

    def first_token(layer_input, model_input, layer_name):
        assert model_input is prepared[-1]
        names.append(layer_name)
        return layer_input[0][:, 0]

    prepared = []

    def prepare(batch, peft_config):
        assert peft_config.r == 3
        prepared.append(object())
        return prepared[-1]

    def forward(model, batch):
        return model(input_ids=batch["input_ids"])

    state = quietly(
        ours.get_eva_state_dict, model, batches, config(1.0, tau=1.0, r=3), forward_fn=forward,
        prepare_model_inputs_fn=prepare, prepare_layer_inputs_fn=first_token,
    )  # fmt: skip
    rows = embedding_rows(model, batches, lambda b: torch.arange(12).expand(8, 12) == 0)
    assert principal_angles(state[Q], exact_components(rows, 3)).max() < 1e-3  # few rows: kept whole, no approximation
    assert len(prepared) == 6 and {Q, K, V} <= set(
        names
    )  # each layer by its own name, though q, k and v read one input


def test_functions_of_single_layers_are_found_by_either_name_and_the_other_layers_count_whole():
    """The plain name, and the one that a PeftModel has; of a batch all tokens count where no function is named."""
    model, batches = structured_llama(), batches_for("llama", 6, batch_size=8)
    others = Q.replace("q_proj", "k_proj")
    for prefix in ("", PREFIX):
        functions = {prefix + Q: lambda inputs, batch, name: inputs[0][:, 0]}
        state = quietly(
            ours.get_eva_state_dict, model, batches, config(1.0, tau=1.0, r=3, target_modules=["q_proj", "k_proj"]),
            prepare_layer_inputs_fn=functions,
        )  # fmt: skip
        for layer, keep in (
            (Q, lambda b: torch.arange(12).expand(8, 12) == 0),
            (others, lambda b: b["input_ids"] > -1),
        ):
            exact = exact_components(embedding_rows(model, batches, keep), 3)
            assert principal_angles(state[layer], exact).max() < 0.02
    whole = quietly(ours.get_eva_state_dict, model, batches, config(1.0, tau=1.0, r=3), prepare_layer_inputs_fn=None)
    assert principal_angles(whole[Q], exact).max() < 0.02


@pytest.mark.parametrize("wanted", ["all-linear", "All-Linear", None])
def test_all_linear_layers_are_those_of_the_body(wanted):
    """PEFT's EVA takes the words for a pattern, which matches no layer. None are all, the output embedding too."""
    given = config(target_modules=PROJECTIONS)
    given.target_modules = wanted
    state = quietly(ours.get_eva_state_dict, tiny_llama(), batches_for("llama", 2), given)
    assert len(state) == (15 if wanted is None else 14) and ("lm_head" in state) == (wanted is None)
    assert given.target_modules == wanted


def test_what_no_layer_can_learn_from_is_one_line():
    batches = batches_for("llama", 2)
    refused(
        r"^no layer of LlamaForCausalLM is targeted by \{'nowhere'\}\.", ours.get_eva_state_dict, tiny_llama(), batches,
        config(target_modules=["nowhere"]),
    )  # fmt: skip
    assert ours.get_eva_state_dict(tiny_llama(), batches, config(target_modules=["embed_tokens"])) == {}
    for batch in batches:
        batch["labels"] = torch.full_like(batch["labels"], -100)
    words = "^no layer received rows: the masks keep no token, .* or set use_label_mask=False.$"
    refused(words, quietly, ours.get_eva_state_dict, tiny_llama(), batches, config())
    assert quietly(ours.get_eva_state_dict, tiny_llama(), batches, config(eva={"use_label_mask": False}))


def test_the_bound_on_batches_is_said_where_it_ends_the_pass(monkeypatch):
    monkeypatch.setattr(ours, "MAX_BATCHES", 9)
    batches, calls = batches_for("llama", 12), []
    with pytest.warns(
        UserWarning, match=r"^tau=0\.9999 was not reached in 9 batches: .* would keep \d+% on other data"
    ):
        quietly(
            ours.get_eva_state_dict,
            counted(tiny_llama(), calls),
            batches,
            config(tau=0.9999, target_modules=["q_proj"]),
        )
    assert len(calls) == 9
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoraInitWarning)
        quietly(
            ours.get_eva_state_dict, tiny_llama(), batches[:8], config(tau=0.9999, target_modules=["q_proj"])
        )  # the data end first
        quietly(ours.get_eva_state_dict, tiny_llama(), batches, config(tau=0.0, target_modules=["q_proj"]))


def test_labels_count_too_where_peft_looks_for_them_among_the_attributes(monkeypatch):
    """PEFT before 0.20 writes `hasattr(batch, "labels")`, which is false of a dict."""

    def older(batch, peft_config):
        assert isinstance(batch, dict) and not hasattr(batch, "nowhere")
        mask = batch.get("attention_mask").bool()
        if hasattr(batch, "labels"):
            mask = mask & (batch.labels != -100)
        return mask.nonzero()

    batches = batches_for("llama", 2)
    for batch in batches:
        batch["labels"][batch["input_ids"] < 24] = -100
    unlabelled = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]
    wanted = [
        quietly(ours.get_eva_state_dict, structured_llama(), data, config(1.0, target_modules=["q_proj"]))
        for data in (batches, unlabelled)
    ]
    monkeypatch.setattr(ours, "prepare_model_inputs_fn_language_modeling", older)
    for data, state in zip((batches, unlabelled), wanted, strict=True):
        found = quietly(
            ours.get_eva_state_dict,
            structured_llama(),
            data,
            config(1.0, target_modules=["q_proj"]),
            prepare_model_inputs_fn=older,
        )
        assert principal_angles(found[Q], state[Q]).max() < 1e-3
    assert principal_angles(wanted[0][Q], wanted[1][Q]).max() > 0.1


@pytest.fixture
def eva_state():
    return {name: torch.eye(rank, 32) for name, rank in ((Q, 3), (K, 5))}


def test_layers_that_the_state_dict_does_not_name_are_pefts_and_named(eva_state):
    """A module that is trained whole stays, and so does an embedding, which has no A of the usual kind."""
    settings = config(target_modules=["q_proj", "k_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = wrap(tiny_llama(), settings)
    batch = batches_for("llama", 1)[0]
    with torch.no_grad():
        before = model(**batch).logits
    with pytest.warns(UserWarning) as caught:
        ours.initialize_lora_eva_weights(model, eva_state_dict=eva_state)
    (said,) = [str(one.message) for one in caught if isinstance(one.message, LoraInitWarning)]
    others = ["model.embed_tokens", *(name.replace("layers.0", "layers.1") for name in (Q, K))]
    assert "initialized with init_lora_weights=True" in said and str(others) in said
    assert f"'{Q}'" not in said
    layers = layers_of(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {**dict.fromkeys(others, 4), Q: 3, K: 5}
    for name, a in eva_state.items():
        assert torch.equal(layers[name].lora_A["default"].weight, a)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lm_head.modules_to_save.default" in name for name in trained)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("adjust", [True, False, None])
def test_the_scaling_of_a_layer_stays_at_any_rank_unless_it_is_not_asked_for(adjust):
    """A layer of rank 0 is a plain one again, and PEFT would adapt it by no name of the new config."""
    names = [name.replace("layers.0", f"layers.{block}") for block in "01" for name in (Q, V)]
    alphas = {"^model.layers.0.self_attn.v_proj": 2}
    settings = config(
        target_modules=["q_proj", "v_proj"], lora_alpha=8, alpha_pattern=alphas, eva={"adjust_scaling_factors": adjust}
    )
    model = wrap(tiny_llama(), settings)
    if adjust is None:
        model.peft_config["default"].eva_config = None
    new_ranks = dict(zip(names, (1, 8, 4, 0), strict=True))
    ours.initialize_lora_eva_weights(model, eva_state_dict={name: torch.ones(n, 32) for name, n in new_ranks.items()})
    layers = layers_of(model)
    assert {name: layer.r["default"] for name, layer in layers.items()} == dict(zip(names[:3], (1, 8, 4), strict=True))
    scalings = (2.0, 0.5, 2.0) if adjust else (8.0, 0.25, 2.0)
    assert [layers[name].scaling["default"] for name in names[:3]] == [*scalings]
    written = model.peft_config["default"]
    assert written.target_modules == {*names[:3]}
    again = get_peft_model(tiny_llama(), LoraConfig(**{
        name: getattr(written, name) for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
    }))  # fmt: skip
    assert {name: (one.r, one.scaling) for name, one in layers_of(again).items()} == {
        name: (one.r, one.scaling) for name, one in layers.items()
    }


def test_an_adapter_of_embeddings_alone_stays_pefts():
    model = wrap(tiny_llama(), config(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match=r"state_dict: \['model.embed_tokens'\]"):
        ours.initialize_lora_eva_weights(model, eva_state_dict={})
    assert [*layers_of(model)] == ["model.embed_tokens"]


@pytest.mark.parametrize(("name", "shape", "words"), [
    (Q, (3, 31), r"a tensor of shape \(3, 31\), expected \[rank, 32\]. Compute it on this model.$"),
    (Q, (32,), r"a tensor of shape \(32,\), expected \[rank, 32\]"),
    (Q, (), r"a tensor of shape \(\), expected \[rank, 32\]"),
    ("model.embed_tokens", (3, 64), "a tensor for an embedding. Leave it out.$"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_its_layer_is_refused(name, shape, words, eva_state):
    model = wrap(tiny_llama(), config(target_modules=["q_proj", "k_proj", "embed_tokens"]))
    before, state = snapshot(model), eva_state | {name: torch.ones(shape)}
    refused(
        f"^layer '{name}': the eva state_dict has {words}",
        ours.initialize_lora_eva_weights,
        model,
        eva_state_dict=state,
    )
    assert same(before, snapshot(model))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_the_adapter_that_was_there(error, eva_state, monkeypatch):
    model = wrap(tiny_llama(), config(modules_to_save=["lm_head"]))
    before, patterns = snapshot(model), dict(model.peft_config["default"].rank_pattern)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(PeftModel, "add_adapter", fail)
    with pytest.raises(type(error)) as caught:
        ours.initialize_lora_eva_weights(model, eva_state_dict=eva_state)
    assert caught.value is error and same(before, snapshot(model))
    assert model.peft_config["default"].rank_pattern == patterns


@pytest.mark.parametrize("active", ["default", "other"])
def test_an_adapter_beside_it_stays_where_it_is(eva_state, active):
    """Also where both train a module whole; the active one is the same as before."""
    whole = ["lm_head"]
    model = wrap(tiny_llama(), config(modules_to_save=whole))
    beside = LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=whole)
    model.add_adapter("other", beside)
    model.set_adapter(active)
    kept = {name: value.clone() for name, value in model.state_dict().items() if ".other." in name}
    ours.initialize_lora_eva_weights(model, eva_state_dict=eva_state)
    after = model.state_dict()
    assert any("lm_head" in name for name in kept) and all(torch.equal(after[name], kept[name]) for name in kept)
    assert model.active_adapters == [active]


# Where PEFT is wrong -------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts, the second from the second batch on, and one that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](self.proj(x).tanh())


def state_of(model):
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return modes, hooks, {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_modes_hooks_and_gradients_are_as_before(wrapped, error):
    model = tiny_llama()
    if wrapped:
        model = wrap(model, config())
        for parameter in model.parameters():
            parameter.requires_grad = False  # as after from_pretrained without is_trainable
    model.train()
    model.get_submodule(PREFIX * wrapped + "model.layers.1").eval()
    before, calls = state_of(model), []

    def forward(model, batch):
        calls.append(1)
        if error and len(calls) == 3:
            raise error
        return model(**batch)

    arguments = dict(model=model, dataloader=batches_for("llama", 6), peft_config=config(tau=1.0), forward_fn=forward)
    if error is None:
        quietly(ours.get_eva_state_dict, **arguments)
    else:
        with pytest.raises(error):
            quietly(ours.get_eva_state_dict, **arguments)
    assert state_of(model) == before
    if error is RuntimeError:
        calls.clear()
        with pytest.raises(error):
            quietly(theirs.get_eva_state_dict, **arguments)
        assert state_of(model) != before  # PEFT leaves its hooks and evaluation mode behind


def test_rslora_keeps_the_scaling_of_every_layer():
    scalings = []
    for module in (theirs, ours):
        model = wrap(structured_llama(), config(use_rslora=True, lora_alpha=16))
        quietly(module.initialize_lora_eva_weights, model, batches_for("llama", 6, batch_size=8))
        assert len({layer.r["default"] for layer in layers_of(model).values()}) > 1
        scalings.append(sorted(layer.scaling["default"] for layer in layers_of(model).values()))
    assert scalings[0][-1] > 1.2 * scalings[0][0]  # PEFT's, meant to be equal
    assert scalings[1][0] == pytest.approx(8.0) and scalings[1][-1] == pytest.approx(8.0)  # 16 / sqrt(4)


def test_adapters_of_a_half_precision_model_keep_their_type():
    kinds = []
    for module, cast in ((theirs, True), (ours, True), (ours, False)):
        model = wrap(structured_llama().bfloat16(), config(), autocast_adapter_dtype=cast)
        quietly(module.initialize_lora_eva_weights, model, batches_for("llama", 6, batch_size=8))
        kinds.append({p.dtype for n, p in model.named_parameters() if "lora_" in n})
    assert kinds == [{torch.float32, torch.bfloat16}, {torch.float32}, {torch.bfloat16}]


def test_directions_go_where_the_first_weight_with_numbers_is():
    weights = [nn.Parameter(torch.ones(1, device=place)) for place in ("meta", "cpu")]
    elsewhere = torch.device("cuda", 1)  # which need not be there
    assert ours._device_of(nn.ParameterList(weights), elsewhere) == torch.device("cpu")
    assert ours._device_of(nn.ParameterList(weights[:1]), elsewhere) == elsewhere


def eva_of_a_share(rank, size, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = batches_for("llama", 4, batch_size=16)[rank::size]
        state = quietly(ours.get_eva_state_dict, structured_llama(), mine, config(tau=1.0))
    assert any("torch.distributed is initialized" in str(w.message) for w in caught)
    torch.save(state, folder / f"{rank}.pt")


def test_two_processes_find_what_one_finds_on_all_the_data(tmp_path):
    run(eva_of_a_share, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = quietly(
        ours.get_eva_state_dict, structured_llama(), batches_for("llama", 4, batch_size=16), config(tau=1.0)
    )
    assert ranks(first) == ranks(alone)
    for name in alone:
        assert torch.equal(first[name], second[name])
        assert principal_angles(first[name], alone[name]).max() < 0.02 or len(alone[name]) == 0
