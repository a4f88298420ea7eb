"""A vision tower and a language model under one roof: the attention mask belongs to the language model only."""

import pytest
import torch

from lora_init import collect
from tests.collection.made import recorded
from tests.versions import OLD_TRANSFORMERS

TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
)


def tokens(length, n_image, generator):
    """Four texts with an image each, of which two end in padding."""
    ids = torch.randint(3, 60, (4, length), generator=generator)
    ids[:, :n_image] = 63
    mask = torch.ones_like(ids)
    mask[0, n_image:] = mask[2, -1:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**VISION, projection_dim=24)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=63, vision_feature_layer=-1
    )

    def batch(generator):  # 16 patches and a class token: as long as the text
        return {**tokens(17, 16, generator), "pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}

    return LlavaForConditionalGeneration(config), batch, "language_model"


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
    config = Qwen2VLConfig(
        text_config=TEXT | {("rope_scaling" if OLD_TRANSFORMERS else "rope_parameters"): rope},
        vision_config=dict(
            depth=2, embed_dim=32, num_heads=4, hidden_size=32, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, mlp_ratio=2,
        ),
        image_token_id=63, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60,
    )  # fmt: skip

    def batch(generator):  # 4 x 16 patches in one flat list: as many as tokens
        return {
            **(made := tokens(16, 4, generator)),
            "pixel_values": torch.randn(64, 96, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
            **({} if OLD_TRANSFORMERS else {"mm_token_type_ids": (made["input_ids"] == 63).int()}),
        }

    return Qwen2VLForConditionalGeneration(config), batch, "language_model"


def smolvlm():
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        text_config=LlamaConfig(**TEXT).to_dict(), vision_config=dict(VISION), image_token_id=63, scale_factor=2
    )

    def batch(generator):  # 16 patches: as long as the text
        return {**tokens(16, 4, generator), "pixel_values": torch.randn(4, 1, 3, 16, 16, generator=generator)}

    return SmolVLMForConditionalGeneration(config), batch, "text_model"


def clip():
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=TEXT | {"projection_dim": 24}, vision_config=VISION | {"projection_dim": 24})

    def batch(generator):
        return {**tokens(17, 3, generator), "pixel_values": torch.randn(4, 3, 16, 16, generator=generator)}

    return CLIPModel(config), batch, "text_model"


MODELS = {"llava": llava, "qwen2_vl": qwen2_vl, "smolvlm": smolvlm, "clip": clip}
every_model = pytest.mark.parametrize("name", MODELS)
EVERYTHING = r".*(proj|fc\d|qkv|mlp\.[02]|patch_embedding|text_projection|visual_projection|linear_\d|lm_head)"


def setting(name, n_batches=3):
    model, batch, text = MODELS[name]()
    generator = torch.Generator().manual_seed(0)
    return model.eval(), [batch(generator) for _ in range(n_batches)], text


@every_model
def test_the_mask_is_for_the_text_alone(name):
    model, batches, text = setting(name)
    stats = collect(model, batches, EVERYTHING, rank=2)
    mask = batches[0]["attention_mask"].bool()
    n_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    towers = {False: 0, True: 0}
    shapes_of_the_mask = 0
    for layer in stats:
        if stats.targets[layer].kernel:
            continue
        x = recorded(model, batches[0], layer)
        is_text = f".{text}." in f".{layer}." or layer == "lm_head"
        towers[is_text] += 1
        if is_text:
            assert stats[layer].n_samples == n_tokens, layer
        else:
            assert stats[layer].n_samples == 3 * x[..., 0].numel(), layer
            shapes_of_the_mask += x.shape[:2] == mask.shape or (x.dim() == 2 and len(x) == mask.numel())
    assert min(towers.values()) > 4
    assert shapes_of_the_mask > 4  # the case that a comparison of shapes gets wrong


@every_model
def test_the_statistics_are_those_of_recorded_rows(name):
    model, batches, text = setting(name)
    stats = collect(model, batches, EVERYTHING, rank=2)
    for layer in stats:
        if stats.targets[layer].kernel:
            continue
        rows = []
        for batch in batches:
            x = recorded(model, batch, layer)
            is_text = f".{text}." in f".{layer}." or layer == "lm_head"
            rows.append(x[batch["attention_mask"].bool()] if is_text else x.reshape(-1, x.shape[-1]))
        rows = torch.cat(rows).double()
        assert stats.total_variance(layer) == pytest.approx(float(rows.var(0).sum()), rel=1e-4, abs=1e-9), layer
