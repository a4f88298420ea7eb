"""Which class a checkpoint is loaded in, and for which of PEFT's tasks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_init.errors import LoraInitError
from lora_init.loading import checkpoint, models
from lora_init.loading.checkpoint import INDEX_FILE, find_parameter, find_tensors, read_parameter
from lora_init.loading.models import classes_of, load_model, open_model, task_and_class
from tests.commands import save_model
from tests.conftest import MODELS, refused, tiny_bert, tiny_llama


@pytest.mark.parametrize(("architecture", "encoder_decoder", "task_type", "auto_class"), [
    ("LlamaForCausalLM", False, "CAUSAL_LM", "AutoModelForCausalLM"),
    ("GPT2LMHeadModel", False, "CAUSAL_LM", "AutoModelForCausalLM"),
    ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
    ("LlavaForConditionalGeneration", False, "CAUSAL_LM", "AutoModelForImageTextToText"),
    ("BertForSequenceClassification", False, "SEQ_CLS", "AutoModelForSequenceClassification"),
    ("BertForTokenClassification", False, "TOKEN_CLS", "AutoModelForTokenClassification"),
    ("BertForQuestionAnswering", False, "QUESTION_ANS", "AutoModelForQuestionAnswering"),
    ("BertForMaskedLM", False, None, "AutoModelForMaskedLM"),
    ("BertModel", False, "FEATURE_EXTRACTION", "AutoModel"),
    (None, False, "CAUSAL_LM", "AutoModelForCausalLM"),
])  # fmt: skip
def test_kind(architecture, encoder_decoder, task_type, auto_class):
    config = SimpleNamespace(
        architectures=None if architecture is None else [architecture], is_encoder_decoder=encoder_decoder
    )
    assert task_and_class("m", config, None) == (task_type, auto_class)
    assert task_and_class("m", config, "SEQ_CLS") == ("SEQ_CLS", "AutoModelForSequenceClassification")


def test_other_kinds_are_refused():
    with pytest.raises(LoraInitError, match=r"WhisperForAudioClassification.*reads text only.*collect takes any model"):
        task_and_class(
            "m", SimpleNamespace(architectures=["WhisperForAudioClassification"], is_encoder_decoder=False), None
        )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_the_class_is_the_one_it_was_saved_as(name, tmp_path):
    original = MODELS[name]()
    loaded = load_model(str(save_model(original, tmp_path)), device="cpu")
    assert type(loaded.model) is type(original)
    assert not loaded.model.training
    assert loaded.seq2seq == (name == "t5")
    for key, weight in original.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], weight)


def test_a_new_head_depends_on_the_seed_alone(tmp_path):
    save_model(tiny_bert(task=None), tmp_path)

    def head(seed):
        torch.rand(seed + 1)  # what the caller did before must not count
        return load_model(str(tmp_path), task_type="SEQ_CLS", seed=seed).model.classifier.weight

    assert torch.equal(head(0), head(0))
    assert not torch.equal(head(0), head(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype, tmp_path):
    save_model(tiny_llama().to(torch.bfloat16), tmp_path)
    assert load_model(str(tmp_path), dtype=dtype).model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("instructions", "memory", "expected"),
    [("AVX512", 10**9, torch.bfloat16), ("AVX2", 10**9, torch.float32), ("AVX2", 10**3, torch.bfloat16)],
)
def test_half_precision_becomes_float32_where_the_processor_emulates_it(
    instructions, memory, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(models, "_memory", lambda: memory)
    saved = tiny_llama().to(torch.bfloat16)
    save_model(saved, tmp_path)
    found = load_model(str(tmp_path), device="cpu").model
    assert {p.dtype for p in found.parameters()} == {expected}
    for weight, before in zip(found.parameters(), saved.parameters(), strict=True):
        assert torch.equal(weight, before.to(expected))
    assert load_model(str(tmp_path), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_quantized_checkpoint_has_no_float_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    refused("hold no float weights", find_tensors, str(tmp_path))


@pytest.mark.parametrize("weight_map", [{}, None, ["a"], {"w": "../x.safetensors"}, {"w": "one", "v": "/two"}])
def test_an_index_that_leads_out_of_its_directory_is_refused(weight_map, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "one")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "one"}}))
    assert {name: stored.shape for name, stored in find_tensors(str(tmp_path)).items()} == {"w": (2, 3)}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refused(f"{INDEX_FILE} names no files of this directory. The file is damaged", find_tensors, str(tmp_path))


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])  # transformers makes an empty tokenizer for the second
def test_a_tokenizer_that_is_not_there(build, tmp_path):
    build().save_pretrained(tmp_path)
    refused(r"has no tokenizer beside it. Save the tokenizer of the base model there: ", load_model, str(tmp_path))


def test_a_head_of_another_size_is_drawn_and_padding_is_the_tokenizers(tmp_path):
    two = tiny_bert()
    two.config.pad_token_id = 9
    loaded = load_model(str(save_model(two, tmp_path)), n_labels=3)
    assert loaded.drawn == {"classifier.weight", "classifier.bias"}
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id != 9


def test_a_checkpoint_that_lacks_its_weights(tmp_path):
    save_model(tiny_llama(), tmp_path)
    kept = {"lm_head.weight": load_file(tmp_path / "model.safetensors")["lm_head.weight"]}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    refused(
        "lacks 20 of 21 weights, such as model.embed_tokens.weight, which would be random", load_model, str(tmp_path)
    )


def test_a_task_that_a_model_has_no_head_for(tmp_path):
    save_model(tiny_llama(), tmp_path)
    refused("for this task type: its kind has no head for it", load_model, str(tmp_path), task_type="SEQ_2_SEQ_LM")


@pytest.mark.parametrize(("quantize", "placed"), [(None, False), ("nf4", True)])
def test_quantized_weights_are_read_onto_the_device_since_they_cannot_move(quantize, placed, tmp_path, monkeypatch):
    asked, read = {}, models._guarded

    def note(source, load, **options):
        if options.get("output_loading_info"):
            asked.update(options)
            raise LoraInitError("read far enough")
        return read(source, load, **options)

    monkeypatch.setattr(models, "_guarded", note)
    refused("read far enough", load_model, save_model(tiny_llama(), tmp_path / "m"), device="cpu", quantize=quantize)
    assert asked.get("device_map") == ({"": torch.device("cpu")} if placed else None)


@pytest.mark.parametrize(("options", "message"), [
    (dict(dtype="float31"), r"^dtype 'float31' is unknown. Did you mean float32\? Choose from auto, float32, "),
    (dict(quantize="nf5"), r"^quantize='nf5' is unknown. Did you mean nf4\? Choose from nf4, fp4, int8\.$"),
    (dict(device="gpu"), "^device 'gpu' cannot be used here: expected auto, cpu, cuda, cuda:1 or mps.$"),
])  # fmt: skip
def test_an_option_that_is_none_is_refused_before_the_weights_are_read(options, message, tmp_path):
    source = open_model(str(save_model(tiny_llama(), tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    refused(message, source.load, **options)


@pytest.mark.parametrize(("instructions", "dtype", "expected"), [
    ("AVX2", "auto", torch.float32), ("AVX512", "auto", "auto"), ("AVX2", "bfloat16", torch.bfloat16),
])  # fmt: skip
def test_a_quantized_model_and_its_new_head_are_read_in_the_type_that_runs(
    instructions, dtype, expected, tmp_path, monkeypatch
):
    """Quantized weights cannot change their type later, and a head that is drawn is not quantized."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    source = open_model(str(save_model(tiny_llama().to(torch.bfloat16), tmp_path)), task_type="SEQ_CLS")
    read = {}

    def stop(*_, **options):
        read.update(options)
        raise ValueError("stopped")

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", stop)
    refused("stopped", source.load, dtype=dtype, device="cpu", quantize="nf4", n_labels=3)
    assert read["dtype"] == expected and read["num_labels"] == 3
    assert read["problem_type"] == "single_label_classification"
    assert "score" in read["quantization_config"]["llm_int8_skip_modules"]
    assert read["device_map"] == {"": torch.device("cpu")}
    refused("stopped", source.load, dtype=dtype, device="cpu", quantize="nf4")
    assert "llm_int8_skip_modules" not in read["quantization_config"]


