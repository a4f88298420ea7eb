"""Where the seconds of `lora-init init` go: `python -m benchmarks.seconds`, one thread, processor time.

Each line is a new process, from the first import to the adapter on disk. Code that is imported when a part first needs
it counts as that part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.settings import table

# Functions that a part is, by module; what one of them calls counts for itself.
PARTS = {
    "what the model is": ("lora_init.loading.models", "open_model"),
    "data": ("lora_init.loading.batches", "load_batches"),
    "weights": ("lora_init.loading.models", "ModelSource.load"),
    "pass": ("lora_init.collection.collect", "collect"),
    "ranks": ("lora_init.planning.allocate", "allocate_ranks"),
    "adapter": ("lora_init.building.build", "build_adapter"),
    "writing": ("lora_init.adapters.adapter_init", "AdapterInit.save_pretrained"),
}
TEMPLATE = ["--template", "{passage} {question}\n{options}\nAnswer:", "--completion", " {answer}"]
COMMANDS = {
    "SmolLM2, SIQA, eva": ("smollm2", "SIQA", "test.jsonl", TEMPLATE),
    "SmolLM2, SIQA, natural-gradient": ("smollm2", "SIQA", "test.jsonl", [*TEMPLATE, "--method", "natural-gradient"]),
    "MiniLM, SIQA, eva": ("minilm", "SIQA", "test.jsonl", ["--template", "{passage}"]),
}


def main() -> None:
    """Run each command in a process of its own, and print what its parts took."""
    import demo_assets

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for i, (name, (model, folder, file, options)) in enumerate(COMMANDS.items()):
            data = demo_assets.dataset(folder, file)
            command = ["init", getattr(demo_assets, model)(), data, *options, "-o", f"{directory}/{i}", "--quiet"]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.seconds", *map(str, command)], stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
            )  # fmt: skip
            parts = json.loads(done.stdout.splitlines()[-1])
            made = json.loads(Path(f"{directory}/{i}/lora_init.json").read_text())["provenance"]
            rows.append([name, made["n_batches"], *(f"{seconds:.1f}" for seconds in parts.values())])
    print(table(["", "batches", *PARTS, "all else", "total"], rows))


def timed(arguments: list[str]) -> None:
    """Run one command here, and print the seconds of its parts."""
    inside: list[float] = [0.0]
    parts = dict.fromkeys(PARTS, 0.0)
    for part, (module, name) in PARTS.items():
        owner: Any = import_module(module)
        *path, last = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        setattr(owner, last, _timing(getattr(owner, last), part, parts, inside))
    from lora_init.cli.app import main as run

    sys.argv = ["lora-init", *arguments]
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise
    total = time.process_time()
    print(json.dumps({**parts, "all else": total - sum(parts.values()), "total": total}))


def _timing(function: Any, part: str, parts: dict[str, float], inside: list[float]) -> Any:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        inside.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            took = time.process_time() - start
            parts[part] += took - inside.pop()
            inside[-1] += took

    return wrapper


if __name__ == "__main__":
    timed(sys.argv[1:]) if len(sys.argv) > 1 else main()
