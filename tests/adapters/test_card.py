"""The README of an adapter before training, and its record, word by word."""

from dataclasses import asdict, replace

import pytest
import torch

from lora_init import build_adapter
from lora_init.adapters.card import card_of, correction_of, origin_of, start_in_words
from lora_init.adapters.directory import start_digest
from lora_init.rates.learning_rate import Response
from lora_init.starts.starts import Start, find_start
from tests.adapters.made import made_up_statistics
from tests.conftest import tiny_llama

CARD = """---
base_model: org/name
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:org/name
- lora
- lora_init
---

# A LoRA adapter before training

Made by lora_init for org/name: method `eva`, 4 layers, rank 1 to 4 (average 2.5), 736 trainable parameters. \
B is zero, so the adapter changes nothing until it is trained:

```python
from peft import PeftModel

directory = 'start'  # where this file is
model = PeftModel.from_pretrained(base_model, directory, is_trainable=True)
```

The learning rate is unknown: its statistics have no sizes of layers. `lora-init rate` measures it.
"""
ONE = {"layer": Response(2.0, 0.0)}
HEAD = """from transformers import AutoModelForSequenceClassification

# The adapter holds the head, whose outputs are these classes. Llama and its like also need a pad_token_id.
labels = {0: 'no', 1: 'yes'}
base_model = AutoModelForSequenceClassification.from_pretrained('org/name', id2label=labels)
"""
QUANTIZED = """from transformers import LlamaForCausalLM

# The adapter was made for the base quantized like this; whatever trains or serves it must quantize it the same way.
quantization = {'load_in_4bit': True}
base_model = LlamaForCausalLM.from_pretrained('BASE_MODEL', quantization_config=quantization)
"""
CORRECTED = """import lora_init

lora_init.correct_base(base_model, directory)
"""
FROZEN = """# A is meant to stay as it is. PEFT has no setting for that, so say it before the trainer is made:
for name, parameter in model.named_parameters():
    parameter.requires_grad &= ".lora_A." not in name
"""


@pytest.fixture(scope="module")
def init():
    stats = made_up_statistics(tiny_llama(), ["q_proj", "up_proj"], task_type="CAUSAL_LM", model_id="org/name")
    return build_adapter(stats, {name: i + 1 for i, name in enumerate(stats)}, seed=3)


def from_elsewhere(init, **changes):
    return replace(init.provenance, **changes)


def test_the_card_says_what_it_is_and_how_to_load_it(init, tmp_path):
    assert card_of(init, "start") == CARD
    text = CARD.partition("# A LoRA")[2].replace("org/name", "LlamaForCausalLM")
    local = replace(init, provenance=from_elsewhere(init, model_id=str(tmp_path), task_type=None))
    assert card_of(local, "start") == (f"---\nlibrary_name: peft\ntags:\n- lora\n- lora_init\n---\n\n# A LoRA{text}")
    asked = card_of(replace(init, learning_rate=3e-4), "start")
    assert asked.splitlines()[-1].startswith("Train with AdamW at 3e-4") and asked.splitlines()[-1].endswith("for it.")


@pytest.mark.parametrize(("changes", "provenance", "before", "between", "after"), [
    ({}, dict(settings={"classes": ["no", "yes"]}), HEAD, "", ""),
    ({}, dict(quantisation={"load_in_4bit": True}, model_id=""), QUANTIZED, "", ""),
    (dict(start=find_start("lora-ga")), {}, "", CORRECTED, ""),
    (dict(freeze_a=True), {}, "", "", FROZEN),
])  # fmt: skip
def test_the_code_of_the_card_loads_what_it_was_made_for(changes, provenance, before, between, after, init):
    card = card_of(replace(init, provenance=from_elsewhere(init, **provenance), **changes), "it's")
    code = card.split("```")[1]
    assert code == (
        f'python\nfrom peft import PeftModel\n{before}\ndirectory = "it\'s"  # where this file is\n{between}model = '
        f"PeftModel.from_pretrained(base_model, directory, is_trainable=True)\n{after}"
    )


