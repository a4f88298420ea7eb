"""The adapter in a directory: what loads is what `apply` makes, and a directory is there whole or not at all."""

import copy
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from lora_init import LoraInitError, build_adapter, collect, initialize
from lora_init.adapters.card import correction_of, start_in_words
from lora_init.adapters.directory import AdapterDirectory, start_digest
from lora_init.starts.starts import find_start
from lora_init.statistics.statistics import Statistics
from tests.adapters.made import TASKS, logits, lora_layers, made_up_statistics, uneven
from tests.conftest import MODELS, batches_for, refused, tiny_bert, tiny_llama
from tests.versions import NO_CONFIG

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
    by_name = TASKS[name] in ("CAUSAL_LM", "SEQ_2_SEQ_LM")  # without a head, and with names that no other name ends in
    init.save_pretrained(tmp_path / "adapter", model=None if by_name else base)
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
    assert config["init_lora_weights"] is config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "org/name"
    assert config["target_modules"] == [n for n, r in uneven(stats).items() if r]  # full names, in model order
    origin = json.loads((tmp_path / "adapter" / "lora_init.json").read_text())
    assert origin["method"] == "eva" and origin["provenance"]["model_id"] == "org/name"
    card = yaml.safe_load((tmp_path / "adapter" / "README.md").read_text().split("---")[1])
    assert card == {
        "base_model": "org/name", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/name", "lora", "lora_init"],
    }  # fmt: skip


@pytest.mark.parametrize(("task", "task_type"), [
    ("SequenceClassification", "SEQ_CLS"),
    ("TokenClassification", "TOKEN_CLS"),
    ("QuestionAnswering", "QUESTION_ANS"),
])  # fmt: skip
@pytest.mark.parametrize("after_apply", [False, True])
def test_heads_that_peft_trains_whole_are_in_the_file(task, task_type, after_apply, tmp_path):
    model = tiny_bert(task)
    stats = made_up_statistics(model, ["query", "value"], task_type=task_type)
    init = build_adapter(stats, 2)
    refused(r"trains the head .* whole.*Pass model=", init.save_pretrained, tmp_path / "adapter")
    if after_apply:
        peft_model = init.apply(model)
        expected = {k: v.clone() for k, v in peft.get_peft_model_state_dict(peft_model).items()}
        init.save_pretrained(tmp_path / "adapter", model=model)
    else:
        drawn = torch.get_rng_state()
        init.save_pretrained(tmp_path / "adapter", model=model)
        assert torch.equal(torch.get_rng_state(), drawn)  # PEFT draws, and the generator is the caller's
        expected = {k: v.clone() for k, v in peft.get_peft_model_state_dict(init.apply(model)).items()}
    loaded = peft.get_peft_model_state_dict(load(tiny_bert(task), tmp_path / "adapter"))
    assert loaded.keys() == expected.keys() and len(loaded) > 2 * len(init.ranks)
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)


