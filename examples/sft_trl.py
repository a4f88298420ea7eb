"""Start TRL's SFTTrainer from your data.

    python examples/sft_trl.py MODEL DATA.jsonl --output adapter/

MODEL is a directory or a hub id, DATA a JSONL file whose rows have `prompt` and `completion`. Without arguments it runs
on a tiny random model and sums of two digits, made here, so that it can be tried offline.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lora_init


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory or hub id; default: a tiny random one")
    parser.add_argument("data", nargs="?", help="JSONL file with prompt and completion; default: sums of digits")
    parser.add_argument("--output", default=None, help="where the trained adapter goes; default: nowhere")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--freeze-a", action="store_true", help="train B alone, which takes less memory")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = arguments.model or make_tiny_model(Path(folder) / "model")
        data = arguments.data or make_sums(Path(folder) / "sums.jsonl")
        tokenizer = AutoTokenizer.from_pretrained(source)

        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            processing_class=tokenizer,
            train_dataset=load_dataset("json", data_files=str(data), split="train"),
            args=SFTConfig(
                output_dir=str(Path(folder) / "trainer"),
                max_steps=arguments.steps,
                lr_scheduler_type="cosine",
                warmup_steps=arguments.steps // 10,
                per_device_train_batch_size=8,
                max_length=512,
                logging_steps=max(1, arguments.steps // 4),
                save_strategy="no",
                report_to=[],
                bf16=torch.cuda.is_available(),
            ),
        )
        # The one addition to a TRL script: what the trainer is about to train on decides where its adapter starts, and
        # at which learning rate it is trained.
        model = lora_init.initialize(
            trainer, rank=arguments.rank, freeze_a=arguments.freeze_a, learning_rate="measured"
        )
        model.print_trainable_parameters()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        if arguments.output:
            model.save_pretrained(arguments.output)


def make_sums(path: Path) -> Path:
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def make_tiny_model(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "+", "=", *map(str, range(19))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special: dict[str, Any] = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    special["model_input_names"] = ["input_ids", "attention_mask"]  # an older TRL's GRPOTrainer hands all to the model
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


if __name__ == "__main__":
    main()
