"""An exported adapter does what the trained one does, in PEFT, whatever kind it is of; errors name what is wrong."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from lora_init import LoraInitError, check_fit, export_adapter
from lora_init.adapters.directory import AdapterDirectory
from lora_init.errors import LoraInitWarning
from lora_init.loading.models import QUANTIZATIONS
from lora_init.serving.compress import error_at
from lora_init.serving.engines import ENGINES, PEFT, find_engine
from lora_init.serving.export import (
    RECORD_FILE,
    Exported,
    _check_options,
    _check_start,
    _command,
    _next_smaller,
    _notes,
    _Size,
    _verify,
    check_before_loading,
    command_for_all,
    exported_as,
    verify_for_all,
)
from lora_init.serving.trained import Layer, Trained, read_trained
from tests.conftest import refused as one_line
from tests.conftest import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.serving.made import ADAPTERS, IDS, config_of, load, logits, randomise, refused, train


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.slow
def test_one_rank_and_one_scaling_give_the_same_outputs(name, base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS[name])
    exported = export_adapter(trained, tmp_path / "served")
    config = config_of(tmp_path / "served")
    assert config["r"] == exported.rank in (8, 16) and not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config.get("use_rslora") and config["lora_alpha"] / config["r"] == exported.scaling
    shapes = [t.shape for key, t in load_file(tmp_path / "served/adapter_model.safetensors").items() if "lora_A" in key]
    assert {shape[0] for shape in shapes} == {exported.rank}
    expected = logits(load(base), trained)
    assert (expected - logits(load(base))).abs().max() > 0.01  # there is something to get wrong
    torch.testing.assert_close(logits(load(base), tmp_path / "served"), expected, atol=1e-5, rtol=1e-5)
    assert exported.error == 0.0 and not exported.errors


def with_head(base, directory, new_rows, **settings):
    """Make an adapter with one of the head, on a base whose new tokens may have got their rows before training."""
    model = load(base)
    if new_rows:
        model.lm_head.weight.data[60:] = torch.randn(4, 32)
    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM") | settings
    model = get_peft_model(model, LoraConfig(**settings))
    model.save_pretrained(directory / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory / "trained")
    return logits(model.eval()), directory / "trained"


def in_cache(base, directory, monkeypatch, *left_out):
    """Put a model into a cache of the hub, as `me/base`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(directory / "hub"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(directory / "hub"), raising=False)
    repository, commit = directory / "hub/models--me--base", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    return shutil.copytree(base, repository / "snapshots" / commit, ignore=shutil.ignore_patterns(*left_out))


@pytest.mark.parametrize("new_rows", [False, True])
@pytest.mark.parametrize("stored", ["in a directory", "in the hub's cache", "as a pickle", "elsewhere"])
@pytest.mark.slow
def test_rows_that_were_set_before_training_are_exported_or_refused(stored, new_rows, base, tmp_path, monkeypatch):
    expected, trained = with_head(base, tmp_path, new_rows)
    plain, source = load(base), str(base)
    compared = stored in ("in a directory", "in the hub's cache")
    if stored == "as a pickle":
        (base / "model.safetensors").unlink()
        torch.save(plain.state_dict(), base / "pytorch_model.bin")
    elif not compared or "hub" in stored:
        in_cache(base, tmp_path, monkeypatch, *[] if compared else ["model.safetensors"])
        source = "me/base"
    config = config_of(trained) | {"base_model_name_or_path": source}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    export_adapter(trained, tmp_path / "served")
    torch.testing.assert_close(logits(plain, tmp_path / "served"), expected, atol=1e-5, rtol=1e-5)
    said = "^vllm has the weights of its base alone, and 'lm_head.base_layer.weight' in the adapter is not .*base="
    if compared and not new_rows:
        export_adapter(trained, tmp_path / "engine", "vllm")
        assert read_trained(tmp_path / "engine").copies == {}
    else:
        refused(said, trained, tmp_path / "engine", "vllm")
    fits = not check_fit(trained, engine="vllm").misfits
    assert fits == (compared and not new_rows)
    if compared and new_rows:
        refused("merge_and_unload", trained, tmp_path / "merged", merge_into=source)


