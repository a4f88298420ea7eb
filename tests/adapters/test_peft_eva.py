"""The drop-ins: where PEFT's EVA is right they agree with it, and where it is wrong they don't. Both is shown."""

import copy
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
from transformers import BatchEncoding

import lora_init
from lora_init.adapters import peft_eva as ours
from lora_init.errors import LoraInitError
from lora_init.planning.lora_config import from_patterns
from lora_init.statistics.spectrum import principal_angles
from tests.conftest import batches_for, tiny_bert, tiny_gpt2, tiny_llama
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


def wrap(model, peft_config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lora with eva initialization")
        return get_peft_model(model, peft_config)


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


def test_a_model_with_the_drop_in_saves_and_loads(tmp_path):
    batch = batches_for("llama", 1)[0]
    model = wrap(structured_llama(), config())
    quietly(ours.initialize_lora_eva_weights, model, batches_for("llama", 4))
    for layer in layers_of(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(structured_llama(), tmp_path / "adapter")
    assert {n: m.r for n, m in layers_of(loaded).items()} == {n: m.r for n, m in layers_of(model).items()}
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda module, model, wrapped: module.get_eva_state_dict(model, [1]),
        lambda module, model, wrapped: module.get_eva_state_dict(model, [], config()),
        lambda module, model, wrapped: quietly(
            module.get_eva_state_dict, model, batches_for("llama", 1), config(),
            prepare_layer_inputs_fn={"no.such": lambda x, model_input, name: x[0]},
        ),
        lambda module, model, wrapped: module.initialize_lora_eva_weights(model, [1]),
        lambda module, model, wrapped: module.initialize_lora_eva_weights(wrapped),
        lambda module, model, wrapped: module.initialize_lora_eva_weights(wrap(model, LoraConfig(r=2, target_modules=["q_proj"])), [1]),  # noqa: E501
        lambda module, model, wrapped: (
            wrapped.add_adapter("other", config()),
            wrapped.base_model.set_adapter(["default", "other"]),
            module.initialize_lora_eva_weights(wrapped, [1]),
        ),
    ],
)  # fmt: skip
def test_they_raise_the_same_errors(break_it):
    messages = []
    for module in (ours, theirs):
        with pytest.raises(ValueError) as caught:
            break_it(module, tiny_llama(), wrap(tiny_llama(), config()))
        messages.append(str(caught.value).partition(":")[0])  # what follows is a list there and a view here
    assert messages[0] == messages[1]


def test_layers_without_directions_are_initialised_by_peft_and_named():
    model = wrap(tiny_llama(), config(target_modules=["q_proj", "embed_tokens"]))
    with pytest.warns(UserWarning, match=r"not found in the eva state_dict: \['model.embed_tokens'\]") as caught:
        quietly(ours.initialize_lora_eva_weights, model, batches_for("llama", 4))
    assert caught[0].filename == __file__
    layers = layers_of(model)
    assert layers["model.embed_tokens"].lora_embedding_B["default"].abs().sum() > 0


def test_an_adapter_of_embeddings_alone_keeps_pefts_start_and_is_named():
    """As in PEFT, whose own warning says the same."""
    for module in (ours, theirs):
        model = wrap(tiny_llama(), config(target_modules=["embed_tokens"]))
        with pytest.warns(UserWarning, match=r"\['model.embed_tokens'\]"):
            quietly(module.initialize_lora_eva_weights, model, batches_for("llama", 4))
        assert list(layers_of(model)) == ["model.embed_tokens"]
        plain = (tiny_llama(), batches_for("llama", 1), config(target_modules=["embed_tokens"]))
        assert quietly(module.get_eva_state_dict, *plain) == {}


# The settings do what they say ---------------------------------------------------------------------------------------


def counted(model, calls):
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    return model


@pytest.mark.parametrize(("tau", "expected"), [(0.0, 8), (1.0, 20)])
def test_tau_decides_when_to_stop(tau, expected):
    calls = []
    quietly(ours.get_eva_state_dict, counted(tiny_llama(), calls), batches_for("llama", 20), config(tau=tau))
    assert len(calls) == expected


def test_a_higher_tau_reads_more_batches():
    calls = {}
    for tau in (0.8, 0.95, 0.98):
        model = counted(tiny_llama(), calls.setdefault(tau, []))
        quietly(ours.get_eva_state_dict, model, batches_for("llama", 200), config(tau=tau))
    assert len(calls[0.8]) < len(calls[0.95]) < len(calls[0.98]) < 200


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 5000.0])
def test_rho_bounds_the_ranks_and_the_budget_is_kept(rho):
    got = ranks(quietly(ours.get_eva_state_dict, tiny_llama(), batches_for("llama", 8), config(rho)))
    assert sum(got.values()) == 4 * 14 and max(got.values()) <= round(4 * rho)
    assert rho > 1 or set(got.values()) == {4}


