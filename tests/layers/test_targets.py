"""`find_targets` selects what `get_peft_model` adapts: the same model, the same argument, the same layers."""

import copy
import math
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, PretrainedConfig, PreTrainedModel

from lora_init import LoraInitError, find_targets, initialize
from lora_init.layers import targets
from lora_init.layers.targets import (
    Target,
    count_linear,
    file_prefixes,
    heads_of,
    is_in,
    matches,
    new_heads,
    read_target,
    trains_new_head,
)
from tests.conftest import MODELS, batches_for, refused, tiny_bert, tiny_llama

ARGUMENTS = [
    dict(target_modules="all-linear"),
    dict(target_modules="ALL-linear", exclude_modules=["q_proj", "query", "q", "c_attn"]),
    dict(target_modules=["q_proj", "v_proj"]),
    dict(target_modules=["query"]),
    dict(target_modules=["c_attn", "c_proj"]),
    dict(target_modules=["q", "wi_0", "k"]),
    dict(target_modules=r".*\.(0|1)\..*(q_proj|query|c_fc|\.q|fc1|intermediate\.dense)", exclude_modules=r".*\.1\..*"),
    dict(target_modules=r".*(down_proj|c_proj|wo|output\.dense|fc2)"),
]


def adapted_by_peft(model, **arguments):
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **arguments))
    prefix = "base_model.model."
    return [name.removeprefix(prefix) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]


@pytest.mark.filterwarnings("ignore:.*_modules")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: str(a["target_modules"])[:24])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_same_layers_as_peft(name, arguments):
    model = MODELS[name]()
    try:
        expected = adapted_by_peft(model, **arguments)
    except ValueError:  # PEFT finds nothing
        with pytest.raises(LoraInitError):
            find_targets(model, **arguments)
        return
    found = find_targets(model, **arguments)
    assert list(found.layers) == expected
    assert not found.unsupported


@pytest.mark.filterwarnings("ignore:.*_modules")
@pytest.mark.parametrize("targets", ["all-linear", ["query", "HEAD"], r".*(value|classifier|qa_outputs)"])
@pytest.mark.parametrize(("task", "task_type"), [
    ("SequenceClassification", "SEQ_CLS"),
    ("TokenClassification", "TOKEN_CLS"),
    ("QuestionAnswering", "QUESTION_ANS"),
])  # fmt: skip
def test_a_head_that_peft_trains_whole_is_left_out(task, task_type, targets):
    model = tiny_bert(task)
    head = "qa_outputs" if task_type == "QUESTION_ANS" else "classifier"
    targets = [head if name == "HEAD" else name for name in targets] if isinstance(targets, list) else targets
    found = list(find_targets(model, targets, task_type=task_type).layers)
    if task_type == "SEQ_CLS":  # for the others PEFT adapts the head, then fails to wrap it
        assert found == adapted_by_peft(model, target_modules=targets, task_type=task_type)
    assert head not in found
    assert (head in find_targets(model, targets).layers) == (head in str(targets) or targets == "all-linear")


def test_widths_and_kinds():
    for name, build in MODELS.items():
        for target in find_targets(build()).layers.values():
            module = build().get_submodule(target.name)
            weight = module.weight.T if name == "gpt2" else module.weight
            assert (target.out_features, target.in_features) == tuple(weight.shape)
            assert target.kind == type(module).__name__
            assert target.parameters(3) == 3 * sum(weight.shape)


def test_each_name_in_a_list_has_to_match():
    with pytest.raises(LoraInitError, match=r"^target_modules=\['v_porj'\] matches no layer of .* names: 'v_proj'"):
        find_targets(tiny_llama(), ["q_proj", "v_porj"])
    with pytest.warns(UserWarning, match=r"^exclude_modules='q_prj' matches no layer of Llama.* names: 'q_proj'"):
        found = find_targets(tiny_llama(), ["q_proj", "v_proj"], exclude_modules=["q_prj", "v_proj"])
    assert {name.rpartition(".")[2] for name in found.layers} == {"q_proj"}
    with warnings.catch_warnings():  # negative: a list whose names all match something, and expressions
        warnings.simplefilter("error")
        find_targets(tiny_llama(), ["q_proj", "layers.1.mlp.up_proj"], exclude_modules=["lm_head"])
        find_targets(tiny_llama(), r".*(q_proj|none)", exclude_modules=r".*\.v_proj")


