"""Speech: an adapter for an encoder-decoder that reads features of sound and writes text, by Seq2SeqTrainer.

    python examples/whisper.py --output whisper-adapter

The Whisper is tiny and random and so are its sounds, so it runs offline in seconds. With a real one take its processor:
`processor(audio=..., sampling_rate=16000).input_features` and `processor(text=...).input_ids`.
"""

import argparse

import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperConfig, WhisperForConditionalGeneration

import lora_init

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="whisper-adapter")
options = parser.parse_args()

torch.manual_seed(0)
small = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
small |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, max_target_positions=16)
tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=[])
model = WhisperForConditionalGeneration(
    WhisperConfig(vocab_size=64, d_model=32, num_mel_bins=16, suppress_tokens=[], **small, **tokens)
)
words = torch.randn(8, 16, 20)  # how each of eight words sounds: [mel bins, frames]
spoken = [torch.randint(8, (5,)) for _ in range(128)]
rows = [{"input_features": torch.cat([*words[one]], dim=1), "labels": [*(one + 5).tolist(), 2]} for one in spoken]
args = Seq2SeqTrainingArguments(
    options.output, max_steps=30, per_device_train_batch_size=16, learning_rate=1e-2, report_to="none",
    save_strategy="no", logging_steps=10,
)  # fmt: skip
trainer = Seq2SeqTrainer(model, args, train_dataset=rows)
adapted = lora_init.initialize(trainer, rank=4)  # encoder by its frames, decoder by the tokens that have a label
trainer.train()
adapted.save_pretrained(options.output)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]} -> {losses[-1]}; adapter saved in {options.output}")
