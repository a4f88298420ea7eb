"""What a comparison runs on is loaded as it was asked for, and what does not go together is refused before that."""

import json
from types import SimpleNamespace

import pytest

from lora_init.comparison import set_up
from lora_init.comparison.starts import AdapterShape
from lora_init.comparison.tasks import LoadingOptions
from lora_init.comparison.variants import Variant
from tests.commands import save_model
from tests.comparison.made import set_up_bench
from tests.conftest import refused, tiny_bert, tiny_llama


@pytest.fixture
def loaded(monkeypatch):
    """With which options a model is opened and loaded; it is loaded without any."""
    asked, load, opened = [], set_up._load, set_up.open_model

    def noting(model, **options):
        asked.append((model.rpartition("/")[2], options))
        return load(model, trust_remote_code=False, dtype=options["dtype"].replace("auto", "float32"),
                    task_type=options.get("task_type"), n_labels=options.get("n_labels"))  # fmt: skip

    def opening(model, task_type=None, trust_remote_code=False):
        if not asked:
            asked.append(("opened", {"trust_remote_code": trust_remote_code}))
        return opened(model, task_type=task_type)

    monkeypatch.setattr(set_up, "_load", noting)
    monkeypatch.setattr(set_up, "open_model", opening)
    return asked


@pytest.mark.parametrize("asked", [
    {}, {"dtype": "bfloat16", "device": "cpu"}, {"trust_remote_code": True},
], ids=str)  # fmt: skip
def test_a_language_model_is_loaded_as_it_was_asked_for(asked, loaded, home, tmp_path):
    bench = set_up_bench(home, tmp_path, **asked)
    options = {"dtype": "auto", "device": "auto", "trust_remote_code": False} | asked
    assert loaded == [
        ("opened", {"trust_remote_code": options["trust_remote_code"]}), ("llama", options | {"quantize": None}),
    ]  # fmt: skip
    assert bench.shape.task_type == "CAUSAL_LM" and bench.float_model is None and bench.strengths == ()


@pytest.mark.parametrize(("asked", "dtype"), [({}, "float32"), ({"dtype": "float32"}, "float32")])
def test_a_classifier_is_loaded_with_a_class_for_each_that_the_data_have(asked, dtype, loaded, home, tmp_path):
    bench = set_up_bench(home, tmp_path, "bert", label="first", completion=None, **asked)
    n_labels = len(bench.task.classes)
    assert loaded[1][1] == {
        "dtype": dtype, "device": "auto", "trust_remote_code": False, "quantize": None, "task_type": "SEQ_CLS",
        "n_labels": n_labels,
    }  # fmt: skip
    assert bench.shape.task_type == "SEQ_CLS" and bench.loaded.model.config.num_labels == n_labels > 2


@pytest.mark.parametrize(("weights", "name"), [(None, "llama"), ("float", "other")])
def test_the_float_model_of_a_quantized_one_is_the_model_itself_or_the_one_that_was_named(
    weights, name, loaded, home, tmp_path, monkeypatch
):
    monkeypatch.setattr("lora_init.loading.models.ModelSource.check_quantized", lambda *_: None)
    save_model(tiny_llama(num_hidden_layers=1), tmp_path / "other")
    asked = {} if weights is None else {"weights": tmp_path / "other"}
    bench = set_up_bench(home, tmp_path, quantize="nf4", dtype="float32", **asked)
    assert bench.float_weights == asked.get("weights")
    bench.float_model()
    options = {"dtype": "float32", "device": "auto", "trust_remote_code": False}
    assert loaded[1:] == [("llama", options | {"quantize": "nf4"}), (name, options)]


def test_a_classifier_whose_adapter_would_lack_new_weights_is_refused(home, tmp_path):
    save_model(tiny_bert("MaskedLM"), tmp_path / "masked")  # without a pooler
    asked = dict(model=tmp_path / "masked", label="first", completion=None)
    refused("^the weights of bert.pooler.* are new and random", set_up_bench, home, tmp_path, **asked)


