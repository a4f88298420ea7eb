"""Targets by purpose: the layers that one would name by hand, for every architecture, and full names in the adapter."""

import pytest
import torch
from torch import nn

from lora_init import find_targets
from lora_init.layers.grid import _is_cross, by_purpose
from tests.conftest import MODELS, refused, tiny_gpt2, tiny_llama, tiny_t5
from tests.layers.made import SIZES, bart, gpt2_with_cross_attention


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(**SIZES, num_mel_bins=8, max_source_positions=20, max_target_positions=20)
    return WhisperForConditionalGeneration(config).eval()


def mllama():
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0, max_position_embeddings=64,
        rope_scaling={"rope_type": "default"},
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_global_layers=1, attention_heads=4,
        intermediate_layers_indices=[0], vision_output_dim=64, image_size=16, patch_size=8, max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
    )  # fmt: skip
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text)).eval()


def mixtral():
    from tests.layers.made import mixtral

    return mixtral()


def qwen2_moe():
    from tests.layers.made import qwen2_moe

    return qwen2_moe()


def switch():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config).eval()


def unet():
    pytest.importorskip("diffusers")
    from examples.diffusion import make_pipeline

    return make_pipeline().unet


Q_K_V = ("q_proj", "k_proj", "v_proj")
UNET = ("to_q", "to_k", "to_v", "to_out.0")
# How the layers of each purpose end; one of cross-attention is inside the module named here.
CASES = {
    "llama": (tiny_llama, (*Q_K_V, "o_proj"), ("gate_proj", "up_proj", "down_proj"), None),
    "gpt2": (tiny_gpt2, ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), None),
    "bert": (
        MODELS["bert"],
        ("self.query", "self.key", "self.value", "attention.output.dense"),
        ("intermediate.dense", "0.output.dense", "1.output.dense"),
        None,
    ),
    "vit": (  # transformers 4 names the layers as BERT's
        MODELS["vit"],
        (*Q_K_V, "o_proj", "query", "key", "value", "attention.output.dense"),
        ("fc1", "fc2", "intermediate.dense", "0.output.dense", "1.output.dense"),
        None,
    ),
    "t5": (tiny_t5, ("n.q", "n.k", "n.v", "n.o"), ("wi_0", "wi_1", "wo"), ".EncDecAttention."),
    "bart": (bart, (*Q_K_V, "out_proj"), ("fc1", "fc2"), ".encoder_attn."),
    "whisper": (whisper, (*Q_K_V, "out_proj"), ("fc1", "fc2"), ".encoder_attn."),
    "mllama": (mllama, (*Q_K_V, "o_proj"), ("fc1", "fc2", "gate_proj", "up_proj", "down_proj"), ".cross_attn."),
    "gpt2 with cross-attention": (
        gpt2_with_cross_attention,
        ("attn.c_attn", "attn.c_proj", "attention.q_attn", "attention.c_attn", "attention.c_proj"),
        ("mlp.c_fc", "mlp.c_proj"),
        ".crossattention.",
    ),
    "mixtral": (mixtral, (*Q_K_V, "o_proj"), (), None),
    # Their routers, shared_expert_gate and router.classifier, are linear layers within an MLP, and not of it.
    "qwen2_moe": (qwen2_moe, (*Q_K_V, "o_proj"), ("gate_proj", "up_proj", "down_proj"), None),
    "switch": (switch, ("n.q", "n.k", "n.v", "n.o"), ("wi", "wo"), ".EncDecAttention."),
    "unet": (unet, UNET, ("ff.net.0.proj", "ff.net.2"), ".attn2."),
}


@pytest.mark.parametrize("case", CASES)
def test_the_layers_of_each_purpose(case):
    make, attention, mlp, cross = CASES[case]
    model = make()
    every = list(find_targets(model).layers)
    expected = {
        "attention": [name for name in every if name.endswith(attention)],
        "mlp": [name for name in every if mlp and name.endswith(mlp)],
        "cross-attention": [name for name in every if name.endswith(attention) and cross and cross in name],
    }
    assert expected["attention"]
    for purpose, names in expected.items():
        if names:
            assert list(find_targets(model, purpose).layers) == names, purpose
            continue
        refused(rf"^target_modules='{purpose}': \w+ has no such layers. It has att", find_targets, model, purpose)