def test_an_existing_directory_is_not_replaced_without_being_asked(tmp_path):
    stats = made_up_statistics(tiny_llama())
    first, second = build_adapter(stats, 4), build_adapter(stats, 2)
    first.save_pretrained(tmp_path / "adapter")
    refused(r"exists and is not empty.*overwrite=True", second.save_pretrained, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    second.save_pretrained(tmp_path / "adapter", overwrite=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert listing(tmp_path) == ["adapter"]


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
    with pytest.raises(expected, match="No space left" if expected is LoraInitError else None):
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
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_a_trained_adapter_knows_where_it_comes_from(tmp_path, loaded, by_trainer, task_type):
    """What `init` knew goes along whoever saves, whether the start was read from its directory or put on a model."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    stats = made_up_statistics(model, task_type=task_type, model_id="org/name")
    init = build_adapter(stats, 2, method="random", seed=7, freeze_a=True)
    start = init.save_pretrained(tmp_path / "start")
    peft_model = peft.PeftModel.from_pretrained(model, start, is_trainable=True) if loaded else init.apply(model)
    if by_trainer:
        arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to=[], use_cpu=True)
        Trainer(model=peft_model, args=arguments).save_model(str(tmp_path / "trained"))
    else:
        peft_model.save_pretrained(tmp_path / "trained")
    assert "lora_init.json" not in listing(tmp_path / "trained")
    full, short = (AdapterDirectory(path).origin for path in (start, tmp_path / "trained"))
    assert short["method"] == "random" and short["seed"] == 7 and short["freeze_a"] is True
    assert short["provenance"] == {key: full["provenance"][key] for key in short["provenance"]}
    assert {"model_id", "fingerprint", "data", "rank", "n_batches"} <= set(short["provenance"])
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "trained")
    again.save_pretrained(tmp_path / "again")
    assert AdapterDirectory(tmp_path / "again").origin == short


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_frozen_a(name, tmp_path):
    """A keeps its values, B alone is trained, less is kept for the backward pass, and PEFT's file is as always."""
    stats = made_up_statistics(MODELS[name](), task_type="CAUSAL_LM")
    init = build_adapter(stats, 3, freeze_a=True)
    assert init.n_parameters() == sum(b.numel() for _, b in init.weights.values())
    batch, kept = batches_for(name, 1)[0], {}
    for frozen, adapter in ((True, init), (False, build_adapter(stats, 3))):
        model = adapter.apply(MODELS[name]()).train()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {".lora_A." in n for n in trained} == ({False} if frozen else {True, False})
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.n_parameters()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            loss = model(**batch).loss
        kept[frozen] = sum({t.data_ptr(): t.numel() for t in saved}.values())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss.backward()
        optimizer.step()
        assert sum(s["exp_avg"].numel() for s in optimizer.state.values()) == adapter.n_parameters()
        same_a = [
            torch.equal(layer.lora_A["default"].weight, adapter.weights[n][0])
            for n, layer in lora_layers(model).items()
        ]
        assert all(same_a) if frozen else not any(same_a)
        assert all(layer.lora_B["default"].weight.any() for layer in lora_layers(model).values())
    assert kept[True] < kept[False]
    init.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(MODELS[name](), tmp_path / "a", is_trainable=True)
    assert any(p.requires_grad for n, p in loaded.named_parameters() if ".lora_A." in n)  # PEFT has no setting for it
    card = (tmp_path / "a" / "README.md").read_text()
    lines = card[card.index("for name, parameter") : card.index("```\n", card.index("for name, parameter"))]
    exec(lines, {"model": loaded})
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n in trained if ".lora_B." in n}


def batches(name="llama"):
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches_for(name, n_batches=3)]