def test_text_to_keep_comes_in_batches_and_text_to_replay_one_by_one(home, tmp_path):
    text, rows = tmp_path / "text.txt", tmp_path / "rows.jsonl"
    text.write_text("\n".join(["one dog run", "my red hats"] * 3))
    bench = set_up_bench(home, tmp_path, retain_data=text, replay=text)
    assert [len(batch["input_ids"]) for batch in bench.retain] == [4, 2]
    assert [len(batch["input_ids"]) for batch in bench.replay] == [1] * 6
    assert bench.strengths == set_up.STRENGTHS and 1.0 in bench.strengths
    assert not set_up_bench(home, tmp_path, retain_data=text, dial=False).strengths

    def texts(classifies=False, **options):
        return set_up._load_texts(LoadingOptions(**options), bench.loaded.tokenizer, 4, classifies)

    rows.write_text(json.dumps({"a": "one dog", "b": "red hats"}))
    refused("Name one by retain_template=", texts, retain_data=rows)
    assert "retain_template" not in refused("Rename one of them", texts, replay=rows)
    (kept,), replayed = texts(retain_data=rows, retain_template="{a} {b} {a}")
    assert int(kept["attention_mask"].sum()) == 7 and replayed is None and texts() == (None, None)
    for name in ("retain_data", "replay"):
        refused(f"^{name} is for language models", texts, classifies=True, **{name: text})


SHAPE = AdapterShape(2, 4)


def source(**changes):
    """A source of a model of which nothing is read."""
    about = dict(
        task_type="CAUSAL_LM", saved_as="", auto_class="AutoModel", config=SimpleNamespace(), empty=lambda: None,
        check_quantized=lambda quantize: None,
    )  # fmt: skip
    return SimpleNamespace(**about | changes)


QUANTIZED = SimpleNamespace(quantization_config={"bits": 4})


@pytest.mark.parametrize(("config", "options", "starts", "expected"), [
    (SimpleNamespace(), {}, "random pissa", False), (SimpleNamespace(), {"quantize": "nf4"}, "random qera full", True),
    (QUANTIZED, {}, "random eva", False), (QUANTIZED, {"weights": "float"}, "random qera full", True),
    (SimpleNamespace(), {"quantize": "nf4", "weights": "float"}, "qera", True),
    (QUANTIZED, {}, "full", "needs the model before it was quantized"),
    (QUANTIZED, {"weights": "float"}, "pissa", "changes base weights"),
    (SimpleNamespace(), {"quantize": "nf4"}, "pissa", "changes base weights"),
    (SimpleNamespace(), {}, "qera", "corrects a quantized base"),
    (SimpleNamespace(), {"weights": "float"}, "random", "^weights='float': model 'm' is not quantized. Leave it out"),
])  # fmt: skip
def test_starts_and_weights_have_to_go_with_how_the_base_is_quantized(config, options, starts, expected):
    asked = (source(config=config), "m", LoadingOptions(**options), SHAPE, [*map(Variant, starts.split())])
    if isinstance(expected, str):
        refused(expected, set_up._check_source, *asked)
    else:
        assert set_up._check_source(*asked) is expected


def test_what_a_model_is_not_for_is_said_before_its_weights_are_read():
    masked, way = source(task_type=None, saved_as="BertForMaskedLM"), LoadingOptions()
    said = "^model 'm' is a BertForMaskedLM, and a comparison trains causal language models, or classifiers with --la"
    refused(said, set_up._check_source, masked, "m", way, SHAPE, [])
    refused("is a AutoModel,", set_up._check_source, source(task_type=None), "m", way, SHAPE, [])
    assert set_up._check_source(masked, "m", LoadingOptions(label="kind"), SHAPE, []) is False
    asked = []
    set_up._check_source(source(check_quantized=asked.append), "m", LoadingOptions(quantize="nf4"), SHAPE, [])
    assert asked == ["nf4"]
    llama = source(empty=tiny_llama)
    assert set_up._check_source(llama, "m", way, AdapterShape(32, 4), []) is False
    for shape, message in (
        (AdapterShape(700, 4), "rank=700 is larger than its input width"), (AdapterShape(2, 4, ["qq_proj"]), "qq_proj"),
    ):  # fmt: skip
        refused(message, set_up._check_source, llama, "m", way, shape, [])
