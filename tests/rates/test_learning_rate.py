"""The learning rate from one forward pass: the rule against brute force, the pass against the rule, wrong input."""

import copy
import math
import warnings
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
    XLMConfig,
    XLMModel,
    get_cosine_schedule_with_warmup,
    get_scheduler,
)  # fmt: skip
from transformers.training_args import OptimizerNames

import lora_init
from lora_init import build_adapter, collect, initialize, learning_rate
from lora_init.adapters import measured_rate
from lora_init.adapters.peft_model import adapter_layers
from lora_init.collection.processes import Processes
from lora_init.layers.rows import experts_of
from lora_init.layers.targets import count_linear, find_targets
from lora_init.rates.learning_rate import (
    CHANGE,
    GROWTH,
    NEW_HEAD,
    LearningRate,
    Response,
    check_measured,
    factor,
    is_adamw,
    made_by_torch,
    response,
    schedule_of,
    share_of,
    training_in_words,
)
from lora_init.rates.training_length import TrainingLength
from lora_init.statistics.spectrum import Sizes
from tests.adapters.made import batches, tiny
from tests.conftest import batches_for, refused, tiny_bert, tiny_llama, tiny_vit
from tests.layers.made import BOTH, MODELS, mixtral, split
from tests.serving.engine import word_tokenizer
from tests.versions import needs_experts_by_peft

ONE = {"layer": Response(2.0, 0.0)}


def test_a_move_of_unit_sign_in_b_changes_an_output_by_what_the_response_says():
    model, data = tiny(), torch.cat(batches())
    init = build_adapter(collect(model, [data], rank=4), 4, "random", lora_alpha=12)
    a, scaling, eta = init.weights["0"].a.double(), 3.0, 1e-3
    ax = data @ a.T  # [n, r]
    moved = scaling * ax.abs().sum(1) * eta  # B moves with the sign of A x in each column
    y = (data @ model[0].weight.T).square().mean().sqrt()
    sizes = Sizes(float(data.abs().sum(1).mean()), float(y))
    exact = response(sizes, float(ax.abs().sum(1).mean()), 4, scaling / 2**0.25)  # see `RANK` and `OVERLAP`
    assert exact.linear * eta == pytest.approx(float(moved.mean() / y), rel=1e-9)
    assert exact.quadratic == pytest.approx(float(scaling * GROWTH * 4 * data.abs().sum(1).mean() / 2 / y), rel=1e-9)
    # Of A x the pass knows the second moment alone. These inputs are Gaussian, of 16 dimensions.
    assert init.responses["0"].linear / 2**0.25 == pytest.approx(exact.linear, rel=0.03)


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def tokens():
    return {"input_ids": torch.randint(3, 64, (4, 12))}


@pytest.mark.parametrize("scaling", [0.1, 1.0, 50.0])
def test_the_rate_solves_the_rule(scaling):
    responses = {str(i): Response(scaling * (i + 1), scaling * 40.0 * i) for i in range(3)}
    rate = LearningRate(responses, TrainingLength(48)).rate
    change = [rate * one.linear + rate**2 * one.quadratic for one in responses.values()]
    assert math.prod(change) ** (1 / 3) == pytest.approx(CHANGE, rel=0.1)  # the rate has two digits


def test_the_rate_falls_a_little_with_the_steps_and_much_with_the_epochs():
    assert LearningRate(ONE, TrainingLength(48)).rate == 2.9e-3 == CHANGE / 2
    of_both = {"layer": Response(2.0, 400.0)}  # A and B move alike: the power is the same
    for responses in (ONE, of_both):
        short, long, again = (
            LearningRate(responses, length).rate
            for length in (TrainingLength(48), TrainingLength(480), TrainingLength(480, rows=960))
        )
        assert short / long == pytest.approx(10 ** (1 / 6), rel=0.05) and long / again == pytest.approx(
            4**1.2, rel=0.05
        )
        # Steps of four times as many examples want a rate that is higher by the cube root of four.
        larger = LearningRate(responses, TrainingLength(480, 32, rows=3840)).rate
        assert larger == pytest.approx(again * 4 ** (1 / 3), rel=0.05)
    assert LearningRate(ONE, TrainingLength(48), new_head=True).rate == pytest.approx(CHANGE / 2 * NEW_HEAD, rel=0.05)
    assert factor(TrainingLength(192, rows=100), new_head=True) == 0.5  # measured so, over three epochs


@pytest.mark.parametrize(("rows", "said", "expected"), [
    (500, {}, "63 steps of 8 (an epoch of 500 examples in batches of 8)"),
    (500, {"epochs": 3}, "189 steps of 8 (3 epochs of 500 examples in batches of 8)"),
    (500, {"epochs": 0.5}, "32 steps of 8 (0.5 epochs of 500 examples in batches of 8)"),
    (500, {"epochs": 2, "batch_size": 32}, "32 steps of 32 (2 epochs of 500 examples in batches of 32)"),
    (500, {"steps": 40}, "40 steps of 8"),
    (900, {"steps": 480}, "480 steps of 8 (4.2 epochs of 900 examples)"),
    (500, {"steps": 186, "epochs": 3}, "186 steps of 8 (each drawn 3.0 times)"),  # none of four examples
    (500, {"steps": 192, "epochs": 3}, "192 steps of 8 (3.0 epochs of 500 examples)"),
    (500, {"steps": 31, "epochs": 0.5}, "31 steps of 8"),
    (500, {"steps": 67, "epochs": 1.05}, "67 steps of 8 (1.1 epochs of 500 examples)"),
    (9, {"steps": 3, "epochs": 3}, "3 steps of 8 (each drawn 2.7 times)"),  # an epoch is one step, and not half of two
    (None, {}, "100 steps of 8 (assumed; say how many yours has)"),
    (None, {"steps": 30}, "30 steps of 8"),
    (None, {"steps": 375, "epochs": 3}, "375 steps of 8 (3.0 epochs of 1,000 examples)"),
    (None, {"steps": 30, "epochs": 0.5}, "30 steps of 8"),
    (1, {"epochs": 10_000}, "10000 steps of 8 (10000 epochs of 1 examples in batches of 8)"),
    (8, {"steps": 9, "batch_size": 8}, "9 steps of 8 (9.0 epochs of 8 examples)"),
    (7, {"epochs": 0.1}, "1 step of 8 (0.1 epochs of 7 examples in batches of 8)"),
    (4, {}, "1 step of 8 (an epoch of 4 examples in batches of 8)"),
])  # fmt: skip
def test_a_length_is_completed_from_what_is_said(rows, said, expected):
    assert str(TrainingLength.plan(rows, **said)) == expected


@pytest.mark.parametrize(("rows", "said"), [(9, (3, 3, 8)), (17, (6, 3, 8)), (12, (5, 5, 8)), (500, (186, 3, 8))])
def test_another_length_is_counted_as_if_it_had_been_said_at_first(rows, said):
    """`inspect` is told the length of a rate that was measured for another one."""
    planned = TrainingLength.plan(rows, *said)
    assert (
        TrainingLength.plan(rows).changed(*said) == planned and planned.epochs > planned.steps / planned.steps_an_epoch
    )


