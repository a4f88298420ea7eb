"""From saved statistics to rank plans: budgets in the units you have, policies side by side, a picture, a snippet.

    lora-init init HuggingFaceTB/SmolLM2-135M-Instruct boolq.jsonl --statistics stats.safetensors --output adapter
    python examples/rank_budget.py stats.safetensors 1M 5M

Without a file it makes statistics of a small random model first, and runs offline in a few seconds.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import lora_init
from lora_init.cli.ranks import comparison_table, show_plan
from lora_init.planning.plan import load_plan, save_plan
from lora_init.planning.snippets import snippet
from lora_init.plots.pictures import save_picture


def small_statistics() -> lora_init.Statistics:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    batches = [{"input_ids": torch.randint(3, 64, (8, 24))} for _ in range(12)]
    return lora_init.collect(LlamaForCausalLM(config), batches, rank=8, data="random tokens", progress=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("statistics", nargs="?", type=Path)
    parser.add_argument("budgets", nargs="*", default=["10k", "20k"], help="parameters, such as 1M")
    parser.add_argument("--output", type=Path, default=Path("rank_budget"))
    arguments = parser.parse_args()
    stats = lora_init.Statistics.load(arguments.statistics) if arguments.statistics else small_statistics()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console()

    # The model and the data are not needed any more. Each plan takes milliseconds.
    plans = {
        f"{budget} {policy}": lora_init.allocate_ranks(stats, parameters=budget, policy=policy, rho=2)
        for budget in arguments.budgets
        for policy in ("uniform", "eva", "cost-aware")
    }
    console.print(comparison_table(plans))
    console.print()

    # A server whose largest rank is 32, kernels that like multiples of 4, and q, k and v fused into one matrix.
    plan = lora_init.allocate_ranks(
        stats,
        parameters=arguments.budgets[-1],
        policy="cost-aware",
        max_rank=32,
        multiple_of=4,
        tie=("q_proj", "k_proj", "v_proj"),
        overrides={"*.down_proj": {"max_rank": 16}},
    )
    show_plan(console, plan, stats)

    # The plan goes to `lora-init init --ranks plan.json`, to `build_adapter(stats, plan)`, or into another tool.
    path = save_plan(plan, arguments.output / "plan.json")
    adapter = lora_init.build_adapter(stats, load_plan(path))
    (arguments.output / "axolotl.yaml").write_text(snippet(plan, "axolotl", lora_alpha=2 * plan.rank), encoding="utf-8")
    picture = save_picture(plan, stats, arguments.output / "plan.svg")
    print(f"an adapter of {adapter.n_parameters():,} parameters; {path}; {picture}")


if __name__ == "__main__":
    main()