def loaded_without_a_word(model, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT's word for keys that are missing
        warnings.filterwarnings("ignore", message=".*tied|.*Merging")
        return PeftModel.from_pretrained(copy.deepcopy(model), directory, is_trainable=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_to_save_are_trained_whole_and_saved(tied, names, tmp_path):
    model = tiny_llama(tie_word_embeddings=tied)
    before = model(**batches()[0]).logits.detach()
    init = build_adapter(collect(model, batches(), rank=2), 2, modules_to_save=names)
    assert init.to_peft_config().modules_to_save == names
    init.save_pretrained(tmp_path / "adapter", model=model)
    loaded = loaded_without_a_word(model, tmp_path / "adapter")
    peft_model = init.apply(model)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in peft_model.state_dict().items())
    for adapted in (loaded, peft_model):
        assert torch.equal(adapted(**batches()[0]).logits, before)
        whole = {n.split(".modules_to_save")[0].split(".")[-1] for n, p in adapted.named_parameters()
                 if p.requires_grad and "modules_to_save" in n}  # fmt: skip
        assert whole == set(names)
    # Saved again from the PeftModel by PEFT itself, it is the same file.
    peft_model.save_pretrained(tmp_path / "by_peft")
    from safetensors.torch import load_file

    ours, theirs = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "by_peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_start_is_known_by_the_numbers_in_its_file_whatever_their_type(dtype, tmp_path):
    """Rounded twice, by way of float16, some numbers are others than rounded at once."""
    stats = collect(tiny_llama(), batches_for("llama"), rank=4, gradients=True)
    init = replace(build_adapter(stats, 4, "lora-ga"), dtype=dtype)
    origin = json.loads((init.save_pretrained(tmp_path / "start") / "lora_init.json").read_text())
    saved = load_file(tmp_path / "start" / "adapter_model.safetensors")
    pairs = {name: [saved[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB"] for name in init.weights}
    assert origin["start"] == start_digest(pairs)


def test_a_type_to_save_in_is_that_of_a_and_b_alone(tmp_path):
    """What is trained whole, and DoRA's magnitudes, are to the last bit what `apply` makes."""
    model = tiny_bert()
    stats = made_up_statistics(model, ["query", "value"], task_type="SEQ_CLS")
    init = replace(build_adapter(stats, 2, use_dora=True), dtype="bfloat16")
    init.save_pretrained(tmp_path / "adapter", model=model)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(init.apply(model))
    assert saved.keys() == expected.keys()
    assert any("lora_magnitude" in key for key in saved) and any("classifier" in key for key in saved)
    for key, value in expected.items():
        rounded = value.bfloat16() if ".lora_A." in key or ".lora_B." in key else value
        assert saved[key].dtype == rounded.dtype and torch.equal(saved[key], rounded), key


def test_layers_without_a_spectrum_are_in_the_file_with_pefts_start(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = NO_CONFIG
            self.table, self.used, self.never = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.conv_never = nn.Conv1d(4, 6, 3, groups=2)

        def forward(self, x):
            return self.used(self.table(x))

    model, data = Net(), [torch.randint(0, 11, (4, 5)) for _ in range(3)]
    before = model(data[0]).detach()
    stats = collect(model, data, ["table", "used", "never", "conv_never"], rank=2)
    assert stats.unsupported == {"table": "Embedding", "never": "Linear", "conv_never": "Conv1d"}
    init = build_adapter(stats, 2)
    init.save_pretrained(tmp_path / "adapter", model=model)
    loaded = loaded_without_a_word(model, tmp_path / "adapter")
    assert torch.equal(loaded(data[0]), before)
    by_peft = init.apply(copy.deepcopy(model)).state_dict()
    for key, value in loaded.state_dict().items():
        assert value.shape == by_peft[key].shape
        assert float(value.std()) == pytest.approx(float(by_peft[key].std()), rel=0.5, abs=1e-9), key
    init.save_pretrained(tmp_path / "without")  # negative: PEFT says what it misses
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "without")


def test_mistakes_get_one_clear_line(tmp_path):
    model = tiny_llama()
    stats = collect(model, batches(), ["q_proj"], rank=2)
    refused("^modules_to_save='lm_head', expected a list of texts", build_adapter, stats, 2, modules_to_save="lm_head")
    refused("hold every layer", build_adapter, stats, 2, modules_to_save=["self_attn"])
    init = build_adapter(stats, 2, modules_to_save=["lm_head"])
    with pytest.raises(LoraInitError, match=r"modules_to_save=\['lm_head'\]: PEFT trains lm_head whole.*Pass model="):
        init.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraInitError, match="'nowhere' is no module of LlamaForCausalLM"):
        build_adapter(stats, 2, modules_to_save=["nowhere"]).apply(model)


def test_of_several_adapters_that_with_a_frozen_a_alone_has_one():
    model = initialize(tiny_llama(), batches_for("llama", n_batches=2), rank=2, method="random", freeze_a=True)
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    for name in ("two", "default"):
        model.set_adapter(name)
        model(**batches_for("llama", n_batches=1)[0]).loss.backward()
        trained = {key for key, one in model.named_parameters() if one.grad is not None and f".{name}." in key}
        assert {".lora_A." in key for key in trained} == ({True, False} if name == "two" else {False})
        model.zero_grad()


def test_the_frozen_a_of_an_attention_of_torch_is_frozen_throughout():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.linear = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.attention(x, x, x)[0])

    given = dict(rank=2, method="eva", freeze_a=True, target_modules=["attention", "linear"])
    model = initialize(Attending(), [{"x": torch.randn(4, 5, 16)}] * 4, **given)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name}
    assert len(trains) == 6 and all(trains[name] == (".lora_B." in name) for name in trains)


@pytest.mark.parametrize("freeze_a", [False, True])
def test_the_table_has_a_row_for_each_layer_with_what_is_known_of_it(freeze_a):
    stats = made_up_statistics(tiny_llama(), task_type="CAUSAL_LM")
    init = build_adapter(stats, uneven(stats), freeze_a=freeze_a)
    unknown = [*init.weights][-1]
    init = replace(init, explained={name: share for name, share in init.explained.items() if name != unknown})
    table = init.to_pandas()
    assert table.index.name == "layer" and [*table.index] == [*init.weights] and 1 < len(table) < len(stats)
    columns = ["kind", "in_features", "out_features", "rank", "parameters", "explained_variance"]
    assert [*table.columns] == columns
    for name, row in table.iterrows():
        module, (a, b) = tiny_llama().get_submodule(name), init.weights[name]
        trained = b.numel() if freeze_a else a.numel() + b.numel()
        assert [*row[columns[:5]]] == ["Linear", module.in_features, module.out_features, len(a), trained]
        # The made-up variances are 8, 7, ..., half of the whole variance.
        share = sum(range(8, 8 - len(a), -1)) / 72
        assert row["explained_variance"] == pytest.approx(share) or name == unknown
    assert table["explained_variance"].isna().sum() == 1
    html = init._repr_html_()
    assert html.startswith(f"<p>{init!r}</p><table") and "border=" not in html
    assert all(name in html for name in init.weights) and f"<td>{table['explained_variance'].iloc[0]:.3f}</td>" in html


def test_a_long_table_is_cut_where_a_notebook_shows_it():
    stats = made_up_statistics(tiny_llama(num_hidden_layers=4))
    init = build_adapter(stats, 2)
    assert len(init.to_pandas()) == 28 and init._repr_html_().count("model.layers.") == 20


@pytest.mark.parametrize(("losses", "exact", "share", "words"), [
    (None, 2.0, None, "took from its weights$"),
    ((3.0, 2.25), None, None, r"took from its weights \(loss 3 -> 2.25\)$"),
    ((3.0, 2.25), 2.0, 0.75, r"\(loss 3 -> 2.25, 75% of the way to the loss before it was quantized\)$"),
    ((2.0, 1.5), 2.0, None, r"\(loss 2 -> 1.5\)$"),  # quantization cost nothing: no share, and no division by zero
    ((2.0, 1.5), 2.5, None, r"\(loss 2 -> 1.5\)$"),  # it happened to help
])  # fmt: skip
def test_what_a_correction_gives_back_is_a_share_of_what_was_lost(losses, exact, share, words):
    init = build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2)
    init = replace(init, start=find_start("qera"), losses=losses, exact_loss=exact)
    assert init.share_closed == share and correction_of(init).get("share_closed") == share
    assert re.search(words, start_in_words(init))