@pytest.mark.parametrize(("rows", "said", "words"), [
    (
        500, {"steps": 185, "epochs": 3},
        "steps=185 and epochs=3 contradict: 3 epochs of 500 examples in batches of 8 are 189 steps. Leave one of them "
        "out.",
    ),
    (500, {"steps": 193, "epochs": 3}, "steps=193 and epochs=3 contradict: 3 epochs of 500 examples in batches of 8"),
    (500, {"steps": 34, "epochs": 0.5}, "steps=34 and epochs=0.5 contradict: 0.5 epochs of 500 examples in batches of"),
    (9, {"batch_size": 10}, "train_batch_size=10, and there are 9 examples. Take fewer, or more data."),
    (500, {"epochs": 10_001}, "epochs=10001, expected a number above 0, 10,000 at most."),
    (None, {"epochs": 3}, "epochs=3: the number of examples is unknown, as of a stream. Say steps=, or both."),
    (100, {"batch_size": 128}, "train_batch_size=128, and there are 100 examples. Take fewer, or more data."),
    (500, {"epochs": 0}, "epochs=0, expected a number above 0, 10,000 at most."),
    (500, {"epochs": math.nan}, "epochs=nan, expected a number above 0, 10,000 at most."),
    (500, {"steps": 0}, "steps=0, expected a whole number of at least 1."),
    (500, {"steps": "9"}, "steps='9', expected a whole number of at least 1."),
    (500, {"batch_size": 0}, "train_batch_size=0, expected a whole number of at least 1."),
])  # fmt: skip
def test_a_length_that_contradicts_itself_is_refused(rows, said, words):
    assert refused("", lambda: TrainingLength.plan(rows, **said)).startswith(words)


def test_the_rate_rises_with_the_root_of_one_over_the_share_of_the_layers(llama, tokens):
    part = ["q_proj", "v_proj"]  # of seven kinds
    init = build_adapter(collect(llama, [tokens], part, rank=4), 4)
    adapted = get_peft_model(llama, LoraConfig(r=4, target_modules=part))
    for found in (init.rate, learning_rate(adapted, [tokens], steps=48)):
        assert found.share == 2 / 7 and LearningRate.read(found.stored()).share == 2 / 7
        assert replace(found, share=1.0).rate * 3.5**0.5 == pytest.approx(found.rate, rel=0.05)
    assert build_adapter(collect(tiny_llama(), [tokens], part, rank=4, task_type="SEQ_CLS"), 4).rate.new_head
    classifier = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    stats = collect(tiny_bert(), [tokens], rank=2, task_type="SEQ_CLS")
    for found in (build_adapter(stats, 2).rate, learning_rate(classifier, [tokens], steps=48)):
        assert found.share == 1.0  # PEFT trains the head whole
    # A layer, or a block, is a part of as many layers as two of them are: the rate does not jump between the two.
    assert count_linear(tiny_llama(), ["lm_head"]) == count_linear(tiny_llama(), ["model.layers.1.mlp.up_proj"]) == 14
    both = nn.ModuleDict({"vision": tiny_llama().model, "text": tiny_llama().model})
    names = [*find_targets(both).layers]
    assert [count_linear(both, part) for part in (names, names[14:], names[:2], names[:1])] == [28, 14, 14, 14]
    # Blocks may be named, and stand in several lists; a pooler is a part of the whole.
    named = nn.Sequential(OrderedDict((f"block_{letter}", nn.Linear(4, 4)) for letter in "abc"))
    assert count_linear(nn.ModuleDict({"encoder": named, "head": nn.Linear(4, 4)}), ["encoder.block_a"]) == 4
    beside = nn.ModuleDict({"text": nn.ModuleDict({"encoder": named}), "vision": nn.Linear(4, 4)})
    assert count_linear(beside, ["text.encoder.block_a"]) == 3
    xlm = XLMModel(XLMConfig(vocab_size=20, emb_dim=8, n_layers=3, n_heads=2))
    assert count_linear(xlm, [f"attentions.{i}.q_lin" for i in range(3)]) == 18
    bert = tiny_bert(None)
    assert count_linear(bert, ["pooler.dense"]) == count_linear(bert, find_targets(bert).layers) == 13


def test_an_adapter_that_is_loaded_to_be_served_has_the_rate_of_one_that_trains(llama, tokens):
    """Neither of its parts trains, so its A is not a frozen one."""
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    expected = learning_rate(adapted, [tokens], steps=10)
    found = learning_rate(adapted.requires_grad_(False), [tokens], steps=10)
    assert found.responses == expected.responses and found.rate == expected.rate


@pytest.mark.parametrize("method", ["random", "eva"])
def test_the_pass_of_collect_and_that_of_learning_rate_agree(method):
    model, data = tiny(), batches()
    init = build_adapter(collect(model, data, rank=4), 4, method)
    measured = learning_rate(init.apply(model), data, steps=100)
    assert measured.rate == pytest.approx(replace(init, length=TrainingLength(100)).rate.rate, rel=0.1)
    for name, pair in init.responses.items():
        assert measured.responses[name].quadratic == pytest.approx(pair.quadratic, rel=1e-6)


def test_learning_rate_takes_any_adapter_of_peft_and_leaves_the_model_as_it_was(llama, tokens):
    model = get_peft_model(llama, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = learning_rate(model, [tokens], steps=10)
    assert {name.rpartition(".")[2] for name in found.layers} == {"q_proj", "down_proj"} and not found.left_out
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama.modules())
    # Four times the scaling: a rate between a half, where A and B grow, and a quarter, where B alone does.
    larger = get_peft_model(model.unload(), LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"]))
    assert 0.2 < learning_rate(larger, [tokens], steps=10).rate / found.rate < 0.6


@pytest.fixture
def adapted():
    return get_peft_model(tiny(), LoraConfig(r=2, target_modules=["0", "2"]))


def llama_with(*layers):
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=list(layers) or ["q_proj"]))


def test_wrong_input_is_one_line(adapted):
    far = torch.tensor([[3, 4, 99]])  # 64 tokens there are
    nan = torch.full((4, 16), math.nan, dtype=torch.float64)
    trained = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["0"]))
    nn.init.ones_(trained.base_model.model[0].lora_B["default"].weight)
    cases = {
        "has no LoRA adapter 'default'": lambda: learning_rate(tiny(), batches()),
        "has no LoRA adapter 'other'": lambda: learning_rate(adapted, batches(), adapter_name="other"),
        "has no LoRA adapter ['other']": lambda: learning_rate(adapted, batches(), adapter_name=["other"]),
        "B is not zero. The rule is for adapters before training.": lambda: learning_rate(trained, batches()),
        "steps=0, expected a whole number of at least 1": lambda: learning_rate(adapted, batches(), steps=0),
        "no batch has a token that counts, so no rate": lambda: learning_rate(adapted, []),
        "batch 0: layer '0': what it reads or computes contains NaN or inf": lambda: learning_rate(adapted, [nan]),
        "learning_rate() got a str for the batches": lambda: learning_rate(adapted, "rows.jsonl"),
        "learning_rate() got a Tensor for the batches": lambda: learning_rate(adapted, batches()[0]),
        "learning_rate() got texts for the batches": lambda: learning_rate(adapted, ["one", "two"]),
        "batch 0: Sequential says: mat1 and mat2": lambda: learning_rate(adapted, [torch.ones(2, 3)]),
        "batch 0: LlamaForCausalLM says: index out of range": lambda: learning_rate(llama_with(), [{"input_ids": far}]),
        "batch 0: input_ids of the batch are torch.float32 [1, 3], expected whole numbers": lambda: learning_rate(
            llama_with(), [{"input_ids": far.float()}]
        ),
        "of embeddings or parameters": lambda: learning_rate(llama_with("embed_tokens"), [{"input_ids": far % 60}]),
        "learning_rate='high': 'measured' sets the rate of a trainer": lambda: lora_init.initialize(
            tiny(), batches(), learning_rate="high"
        ),
    }
    for words, call in cases.items():
        assert words in refused("", call)


