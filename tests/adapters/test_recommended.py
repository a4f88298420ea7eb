"""What is far off from the recommendation is said in one line, and nothing where nothing was measured."""

from types import SimpleNamespace

import pytest

from lora_init.adapters.recommended import Fit
from lora_init.adapters.starts import find_start

ALPHA = "lora_alpha is 8: make it 64 in the LoraConfig"
RATE = "learning_rate is 1e-5: make it 2e-4 in the trainer's args"
CASES = {
    "as recommended": (dict(), (2e-4, "adamw_torch"), ""),
    "within a factor of three": (dict(lora_alpha=22), (5e-4, "adamw_torch"), ""),
    "PEFT's alpha": (dict(lora_alpha=8), (2e-4, "adamw_torch"), f"{ALPHA}. That"),
    "five times the rate": (
        dict(),
        (1e-3, "adamw_torch"),
        "learning_rate is 1e-3: make it 2e-4 in the trainer's args.",
    ),
    "both": (dict(lora_alpha=8), (1e-5, "adamw_torch"), f"{ALPHA}, and {RATE}. That"),
    "another optimizer": (dict(lora_alpha=8), (1e-5, "sgd"), "no learning rate was measured for method 'eva' with opt"),
    "DoRA": (dict(lora_alpha=8, use_dora=True), (1e-5, "adamw_torch"), ""),
    "a frozen A": (dict(lora_alpha=8, freeze_a=True), (1e-5, "adamw_torch"), ""),
    "no trainer": (dict(lora_alpha=8), None, f"{ALPHA}. That"),
    "no trainer, as recommended": (dict(), None, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_far_off_is_one_line(case):
    adapter, trained, words = CASES[case]
    settings = trained and SimpleNamespace(learning_rate=trained[0], optim=trained[1])
    said = Fit(find_start("eva"), **dict(rank=16, lora_alpha=64) | adapter).far_off(settings)
    assert len(said) == bool(words) and all(line.startswith(words) and "\n" not in line for line in said)


def test_nothing_is_far_off_where_no_rate_was_measured():
    assert Fit(find_start("orthogonal"), rank=16, lora_alpha=1).far_off(None) == []
