"""Damaged files give one line, never a traceback: a seeded mutator for statistics files, plans and adapter directories.

python -m tests.fuzz 10000    # so many damaged files, a third of each kind
"""

import copy
import json
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_init import LoraInitError, Statistics, allocate_ranks, build_adapter, collect
from lora_init.cli.inspect import describe
from lora_init.planning.plan import load_plan, save_plan
from lora_init.statistics.statistics import FORMAT, FORMAT_VERSION
from lora_init.statistics.tensorfile import write_tensors
from tests.conftest import batches_for, tiny_llama

# What stands in the place of a value: of another type, out of range, too large, too deep.
WRONG = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x" * 50, "../../etc", [], [[]], {}, {"a": {}}, [1, "2"]]


def make(folder):
    """Write one file of each kind, of a tiny model."""
    torch.manual_seed(0)
    stats = collect(tiny_llama(), batches_for("llama"), rank=2, gradients=True, data="some data")
    ranks = allocate_ranks(stats, rank=2)
    stats.save(folder / "stats")
    save_plan(ranks, folder / "plan.json")
    build_adapter(stats, ranks).save_pretrained(folder / "adapter")


def mutated_bytes(content, rng):
    """Flip, cut, repeat or insert bytes."""
    content, at = bytearray(content), rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        content[at:at] = content[at : at + rng.randrange(1, 64)]
    else:
        content[at : at + 8] = bytes(rng.randrange(256) for _ in range(8))
    return bytes(content)


def mutated_value(value, rng):
    """Put something wrong in some place of a JSON value, or leave that place out."""
    value = copy.deepcopy(value)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = rng.choice(places)
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(WRONG)
    return value


def damaged_statistics(folder, target, rng):
    """Damage the bytes; or the header and sign it again, so that nothing but its content is wrong."""
    if rng.random() < 0.5:
        target.write_bytes(mutated_bytes((folder / "stats").read_bytes(), rng))
        return
    with safe_open(folder / "stats", framework="pt") as file:
        header = json.loads(file.metadata()["header"])
    del header["digests"]
    tensors = load_file(folder / "stats")
    if rng.random() < 0.3:
        name = rng.choice(list(tensors))
        other = tensors[name]
        tensors[name] = rng.choice([torch.zeros(0), other[..., :1].clone(), other.int(), torch.ones(3, 4, 5)])
    else:
        header = mutated_value(header, rng)
    write_tensors(target, FORMAT, FORMAT_VERSION, header, tensors)


def read_statistics(path):
    """Read all of a file, and do with it what a command would."""
    stats = Statistics.load(path)
    for name in stats:
        stats[name], stats.gradient(name)
    build_adapter(stats, allocate_ranks(stats, rank=2))
    describe(path)


def damaged_json(source, target, rng):
    if rng.random() < 0.5:
        target.write_bytes(mutated_bytes(source.read_bytes(), rng))
    else:
        target.write_text(json.dumps(mutated_value(json.loads(source.read_text()), rng)))


def try_one(number, folder, work):
    """Damage something and read it.

    Returns:
        Its kind, and the error; None if nothing that is checked was wrong.
    """
    rng = random.Random(number)
    kind = ("statistics", "plan", "adapter")[number % 3]
    target = work / f"{number}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "statistics":
                damaged_statistics(folder, target, rng)
                read_statistics(target)
            elif kind == "plan":
                damaged_json(folder / "plan.json", target, rng)
                load_plan(target)
                describe(target)
            else:
                shutil.copytree(folder / "adapter", target)
                name = rng.choice(sorted(path.name for path in target.iterdir()))
                if name.endswith(".json"):
                    damaged_json(folder / "adapter" / name, target / name, rng)
                else:
                    (target / name).write_bytes(mutated_bytes((folder / "adapter" / name).read_bytes(), rng))
                describe(target)
    except Exception as error:
        return kind, error
    finally:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    return kind, None


def main(n):
    """Try `n` damaged files; return those whose error is not one line of ours."""
    counts, wrong = {}, []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        for number in range(n):
            kind, error = try_one(number, folder, folder)
            ours = isinstance(error, LoraInitError) and "\n" not in str(error)
            outcome = "unnoticed" if error is None else "one line" if ours else "wrong"
            counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
            if outcome == "wrong":
                wrong.append((number, kind, error))
    return counts, wrong


if __name__ == "__main__":
    counts, wrong = main(int(sys.argv[1]))
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{kind}: {count} {outcome}")
    for number, kind, error in wrong[:20]:
        print(f"seed {number}, {kind}: {type(error).__name__}: {error}")
    sys.exit(bool(wrong))
