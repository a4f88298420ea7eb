"""A LoRA adapter for the cross-attention of a diffusion pipeline, started from what its layers read while they denoise.

    pip install diffusers
    python examples/diffusion.py

The UNet is tiny and random and so are its data, so it runs offline in seconds. With a real pipeline the steps are the
same: `pipeline.unet`, your latents and the states of your text encoder.
"""

import sys
import tempfile

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

import lora_init

SCHEDULER = DDPMScheduler(num_train_timesteps=100, steps_offset=1, clip_sample=False)
WIDTH = 24  # of what the text encoder returns


def make_pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(unet=unet, vae=vae, scheduler=SCHEDULER, requires_safety_checker=False, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_batches(n_batches):
    """Latents of three kinds of pictures, each with its text."""
    kinds, pictures = torch.randn(3, 6, WIDTH), torch.randn(3, 4, 8, 8)
    chosen = [torch.randint(3, (8,)) for _ in range(n_batches)]
    return [{"latents": pictures[kind], "text": kinds[kind] + 0.1 * torch.randn(8, 6, WIDTH)} for kind in chosen]


def denoise(unet, batch, noise=None):
    """Predict the noise at a noise level drawn for each picture, as in training."""
    noise, step = torch.randn_like(batch["latents"]) if noise is None else noise, torch.randint(100, (8,))
    return unet(SCHEDULER.add_noise(batch["latents"], noise, step), step, encoder_hidden_states=batch["text"]).sample


def picture(pipeline, text):
    generator = torch.Generator().manual_seed(0)
    prompts = dict(prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text))
    return pipeline(**prompts, num_inference_steps=2, output_type="latent", generator=generator).images


def main(directory):
    pipeline, batches = make_pipeline(), make_batches(40)
    unet, text = pipeline.unet, batches[0]["text"][:1]
    pictures = {"plain": picture(pipeline, text)}

    cross_attention = sorted(lora_init.find_targets(unet, "cross-attention").layers)  # or ["to_q", "to_k", ...]: all
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=cross_attention))
    lora_init.initialize(unet, batches, forward=denoise)  # over noise levels and prompts, in place
    pictures["at_start"] = picture(pipeline, text)

    # No rate was measured for diffusion: tune it. This one suits a tiny random model.
    optimizer, losses = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3), []
    for batch in batches:
        noise = torch.randn_like(batch["latents"])
        loss = torch.nn.functional.mse_loss(denoise(unet, batch, noise), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    pictures["trained"] = picture(pipeline, text)
    print(f"loss {sum(losses[:8]) / 8:.3f} -> {sum(losses[-8:]) / 8:.3f} in {len(losses)} steps")

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(directory, unet_lora_layers=layers)
    other = make_pipeline()
    other.load_lora_weights(directory)
    pictures["loaded"] = picture(other, text)
    print(f"saved to {directory}; load_lora_weights gives the same: {pictures['loaded'].equal(pictures['trained'])}")
    return pictures, losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
