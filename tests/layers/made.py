"""Models, batches and helpers that several tests of layers need."""

import torch
from torch import nn

from tests.versions import needs_fused_experts

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


COMMON = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def mixtral(**changes):
    needs_fused_experts()
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = dict(COMMON, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(MixtralConfig(**settings | changes)).eval()


def qwen2_moe():
    needs_fused_experts()
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **COMMON, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=4, num_experts_per_tok=2
        )
    ).eval()


def qwen3_moe():
    needs_fused_experts()
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, head_dim=8, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2)
    ).eval()


def gpt_oss():
    needs_fused_experts()
    from transformers import GptOssConfig, GptOssForCausalLM

    model = GptOssForCausalLM(GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):  # zero at first
            nn.init.normal_(parameter)
    return model


MODELS = {"mixtral": mixtral, "qwen2_moe": qwen2_moe, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss}


def split(dense, n_experts):
    """Make a Mixtral that computes what a Llama does: its MLPs are cut into experts, which all see every token.

    The router gives each the same weight, so what an expert writes is so many times as large.
    """
    needs_fused_experts()
    from transformers import MixtralConfig, MixtralForCausalLM

    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "pad_token_id",
            "bos_token_id", "eos_token_id")  # fmt: skip
    own = dict(num_local_experts=n_experts, num_experts_per_tok=n_experts, sliding_window=None)
    own["intermediate_size"] = dense.config.intermediate_size // n_experts
    model = MixtralForCausalLM(MixtralConfig(**{key: getattr(dense.config, key) for key in same}, **own)).eval()
    state = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    for name, mlp in ((name, module) for name, module in dense.named_modules() if name.endswith(".mlp")):
        halves = (projection.weight.chunk(n_experts) for projection in (mlp.gate_proj, mlp.up_proj))
        state[f"{name}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(*halves, strict=True)])
        state[f"{name}.experts.down_proj"] = torch.stack(mlp.down_proj.weight.chunk(n_experts, 1)) * n_experts
        state[f"{name}.gate.weight"] = torch.zeros(n_experts, dense.config.hidden_size)
    model.load_state_dict(state)
    return model


SIZES = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(**SIZES, max_position_embeddings=64)).eval()


def gpt2_with_cross_attention():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, add_cross_attention=True)).eval()
