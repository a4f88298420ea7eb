"""Rows of every source and form become batches with the right tokens and labels, and bad data one clear line."""

import copy
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import normalizers, processors
from transformers import LlamaConfig, LlamaForSequenceClassification

from lora_init import LoraInitError, load_batches
from lora_init.loading.batches import (
    Batches,
    _Drawn,
    as_batches,
    check_tokenizer,
    collate,
    count_examples,
    group_by_length,
    load_other,
    pad_batch,
    padding_token,
)
from lora_init.loading.sources import read_rows
from tests.conftest import refused, tiny_bert, tiny_llama
from tests.loading.made import CHAT, bert_tokenizer, byte_tokenizer, texts
from tests.versions import OLD_DATASETS


def test_text_has_a_label_on_every_token(write, tokenizer):
    batches = load_batches(write([{"text": "abc"}, {"text": "a longer line"}]), tokenizer)
    assert sorted(texts(batches, tokenizer, "labels")) == ["a longer line<eos>", "abc<eos>"]
    assert batches[0]["input_ids"].shape == (2, 14)
    assert batches[0]["attention_mask"].sum(1).tolist() == [4, 14]


def test_prompt_and_completion_label_the_completion_across_the_seam(write):
    # "r:" + " y" is tokenised differently from its parts: here the merged token holds a part of both.
    tokenizer = byte_tokenizer(merges=[("r", ":"), ("Ġ", "y"), ("Ġ", "n")], eos_token="<eos>")
    rows = [{"prompt": "Answer: ", "completion": "yes"}, {"prompt": "Answer:", "completion": " no", "text": "unused"}]
    batches = load_batches(write(rows), tokenizer)
    assert sorted(texts(batches, tokenizer)) == ["Answer: no<eos>", "Answer: yes<eos>"]
    assert sorted(texts(batches, tokenizer, "labels")) == [" no<eos>", " yes<eos>"]


# What axolotl and Stanford's own code write, character by character.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)


@pytest.mark.parametrize(("row", "prompt"), [
    ({"instruction": "Add.", "input": "2+2", "output": "4"}, ALPACA),
    ({"instruction": "Add.", "input": "", "output": "4"}, ALPACA_ALONE),
    ({"instruction": "Add.", "output": "4"}, ALPACA_ALONE),
])  # fmt: skip
def test_a_row_of_alpacas_is_written_as_others_write_it(tokenizer, row, prompt):
    rows = [row, row | {"instruction": " "}, row | {"output": None}]
    with pytest.warns(UserWarning, match="of the first 3 rows 2 left out with an empty field"):
        batches = load_batches(rows, tokenizer)
    assert texts(batches, tokenizer) == [prompt + "4<eos>"] and texts(batches, tokenizer, "labels") == ["4<eos>"]


@pytest.mark.parametrize(("who", "role"), [
    ("human", "user"), ("user", "user"), ("gpt", "assistant"), ("chatgpt", "assistant"), ("bot", "assistant"),
    ("model", "assistant"), ("function_call", "assistant"), ("observation", "tool"), ("function_response", "tool"),
    ("system", "system"), ("developer", "developer"),
])  # fmt: skip
def test_who_speaks_in_sharegpt_has_a_role_of_chat_templates(who, role):
    tokenizer = byte_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    turns = [("user", "hi"), (who, "a word"), ("assistant", "well")]
    rows = [{"conversations": [{"from": one, "value": text} for one, text in turns]}]
    expected = "".join(f"<|im_start|>{one}\n{text}<|im_end|>\n" for one, text in [turns[0], (role, "a word"), turns[2]])
    assert texts(load_batches(rows, tokenizer), tokenizer) == [expected]


def test_messages_label_the_assistants_turns(write, tokenizer):
    tokenizer = byte_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"},
                {"role": "user", "content": "2+2?", "name": "bob"},
                {"role": "assistant", "content": "4"},
            ]
        },
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "user", "content": "never answered"}]},
    ]
    with pytest.warns(UserWarning, match="of the first 4 rows 2 left out with an empty field, 1 left out without a l"):
        batches = load_batches(write(rows), tokenizer)
    assert texts(batches, tokenizer, "labels") == ["hello<|im_end|>\n4<|im_end|>\n"]
    expected = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert texts(batches, tokenizer) == [expected]
    assert "2 left out with an empty field" in batches.description
    assert "1 left out without a labelled token" in batches.description
    every = load_batches(write(rows), tokenizer, needs_labels=False)  # where all tokens count, questions do, too
    assert sorted(texts(every, tokenizer)) == [expected, "<|im_start|>user\nnever answered<|im_end|>\n"]