@pytest.mark.parametrize(("exclude", "named"), [
    ("q_proj", "q_proj"), ("q_proj|v_proj", "q_proj|v_proj"), (r".*\.7\..*", r".*\.7\..*"),
    ("model.layers.0", "model.layers.0"), (["self_attn"], "self_attn"), (["q_proj", "layers.0"], "layers.0"),
])  # fmt: skip
def test_what_excludes_no_layer_is_named(exclude, named):
    with pytest.warns(UserWarning) as said:
        found = find_targets(tiny_llama(), exclude_modules=exclude)
    (text,) = (str(one.message) for one in said)
    assert text.startswith(f"exclude_modules={named!r} matches no layer of LlamaForCausalLM. "), text
    if named in ("model.layers.0", "self_attn", "layers.0"):  # the expression that is named leaves out what was meant
        (expression,) = re.findall(r"expression: '(.*)'\.$", text)
        left = find_targets(tiny_llama(), exclude_modules=expression).layers
        assert left and not any(named in name for name in left)
    assert len(found.layers) == (12 if "q_proj" in exclude and isinstance(exclude, list) else 14)


def test_blocks_that_a_config_excludes_are_named_too():
    """PEFT is silent of them."""
    config = LoraConfig(target_modules="all-linear", exclude_modules=["self_attn", "up_proj"])
    with pytest.warns(UserWarning) as said:
        model = initialize(tiny_llama(), batches_for("llama"), config=config, progress=False)
    ours = [str(one.message) for one in said if "exclude_modules" in str(one.message)]
    assert len(ours) == 1 and ours[0].startswith("exclude_modules='self_attn' matches no layer of LlamaForCausalLM."), (
        ours
    )
    assert "up_proj" not in str(model.peft_config["default"].target_modules)


