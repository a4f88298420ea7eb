"""Damaged files give one line: `python -m tests.fuzz 10000` mutates statistics files, plans and adapter directories.

A mutation flips, cuts or adds bytes, changes the JSON of a header, or changes tensors; digests are made to fit again
half of the time. Whatever is read may fit by chance. What must not happen is any error but a one-line LoraInitError.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

import lora_init
from lora_init.adapters.directory import ORIGIN_FILE, AdapterDirectory
from lora_init.errors import LoraInitError
from lora_init.planning.plan import load_plan, save_plan
from lora_init.statistics.statistics import FORMAT, FORMAT_VERSION, Statistics
from lora_init.statistics.tensorfile import TensorFile, write_tensors
from tests.conftest import batches_for, tiny_llama

_JUNK = (None, True, -1, 0, 3, 2.5, 1e308, 10**30, "", "x", "q_proj", [], [1], [None], {}, {"a": 1}, float("nan"))


def make(directory: Path) -> dict[str, Path]:
    """Write one sound file, or directory, of each kind."""
    torch.manual_seed(0)
    model, targets = tiny_llama(), ["q_proj", "k_proj", "down_proj"]
    stats = lora_init.collect(model, batches_for("llama"), targets, rank=2, gradients=True)
    plan = lora_init.allocate_ranks(stats, rank=2)
    return {
        "statistics": stats.save(directory / "stats.safetensors"),
        "plan": save_plan(plan, directory / "plan.json"),
        "adapter": lora_init.build_adapter(stats, plan).save_pretrained(directory / "adapter"),
    }


def use_statistics(path: Path) -> None:
    """Read all that a statistics file holds, and go on with it."""
    stats = Statistics.load(path)
    assert repr(stats) and stats._repr_html_()
    for name in stats:
        assert stats[name].n_components >= 0
        if stats.gradients:
            assert len(stats.gradient(name).left) >= 0
    lora_init.build_adapter(stats, lora_init.allocate_ranks(stats, rank=2))
    stats.save(path.with_suffix(".again"))


def use_plan(path: Path) -> None:
    """Read a plan and ask for what it says."""
    plan = load_plan(path)
    assert repr(plan) and plan._repr_html_() is not None
    plan.to_pandas()
    save_plan(plan, path.with_suffix(".again"))


def use_adapter(path: Path) -> None:
    """Read an adapter directory, and write it for an engine."""
    assert isinstance(AdapterDirectory(path).origin, dict)
    lora_init.export_adapter(path, path.parent / "exported", engine="vllm", overwrite=True)


USES: dict[str, Callable[[Path], None]] = {"statistics": use_statistics, "plan": use_plan, "adapter": use_adapter}


def mutate(kind: str, path: Path, target: Path, dice: random.Random) -> Path:
    """Write a damaged copy."""
    if kind == "adapter":
        target.mkdir(exist_ok=True)
        damaged = dice.choice([file.name for file in path.iterdir() if file.suffix != ".md"])
        for file in path.iterdir():
            copy = target / file.name
            copy.write_bytes(file.read_bytes())
            if file.name == damaged:
                _damage(copy, dice)
    else:
        target.write_bytes(path.read_bytes())
        _damage(target, dice)
    return target


def _damage(file: Path, dice: random.Random) -> None:
    way = dice.choice([_bytes, _json, _tensors] if file.suffix != ".json" else [_bytes, _json, _json])
    with suppress(LoraInitError, SafetensorError):
        way(file, dice)


def _bytes(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    # Half of the time near the start, where headers are.
    limit = len(content) if dice.random() < 0.5 else min(len(content), 4096)
    at, size = dice.randrange(limit), dice.choice([1, 2, 8, 100])
    new = bytes(dice.randrange(256) for _ in range(size))
    way = dice.randrange(5)
    if way == 0:
        del content[at:]
    elif way == 1:
        del content[at : at + size]
    elif way == 2:
        content[at:at] = new
    else:
        content[at : at + size] = new
    file.write_bytes(bytes(content))


def _json(file: Path, dice: random.Random) -> None:
    if file.suffix == ".json":
        tree = json.loads(file.read_text(encoding="utf-8"))
        _change(tree, dice)
        file.write_text(json.dumps(tree), encoding="utf-8")
        return
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    if "header" in metadata:
        opened = TensorFile(file, FORMAT, FORMAT_VERSION)
        _change(opened.header, dice)
        tensors = load_file(file)
        # Digests are those of the tensors again, whatever was done to them.
        header = {key: value for key, value in opened.header.items() if key != "digests"}
        write_tensors(file, FORMAT, FORMAT_VERSION, header, tensors)
    else:
        _change(metadata, dice)
        strings = {str(key): str(value) for key, value in metadata.items()}
        file.write_bytes(save(load_file(file), strings))


def _change(tree: Any, dice: random.Random) -> None:
    """Change one to three places of a JSON tree."""
    for _ in range(dice.randint(1, 3)):
        places = list(_places(tree))
        if not places:
            return
        parent, key = dice.choice(places)
        way = dice.randrange(4)
        if way == 0:
            del parent[key]
        elif way == 1 and isinstance(parent, dict):
            parent[f"{key}x"] = parent.pop(key)
        elif way == 2:
            parent[key] = [parent[key]]
        else:
            parent[key] = copy.deepcopy(dice.choice(_JUNK))  # or a later change would be one of the junk


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for key, value in items:
        yield tree, key
        yield from _places(value)


def _tensors(file: Path, dice: random.Random) -> None:
    tensors = load_file(file)
    key = dice.choice(sorted(tensors))
    tensor, way = tensors[key], dice.randrange(6)
    if way == 0:
        del tensors[key]
    elif way == 1:
        tensors[key] = tensor[: max(len(tensor) - 1, 0)].clone()
    elif way == 2:
        tensors[key] = tensor.flatten()[None].clone()
    elif way == 3:
        tensors[key] = tensor.to(
            dice.choice([torch.int64, torch.float16, torch.bool, torch.complex64, torch.float8_e4m3fn])
        )
    elif way == 4:
        tensors[key] = torch.full_like(tensor, dice.choice([float("nan"), float("inf"), -1.0]))
    else:
        tensors[f"{key}x"] = tensors.pop(key)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    if "header" in metadata and dice.random() < 0.8:
        header = {key: value for key, value in json.loads(metadata["header"]).items() if key != "digests"}
        write_tensors(file, FORMAT, FORMAT_VERSION, header, tensors)
    else:
        save_file(tensors, file, metadata)


def run(count: int, seed: int = 0) -> list[str]:
    """Try `count` mutations of each kind in turn; return what went wrong, a text for each."""
    failures = []
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sound = make(Path(place))
        assert (sound["adapter"] / ORIGIN_FILE).is_file()
        for i in range(count):
            kind = list(USES)[i % len(USES)]
            damaged = mutate(kind, sound[kind], Path(place) / f"damaged-{kind}", random.Random(f"{seed}/{i}"))
            try:
                USES[kind](damaged)
            except LoraInitError as error:
                if "\n" in str(error) or len(str(error)) > 1000:
                    failures.append(f"{kind} {i}: {len(str(error))} characters: {error}")
            except Exception as error:
                failures.append(f"{kind} {i}: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-2)}")
    return failures


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    found = run(n, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{n} mutations, {len(found)} errors that are no one-line LoraInitError")
    print("\n".join(found[:20]))
    sys.exit(bool(found))