def test_chat_template_alone_decides_on_special_tokens(write):
    tokenizer = bert_tokenizer()
    tokenizer.chat_template = "[CLS] {% for m in messages %}{{ m['content'] + ' [SEP] ' }}{% endfor %}"
    path = write([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    assert texts(load_batches(path, tokenizer), tokenizer) == ["[CLS] a [SEP] b [SEP]"]  # each once


# As Qwen3's: thoughts in the last answer only, and a prompt of the system that nobody wrote.
THINKING = (
    "<|im_start|>system\nYou help.<|im_end|>\n{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("said", "labelled"), [
    (["hi", "hello", "hello", "XY"], "hello<|im_end|>\n<think>\n\n</think>\n\nXY<|im_end|>\n"),
    (["hi", " ", "?", "XY"], "<think>\n\n</think>\n\nXY<|im_end|>\n"),
    (["hi", "hello", "?", " 4 ", "?", "XY"], "hello<|im_end|>\n4<|im_end|>\n<think>\n\n</think>\n\nXY<|im_end|>\n"),
    (["hi", "hello", "and?"], "hello<|im_end|>\n"),
    (["hi", "XL", "?", "XY"], "XL<|im_end|>\n<think>\n\n</think>\n\nXY<|im_end|>\n"),
    (["hi", "1 X", "?", "4"], "1 X<|im_end|>\n<think>\n\n</think>\n\n4<|im_end|>\n"),
    ([None, "I begin", "hi", "XYZ"], "I begin<|im_end|>\n<think>\n\n</think>\n\nXYZ<|im_end|>\n"),
    ([None, "user"], "user<|im_end|>\n"),
])  # fmt: skip
def test_answers_are_labelled_whatever_the_template_makes_of_earlier_ones(write, said, labelled):
    tokenizer = byte_tokenizer(chat_template=THINKING, eos_token="<|im_end|>")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said) if text]
    batches = load_batches(write([{"messages": turns}]), tokenizer)
    assert texts(batches, tokenizer, "labels") == [labelled]
    assert texts(batches, tokenizer) == [tokenizer.apply_chat_template(turns, tokenize=False)]


def test_prompt_and_completion_may_be_messages(write):
    tokenizer = byte_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    prompt = [{"role": "assistant", "content": "ask me"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "hello"}]}]
    assert texts(load_batches(write(rows), tokenizer), tokenizer, "labels") == ["hello<|im_end|>\n"]


def test_template_fills_columns_and_its_completion_gets_the_labels(write, tokenizer):
    path = write([{"passage": "Ice floats.", "question": "does ice float", "label": True, "a.b": "dotted"}])
    template = "{passage}\n{{Question}}: {question}?"
    plain = load_batches(path, tokenizer, template=template)
    assert texts(plain, tokenizer) == texts(plain, tokenizer, "labels")
    assert texts(plain, tokenizer) == ["Ice floats.\n{Question}: does ice float?<eos>"]
    answered = load_batches(path, tokenizer, template=template, completion=" {label}")
    assert texts(answered, tokenizer) == ["Ice floats.\n{Question}: does ice float? True<eos>"]
    assert texts(answered, tokenizer, "labels") == [" True<eos>"]
    assert texts(load_batches(path, tokenizer, template="{a.b}"), tokenizer) == ["dotted<eos>"]


def test_rows_with_a_missing_field_are_left_out_and_counted(write, tokenizer):
    rows = [{"q": "full", "label": False}, {"q": "no label", "label": None}, {"q": " ", "label": True}]
    batches = load_batches(write(rows), tokenizer, template="{q}?", completion=" {label}", needs_labels=False)
    assert texts(batches, tokenizer) == ["full? False<eos>"]
    assert batches.description.endswith("2 left out with an empty field")


