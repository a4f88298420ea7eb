"""One row becomes tokens with labels, or with its class; which classes a column has, and what is none."""

import logging
import re
from collections import Counter

import pytest
from tokenizers import processors

from lora_init.loading.examples import Wanted
from lora_init.loading.reader import (
    IGNORED,
    _check_classes,
    _class_of,
    _number,
    check_columns,
    classes_in_words,
    count_classes,
    open_reader,
)
from lora_init.loading.sources import read_rows
from tests.conftest import refused
from tests.loading.made import CHAT, bert_tokenizer, byte_tokenizer

EOS = "<eos>"


def opened(rows, tokenizer, max_length=99, *, template=None, completion=None, label=None, **how):
    return open_reader(read_rows(rows), tokenizer, max_length, Wanted(template, completion, None, label), **how)


def shown(encoded, tokenizer):
    """Tokens as texts, and those of them that have a label."""
    ids, labels = encoded
    return [tokenizer.decode(one) for one in ids], [tokenizer.decode(one) for one in labels if one != IGNORED]


@pytest.mark.parametrize(("row", "max_length", "ids", "labelled"), [
    ({"text": "abc"}, 9, ["a", "b", "c", EOS], ["a", "b", "c", EOS]),
    ({"text": "abc"}, 3, ["a", "b", "c"], ["a", "b", "c"]),
    ({"prompt": "ab", "completion": "c"}, 9, ["a", "b", "c", EOS], ["c", EOS]),
    ({"prompt": "ab", "completion": "cd"}, 3, ["a", "b", "c"], ["c"]),
    ({"prompt": "ab", "completion": f"c{EOS}"}, 9, ["a", "b", "c", EOS], ["c", EOS]),  # which ends already
])  # fmt: skip
def test_the_end_of_a_sequence_follows_and_has_a_label_and_what_is_too_long_loses_its_end(
    row, max_length, ids, labelled
):
    tokenizer = byte_tokenizer(eos_token=EOS)
    assert shown(opened([row], tokenizer, max_length)(row), tokenizer) == (ids, labelled)


@pytest.mark.parametrize(("row", "how", "why"), [
    ({"text": " "}, {}, "with an empty field"),
    ({"prompt": "abc", "completion": "d"}, {}, "without a labelled token among the first 3"),
    ({"q": "a", "k": None}, {"template": "{q}", "label": "k"}, "without a label"),
])  # fmt: skip
def test_a_row_that_makes_no_example_says_why(row, how, why):
    others = [{"q": "a", "k": "x"}, {"q": "b", "k": "y"}] if "k" in row else []
    assert opened([row, *[one for one in others for _ in "ab"]], byte_tokenizer(), 3, **how)(row) == why


def test_a_row_without_labels_is_read_where_every_token_counts():
    tokenizer, row = byte_tokenizer(), {"prompt": "abc", "completion": "d"}
    assert shown(opened([row], tokenizer, 3, needs_labels=False)(row), tokenizer) == (["a", "b", "c"], [])


@pytest.mark.parametrize(("ours", "its", "limit"), [(9, 5, 5), (5, 9, 5)])
def test_the_smaller_of_both_limits_counts(ours, its, limit):
    assert opened([{"text": "a"}], byte_tokenizer(model_max_length=its), ours).limit == limit
    assert opened([{"text": "a"}], lambda **_: {"input_ids": [1]}, ours).limit == ours  # which has none


