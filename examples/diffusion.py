"""A LoRA adapter for the cross-attention of a diffusion pipeline, started from what its layers read while they denoise.

    pip install diffusers
    python examples/diffusion.py

The UNet is tiny and random and so are its data, so it runs offline in seconds. With a real pipeline the steps are the
same: `pipeline.unet`, your latents and the states of your text encoder.
"""

import sys
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

import lora_init

SCHEDULER = DDPMScheduler(num_train_timesteps=100, steps_offset=1, clip_sample=False)
WIDTH = 24  # of what the text encoder returns


def make_pipeline() -> StableDiffusionPipeline:
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


def make_batches(n_batches: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Latents of pictures that go with their text, with the noise and the time step of one denoising step each."""
    generator = torch.Generator().manual_seed(seed)
    kinds, pictures = torch.randn(3, 6, WIDTH, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    batches = []
    for _ in range(n_batches):
        kind = torch.randint(3, (8,), generator=generator)
        text = kinds[kind] + 0.1 * torch.randn(8, 6, WIDTH, generator=generator)
        noise = torch.randn(8, 4, 8, 8, generator=generator)
        step = torch.randint(100, (8,), generator=generator)
        batches.append({"latents": pictures[kind], "text": text, "noise": noise, "step": step})
    return batches


def denoise(unet: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Predict the noise in noisy latents, as in training: this is the pass that `collect` watches."""
    noisy = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["step"])
    return unet(noisy, batch["step"], encoder_hidden_states=batch["text"]).sample


def train(unet: PeftModel, batches: list[dict[str, Tensor]]) -> list[float]:
    # No rate was measured for diffusion: tune it. This one suits a tiny random model.
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for batch in batches:
        loss = torch.nn.functional.mse_loss(denoise(unet, batch), batch["noise"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def save_for_diffusers(unet: PeftModel, directory: Path) -> None:
    """Write the adapter as diffusers does; the config goes along, for ranks and scalings that are not the same."""
    layers = {
        name.removeprefix("base_model.model."): tensor for name, tensor in get_peft_model_state_dict(unet).items()
    }
    config = {**unet.peft_config["default"].to_dict(), "inference_mode": True, "auto_mapping": None}
    StableDiffusionPipeline.save_lora_weights(directory, layers, unet_lora_adapter_metadata=config)


def picture(pipeline: StableDiffusionPipeline, text: Tensor) -> Tensor:
    return pipeline(
        prompt_embeds=text, negative_prompt_embeds=torch.zeros_like(text), num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


def main(directory: Path) -> dict[str, Tensor | float]:
    pipeline, batches = make_pipeline(), make_batches(40)
    text = batches[0]["text"][:1]
    plain = picture(pipeline, text)

    # What the layers of cross-attention read: hidden states of the picture (to_q), of the text (to_k and to_v).
    stats = lora_init.collect(pipeline.unet, batches[:8], "cross-attention", rank=4, forward=denoise)
    init = lora_init.build_adapter(stats, lora_init.allocate_ranks(stats, rank=4))
    print(init)
    unet = init.apply(pipeline.unet)  # the pipeline's own UNet now has the adapter in it
    at_start = picture(pipeline, text)

    losses = train(unet, batches)
    first, last = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
    print(f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps")
    trained = picture(pipeline, text)
    save_for_diffusers(unet, directory)

    other = make_pipeline()
    other.load_lora_weights(directory)
    loaded = picture(other, text)
    print(
        f"saved to {directory}; load_lora_weights gives the same pictures: {torch.allclose(loaded, trained, atol=1e-5)}"
    )
    return {"plain": plain, "at_start": at_start, "trained": trained, "loaded": loaded, "first": first, "last": last}


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