@pytest.mark.parametrize(("values", "known", "classes"), [
    (["b", "a", "b", "c"], (), ("a", "b", "c")),
    ([10, 9, 2, 9], (), ("2", "9", "10")),  # by number, so that 0, 1, 2, ... are what they are
    (["no", "yes", "no", "no"], ("yes", "no", "maybe"), ("yes", "no", "maybe")),  # as the checkpoint's head has it
    (["no", "yes", "no", "no"], ("LABEL_0", "LABEL_1"), ("no", "yes")),
    ([10.5, 2.5, -1.0, 2.5], (), ("-1", "2.5", "10.5")),
])  # fmt: skip
def test_classes_are_labels_of_whole_texts(write, tokenizer, values, known, classes):
    rows = [{"q": str(value).removesuffix(".0") * 3, "kind": value} for value in [*values, None]]
    batches = load_batches(write(rows), tokenizer, template="{q}", label="kind", known_classes=known, batch_size=3)
    assert batches.classes == classes and batches.settings["classes"] == [*classes]
    for batch in batches:
        said = [
            tokenizer.decode(ids[mask == 1])
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert batch["labels"].dtype == torch.int64
        assert said == [classes[label] * 3 for label in batch["labels"].tolist()]
    named = Counter(str(value).removesuffix(".0") for value in values)
    counted = ", ".join(f"{name} {named[name]}" for name in classes)
    assert f"label kind, {len(classes)} classes ({counted}), 1 left out without a label" in batches.description


ROWS_WITH_GAPS = [("aa", 10), ("bb", 2), ("cc", float("nan")), ("dd", None), ("ee", 10), (float("nan"), 2)]


@pytest.mark.parametrize(
    "form",
    ["records", *(() if OLD_DATASETS else ["jsonl"]), "json", "csv", "parquet", "frame", "records of a frame", "set"],
)
def test_a_row_without_a_label_or_text_is_left_out_in_every_form(write, tokenizer, tmp_path, form):
    rows = [{"q": text, "kind": kind} for text, kind in ROWS_WITH_GAPS]
    frame = pd.DataFrame(rows)
    sources = {
        "records": lambda: rows,
        "jsonl": lambda: write(rows),
        "json": lambda: (tmp_path / "data.json").write_text(json.dumps(rows)) and tmp_path / "data.json",
        "csv": lambda: frame.to_csv(tmp_path / "data.csv", index=False) or tmp_path / "data.csv",
        "parquet": lambda: frame.to_parquet(tmp_path / "data.parquet") or tmp_path / "data.parquet",
        "frame": lambda: frame,
        "set": lambda: Dataset.from_dict({"q": ["aa", "bb", "cc", "dd", "ee", None], "kind": [*frame["kind"]]}),  # NaN
        "records of a frame": lambda: frame.convert_dtypes().to_dict("records"),  # pandas.NA
    }
    with pytest.warns(UserWarning, match="2 left out without a label"):
        batches = load_batches(sources[form](), tokenizer, template="{q}", label="kind")
    assert batches.classes == ("2", "10")
    said = zip(map(tokenizer.decode, batches[0]["input_ids"]), batches[0]["labels"].tolist(), strict=True)
    assert sorted(said) == [("aa", 1), ("bb", 0), ("ee", 1)]
    assert "2 left out without a label" in batches.description
    assert "1 left out with an empty field" in batches.description


@pytest.mark.parametrize("bos", [False, True])
def test_a_classifier_pools_the_token_that_it_pools_in_training(bos):
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")
    if bos:  # a tokenizer that ends texts by itself is taken at its word
        special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
        ends = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = ends
    rows = [{"q": "some words", "kind": 0}, {"q": "and others, more of them", "kind": 1}, {"q": "few", "kind": 1}]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()

    def gradient(batch):
        model.zero_grad()
        model(**batch).loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    (ours,) = load_batches(rows, tokenizer, template="{q}", label="kind")
    theirs = tokenizer(sorted((row["q"] for row in rows), key=len), padding=True, return_tensors="pt")
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    # Exact in principle; sums of float32 may differ in the last bits.
    torch.testing.assert_close(gradient(ours), gradient({**theirs, "labels": torch.tensor([1, 0, 1])}))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(template="{passage}", label="kind"), "label='kind' is not a column. Columns of"),
    (dict(template="{passage}", label="label"), "column 'label' has 1 different values, and a classification needs"),
    (dict(template="{passage}", label="label", completion="{label}"), "a classification has no completion"),
    (dict(template="{passage.__class__}"), "has no column 'passage.__class__'. Its columns: passage, label."),
    (dict(template="{passage[0]}"), "has no column 'passage[0]'"),
    (dict(template="{passage:{label.__class__}}"), "__class__}}': only column names go in braces"),
    (dict(template="{passage!r}"), "template='{passage!r}': only column names go in braces"),
    (dict(template="{pasage}"), "has no column 'pasage'. Its columns: passage, label."),
    (dict(template="{}"), "has no column ''"),
    (dict(template="no column"), "template='no column' names no column. Columns of"),
    (dict(template="{passage"), "template='{passage': expected '}' before end of string. Write {{ for a brace"),
    (dict(template="{passage}", completion="{answer}"), "completion='{answer}': "),
    (dict(format="chat"), "format='chat' is unknown. Choose from messages, sharegpt, prompt-completion,"),
    (dict(format="text", template="{passage}"), "format='text' and a template say two things. Give one"),
    (dict(format="alpaca"), "has the columns passage, label. Expected instruction and output; name others, such"),
    (dict(completion="{label}"), "completion='{label}' needs a template for the prompt"),
    (dict(template="{passage}", seq2seq="no"), "seq2seq='no', expected True or False"),
    (dict(template="{passage}", needs_labels=1), "needs_labels=1, expected True or False"),
    (dict(template="{passage}", known_classes=["a"]), "known_classes= says in which order label= counts. Give both."),
    (dict(template="{passage}", completion=3), "completion=3: expected a text with columns in braces"),
    (dict(), "has the columns passage, label. Expected messages, or conversations, or prompt and completion, or"),
    (dict(), "name others, such as template='{passage}' with completion=' {label}'."),
    (dict(label="label"), "name others, such as template='{passage}'."),
    (dict(template="{passage}", batch_size=0), "batch_size=0, expected a whole number of at least 1"),
    (dict(template="{passage}", batch_size="8"), "batch_size='8', expected a whole number of at least 1"),
    (dict(template="{passage}", batch_size=2.5), "batch_size=2.5, expected a whole number of at least 1"),
    (dict(template="{passage}", max_length=9.5), "max_length=9.5, expected a whole number of at least 2"),
    (dict(template="{passage}", samples=2.5), "samples=2.5, expected a whole number of at least 1"),
    (dict(template=3), "template=3: expected a text with columns in braces"),
    (dict(template="{passage}", max_length=1), "max_length=1, expected a whole number of at least 2"),
    (dict(template="{passage}", samples=0), "samples=0, expected a whole number of at least 1"),
    (dict(template="{passage}", seed=-1), "seed=-1, expected a whole number of at least 0"),
    (dict(template="{passage}", offset=-1), "offset=-1, expected a whole number of at least 0"),
    (dict(template="{passage}", offset=1), "no usable example among 1 rows read as template '{passage}' after the"),
    (dict(template="{passage}", seq2seq=True), "an encoder-decoder model needs a prompt"),
    (dict(template="{passage}", completion="{label}", max_length=4), "1 left out without a labelled token among"),
])  # fmt: skip
def test_bad_arguments_say_what_to_do(write, tokenizer, arguments, message):
    path = write([{"passage": "Ice floats.", "label": True}])
    with pytest.raises(LoraInitError, match=re.escape(message)) as caught:
        load_batches(path, tokenizer, **arguments)
    assert "\n" not in str(caught.value)
    assert str(path.parent.parent) not in str(caught.value)