@pytest.mark.parametrize("rendered", [True, False])
def test_a_chat_template_alone_ends_a_chat(rendered):
    """What the tokenizer would add of itself is in the template already, and no end of a sequence is added."""
    tokenizer = byte_tokenizer(eos_token=EOS, bos_token="<bos>", chat_template=CHAT)
    special = [("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))]
    ends = processors.TemplateProcessing(single="<bos> $A", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = ends
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns} if rendered else {"text": "ab"}
    ids, _ = shown(opened([row], tokenizer)(row), tokenizer)
    assert ("<bos>" in ids, ids[-1] == EOS) == ((False, False) if rendered else (True, True))


@pytest.mark.parametrize(("prompt", "completion", "max_length", "ids", "labelled"), [
    ("a b", " c d", 9, "[CLS] a b c d [SEP]", "c d [SEP]"),
    ("a b", " c d", 5, "[CLS] a b c [SEP]", "c"),  # the separator took the place of d, and no label is its
    ("a b", " c d", 6, "[CLS] a b c d [SEP]", "c d [SEP]"),
])  # fmt: skip
def test_a_separator_stays_and_has_a_label_only_in_its_own_place(prompt, completion, max_length, ids, labelled):
    tokenizer, row = bert_tokenizer(), {"prompt": prompt, "completion": completion}
    found = shown(opened([row], tokenizer, max_length)(row), tokenizer)
    assert [" ".join(part) for part in found] == [ids, labelled]


@pytest.mark.parametrize(("row", "ids", "labels"), [
    ({"prompt": "a b", "completion": "c d e f"}, "[CLS] a b [SEP]", "[CLS] c d [SEP]"),
    ({"prompt": "a b c d", "completion": "e"}, "[CLS] a b [SEP]", "[CLS] e [SEP]"),
])  # fmt: skip
def test_an_encoder_decoder_has_an_answer_of_its_own_length(row, ids, labels):
    tokenizer = bert_tokenizer()
    encoded = opened([row], tokenizer, 4, seq2seq=True)(row)
    assert [tokenizer.decode(part) for part in encoded] == [ids, labels]


@pytest.mark.parametrize("row", [{"text": "a b"}, {"prompt": "a", "completion": ["b"]}, "chat"])
def test_an_encoder_decoder_needs_a_prompt_and_one_answer(row):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    row = {"messages": turns} if row == "chat" else row
    said = "holds a list" if "completion" in row else "^an encoder-decoder model needs a prompt and one completion. Use"
    refused(said, opened([row], byte_tokenizer(chat_template=CHAT), seq2seq=True), row)


def test_the_columns_of_a_class_are_those_of_the_text_and_its_own():
    rows = [{"q": "a", "k": kind, "x": "y"} for kind in "babab"]
    reader = opened(rows, byte_tokenizer(), template="{q}", label="k")
    assert reader.columns == ["q", "k"] and reader.rows_of == {"a": 2, "b": 3} and reader(rows[0])[1] == [1]
    assert opened(rows, byte_tokenizer(), template="{q}{x}").columns == ["q", "x"]


@pytest.mark.parametrize(("values", "known", "counts"), [
    (["b", "a", "b", None, " "], (), {"a": 1, "b": 2}),
    (["10", "9", "9"], (), {"9": 2, "10": 1}), (["10", "9", "x"], (), {"10": 1, "9": 1, "x": 1}),
    (["01", "1", "2"], (), {"01": 1, "1": 1, "2": 1}), ([True, False, True], (), {"False": 1, "True": 2}),
    (["a", "b"], ("c", "b", "a"), {"c": 0, "b": 1, "a": 1}), (["a", "b"], ("c", "b"), {"a": 1, "b": 1}),
    (["a", "b"], ("b", "a"), {"b": 1, "a": 1}),
    ([2.0, 1.0, 2.0], (), {"1": 1, "2": 2}), (["nan", "1", "1"], (), {"1": 2, "nan": 1}),
    ([-1, 1, -1], (), {"-1": 2, "1": 1}),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_classes_are_counted_in_the_order_of_their_labels(values, known, counts):
    rows = read_rows([{"q": str(number), "k": value} for number, value in enumerate(values)])
    assert [*count_classes(rows, "k", ["q"], known).items()] == [*counts.items()]


def test_a_class_that_the_text_gives_away_is_refused():
    rows = read_rows([{"q": "a", "k": kind} for kind in "ab"])
    refused(
        "^label='k' is a part of the text, which gives the class away. Take it out.$", count_classes, rows, "k", "k"
    )


@pytest.mark.parametrize(("values", "said"), [
    (["a", "b"], "^label='x' is not a column. Columns of data in memory: k.$"),
    ([["a"], ["b"]], "^data in memory: column 'k' holds lists, and a row has one class. Name another.$"),
    ([None, ["b"], ["a"]], "^data in memory: column 'k' holds lists, and a row has one class"),
    (["a", "a"], "^data in memory: column 'k' has 1 different values"),
])  # fmt: skip
def test_a_column_that_has_no_classes_is_named(values, said):
    rows = read_rows([{"k": value} for value in values])
    refused(said, count_classes, rows, "x" if "'x'" in said else "k", ["q"])
    refused(
        "^a classification has no completion", opened, [{"k": "a"}], None, template="{k}", completion="x", label="k"
    )


def halves(n):
    return [str(number / 2) for number in range(n)]


@pytest.mark.parametrize(("names", "rows", "said"), [
    (halves(20), 2, None), (halves(21), 2, "has 21 different numbers with fractions, from 0 to 10. They are measured"),
    (["0.25", "0.5"], 9, "has 2 different numbers with fractions, from 0.25 to 0.5. They are measured values"),
    ([*map(str, range(100))], 2, None),
    ([*map(str, range(101))], 2, "has 101 different values, and a classification needs 2 to 100 classes. Name"),
    (["a"], 9, "has 1 different values, and a classification needs 2 to 100 classes"), (["a", "b"], 1, None),
    ([], 1, "has 0 different values"),
    ([*map(str, range(20))], 1, None), ([*map(str, range(21))], 1, "has another value in each of its 21 rows, as"),
    (["2024-01-03", "2023/12/31"], 2, "holds dates, such as 2023/12/31. Name the class."),
    (["3.1.2024", "31.12.23"], 2, "holds dates, such as 3.1.2024."), (["2024-01-03", "late"], 2, None),
    (["1.2.3.4", "1.2.345"], 2, None),
])  # fmt: skip
def test_what_a_column_of_classes_may_hold(names, rows, said):
    counts = Counter(dict.fromkeys(names, rows))
    numbers = [float(name) for name in names if _number(name) is not None]
    if said is None:
        _check_classes(counts, numbers, "k")
    else:
        refused(f"^k {re.escape(said)}", _check_classes, counts, numbers, "k")


@pytest.mark.parametrize(("value", "name"), [
    (1.0, "1"), ("-2.00", "-2"), (1.5, "1.5"), ("10", "10"), ("v1.0", "v1.0"), ("1.0.0", "1.0.0"), (True, "True"),
    (None, None), (float("nan"), None), (" ", None), (" a", " a"),
])  # fmt: skip
def test_a_field_is_named_as_a_class_with_a_whole_number_as_one(value, name):
    assert _class_of(value) == name


@pytest.mark.parametrize(
    ("name", "number"), [("1.5", 1.5), ("-3", -3.0), ("nan", None), ("infinity", None), ("a", None)]
)
def test_a_number_is_finite(name, number):
    assert _number(name) == number


def test_classes_are_written_with_their_rows():
    assert classes_in_words({"yes": 3, "no": 12}) == "2 classes (yes 3, no 12)"


def test_each_oddity_of_classes_is_warned_of_once_with_its_names():
    kinds = ["a", "A ", "a", "A ", "NaN", "NaN", "n/a", "b", "b"]
    rows = read_rows([{"q": "x", "k": kind} for kind in kinds])
    with pytest.warns(UserWarning) as warned:
        count_classes(rows, "k", ["q"])
    place = "data in memory, column 'k': "
    assert [str(one.message) for one in warned] == [
        f"{place}'n/a': one row: too few to learn from. Leave it out, or join classes.",
        f"{place}'a', 'A ': the same but for spaces or case, and counts as another class. Write both alike.",
        f"{place}'NaN', 'n/a': what a missing value is written as, and counts as a class. Leave such cells empty.",
    ]


@pytest.mark.parametrize("word", ["nan", "None", "NULL", " N/A ", "na", "<NA>"])
def test_what_a_missing_value_is_written_as_is_warned_of_as_a_class(word):
    rows = read_rows([{"q": "x", "k": kind} for kind in (word, "b") * 2])
    with pytest.warns(UserWarning) as warned:
        count_classes(rows, "k", ["q"])
    assert [str(one.message).partition(": what a")[0] for one in warned] == [f"data in memory, column 'k': {word!r}"]


def test_a_text_beyond_the_limit_of_its_tokenizer_is_cut_without_a_word(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # a command that ran before in this process makes it quiet
    tokenizer, row = byte_tokenizer(model_max_length=3), {"text": "abcd"}
    assert shown(opened([row], tokenizer)(row), tokenizer)[0] == ["a", "b", "c"] and not caplog.records
    tokenizer("abcd")
    assert "longer than the specified maximum" in caplog.text


@pytest.mark.parametrize(("wanted", "said"), [
    (Wanted("{b}", "{k}"), None), (Wanted("{b}", label="k"), None),
    (Wanted("{x}"), "^template='{x}': .*data.csv has no column 'x'. Its columns: b, k"),
    (Wanted("{b}", "{x}"), "^completion='{x}': .*data.csv has no column 'x'. Its columns: b, k"),
    (Wanted("{b}", label="x"), "^label='x' is not a column. Columns of .*data.csv: b, k.$"),
    (Wanted(label="k"), r"such as template='\{b\}'\.$"), (Wanted(), r"'\{b\}' with completion=' \{k\}'\.$"),
    (Wanted("{x}", "{k}", label="k"), None),  # refused later, for it is a class with a completion
])  # fmt: skip
def test_columns_are_looked_at_before_the_data_are_read(wanted, said, tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("b,k\nlong,y\n")
    if said is None:
        check_columns(str(file), wanted)
    else:
        refused(said, check_columns, str(file), wanted)
    file.write_text("input_ids,x\n1,2\n")
    check_columns(str(file), wanted)  # tokens need no recipe


@pytest.mark.parametrize("name", ["owner/name", "data.parquet", "."])
def test_data_whose_columns_take_long_to_know_are_left_to_the_reading(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.parquet").touch()
    monkeypatch.setattr("lora_init.loading.reader.read_rows", lambda *_: pytest.fail("the data were read"))
    check_columns(name, Wanted("{x}"))


def test_a_column_that_the_first_row_lacks_may_be_in_the_others(write):
    check_columns(str(write([{"a": "x"}, {"a": "x", "b": "y"}])), Wanted("{b}"))


def test_a_chat_needs_no_tokenizer_to_be_known(write):
    check_columns(str(write([{"messages": [{"role": "user", "content": "a"}]}])), Wanted())


def test_a_tokenizer_of_no_library_will_do():
    def letters(text, add_special_tokens, verbose):
        return {"input_ids": [ord(letter) for letter in text]}

    found = opened([{"text": "ab"}], letters)({"text": "ab"})
    assert found == ([97, 98], [97, 98])