@pytest.mark.parametrize(("exclude", "left"), [
    ("attention", {"gate_proj", "up_proj", "down_proj"}), ("MLP", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ("cross-attention", None), ("cross_attention", None),
])  # fmt: skip
def test_a_purpose_is_excluded_as_it_is_targeted(exclude, left):
    if left is None:
        said = f"^exclude_modules='{exclude}': LlamaForCausalLM has no such layers. It has attention "
        refused(said, find_targets, tiny_llama(), exclude_modules=exclude)
        return
    found = find_targets(tiny_llama(), exclude_modules=exclude)
    assert {name.rpartition(".")[2] for name in found.layers} == left and len(found.layers) == 2 * len(left)


class OfDimensions(nn.Module):
    """A module with a parameter of each number of dimensions, which is no linear layer."""

    def __init__(self):
        super().__init__()
        for n in range(1, 5):
            setattr(self, f"p{n}", nn.Parameter(torch.ones(*range(2, 2 + n))))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_parameter_is_a_weight_where_it_has_two_or_three_dimensions(n):
    model = nn.ModuleDict({"own": OfDimensions(), "layer": nn.Linear(4, 4)})
    if n in (2, 3):
        assert list(find_targets(model, ["layer"], target_parameters=[f"own.p{n}"]).layers) == ["layer"]
    else:
        said = rf"selects 'own\.p{n}' of shape \(2,.*which is no weight"
        refused(said, find_targets, model, ["layer"], target_parameters=[f"own.p{n}"])


def test_mistakes_get_one_clear_line():
    model = tiny_llama()
    refused(r"\['qproj'\] matches no layer of LlamaFor.* Closest names: 'q_proj' \(2 l", find_targets, model, ["qproj"])
    refused(r"matches no layer.*linear layers are named: 'q_proj'", find_targets, model, r"zzz.*")
    refused("is not a regular expression", find_targets, model, "(")
    refused("leaves no layer", find_targets, model, ["q_proj"], exclude_modules=["self_attn.q_proj"])
    refused("a LlamaMLP, and an adapter needs a linear layer", find_targets, model, ["mlp"])
    refused(r"^find_targets\(\) takes a model in this place and got str\.$", find_targets, "llama")
    for names in (5, ["q_proj", 5]):
        for argument in ("target_modules", "exclude_modules"):
            said = rf"^{argument}=.*5\]?: expected a regular expression, or a list of names\.$"
            refused(said, find_targets, model, **{argument: names})
    refused("linear layers are named: none", find_targets, nn.ModuleDict({"norm": nn.LayerNorm(3)}), ["q"])


TWO = "'{}' (2 layers)"


@pytest.mark.parametrize(("targets", "hint"), [
    (["qproj", "q_porj"], f"Closest names: {', '.join(map(TWO.format, ['q_proj', 'v_proj', 'o_proj']))}."),  # each once
    (["lm_haed"], "Closest names: 'lm_head' (1 layer)."),
    (r".*(k|v)_porj$", f"Closest names: {', '.join(map(TWO.format, ['v_proj', 'q_proj', 'o_proj']))}."),
    ("zzz.*", "Its linear layers are named: " + ", ".join(
        TWO.format(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ) + "."),
])  # fmt: skip
def test_what_matches_nothing_is_answered_with_names_that_there_are(targets, hint):
    assert refused("matches no layer of LlamaForCausalLM", find_targets, tiny_llama(), targets).endswith(f"LM. {hint}")


def test_an_expression_that_takes_exponential_time_is_refused_in_a_moment(monkeypatch):
    monkeypatch.setattr(targets, "_PATIENCE", 0.01)
    slow = r"(a|\w|.)+\.(a|\w|.)+!"
    said = refused("was not matched with 'model.* within 0.01 s, as happens with", find_targets, tiny_llama(), slow)
    assert said.startswith(f"target_modules={slow!r} ") and said.endswith("Write it without, or name layers.")
    exclude = dict(exclude_modules=slow)
    assert refused("within 0.01 s", find_targets, tiny_llama(), ["q_proj"], **exclude).startswith("exclude_modules=")


@pytest.mark.parametrize(("build", "extras"), [
    (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), {"kernel": [3, 2], "groups": 2}),
    (lambda: nn.Conv1d(4, 6, 3), {"kernel": [3], "groups": 1}),
    (lambda: nn.Linear(4, 6), {}),
])  # fmt: skip
def test_a_layer_is_read_back_from_what_files_have_of_it(build, extras):
    layer = find_targets(nn.ModuleDict({"own": build()}), ["own"]).layers["own"]
    assert layer.extras() == extras
    assert read_target("own", layer.kind, layer.in_features, layer.out_features, extras) == layer


def test_a_body_alone_gets_the_head_of_its_task():
    assert trains_new_head([], "SEQ_CLS", ()) and not trains_new_head([], "CAUSAL_LM", ())
    assert not trains_new_head(["head"], "SEQ_CLS", ()) and trains_new_head(["head"], None, ["head"])
    assert trains_new_head(["body.head", "value"], None, ["value"])


LINEAR = Target("a.up", "Linear", 6, 4)
GROUPED = Target("c", "Conv2d", 12, 8, (3, 2), 2)
FUSED = Target("m.experts.down", "E", 6, 4, experts=3)


@pytest.mark.parametrize(("target", "shapes", "module", "extras"), [
    (LINEAR, ((2, 6), (4, 2)), "a.up", {}),
    (GROUPED, ((2, 2, 3, 2), (8, 1, 1, 1)), "c", {"kernel": [3, 2], "groups": 2}),
    (FUSED, ((6, 6), (4, 6)), "m.experts", {"experts": 3}),
])  # fmt: skip
def test_the_parameters_of_a_pair_are_those_of_its_shapes(target, shapes, module, extras):
    assert target.shapes(2) == shapes and target.module == module and target.extras() == extras
    a, b = map(math.prod, shapes)
    assert target.parameters(2) == 2 * target.cost == a + b and target.parameters(0, use_dora=True) == 0
    assert target.parameters(2, freeze_a=True) == b
    assert target.parameters(2, use_dora=True) == a + b + target.out_features
    assert target.parameters(2, freeze_a=True, use_dora=True) == b + target.out_features
    assert target.parameters(0, freeze_a=True, use_dora=True) == 0
    read = read_target(target.name, target.kind, target.in_features, target.out_features, extras)
    assert read == target


@pytest.mark.parametrize(("d_in", "d_out", "extras"), [
    (0, 4, {}), (4, 0, {}), (-1, 4, {}), (2**24 + 1, 4, {}), (4, 2**24 + 1, {}), (4, 4, {"kernel": [0]}),
    (4, 4, {"kernel": [3]}), (4, 4, {"groups": 0}), (4, 4, {"experts": -1}), (4, 4, {"experts": 2**16 + 1}),
])  # fmt: skip
def test_what_no_layer_can_have_is_damage(d_in, d_out, extras):
    with pytest.raises(ValueError, match=r"^widths of layer 'up'$"):
        read_target("up", "Linear", d_in, d_out, extras)
    widest = read_target("up", "E", 2**24, 2**24, {"experts": 2**16})
    assert (widest.in_features, widest.out_features, widest.experts) == (2**24, 2**24, 2**16)


def test_parameters_of_one_module_are_wrapped_the_last_outermost():
    layers = [Target("m.gate_up", "E", 2, 2, experts=2), LINEAR, Target("m.down", "E", 2, 2, experts=2)]
    assert file_prefixes(iter(layers)) == {
        "m.gate_up": "base_model.model.m.base_layer", "a.up": "base_model.model.a.up", "m.down": "base_model.model.m",
    }  # fmt: skip


@pytest.mark.parametrize(("patterns", "selected"), [
    (["up"], ["a.up"]),
    (["a.up", "b"], ["a.up"]),
    ([], []),
    ("a\\..*", ["a.up", "a.group"]),
    (".*up", ["a.up", "a.group"]),  # the whole name matches
    ("up", []),
])  # fmt: skip
def test_names_match_as_in_peft(patterns, selected):
    assert [name for name in ("a.up", "a.group", "c.down") if matches(patterns, name, "x")] == selected


@pytest.mark.parametrize(("name", "inside"), [
    ("score", True), ("a.score.dense", True), ("pre_score.dense", True), ("score_2", False), ("a.dense", False),
])  # fmt: skip
def test_what_is_in_a_module_that_is_trained_whole(name, inside):
    assert is_in(name, ["score", "classifier"]) is inside and not is_in(name, [])


def test_a_selection_without_a_linear_layer_says_why_of_the_first():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "attend": nn.MultiheadAttention(4, 2)})
    found = find_targets(model, ["embed", "attend"])
    assert found.layers == {} and found.unsupported == {"embed": "Embedding", "attend": "MultiheadAttention"}
    words = (
        "^target_modules selects only layers that cannot start from data: 'embed' is one since an embedding reads token"
        " ids, .* frequent tokens. Target a linear layer too, or leave these to PEFT's own initialization.$"
    )
    refused(words, found.check_layers)
    find_targets(tiny_llama(), ["embed_tokens", "q_proj"]).check_layers()


