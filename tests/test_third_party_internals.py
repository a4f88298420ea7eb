"""Private parts of other libraries are taken in one file. Each test names the one that a new release has broken."""

import ast
import functools
import inspect
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_init
from lora_init import third_party_internals
from tests.conftest import tiny_bart_decoder, tiny_gpt2, tiny_llama
from tests.versions import needs_fused_experts

PACKAGE = Path(lora_init.__file__).parent
# What Python and IPython ask of objects, and what is documented in spite of its name.
PUBLIC = {"_repr_png_", "_exit"}
INTERNALS = {"__bases__", "__code__", "__wrapped__", "__closure__", "co_varnames", "co_names", "getsource", "unwrap"}


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def strangers(tree):
    """List the private names that a file takes of objects other than its own."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(attr=name):
                pass
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                pass
            case ast.Subscript(value=ast.Call(func=ast.Name(id="vars")), slice=ast.Constant(value=str(name))):
                pass
            case ast.ImportFrom(names=[*names], module=module) if not (module or "").startswith("lora_init"):
                yield from (alias.name for alias in names if alias.name.startswith("_"))
                continue
            case _:
                continue
        if name in INTERNALS or (name.startswith("_") and not name.startswith("__")):
            yield name


def own_names():
    """List the private names that this package defines: methods, functions, attributes, variables."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    yield name
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    yield name
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                    yield name


def test_no_other_file_takes_third_party_internals():
    ours = {*own_names()} | PUBLIC
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "third_party_internals.py"]
    found = {(path.name, name) for path in files for name in {*strangers(tree_of(path))} - ours}
    assert not found
    # Negative: the file that may has some of each kind.
    there = {*strangers(tree_of(PACKAGE / "third_party_internals.py"))}
    assert {"_version", "_hf_hook", "_dataloaders", "co_varnames"} <= there - ours


def test_each_function_has_its_test_here():
    functions = {name for name, _ in inspect.getmembers(third_party_internals, inspect.isfunction)}
    used = {node.attr for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Attribute)}
    assert functions | {"WRAPPED"} <= used


def test_torch_names_what_it_wraps():
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model)
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = [next(wrapped.named_children())[0] for wrapped in (compiled, checkpoint_wrapper(nn.Linear(2, 2)))]
    assert found == list(third_party_internals.WRAPPED[:2])
    source = Path(sys.modules["torch"].__file__).parent / "distributed" / "fsdp" / "_common_utils.py"
    assert f'FSDP_WRAPPED_MODULE = "{third_party_internals.WRAPPED[2]}"' in source.read_text()


def test_torch_counts_changes_in_place():
    x = torch.zeros(2)
    assert third_party_internals.version_of(x) == 0 and third_party_internals.version_of(x.add_(1)) == 1
    with torch.inference_mode():
        assert third_party_internals.version_of(torch.zeros(2).add_(1)) == 0


def test_torch_knows_whether_it_goes_backward():
    seen, x = [], torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(third_party_internals.goes_backward()))
    x.sum().backward()
    assert seen == [True] and not third_party_internals.goes_backward()


def test_accelerate_keeps_its_hook_with_the_module():
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer, hook = nn.Linear(2, 2), ModelHook()
    assert third_party_internals.hook_of(layer) is None
    add_hook_to_module(layer, hook)
    assert third_party_internals.hook_of(layer) is hook


def test_accelerate_forgets_one_loader():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.free_memory()
    kept, gone = (accelerator.prepare(torch.utils.data.DataLoader(range(4))) for _ in range(2))
    for loader in (kept, gone):
        iter(loader)
    third_party_internals.forget_loader(accelerator, gone)
    assert accelerator._dataloaders == [kept]


def test_variables_from_outside_can_be_set_back():
    n = 1

    def function():
        nonlocal n
        n += 1
        return later

    ((cell, value),) = third_party_internals.cells_of(function)  # and not the one that is not set yet
    function_before = value
    n = 5
    cell.cell_contents = function_before
    assert (n, value) == (1, 1)
    later = None
    assert len(third_party_internals.cells_of(function)) == 2 and later is None
    assert third_party_internals.cells_of(own_names) == []