def test_ranks_per_layer_set_budget_and_bound():
    settings = config(rho=2.0, rank_pattern={"q_proj": 2, "down_proj": 6})
    got = ranks(quietly(ours.get_eva_state_dict, tiny_llama(), batches_for("llama", 8), settings))
    assert sum(got.values()) == 2 * (2 + 6 + 5 * 4)
    # layers of one input share the largest bound among them, as in PEFT
    assert all(rank <= (12 if n.endswith("down_proj") else 8) for n, rank in got.items())


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


def test_without_functions_every_row_counts():
    model, batches = structured_llama(), batches_for("llama", 6, batch_size=8)
    state = quietly(
        ours.get_eva_state_dict, model, batches, config(1.0, tau=1.0), prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )  # fmt: skip
    rows = embedding_rows(model, batches, lambda b: b["input_ids"] >= 0)
    assert principal_angles(state[Q], exact_components(rows, 4)).max() < 0.02


def test_a_config_without_eva_settings_takes_the_defaults():
    plain = LoraConfig(r=4, target_modules=PROJECTIONS)
    model = tiny_llama()
    got = quietly(ours.get_eva_state_dict, model, batches_for("llama", 4), plain)
    expected = quietly(ours.get_eva_state_dict, model, batches_for("llama", 4), config())
    assert plain.eva_config is None and all(torch.equal(got[name], expected[name]) for name in expected)


def test_conv1d_and_inputs_without_tokens():
    state = quietly(ours.get_eva_state_dict, tiny_gpt2(), batches_for("gpt2", 4), config(target_modules=["c_attn"]))
    assert all(a.shape[1] == 32 for a in state.values()) and len(state) == 2
    settings = config(target_modules=["query", "pooler.dense"])
    batches = [b | {"labels": torch.zeros(4, dtype=torch.long)} for b in batches_for("bert", 4)]
    with pytest.raises(ValueError, match="not enough values to unpack"):
        quietly(theirs.get_eva_state_dict, tiny_bert(), batches_for("bert", 4), settings)
    settings.eva_config.use_label_mask = False
    assert "bert.pooler.dense" in quietly(ours.get_eva_state_dict, tiny_bert(), batches, settings)


# Where PEFT is wrong -------------------------------------------------------------------------------------------------


def test_whitening_does_not_reach_layers_of_the_same_input():
    """PEFT divides one tensor in place, once for each of q, k and v; whatever is shared is divided three times."""
    model, batches = structured_llama(), batches_for("llama", 1, batch_size=32) * 6
    plain, white, wrong = (
        quietly(module.get_eva_state_dict, model, batches, config(1.0, eva={"whiten": whiten}))
        for module, whiten in ((ours, False), (ours, True), (theirs, True))
    )
    norms = white[Q].norm(dim=1)
    torch.testing.assert_close(white[Q], plain[Q] * norms[:, None])
    assert torch.equal(white[Q], white[K]) and torch.equal(white[Q], white[V])
    assert len({white[n].untyped_storage().data_ptr() for n in (Q, K, V)}) == 3
    white[Q].zero_()
    assert white[K].abs().sum() > 0
    # norms are variance ** -1/4 and a factor for the number of rows, so q's and v's ratios must be those of q
    ratio, wrong_ratio = norms[3] / norms[0], wrong[Q].norm(dim=1)[3] / wrong[Q].norm(dim=1)[0]
    assert wrong_ratio > 1.5 * ratio and wrong[Q].data_ptr() == wrong[K].data_ptr()


def test_anchored_keys_in_rank_pattern_count():
    settings = config(1.0, rank_pattern={"^model.layers.0.self_attn.q_proj": 7}, alpha_pattern={f"^{Q}": 3})
    model, batches = wrap(tiny_llama(), settings), batches_for("llama", 8)
    wrong = ranks(quietly(theirs.get_eva_state_dict, model, batches, settings))
    assert sum(wrong.values()) == 4 * 14
    got = quietly(ours.get_eva_state_dict, model, batches)
    assert sum(ranks(got).values()) == 4 * 14 + 3
    ours.initialize_lora_eva_weights(model, eva_state_dict=got)
    layer = layers_of(model)[Q]
    assert layer.scaling["default"] == pytest.approx(3 / 7)


def test_a_state_dict_of_the_plain_model_fits_the_peft_model():
    state = quietly(ours.get_eva_state_dict, tiny_llama(), batches_for("llama", 4), config())
    wrong, model = wrap(tiny_llama(), config()), wrap(tiny_llama(), config())
    with pytest.warns(UserWarning, match="were not found in the eva state_dict"):
        theirs.initialize_lora_eva_weights(wrong, eva_state_dict=dict(state))
    kept = dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert state.keys() == kept.keys()  # PEFT empties the caller's dict
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.lora_A["default"].weight, state[name])
    assert set(layers_of(model)) == {name for name, a in state.items() if len(a)}