def test_an_adapter_does_not_change_and_its_ranks_are_whole_numbers():
    init = build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2)
    assert {type(rank) for rank in init.ranks.values()} == {int}
    with pytest.raises(AttributeError):
        init.rank = 3


def test_switches_are_true_or_false(tmp_path):
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2)
    refused("^correct_base='no', expected True or False.$", init.apply, model, correct_base="no")
    refused("^overwrite=1, expected True or False.$", init.save_pretrained, tmp_path / "adapter", overwrite=1)
    assert not any(tmp_path.iterdir())


def test_a_wrapped_model_is_the_one_inside(tmp_path):
    model = tiny_llama()
    init = build_adapter(made_up_statistics(model, ["q_proj"]), 2, modules_to_save=["lm_head"])
    init.save_pretrained(tmp_path / "adapter", model=nn.DataParallel(model))
    adapted = init.apply(nn.DataParallel(model))
    assert isinstance(adapted, PeftModel) and adapted.get_base_model() is model


@pytest.mark.parametrize(("name", "targets", "swapped"), [
    ("gpt2", ["c_attn", "lm_head"], True), ("gpt2", ["lm_head"], False), ("llama", ["q_proj"], False),
])  # fmt: skip
def test_a_config_says_where_a_weight_is_transposed(name, targets, swapped):
    init = build_adapter(made_up_statistics(MODELS[name](), targets), 2)
    assert init.to_peft_config().fan_in_fan_out is swapped