@pytest.mark.parametrize(("changes", "words"), [
    (dict(start=find_start("lora-ga"), freeze_a=True),
     "B is not zero: the base weights must give up what the adapter adds, and what was trained is converted while it "
     "is saved (path_initial_model_for_weight_conversion); A stays as it is in training, see README.md"),
    (dict(freeze_a=True),
     "B is zero, so the adapter changes nothing until it is trained; A stays as it is in training, see README.md"),
    (dict(start=find_start("lora-one"), gamma=64.0), "B is not zero, and the model's output is another one (gamma 64)"),
    (dict(start=find_start("lora-one"), gamma=64.0, losses=(3.0, 2.5)),
     "B is not zero, and the model's output is another one (gamma 64, loss 3 -> 2.5 before any training)"),
    (dict(start=Start("theirs", "", function=lambda rank: None, b_is_zero=False), gamma=None, losses=(3.0, 2.5)),
     "B is not zero, and the model's output is another one"),
    (dict(start=find_start("qera"), losses=(3.0, 2.5), freeze_a=True),
     "B A gives the quantized base back what rounding took from its weights (loss 3 -> 2.5); A stays as it is in "
     "training, see README.md"),
])  # fmt: skip
def test_what_an_untrained_adapter_does_is_said_in_a_line(changes, words, init):
    assert start_in_words(replace(init, **changes)) == words


OF_PASS = dict(notes=["a note"], seconds={"forward": 1.0}, versions={"torch": "2"})


def test_the_record_has_what_no_config_has_and_the_short_one_less(init):
    layers = [*init.weights]
    init = replace(
        init, provenance=from_elsewhere(init, **OF_PASS), unsupported={"conv": "Conv3d"}, left_out=("lm_head",),
        explained={layers[0]: 0.123456},
    )  # fmt: skip
    short = {
        "freeze_a": False, "gamma": None, "unit_rows": False, "whiten": False, "method": "eva", "seed": 3, "rank": 2,
        "recommended": None,
    }  # fmt: skip
    provenance = asdict(init.provenance)
    of_layers = {"unsupported": {"conv": "Conv3d"}, "left_out": ["lm_head"], "explained": {layers[0]: 0.1235}}
    assert origin_of(init) == {**short, **of_layers, "provenance": provenance}
    kept = {key: value for key, value in provenance.items() if key not in OF_PASS}
    assert origin_of(init, short=True) == {**short, "provenance": kept}


def test_the_record_has_what_single_starts_need_later(init):
    plain = origin_of(init)

    def added(**changes):
        changed = replace(init, **changes)
        return tuple(
            {key: value for key, value in record.items() if key != "provenance" and plain.get(key, "") != value}
            for record in (origin_of(changed), origin_of(changed, short=True))
        )

    half = {name: own.to(torch.float16) for name, own in init.weights.items()}
    ga = dict(method="lora-ga", start=start_digest(half))
    assert added(start=find_start("lora-ga"), dtype="float16") == (ga, ga)
    errors = dict.fromkeys(init.weights, (3.0, 1.0))
    qera = dict(method="qera", start=start_digest(init.weights), error_size=2.5)
    correction = {
        "losses": {"float": 2.0, "quantised": 3.0, "corrected": 2.25}, "share_closed": 0.75,
        "errors": {name: [3.0, 1.0] for name in init.weights},
    }  # fmt: skip
    corrects = dict(start=find_start("qera"), errors=errors, error_size=2.5, losses=(3.0, 2.25), exact_loss=2.0)
    assert added(**corrects) == (qera | {"correction": correction}, qera)
    assert correction_of(replace(init, errors=errors)) == correction | {
        "losses": dict.fromkeys(["float", "quantised", "corrected"]), "share_closed": None,
    }  # fmt: skip
    theirs = replace(find_start("lora-ga"), name="theirs", package="own 1.0")
    theirs_in_words = dict(method="theirs", package="own 1.0", corrects_base=True, start=start_digest(init.weights))
    assert added(start=theirs) == (theirs_in_words, theirs_in_words)
    asked, _ = added(learning_rate=3e-4)
    assert asked == {"learning_rate": 3e-4, "recommended": replace(init, learning_rate=3e-4).recommended}
    measured = replace(init, responses=ONE)
    rate = dict(recommended=measured.rate.training)
    assert added(responses=ONE) == (rate | {"rate": measured.rate.stored()}, rate)
