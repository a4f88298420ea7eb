"""Which class a checkpoint is loaded in, and for which of PEFT's tasks."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_init.errors import LoraInitError
from lora_init.loading import checkpoint, models
from lora_init.loading.checkpoint import INDEX_FILE, find_parameter, find_tensors, read_parameter
from lora_init.loading.models import (
    ModelSource,
    check_model_source,
    classes_of,
    is_better_in_float32,
    load_model,
    on_meta,
    open_model,
    task_and_class,
    task_of,
)
from tests.commands import save_model
from tests.conftest import MODELS, refused, tiny_bert, tiny_llama, tiny_t5, tiny_vit


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
    assert torch.equal(load_model(str(tmp_path), task_type="SEQ_CLS").model.classifier.weight, head(0))


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
    assert {*read["quantization_config"]["llm_int8_skip_modules"]} >= {"score", "classifier"}  # Llama's, BERT's
    assert read["device_map"] == {"": torch.device("cpu")}
    refused("stopped", source.load, dtype=dtype, device="cpu", quantize="nf4")
    assert "llm_int8_skip_modules" not in read["quantization_config"]


@pytest.mark.parametrize(("cuda", "mps", "rank", "expected"), [
    (4, True, "5", "cuda:1"),  # of torchrun: each process has its own
    (4, True, "", "cuda"), (4, True, None, "cuda"),
    (4, True, "two", "cuda"),
    (0, True, "1", "mps"),
    (0, False, "1", "cpu"),
])  # fmt: skip
def test_the_first_gpu_is_taken_and_under_torchrun_each_process_has_its_own(cuda, mps, rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    if rank is None:
        monkeypatch.delenv("LOCAL_RANK")
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
    assert models.is_better_in_float32(torch.bfloat16, torch.device("cpu"))  # of weights that take none


def test_a_model_is_moved_to_its_device(tmp_path):
    found = load_model(str(save_model(tiny_llama(), tmp_path)), device="meta").model
    assert {p.device.type for p in found.parameters()} == {"meta"}


@pytest.mark.parametrize(("known", "trusted"), [(True, False), (True, True), (False, False)])
def test_a_model_of_the_hub_is_read_as_it_may_be(known, trusted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked, config = [], SimpleNamespace(architectures=None, is_encoder_decoder=False)
    monkeypatch.setattr(models, "check_hub", lambda *words: words == ("owner/name", "model") and known)
    for kind, found in (("AutoConfig", config), ("AutoTokenizer", "a tokenizer")):
        read = lambda *words, found=found, **how: asked.append((*words, how)) or found  # noqa: E731
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", read)
    source = open_model("owner/name", trust_remote_code=trusted)
    how = {"trust_remote_code": trusted} | ({} if known else {"local_files_only": True})
    assert asked == [("owner/name", how)] * 2 and source.options == how
    assert (source.config, source.tokenizer, source.saved_as) == (config, "a tokenizer", "")


def test_code_of_others_is_run_only_where_it_is_asked_for(monkeypatch, tmp_path):
    path = str(save_model(tiny_llama(), tmp_path))
    assert open_model(path).options == {"trust_remote_code": False}
    kind = SimpleNamespace(from_config=lambda config, trust_remote_code: (config, trust_remote_code))
    assert (on_meta(kind, "c"), on_meta(kind, "c", True)) == (("c", False), ("c", True))
    opened = []
    monkeypatch.setattr(
        models, "open_model", lambda *words, **how: opened.append(how) or ModelSource.__new__(ModelSource)
    )
    monkeypatch.setattr(ModelSource, "load", lambda self, **how: how)
    for given in ({}, {"task_type": "SEQ_CLS", "trust_remote_code": True}):
        assert load_model("m", seed=3, **given) == {"seed": 3}
        assert opened[-1] == {"task_type": None, "trust_remote_code": False} | given


def test_a_task_that_there_is_not_is_refused_before_anything_is_read():
    said = r"^task type 'CAUSAL' is unknown. Did you mean CAUSAL_LM\? Choose from SEQ_CLS, "
    refused(said, open_model, "/none", task_type="CAUSAL")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_parameter_that_a_checkpoint_has_in_parts_is_put_together(dtype, tmp_path, monkeypatch):
    """Wherever a conversion puts an entry, it is read from there: here the odd rows, and the even ones transposed."""

    def saved(model, name, tensor):
        return {"odd": tensor[1::2].flip(0), "even": tensor[::2].T.contiguous()}

    monkeypatch.setattr(checkpoint, "as_saved", saved)
    weight = torch.rand(5, 4).to(dtype).float()
    (tmp_path / "config.json").write_text("{}")
    save_file(
        {name: part.to(dtype) for name, part in saved(None, "", weight).items()},
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


def of_config(task_type="CAUSAL_LM", auto_class="AutoModelForCausalLM", saved_as="", trusted=False, **config):
    settings = {"is_encoder_decoder": False} | config
    options = {"trust_remote_code": trusted}
    return ModelSource("m", SimpleNamespace(**settings), None, task_type, auto_class, options, saved_as)


@pytest.mark.parametrize(("quantized", "quantize", "needed", "line"), [
    (False, None, False, None), (True, None, True, None), (False, "nf4", True, None), (False, "int8", False, None),
    (True, None, False, None),
    (False, None, True, "model 'm' is not quantized, so nothing is to correct. Pass --quantize nf4."),
    (True, "nf4", False, "model 'm' is quantized already. Leave --quantize out."),
    (True, "nf4", True, "model 'm' is quantized already. Leave --quantize out."),
])  # fmt: skip
def test_a_base_is_quantized_once_and_where_that_is_needed(quantized, quantize, needed, line, monkeypatch):
    required = []
    monkeypatch.setattr(models, "require", required.append)
    source = of_config(quantization_config={"bits": 4} if quantized else None)
    if line is None:
        source.check_quantized(quantize, needed)
    else:
        with pytest.raises(LoraInitError) as caught:
            source.check_quantized(quantize, needed)
        assert str(caught.value) == line
    assert required == ["bitsandbytes"] * (quantize is not None)


@pytest.mark.parametrize("n_drawn", [0, 2, 3])
def test_half_of_the_weights_may_be_drawn_and_both_ways_of_naming_them_are_read(n_drawn):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    keys = [name for name, _ in model.named_parameters()][:n_drawn]
    loading = {"missing_keys": set(keys[:1]), "mismatched_keys": [*keys[1:2], *((key, (1,), (2,)) for key in keys[2:])]}
    if n_drawn <= 2:
        assert models._drawn_weights("m", model, loading) == {*keys}
    else:
        said = "^model 'm' lacks 3 of 4 weights, such as 0.bias, which would be random. Name a whole checkpoint.$"
        refused(said, models._drawn_weights, "m", model, loading)


@pytest.mark.parametrize(("name", "method"), [("nf4", "nf4"), ("fp4", "fp4"), ("int8", "llm_int8")])
def test_each_way_to_quantize_is_one_that_transformers_reads(name, method):
    pytest.importorskip("bitsandbytes")
    found = transformers.quantizers.AutoQuantizationConfig.from_dict(dict(models.QUANTIZATIONS[name]))
    assert found.quantization_method() == method


def test_a_model_without_weights_is_made_where_it_can_be():
    config = tiny_llama().config
    for kind in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        made = on_meta(kind, config)
        assert type(made) is transformers.LlamaForCausalLM and {p.device.type for p in made.parameters()} == {"meta"}
    for kind in (None, torch.nn.Linear, transformers.AutoModelForSeq2SeqLM):
        assert on_meta(kind, config) is None
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize(("saved_as", "made_as"), [
    ("LlamaForSequenceClassification", "LlamaForSequenceClassification"), ("", "LlamaForCausalLM"),
    ("NobodysClass", "LlamaForCausalLM"),
])  # fmt: skip
def test_an_empty_model_is_of_the_class_that_it_was_saved_as(saved_as, made_as):
    source = replace(of_config(saved_as=saved_as), config=tiny_llama().config)
    assert type(source.empty()).__name__ == made_as
    assert replace(source, options={"trust_remote_code": True}).empty() is None  # whose code is not run for that


def test_a_source_says_what_its_configuration_does():
    source = of_config(is_encoder_decoder=True, id2label={1: "b", 0: "a"})
    assert source.seq2seq and source.classes == ("a", "b") and "trust_remote_code" not in repr(source)
    assert of_config().seq2seq is False and of_config().classes == ()


def bare(name, reads="input_ids"):
    """A class of models without a configuration."""
    forward = {"input_ids": lambda self, input_ids: input_ids, "input_values": lambda self, input_values: input_values}
    return type(name, (torch.nn.Module,), {"forward": forward[reads]})


@pytest.mark.parametrize(("make", "task"), [
    (bare("OneForConditionalGeneration"), "CAUSAL_LM"), (bare("AnyClass"), None),
    (tiny_llama, "CAUSAL_LM"), (tiny_bert, "SEQ_CLS"), (tiny_t5, "SEQ_2_SEQ_LM"), (tiny_vit, None),
    (lambda: tiny_bert("MaskedLM"), None), (lambda: tiny_bert(None), "FEATURE_EXTRACTION"),
    (lambda: torch.nn.Linear(2, 2), None), (bare("SoundForSequenceClassification", "input_values"), None),
    (bare("TextForSequenceClassification"), "SEQ_CLS"),
])  # fmt: skip
def test_the_task_of_a_model_is_that_of_its_class_if_it_reads_tokens(make, task):
    assert task_of(make()) == task


@pytest.mark.parametrize(("dtype", "place", "instructions", "n_bytes", "better"), [
    (torch.bfloat16, "cpu", "AVX2", 50, True), (torch.float16, "cpu", "AVX2", 0, True),
    (torch.bfloat16, "cpu", "AVX2", 51, False), (torch.float32, "cpu", "AVX2", 0, False),
    (torch.bfloat16, "cuda", "AVX2", 0, False), (torch.bfloat16, "cpu", "AVX512", 0, False),
])  # fmt: skip
def test_float32_is_better_on_a_processor_that_emulates_less_and_has_room(
    dtype, place, instructions, n_bytes, better, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(models, "_memory", lambda: 100)
    assert is_better_in_float32(dtype, torch.device(place), n_bytes) is better


def test_memory_is_counted_in_bytes(monkeypatch):
    monkeypatch.setattr(models.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10}.__getitem__)
    assert models._memory() == 40960


@pytest.mark.parametrize(("name", "line"), [
    ("file", "model '{}' is a file. Name the directory that it lies in."),
    ("empty", "model '{}' has no config.json. A model directory as save_pretrained() writes it is needed."),
    ("adapter", "model '{}' has no config.json: it is an adapter. Name its base model. A model directory as "
     "save_pretrained() writes it is needed."),
    ("none", "model '{}': no such directory."),
])  # fmt: skip
def test_what_can_be_no_model_is_refused(name, line, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    for refuse in (check_model_source, open_model):
        with pytest.raises(LoraInitError) as caught:
            refuse(str(tmp_path / name))
        assert str(caught.value) == line.format(tmp_path / name)


@pytest.mark.parametrize("name", ["./a", "~/a", "/a", "/a/b", "a/b/c", "a\\b", " "])
def test_a_name_that_can_be_no_hub_id_is_of_a_directory(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "check_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(LoraInitError, match="no such directory"):
        check_model_source(name)


@pytest.mark.parametrize("name", ["a", "a/b"])
def test_another_name_is_asked_for_at_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(models, "check_hub", lambda *words: asked.append(words))
    monkeypatch.setattr(models, "stay_offline", lambda: asked.append("offline"))
    check_model_source(name)
    assert asked == [(name, "model"), "offline"]


@pytest.mark.parametrize("name", [
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "x.model", "x.tiktoken",
])  # fmt: skip
def test_a_tokenizer_is_known_by_any_of_its_files(name, tmp_path):
    (tmp_path / "config.json").touch()
    assert not models._has_tokenizer(tmp_path)
    (tmp_path / name).touch()
    assert models._has_tokenizer(tmp_path)


@pytest.mark.parametrize(("error", "line"), [
    (ValueError("Pass trust_remote_code=True"),
     "needs code that comes with it. Read that code, then pass --trust-remote-code."),
    (ValueError("Unrecognized class for this kind of AutoModel: hundreds"),
     "cannot be loaded for this task type: its kind has no head for it."),
    (KeyError("a\nb"), "cannot be loaded: 'a\\nb'."), (OSError("no\nfile"), "cannot be loaded: no file."),
])  # fmt: skip
def test_what_transformers_raises_is_one_line_about_the_model(error, line):
    def load(source, **options):
        assert (source, options) == ("m", {"dtype": "auto"})
        raise error

    with pytest.raises(LoraInitError) as caught:
        models._guarded("m", load, dtype="auto")
    assert str(caught.value) == f"model 'm' {line}"


def test_a_directory_is_loaded_from_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert models._guarded("~/m", lambda source: source) == str(tmp_path / "m")


@pytest.mark.parametrize(("task_type", "trusted", "saved_as"), [
    (None, False, "LlamaForCausalLM"), ("SEQ_CLS", False, ""), (None, True, ""),
])  # fmt: skip
def test_the_class_that_it_was_saved_as_counts_unless_a_task_or_code_of_others_decides(
    task_type, trusted, saved_as, tmp_path
):
    source = open_model(str(save_model(tiny_llama(), tmp_path)), task_type=task_type, trust_remote_code=trusted)
    assert source.saved_as == saved_as and source.options == {"trust_remote_code": trusted}
    assert (source.task_type, source.name) == (task_type or "CAUSAL_LM", str(tmp_path))


@pytest.mark.parametrize(("quantized", "quantize"), [(False, None), (False, "nf4"), (True, None)])
def test_what_is_quantized_already_or_now_is_placed_while_it_is_read(quantized, quantize, monkeypatch):
    read = {}

    def stop(name, load, **options):
        read.update(options)
        raise LoraInitError("stopped")

    monkeypatch.setattr(models, "_guarded", stop)
    monkeypatch.setattr(models, "require", lambda *_: None)
    source = of_config(quantization_config={"bits": 4} if quantized else None)
    refused("stopped", source.load, device="cpu", quantize=quantize)
    expected = {"trust_remote_code": False, "dtype": "auto", "output_loading_info": True}
    if quantize is not None:
        expected["quantization_config"] = models.QUANTIZATIONS[quantize]
    if quantized or quantize:
        expected["device_map"] = {"": torch.device("cpu")}
    assert read == expected