@pytest.mark.parametrize("change", ["disable_adapter_layers", "merge_adapter", "add_another"])
def test_an_adapter_that_no_pass_goes_through_is_named(adapted, change):
    if change == "add_another":
        adapted.add_adapter("other", LoraConfig(r=2, target_modules=["0", "2"]))
        adapted.set_adapter("other")
    else:
        getattr(adapted.base_model, change)()
    assert "adapter 'default' is not active, disabled or merged" in refused("", learning_rate, adapted, batches())


VARIANTS = {
    "BdLora": lambda: dict(use_bdlora=peft.BdLoraConfig(target_modules_bd_b=["0", "2"], nblocks=2)),
    "Kasa": lambda: dict(kasa_config=peft.KasaConfig()),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_that_does_not_add_b_a_x_has_no_rate(name):
    try:
        adapted = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["0", "2"], **VARIANTS[name]()))
    except (AttributeError, TypeError) as error:
        pytest.skip(f"this PEFT has none: {error}")
    assert f"the adapter 'default' adds {name} to '0', and the rule" in refused("", learning_rate, adapted, batches())


fused = needs_experts_by_peft


@fused
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_experts", [2, 4])
@pytest.mark.parametrize("attention", [[], ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_an_mlp_cut_into_experts_has_the_rate_that_it_has_in_one_piece(n_experts, attention, tokens):
    dense = tiny_llama()
    for parameter in dense.parameters():  # so that activations are not at zero
        parameter.data.mul_(2.0 if parameter.dim() > 1 else 1.0)
    experts = split(dense, n_experts)
    assert torch.allclose(experts(**tokens).logits, dense(**tokens).logits, atol=1e-5)
    ways = [
        (dense, dict(target_modules=[*attention, "gate_proj", "up_proj", "down_proj"])),
        (experts, dict(target_modules=attention, target_parameters=BOTH)),
    ]
    adapted = [get_peft_model(copy.deepcopy(model), LoraConfig(r=4, **settings)) for model, settings in ways]
    measured = [learning_rate(model, [tokens]) for model in adapted]
    planned = [build_adapter(collect(model, [tokens], rank=4, **settings), 4).rate for model, settings in ways]
    for whole, parts in (measured, planned):
        assert parts.share == whole.share and not parts.left_out
        assert parts.rate == pytest.approx(whole.rate, rel=0.2)


@fused
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_an_expert_counts_for_the_tokens_that_the_router_sends_to_it(name, tokens):
    model = MODELS[name]() if name != "mixtral" else mixtral(num_local_experts=6)
    if name == "mixtral":  # its last two experts are never among the best two
        gate = model.model.layers[1].mlp.gate.weight.data
        gate[2:4], gate[4:] = -gate[:2], 0.0
    parameters = [f"model.layers.1.mlp.{end}" for end in BOTH]
    module, read = model.get_submodule("model.layers.1.mlp.experts"), {}
    hook = module.register_forward_pre_hook(lambda _, args: read.update(hidden=args[0], chosen=args[1]))
    model(**tokens)
    hook.remove()
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=BOTH))
    found = learning_rate(adapted, [tokens])
    hidden, chosen = read["hidden"].flatten(0, -2), read["chosen"].flatten(0, -2)
    lost = [f"{one}.{e}" for one in parameters for e in range(module.num_experts) if not (chosen == e).any()]
    assert {n for n in found.left_out if ".layers.1." in n} == {*lost} and (name != "mixtral" or len(lost) == 4)
    for parameter in parameters:
        experts, layer = experts_of(parameter, module), adapter_layers(adapted)[parameter]
        weight = getattr(module, parameter.rpartition(".")[2]).double()
        weight = weight.mT if module.is_transposed else weight
        a = layer.lora_A["default"].weight.double().reshape(len(weight), 2, -1)
        rows = [(e, x.double()) for e, x in experts.rows(hidden, chosen) if e is not None]
        assert sum(len(x) for _, x in rows) == 2 * len(hidden)
        ax = torch.cat([(x @ a[e].T).abs().sum(1) for e, x in rows]).mean()
        y = torch.cat([x @ weight[e].T for e, x in rows]).square().mean().sqrt()
        y = y / 2**0.25 if parameter.endswith("down_proj") else y  # two experts write for each token
        response_of = found.responses[parameter]
        assert response_of.linear == pytest.approx(float(3 * (8 / 2) ** 0.25 * ax / y), rel=1e-4)


@fused
@pytest.mark.filterwarnings("ignore")
def test_an_expert_is_unread_if_no_process_sent_it_a_token_and_its_layer_moves(told):
    model = mixtral(num_local_experts=6, num_experts_per_tok=1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=BOTH))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    gates = [model.model.layers[block].mlp.gate.weight.data for block in (0, 1)]
    data, unread = batches_for("llama", 1), []
    for chosen in ((0, 1), (2, 3)):  # of each process: the experts that its tokens go to
        for gate in gates:  # rows that point there and back, of which one is the best for each token
            gate.zero_()
            gate[chosen[0]], gate[chosen[1]] = gate[chosen[0]] + 1.0, gate[chosen[1]] - 1.0
        unread.append([name for name in learning_rate(adapted, data).left_out if ".layers.1." in name])
    ends = [f"model.layers.1.mlp.{end}.{expert}" for end in BOTH for expert in range(experts.num_experts)]
    assert sorted(unread[1]) == sorted(name for name in ends if name.endswith((".4", ".5")))
    told.clear()
    (layer,) = [one for name, one in adapter_layers(adapted).items() if name.endswith("layers.1.mlp.experts.down_proj")]
    nn.init.zeros_(layer.lora_A["default"].weight)
    left_out = learning_rate(adapted, data).left_out  # a layer that does not move is named once, and no expert of it
    assert [name for name in left_out if "layers.1.mlp.experts.down_proj" in name] == [
        "model.layers.1.mlp.experts.down_proj"
    ]


@fused
@pytest.mark.filterwarnings("ignore")
def test_the_rates_of_experts_by_collect_and_by_learning_rate_agree(tokens):
    model = mixtral()
    data = [{"input_ids": torch.randint(3, 64, (8, 12))} for _ in range(4)]
    init = build_adapter(collect(model, data, ["q_proj"], rank=2, target_parameters=BOTH), 2)
    measured = learning_rate(init.apply(model), data, steps=100)
    assert measured.responses.keys() == init.responses.keys() and len(init.responses) == 6
    for name, pair in init.responses.items():
        assert measured.responses[name].linear == pytest.approx(pair.linear, rel=0.1)  # A x is taken to be Gaussian
        assert measured.responses[name].quadratic == pytest.approx(pair.quadratic, rel=1e-5)