@pytest.mark.parametrize(("values", "message"), [
    ([["a"], ["b"]] * 12, "data.jsonl: column 'kind' holds lists, and a row has one class. Name another."),
    ([{"a": 1}, {"a": 2}] * 12, "column 'kind' holds lists"),
    (["2024-01-03", "2024-02-01", "2024-01-02"] * 8, "column 'kind' holds dates, such as 2024-01-02. Name the class."),
    ([0.25, 0.75] * 12, "column 'kind' has 2 different numbers with fractions, from 0.25 to 0.75."),
    ([i / 2 for i in range(24)] * 2, "column 'kind' has 24 different numbers with fractions, from 0 to 11.5."),
    (list(range(24)), "column 'kind' has another value in each of its 24 rows"),
    (["yes", None] * 12, "column 'kind' has 1 different values"),
])  # fmt: skip
def test_a_column_of_what_is_no_class_is_refused(write, tokenizer, values, message):
    path = write([{"passage": f"Ice {number}.", "kind": value} for number, value in enumerate(values)])
    refused(re.escape(message), load_batches, path, tokenizer, template="{passage}", label="kind")


@pytest.mark.parametrize(("value", "kind"), [(["a", "b"], "a list"), ({"a": "b"}, "a mapping")])
def test_a_list_is_not_written_as_python_writes_it(write, tokenizer, value, kind):
    path = write([{"passage": value, "label": "x"}] * 3)
    message = f"column 'passage' holds {kind}, and text is needed. Make it text first, or name another."
    refused(re.escape(message), load_batches, path, tokenizer, template="{passage}", completion="{label}")


def test_bad_messages_name_the_row(write, tokenizer):
    good = {"role": "user", "content": "hi"}
    path = write([{"messages": [good]}])
    refused("this tokenizer has no chat template", load_batches, path, tokenizer)
    chatty = byte_tokenizer(chat_template=CHAT)
    path = write([{"messages": [{"role": "tool", "content": "x"}]}])
    refused(r"data.jsonl, line 1: the chat template refuses .* no tools here", load_batches, path, chatty)
    refused("line 1: messages must be a list of", load_batches, write([{"messages": "hi"}]), chatty)


def test_batches_have_little_padding_and_every_stretch_is_mixed(write, tokenizer):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (256,), generator=generator).tolist()
    batches = load_batches(write([{"text": "x" * n} for n in lengths]), tokenizer, batch_size=4)
    assert sum(len(batch["input_ids"]) for batch in batches) == 256
    mask = [batch["attention_mask"] for batch in batches]
    kept = sum(int(m.sum()) for m in mask) / sum(m.numel() for m in mask)
    assert kept > 0.85  # 0.63 is expected of four at random: mean over the maximum of four uniform lengths is 0.5 / 0.8
    # 32 uniform lengths: their mean has standard deviation 58 / sqrt(32) = 10, so 100 +- 40 is four of them.
    for start in range(0, 64, 8):
        tokens = torch.cat([m.sum(1) for m in mask[start : start + 8]]).double()
        assert 60 < tokens.mean() < 140
        assert tokens.min() < 50 and tokens.max() > 150
    widths = [m.shape[1] for m in mask]
    assert widths != sorted(widths) and widths[:8] != sorted(widths[:8])


def test_too_long_an_answer_is_left_out_and_a_longer_text_is_cut(write, tokenizer):
    rows = [{"prompt": "p" * n, "completion": "yes"} for n in (4, 9, 20)]
    with pytest.warns(UserWarning, match="of the first 3 rows 1 left out without a labelled token among the first 10"):
        batches = load_batches(write(rows), tokenizer, max_length=10)
    assert sorted(texts(batches, tokenizer)) == ["p" * 9 + "y", "ppppyes<eos>"]
    assert "2 of 3 examples" in batches.description
    assert batches.description.endswith("1 left out without a labelled token among the first 10")
    batches = load_batches(write([{"text": "abcdefghijklmn"}], "long.jsonl"), tokenizer, max_length=10)
    assert texts(batches, tokenizer) == ["abcdefghij"]


def test_tokenizer_limit_counts_and_nothing_on_it_changes(write):
    tokenizer = byte_tokenizer(model_max_length=6)  # no padding token, no end of sequence, left padding and truncation
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    assert tokenizer.pad_token is None and tokenizer.eos_token is None
    batches = load_batches(write([{"text": "abcdefgh"}, {"text": "ij"}]), tokenizer)
    assert sorted(texts(batches, tokenizer)) == ["abcdef", "ij"]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6]
    assert "at most 6 tokens" in batches.description
    assert tokenizer.pad_token is None and tokenizer.padding_side == tokenizer.truncation_side == "left"


