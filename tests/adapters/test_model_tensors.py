"""Modules trained whole, tied weights, and layers that keep PEFT's own start."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel
from torch import nn
from typer.testing import CliRunner

from lora_init import LoraInitError, build_adapter, collect, initialize
from tests.conftest import batches_for, tiny_bert, tiny_llama


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


def test_a_head_and_modules_to_save_together(tmp_path):
    model = tiny_bert()
    data = [{k: v for k, v in b.items() if k != "labels"} for b in batches_for("bert", n_batches=3)]
    stats = collect(model, data, task_type="SEQ_CLS", rank=2)
    init = build_adapter(stats, 2, modules_to_save=["pooler"])
    assert any("pooler" in name for name in init.left_out)  # a targeted layer inside it gets no adapter
    init.save_pretrained(tmp_path / "adapter", model=model)
    loaded = loaded_without_a_word(model, tmp_path / "adapter")
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in init.apply(model).state_dict().items())


def test_tied_layers_as_targets(tmp_path):
    """The output embedding shares its weight with the input embedding, and has an adapter of its own."""
    model = tiny_llama(tie_word_embeddings=True)
    before = model(**batches()[0]).logits.detach()
    stats = collect(model, batches(), ["q_proj", "lm_head"], rank=2)
    assert stats["lm_head"].n_samples == sum(int(b["attention_mask"].sum()) for b in batches())
    init = build_adapter(stats, 2)
    init.save_pretrained(tmp_path / "adapter", model=model)
    loaded = loaded_without_a_word(model, tmp_path / "adapter")
    peft_model = init.apply(model)
    assert torch.equal(peft_model(**batches()[0]).logits, before)
    assert torch.equal(loaded(**batches()[0]).logits, before)
    base = peft_model.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight  # still tied


def test_one_module_under_two_names_is_one_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = None
            self.first = nn.Linear(8, 8)
            self.second = self.first
            self.third = nn.Linear(8, 8)
            self.third.weight = self.first.weight  # another layer of the same weight

        def forward(self, x):
            return self.third(self.second(self.first(x).relu()).relu())

    model, data = Shared(), [torch.randn(9, 8) for _ in range(3)]
    before = model(data[0]).detach()
    stats = collect(model, data, ["first", "second", "third"], rank=2)
    assert list(stats) == ["first", "third"]
    assert stats["first"].n_samples == 2 * 27
    peft_model = build_adapter(stats, 2).apply(model)
    assert torch.equal(peft_model(data[0]), before)


def test_layers_without_a_spectrum_are_in_the_file_with_pefts_start(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = None
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


def test_initialize_and_the_command_line_take_modules_to_save(tmp_path):
    from lora_init.cli import app as cli
    from tests.cli.test_app import WORDS, save_model

    peft_model = initialize(tiny_llama(), batches(), rank=2, modules_to_save=["lm_head"])
    assert peft_model.peft_config["default"].modules_to_save == ["lm_head"]
    save_model(tiny_llama(), tmp_path / "model")
    (tmp_path / "data.txt").write_text("\n".join(" ".join(WORDS[i % 9 :]) for i in range(20)))
    arguments = ["init", str(tmp_path / "model"), str(tmp_path / "data.txt"), "--rank", "2"]
    result = CliRunner().invoke(cli.app, [*arguments, "-o", str(tmp_path / "a"), "--modules-to-save", "lm_head"])
    assert result.exit_code == 0, result.stderr
    loaded = loaded_without_a_word(tiny_llama(), tmp_path / "a")
    assert loaded.get_base_model().lm_head.modules_to_save["default"].weight.requires_grad
    result = CliRunner().invoke(cli.app, [*arguments, "-o", str(tmp_path / "b"), "--modules-to-save", "lm_haed"])
    assert result.exit_code == 1
    assert "modules_to_save: 'lm_haed' is no module of LlamaForCausalLM. Closest: lm_head" in result.stderr
    assert not (tmp_path / "b").exists()
    assert "rows in" not in result.stdout


def test_mistakes_get_one_clear_line(tmp_path):
    model = tiny_llama()
    stats = collect(model, batches(), ["q_proj"], rank=2)
    with pytest.raises(LoraInitError, match="must be a list of names"):
        build_adapter(stats, 2, modules_to_save="lm_head")
    with pytest.raises(LoraInitError, match="hold every layer"):
        build_adapter(stats, 2, modules_to_save=["self_attn"])
    init = build_adapter(stats, 2, modules_to_save=["lm_head"])
    with pytest.raises(LoraInitError, match=r"modules_to_save=\['lm_head'\]: PEFT trains lm_head whole.*Pass model="):
        init.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraInitError, match="'nowhere' is no module of LlamaForCausalLM"):
        build_adapter(stats, 2, modules_to_save=["nowhere"]).apply(model)