@pytest.mark.parametrize(("rate", "optimizer", "schedule", "words"), [
    (2e-3, "adamw_torch", "cosine", ""),
    (
        1e-4, "adamw_torch", "cosine",
        "learning_rate is 1e-4 in the trainer, and the forward pass says 2.9e-3 for 48 steps",
    ),
    (2e-3, "AdamW8bit", "cosine", ""),
    (2e-3, "PagedAdam32bit", "cosine", ""),
    (2e-3, "adamax", "cosine", "the learning rate was measured for AdamW, and not for the optimizer adamax"),
    (2e-3, "RAdam", "cosine", "the learning rate was measured for AdamW, and not for the optimizer RAdam"),
    (2e-3, "AdamWScheduleFree", "cosine", "the learning rate was measured for AdamW, and not for the optimizer AdamWS"),
    (2e-3, "sgd", "cosine", "the learning rate was measured for AdamW, and not for the optimizer sgd"),
    (2e-3, "adamw_torch", "linear", ""),
    (2e-3, "adamw_torch", "constant", "the learning rate was measured with the schedule cosine and linear, and not"),
])  # fmt: skip
def test_a_trainer_whose_rate_is_far_off_is_told_in_one_line(rate, optimizer, schedule, words):
    said = LearningRate(ONE, TrainingLength(48)).far_off(rate, optimizer, schedule)
    assert len(said) == bool(words) and all(line.startswith(words) for line in said)


@pytest.mark.parametrize(("length", "least", "most"), [
    (TrainingLength(48), 2.9e-3 / 3, 2.9e-3 * 3),
    (TrainingLength(1250, rows=1000), 1.1e-4 / 4.47, 1.1e-4 * 4.47),  # of which no rate is known within three times
])  # fmt: skip
def test_a_rate_is_far_off_beyond_three_times_or_as_far_as_the_best_is_known(length, least, most):
    rate = LearningRate(ONE, length)

    def lines(learning_rate, schedule="cosine"):
        return [line.partition(" is ")[0] for line in rate.far_off(learning_rate, "AdamW", schedule)]

    for near in (least * 1.01, rate.rate, most * 0.99, None):
        assert lines(near) == []
    for far in (least * 0.99, most * 1.01):
        assert lines(far) == ["learning_rate"]
        assert [line[:17] for line in lines(far, "constant")] == ["the learning rate", "learning_rate"]


@pytest.mark.parametrize(("name", "more", "made_by", "expected"), [
    ("cosine", {}, "cosine", "cosine"),
    ("linear", None, "linear", "linear"),
    ("cosine", {"num_cycles": 3}, "cosine", "cosine (num_cycles=3)"),
    ("cosine", {}, "linear", "linear"),  # by a method of one's own
    ("cosine", {}, "constant", "LambdaLR"),
    ("cosine", {}, lambda adam: get_cosine_schedule_with_warmup(adam, 1, 8, num_cycles=2), "LambdaLR"),
    ("cosine", {}, lambda adam: get_cosine_schedule_with_warmup(adam, 1, 12), "LambdaLR"),  # of a longer training
    ("linear", {}, lambda adam: get_cosine_schedule_with_warmup(adam, 3, 8), "cosine"),
    ("cosine", {}, lambda adam: get_cosine_schedule_with_warmup(adam, 8, 8), "LambdaLR"),  # which only rises
    ("cosine", {}, lambda adam: torch.optim.lr_scheduler.LambdaLR(adam, lambda step: math.nan), "LambdaLR"),
    ("cosine", {}, torch.optim.lr_scheduler.ConstantLR, "ConstantLR"),
    # Factors from step to step, whose product is another curve than they are.
    ("linear", {}, lambda adam: torch.optim.lr_scheduler.MultiplicativeLR(adam, lambda step: 1 - step / 8),
     "MultiplicativeLR"),
    ("cosine_with_restarts", {}, "cosine_with_restarts", "cosine_with_restarts"),
])  # fmt: skip
def test_a_schedule_is_what_multiplies_the_rate(name, more, made_by, expected):
    settings = TrainingArguments(lr_scheduler_type=name, lr_scheduler_kwargs=more)
    adam = torch.optim.AdamW(nn.Linear(1, 1).parameters())
    made = get_scheduler(made_by, adam, 1, 8, more or {}) if isinstance(made_by, str) else made_by(adam)
    assert schedule_of(settings, made, 8) == expected
    if made_by == name:
        assert schedule_of(settings) == expected


def test_a_frozen_a_wants_a_higher_rate():
    model, data = tiny(), batches()
    stats = collect(model, data, rank=4)
    free, frozen = (build_adapter(stats, 4, "random", lora_alpha=0.1, freeze_a=freeze) for freeze in (False, True))
    free, adapted, frozen = free.rate.rate, frozen.apply(model), frozen.rate.rate
    assert frozen > 1.5 * free
    assert learning_rate(adapted, data, steps=100, freeze_a=True).rate == pytest.approx(frozen, rel=0.1)


@pytest.mark.parametrize("how", ["initialize", "the parameters", "the record", "the argument"])
def test_a_is_frozen_where_the_parameters_or_the_record_say_so(how, llama, tokens):
    config = dict(r=4, lora_alpha=0.05, target_modules=["q_proj", "down_proj"])
    free = learning_rate(get_peft_model(tiny_llama(), LoraConfig(**config)), [tokens], steps=48)
    adapted = get_peft_model(tiny_llama(), LoraConfig(**config))
    if how in ("initialize", "the record"):
        stats = collect(llama, [tokens], config["target_modules"], rank=4)
        adapted = build_adapter(stats, 4, "random", lora_alpha=0.05, freeze_a=True).apply(llama)
    if how == "the record":  # as PEFT loads it to be trained
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    if how == "the parameters":
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(".lora_B." in name)
    found = learning_rate(adapted, [tokens], steps=48, freeze_a=how == "the argument")
    assert all(one.quadratic > 0 for one in free.responses.values())
    assert found.rate > 1.5 * free.rate and all(one.quadratic == 0 for one in found.responses.values())


def test_layers_that_are_frozen_by_hand_do_not_count(tokens):
    """An adapter of which one block trains has the rate of one that is on that block alone, with the same A."""
    config = dict(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    base = tiny_llama()
    alone = get_peft_model(copy.deepcopy(base), LoraConfig(**config, layers_to_transform=[1]))
    adapted = get_peft_model(base, LoraConfig(**config))
    whole = learning_rate(adapted, [tokens], steps=48)
    theirs = adapted.state_dict()
    alone.load_state_dict({name: theirs.get(name, value) for name, value in alone.state_dict().items()})
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".layers.1." in name)
    found, expected = (learning_rate(one, [tokens], steps=48) for one in (adapted, alone))
    assert (found.rate, found.share) == (expected.rate, expected.share) and found.rate > 1.2 * whole.rate
    assert found.responses == expected.responses and len(found.responses) == 7
    served = learning_rate(adapted.requires_grad_(False), [tokens], steps=48)
    assert served.responses == whole.responses