@pytest.mark.parametrize(("cuda", "mps", "rank", "expected"), [
    (4, True, "5", "cuda:1"),  # of torchrun: each process has its own
    (4, True, "", "cuda"),
    (4, True, "two", "cuda"),
    (0, True, "1", "mps"),
    (0, False, "1", "cpu"),
])  # fmt: skip
def test_the_first_gpu_is_taken_and_under_torchrun_each_process_has_its_own(cuda, mps, rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LOCAL_RANK", rank)
    tried = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: tried.append(device))
    assert models.find_device("auto") == torch.device(expected) and tried == [torch.device(expected)]


def test_a_system_that_does_not_say_how_much_memory_it_has_keeps_half_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert models.is_better_in_float32(torch.bfloat16, torch.device("cpu"), 1000)

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(models.os, "sysconf", unknown)
    assert not models.is_better_in_float32(torch.bfloat16, torch.device("cpu"), 1000)


def test_a_parameter_that_a_checkpoint_has_in_parts_is_put_together(tmp_path, monkeypatch):
    """Wherever a conversion puts an entry, it is read from there: here the odd rows, and the even ones transposed."""

    def saved(model, name, tensor):
        return {"odd": tensor[1::2].flip(0), "even": tensor[::2].T.contiguous()}

    monkeypatch.setattr(checkpoint, "as_saved", saved)
    weight = torch.arange(20.0).reshape(5, 4)
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {name: part.to(torch.bfloat16) for name, part in saved(None, "", weight).items()},
        tmp_path / "model.safetensors",
    )
    tensors, model = find_tensors(str(tmp_path)), tiny_llama()
    stored = find_parameter(tensors, model, "w", (5, 4))
    read = read_parameter(stored, (5, 4))
    assert {one.name for one in stored} == {"odd", "even"} and read.dtype == torch.float32 and torch.equal(read, weight)
    flipped = tensors | {"even": replace(tensors["even"], shape=(3, 4))}
    for other in ({"odd": tensors["odd"]}, flipped):  # a part is not there, or laid out in another way
        assert find_parameter(other, model, "w", (5, 4)) == {}


def test_classes_are_in_the_order_of_the_outputs_however_the_file_has_them():
    config = SimpleNamespace(id2label={2: "b", 0: "c", 1: "a"})
    assert classes_of(config) == ("c", "a", "b") and classes_of(SimpleNamespace(id2label=None)) == ()
