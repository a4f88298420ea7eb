"""What is trained on, what is scored, and in which order."""

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from lora_init.comparison import tasks
from lora_init.comparison.tasks import (
    Item,
    LoadingOptions,
    find_answer,
    fold_sizes,
    item_length,
    load_task,
    read_choices,
    split_options,
)
from lora_init.errors import LoraInitError
from lora_init.loading.reader import IGNORED
from tests.commands import WORDS
from tests.conftest import refused


@pytest.fixture(scope="module")
def tokenizer(home):
    return AutoTokenizer.from_pretrained(home / "llama")


def load(home, tokenizer, **changes):
    settings = dict(template="{passage}", train_samples=40, selection_samples=6, report_samples=10) | changes
    batch_size = settings.pop("batch_size", 4)
    return load_task(home / "rows.jsonl", tokenizer, LoadingOptions(**settings), batch_size)


KINDS = {
    "causal-lm": dict(completion=" {letter}"),
    "classification": dict(label="first"),
    "multiple-choice": dict(options="options"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_example_is_in_two_folds(home, tokenizer, kind):
    task = load(home, tokenizer, **KINDS[kind])
    assert task.kind == kind
    how = {"causal-lm": "", "classification": f", label first, {len(task.classes)} classes"}
    name = f"{home.name}/rows.jsonl"
    counted = (
        f"{name}: 40 examples to train on, 6 to select by and 10 to report of 120, split seed 0, at most 256 tokens, "
    )
    assert task.data.startswith(counted) and (task.label, task.normalize, task.spelled_out) == (name, False, True)
    ending = how.get(kind, ", options options, answer answer")
    recipe = task.data.removeprefix(counted).removesuffix(ending)
    assert task.data.endswith(ending) and recipe.startswith("template '{passage}'") and "," not in recipe
    assert (len(task.train), len(task.selection), len(task.report)) == (40, 6, 10)
    assert len({tuple(item.tokens[0]) for item in [*task.train, *task.selection, *task.report]}) == 56


def test_of_rows_that_are_alike_the_first_counts(tmp_path, tokenizer):
    rows = [json.dumps({"passage": f"the cat sat {'on ' * (i % 3)}mat", "kind": i % 2}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    asked = LoadingOptions(template="{passage}", selection_samples=1, report_samples=1)
    assert len(load_task(tmp_path / "rows.jsonl", tokenizer, asked, 1).train) == 1
    with pytest.raises(LoraInitError, match="1 examples to train on, 1 to select by and 1 to report; expected 4"):
        load_task(tmp_path / "rows.jsonl", tokenizer, asked, 4)


FORMS = {
    "prompt": lambda question, word: {"prompt": f"the {question} sat", "completion": f" {word}"},
    "messages": lambda question, word: {
        "messages": [
            {"role": "assistant", "content": "hello"},  # a greeting answers nothing
            {"role": "user", "content": f"the {question} sat"},
            {"role": "assistant", "content": word},
        ]
    },
    "letter": lambda question, word: {"q": f"the {question} sat", "options": WORDS[15:], "answer": word},
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_one_prompt_are_in_one_fold(tmp_path, tokenizer, form):
    rows = [FORMS[form](question, word) for question in WORDS[:15] for word in WORDS[15:]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    choices = dict(template="{q}", options="options") if form == "letter" else {}
    asked = LoadingOptions(train_samples=40, selection_samples=5, report_samples=5, **choices)
    task = load_task(tmp_path / "rows.jsonl", tokenizer, asked, 4)

    def asked_for(items):
        return {tuple(t for t, label in zip(*item.tokens, strict=True) if label == IGNORED) for item in items}

    folds = [asked_for(items) for items in (task.train, task.selection, task.report)]
    assert not (folds[0] & folds[1] or folds[0] & folds[2] or folds[1] & folds[2])
    assert len(folds[0]) + len(folds[1]) + len(folds[2]) == 15 and len(task.train) > len(folds[0])
    assert "left out with a prompt of another fold" in task.data
    more = load_task(tmp_path / "rows.jsonl", tokenizer, replace(asked, train_samples=10), 4)
    assert (more.report, more.selection) == (task.report, task.selection)


@pytest.mark.parametrize(
    ("n_rows", "folds"),
    [(60, (30, 10, 20)), (300, (150, 50, 100)), (400, (201, 66, 133)), (1000, (616, 128, 256))],
)
def test_few_data_are_split_in_proportion(tmp_path, tokenizer, n_rows, folds, recwarn):
    rows = [" ".join(WORDS[i // 19**k % 19] for k in range(3)) for i in range(n_rows)]
    (tmp_path / "rows.txt").write_text("\n".join(rows))
    task = load_task(tmp_path / "rows.txt", tokenizer, LoadingOptions(), 8)
    assert (len(task.train), len(task.selection), len(task.report)) == folds
    asked = load_task(tmp_path / "rows.txt", tokenizer, LoadingOptions(report_samples=20), 8)
    assert len(asked.report) == 20 and len(asked.selection) == min(128, (n_rows - 20) // 4)
    # Of few to report only those are told that nobody asked for.
    said = [str(warning.message) for warning in recwarn if "So few decide nothing" in str(warning.message)]
    assert len(said) == (n_rows == 60)
    asked = load_task(tmp_path / "rows.txt", tokenizer, LoadingOptions(selection_samples=20), 8)
    assert len(asked.selection) == 20 and len(asked.report) == min(256, 2 * (n_rows - 20) // 5)


@pytest.mark.parametrize(("asked", "n_prompts", "sizes"), [
    ({}, 2, (1, 1)), ({}, 9, (3, 1)), ({}, 768, (256, 128)), ({}, 600, (200, 100)),
    ({"selection_samples": 10}, 62, (20, 10)), ({"selection_samples": 10}, 9, (1, 10)),
    ({"selection_samples": 10}, 63, (21, 10)), ({"selection_samples": 10}, 900, (256, 10)),
    ({"report_samples": 50}, 40, (50, 1)),
    ({"report_samples": 50, "selection_samples": 3}, 9, (50, 3)),
])  # fmt: skip
def test_what_is_asked_for_stays_and_the_rest_is_a_share(asked, n_prompts, sizes):
    assert fold_sizes(LoadingOptions(**asked), n_prompts) == sizes


def test_the_order_depends_on_the_seed_alone(home, tokenizer):
    task = load(home, tokenizer)
    order = task.order(3, 25, 4)
    assert order == task.order(3, 25, 4) and order[:7] == task.order(3, 7, 4)
    assert order != task.order(4, 25, 4)
    assert [len(items) for items in order] == [4] * 25
    first_epoch = [tuple(item.tokens[0]) for items in order[:10] for item in items]
    assert len(set(first_epoch)) == 40
    assert first_epoch != [tuple(item.tokens[0]) for items in order[10:20] for item in items]


def test_classes(home, tokenizer):
    task = load(home, tokenizer, label="first")
    assert list(task.classes) == sorted(task.classes) and len(task.classes) > 2
    batch = task.batch(task.train[:4])
    assert batch["labels"].tolist() == [item.answer for item in task.train[:4]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape


@pytest.mark.parametrize(
    "changes",
    [dict(options="options"), dict(options="listed", answer="letter", completion=" {letter}"),
     dict(options="listed", answer="position")],
)  # fmt: skip
def test_choices(home, tokenizer, changes):
    task = load(home, tokenizer, **changes)
    for item in task.report:
        assert len(item.choices) == 3 and item.tokens == item.choices[item.answer]
        texts = [tokenizer.decode([t for t in labels if t != IGNORED]) for _, labels in item.choices]
        prompt = tokenizer.decode([t for t, label in zip(*item.tokens, strict=True) if label == IGNORED])
        assert texts[item.answer].replace("</s>", "").split()[-1] == prompt.split()[0]


@pytest.mark.parametrize(("changes", "message"), [
    (dict(report_samples=0), "report_samples=0, expected a whole number of at least 1"),
    (dict(report_samples=112),
     "2 examples to train on, 6 to select by and 112 to report; expected 4 or more, 6 and 112. Lower --report-samp"),
    (dict(report_samples=1.5), "report_samples=1.5, expected a whole number"),
    (dict(selection_samples=0), "selection_samples=0, expected a whole number of at least 1"),
    (dict(train_samples=0, batch_size=1), "0 examples to train on, 6 to select by and 10 to report; expected 1"),
    (dict(train_samples=-2), "train_samples=-2, expected a whole number of at least 0"),
    (dict(train_samples=1.5), "train_samples=1.5, expected a whole number of at least 0"),
    (dict(max_length=1), "max_length=1, expected a whole number of at least 2"),
    (dict(max_length=9.5), "max_length=9.5, expected a whole number of at least 2"),
    (dict(report_samples=500), "0 examples to train on, 0 to select by and 120 to report"),
    (dict(batch_size=64), "expected 64 or more"),
    (dict(label="class"), "label='class' is not a column. Columns of "),
    (dict(label="passage"), "column 'passage' has another value in each of its 120 rows"),
    (dict(label="first", template="{passage} {first}"), "label='first' is a part of the text, which gives"),
    (dict(label="empty"), "column 'empty' has 0 different values"),
    (dict(label="first", completion=" {first}"), "no completion"),
    (dict(label="first", options="listed"), "Give one of them"),
    (dict(options="listed", template=None), "needs a template"),
    (dict(options="options", template="{passage} {answer}"), "gives the answer away"),
    (dict(options="options", completion=" {letter}"), "must name {answer}"),
    (dict(options="listed", answer="key"), "answer='key' is not a column. Columns of "),
    (dict(options="yes, "), "options='yes, ' is not a column, and not a list of options"),
    (dict(options="opts"), "options='opts' is not a column, and not a list of options"),
    (dict(options="listed", answer="text"), "120 left out whose answer is none of the options"),
    (dict(completion=" {empty}"), "120 left out with an empty field"),
    (dict(completion=" {letter}", max_length=5), "120 left out without a labelled token among the first 5"),
])  # fmt: skip
def test_bad_input(home, tokenizer, changes, message):
    assert message in refused("", load, home, tokenizer, **changes)


def test_a_row_with_an_option_that_is_cut_off_is_left_out(tmp_path, tokenizer):
    """A shortened option has fewer tokens to lose likelihood by, so it would win."""
    long = "the cat sat on a mat"
    rows = [{"question": "dog run", "options": ["the", long if i % 2 else "red"], "answer": "the"} for i in range(8)]
    rows += [{"question": f"{word} run", "options": ["the", "red"], "answer": "the"} for word in ("cat", "mat", "two")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = LoadingOptions(
        template="{question}", options="options", max_length=6, selection_samples=1, report_samples=1
    )
    task = load_task(tmp_path / "rows.jsonl", tokenizer, asked, 2)
    assert "4 left out with 6 or more tokens" in task.data
    assert all(len(choice[0]) == 4 for item in [*task.train, *task.selection, *task.report] for choice in item.choices)


@pytest.mark.parametrize(("value", "expected"), [
    (["red", " blue "], ["red", "blue"]),
    ("A. red\nB. blue\n\n", ["A. red", "B. blue"]),
    ({"text": ["red", "blue"], "label": ["A", "B"]}, ["red", "blue"]),
    (None, []), ({"label": ["A", "B"]}, []), ({"text": "red\nblue"}, ["red", "blue"]), ([1, " ", 2.5], ["1", "2.5"]),
])  # fmt: skip
def test_options(value, expected):
    assert split_options(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("blue", 1),
        ("BLUE ", 1),
        ("a", 0),
        ("C", 2),
        (2, 2),
        ("2", 2),
        ("D", None),
        (3, None),
        ("green", None),
        ("\u00b2", None),
        ("\u0662", 2),
        ("1.0", None),
        ("-1", None),
        ("", None),
        (None, None),
    ],
)
def test_the_right_one(value, expected):
    assert find_answer(value, ["red", "blue", "white"]) == expected


@pytest.mark.parametrize(("options", "found"), [(["y", "n"], [0, 1, 0, 1]), (["B", "A"], [None, None, 1, 0])])
def test_an_option_that_is_a_letter_is_found_by_its_text_first(options, found):
    assert [find_answer(value, options) for value in ("y", "n", "a", "b")] == found


@pytest.mark.parametrize(("answers", "spelled_out"), [
    (["the", "none of them", "red"], True), (["none of them", " the ", "red"], True),
    (["the", "none of them", "B"], False), (["A", "none of them", "B"], False),
])  # fmt: skip
def test_whether_the_right_options_are_spelled_out_is_told_by_rows_that_have_one(
    answers, spelled_out, tmp_path, tokenizer
):
    rows = [
        {"question": f"{word} run", "options": ["the", "red"], "answer": answers[i % 3]}
        for i, word in enumerate(WORDS[:12])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = LoadingOptions(template="{question}", options="options", selection_samples=1, report_samples=1)
    task = load_task(tmp_path / "rows.jsonl", tokenizer, asked, 2)
    assert task.spelled_out is spelled_out and "4 left out whose answer is none of the options" in task.data


def test_an_example_is_as_long_as_its_tokens_whatever_its_labels():
    assert item_length(Item(([5, 6, 7], [1]))) == 3 and item_length(Item(([5], [1, 2, 3]))) == 1


def test_the_seed_of_the_split_decides_which_examples_are_in_which_fold(home, tokenizer):
    one, again, other = (load(home, tokenizer, completion=" {letter}", data_seed=seed) for seed in (1, 1, 2))
    assert (one.train, one.selection, one.report) == (again.train, again.selection, again.report)
    folds = [{tuple(item.tokens[0]) for item in task.report} for task in (one, other)]
    assert len(folds[0]) == len(folds[1]) == 10 and folds[0] != folds[1]


@pytest.mark.parametrize(("row", "options", "read"), [
    ({"right": "no", "options": ["no", "yes"]}, "yes, no ,maybe", (["yes", "no", "maybe"], 1)),
    ({"right": "B", "kinds": "red\nblue"}, "kinds", (["red", "blue"], 1)),
    ({"right": "red", "kinds": ["red"]}, "kinds", None), ({"right": "green", "kinds": ["red", "blue"]}, "kinds", None),
    ({"right": 0}, "yes,no", (["yes", "no"], 0)),
])  # fmt: skip
def test_options_are_a_column_or_listed_by_commas(row, options, read):
    assert read_choices(row, options, "right") == read


def test_there_may_be_as_many_options_as_letters():
    options = [f"option {i}" for i in range(26)]
    assert [find_answer(letter, options) for letter in "aBzZ"] == [0, 1, 25, 25]
    assert find_answer("{", options) is None and find_answer("26", options) is None


def test_all_rows_may_have_the_options_that_are_listed_by_commas(home, tokenizer):
    task = load(home, tokenizer, options="A,B", answer="letter", normalize=True, name="mine")
    right = [item.answer for item in [*task.train, *task.selection, *task.report]]
    assert {*right} == {0, 1} and all(len(item.choices) == 2 for item in task.report)
    assert (task.label, task.normalize, task.padding, task.spelled_out) == ("mine", True, tokenizer.pad_token_id, True)
    assert ", options A,B, answer letter, " in task.data and task.data.endswith("whose answer is none of the options")


def test_rows_are_read_as_they_were_asked_for(home, tokenizer, monkeypatch):
    asked, real_rows, real_reader = [], tasks.read_rows, tasks.open_reader

    def read_rows(source, subset, split):
        asked.append((subset, split))
        return real_rows(source, None, "train")

    def open_reader(data, tokenizer, max_length, wanted, **options):
        asked.append((max_length, wanted.format, options))
        return real_reader(data, tokenizer, max_length, wanted, **options)

    monkeypatch.setattr(tasks, "read_rows", read_rows)
    monkeypatch.setattr(tasks, "open_reader", open_reader)
    settings = LoadingOptions(template="{passage}", label="first", subset="small", split="test", max_length=99,
                              selection_samples=2, report_samples=2)  # fmt: skip
    classes = [*"nmlkjihgfedcba", *"opqrstuvwxyz"]
    load_task(home / "rows.jsonl", tokenizer, settings, 2, classes)
    assert asked == [("small", "test"), (99, None, {"needs_labels": True, "known_classes": classes})]
