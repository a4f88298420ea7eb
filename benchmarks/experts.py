"""What works of adapters of experts, on a tiny model of each family of transformers: `python -m benchmarks.experts`.

Each family is built with random weights, two blocks and four experts, and goes the whole way: start, rate, training,
dial, export for each engine, merge, verify. The table says where it ends, with the first words of what was refused.

`sweep` trains SmolLM2-135M-Instruct with its MLPs cut into four experts, which all see every token, at the rule's rate
and rates a factor of three apart, until the best lies inside: 48 steps of 8 examples of each task of
`benchmarks.long_runs`, `random` of rank 8 in attention and experts. It appends a line a run to
`results/experts/sweep.jsonl`, goes on where it was stopped, and prints the best rates by a parabola over log rate.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import lora_init
from benchmarks import long_runs
from benchmarks.settings import best_rate, table
from lora_init.comparison.training import Training, train
from lora_init.serving.engines import ENGINES
from tests.layers.made import BOTH, split

RESULTS = Path(__file__).resolve().parent / "results/experts"
WORDS = 64
COMMON = dict(
    vocab_size=WORDS, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FEW = dict(num_experts=4, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=4, num_experts_per_tok=2)
OWN = FEW | dict(moe_intermediate_size=20)
DEEP = dict(
    moe_intermediate_size=20, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
    n_group=1, topk_group=1,
)  # fmt: skip
LATENT = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
LATENT |= dict(num_key_value_heads=4)
LINEAR = dict(
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=28,
)  # fmt: skip
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": LOCAL,
    "Qwen2Moe": OWN | dict(shared_expert_intermediate_size=28),
    "Qwen3Moe": OWN | dict(norm_topk_prob=True),  # as its checkpoints have it, and as llama.cpp computes it
    "Qwen3Next": OWN | LINEAR,
    "Qwen3_5Moe": OWN | LINEAR,
    "GptOss": LOCAL,
    "DeepseekV2": DEEP | LATENT | dict(topk_method="greedy"),
    "DeepseekV3": DEEP | LATENT,
    "Llama4": LOCAL | dict(intermediate_size_mlp=20, interleave_moe_layer_step=1),
    "GraniteMoe": LOCAL,
    "GraniteMoeShared": LOCAL | dict(shared_intermediate_size=16),
    "Olmoe": FEW | dict(num_key_value_heads=4),
    "FlexOlmo": FEW,
    "Gemma4": SLIDING | dict(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=20, global_head_dim=8,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=WORDS,
    ),
    "Phimoe": LOCAL,
    "Glm4Moe": DEEP,
    "Ernie4_5_Moe": dict(
        moe_num_experts=4, moe_k=2, moe_intermediate_size=20, moe_num_shared_experts=1, moe_layer_start_index=0
    ),
    "Dots1": DEEP | dict(num_key_value_heads=4),
    "MiniMax": LOCAL,
    "HunYuanMoEV1": dict(num_experts=4, moe_topk=2),
    "Lfm2Moe": OWN | dict(num_dense_layers=1, layer_types=["full_attention"] * 2),
    "ExaoneMoe": OWN | SLIDING | dict(num_shared_experts=1, mlp_layer_types=["dense", "sparse"]),
    "Afmoe": OWN | SLIDING | dict(num_dense_layers=1, num_shared_experts=1),
    "JetMoe": LOCAL | dict(kv_channels=8),
}  # fmt: skip


RUNS = RESULTS / "sweep.jsonl"
ADAPTED = dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], target_parameters=BOTH)
CUT, TRAINING = 4, Training(48, 8, 0.1, [0, 48])  # experts that an MLP becomes; how each run trains
REPORTED = 128  # held-out examples


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if sys.argv[1:] == ["sweep"]:
        sweep()
        return
    rows = {name: row_of(name) for name in sys.argv[1:] or FAMILIES}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [["family", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    print(table)
    if not sys.argv[1:]:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "table.md").write_text(table)
        (RESULTS / "table.json").write_text(json.dumps(rows, indent=2) + "\n")


def build(name: str) -> Any:
    """Make a tiny model, with weights so large that experts matter."""
    kinds = (getattr(transformers, name + end, None) for end in ("TextConfig", "Config"))
    config = next(kind for kind in kinds if kind is not None)(**COMMON | FAMILIES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    return model


def fused(model: Any) -> list[str]:
    """Name the weights of its experts by their endings."""
    found = [n for n, p in model.named_parameters() if p.dim() == 3 and ".experts." in n and not n.endswith("_bias")]
    return sorted({".".join(name.split(".")[-2:]) for name in found})


def row_of(name: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        return dict(_way(name, Path(folder)))


def tried(step: Callable[[], str]) -> str:
    try:
        return step()
    except Exception as error:
        return f"no: {type(error).__name__}: {str(error).splitlines()[0][:60]}".replace("|", "/")


def _way(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    model = build(name)
    model.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, "w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w3")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    ids = torch.randint(4, WORDS, (4, 8, 12))
    batches = [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids]
    experts, made, trained = fused(model), None, folder / "trained"
    yield "experts", ", ".join(key.removeprefix("experts.") for key in experts) or "linear layers"

    def start() -> str:
        nonlocal made
        stats = lora_init.collect(model, batches, "attention", rank=2, target_parameters=experts)
        left = [key for key in stats.unsupported if "experts" in key]
        made = lora_init.build_adapter(stats, 2).apply(model)
        return "PEFT's own" if left else "yes"

    yield "start", tried(start)
    if made is None:
        return
    adapted = made

    def rate() -> str:
        found = lora_init.learning_rate(adapted, batches, steps=48)
        return "yes" if any("experts" in layer for layer in found.responses) else "without experts"

    yield "rate", tried(rate)

    def train() -> str:
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
        losses = []
        for batch in batches * 6:
            losses.append(adapted(**batch).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(trained)
        return "yes" if losses[-1] < losses[0] else "no"

    yield "train", tried(train)
    yield "dial", tried(lambda: f"yes, {lora_init.dial(adapted, strength=0.5).chosen.strength:g}")
    yield (
        "export",
        ", ".join(filter(None, (_exported(trained, folder, engine) for engine in [None, *ENGINES]))) or "none",
    )

    def logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
        own = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            return (own if adapter is None else PeftModel.from_pretrained(own, adapter).eval())(ids[0]).logits

    def merge() -> str:
        lora_init.export_adapter(trained, folder / "merged", merge_into=str(folder / "base"))
        difference = logits(folder / "merged") - logits(folder / "base", trained)
        return f"yes, {float(difference.abs().max()):.0e} off"

    yield "merge", tried(merge)

    def verify() -> str:
        base, own = (AutoModelForCausalLM.from_pretrained(folder / "base").eval() for _ in range(2))
        served = PeftModel.from_pretrained(own, trained).eval()

        def ask(prompt: str) -> dict[int, float]:
            found = served(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
            return dict(enumerate(found.log_softmax(-1).tolist()))

        prompts = [" ".join(f"w{int(i)}" for i in row) for row in ids.flatten(0, 1)]
        with torch.no_grad():
            return lora_init.verify(trained, base, tokenizer, prompts, ask, n=8).verdict

    yield "verify", tried(verify)


def _exported(trained: Path, folder: Path, engine: str | None) -> str:
    """Name an engine that an export was written for; nothing if it was refused."""
    try:
        lora_init.export_adapter(trained, folder / f"for-{engine}", engine, base=str(folder / "base"))
    except lora_init.LoraInitError as error:
        print(engine, error)
        return ""
    return engine or "PEFT"


def sweep() -> None:
    """Train what is left, and print what was measured."""
    for name in long_runs.TASKS:
        task = None
        while (power := _next_power(losses := _losses(name))) is not None:
            task = task or long_runs.load(name, AutoTokenizer.from_pretrained(_smollm2())).cut(REPORTED, None)
            with RUNS.open("a") as sink:
                sink.write(json.dumps(_trained(name, task, power)) + "\n")
        rule = next(row["rule"] for row in _runs() if row["task"] == name)
        by_rate = {rule * long_runs.FACTOR**power: loss for power, loss in sorted(losses.items())}
        best, shown = best_rate(by_rate), [f"{rate:.1e} {loss:.3f}" for rate, loss in by_rate.items()]
        last = [f"{best:.1e}", f"{rule:.1e}", f"{rule / best:.2f}"] if best else ["at the edge", f"{rule:.1e}", ""]
        print(table(["task", "loss at each rate", "best rate", "the rule's", "over the best"],
                    [[name, ", ".join(shown), *last]]))  # fmt: skip


def _runs() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def _losses(name: str) -> dict[int, float]:
    """Return the losses of a task by the power of the factor between rates; infinite where training diverged."""
    own = [row for row in _runs() if row["task"] == name]
    return {row["power"]: row["loss"][-1] if row["status"] == "finished" else math.inf for row in own}


def _next_power(losses: dict[int, float]) -> int | None:
    """Return the next power to train at, from the rule's rate on, until the lowest loss lies between two others."""
    lowest = min(losses, key=losses.__getitem__, default=0)
    return next((power for power in (lowest, lowest + 1, lowest - 1) if power not in losses), None)


def _smollm2() -> Path:
    import demo_assets

    return demo_assets.smollm2()


def _trained(name: str, task: Any, power: int) -> dict[str, Any]:
    """Train a fresh adapter at a power of the factor times the rule's rate; the base in bfloat16, autocast."""
    began = time.process_time()
    dense = AutoModelForCausalLM.from_pretrained(_smollm2(), dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(
        split(dense, CUT).to(torch.bfloat16), LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **ADAPTED)
    )
    sample = [task.batch(items) for items in task.order(1000, 8, 8)]
    rule = lora_init.learning_rate(model, sample, steps=TRAINING.steps)
    rate = rule.rate * long_runs.FACTOR**power
    with torch.autocast("cpu", torch.bfloat16):
        result = train(model, task, TRAINING, learning_rate=rate, seed=0, plain_loss=1e3)
    row = {"task": name, "power": power, "rule": rule.rate, "share": rule.share, "rate": rate,
           "loss": [round(loss, 5) for loss in result.report_loss], "status": result.status,
           "seconds": round(time.process_time() - began)}  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
