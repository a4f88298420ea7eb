"""Which class a checkpoint is loaded in, and for which of PEFT's tasks."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_init.errors import LoraInitError
from lora_init.loading import models
from lora_init.loading.checkpoint import find_tensors
from lora_init.loading.models import load_model, task_and_class
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