class Wrapped(nn.Module):
    """A user's own module around a library's model, with a layer of its own."""

    def __init__(self, body):
        super().__init__()
        self.body, self.own, self.table, self.norm = body, nn.Linear(2, 2), nn.Embedding(3, 2), nn.LayerNorm(2)


class Longer(LlamaModel):
    """A user's class that adds to a library's body."""

    def __init__(self, config):
        super().__init__(config)
        self.value, self.empty = nn.Linear(4, 1), nn.Identity()


class Speaking(Wrapped):
    """One whose own layer makes its logits."""

    def get_output_embeddings(self):
        return self.own


class Scratch(PreTrainedModel):
    """A user's class that derives from no model of a library."""

    config_class, base_model_prefix = PretrainedConfig, "body"

    def __init__(self, config):
        super().__init__(config)
        self.body, self.top = nn.Linear(2, 2), nn.Linear(2, 2)


class Extended(LlamaForCausalLM):
    """A user's class that adds to a library's."""

    def __init__(self, config):
        super().__init__(config)
        self.value, self.empty = nn.Linear(4, 1), nn.Identity()


@pytest.mark.parametrize(("build", "heads", "new"), [
    (tiny_llama, [], []),
    (tiny_bert, ["classifier"], ["classifier"]),
    (lambda: tiny_bert("QuestionAnswering"), ["qa_outputs"], ["qa_outputs"]),
    (lambda: tiny_bert(None), [], []),
    (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [], ["0"]),
    (lambda: Wrapped(tiny_llama()), [], ["own"]),
    (lambda: Wrapped(tiny_bert()), [], ["own", "body.classifier"]),
    (lambda: Extended(tiny_llama().config), [], ["value"]),
    (lambda: Longer(tiny_llama().config), [], ["value"]),
    (lambda: Speaking(tiny_llama()), [], []),
    (lambda: Scratch(PretrainedConfig()), ["top"], ["top"]),
    (lambda: nn.ModuleDict({"attend": nn.MultiheadAttention(2, 1)}), [], ["attend", "attend.out_proj"]),
])  # fmt: skip
def test_heads_that_begin_at_random(build, heads, new):
    model = build()
    assert heads_of(model) == heads_of(nn.DataParallel(model)) == heads and new_heads(model) == new


