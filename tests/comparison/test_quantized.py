"""A comparison on a base that is quantized while it is loaded, by bitsandbytes itself."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from lora_init.comparison.starts import check_quantized
from lora_init.comparison.variants import Variant
from lora_init.errors import LoraInitError
from lora_init.starts.starts import STARTS
from tests.commands import save_model
from tests.comparison import made
from tests.comparisons import make_home
from tests.conftest import refused, tiny_llama

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models whose widths bitsandbytes' kernels take, and whose weights are large enough for rounding to matter."""
    home = make_home(tmp_path_factory.mktemp("quantized"))
    torch.manual_seed(0)
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(8.0)
    save_model(model, home / "wide")
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    save_model(BertModel(BertConfig(vocab_size=64, max_position_embeddings=64, **shape)), home / "encoder")
    return home


def compare(home, output, **changes):
    return made.compare(home, output, **dict(model="wide", quantize="nf4", learning_rates=[1e-3], seeds=1) | changes)


def begins(found):
    """The loss of each start before it is trained."""
    assert {record["status"] for record in found.records} == {"finished"}, found.records
    return {record["start"]: record["report_loss"][0] for record in found.records if "-steps" not in record["start"]}


@pytest.mark.slow
def test_starts_that_correct_the_base_begin_as_the_float_model(home, tmp_path):
    found = compare(home, tmp_path / "out", starts=["random", "qera", "loftq"], full=True, rank=64)
    plain, exact = found.records[0]["plain_loss"], found.records[0]["float_loss"]
    begin = begins(found)
    assert abs(plain - exact) > 1e-3 and begin["random"] == pytest.approx(plain, rel=1e-6)
    assert begin["full"] == pytest.approx(exact, rel=1e-5)  # other kernels than those of the hooks
    # At full rank all of the error is given back, with the data and without.
    for start in ("qera", "loftq"):
        assert abs(begin[start] - exact) < 0.02 * abs(plain - exact)
    assert "before it was quantized), and random ends at" in found.summary.headroom
    assert found.settings["quantisation"]["bnb_4bit_quant_type"] == "nf4" and "--quantize nf4" in found.settings["init"]


@pytest.mark.parametrize(("starts", "quantized", "message"), [
    (["random", "qera"], {}, "start 'qera' corrects a quantized base. Load it so: quantize='nf4'."),
    (["qera"], dict(is_quantized=True), "needs the model before it was quantized. Name its directory"),
    (["full"], dict(is_quantized=True), "start 'full' needs the model before it was quantized"),
    (["loftq"], {}, None),  # with a rounding of its own
    *((x.name, dict(is_quantized=True, has_float=True), "changes base weights, and these are quantized")
      for x in STARTS if x.changes_base and x.name not in ("loftq", "full")),
])  # fmt: skip
def test_what_a_base_cannot_have_is_refused(starts, quantized, message):
    asked = dict(is_quantized=False, has_float=False) | quantized
    starts = list(map(Variant.parse, [starts] if isinstance(starts, str) else starts))
    if message is None:
        check_quantized(starts, **asked)
        return
    assert message in refused("", check_quantized, starts, **asked)


@pytest.mark.parametrize(("starts", "quantize", "message"), [
    (["qera"], None, "^start 'qera' corrects a quantized base"),
    (["pissa"], "nf4", "^start 'pissa' changes base weights, and these are quantized"),
    (["qera"], "nf4", "nowhere.jsonl"),  # it fits, so the data are read
    (["pissa"], None, "nowhere.jsonl"),
])  # fmt: skip
def test_a_start_that_does_not_fit_the_base_is_refused_before_the_data_are_read(
    starts, quantize, message, home, tmp_path
):
    refused(message, compare, home, tmp_path / "out", data="nowhere.jsonl", starts=starts, quantize=quantize)


def test_a_comparison_does_not_go_on_with_other_float_weights(home, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(home / "wide")
    model.model.layers[1].mlp.up_proj.weight.data *= 1.1
    save_model(model, home / "other")
    given = dict(starts=["random"], steps=2, evaluation_points=None)
    compare(home, tmp_path, **given, weights=home / "wide")
    refused("other content: .*float weights", compare, home, tmp_path, **given, weights=home / "other")


def test_float_weights_of_a_float_model_are_refused(home, tmp_path):
    with pytest.raises(LoraInitError, match="is not quantized"):
        compare(home, tmp_path / "out", starts=["random"], quantize=None, weights=home / "wide")
