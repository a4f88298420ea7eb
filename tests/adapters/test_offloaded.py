"""Models with weights that accelerate keeps elsewhere: what is computed is right, what would be lost is refused."""

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model

import lora_init
from lora_init import LoraInitError, build_adapter, collect, correct_base
from lora_init.adapters.peft_eva import initialize_lora_eva_weights
from lora_init.adapters.peft_model import check_in_memory
from tests.collection.made import labelled
from tests.conftest import batches_for, tiny_llama

accelerate = pytest.importorskip("accelerate")


def offloaded(model, folder):
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head"), "cpu")
    if hasattr(model.model, "rotary_emb"):
        places["model.rotary_emb"] = "cpu"
    return accelerate.dispatch_model(model, places | {"model.layers.1": "disk"}, main_device="cpu", offload_dir=folder)


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    return offloaded(tiny_llama(), tmp_path / "offloaded")


def plain():
    torch.manual_seed(0)
    return tiny_llama()


def test_a_start_is_refused_before_the_pass_and_saved_instead(model, tmp_path):
    def batches():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(LoraInitError, match=r"^initialize\(\): 7 of 14 layers are offloaded, the first is .*"):
        lora_init.initialize(model, batches(), rank=4)
    stats = collect(model, batches_for("llama"), rank=4, progress=False)
    init = build_adapter(stats, 4)
    expected = build_adapter(collect(plain(), batches_for("llama"), rank=4, progress=False), 4)
    for name, (a, _) in expected.weights.items():
        torch.testing.assert_close(init.weights[name].a, a)
    with pytest.raises(LoraInitError, match=r"^apply\(\): 7 of 14 layers are offloaded.*save_pretrained\(directory\)"):
        init.apply(model)
    assert not [name for name, _ in model.named_modules() if "lora_" in name]
    init.save_pretrained(tmp_path / "start")
    batch = batches_for("llama")[0]
    before = model(**batch).logits
    peft_model = PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    torch.testing.assert_close(peft_model(**batch).logits, before)


def test_layers_in_memory_take_an_adapter_whatever_others_do(model):
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    peft_model = lora_init.initialize(model, batches_for("llama"), rank=4, target_modules=names)
    expected = lora_init.initialize(plain(), batches_for("llama"), rank=4, target_modules=names)
    a = [p for name, p in peft_model.named_parameters() if "lora_A" in name]
    for mine, other in zip(a, (p for name, p in expected.named_parameters() if "lora_A" in name), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_base_is_not_corrected_in_part(model, tmp_path):
    stats = collect(plain(), labelled("llama"), rank=4, gradients=True, progress=False)
    build_adapter(stats, 4, "lora-ga").save_pretrained(tmp_path / "start")
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if not p.is_meta})
    with pytest.raises(LoraInitError, match=r"layer 'model.layers.1.*' is offloaded or sharded"):
        correct_base(model, tmp_path / "start")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_gradients_have_the_importance_that_they_have_in_memory(model):
    here, there = (
        collect(one, labelled("llama"), rank=4, gradients=True, progress=False).gradients for one in (plain(), model)
    )
    assert there.keys() == here.keys()
    for name, gradient in here.items():
        assert there[name].importance == pytest.approx(gradient.importance, rel=1e-4) and gradient.importance > 0


def test_the_drop_in_for_peft_refuses_them_before_the_pass(model):
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=EvaConfig())
    peft_model = get_peft_model(model, config)
    with pytest.raises(LoraInitError, match=r"^initialize_lora_eva_weights\(\): 1 of 2 layers are offloaded"):
        initialize_lora_eva_weights(peft_model, None)


def test_an_adapter_that_is_offloaded_is_not_dialed_in_part(tmp_path):
    peft_model = get_peft_model(plain(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    offloaded(peft_model.get_base_model(), tmp_path / "offloaded")
    before = copy.deepcopy({name: p for name, p in peft_model.named_parameters() if not p.is_meta})
    with pytest.raises(LoraInitError, match="adapter 'default' is offloaded, at least in part"):
        lora_init.dial(peft_model, strength=0.5)
    assert all(torch.equal(p, before[name]) for name, p in peft_model.named_parameters() if name in before)


def test_layers_that_have_an_adapter_already_are_known_as_offloaded_too(tmp_path):
    peft_model = get_peft_model(plain(), LoraConfig(r=2, target_modules=["q_proj"]))
    model = offloaded(peft_model.get_base_model(), tmp_path / "offloaded")
    layers = {name: one for name, one in model.named_modules() if name.endswith("q_proj")}
    with pytest.raises(LoraInitError, match=r"^it: 1 of 2 layers are offloaded, the first is 'model.layers.1"):
        check_in_memory(layers, "it")