@pytest.mark.parametrize("library", ["transformers", "transformers_modules", "diffusers", "sentence_transformers"])
def test_what_a_users_class_has_beside_a_model_of_a_library_is_new(library):
    def made(module, **parts):
        return type("Model", (nn.ModuleDict,), {"__module__": module, "from_pretrained": None})(parts)

    body = made(f"{library}.models.some", up=nn.Linear(2, 2))
    assert new_heads(body) == new_heads(made(f"{library}.models.pair", inner=tiny_bert())) == []
    assert new_heads(made("own", body=body, head=nn.Linear(2, 2))) == ["head"]
    assert new_heads(made("own", body=made("own", up=nn.Linear(2, 2)), head=nn.Linear(2, 2))) == []


def test_what_an_adapter_adds_is_not_counted_among_the_linear_layers():
    name = "model.layers.0.self_attn.q_proj"
    for modules_to_save in (None, ["lm_head"]):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules_to_save)
        base = get_peft_model(tiny_llama(), config).get_base_model()
        assert count_linear(base, [name]) == count_linear(base, ["lm_head"]) == 14
    own, layer = OfDimensions(), nn.Linear(4, 4)
    for held in (own, nn.ModuleDict({"base_layer": own})):
        model = nn.ModuleDict({"own": held, "layer": layer})
        assert [count_linear(model, names) for names in (["layer"], ["layer", "own.p2"])] == [1, 2]


def test_a_layer_that_two_modules_hold_is_named():
    layer, block = nn.Linear(2, 2), nn.ModuleDict({"up": nn.Linear(2, 2)})
    several = nn.ModuleList([layer, nn.Linear(2, 2), layer])
    shared = nn.ModuleDict({"one": nn.ModuleDict({"up": layer}), "two": several})
    with pytest.warns(UserWarning, match="^one.up is one layer with two.0, two.2. PEFT adapts it in the first") as seen:
        assert list(find_targets(shared).layers) == ["one.up", "two.1"]
    assert len(seen) == 1 and str(seen[0].message).endswith("Leave it out: exclude_modules='one.up'.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(shared, exclude_modules=["one.up"])
        # A block in two places holds its layer once, and so PEFT's adapter acts in both.
        assert list(find_targets(nn.ModuleDict({"one": block, "two": block})).layers) == ["one.up"]


def test_the_head_of_a_task_is_not_counted_among_the_linear_layers_which_peft_trains_whole():
    counts = [count_linear(tiny_bert(), ["bert.pooler.dense"], task_type) for task_type in (None, "SEQ_CLS")]
    assert counts[0] == counts[1] + 1 == 14


def test_two_layers_of_one_part_are_of_that_part_and_one_alone_of_the_whole():
    text = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model = nn.ModuleDict({"text": text, "vision": nn.ModuleDict({"c": nn.Linear(4, 4)})})
    named = (["text.a", "text.b"], ["text.a"], ["text.a", "vision.c"])
    assert [count_linear(model, names) for names in named] == [2, 3, 3]


class Packed(nn.Module):
    """A linear layer of another library."""

    in_features = out_features = 2


def test_packed_layers_count_as_others_do_and_what_makes_the_logits_does_not():
    model = Wrapped(nn.ModuleDict({"up": Packed(), "down": nn.Linear(2, 2)}))
    model.own = Packed()
    assert count_linear(model, ["body.up"]) == 3
    model.get_output_embeddings = lambda: model.own
    assert count_linear(model, ["body.up"]) == 2


def test_a_class_is_a_linear_layer_of_transformers_by_its_name_and_its_width():
    named, filters = (type(name, (nn.Module,), {})() for name in ("Conv1D", "Filters"))
    filters.nf = 4
    model = nn.ModuleDict({"named": named, "filters": filters, "linear": nn.Linear(2, 2)})
    assert list(find_targets(model).layers) == ["linear"]
    refused("selects 'named', a Conv1D, and an adapter needs a linear layer", find_targets, model, ["named"])


def test_names_of_experts_are_explained_beside_others_that_match_nothing():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    refused(r"matches no layer of ModuleDict. It has the experts 0 to 1\.$", find_targets, model, ["up", "experts.5"])
