"""PEFT's LoraConfig: its scaling, its patterns, and what is left out."""

import re

import pytest

from lora_init.planning.lora_config import alpha_for, from_patterns, listed_or_pattern, lora_config, scaling_of
from tests.conftest import refused


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_alpha_gives_exactly_its_scaling(use_rslora):
    for rank in range(1, 130):
        for lora_alpha in (1, 16, 24, 7.5, 0.3):
            scaling = scaling_of(lora_alpha, rank, use_rslora)
            assert alpha_for(scaling, rank, use_rslora) == pytest.approx(lora_alpha, rel=1e-15)
            for other in (1, 3, 13, 64):
                alpha = alpha_for(scaling, other, use_rslora)
                assert scaling_of(alpha, other, use_rslora) == pytest.approx(scaling, rel=1e-15)
                if not use_rslora and lora_alpha * other % rank == 0:
                    assert type(alpha) is int


def test_an_alpha_that_misses_a_whole_number_by_rounding_is_that_number():
    alpha = alpha_for(scaling_of(24, 22), 55)  # 59.99999999999999 as a product
    assert alpha == 60 and type(alpha) is int


def test_a_thousand_layers_have_no_more_keys_than_ranks():
    """PEFT tries every key on every layer, and Python forgets compiled expressions beyond 512 of them."""
    ranks = {
        f"model.layers.{i}.self_attn.{kind}_proj": 1 + (7 * i + j) % 32
        for i in range(300)
        for j, kind in enumerate("qkvo")
    }
    settings = lora_config(ranks, 16, 1.0, [])
    assert len(ranks) == 1200 and len(settings["rank_pattern"]) == len(settings["alpha_pattern"]) == 31
    assert from_patterns(settings["rank_pattern"], ranks, 16) == ranks


def test_keys_that_say_nothing_are_left_out():
    """Older readers refuse keys that they do not know."""
    config = lora_config({"up": 2, "down": 0}, 2, 1.5, "up", use_dora=False, target_parameters=[], bias="all")
    assert config["r"] == 2 and config["lora_alpha"] == 3 and config["target_modules"] == "up"
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["bias"] == "all"
    assert not {"use_dora", "use_rslora", "target_parameters"} & {*config}


def test_a_key_with_an_alternative_is_one_key_as_in_peft():
    names = ["h.0.q_proj", "h.0.v_proj", "h.0.k_proj", "h.0.q_projection"]
    assert list(from_patterns({"q_proj|v_proj": 4}, names, 8).values()) == [4, 4, 8, 8]


def test_one_other_layer_that_a_list_would_take_makes_a_pattern():
    assert listed_or_pattern(["q"], ["out", "k"]) == ["q"]
    pattern = listed_or_pattern(["q"], ["k", "more.q"])
    assert isinstance(pattern, str) and [name for name in ("q", "k", "more.q") if re.fullmatch(pattern, name)] == ["q"]


def test_a_configuration_by_hand():
    config = lora_config(
        {"up": 2, "h.0.down": 3, "h.1.down": 3, "gate": 0}, 2, 1.5, ("up", "down"), use_rslora=True, task_type="X"
    )
    pattern = r"^(?:h\.0\.down|h\.1\.down)$"
    assert config == {
        "peft_type": "LORA", "task_type": "X", "base_model_name_or_path": None, "r": 2,
        "lora_alpha": pytest.approx(1.5 * 2**0.5), "rank_pattern": {pattern: 3},
        "alpha_pattern": {pattern: pytest.approx(1.5 * 3**0.5)}, "lora_dropout": 0.0, "target_modules": ["up", "down"],
        "fan_in_fan_out": False, "bias": "none", "init_lora_weights": True, "use_rslora": True,
    }  # fmt: skip


def test_the_first_key_that_ends_a_name_counts():
    patterns = {"up": 1, "b.*": 2, "x.up": 3, "c": None}
    names = ["up", "a.up", "x.up", "b.q", "cup", "c"]
    assert from_patterns(patterns, names, 8) == {"up": 1, "a.up": 1, "x.up": 1, "b.q": 2, "cup": 8, "c": None}
    assert from_patterns(None, ["up"], 8) == {"up": 8}
    words = r"^a key of the pattern \{'\(': 1\} is no regular expression: missing \), .*\.$"
    refused(words, from_patterns, {"(": 1}, ["up"], 8)
