"""`find_targets` selects what `get_peft_model` adapts: the same model, the same argument, the same layers."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_init import LoraInitError, find_targets
from lora_init.layers import targets
from lora_init.layers.targets import read_target, trains_new_head
from tests.conftest import MODELS, refused, tiny_bert, tiny_llama

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
    with pytest.warns(UserWarning, match=r"^exclude_modules='q_prj' matches nothing in Llama.* names: 'q_proj'"):
        found = find_targets(tiny_llama(), ["q_proj", "v_proj"], exclude_modules=["q_prj", "v_proj"])
    assert {name.rpartition(".")[2] for name in found.layers} == {"q_proj"}
    with warnings.catch_warnings():  # negative: a list whose names all match something, and expressions
        warnings.simplefilter("error")
        find_targets(tiny_llama(), ["q_proj", "layers.1.mlp.up_proj"], exclude_modules=["lm_head"])
        find_targets(tiny_llama(), r".*(q_proj|none)", exclude_modules=r".*\.7\..*")


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
