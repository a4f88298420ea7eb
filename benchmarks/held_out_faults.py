"""Ask `verify` about faults, adapters and prompts that its thresholds were not set with: `make test-serving`.

Three adapters are trained on three data sets, with other ranks, layers, scalings and seeds than those of `verifying`.
The faults are other ones, or of other layers and other sizes. Prompts come from texts that no adapter was trained on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import verifying
from benchmarks.serving import HOME, commit, environment, smollm2
from benchmarks.verifying import N_RIGHT, TIMES, Expected

STEPS, TEXTS, TRAINED_ON = 12, 4, 160
SYSTEM = "<|im_start|>system\nYou speak like a pirate.<|im_end|>\n"
CHAT = SYSTEM + verifying.CHAT + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# Data set, file, seed, and PEFT's settings of each adapter.
ADAPTERS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "openbookqa": ("OpenBookQA", "test.jsonl", 11, dict(r=8, lora_alpha=32, target_modules="all-linear")),
    "piqa": (
        "PIQA", "validation.jsonl", 12,
        dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    ),
    "hellaswag": (
        "HellaSwag", "test.jsonl", 13,
        dict(r=16, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"]),
    ),
}  # fmt: skip
MISSING, ANOTHER, BASE = "a part is missing", "another adapter", "another base or template"
# The adapter and what is served in its place, with the verdict and words that name the fault. A factor may be 5 % off.
FAULTS: dict[str, tuple[str, str, str]] = {
    "openbookqa, alpha halved": ("openbookqa", "scaled", r"by 0\.(4[89]|5[012]?\b)"),
    "openbookqa, k_proj dropped": ("openbookqa", MISSING, "k_proj"),
    "openbookqa, gate_proj dropped": ("openbookqa", MISSING, "gate_proj"),
    "openbookqa, MLPs dropped": ("openbookqa", MISSING, "mlp"),
    "openbookqa, o_proj of two blocks swapped": ("openbookqa", ANOTHER, "layers changed"),
    "openbookqa, upper half of the blocks dropped": ("openbookqa", ANOTHER, "layers changed"),
    "openbookqa, an earlier checkpoint": ("openbookqa", ANOTHER, ""),
    "openbookqa, piqa's adapter": ("openbookqa", ANOTHER, "another task"),
    "piqa, alpha tripled": ("piqa", "scaled", r"by (2\.[89]|3\b|3\.[01])"),
    "piqa, rsLoRA not read": ("piqa", "scaled", "by 0.5, rsLoRA not read"),
    "piqa, q_proj dropped": ("piqa", MISSING, "q_proj"),
    "piqa, v_proj of two blocks swapped": ("piqa", ANOTHER, "layers changed"),
    "piqa, an earlier checkpoint": ("piqa", ANOTHER, ""),
    "piqa, prefix wrong": ("piqa", "ignored", ""),
    "hellaswag, alpha doubled": ("hellaswag", "scaled", "by 2, alpha doubled"),
    "hellaswag, down_proj dropped": ("hellaswag", MISSING, "down_proj"),
    "hellaswag, an earlier checkpoint": ("hellaswag", ANOTHER, ""),
    "hellaswag, openbookqa's adapter": ("hellaswag", ANOTHER, "another task"),
    "a base that was trained on": ("openbookqa", BASE, ""),
    "a template with a system prompt": ("openbookqa", BASE, ""),
}
EXPECTED: Expected = {case: (verdict, words) for case, (_, verdict, words) in FAULTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(verifying.ENGINES), help="which of them")
    for engine in parser.parse_args().engines:
        measure(engine, smollm2(), HOME / "work")


def measure(engine: str, model: Path, work: Path) -> None:
    """Ask about all cases and write the answers, which fail nothing: what they are is the result."""
    environment(engine)
    code, work = commit(), work / f"held-out-{engine}"
    shutil.rmtree(work, ignore_errors=True)
    (work / f"planted-{engine}").mkdir(parents=True)
    made = adapters(model, work)
    start = verifying.vllm if engine == "vllm" else verifying.llama_cpp
    in_place = {case: made.pop(case) for case in FAULTS if case in made}
    names = {case: f"fault-{i}" for i, case in enumerate(in_place)}
    if engine == "llama.cpp":  # it refuses these, and others drop them
        names["piqa, prefix wrong"] = "prefix-wrong"
    paths = {names[case]: path for case, path in in_place.items()} | {name: made[name] for name in ADAPTERS}
    planted: list[dict[str, Any]] = [
        dict(case=case, adapter=FAULTS[case][0], name=name) for case, name in names.items()
    ]
    right: list[dict[str, Any]] = [
        dict(case=f"right {name}, {i + 1}", adapter=name, name=name, n=N_RIGHT, seed=100 + i)
        for name in ADAPTERS
        for i in range(TIMES)
    ]
    one = {"openbookqa": made["openbookqa"]}
    base = dict(case="a base that was trained on", adapter="openbookqa", name="openbookqa")
    chat = dict(case="a template with a system prompt", adapter="openbookqa", name="openbookqa", chat=True)
    plan = (
        (partial(start, model, paths, work), planted),
        (partial(start, model, {name: made[name] for name in ADAPTERS}, work), right),
        (partial(start, made["base"], one, work), [base]),
        (partial(start, model, one, work, template=CHAT), [chat]),
    )
    groups = [
        (
            server,
            [
                case | dict(adapter=made[case["adapter"]], draw=partial(prompts, case["adapter"]), model=model)
                for case in cases
            ],
        )
        for server, cases in plan
    ]
    rows = verifying.ask_groups(groups, EXPECTED, work.parent / f"answers-held-out-{engine}-{code}.jsonl")
    verifying.write(f"verify-held-out-{engine}", {"engine": engine, "commit": code}, rows, EXPECTED)


def texts(name: str) -> list[str]:
    sys.path.insert(0, "examples")
    import demo_assets

    lines = map(json.loads, demo_assets.dataset(*ADAPTERS[name][:2]).read_text(encoding="utf-8").splitlines())
    answers = ((line["question"], line.get("answer", "")) for line in lines)
    pairs = ((question, one[0] if isinstance(one, list) else one[3:]) for question, one in answers)
    return [text for text in (f"{question} {answer}" for question, answer in pairs) if 8 < len(text.split()) < 40]


def prompts(name: str, count: int, seed: int) -> list[str]:
    return verifying.beginnings(texts(name)[TRAINED_ON:], count, seed)


def adapters(model: Path, work: Path) -> dict[str, Path]:
    """Train the adapters and plant the faults, as PEFT directories."""
    import lora_init
    from tests.serving import engine as plant

    made = {name: train(name, model, work) for name in ADAPTERS}
    half = {name: work / f"{name}-half" for name in ADAPTERS}
    numbers = iter(range(len(FAULTS)))

    def changed(name: str, config: dict[str, Any] | None = None, tensors: Any = None) -> Path:
        return plant.changed(made[name], work / f"changed-{next(numbers)}", config, tensors)

    def without_upper_half(tensors: dict[str, Any]) -> dict[str, Any]:
        blocks = {key: int(key.split(".layers.")[1].split(".")[0]) for key in tensors}
        return {key: t * (blocks[key] < 15 or "lora_B" not in key) for key, t in tensors.items()}

    merged = work / "other-base"
    lora_init.export_adapter(made["hellaswag"], merged, merge_into=str(model))
    return {
        **made,
        "base": merged,
        "openbookqa, alpha halved": changed("openbookqa", {"lora_alpha": 16}),
        "openbookqa, k_proj dropped": changed("openbookqa", tensors=plant.without("k_proj")),
        "openbookqa, gate_proj dropped": changed("openbookqa", tensors=plant.without("gate_proj")),
        "openbookqa, MLPs dropped": changed("openbookqa", tensors=plant.without(".mlp.")),
        "openbookqa, o_proj of two blocks swapped": changed("openbookqa", tensors=plant.swapped("o_proj", 10, 20)),
        "openbookqa, upper half of the blocks dropped": changed("openbookqa", tensors=without_upper_half),
        "openbookqa, an earlier checkpoint": half["openbookqa"],
        "openbookqa, piqa's adapter": changed("piqa"),
        "piqa, alpha tripled": changed("piqa", {"lora_alpha": 24}),
        "piqa, rsLoRA not read": changed("piqa", {"use_rslora": False}),
        "piqa, q_proj dropped": changed("piqa", tensors=plant.without("q_proj")),
        "piqa, v_proj of two blocks swapped": changed("piqa", tensors=plant.swapped("v_proj", 5, 25)),
        "piqa, an earlier checkpoint": half["piqa"],
        "piqa, prefix wrong": changed("piqa", tensors=plant.renamed),
        "hellaswag, alpha doubled": changed("hellaswag", {"lora_alpha": 32}),
        "hellaswag, down_proj dropped": changed("hellaswag", tensors=plant.without("down_proj")),
        "hellaswag, an earlier checkpoint": half["hellaswag"],
        "hellaswag, openbookqa's adapter": changed("openbookqa"),
    }


def train(name: str, model: Path, work: Path) -> Path:
    """Train an adapter from PEFT's own start; a checkpoint at half the steps is kept beside it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    *_, seed, settings = ADAPTERS[name]
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).train()
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-3)
    for step in range(STEPS):
        batch = texts(name)[TEXTS * step : TEXTS * (step + 1)]
        inputs = tokenizer(batch, return_tensors="pt", padding=True, padding_side="right")
        labels = inputs["input_ids"].where(inputs["attention_mask"] == 1, -100)
        loss = adapted(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name}, step {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
        if step + 1 == STEPS // 2:
            adapted.save_pretrained(work / f"{name}-half")
    adapted.save_pretrained(work / name)
    return work / name


if __name__ == "__main__":
    main()
