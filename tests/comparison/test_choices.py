"""Options and answers as data sets write them."""

import pytest

from lora_init.comparison.tasks import ChoiceRule, choice_rule, find_answer, split_options
from lora_init.errors import LoraInitError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["red", " blue "], ["red", "blue"]),
        ("A. red\nB. blue\n\n", ["A. red", "B. blue"]),
        ({"text": ["red", "blue"], "label": ["A", "B"]}, ["red", "blue"]),
        (None, []),
    ],
)
def test_options(value, expected):
    assert split_options(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("blue", 1), ("BLUE ", 1), ("a", 0), ("C", 2), (2, 2), ("2", 2), ("D", None), (3, None), ("green", None)],
)
def test_the_right_one(value, expected):
    assert find_answer(value, ["red", "blue", "white"]) == expected


def test_the_text_of_an_option_comes_before_letter_and_number():
    assert find_answer("1", ["1", "0"]) == 0
    assert find_answer("b", ["b", "a"]) == 0


def test_a_rule_reads_rows():
    columns = choice_rule(["o", "answer"], "data", "o", None)
    assert columns.read({"o": ["x", "y"], "answer": "y"}) == (["x", "y"], 1)
    assert columns.read({"o": ["x"], "answer": "x"}) is None
    fixed = choice_rule(["right"], "data", "True, False", "right")
    assert fixed == ChoiceRule("right", None, ("True", "False"))
    assert fixed.read({"right": False}) == (["True", "False"], 1)
    assert fixed.read({"right": None}) is None


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        ("o", "key", "answer='key' is not a column. Columns of data: o, a."),
        ("opts", "a", "options='opts' is not a column, and not a list of options"),
    ],
)
def test_bad_rules(options, answer, message):
    with pytest.raises(LoraInitError, match=message):
        choice_rule(["o", "a"], "data", options, answer)