@pytest.mark.parametrize(("names", "trusted"), [
    (["body.0.one", "body.1.one"], True), (["body.0.one", "top"], False), (["body.one", "body.two"], False),
])  # fmt: skip
def test_short_names_are_written_as_a_pattern_unless_the_model_tells_them_apart(names, trusted):
    """They might end the name of another module, as that of a layer which statistics leave out."""
    model = nn.Module()
    for name in names:
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(8, 8))
    model.config = NO_CONFIG
    init = build_adapter(made_up_statistics(model, names, k=4), 2)
    written = init.to_peft_config().target_modules
    assert written == {*names} if trusted else isinstance(written, str)
    assert init.to_peft_config(model).target_modules == {*names}


def test_without_the_model_a_list_of_names_selects_no_layer_that_was_left_out():
    """PEFT takes a name of a list for an ending."""
    stats = made_up_statistics(tiny_llama(), ["q_proj", "v_proj"])
    init = build_adapter(stats, 2)
    for left_out, kind in ((("other.model.layers.0.self_attn.v_proj",), str), (("another",), set)):
        assert isinstance(replace(init, left_out=left_out).to_peft_config().target_modules, kind)


def test_a_parameter_that_keeps_pefts_start_is_selected_as_one():
    init = build_adapter(made_up_statistics(tiny_llama(), ["q_proj"]), 2)
    init = replace(init, unsupported={"model.table": "Embedding", "model.scale": "Parameter"})
    config = init.to_peft_config()
    assert config.target_parameters == ["model.scale"] and "table" in str(config.target_modules)
    assert "scale" not in str(config.target_modules)


def test_what_peft_draws_is_drawn_by_the_seed_and_no_weight_of_the_base_is_in_the_file(tmp_path):
    model = tiny_llama()
    init = build_adapter(collect(model, batches(), ["embed_tokens", "q_proj"], rank=2), 2, seed=3)
    assert init.unsupported == {"model.embed_tokens": "Embedding"}
    files = []
    for number, one in enumerate((init, init, replace(init, seed=4))):
        torch.manual_seed(number)
        one.save_pretrained(tmp_path / str(number), model=model)
        files.append(load_file(tmp_path / str(number) / "adapter_model.safetensors"))
    first, again, other = files
    assert len(first) == 6 and all(".lora_" in name for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_all_that_is_trained_whole_is_named_where_the_model_is_missing(tmp_path):
    stats = made_up_statistics(tiny_bert(), ["query"], task_type="SEQ_CLS")
    init = build_adapter(stats, 2, modules_to_save=["pooler"])
    words = r"^task_type='SEQ_CLS', modules_to_save=\['pooler'\]: PEFT trains the head \(\w+ or \w+\), pooler whole"
    refused(words, init.save_pretrained, tmp_path / "adapter")


def test_two_adapters_of_one_form_are_two():
    stats = made_up_statistics(tiny_llama(), task_type="CAUSAL_LM")
    one, other = (build_adapter(stats, 2, "random", seed=seed, modules_to_save=["lm_head"]) for seed in (0, 1))
    assert one == one and one != other and len({one, other}) == 2


def test_numbers_of_numpy_are_kept_as_plain_ones(tmp_path):
    """A seed comes from `np.arange`, and what was read with it is saved."""
    stats = collect(tiny_llama(), batches(), ["q_proj"], rank=2, seed=np.int64(3))
    stats.save(tmp_path / "statistics.safetensors")
    assert Statistics.load(tmp_path / "statistics.safetensors").provenance.seed == 3
    path = build_adapter(stats, np.int64(2), seed=np.int64(4)).save_pretrained(tmp_path / "adapter")
    origin = json.loads((path / "lora_init.json").read_text())
    assert (origin["seed"], origin["rank"], origin["provenance"]["seed"]) == (4, 2, 3)
    build_adapter(stats, 2, lora_dropout=np.float32(0.5)).apply(tiny_llama()).save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained/adapter_config.json").read_text())["lora_dropout"] == 0.5