def test_an_embedding_and_an_adapter_on_other_layers_are_left_out(llama, tokens):
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["up_proj"]))
    found = []
    for name in ("default", "second"):
        adapted.set_adapter(name)
        found.append(learning_rate(adapted, [tokens], steps=48, adapter_name=name))
    first, second = found
    assert first.left_out == ["model.embed_tokens"] and {name.split(".")[-1] for name in first.layers} == {"q_proj"}
    # Of an adapter that was made from statistics, too.
    plain = adapted.unload()
    made = build_adapter(collect(plain, [tokens], ["embed_tokens", "q_proj", "up_proj", "o_proj"], rank=2), 2)
    again = learning_rate(made.apply(plain), [tokens], steps=48)
    assert made.rate.left_out == again.left_out == first.left_out
    assert made.rate.share == again.share == pytest.approx(3 / 7)
    assert not second.left_out and {name.split(".")[-1] for name in second.layers} == {"up_proj"}


def test_a_parameter_whose_input_no_hook_sees_is_left_out(llama, tokens):
    """PEFT adapts any parameter by its name; what it multiplies is known of experts alone."""
    config = LoraConfig(r=2, target_modules=["up_proj"], target_parameters=["q_proj.weight"])
    found = learning_rate(get_peft_model(llama, config), [tokens], steps=48)
    parameters = [f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)]
    assert found.left_out == parameters and {name.split(".")[-1] for name in found.layers} == {"up_proj"}
    alone = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]))
    refused("^the adapter is of embeddings or parameters whose A no hook sees", learning_rate, alone, [tokens])


def test_a_batch_without_a_token_that_counts_is_passed_over(tokens):
    blank = tokens | {"attention_mask": torch.zeros(4, 12, dtype=torch.long)}
    adapted = llama_with()
    found = learning_rate(adapted, [blank, tokens, blank], steps=48)
    assert found.responses == learning_rate(adapted, [tokens], steps=48).responses
    refused("no batch has a token that counts", learning_rate, adapted, [blank])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("MPS backend out of memory"), KeyboardInterrupt()])
def test_a_lack_of_memory_keeps_its_own_error(error, tokens, monkeypatch):
    """The entrances have a line for it that says what to try."""
    adapted = llama_with()
    monkeypatch.setattr(LlamaModel, "forward", lambda *args, **named: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)) as caught:
        learning_rate(adapted, [tokens])
    assert caught.value is error


def own_classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def tiny_roberta():
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return RobertaForSequenceClassification(RobertaConfig(**sizes, pad_token_id=1)).eval()


# A model, what PEFT is told to train whole, a batch, and whether that is a new head.
TOKENS = {"input_ids": torch.arange(3, 63).reshape(6, 10)}
WHOLE = {
    "by the task type": (tiny_bert, dict(task_type="SEQ_CLS"), TOKENS, True),
    "by its name": (tiny_bert, dict(modules_to_save=["classifier"]), TOKENS, True),
    "by its parts": (tiny_roberta, dict(modules_to_save=["classifier.dense", "out_proj"]), TOKENS, True),
    "of images": (tiny_vit, dict(modules_to_save=["classifier"]), {"pixel_values": torch.rand(2, 1, 16, 16)}, True),
    "of one's own": (own_classifier, dict(modules_to_save=["4"]), torch.rand(9, 16).double(), True),
    "nothing": (tiny_bert, {}, TOKENS, False),
    "of a language model": (tiny_llama, dict(modules_to_save=["lm_head"]), TOKENS, False),
    "an embedding": (tiny_llama, dict(modules_to_save=["embed_tokens"]), TOKENS, False),
}


class Held(nn.Module):
    """A module of one's own around a pretrained model, as trainers want it: with a configuration."""

    def __init__(self, inner, head=None):
        super().__init__()
        self.inner, self.config, self.head = inner, inner.config, head

    def forward(self, **batch):
        found = self.inner(**batch)
        return found if self.head is None else self.head(found.last_hidden_state)


class Loaded(Held):
    """One that can be loaded whole, as transformers' page on custom models has it."""

    @classmethod
    def from_pretrained(cls, path):
        return cls(tiny_bert(None), nn.Linear(32, 3))


class Derived(LlamaModel):
    """One that derives from a model of a library, and adds a head."""

    def __init__(self):
        super().__init__(tiny_llama().config)
        self.head, self.empty = nn.Linear(32, 3), nn.Dropout()

    def forward(self, **batch):
        return self.head(super().forward(**batch).last_hidden_state)


class Times(nn.Module):
    """A head with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, 3))

    def forward(self, hidden):
        return hidden @ self.matrix


class Recurrent(nn.GRU):
    def forward(self, hidden):
        return super().forward(hidden)[0]


@pytest.mark.parametrize(("make", "whole", "is_new"), [
    (lambda: Held(tiny_bert(None), nn.Linear(32, 3)), ["head"], True),
    (lambda: Loaded(tiny_bert(None), nn.Linear(32, 3)), ["head"], True),
    (lambda: Held(tiny_bert(None), Times()), ["head"], True),
    (Derived, ["head"], True),
    (Derived, ["norm"], False),
    (lambda: Held(tiny_bert(None), Recurrent(32, 3, batch_first=True)), ["head"], True),
    (lambda: Held(tiny_bert(None), nn.LayerNorm(32)), ["head"], False),
    (lambda: Held(tiny_bert(None), nn.Linear(32, 3)), ["inner.pooler"], False),
    (lambda: Held(tiny_llama()), ["inner.lm_head"], False),
])  # fmt: skip
def test_a_new_head_is_known_in_a_model_of_ones_own_with_a_configuration(make, whole, is_new):
    model = make()
    layers = [name for name in find_targets(model).layers if name.startswith(("inner", "layers"))][:2]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=layers, modules_to_save=whole))
    assert learning_rate(adapted, [TOKENS], steps=48).new_head == is_new
    # Loaded to be served it trains nothing.
    assert learning_rate(adapted.requires_grad_(False), [TOKENS], steps=48).new_head == is_new


def test_a_head_that_peft_does_not_train_is_not_new():
    """PEFT knows the heads of a task by two names, and Bart's has a third: it stays as it began."""
    sizes = dict(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                 decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=2)  # fmt: skip
    batch = {"input_ids": torch.tensor([[3, 4, 2], [5, 6, 2]])}
    for whole, is_new in ((None, False), (["classification_head"], True)):
        model = BartForSequenceClassification(BartConfig(**sizes)).eval()
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=whole)
        assert learning_rate(get_peft_model(model, config), [batch], steps=48).new_head == is_new
        plain = BartForSequenceClassification(BartConfig(**sizes)).eval()
        stats = collect(plain, [batch], ["q_proj"], rank=2, task_type="SEQ_CLS")
        assert build_adapter(stats, 2, modules_to_save=whole).rate.new_head == is_new


def test_a_scaling_below_zero_counts_by_its_size_and_zero_says_nothing():
    rates = []
    for alpha in (8, -8):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
        rates.append(learning_rate(model, [TOKENS], steps=48).rate)
    assert rates[0] == pytest.approx(rates[1])
    for layer in adapter_layers(model).values():
        layer.scaling["default"] = 0.0
    refused("no layer", learning_rate, model, [TOKENS], steps=48)
    refused("freeze_a='no': true or false is expected", learning_rate, model, [TOKENS], freeze_a="no")


