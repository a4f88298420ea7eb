"""Words that several commands share."""

from lora_init.cli.console import read_modules, unescape


def test_modules_are_read_as_names_or_as_a_regular_expression():
    assert read_modules("all-linear") == "all-linear"
    assert read_modules("q_proj") == ["q_proj"]
    assert read_modules("q_proj, self_attn.v_proj") == ["q_proj", "self_attn.v_proj"]
    assert read_modules(r".*\.q_proj") == r".*\.q_proj"


def test_newlines_and_tabs():
    assert unescape(r"a\nb\tc") == "a\nb\tc"
    assert unescape(None) is None
