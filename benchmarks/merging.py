"""How well what a merge takes from the weights orders what it does to a model's answers: SmolLM2-135M.

    python -m benchmarks.merging OUTPUT DATA ADAPTER...   # DATA: a CSV of passage, question, options, answer

Each adapter is merged into each type, every other one at a tenth of its strength. A line of OUTPUT for each has the
noise of rounding in sizes of the change, over all weights and where the data are, and the measured divergences.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import lora_init
from lora_init.adapters.directory import AdapterDirectory
from lora_init.files import write_json
from lora_init.loading.models import load_model
from lora_init.serving.base import plan_merge, read_base
from lora_init.serving.kept import ROUNDINGS, Kept, divergence, kept_by_merge
from lora_init.serving.trained import read_trained

STRENGTHS = (1.0, 0.1)


def main(output: Path, data: str, directories: list[Path]) -> None:
    done = {(one["adapter"], one["strength"], one["type"]) for one in read(output)}
    loaded = load_model(AdapterDirectory(directories[0]).base, dtype="float32")
    how = dict(template="{passage} {question}\n{options}\nAnswer:", completion=" {answer}", max_length=256)
    inputs = lora_init.load_batches(data, loaded.tokenizer, samples=64, **how)
    stats = lora_init.collect(loaded.model, inputs, rank=16, rho=1.0, statistics=output.with_suffix(".safetensors"))
    batches = lora_init.load_batches(data, loaded.tokenizer, samples=16, offset=64, batch_size=4, **how)
    weights = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    for i, directory in enumerate(directories):
        for strength in STRENGTHS[i % 2 :: 2]:
            for dtype in ROUNDINGS:
                name = f"{directory.parent.name}/{directory.name}"
                if (name, strength, dtype) in done:
                    continue
                scaled = scale(directory, strength, output.parent / "scaled")
                trained = read_trained(scaled)
                base = read_base(trained.base, trained)
                sources = plan_merge(base, trained)
                cheap, there = (
                    sum(kept_by_merge(base, trained, sources, dtype, given).values(), Kept()) for given in (None, stats)
                )
                measured = divergence(loaded.model, AdapterDirectory(scaled), batches, dtype)
                loaded.model.load_state_dict(weights)
                row = {"adapter": name, "strength": strength, "type": dtype, "noise": cheap.ratio} | asdict(measured)
                row |= {"arrives": cheap.arrives, "where the data are": there.ratio, "absolute": there.noise**0.5}
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    report(read(output))


def scale(directory: Path, strength: float, place: Path) -> Path:
    """Write the adapter with its alpha times a strength."""
    place.mkdir(exist_ok=True)
    config = json.loads((directory / "adapter_config.json").read_text())
    pattern = {name: alpha * strength for name, alpha in (config.get("alpha_pattern") or {}).items()}
    write_json(
        place / "adapter_config.json",
        config | {"lora_alpha": config["lora_alpha"] * strength, "alpha_pattern": pattern},
    )
    (place / "adapter_model.safetensors").write_bytes((directory / "adapter_model.safetensors").read_bytes())
    return place


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def report(rows: list[dict]) -> None:
    """Print correlations by ranks of what is cheap with what was measured."""
    from scipy.stats import spearmanr

    share = [one["merged"] / one["base"] for one in rows]
    print(len(rows), "merges of", len({(one["adapter"], one["strength"]) for one in rows}), "adapters")
    for cheap in ("noise", "where the data are"):
        print(cheap, "against the share of the change that is lost:", spearmanr([one[cheap] for one in rows], share)[0])
        for dtype in ROUNDINGS:
            own = [i for i, one in enumerate(rows) if one["type"] == dtype]
            print("  ", dtype, spearmanr([rows[i][cheap] for i in own], [share[i] for i in own])[0])
    print("absolute against nats:", spearmanr([one["absolute"] for one in rows], [one["merged"] for one in rows])[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [Path(word) for word in sys.argv[3:]])