def test_an_adapter_that_another_module_holds_has_its_own_configuration():
    inner = tiny_bert()
    adapted = get_peft_model(inner, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert learning_rate(Held(adapted), [TOKENS], steps=48).new_head


@pytest.mark.parametrize("kind", WHOLE)
def test_a_new_head_is_what_is_trained_whole_whatever_the_task_is_called(kind):
    """Also where the model is wrapped, as DistributedDataParallel does, and where the pass of `init` tells the rate."""
    make, whole, batch, is_new = WHOLE[kind]
    layers = [*find_targets(make()).layers][:2]
    adapted = get_peft_model(make(), LoraConfig(r=2, target_modules=layers, **whole))
    for model in (adapted, nn.DataParallel(adapted)):
        assert learning_rate(model, [batch], steps=48).new_head == is_new
    if not whole:
        return  # our own passes see that it is a classifier
    stats = collect(make(), [batch], layers, rank=2, task_type=whole.get("task_type"))
    assert build_adapter(stats, 2, modules_to_save=whole.get("modules_to_save")).rate.new_head == is_new


def test_a_layer_whose_output_is_zero_is_left_out_and_named():
    model = tiny(bias=False)
    nn.init.zeros_(model[2].weight)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
    found = learning_rate(model, batches(), steps=9)
    assert found.left_out == ["2"] and found.layers == ["0"]


def test_an_older_file_has_no_sizes_and_its_adapter_says_how_to_get_a_rate():
    stats = replace(collect(tiny(), batches(), rank=2), sizes={})
    init = build_adapter(stats, 2)
    assert init.rate is None and init.recommended is None
    assert "`lora-init rate` measures it" in init.how_to_train


def test_without_a_length_the_rate_is_for_an_epoch_of_the_rows():
    stats = collect(tiny(), batches(), rank=2)
    rows = replace(stats, provenance=replace(stats.provenance, settings={"rows": 4000}))
    assert build_adapter(rows, 2).rate.length == TrainingLength.plan(4000) != build_adapter(stats, 2).rate.length


def test_a_head_that_is_known_not_to_train_raises_no_rate():
    stats = collect(tiny_bert(), batches_for("bert"), ["query"], rank=2, task_type="SEQ_CLS")
    init = build_adapter(stats, 2)
    found = [replace(init, trains_head=trains).rate.new_head for trains in (None, True, False)]
    assert found == [True, True, False]


@pytest.mark.parametrize(("rows", "batch_size"), [(9, 8), (5, 8), (1, 8), (33, 32), (48, 8), (7, 1)])
def test_epochs_that_are_said_are_those_that_the_rate_is_divided_by(rows, batch_size):
    assert TrainingLength.plan(rows, epochs=3, batch_size=batch_size).epochs == 3.0


@pytest.mark.parametrize(("length", "words"), [
    (TrainingLength(48), "2.9e-3 for 48 steps of 8. The best rate is likely between 1.4e-3 and 5.8e-3."),
    (
        TrainingLength(18, why="an epoch"),
        "3.4e-3 for 18 steps of 8 (an epoch). The best rate is likely between 1.6e-3 and 7e-3 (extrapolated: measured "
        "were 24 to 1600 steps).",
    ),
    (TrainingLength(24), "3.3e-3 for 24 steps of 8. The best rate is likely between 1.6e-3 and 6.7e-3."),
    (TrainingLength(1600), "1.6e-3 for 1600 steps of 8. The best rate is likely between 5.9e-4 and 4.3e-3."),
    (
        TrainingLength(48, 128),
        "7.3e-3 for 48 steps of 128. The best rate is not known for such a training, and likely between 1.5e-3 and "
        "3.4e-2: try 3.4e-3 and 1.6e-2.",
    ),
    (
        TrainingLength(1900, 256),
        "5e-3 for 1900 steps of 256. The best rate is not known for such a training, and likely between 6.7e-4 and "
        "3.7e-2: try 1.8e-3 and 1.4e-2 (extrapolated: measured were 24 to 1600 steps and steps of at most 128 "
        "examples).",
    ),
    (
        TrainingLength(480, rows=900),
        "3.5e-4 for 480 steps of 8 (4.2 epochs of 900 examples). The best rate is likely between 1.2e-4 and 1.1e-3.",
    ),
    (
        TrainingLength(1250, rows=1000),
        "1.1e-4 for 1250 steps of 8 (10.0 epochs of 1,000 examples). The best rate is not known for such a training, "
        "and likely between 2.5e-5 and 4.9e-4: try 5.2e-5 and 2.3e-4.",
    ),
])  # fmt: skip
def test_the_sentence_names_the_rate_the_length_the_range_and_what_is_extrapolated(length, words):
    rate, _, rest = words.partition(" for ")
    assert str(LearningRate(ONE, length)) == f"Train with AdamW at {rate}, warm-up 10%, cosine, for {rest}"


def test_a_trainer_is_told_rate_warm_up_schedule_and_optimizer():
    expected = {"learning_rate": 2.9e-3, "warmup": 0.1, "schedule": "cosine", "optimizer": "AdamW"}
    assert LearningRate(ONE, TrainingLength(48)).training == expected
    asked = "Train with AdamW at 3e-4, warm-up 10%, cosine, as you asked for it."
    assert training_in_words(LearningRate(ONE, TrainingLength(48)), 3e-4) == training_in_words(None, 3e-4) == asked


@pytest.mark.parametrize(("response", "rate"), [(1e12, 5.8e-15), (1e-4, 58.0)])
def test_a_rate_is_found_however_large_layers_are(response, rate):
    assert LearningRate({"layer": Response(response, 0.0)}, TrainingLength(48)).rate == rate


def test_fused_experts_count_as_the_two_layers_that_they_hold():
    one, other = Response(1.0, 3.0), Response(64.0, 500.0)
    fused = LearningRate({"mlp.experts.gate_up_proj": one, "up_proj": other}, TrainingLength(48))
    apart = LearningRate({"gate": one, "up": one, "up_proj": other}, TrainingLength(48))
    assert fused.rate == apart.rate == pytest.approx(CHANGE / 4, rel=0.05)


def test_the_layer_that_moves_most_at_the_rate_comes_first():
    layers = {"low": Response(1.0, 0.0), "by both": Response(2.0, 900.0), "by b": Response(3.0, 0.0)}
    rate = LearningRate(layers, TrainingLength(48))
    assert 1 / 900 < rate.rate < 2 / 900 * 10 and rate.layers == ["by both", "by b", "low"]
    lower = LearningRate({name: Response(*pair) for name, pair in layers.items()}, TrainingLength(48, rows=8))
    assert lower.rate < 1 / 900 and lower.layers == ["by b", "by both", "low"]


def test_a_response_is_the_move_over_the_output():
    sizes = Sizes(6.0, 4.0)  # input, output
    assert response(sizes, 3.0, 8, 0.5) == (0.5 * 3.0 / 4.0, 0.5 * GROWTH * 8 * 6.0 / 2 / 4.0)
    assert response(sizes, 3.0, 4, -0.5, freeze_a=True) == (0.5 * 2**0.25 * 3.0 / 4.0, 0.0)
    for size, ax, scaling in ((0.0, 3.0, 0.5), (math.nan, 3.0, 0.5), (4.0, 0.0, 0.5), (4.0, 3.0, 0.0)):
        assert response(Sizes(6.0, size), ax, 8, scaling) is None


@pytest.mark.parametrize(("n_layers", "n_linear", "share"), [(0, 0, 1), (1, 99, 2 / 7), (3, 6, 0.5), (8, 6, 1)])
def test_the_share_is_1_at_most_and_as_low_as_was_measured(n_layers, n_linear, share):
    assert share_of(n_layers, n_linear) == share


def test_a_rate_is_stored_as_plain_values_of_four_digits():
    length = TrainingLength(100, 16, 1600, "why", 2.5)
    assert LearningRate({"a": Response(1.23456, 7.0)}, length, True, ("x", "y"), 0.5).stored() == {
        "responses": {"a": [1.235, 7.0]}, "steps": 100, "batch_size": 16, "rows": 1600, "why": "why", "seen": 2.5,
        "new_head": True, "left_out": ["x", "y"], "share": 0.5,
    }  # fmt: skip


def test_the_range_widens_with_the_distance_from_what_was_measured():
    near, *far = (
        math.log(LearningRate(ONE, length).within) / 2
        for length in (TrainingLength(48), TrainingLength(480), TrainingLength(48, 64), TrainingLength(48, rows=48))
    )
    grown = [0.1 * math.log(10), 0.25 * math.log(8), 0.25 * math.log(8)]
    assert near == pytest.approx(0.35) and far == pytest.approx([math.hypot(0.35, one) for one in grown])
    near = math.exp(2 * near)
    new_head = LearningRate(ONE, TrainingLength(200, rows=533), new_head=True)
    assert new_head.within == pytest.approx(near, rel=0.02)
    assert new_head.range == pytest.approx([new_head.rate / near, new_head.rate * near], rel=0.05)


def test_a_record_keeps_the_length_and_takes_another():
    rate = LearningRate(ONE, TrainingLength(480, 16, rows=1920), new_head=True)
    stored = rate.stored()
    assert replace(LearningRate.read(stored), left_out=()) == rate
    assert LearningRate.read(stored, steps=100).length == TrainingLength(100, 16, 1920)
    assert LearningRate.read(stored, epochs=2).length.steps == 240
    assert LearningRate.read(stored, train_batch_size=32).length.steps == 240  # the four epochs of the record
    assert LearningRate.read(stored | {"rows": None}, train_batch_size=32).length == TrainingLength(480, 32)
    older = LearningRate.read({name: stored[name] for name in ("responses", "steps")})
    assert older == LearningRate(ONE, TrainingLength(480))
    short = LearningRate.read(replace(rate, length=TrainingLength(8, 16, 1600, seen=3.0)).stored(), train_batch_size=32)
    assert short.length == TrainingLength(4, 32, 1600, "0.08 epochs of 1,600 examples in batches of 32", 3.0)


def test_dora_has_the_rate_of_the_same_adapter_without_it_and_stays_dora():
    init = build_adapter(collect(tiny(), batches(), rank=2), 2, use_dora=True)
    adapted = init.apply(tiny())
    assert replace(init, use_dora=False).rate.rate == init.rate.rate
    assert learning_rate(adapted, batches(), steps=100).rate == pytest.approx(
        replace(init, length=TrainingLength(100)).rate.rate, rel=0.1
    )
    assert adapted.base_model.model[0].lora_variant


def test_a_part_that_was_compiled_and_has_run_changes_no_rate():
    def measured(compiled):
        torch.manual_seed(0)
        part = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "value"]))
        if compiled:
            part = torch.compile(part, backend="eager")
            part(**TOKENS)  # its graph is from before the hooks
        return learning_rate(Held(part), [TOKENS], steps=48)

    plain, compiled = measured(False), measured(True)
    assert (compiled.rate, compiled.share, compiled.layers) == (plain.rate, plain.share, plain.layers)