def test_a_base_that_is_downloaded_to_be_merged_is_compared_too(base, tmp_path, monkeypatch):
    expected, trained = with_head(base, tmp_path, new_rows=False)
    folder = in_cache(base, tmp_path, monkeypatch, "model.safetensors")

    def download(source, ignore_patterns):
        shutil.copy(base / "model.safetensors", folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    export_adapter(trained, tmp_path / "merged", merge_into="me/base")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new_rows", [False, True])
@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.slow
def test_what_a_start_took_off_a_head_is_put_back_once(method, new_rows, base, tmp_path):
    expected, trained = with_head(base, tmp_path, new_rows, init_lora_weights=method)
    there = dict(base=str(base), start=tmp_path / "start")
    for keep_ranks in (False, True):
        export_adapter(trained, tmp_path / "served", keep_ranks=keep_ranks, overwrite=True, **there)
        torch.testing.assert_close(logits(load(base), tmp_path / "served"), expected, atol=1e-4, rtol=1e-4)
        assert bool(read_trained(tmp_path / "served").copies) == new_rows
    if new_rows:
        refused("^vllm has the weights of its base alone, and", trained, tmp_path / "engine", "vllm", **there)
        return
    export_adapter(trained, tmp_path / "engine", "vllm", **there)
    export_adapter(trained, tmp_path / "merged", start=tmp_path / "start", merge_into=str(base))
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


def test_a_start_that_corrects_a_quantized_base_has_taken_nothing_off_a_head(base, tmp_path):
    _, trained = with_head(base, tmp_path, new_rows=False, init_lora_weights=False)
    (trained / "lora_init.json").write_text('{"method": "qera", "error_size": 1.0}')
    export_adapter(trained, tmp_path / "engine", "vllm", start=tmp_path / "start")
    model = load(base)
    for part, sign in (("trained", 2.0), ("start", -2.0)):  # alpha / r = 2
        tensors = load_file(tmp_path / part / "adapter_model.safetensors")
        for key in [key for key in tensors if "lora_A" in key]:
            name = key.removeprefix("base_model.model.").partition(".lora_A")[0]
            model.get_submodule(name).weight.data += sign * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    torch.testing.assert_close(logits(load(base), tmp_path / "engine"), logits(model), atol=1e-4, rtol=1e-4)


def test_a_class_of_the_users_own_stays_named_for_peft_and_not_for_engines(base, tmp_path):
    trained = train(base, tmp_path / "trained", target_modules=["q_proj"])
    own = {"base_model_class": "MyLlama", "parent_library": "mine"}
    (trained / "adapter_config.json").write_text(
        json.dumps(config_of(trained) | {"task_type": None, "auto_mapping": own})
    )
    for engine, named in ((None, own), ("vllm", None)):
        export_adapter(trained, tmp_path / "out", engine, overwrite=True)
        assert config_of(tmp_path / "out").get("auto_mapping") == named


def test_a_bias_beside_an_adapter_is_merged(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    trained = train(tmp_path / "base", tmp_path / "trained", target_modules=["c_fc"], bias="all", fan_in_fan_out=True)
    tensors = load_file(trained / "adapter_model.safetensors")
    biases = {key: value + 0.1 for key, value in tensors.items() if key.endswith(".bias")}
    assert any(".base_layer.bias" in key for key in biases)
    save_file(tensors | biases, trained / "adapter_model.safetensors")
    export_adapter(trained, tmp_path / "merged", merge_into=str(tmp_path / "base"))
    expected = logits(load(tmp_path / "base"), trained)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_gpt2_with_transposed_weights(use_dora, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    settings = dict(
        target_modules=["c_attn", "c_proj"], rank_pattern={"c_attn": 2}, fan_in_fan_out=True, use_dora=use_dora
    )
    trained = train(tmp_path / "base", tmp_path / "trained", **settings)
    export_adapter(trained, tmp_path / "served", keep_ranks=True)
    export_adapter(trained, tmp_path / "merged", merge_into=str(tmp_path / "base"))
    expected = logits(load(tmp_path / "base"), trained)
    torch.testing.assert_close(logits(load(tmp_path / "base"), tmp_path / "served"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [dict(), dict(tie_word_embeddings=True)], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["rsLoRA with ranks", "DoRA", "whole head", "embedding", "head"])
@pytest.mark.slow
def test_a_merged_model_does_what_peft_does(name, kind, tmp_path):
    settings = ADAPTERS.get(name, dict(target_modules=["lm_head", "q_proj"]))
    tiny_llama(**kind).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base").float()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)).eval()
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "trained")
    exported = export_adapter(tmp_path / "trained", tmp_path / "merged", merge_into=str(tmp_path / "base"))
    merged = load(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16 and exported.rank == 0
    written = [tensor for file in (tmp_path / "merged").glob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in written} == {torch.bfloat16}
    expected = adapted(IDS).logits.detach()
    effect = (expected - load(tmp_path / "base").float()(IDS).logits).abs().max()
    # The merged weights are rounded to bfloat16, to 8 bits; the adapter's effect is far above that.
    assert (expected - merged.float()(IDS).logits).abs().max() < effect / 5 and effect > 0.03


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("kept", [("model.embed_tokens", "lm_head"), ("lm_head",)], ids=["both", "the last alone"])
def test_embeddings_that_were_tied_are_no_longer_whatever_the_checkpoint_holds(kept, layer, tmp_path):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    trained = train(tmp_path / "base", tmp_path / "trained", target_modules=["q_proj", layer])
    expected = logits(load(tmp_path / "base"), trained)
    tensors = load_file(tmp_path / "base/model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {f"{name}.weight": embedding.clone() for name in kept}
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    export_adapter(trained, tmp_path / "merged", merge_into=str(tmp_path / "base"))
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_an_embedding_alone_is_looked_at_before_its_base_is_loaded(base, tmp_path):
    trained = train(base, tmp_path / "trained", target_modules=["embed_tokens"])
    check_before_loading(AdapterDirectory(trained), str(base), None)


def test_scalings_that_differ_are_not_rounded_before_the_merge(base, tmp_path):
    """The adapter is bfloat16, the model float32."""
    trained = train(base, tmp_path / "trained", **ADAPTERS["alphas"])
    tensors = load_file(trained / "adapter_model.safetensors")
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, trained / "adapter_model.safetensors")
    export_adapter(trained, tmp_path / "merged", merge_into=str(base))
    expected = logits(load(base), trained)  # PEFT computes in float32
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)
    export_adapter(trained, tmp_path / "served")
    written = load_file(tmp_path / "served/adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in written} == {torch.bfloat16}


def test_a_merge_goes_file_by_file_and_takes_the_tokenizer_along(base, tmp_path, monkeypatch):
    from lora_init.serving import base as base_room

    left = ["notes.bin", "a.pt", "a.pth", "a.gguf", "a.msgpack", "a.h5", "README.md", "b.index.json"]
    for name in ("tokenizer.json", *left):
        (base / name).write_text("{}")
    (base / "original").mkdir()
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    trained = train(base, tmp_path / "trained", **ADAPTERS["plain"])
    monkeypatch.setattr(base_room, "SHARD_BYTES", 20_000)
    (base / "adapter_config.json").write_text("{}")  # beside a merged model, transformers would load an adapter by it
    export_adapter(trained, tmp_path / "merged", merge_into=str(base))
    (base / "adapter_config.json").unlink()
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05}.safetensors" for i in range(len(files))] and files[3:]
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    there = {name: file.name for file in files for name in load_file(file)}
    assert (
        index == {"metadata": {}, "weight_map": there} and there.keys() == load_file(base / "model.safetensors").keys()
    )
    sizes = [[one.nbytes for one in load_file(file).values()] for file in files]
    assert all(sum(some) >= 20_000 > sum(some) - max(some) for some in sizes[:-1])
    assert {path.name for path in (tmp_path / "merged").iterdir()} - {file.name for file in files} == {
        "README.md", "additional_chat_templates", "config.json", "export.json", "generation_config.json",
        "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    assert (tmp_path / "merged/README.md").read_text() != "{}"
    assert (tmp_path / "merged/additional_chat_templates/tools.jinja").read_text() == "{{ messages }}"
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(load(base), trained), atol=1e-5, rtol=1e-5)


def test_intruders_are_reduced_as_peft_does_it(base, tmp_path):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    trained = train(base, tmp_path / "trained", r=2, target_modules=["q_proj", "down_proj"])
    model = load(base)
    before = dict(model.named_modules())
    exported = export_adapter(trained, tmp_path / "served", reduce_intruders=model)
    assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in before.items()}
    assert exported.intruders is not None and exported.intruders[0] >= exported.intruders[1] > 0
    peft_model = PeftModel.from_pretrained(load(base), trained)
    reduce_intruder_dimension(peft_model, logging_sink=None)
    torch.testing.assert_close(logits(load(base), tmp_path / "served"), logits(peft_model.eval()), atol=1e-4, rtol=1e-4)
    assert (logits(load(base), tmp_path / "served") - logits(load(base), trained)).abs().max() > 0.01
    tensors = load_file(trained / "adapter_model.safetensors")  # which PEFT reads as float32
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, trained / "adapter_model.safetensors")
    export_adapter(trained, tmp_path / "narrow", reduce_intruders=model)
    written = load_file(tmp_path / "narrow/adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in written} == {torch.bfloat16}


def test_names_with_the_adapters_own_name_in_them_are_told_of_rename(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["plain"])
    tensors = load_file(trained / "adapter_model.safetensors")
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    save_file(named, trained / "adapter_model.safetensors")
    refused("has lora_A.default.weight for lora_A.weight. `lora-init export --rename`", trained, tmp_path / "served")
    export_adapter(trained, tmp_path / "served", rename=True)


def test_what_cannot_be_is_refused_before_anything_is_written(base, tmp_path):
    trained, output = train(base, tmp_path / "trained", **ADAPTERS["plain"]), tmp_path / "served"
    refused("engine 'vlm' is unknown. Did you mean vllm", trained, output, "vlm")
    refused("engine 'xyz' is unknown. Choose from vllm, ", trained, output, "xyz")
    refused("rank=2 and parameters=9 are both given", trained, output, rank=2, parameters=9)
    refused("rank=0, expected a whole number of at least 1", trained, output, rank=0)
    refused("rank=2.5, expected a whole number of at least 1", trained, output, rank=2.5)
    refused("megabytes='1', expected a number above 0", trained, output, megabytes="1")
    for number in (math.nan, math.inf, -1):
        refused(f"megabytes={number}, expected a number above 0", trained, output, megabytes=number)
    refused(
        "rank=100000: no layer of this adapter can have more than rank 32. Choose less", trained, output, rank=10**5
    )
    refused("start=.*trained is the trained adapter itself", trained, output, start=trained)
    refused("dtype='half' is unknown. Choose from float32", trained, output, dtype="half")
    refused("dtype='bfloat16': llama.cpp reads float32 alone", trained, output, "llama.cpp", dtype="bfloat16")
    refused("a merged model has its own type", trained, output, dtype="bfloat16", merge_into=str(base))
    refused("tgi takes one rank", trained, output, "tgi", keep_ranks=True)
    refused("a merged model has no ranks", trained, output, rank=2, merge_into=str(base))
    refused("a budget of 10 parameters: rank 1 in all 6 layers takes", trained, output, parameters=10)
    refused("a budget of 10 parameters", trained, output, parameters=10, keep_ranks=True)
    refused("base model 'nowhere' cannot be read", trained, output, base="nowhere")
    tiny_llama(hidden_size=16, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    refused(r"is \[32, 4\], and \[16, 4\] fits LlamaForCausalLM", trained, output, base=str(tmp_path / "other"))
    tiny_llama(num_hidden_layers=2).save_pretrained(tmp_path / "shorter")
    refused("layers.2.*LlamaForCausalLM has no layer of this name", trained, output, base=str(tmp_path / "shorter"))
    pissa = train(base, tmp_path / "pissa", target_modules=["q_proj"])
    (pissa / "adapter_config.json").write_text(json.dumps(config_of(pissa) | {"init_lora_weights": "pissa_niter_4"}))
    refused(r"began as pissa_niter_4, which changes the base weights.*--start", pissa, output)
    corrected = train(base, tmp_path / "corrected", target_modules=["q_proj"])
    (corrected / "lora_init.json").write_text('{"method": "qera", "error_size": 1.0}')
    refused("merge is into float weights", corrected, output, merge_into=str(base))
    biased = train(base, tmp_path / "biased", target_modules=["q_proj"], lora_bias=True)
    refused("has lora_B.bias, which no plain LoRA has", biased, output)
    refused("has no layer 'model.layers.0.mlp.down_proj'", trained, output, start=pissa)
    activated = train(base, tmp_path / "activated", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    refused("aLoRA .* merged it would not", activated, output, merge_into=str(base))
    lengths = train(base, tmp_path / "lengths", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    said = r"^DoRA on an embedding gives lengths to columns, so it is not merged here. PEFT's merge_and_unload\(\)"
    refused(said, lengths, output, merge_into=str(base))
    refused("vllm does not take alora_invocation_tokens. Serve it with PEFT", activated, output, "vllm")


@pytest.mark.parametrize("options", [dict(), dict(engine="llama.cpp"), dict(engine="ollama"), dict(merge_into="base")])
@pytest.mark.parametrize("what", ["full disk", "Ctrl-C"])
def test_nothing_half_written_is_left(what, options, base, tmp_path, monkeypatch):
    """The kernel's answer to a full disk is that of a limit on the size of files."""
    import resource
    import signal

    trained = train(base, tmp_path / "trained", **ADAPTERS["plain"])
    options |= {"merge_into": str(base)} if "merge_into" in options else {}
    if what == "Ctrl-C":
        for writer in ("base.save_file", "writers.write_files"):
            monkeypatch.setattr(f"lora_init.serving.{writer}", interrupted)
        if "engine" in options:
            monkeypatch.setattr(pytest.importorskip("gguf").GGUFWriter, "write_tensors_to_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_adapter(trained, tmp_path / "served", **options)
        assert not [path for path in tmp_path.iterdir() if "served" in path.name]
        return
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1][1]))
        refused("served.*: cannot be written: .*Nothing was changed", trained, tmp_path / "served", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old[1])
        signal.signal(signal.SIGXFSZ, old[0])


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def test_only_what_an_export_wrote_is_replaced(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["plain"])
    export_adapter(trained, tmp_path / "served")
    with pytest.raises(LoraInitError, match="exists"):
        export_adapter(trained, tmp_path / "served")
    assert export_adapter(trained, tmp_path / "served", rank=64, overwrite=True).rank == 64
    (tmp_path / "served/notes.txt").write_text("mine")
    with pytest.raises(LoraInitError, match=r"more than .* \(notes.txt\)"):
        export_adapter(trained, tmp_path / "served", overwrite=True)
    with pytest.raises(LoraInitError, match="is not overwritten"):
        export_adapter(trained, trained, overwrite=True)
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(LoraInitError, match="is no GGUF file"):
        export_adapter(trained, tmp_path / "a.gguf", "llama.cpp", overwrite=True)


def test_the_model_that_is_merged_into_is_the_base(base, tmp_path):
    """Also in the command that asks a server, where the adapter names another, not where it is another path to it."""
    adapter, other = train(base, tmp_path / "adapter", **ADAPTERS["plain"]), tmp_path / "other"
    shutil.copytree(base, other)
    said = "base='.*other' with merge_into='.*': the model that is merged into is the base. Name one."
    refused(said, adapter, tmp_path / "out", base=str(other), merge_into=str(base))
    again = base.parent / ".." / base.parent.name / base.name
    for into, more in ((base, ""), (other, f" --base {other}"), (again, "")):
        place = tmp_path / f"into {into.name}"
        told = export_adapter(adapter, place, base=str(into), merge_into=str(into), overwrite=True)
        assert told.verify.endswith(f"into {into.name}'{more}"), told.verify


def test_what_could_not_be_compared_or_is_otherwise_is_warned_of(base, tmp_path):
    adapter, other = train(base, tmp_path / "adapter", **ADAPTERS["plain"]), tmp_path / "other"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    with pytest.warns(LoraInitWarning, match="rms_norm_eps"):
        export_adapter(adapter, tmp_path / "one", "vllm", base=str(other))
    change = config_of(adapter) | {"base_model_name_or_path": str(tmp_path / "elsewhere")}
    (adapter / "adapter_config.json").write_text(json.dumps(change))
    with pytest.warns(LoraInitWarning, match="names '.*elsewhere' as its base, with which .* could not be compared"):
        export_adapter(adapter, tmp_path / "two", "vllm", base=str(base))


def test_convolutions_and_adapters_of_no_base_are_refused(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "convolution")
    refused("layer '0' is a convolution", tmp_path / "convolution", tmp_path / "served")
    model = get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "linear")
    refused("the adapter names no base model. Name it by base=", tmp_path / "linear", tmp_path / "served")


@pytest.mark.parametrize("options", [{}, {"engine": "vllm"}, {"rank": 2}, {"dtype": "bfloat16"}, {"merge": True}])
def test_an_export_is_told_as_it_is_written(options, base, tmp_path):
    train(base, tmp_path / "adapter", **ADAPTERS["rsLoRA with ranks"])
    wanted = {"merge_into": base} if options.get("merge") else options
    told = export_adapter(tmp_path / "adapter", tmp_path / "out", **wanted)
    record = json.loads((tmp_path / "out" / RECORD_FILE).read_text())
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.name != RECORD_FILE]
    assert told.n_bytes == sum(file.stat().st_size for file in files) == record["n_bytes"]
    assert len({file.stat().st_mode for file in files}) == 1  # an engine may be another user
    adapter, path = tmp_path / "adapter", tmp_path / "out"
    load, verify = f"AutoModelForCausalLM.from_pretrained({str(base)!r})", ""
    command = f"PeftModel.from_pretrained({load}, {str(path)!r})"
    if options.get("merge"):
        command = f"vllm serve {path}"
        verify = f"lora-init verify {adapter} --url http://127.0.0.1:8000/v1 --model {path}"
    elif "engine" in options:
        command = f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules out={path}"
        verify = f"lora-init verify {path} --url http://127.0.0.1:8000/v1 --model out"
    assert (told.command, told.verify) == (command, verify)
    what = "merged into its base model." if options.get("merge") else f"rank {told.rank} at most."
    what += f" Compressed, at a relative error of {told.error:.2%}." if "rank" in options else ""
    title, ready = "# A trained LoRA adapter, ready to serve\n\n", f"Exported by lora_init: {what}"
    assert (path / "README.md").read_text().endswith(f"\n{title}{ready}\n\n```\n{command}\n```\n")
    assert record["files"] == sorted({file.relative_to(tmp_path / "out").parts[0] for file in files})
    assert {key: record[key] for key in told.to_dict()} == json.loads(json.dumps(told.to_dict()))
    if "merge_into" not in wanted:
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert told.parameters == sum(tensor.numel() for tensor in tensors.values())
        assert told.rank == max(len(tensor) for key, tensor in tensors.items() if "lora_A" in key)


def test_a_weight_that_others_share_is_not_merged(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_t5(), LoraConfig(r=2, target_modules=["shared", "q"], task_type="SEQ_2_SEQ_LM"))
    randomise(model)
    model.save_pretrained(tmp_path / "trained")
    refused(
        "'shared.weight' is also decoder.embed_tokens.weight, encoder.embed_tokens.weight.* Serve model and adapter",
        tmp_path / "trained", tmp_path / "merged", merge_into=str(tmp_path / "base"),
    )  # fmt: skip


HERE = Path("/out/my dir")
COMMANDS = {
    "vllm": "vllm serve 'my base' --enable-lora --max-lora-rank 16 --lora-modules 'my dir'='/out/my dir'",
    "sglang": "python -m sglang.launch_server --model-path 'my base' --enable-lora --max-lora-rank 16 --lora-paths "
              "'my dir'='/out/my dir'",
    "llama.cpp": "llama-server --model BASE.gguf --lora '/out/my dir'",
    "ollama": "ollama create 'my dir' --file '/out/my dir'/Modelfile",
    "tgi": "text-generation-launcher --model-id 'my base' --lora-adapters 'my dir'='/out/my dir'",
    "lorax": "lorax-launcher --model-id 'my base' --adapter-id '/out/my dir' --adapter-source local",
    "mlx": "mlx_lm.server --model 'my base' --adapter-path '/out/my dir'",
}  # fmt: skip
SERVERS = {
    "vllm": "8000/v1 --model 'my dir'", "sglang": "30000/v1 --model 'my dir'", "llama.cpp": "8080/v1",
    "ollama": "11434/v1 --model 'my dir':latest", "tgi": "3000/v1 --model 'my dir'",
    "lorax": "3000/v1 --model '/out/my dir'", "mlx": "8080/v1",
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_a_command_serves_what_was_written_and_another_asks_about_it(engine):
    one = ENGINES[engine]
    assert _command(one, HERE, "my base", 12, {"task_type": "SEQ_CLS"}, {"score.weight": (3, 4)}) == COMMANDS[engine]
    where = f"--url http://127.0.0.1:{SERVERS[engine]}"
    ask = f"lora-init verify '/out/my dir' {where}"
    assert _verify(one.server, HERE, Path("/trained"), True, False, None) == ask
    assert _verify(one.server, HERE, Path("/trained"), False, False, None) == ""
    other = f"lora-init verify /trained {where} --base 'my base'"
    assert _verify(one.server, HERE, Path("/trained"), False, True, "my base") == other
    assert _verify("", HERE, HERE, True, True, None) == ""
    made = [Exported(Path(f"/out/{name}"), engine, rank, 1.0, f"serve it as {name}=/out/{name}")
            for name, rank in (("a", 8), ("b", 16), ("c d", 4))]  # fmt: skip
    several = {"tgi": ",", "vllm": " ", "sglang": " "}.get(engine)
    expected = several and "serve it as " + several.join(["a=/out/a", "b=/out/b", "'c d'='/out/c d'"])
    assert command_for_all(made) == (expected or "")
    url = one.server.partition(" --model")[0]
    assert verify_for_all(made) == f"lora-init verify /out/a /out/b '/out/c d' {url}"
    assert verify_for_all(made, "b c") == f"{verify_for_all(made)} --base 'b c'"


@pytest.mark.parametrize(("config", "shapes", "load"), [
    ({}, {}, "AutoModelForCausalLM.from_pretrained('my base')"),
    ({"task_type": "CAUSAL_LM"}, {"x.score.weight": (3, 4)}, "AutoModelForCausalLM.from_pretrained('my base')"),
    ({"task_type": "SEQ_CLS"}, {"other": (5,), "x.score.weight": (3, 4), "y.score.weight": (9, 4)},
     "AutoModelForSequenceClassification.from_pretrained('my base', num_labels=3)"),
    ({"task_type": "TOKEN_CLS"}, {"x.classifier.weight": (7, 4)},
     "AutoModelForTokenClassification.from_pretrained('my base', num_labels=7)"),
    ({"task_type": "SEQ_CLS"}, {"x.classifier.bias": (7,)},
     "AutoModelForSequenceClassification.from_pretrained('my base')"),
    ({"auto_mapping": {"base_model_class": "LlamaModel"}}, {}, "AutoModel.from_pretrained('my base')"),
    ({"task_type": "SEQ_2_SEQ_LM", "auto_mapping": None}, {}, "AutoModelForSeq2SeqLM.from_pretrained('my base')"),
])  # fmt: skip
def test_peft_is_told_the_class_and_the_labels(config, shapes, load):
    assert _command(PEFT, HERE, "my base", 12, config, shapes) == f"PeftModel.from_pretrained({load}, '/out/my dir')"


def test_a_file_is_served_under_its_name_without_the_ending():
    assert _command(ENGINES["vllm"], Path("/a/b.gguf"), "c", 8, {}, {}).endswith("--lora-modules b=/a/b.gguf")
    assert _command(ENGINES["vllm"], Path("/a/b.v1"), "c", 8, {}, {}).endswith("--lora-modules b.v1=/a/b.v1")


def in_memory(rank, dtype=torch.float32, **config):
    one = Layer(torch.randn(rank, 12).to(dtype), torch.randn(9, rank).to(dtype), 1.0)
    return Trained(config, {"h": one}, {})


@pytest.mark.parametrize(("asked", "engine", "dtype", "most"), [
    ({}, "vllm", torch.float32, None),
    (dict(rank=2), "vllm", torch.float32, None),
    (dict(parameters="2k"), "vllm", torch.float32, 2000),
    (dict(parameters=7), "llama.cpp", torch.bfloat16, 7),
    (dict(megabytes=0.001), "vllm", torch.float32, 250),
    (dict(megabytes=0.001), "vllm", torch.bfloat16, 500),
    (dict(megabytes=0.001, dtype="bfloat16"), "vllm", torch.float32, 500),
    (dict(megabytes=0.001, dtype="float32"), "vllm", torch.bfloat16, 250),
    (dict(megabytes=0.0010019), "llama.cpp", torch.bfloat16, 250),  # whose form has a type of its own
])  # fmt: skip
def test_a_size_is_a_number_of_parameters(asked, engine, dtype, most):
    size = _Size(**dict(rank=None, parameters=None, megabytes=None, keep_ranks=False, dtype=None) | asked)
    assert size.most(ENGINES[engine], in_memory(2, dtype)) == most
    assert size.limits == {name: value for name, value in asked.items() if name != "dtype"}
    assert size.is_given == bool(asked) and replace(size, keep_ranks=True).is_given


def test_the_next_smaller_rank_is_that_of_vllm_below_the_one_chosen():
    for rank, chosen, below in ((10, 16, 8), (9, 320, 256), (16, 16, None), (5, 8, None), (20, 16, None)):
        trained = in_memory(rank)
        assert _next_smaller(trained, chosen) == (below and (below, error_at(trained, below)))


def test_what_to_know_of_an_adapter_is_noted(tmp_path):
    made = {"auto_mapping": {"lora_init": {"provenance": {"quantisation": QUANTIZATIONS["nf4"]}}}}
    began, untrained = SimpleNamespace(path=tmp_path, error_size=0.0), Layer(torch.ones(1, 2), torch.zeros(2, 1), 1.0)
    never = "B A is zero in every layer: the adapter was never trained, and changes nothing."
    on = "it was made on a base in nf4: on another one, as --data measures it, it acts otherwise"
    assert _notes(in_memory(1), began) == () and _notes(Trained({}, {"h": untrained}, {}), began) == (never,)
    assert _notes(in_memory(1, **made), began) == (on,)
    assert _notes(Trained(made, {"h": untrained}, {}), began) == (never, on)
    began.error_size = 0.5  # its start is subtracted, or the base is quantized again
    assert _notes(in_memory(1, **made), began) == ()


@pytest.mark.parametrize(("origin", "base_change", "error_size", "start", "merge_into", "said"), [
    ({}, "", 0.0, None, None, ""),
    ({}, "", 0.0, None, "base", ""),
    ({"method": "qera"}, "", 0.5, None, None, ""),
    ({"method": "qera"}, "", 0.5, "START", "base", ""),
    ({"method": "lora-ga"}, "lora-ga", 0.0, "START", None, ""),
    ({}, "", 0.0, "START", None, ""),  # of which nothing is known
    ({"method": "qera"}, "", 0.5, None, "base", "^PATH began by correcting the weights of a quantized base, and"),
    ({"method": "eva"}, "", 0.0, "START", None, "^start='START': PATH fits the plain base already, since its"),
])  # fmt: skip
def test_a_start_is_named_where_it_is_needed_and_only_there(origin, base_change, error_size, start, merge_into, said):
    began = SimpleNamespace(path="PATH", origin=origin, base_change=base_change, error_size=error_size)
    if said:
        one_line(said, _check_start, began, start, merge_into)
    else:
        _check_start(began, start, merge_into)


@pytest.mark.parametrize(("engine", "merge_into", "asked", "said"), [
    (None, "base", dict(keep_ranks=True), "^a merged model has no ranks and is for every engine: with merge_into= lea"),
    ("vllm", "base", {}, "^a merged model has no ranks"),
    (None, "base", dict(parameters=9), "^a merged model has no ranks"),
    (None, "base", {}, ""),
    (None, None, dict(keep_ranks=True, rank=3, dtype="float16"), ""),
    ("sglang", None, dict(keep_ranks=True),
     "^sglang takes one rank for all layers. Ranks of their own are for PEFT, vllm, llama.cpp, ollama.$"),
    ("vllm", None, dict(rank=513), "^vllm takes at most rank 512"),
    ("vllm", None, dict(parameters="x"), "^parameters='x': a whole number"),
    (None, None, dict(megabytes=0), "^megabytes=0, expected a number above 0"),
    (None, None, dict(rank=1, parameters=1, megabytes=1), "^rank=1 and parameters=1 and megabytes=1 are both given"),
    ("ollama", None, dict(dtype="float16"), "^dtype='float16': Ollama reads float32 alone. Leave dtype away"),
    (None, "base", dict(dtype="float16"), "^dtype='float16': a merged model has its own type. Leave dtype away"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(engine, merge_into, asked, said):
    size = _Size(**dict(rank=None, parameters=None, megabytes=None, keep_ranks=False, dtype=None) | asked)
    if said:
        one_line(said, _check_options, engine, find_engine(engine), size, merge_into)
    else:
        _check_options(engine, find_engine(engine), size, merge_into)


def test_an_export_that_was_moved_is_served_from_where_it_is(base, tmp_path):
    trained = train(base, tmp_path / "trained", target_modules=["q_proj"])
    export_adapter(trained, tmp_path / "first", "vllm")
    here = (tmp_path / "first").rename(tmp_path / "here")
    serve = f"--enable-lora --max-lora-rank 8 --lora-modules here={here}"
    ask = f"lora-init verify {here} --url http://127.0.0.1:8000/v1 --model here"
    assert exported_as(here) == {"command": f"vllm serve {base} {serve}", "verify": ask}
    assert exported_as(here, str(base)) == exported_as(here)
    assert exported_as(here, "other") == {"command": f"vllm serve other {serve}", "verify": f"{ask} --base other"}
    change = config_of(here) | {"base_model_name_or_path": "--trust"}
    (here / "adapter_config.json").write_text(json.dumps(change))
    assert exported_as(here) == {"command": f"vllm serve BASE {serve}", "verify": f"{ask} --base BASE"}
    assert exported_as(here, "other") == {"command": f"vllm serve other {serve}", "verify": f"{ask} --base other"}
    record = json.loads((here / RECORD_FILE).read_text())
    (here / RECORD_FILE).write_text(json.dumps(record | {"engine": "rm -rf"}))
    assert exported_as(here) is None and exported_as(trained) is None


def test_the_commands_for_an_export_are_those_that_were_told_when_it_was_written(base, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "bert")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
    get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", target_modules=["query"])).save_pretrained(
        tmp_path / "c"
    )
    for trained, options in (
        (train(base, tmp_path / "embedding", target_modules=["embed_tokens"]), {}),
        (train(base, tmp_path / "ranks", **ADAPTERS["ranks, first match wins"]), dict(engine="vllm", keep_ranks=True)),
        (tmp_path / "c", {}),
    ):
        told = export_adapter(trained, tmp_path / "out", overwrite=True, **options)
        assert exported_as(told.path) == {"command": told.command, "verify": told.verify}
    assert "num_labels=2)" in told.command


def test_a_server_is_asked_by_the_trained_adapter_where_that_is_what_it_serves(base, tmp_path):
    """PEFT loads neither MLX's form nor a merged model, and no start that a base gave up."""
    plain = train(base, tmp_path / "plain", target_modules=["q_proj"])
    start = train(base, tmp_path / "start", target_modules=["q_proj"])
    (start / "lora_init.json").write_text('{"method": "lora-ga"}')
    began, out, given = shutil.copytree(start, tmp_path / "began"), tmp_path / "out", dict(start=start)
    for trained, options, asked in (
        (plain, dict(engine="vllm"), out),
        (plain, dict(engine="mlx"), plain),
        (plain, dict(engine="mlx", rank=2), None),  # compressed
        (plain, dict(merge_into=str(base)), plain),
        (began, dict(engine="vllm") | given, out),
        (began, dict(engine="mlx") | given, None),
        (began, dict(merge_into=str(base)) | given, None),
    ):
        told = export_adapter(trained, out, overwrite=True, **options)
        assert told.verify.startswith(f"lora-init verify {asked} ") if asked else told.verify == ""
    assert export_adapter(plain, tmp_path / "more", "vllm", base=str(base)).verify.endswith(f" --base {base}")


def test_the_next_smaller_rank_is_told_where_no_size_was_asked(base, tmp_path):
    trained = train(base, tmp_path / "trained", **ADAPTERS["ranks, first match wins"])  # of rank 9 at most
    small = export_adapter(trained, tmp_path / "small", rank=8)
    told = export_adapter(trained, tmp_path / "served")
    assert told.rank == 16 and told.smaller == (8, pytest.approx(small.error)) and small.error > 0
    assert small.smaller is None and not small.added
    assert export_adapter(trained, tmp_path / "same", rank=16).smaller is None


def test_what_no_loss_of_text_can_be_measured_of_is_refused_before_its_base_is_loaded(base, tmp_path, monkeypatch):
    trained, asked = train(base, tmp_path / "trained", target_modules=["q_proj", "v_proj"]), []
    fits = SimpleNamespace(check=lambda: None)
    monkeypatch.setattr("lora_init.serving.export.compare", lambda *arguments: asked.append(arguments) or fits)
    check_before_loading(AdapterDirectory(trained), "a base", 512)
    said = "^rank=513: no layer of this adapter can have more than rank 32. Choose less"
    one_line(said, check_before_loading, AdapterDirectory(trained), "a base", 513)
    change = config_of(trained) | {"task_type": "QUESTION_ANS"}
    (trained / "adapter_config.json").write_text(json.dumps(change))
    said = f"^{trained} is of a model that finds answers, and the loss is that of text. Leave --data out.$"
    one_line(said, check_before_loading, AdapterDirectory(trained), "a base", None)
    assert asked == [(trained, "a base", None, False)] * 3