def test_a_text_of_which_the_tokenizer_makes_no_token_is_no_empty_field(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    batches = load_batches([{"text": "the cat"}, {"text": "\u200b"}, {"text": ""}], tokenizer)
    assert "1 left out of which the tokenizer makes no token" in batches.description
    assert "1 left out with an empty field" in batches.description


def test_encoder_keeps_its_separator_when_cut(write):
    tokenizer = bert_tokenizer()
    path = write([{"text": "a b c d e f g"}, {"text": "a b"}])
    batches = load_batches(path, tokenizer, max_length=5)
    assert sorted(texts(batches, tokenizer)) == ["[CLS] a b [SEP]", "[CLS] a b c [SEP]"]
    path = write([{"prompt": "a b", "completion": " c d e f"}, {"prompt": "a b c d e", "completion": " f"}], "pc.jsonl")
    with pytest.warns(UserWarning, match="without a labelled token"):
        batches = load_batches(path, tokenizer, max_length=6)
    assert texts(batches, tokenizer) == ["[CLS] a b c d [SEP]"]
    assert texts(batches, tokenizer, "labels") == ["c d"]
    assert "1 left out without a labelled token" in batches.description


def test_seq2seq_puts_the_completion_into_labels_of_their_own(write):
    tokenizer = bert_tokenizer()
    rows = [{"prompt": "a b c d", "completion": "e"}, {"prompt": "a", "completion": "f g h"}]
    (batch,) = load_batches(write(rows), tokenizer, seq2seq=True)
    assert [tokenizer.decode(row[row != 0]) for row in batch["input_ids"]] == ["[CLS] a [SEP]", "[CLS] a b c d [SEP]"]
    assert [tokenizer.decode(row[row != -100]) for row in batch["labels"]] == ["[CLS] f g h [SEP]", "[CLS] e [SEP]"]
    assert batch["labels"].shape == (2, 5) and batch["input_ids"].shape == (2, 6)


def test_seq2seq_tokenises_the_completion_as_the_target_language(write):
    tokenizer = bert_tokenizer()  # with modes, as those of mBART and NLLB, whose first token is the language
    modes = [f"{language} $A [SEP]" for language in ("i", "j")]
    source, target = (
        processors.TemplateProcessing(single=mode, special_tokens=[(mode[0], ord(mode[0]) - 93), ("[SEP]", 2)])
        for mode in modes
    )
    core = tokenizer.backend_tokenizer
    tokenizer._switch_to_target_mode = lambda: setattr(core, "post_processor", target)
    tokenizer._switch_to_input_mode = lambda: setattr(core, "post_processor", source)
    tokenizer._switch_to_input_mode()
    (batch,) = load_batches(write([{"prompt": "a b", "completion": "c d"}]), tokenizer, seq2seq=True)
    assert tokenizer.decode(batch["input_ids"][0]) == "i a b [SEP]"
    assert tokenizer.decode(batch["labels"][0]) == "j c d [SEP]"


def chat(*turns):
    return {"messages": [{"role": role, "content": words} for role, words in turns]}


ANSWERED = chat(("user", "a"), ("assistant", "b"))
CLASSES = {"template": "{q}", "label": "k"}
# A template that writes what users and assistants say, and nothing of anybody else.
TWO_ROLES = (
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ m['role'] }}: {{ m['content'] }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def numbered(n):
    return [{"text": f"text {i}"} for i in range(n)]


def classes(*names):
    return [{"q": f"text {i}", "k": name} for i, name in enumerate(names)]


@pytest.mark.parametrize(("rows", "options", "words"), [
    (classes("a", "a", "b", "c", "a"), CLASSES, "column 'k': 'b', 'c': one row: too few to learn from"),
    (classes("dental", "dental ", "dental", "Dental", "eye", "dental ", "eye", "Dental"), CLASSES,
     "'dental', 'dental ', 'Dental': the same but for spaces or case"),
    (classes("a", "nan", "nan", "a", "None", "None"), CLASSES, "'nan', 'None': what a missing value is written as"),
    ([*[ANSWERED] * 3, *[{"prompt": "a", "completion": "b"}] * 3, *numbered(3)], {},
     "of the first 9 rows 6 left out with an empty field; read as messages."),
    (numbered(1) * 200, {}, "199 duplicates among 200 examples"),
    ([chat(("human", "a"), ("assistant", "b"))], {}, "the chat template does not know the role 'human'. Rename it"),
    ([chat(("system", "be brief"), ("user", "a"), ("assistant", "b"))], {}, "leaves out the turns of the role 'sys"),
    ([*[ANSWERED] * 2, chat(("user", "a"), ("assistant", " "))], {}, "of the first 3 rows 1 left out with an empty"),
    ([{"text": "a long text"}] * 2, {"max_length": 2}, "2 of 2 examples end at max_length=2 tokens. Raise it"),
])  # fmt: skip
@pytest.mark.parametrize("needs_labels", [True, False])
def test_what_is_odd_about_rows_is_said(tokenizer, rows, options, words, needs_labels):
    tokenizer = byte_tokenizer(eos_token="<eos>", chat_template=TWO_ROLES)  # the other tests share theirs
    with pytest.warns(UserWarning, match=re.escape(words)):
        load_batches(rows, tokenizer, needs_labels=needs_labels, **options)


@pytest.mark.parametrize(("rows", "options"), [
    (classes("a", "b", "a", "b", "yes and no", "yes and no"), CLASSES),
    (numbered(12), {"max_length": 8}),
    ([chat(("system", " be brief "), ("user", f"a{i}"), ("assistant", ""), ("tool", "1"), ("assistant", f"b{i}"))
      for i in range(3)], {}),
])  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_what_is_as_it_should_be_is_not_warned_of(tokenizer, rows, options):
    roles = "['user', 'assistant', 'system', 'tool']"
    tokenizer = byte_tokenizer(eos_token="<eos>", chat_template=TWO_ROLES.replace("['user', 'assistant']", roles))
    assert load_batches(rows, tokenizer, **options)


def test_rows_that_are_left_out_are_no_examples_of_the_training():
    rows = [{"text": "a b c d e f"}] * 4 + [{"text": ""}] * 6
    assert load_batches(rows, byte_tokenizer()).settings["rows"] == 4


@pytest.mark.filterwarnings("ignore:data in memory")
def test_rows_that_were_not_read_are_left_out_as_often_as_those_that_were():
    rows = [{"text": "a b c d e f" if i % 2 else ""} for i in range(1000)]
    counted = [load_batches(rows, byte_tokenizer(), samples=40, seed=seed).settings["rows"] for seed in range(5)]
    assert all(350 < n < 650 for n in counted), counted  # of 40 usable ones; all others would be 960


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_chats_of_which_nobody_learns_are_refused_also_where_every_token_counts(column):
    tokenizer = byte_tokenizer(chat_template=CHAT)
    rows = [{column: [{"role": "user", "content": f"hi {i}"}]} for i in range(3)]
    said = r"^data in memory: no token of its 3 examples has a label.*begins before max_length=99\.$"
    refused(said, load_batches, rows, tokenizer, needs_labels=False, max_length=99)
    rows[1][column].append({"role": "assistant", "content": "a"})
    assert load_batches(rows, tokenizer, needs_labels=False).n == 3


def test_prompts_without_an_answer_within_the_limit_may_be_read_where_every_token_counts(tokenizer):
    rows = [{"prompt": f"a long prompt {i}", "completion": "a"} for i in range(3)]
    assert load_batches(rows, tokenizer, needs_labels=False, max_length=9).n == 3


def test_a_description_says_what_was_passed_over(tokenizer):
    rows = [{"text": f"the cat {i}"} for i in range(9)]
    assert ", after the first 4, seed 3," in load_batches(rows, tokenizer, offset=4, samples=2, seed=3).description
    assert "after the first" not in load_batches(rows, tokenizer, samples=2).description


def test_settings_have_all_that_decides_which_batches_these_are(tokenizer):
    rows = [{"q": f"text {i}", "k": "ab"[i % 2]} for i in range(9)]
    how = {"template": "{q}", "completion": " {k}", "max_length": 20, "samples": 4, "offset": 2, "batch_size": 3}
    given = {name: np.int64(value) if isinstance(value, int) else value for name, value in how.items()}
    digest = read_rows(rows).digest
    expected = how | {"seed of the sample": 5, "rows": 9, "digest of the rows": digest}
    found = load_batches(rows, tokenizer, seed=np.int64(5), **given)
    assert found.settings == expected and json.dumps(found.settings) and (found.n, found.classes) == (4, ())
    assert [type(value) for value in found.settings.values()] == [type(value) for value in expected.values()]
    of_all = load_batches(rows, tokenizer, template="{q}", label="k", samples=None)
    assert of_all.settings == {
        "template": "{q}", "completion": None, "max_length": 512, "samples": None, "offset": 0, "batch_size": 8,
        "seed of the sample": 0, "rows": 9, "digest of the rows": digest, "classes": ["a", "b"],
    }  # fmt: skip
    stream = load_batches(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, template="{q}").settings
    assert (stream["rows"], stream["digest of the rows"]) == (9, None)


@pytest.mark.parametrize(("rows", "how", "words"), [
    (numbered(9), {}, "9 of 9 examples, seed 0, at most 512 tokens, text"),
    (numbered(9), {"offset": 2, "samples": 4, "seed": 3, "max_length": 7},
     "4 of 9 examples, after the first 2, seed 3, at most 7 tokens, which 4 reach, text"),
    ([*numbered(9), {"text": "text 1"}], {}, "10 of 10 examples, seed 0, at most 512 tokens, text, 1 duplicate"),
    ([*numbered(9), *numbered(2), {"text": " "}], {},
     "11 of 12 examples, seed 0, at most 512 tokens, text, 1 left out with an empty field, 2 duplicates"),
    ([{"q": "x", "k": "a"}, {"q": "y", "k": "b"}] * 5, {"template": "{q}", "label": "k"},
     "10 of 10 examples, seed 0, at most 512 tokens, template '{q}', label k, 2 classes (a 5, b 5), 8 duplicates"),
    ([{"q": "x", "a": "1"}], {"template": "{q}", "completion": "{a}", "max_length": 4},
     "1 of 1 examples, seed 0, at most 4 tokens, template '{q}' and completion '{a}'"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_description_says_all_that_was_drawn_and_left_out(rows, how, words, tokenizer):
    assert load_batches(rows, tokenizer, **how).description == f"data in memory: {words}"


def test_an_error_about_no_example_says_what_was_passed_over_and_left_out(tokenizer):
    rows = [*numbered(2), {"text": " "}]
    said = (
        "^data in memory: no usable example among 3 rows read as text after the first 2 .1 left out with an empty field"
    )
    refused(rf"{said}\)\. Check the columns and max_length=\.$", load_batches, rows, tokenizer, offset=2)


def short(n, length, repeated=0):
    """Rows of some tokens, of which the first is repeated so often."""
    rows = [{"text": f"{i:0{length - 1}d}"} for i in range(n - repeated)]
    return rows + rows[:1] * repeated


@pytest.mark.parametrize(("rows", "how", "said"), [
    ([*numbered(9), {"text": ""}], {}, []),  # a tenth
    ([*numbered(8), {"text": ""}], {}, ["of the first 9 rows 1 left out with an empty field; read as text."]),
    ([{"prompt": "p", "completion": f"{i}" * (9 if i else 20)} for i in range(10)], {"max_length": 12}, []),
    ([{"prompt": "p", "completion": f"{i}" * (9 if i else 20)} for i in range(9)], {"max_length": 12},
     ["1 of 9 answers are cut off at 12 tokens. Raise max_length."]),
    ([{"prompt": "p", "completion": f"{i}" * 20} for i in range(9)], {"max_length": 12, "needs_labels": False}, []),
    ([{"prompt": "p", "completion": f"{i}" * 10} for i in range(9)], {"max_length": 12}, []),  # they end there
    (short(4, 7), {"max_length": 7}, ["4 of 4 examples end at max_length=7 tokens. Raise it."]),
    (short(4, 8), {"max_length": 8}, []),
    ([*short(2, 7), {"text": "a"}, {"text": "b"}], {"max_length": 7}, []),  # half of them
    (short(8, 9, repeated=4), {}, []), (short(8, 9, repeated=5), {}, ["5 duplicates among 8 examples."]),
])  # fmt: skip
def test_what_is_warned_of_begins_at_its_share(rows, how, said, tokenizer, recwarn):
    load_batches(rows, tokenizer, **how)
    assert [str(one.message) for one in recwarn] == [f"data in memory: {line}" for line in said]


def test_tokens_that_run_on_as_labels_are_no_duplicate():
    for other, n in ((([1], [2, 3]), 0), (([1, 2], [3]), 1)):
        assert _Drawn([([1, 2], [3]), other], 0, Counter(), 8).n_duplicates == n


def test_what_was_drawn_is_counted():
    examples = [([1, 2, 3], [-100, 2, 3]), ([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [-100, 2, -100]), ([1, 2], [-100, 2])]
    drawn = _Drawn([*examples, examples[0]], 2, Counter({"as a": 3, "as b": 1}), 3)
    assert (drawn.n_read, drawn.n_full, drawn.n_duplicates) == (11, 4, 1)
    assert drawn.skipped == "3 left out as a, 1 left out as b"
    assert (drawn.count_cut(None), drawn.count_cut(3)) == (2, 0)  # two answers end in 3


@pytest.mark.parametrize(("n", "size"), [(0, 4), (3, 4), (32, 4), (75, 4), (9, 1)])
def test_a_pool_is_cut_by_length_and_its_batches_come_in_an_order_that_the_seed_draws(n, size):
    lengths = [random.Random(n).randrange(99) for _ in range(n)]
    groups, rng, expected = [*group_by_length(lengths, size, 7, lambda one: one)], random.Random(7), []
    for start in range(0, n, 8 * size):
        pool = sorted(lengths[start : start + 8 * size])
        cut = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(cut)
        expected += cut
    assert groups == expected


@pytest.mark.parametrize(
    ("pad", "eos", "token"), [(0, 5, 0), (None, 5, 5), (None, 0, 0), (3, None, 3), (None, None, 0)]
)
def test_padding_is_what_the_tokenizer_pads_with_or_ends_by(pad, eos, token):
    assert padding_token(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == token
    assert padding_token(SimpleNamespace(pad_token_id=None)) == 0


def test_a_name_is_no_tokenizer():
    check_tokenizer(lambda text: [])
    refused("^tokenizer='llama': expected the model's, from", load_batches, numbered(2), "llama")
    refused(
        r"^tokenizer='llama': expected the model's, from AutoTokenizer.from_pretrained\(\)\.$", check_tokenizer, "llama"
    )


def as_lists(batch):
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_examples_of_a_batch_are_padded_on_the_right():
    examples = [([5, 6, 7], [-100, 6, 7]), ([8], [8])]
    tokens, mask = [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 0, 0]]
    assert as_lists(pad_batch(examples, 9)) == {
        "input_ids": tokens, "attention_mask": mask, "labels": [[-100, 6, 7], [8, -100, -100]],
    }  # fmt: skip
    of_classes = pad_batch([([5, 6, 7], [2]), ([8], [0])], 9, of_classes=True)
    assert as_lists(of_classes) == {"input_ids": tokens, "attention_mask": mask, "labels": [2, 0]}
    assert count_examples([of_classes, of_classes]) == Batches([of_classes]).n * 2 == 4


def test_rows_of_any_columns_are_collated_by_what_they_hold():
    rows = [
        {"input_ids": [1, 2], "other": [3, 4], "label": 1, "x": [0.5, 1.5]},
        {"input_ids": [5], "other": [6], "label": 0, "x": [2.5, 3.5]},
    ]
    found = collate(9, rows)
    assert found.pop("x").tolist() == [[0.5, 1.5], [2.5, 3.5]]
    assert as_lists(found) == {
        "input_ids": [[1, 2], [5, 9]], "other": [[3, 4], [6, 0]], "labels": [1, 0], "attention_mask": [[1, 1], [1, 0]],
    }  # fmt: skip
    ends = collate(2, [{"input_ids": [1, 2]}, {"input_ids": [5]}])  # the end of a turn may be what pads
    assert as_lists(ends) == {"input_ids": [[1, 2], [5, 2]], "attention_mask": [[1, 1], [1, 0]]}
    masked = collate(9, [{"input_ids": [1, 2], "attention_mask": [0, 1]}, {"input_ids": [5], "attention_mask": [1]}])
    assert as_lists(masked) == {"input_ids": [[1, 2], [5, 9]], "attention_mask": [[0, 1], [1, 0]]}
    for name in ("label", "labels"):  # classes of tokens
        assert as_lists(collate(9, [{name: [1]}, {name: [2, 3]}])) == {"labels": [[1, -100], [2, 3]]}
    for odd in ([[0.5], [0.5, 1.5]], ["a", "b"], [None, None], [[[1, 2]], [[1, 2], [3, 4]]], [1, [1]]):
        said = "^column 'x' of the data set: .*[^.]. Expected numbers in each row, of one shape unless they are tokens"
        refused(said, collate, 0, [{"x": value} for value in odd])


TOKENIZED = [{"input_ids": [i] * i, "text": "x", "labels": [i] * i} for i in range(1, 9)]


@pytest.mark.parametrize(("model", "columns", "pad"), [
    (lambda: tiny_llama(pad_token_id=9), ["input_ids", "labels"], 9),
    (lambda: tiny_llama(pad_token_id=None), ["input_ids", "labels"], 0),
    (lambda: tiny_bert(None), ["input_ids", "labels"], 0),  # whose labels are for a loss of the caller's
    (type("Reader", (torch.nn.Module,), {"forward": lambda self, text, input_ids: None}), None, 0),
])  # fmt: skip
def test_a_tokenized_set_is_read_in_the_columns_that_a_model_takes_and_padded_as_it_says(model, columns, pad):
    rows = Dataset.from_list(TOKENIZED).remove_columns([] if columns else ["text"])
    loader = as_batches(rows, model(), 5)
    (batch,) = loader
    assert [*batch] == ["input_ids", "labels", "attention_mask"] and batch["input_ids"].shape == (8, 8)
    assert {*batch["input_ids"][batch["attention_mask"] == 0].tolist()} == {pad}
    assert {*batch["labels"][batch["attention_mask"] == 0].tolist()} == {-100}
    assert loader.settings == {"batch_size": 8, "seed of the sample": 5}


def test_a_tokenized_stream_that_does_not_know_its_columns_is_drawn_by_the_seed():
    stream = IterableDataset.from_generator(lambda: iter(TOKENIZED * 5))
    assert stream.column_names is None
    orders = [[row for b in as_batches(stream, tiny_llama(), seed) for row in b["labels"].max(1)[0].tolist()]
              for seed in (0, 0, 1)]  # fmt: skip
    assert orders[0] == orders[1] != orders[2] and orders[0] != [*range(1, 9)] * 5
    assert sorted(orders[0]) == sorted([*range(1, 9)] * 5)
    empty = IterableDataset.from_generator(lambda: iter([]))
    refused("^the data set has the columns , and LlamaForCausalLM takes none", as_batches, empty, tiny_llama(), 0)


def test_what_is_no_tokenized_set_is_given_back_as_it_is():
    table = SimpleNamespace(select_columns=lambda names: pytest.fail("its columns were selected"))
    for batches in ([{"input_ids": torch.ones(1, 2)}], table, iter([]), None):
        assert as_batches(batches, None, 0) is batches


@pytest.mark.parametrize(("how", "option", "said"), [
    ({}, "retain_template", r"or instruction and output, or text\. Name one by retain_template=\.$"),
    ({}, "", r"or instruction and output, or text\. Rename one of them\.$"),
    ({"template": "{x}"}, "retain_template", "^retain_template='{x}': data in memory has no column 'x'. Its col"),
])  # fmt: skip
def test_an_error_about_other_text_names_the_option_of_its_template(how, option, said, tokenizer):
    line = refused(said, load_other, [{"a": "x", "b": "y"}], tokenizer, option, **how)
    assert "such as" not in line and " template" not in line
    with pytest.raises(LoraInitError, match=r"^max_length=1, expected a whole number of at least 2\.$"):
        load_other(numbered(2), tokenizer, option, max_length=1)


def test_other_text_is_read_as_data_are(tokenizer):
    rows = [{"a": f"x{i}"} for i in range(5)]
    found = load_other(rows, tokenizer, "retain_template", template="{a}", samples=3, batch_size=2)
    assert found.description == load_batches(rows, tokenizer, template="{a}", samples=3).description
    assert [len(batch["labels"]) for batch in found] in ([2, 1], [1, 2])