def test_an_adapter_of_another_method_is_no_lora_adapter(tokens):
    other = get_peft_model(tiny_llama(), AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]))
    assert "has no LoRA adapter 'default'" in refused("", learning_rate, other, [tokens])


def test_how_often_an_example_is_drawn_goes_with_the_length():
    drawn = LearningRate(ONE, TrainingLength(100, 8, 40, seen=20.0))
    assert LearningRate.read(drawn.stored(), steps=400).length.epochs == 80.0 == drawn.of_steps(400).length.epochs


def test_a_whole_number_of_a_settings_file_is_a_number_of_steps():
    assert TrainingLength(1e3, 8.0) == TrainingLength(1000, 8) and str(TrainingLength(1e3, 8.0)) == "1000 steps of 8"
    refused("steps=100.5, expected a whole number", TrainingLength, 100.5)


def test_a_head_that_was_set_to_train_by_hand_is_new():
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"], bias="all"))
    assert not learning_rate(model, [TOKENS], steps=100).new_head  # of whose head the bias trains
    model.get_base_model().classifier.requires_grad_(True)
    found = learning_rate(model, [TOKENS], steps=100)
    told = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    assert learning_rate(model, [TOKENS], steps=100).new_head
    assert found.new_head and found.rate / learning_rate(told, [TOKENS], steps=100).rate == pytest.approx(1.0, rel=0.2)


def test_a_language_model_trains_no_new_head_whatever_its_task_is_called():
    rates = []
    for task in ("CAUSAL_LM", "SEQ_CLS"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type=task)
        rates.append(learning_rate(get_peft_model(tiny_llama(), config), [TOKENS], steps=100))
    assert rates[0] == rates[1] and not rates[1].new_head
    model = get_peft_model(tiny_llama(), config).requires_grad_(False)  # as an adapter is loaded to be served
    assert not learning_rate(model, [TOKENS], steps=100).new_head
    body = get_peft_model(tiny_llama().model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert learning_rate(body, [TOKENS], steps=100).new_head  # which it is yet to get


class Scored(LlamaForCausalLM):
    """A language model with a head of one's own beside it."""

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(32, 2)


def test_a_language_model_with_a_head_of_ones_own_may_be_a_classifier():
    model = Scored(tiny_llama().config).eval()
    adapted = initialize(model, [TOKENS], rank=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    assert learning_rate(adapted, [TOKENS], steps=100).new_head
    assert adapted.base_model.model.score.modules_to_save["default"].weight.requires_grad


def test_a_head_that_was_frozen_by_hand_is_not_new():
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    trained = learning_rate(model, [TOKENS], steps=100)
    model.get_base_model().classifier.requires_grad_(False)
    assert trained.new_head and not learning_rate(model, [TOKENS], steps=100).new_head
    model.requires_grad_(False)  # as an adapter is loaded to be served: then its config says what is trained
    assert learning_rate(model, [TOKENS], steps=100).new_head


def test_a_head_with_an_adapter_on_it_is_new_if_its_own_weight_was_set_to_train_by_hand():
    model = get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query", "classifier"]))
    adapted = learning_rate(model, [TOKENS], steps=100)
    model.get_base_model().classifier.base_layer.requires_grad_(True)
    assert not adapted.new_head and learning_rate(model, [TOKENS], steps=100).new_head


def test_a_body_or_a_language_model_that_trains_whole_has_no_new_head():
    model = llama_with()
    model.requires_grad_(True)
    assert not learning_rate(model, [TOKENS], steps=100).new_head


def test_a_layer_that_no_batch_runs_is_left_out_of_the_rate():
    model = tiny_llama()
    model.model.idle_proj = torch.nn.Linear(32, 32)
    alone = learning_rate(llama_with("q_proj"), [TOKENS], steps=10)
    with_idle = learning_rate(
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "idle_proj"])), [TOKENS], steps=10
    )
    assert [*with_idle.left_out] == ["model.idle_proj"] and with_idle.layers == alone.layers