@pytest.mark.parametrize("function", [ours.prepare_model_inputs_fn_language_modeling,
                                      theirs.prepare_model_inputs_fn_language_modeling])  # fmt: skip
def test_a_batch_encoding_is_a_batch(function):
    batches = batches_for("llama", 4)
    encodings = [BatchEncoding(batch) for batch in batches]
    with pytest.raises((TypeError, ValueError), match="must be a dictionary"):  # ValueError before PEFT 0.20
        quietly(theirs.get_eva_state_dict, tiny_llama(), encodings, config())
    model = tiny_llama()
    got = quietly(ours.get_eva_state_dict, model, encodings, config(), prepare_model_inputs_fn=function)
    expected = quietly(ours.get_eva_state_dict, model, batches, config())
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Experts(nn.Module):
    """Two experts, the second from the second batch on, and one that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, expert):
        return self.experts[expert](self.proj(x).tanh())


def expert_batches(n=6):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(32, 8, generator=generator), "expert": min(i, 1)} for i in range(n)]


def test_a_module_that_does_not_run_in_the_first_batch():
    options = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    settings = config(1.0, tau=1.0, r=2, target_modules=["proj", "experts.0", "experts.1", "experts.2"])
    with pytest.raises(IndexError):
        quietly(theirs.get_eva_state_dict, Experts(), expert_batches(), settings, **options)
    model = Experts()
    state = quietly(ours.get_eva_state_dict, model, expert_batches(), settings, **options)
    assert ranks(state) == {"proj": 2, "experts.0": 2, "experts.1": 2}
    rows = torch.cat([model.proj(b["x"]).tanh() for b in expert_batches()[1:]]).detach().double()
    assert (
        principal_angles(state["experts.1"], exact_components(rows, 2)).max() < 1e-3
    )  # all directions are kept: d = 8
    wrapped = wrap(Experts(), settings)
    with pytest.warns(UserWarning, match=r"\['experts.2'\]"):
        quietly(ours.initialize_lora_eva_weights, wrapped, expert_batches(), **options)
    assert layers_of(wrapped)["experts.2"].r == {"default": 2}


def test_few_tokens_in_every_batch_are_enough():
    """PEFT waits for a batch with as many tokens as components, for ever."""
    batches = batches_for("llama", 10, batch_size=1, length=6)  # 3 to 6 tokens, for 8 components
    got = quietly(ours.get_eva_state_dict, structured_llama(), batches, config(tau=1.0, eva={"use_label_mask": False}))
    rows = embedding_rows(structured_llama(), batches, lambda b: b["attention_mask"] == 1)
    assert principal_angles(got[Q], exact_components(rows, len(got[Q]))).max() < 1e-2


def test_the_loop_is_bounded_and_says_so(monkeypatch):
    monkeypatch.setattr(ours, "MAX_BATCHES", 5)
    endless, calls = (batch for batch in itertools.cycle(batches_for("llama", 2))), []
    with pytest.warns(UserWarning, match=r"tau=1.0 was not reached in 5 batches: .* keep \d+% on other data") as caught:
        quietly(ours.get_eva_state_dict, counted(tiny_llama(), calls), endless, config(tau=1.0))
    assert len(calls) == 5 and caught[0].filename == __file__


def test_no_rows_at_all_is_an_error_and_not_an_endless_loop():
    batches = [b | {"labels": torch.full_like(b["input_ids"], -100)} for b in batches_for("llama", 3)]
    with pytest.raises(LoraInitError, match=r"no layer received rows.*use_label_mask=False"):
        quietly(ours.get_eva_state_dict, tiny_llama(), batches, config())
    with pytest.raises(ValueError, match="dataloader is empty"):
        quietly(ours.get_eva_state_dict, tiny_llama(), iter([]), config())
    with pytest.raises(LoraInitError, match="no layer of LlamaForCausalLM is targeted"):
        quietly(ours.get_eva_state_dict, tiny_llama(), batches, config(target_modules=["qproj"]))


def test_the_callers_mapping_is_not_emptied():
    calls = []

    def spy(layer_input, model_input, layer_name):
        calls.append(layer_name)
        return layer_input[0].flatten(0, 1)

    given = {Q: spy}
    model, batches, settings = tiny_llama(), batches_for("llama", 3), config()
    emptied = dict(given)
    quietly(theirs.get_eva_state_dict, model, batches, settings, prepare_layer_inputs_fn=emptied)
    assert emptied == {}
    calls.clear()
    quietly(ours.get_eva_state_dict, model, batches, settings, prepare_layer_inputs_fn=given)
    assert given == {Q: spy} and set(calls) == {Q}
    calls.clear()
    quietly(ours.get_eva_state_dict, wrap(model, settings), batches, prepare_layer_inputs_fn=given)
    assert set(calls) == {PREFIX + Q}  # the name that PEFT would give it


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


def test_all_linear_on_a_plain_model():
    settings = config(target_modules="all-linear")
    assert quietly(theirs.get_eva_state_dict, tiny_llama(), batches_for("llama", 3), settings) == {}
    assert len(quietly(ours.get_eva_state_dict, tiny_llama(), batches_for("llama", 3), settings)) == 14
    assert settings.target_modules == "all-linear"


def test_rslora_keeps_the_scaling_of_every_layer():
    scalings = []
    for module in (theirs, ours):
        model = wrap(structured_llama(), config(use_rslora=True, lora_alpha=16))
        quietly(module.initialize_lora_eva_weights, model, batches_for("llama", 6, batch_size=8))
        assert len({layer.r["default"] for layer in layers_of(model).values()}) > 1
        scalings.append(sorted(layer.scaling["default"] for layer in layers_of(model).values()))
    assert scalings[0][-1] > 1.2 * scalings[0][0]  # PEFT's, meant to be equal
    assert scalings[1][0] == pytest.approx(8.0) and scalings[1][-1] == pytest.approx(8.0)  # 16 / sqrt(4)


def test_adapters_of_a_half_precision_model_stay_float32():
    kinds = []
    for module in (theirs, ours):
        model = wrap(structured_llama().bfloat16(), config())
        quietly(module.initialize_lora_eva_weights, model, batches_for("llama", 6, batch_size=8))
        kinds.append({p.dtype for n, p in model.named_parameters() if "lora_" in n})
    assert kinds == [{torch.float32, torch.bfloat16}, {torch.float32}]


def test_a_head_is_trained_whole_as_before(tmp_path):
    model = wrap(tiny_bert(), config(target_modules=["query", "value"], task_type="SEQ_CLS"))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours.initialize_lora_eva_weights(model, batches_for("bert"), show_progress_bar=False)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert any("classifier.modules_to_save.default" in name for name in trainable)
    model.save_pretrained(tmp_path)
    batch = {name: value for name, value in batches_for("bert")[0].items() if name != "labels"}
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


def test_a_failure_of_peft_leaves_the_adapter(monkeypatch):
    model = wrap(structured_llama(), config())
    before, settings = dict(model.named_modules()), copy.deepcopy(model.peft_config)

    def fail(*arguments, **options):
        raise RuntimeError

    monkeypatch.setattr(PeftModel, "add_adapter", fail)
    with pytest.raises(RuntimeError):
        ours.initialize_lora_eva_weights(model, batches_for("llama"), show_progress_bar=False)
    assert dict(model.named_modules()) == before and model.peft_config == settings


def test_a_tensor_of_another_width_changes_nothing():
    model = wrap(tiny_llama(), config())
    state = quietly(ours.get_eva_state_dict, model, batches_for("llama", 4))
    state[PREFIX + "model.layers.1.mlp.down_proj"] = torch.zeros(3, 9)
    before = {n: p.clone() for n, p in model.named_parameters()}
    settings = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(LoraInitError, match=r"down_proj': .* shape \(3, 9\), expected \[rank, 48\]"):
        ours.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert before.keys() == dict(model.named_parameters()).keys() and settings == model.peft_config["default"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_low_cpu_mem_usage_leaves_no_weight_on_the_meta_device():
    model = get_peft_model(tiny_llama(), config(), low_cpu_mem_usage=True)
    quietly(ours.initialize_lora_eva_weights, model, batches_for("llama", 4))
    assert not any(p.is_meta for p in model.parameters())
    batch = batches_for("llama", 1)[0]
    assert torch.equal(model(**batch).logits, tiny_llama_with_the_weights_of(model)(**batch).logits)


def tiny_llama_with_the_weights_of(model):
    return copy.deepcopy(model).unload()


def test_only_the_named_adapter_is_touched():
    model = wrap(tiny_llama(), config())
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    other = {n: p.clone() for n, p in model.named_parameters() if ".other" in n}
    state = quietly(ours.get_eva_state_dict, model, batches_for("llama", 4))
    assert PREFIX + "lm_head" not in state
    ours.initialize_lora_eva_weights(model, eva_state_dict={n: a for n, a in state.items() if len(a)})
    assert "default" not in layers_of(model)["lm_head"].r
    assert other and all(torch.equal(p, other[n]) for n, p in model.named_parameters() if n in other)


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