def test_what_a_model_has_instead_is_said_with_names_and_numbers():
    words = (
        r"^target_modules='cross-attention': LlamaForCausalLM has no such layers. It has attention \(q_proj, k_proj, "
        r"v_proj, o_proj: 8 layers\) and mlp \(gate_proj, up_proj, down_proj: 6 layers\). Name layers instead; "
        "target_parameters= names fused experts.$"
    )
    refused(words, find_targets, tiny_llama(), "cross-attention")
    refused(
        r"Sequential has no such layers. It has neither\. Name", find_targets, nn.Sequential(nn.Linear(2, 2)), "mlp"
    )


def of_class(kind, **parts):
    made = type(kind, (nn.Module,), {})()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


BESIDE = dict(self_attn=of_class("Attention", q=nn.Linear(2, 2)))  # which makes a row of blocks of what holds it


@pytest.mark.parametrize(("part", "purposes"), [
    (dict(Attn=of_class("Mixer", x=nn.Linear(2, 2))), ["attention"]),
    (dict(mixer=of_class("NewAttention2", x=nn.Linear(2, 2))), ["attention"]),
    (dict(mixer=of_class("AttentionMixer", x=nn.Linear(2, 2))), []),
    (dict(attn=of_class("AttnBlock", x=nn.Linear(2, 2))), []),
    (dict(attn=of_class("AttnLayer", x=nn.Linear(2, 2))), []),
    (dict(CrossAttn=of_class("Mixer", x=nn.Linear(2, 2))), ["attention", "cross-attention"]),
    (dict(mixer=of_class("CROSSAttention", x=nn.Linear(2, 2))), ["attention", "cross-attention"]),
    (dict(attn=of_class("Mixer", attn2=of_class("Mixer", x=nn.Linear(2, 2)))), ["attention", "cross-attention"]),
    (dict(attn2=of_class("Mixer", attn=of_class("Mixer", x=nn.Linear(2, 2)))), ["attention", "cross-attention"]),
    (dict(MLP=of_class("Mixer", x=nn.Linear(2, 2))), ["mlp"]),
    (dict(mlp=of_class("Mixer", gate=of_class("Mixer", x=nn.Linear(2, 2)))), []),
    (dict(mlp=nn.ModuleList([of_class("Mixer", x=nn.Linear(2, 2))])), ["mlp"]),
    (dict(mixer=of_class("Mixer", x=nn.Linear(2, 2))), []),
])  # fmt: skip
def test_the_purpose_of_a_layer_follows_from_classes_and_attributes_around_it(part, purposes):
    model = nn.ModuleDict({"layers": nn.ModuleList([of_class("Own", **BESIDE, **part)]), "rest": nn.ModuleList()})
    found = by_purpose(dict(model.named_modules()), [n for n, _ in model.named_modules() if n.endswith(".x")])
    assert [purpose for purpose, names in found.items() if names] == sorted(purposes)


def test_an_mlp_is_inside_a_block_that_has_an_attention():
    block = of_class("Own", mlp=of_class("Mixer", x=nn.Linear(2, 2)))
    model = nn.ModuleDict({"layers": nn.ModuleList([of_class("Own", **BESIDE)]), "rest": nn.ModuleList([block])})
    model["mlp"] = of_class("Mixer", x=nn.Linear(2, 2))
    modules = dict(model.named_modules())
    assert not any(by_purpose(modules, ["rest.0.mlp.x", "mlp.x"]).values())


def test_a_module_that_says_what_it_is_is_that_whatever_its_name():
    named, says = nn.Module(), nn.Module()
    says.is_cross_attention = False
    assert [_is_cross("block.attn2", module) for module in (named, says)] == [True, False]


def test_a_diffusion_pipeline_from_denoising_steps_to_load_lora_weights(tmp_path):
    pytest.importorskip("diffusers")
    from examples.diffusion import main

    found, losses = main(tmp_path)
    assert torch.equal(found["at_start"], found["plain"])  # the adapter changes nothing until it is trained
    assert sum(losses[-8:]) < sum(losses[:8]) - 0.4
    assert not torch.allclose(found["trained"], found["plain"], atol=1e-2)
    torch.testing.assert_close(found["loaded"], found["trained"], atol=1e-5, rtol=1e-5)