def test_no_more_than_eight_batches_are_read():
    left = [TOKENS] * 20
    learning_rate(llama_with("q_proj"), (left.pop() for _ in range(20)), steps=10)
    assert len(left) == 20 - 8


def test_how_often_an_example_is_drawn_is_read_again():
    drawn = LearningRate(ONE, TrainingLength(100, 8, 40, seen=7.0))
    assert LearningRate.read(drawn.stored()).length == drawn.length and drawn.length.epochs == 7.0


def test_the_length_of_the_training_is_in_examples_where_texts_are_given(llama):
    adapted = get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    texts = [{"text": text} for text in ["the cat sat", "a dog ran", "the dog sat"] * 4]
    tokenizer = word_tokenizer()
    found = learning_rate(adapted, texts, tokenizer=tokenizer, epochs=3, train_batch_size=6)
    assert str(found.length) == "6 steps of 6 (3 epochs of 12 examples in batches of 6)"
    assert learning_rate(adapted, texts, tokenizer=tokenizer, steps=4, train_batch_size=3).length.steps == 4
    assert str(learning_rate(adapted, texts, tokenizer=tokenizer).length).startswith("2 steps of 8 (an epoch of 12")


def test_a_layer_counts_where_a_or_b_trains():
    model = llama_with("q_proj", "v_proj")
    names = [*learning_rate(model, [TOKENS], steps=48).responses]
    _, of_b, of_a, of_none = (adapter_layers(model)[name] for name in names)
    of_b.lora_A["default"].requires_grad_(False)
    of_a.lora_B["default"].requires_grad_(False)
    for part in (of_none.lora_A, of_none.lora_B):
        part.requires_grad_(False)
    found = learning_rate(model, [TOKENS], steps=48)
    assert [*found.responses] == names[:3] and not found.left_out
    assert [one.quadratic > 0 for one in found.responses.values()] == [True, False, True]


def test_an_adapter_on_the_output_embedding_is_measured_too():
    found = learning_rate(llama_with("q_proj", "lm_head"), [TOKENS], steps=48)
    assert "lm_head" in found.responses and len(found.responses) == 3 and not found.left_out


@pytest.mark.parametrize(("settings", "steps", "expected"), [
    (dict(lr_scheduler_type="cosine", warmup_steps=6), 10, "cosine (a warm-up of 6 of 10 steps)"),
    (dict(lr_scheduler_type="cosine", warmup_steps=5), 10, "cosine"),
    (dict(lr_scheduler_type="linear", warmup_steps=1), 1, "linear"),
    (dict(lr_scheduler_type="cosine", warmup_steps=9, lr_scheduler_kwargs={"num_cycles": 3}), 10,
     "cosine (num_cycles=3, a warm-up of 9 of 10 steps)"),
])  # fmt: skip
def test_a_warm_up_of_more_than_half_of_the_steps_is_a_part_of_the_schedule(settings, steps, expected):
    asked = TrainingArguments(**settings)
    assert schedule_of(asked, None, steps) == expected
    asked.lr_scheduler_type = asked.lr_scheduler_type.value  # as a tool may write it
    assert schedule_of(asked, None, steps) == expected


def test_the_warm_up_of_a_schedule_that_is_there_already_is_its_own():
    """Whatever the arguments say of one."""
    asked, adam = TrainingArguments(lr_scheduler_type="cosine", warmup_steps=7), torch.optim.AdamW([torch.ones(1)])
    for steps, expected in ((1, "cosine"), (4, "cosine"), (5, "LambdaLR")):
        assert schedule_of(asked, get_cosine_schedule_with_warmup(adam, steps, 8), 8) == expected
    assert schedule_of(asked, None, 8) == "cosine (a warm-up of 7 of 8 steps)"


def test_the_kinds_of_adamw_in_transformers_are_known_and_none_else():
    names = {one.value for one in OptimizerNames}
    assert {name for name in names if is_adamw(name)} == {
        name for name in names if name.startswith(("adamw", "paged_adamw"))
    }
    for name in ("AdamW", "FusedAdam", "AnyPrecisionAdamW", "PagedAdamW8bit", "adam"):
        assert is_adamw(name)


def test_a_rate_is_set_for_models_of_text_and_for_others_with_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_measured("AdamW", True, "it", tiny_llama())
    with pytest.warns(lora_init.errors.LoraInitWarning, match="and ViTForImageClassification reads none: tune it"):
        check_measured("AdamW", True, "it", tiny_vit())
    refused(
        "^learning_rate='measured': no rate was measured for the loss of it. ", check_measured, "AdamW", False, "it", 0
    )


def test_a_length_says_how_often_examples_are_drawn():
    assert str(TrainingLength(100, 8, 40, seen=7.25)) == "100 steps of 8 (each drawn 7.2 times)"
    assert str(TrainingLength(100, 8, 40, seen=1.04)) == "100 steps of 8"
    assert str(TrainingLength(100, 8, 40, "a word", 7.0)) == "100 steps of 8 (a word)"


def test_a_record_keeps_the_words_the_layers_left_out_and_the_share():
    rate = LearningRate(ONE, TrainingLength(48, 8, 480, "a word"), left_out=["x", "y"], share=0.5)
    assert LearningRate.read(rate.stored()) == rate


def test_a_schedule_that_accelerate_holds_is_the_one_inside():
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.ones(1)], lr=1.0), lambda step: 1.0)
    assert made_by_torch(SimpleNamespace(scheduler=schedule)) is made_by_torch(schedule) is schedule


@pytest.fixture
def told(monkeypatch):
    """What processes tell each other, as one after the other in this one. Emptied, it is as if none had begun."""
    values = []

    class Together(Processes):
        def gather(self, value):
            values.append(value)
            return [*values]

    monkeypatch.setattr(measured_rate, "Processes", Together)
    return values


def test_processes_with_batches_of_their_own_measure_one_rate(told):
    model = initialize(tiny_llama(), data := batches_for("llama"), rank=2)
    alone = learning_rate(model, data)
    told.clear()
    first, together = learning_rate(model, data[1:]), learning_rate(model, data[:1])
    assert together.responses.keys() == alone.responses.keys()
    for name, one in alone.responses.items():
        assert together.responses[name] == pytest.approx(one, rel=1e-6)
        assert first.responses[name].linear != pytest.approx(one.linear, rel=1e-4)


@pytest.mark.parametrize("own", ["none", "masked"])
def test_a_process_without_a_token_measures_the_rate_of_the_others(own, told, monkeypatch):
    model = initialize(tiny_llama(), data := batches_for("llama"), rank=2)
    others = learning_rate(model, data)
    masked = [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])} for batch in data]
    monkeypatch.setattr(measured_rate, "check_batches", lambda *words: None)
    idle = learning_rate(model, iter([]) if own == "none" else masked)
    assert len(told) == 2 and idle.responses == others.responses
