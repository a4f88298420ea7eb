"""The adapter in a directory: what loads is what `apply` makes, and a directory is there whole or not at all."""

import json
import os
import stat
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from lora_init.adapters.build import build_adapter
from lora_init.adapters.peft_model import origin_of
from lora_init.errors import LoraInitError
from tests.adapters.test_build import TASKS, logits, lora_layers, made_up_statistics, uneven
from tests.conftest import MODELS, batches_for, tiny_bert, tiny_llama

peft = pytest.importorskip("peft")


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def load(model, directory):
    """Load as a user would, with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)  # between releases of transformers and PEFT
        return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_saved_adapter_loads_as_what_apply_makes(name, use_rslora, tmp_path):
    stats = made_up_statistics(MODELS[name](), task_type=TASKS[name])
    init = build_adapter(stats, uneven(stats), lora_alpha=10, use_rslora=use_rslora, lora_dropout=0.1)
    torch.manual_seed(0)
    applied = init.apply(MODELS[name]())
    torch.manual_seed(0)
    base = MODELS[name]()
    init.save_pretrained(tmp_path / "adapter", model=base if TASKS[name] == "SEQ_CLS" else None)
    loaded = load(base, tmp_path / "adapter")
    assert type(loaded) is type(applied)
    state, expected = (peft.get_peft_model_state_dict(m) for m in (loaded, applied))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) and state[key].dtype == expected[key].dtype for key in state)
    ours, theirs = lora_layers(applied), lora_layers(loaded)
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].r == theirs[key].r and ours[key].scaling == theirs[key].scaling
    requires_grad = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (applied, loaded)]
    assert requires_grad[0] == requires_grad[1]
    config, other = applied.peft_config["default"], loaded.peft_config["default"]
    for key in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules", "fan_in_fan_out"):
        assert getattr(config, key) == getattr(other, key), key
    batch = batches_for(name, 1)[0]
    assert torch.equal(logits(applied.eval(), batch), logits(loaded.eval(), batch))
    assert torch.equal(logits(loaded.merge_and_unload(), batch), logits(applied.unload(), batch))


def test_the_saved_config_is_a_plain_lora_config(tmp_path):
    stats = made_up_statistics(tiny_llama(), task_type="CAUSAL_LM", model_id="org/name")
    build_adapter(stats, uneven(stats)).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # every key is known since PEFT 0.5, the first release with rank_pattern
    assert set(config) == {
        "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
        "fan_in_fan_out", "bias", "init_lora_weights", "rank_pattern", "alpha_pattern", "inference_mode",
        "auto_mapping",
    }  # fmt: skip
    assert config["init_lora_weights"] is True and config["base_model_name_or_path"] == "org/name"
    assert config["target_modules"] == [n for n, r in uneven(stats).items() if r]  # full names, in model order
    origin = json.loads((tmp_path / "adapter" / "lora_init.json").read_text())
    assert origin["method"] == "eva" and origin["provenance"]["model_id"] == "org/name"
    card = yaml.safe_load((tmp_path / "adapter" / "README.md").read_text().split("---")[1])
    assert card == {
        "base_model": "org/name", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/name", "lora", "lora_init"],
    }  # fmt: skip


def test_saving_again_gives_the_same_bytes(tmp_path):
    stats = made_up_statistics(tiny_llama())
    for name in "ab":
        build_adapter(stats, uneven(stats), method="random").save_pretrained(tmp_path / name)
    for file in listing(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("task", "task_type"),
    [
        ("SequenceClassification", "SEQ_CLS"),
        ("TokenClassification", "TOKEN_CLS"),
        ("QuestionAnswering", "QUESTION_ANS"),
    ],
)
@pytest.mark.parametrize("after_apply", [False, True])
def test_heads_that_peft_trains_whole_are_in_the_file(task, task_type, after_apply, tmp_path):
    model = tiny_bert(task)
    stats = made_up_statistics(model, ["query", "value"], task_type=task_type)
    init = build_adapter(stats, 2)
    with pytest.raises(LoraInitError, match=r"trains the head .* whole.*Pass model="):
        init.save_pretrained(tmp_path / "adapter")
    if after_apply:
        peft_model = init.apply(model)
        expected = {k: v.clone() for k, v in peft.get_peft_model_state_dict(peft_model).items()}
        init.save_pretrained(tmp_path / "adapter", model=model)
    else:
        init.save_pretrained(tmp_path / "adapter", model=model)
        expected = {k: v.clone() for k, v in peft.get_peft_model_state_dict(init.apply(model)).items()}
    loaded = peft.get_peft_model_state_dict(load(tiny_bert(task), tmp_path / "adapter"))
    assert loaded.keys() == expected.keys() and len(loaded) > 2 * len(init.ranks)
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("with_model", [False, True])
def test_dora_magnitudes_after_loading(name, with_model, tmp_path):
    model = MODELS[name]()
    stats = made_up_statistics(model)
    init = build_adapter(stats, uneven(stats), use_dora=True)
    init.save_pretrained(tmp_path / "adapter", model=model if with_model else None)
    torch.manual_seed(0)
    applied = init.apply(MODELS[name]())
    torch.manual_seed(0)
    base = MODELS[name]()
    if with_model:
        torch.manual_seed(0)
        init.save_pretrained(tmp_path / "adapter", overwrite=True, model=MODELS[name]())
        loaded = load(base, tmp_path / "adapter")
    else:
        with pytest.warns(UserWarning, match="missing adapter keys.*lora_magnitude_vector"):
            loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    state, expected = (peft.get_peft_model_state_dict(m) for m in (loaded, applied))
    assert state.keys() == expected.keys() and any("magnitude" in key for key in state)
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_an_existing_directory_is_not_replaced_without_being_asked(tmp_path):
    stats = made_up_statistics(tiny_llama())
    first, second = build_adapter(stats, 4), build_adapter(stats, 2)
    first.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraInitError, match=r"exists and is not empty.*overwrite=True"):
        second.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    second.save_pretrained(tmp_path / "adapter", overwrite=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert listing(tmp_path) == ["adapter"]


def test_what_is_not_only_an_adapter_is_never_replaced(tmp_path):
    init = build_adapter(made_up_statistics(tiny_llama()), 4)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(LoraInitError, match=r"no adapter_config.json, so it is not an adapter directory"):
        init.save_pretrained(tmp_path / "home", overwrite=True)
    init.save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-100").mkdir()
    with pytest.raises(LoraInitError, match=r"more than an adapter \(checkpoint-100\)"):
        init.save_pretrained(tmp_path / "run", overwrite=True)
    with pytest.raises(LoraInitError, match="is a file"):
        init.save_pretrained(tmp_path / "home" / "thesis.tex", overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists() and (tmp_path / "run" / "checkpoint-100").exists()


def test_an_empty_directory_is_used_and_a_new_one_is_readable(tmp_path):
    init = build_adapter(made_up_statistics(tiny_llama()), 4)
    (tmp_path / "empty").mkdir()
    init.save_pretrained(tmp_path / "empty")
    init.save_pretrained(str(tmp_path / "deep" / "er"))
    umask = os.umask(0)
    os.umask(umask)
    for file in os.scandir(tmp_path / "deep" / "er"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "deep" / "er").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_save_leaves_what_was_there(monkeypatch, tmp_path, error, existing):
    stats = made_up_statistics(tiny_llama())
    if existing:
        build_adapter(stats, 2).save_pretrained(tmp_path / "adapter")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write, expected = Path.write_bytes, LoraInitError if isinstance(error, OSError) else KeyboardInterrupt

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(expected, match="No space left.*Nothing was changed" if expected is LoraInitError else None):
        build_adapter(stats, 4).save_pretrained(tmp_path / "adapter", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert listing(tmp_path) == (["adapter"] if existing else [])


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failed_rename_puts_the_old_directory_back(monkeypatch, tmp_path, error):
    stats = made_up_statistics(tiny_llama())
    build_adapter(stats, 2).save_pretrained(tmp_path / "adapter")
    rename = Path.rename

    def fail_into_place(self, target):
        if self.name.endswith(".tmp"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(LoraInitError if isinstance(error, OSError) else KeyboardInterrupt):
        build_adapter(stats, 4).save_pretrained(tmp_path / "adapter", overwrite=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert listing(tmp_path) == ["adapter"]


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("by_trainer", [True, False])
def test_a_trained_adapter_knows_where_it_comes_from(tmp_path, loaded, by_trainer):
    """What `init` knew goes along whoever saves, whether the start was read from its directory or put on a model."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    stats = made_up_statistics(model, task_type="CAUSAL_LM", model_id="org/name")
    init = build_adapter(stats, 2, method="random", seed=7, freeze_a=True)
    start = init.save_pretrained(tmp_path / "start")
    peft_model = peft.PeftModel.from_pretrained(model, start, is_trainable=True) if loaded else init.apply(model)
    if by_trainer:
        arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to=[], use_cpu=True)
        Trainer(model=peft_model, args=arguments).save_model(str(tmp_path / "trained"))
    else:
        peft_model.save_pretrained(tmp_path / "trained")
    assert "lora_init.json" not in listing(tmp_path / "trained")
    full, short = origin_of(start), origin_of(tmp_path / "trained")
    assert short["method"] == "random" and short["seed"] == 7 and short["freeze_a"] is True
    assert short["provenance"] == {key: full["provenance"][key] for key in short["provenance"]}
    assert {"model_id", "fingerprint", "data", "rank", "n_batches"} <= set(short["provenance"])
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained")
    again.save_pretrained(tmp_path / "again")
    assert origin_of(tmp_path / "again") == short


def test_an_adapter_that_others_made_has_no_origin(tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "theirs")
    assert origin_of(tmp_path / "theirs") == {}
    with pytest.raises(LoraInitError, match=r"no adapter_config.json"):
        origin_of(tmp_path)