def test_transformers_experts_have_a_gate():
    needs_fused_experts()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=8)
    config = Qwen3MoeConfig(**sizes, head_dim=4, moe_intermediate_size=6, num_experts=2, num_experts_per_tok=1)
    model = Qwen3MoeForCausalLM(config)
    experts = [module for module in model.modules() if third_party_internals.is_gated(module)]
    assert experts and not third_party_internals.is_gated(nn.Linear(2, 2))
    up = torch.randn(3, experts[0].gate_up_proj.shape[1])
    gate, linear = up.chunk(2, -1)
    torch.testing.assert_close(third_party_internals.apply_gate(experts[0], up), nn.functional.silu(gate) * linear)


@pytest.mark.parametrize(("build", "plain"), [(tiny_bart_decoder, True), (tiny_llama, False), (tiny_gpt2, False)])
def test_transformers_decoders_with_a_plain_loss_are_told(build, plain):
    model = build()
    assert third_party_internals.has_plain_loss(model) is plain
    batch = {name: torch.tensor([[3, 5, 7, 4]]) for name in ("input_ids", "labels")}
    output = model(**batch)
    aligned = nn.functional.cross_entropy(output.logits[0], batch["labels"][0])
    assert torch.isclose(output.loss, aligned) == plain  # what the name claims


@pytest.mark.parametrize(("forward", "module", "plain"), [
    (lambda self, logits: nn.CrossEntropyLoss()(logits), "transformers.models.x", True),
    (lambda self, logits: nn.CrossEntropyLoss()(logits), "theirs.transformers", False),
    (lambda self, logits: nn.functional.mse_loss(logits), "transformers.models.x", False),
    (lambda self, shift_logits: nn.CrossEntropyLoss()(shift_logits), "transformers.models.x", False),
    (lambda self, logits: self.loss_function(nn.CrossEntropyLoss, logits), "transformers.models.x", False),
])  # fmt: skip
def test_a_loss_is_plain_by_what_its_forward_names(forward, module, plain):
    made = type("XForCausalLM", (), {"forward": forward, "__module__": module})
    assert third_party_internals.has_plain_loss(made()) is plain


@pytest.mark.parametrize("name", ["XLMWithLMHeadModel", "FlaubertWithLMHeadModel", "ProphetNetForCausalLM"])
def test_transformers_has_three_more_whose_plain_loss_is_computed_elsewhere(name):
    import transformers

    assert third_party_internals.has_plain_loss(object.__new__(getattr(transformers, name)))


def test_a_function_is_written_where_it_and_what_it_wraps_stand():
    @functools.wraps(inspect.getsource)
    def patch(*given):
        return inspect.getsource(*given)

    assert third_party_internals.written_in(patch) == [__name__, "inspect"]
    assert third_party_internals.written_in(ast.NodeVisitor) == ["ast"]
    assert third_party_internals.written_in(functools.partial(patch)) == [""]


def test_typer_shows_the_error_that_all_wrong_words_are():
    import typer

    app = typer.Typer()
    app.command()(lambda: None)
    error = third_party_internals.usage_error()
    with pytest.raises(error, match="--nothing"):
        typer.main.get_command(app).main(["--nothing"], standalone_mode=False)
    assert issubclass(typer.BadParameter, error)


def test_typer_without_that_error_is_told(monkeypatch):
    monkeypatch.setattr("typer.BadParameter", ValueError)
    with pytest.raises(LookupError, match=r"typer\.BadParameter is no UsageError"):
        third_party_internals.usage_error()


def test_add_adapter_leaves_a_mark_that_a_peft_model_has_not():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"])
    assert not third_party_internals.has_added_adapter(get_peft_model(tiny_llama(), config).get_base_model())
    assert "self._hf_peft_config_loaded = True" in inspect.getsource(tiny_llama().add_adapter)
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert third_party_internals.has_added_adapter(model)
