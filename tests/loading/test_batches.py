"""Rows of every source and form become batches with the right tokens and labels, and bad data one clear line."""

import gzip
import io
import json
import logging
import re

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import lora_init
from lora_init import LoraInitError, load_batches
from lora_init.loading.batches import Batches
from lora_init.loading.sources import read_rows
from tests.versions import OLD_DATASETS

CHAT = (
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.name is defined %}{{ m.name + ': ' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def byte_tokenizer(merges=(), **tokens):
    """One token a byte, but for the merges; like GPT-2's, it adds no special tokens by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def bert_tokenizer():
    vocab = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<eos>")


@pytest.fixture
def write(tmp_path):
    def to(rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to


def texts(batches, tokenizer, key="input_ids"):
    """Decode every example: all tokens under the mask, or only those with a label."""
    found = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert torch.equal(labels[labels != -100], ids[labels != -100])  # a label is the token itself
            assert (labels[mask == 0] == -100).all()
            found.append(tokenizer.decode(ids[mask == 1] if key == "input_ids" else ids[labels != -100]))
    return found


def test_every_kind_of_file_gives_the_same_batches(write, tokenizer, tmp_path):
    rows = [{"text": f"example {'x' * i}, with a comma"} for i in range(5)]
    write(rows)
    (tmp_path / "data.json").write_text(json.dumps(rows))
    (tmp_path / "data.txt").write_text("\n\n".join(row["text"] for row in rows))  # a blank line is no example
    Dataset.from_list(rows).to_csv(tmp_path / "data.csv", index=False)
    Dataset.from_list(rows).to_csv(tmp_path / "data.tsv", index=False, sep="\t")
    Dataset.from_list(rows).to_parquet(tmp_path / "DATA.PARQUET")
    for name in ("data.jsonl", "data.json", "data.txt", "data.csv", "data.tsv", "DATA.PARQUET"):
        batches = load_batches(str(tmp_path / name), tokenizer)
        assert sorted(texts(batches, tokenizer)) == sorted(row["text"] + "<eos>" for row in rows), name
        assert {value.dtype for batch in batches for value in batch.values()} == {torch.int64}


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


def test_keys_that_parquet_filled_with_null_are_not_there_for_the_template(tmp_path):
    turns = [{"role": "user", "content": "hi", "name": "bob"}, {"role": "assistant", "content": "hello"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [turns]}), tmp_path / "data.parquet")
    tokenizer = byte_tokenizer(chat_template=CHAT)
    (text,) = texts(load_batches(tmp_path / "data.parquet", tokenizer), tokenizer)
    assert text == "<|im_start|>user\nbob: hi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"


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


@pytest.mark.parametrize(
    ("said", "labelled"),
    [
        (["hi", "hello", "?", " 4 ", "?", "XY"], "hello<|im_end|>\n4<|im_end|>\n<think>\n\n</think>\n\nXY<|im_end|>\n"),
        (["hi", "hello", "and?"], "hello<|im_end|>\n"),
        ([None, "I begin", "hi", "XYZ"], "I begin<|im_end|>\n<think>\n\n</think>\n\nXYZ<|im_end|>\n"),
        ([None, "user"], "user<|im_end|>\n"),
    ],
)  # fmt: skip
def test_answers_are_labelled_whatever_the_template_makes_of_earlier_ones(write, said, labelled):
    tokenizer = byte_tokenizer(chat_template=THINKING, eos_token="<|im_end|>")
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said) if text]
    batches = load_batches(write([{"messages": turns}]), tokenizer)
    assert texts(batches, tokenizer, "labels") == [labelled]
    assert texts(batches, tokenizer) == [tokenizer.apply_chat_template(turns, tokenize=False)]


def test_rows_in_memory_keep_the_columns_that_the_first_one_lacks(write, tokenizer, monkeypatch):
    rows = [{"instruction": "Greet.", "output": "hi"}, {"instruction": "Add.", "input": "1 and 2", "output": "3"}]
    path = write(rows)
    expected = sorted(texts(load_batches(path, tokenizer), tokenizer))
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text()))
    assert any("1 and 2" in text for text in expected)
    for source in (rows, "-"):
        assert sorted(texts(load_batches(source, tokenizer), tokenizer)) == expected


def test_a_role_that_templates_do_not_know_is_refused(write):
    tokenizer = byte_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    turns = [{"from": "human", "value": "1+1?"}, {"from": "function_call", "value": "add"}]
    path = write([{"conversations": turns}])
    assert texts(load_batches(path, tokenizer), tokenizer, "labels") == ["add<|im_end|>\n"]
    with pytest.raises(LoraInitError, match="line 1: a message is from 'oracle', and expected is one of human, gpt"):
        load_batches(write([{"conversations": [{"from": "oracle", "value": "?"}]}]), tokenizer)


def test_prompt_and_completion_may_be_messages(write):
    tokenizer = byte_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    prompt = [{"role": "assistant", "content": "ask me"}, {"role": "user", "content": "hi"}]
    rows = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "hello"}]}]
    assert texts(load_batches(write(rows), tokenizer), tokenizer, "labels") == ["hello<|im_end|>\n"]


def test_sharegpt_is_read_as_messages(write):
    tokenizer = byte_tokenizer(chat_template=CHAT, eos_token="<|im_end|>")
    turns = [("system", "be brief"), ("human", "hi"), ("gpt", "hello"), ("observation", "42"), ("gpt", "done")]
    path = write([{"conversations": [{"from": who, "value": said} for who, said in turns], "id": 1}])
    roles = ["system", "user", "assistant", "tool", "assistant"]
    messages = [{"role": role, "content": said} for role, (_, said) in zip(roles, turns, strict=True)]
    (text,) = texts(load_batches(path, tokenizer), tokenizer)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert texts(load_batches(path, tokenizer), tokenizer, "labels") == ["hello<|im_end|>\ndone<|im_end|>\n"]
    assert load_batches(path, tokenizer).description.endswith("sharegpt")


TOOLS = "{% if tools %}{{ 'tools: ' + tools | map(attribute='name') | join(',') + '\n' }}{% endif %}"


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_options_reach_the_template(write, as_text):
    template = TOOLS + "{% if brief is defined %}{{ brief }}{% endif %}" + CHAT
    tokenizer = byte_tokenizer(chat_template=template, eos_token="<|im_end|>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"},
    ]  # fmt: skip
    tools = [{"name": "add"}, {"name": "sub"}]
    row = {"messages": turns, "tools": json.dumps(tools) if as_text else tools, "chat_template_kwargs": {"brief": "B"}}
    batches = load_batches(write([row]), tokenizer)
    assert texts(batches, tokenizer) == [tokenizer.apply_chat_template(turns, tools, tokenize=False, brief="B")]
    assert texts(batches, tokenizer)[0].startswith("tools: add,sub\nB<|im_start|>user")


def test_alpaca_is_the_prompt_of_the_paper_and_takes_precedence_over_text(write, tokenizer):
    rows = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "unused"},
        {"instruction": "Greet.", "input": "", "output": "hi", "text": "unused"},
        {"instruction": " ", "input": "3", "output": "left out", "text": "unused"},
    ]
    with pytest.warns(UserWarning, match="1 left out with an empty field"):
        batches = load_batches(write(rows), tokenizer)
    assert sorted(texts(batches, tokenizer, "labels")) == ["3<eos>", "hi<eos>"]
    brief, long = sorted(texts(batches, tokenizer), key=len)
    assert brief == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nGreet.\n\n### Response:\nhi<eos>"
    )
    assert "a task, paired with an input that provides further context. Write" in long
    assert long.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3<eos>")
    assert set(texts(load_batches(write(rows), tokenizer, format="text"), tokenizer)) == {"unused<eos>"}


def test_a_list_is_never_read_as_the_text_that_python_writes_for_it(write, tokenizer):
    turns = [{"role": "user", "content": "hi"}]
    for row, options in (
        ({"text": ["a", "b"]}, {}), ({"prompt": turns, "completion": "a"}, {}),
        ({"instruction": turns, "output": "a"}, {}), ({"q": turns}, {"template": "{q}"}),
    ):  # fmt: skip
        with pytest.raises(LoraInitError, match=r"data.jsonl, line 1: column '\w+' holds a list, and text is needed"):
            load_batches(write([row]), tokenizer, **options)


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


@pytest.mark.parametrize(
    ("values", "known", "classes"),
    [
        (["b", "a", "b", "c"], (), ("a", "b", "c")),
        ([10, 9, 2, 9], (), ("2", "9", "10")),  # by number, so that 0, 1, 2, ... are what they are
        (["no", "yes", "no", "no"], ("yes", "no", "maybe"), ("yes", "no", "maybe")),  # as the checkpoint's head has it
        (["no", "yes", "no", "no"], ("LABEL_0", "LABEL_1"), ("no", "yes")),
        ([10.5, 2.5, -1.0, 2.5], (), ("-1", "2.5", "10.5")),
    ],
)
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
    assert f"label kind, {len(classes)} classes, 1 left out without a label" in batches.description


ROWS_WITH_GAPS = [("aa", 10), ("bb", 2), ("cc", float("nan")), ("dd", None), ("ee", 10), (float("nan"), 2)]


@pytest.mark.parametrize(
    "form", ["records", *(() if OLD_DATASETS else ["jsonl"]), "json", "csv", "parquet", "frame", "records of a frame"]
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
        "records of a frame": lambda: frame.convert_dtypes().to_dict("records"),  # pandas.NA
    }
    with pytest.warns(UserWarning, match="2 left out without a label"):
        batches = load_batches(sources[form](), tokenizer, template="{q}", label="kind")
    assert batches.classes == ("2", "10")
    said = zip(map(tokenizer.decode, batches[0]["input_ids"]), batches[0]["labels"].tolist(), strict=True)
    assert sorted(said) == [("aa", 1), ("bb", 0), ("ee", 1)]
    assert "2 left out without a label" in batches.description
    assert "1 left out with an empty field" in batches.description


def test_measured_numbers_are_no_classes(tokenizer):
    rows = [{"q": f"text {i}", "stars": i / 2, "score": i * 0.37} for i in range(21)]
    with pytest.raises(LoraInitError, match=r"'score' has 21 different numbers with fractions, from 0 to 7.4"):
        load_batches(rows, tokenizer, template="{q}", label="score")
    assert len(load_batches(rows[:20], tokenizer, template="{q}", label="stars").classes) == 20


@pytest.mark.parametrize("bos", [False, True])
def test_a_classifier_pools_the_token_that_it_pools_in_training_on_the_tokenizers_text(bos):
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(template="{passage}", label="kind"), "label='kind' is not a column. Columns of"),
        (
            dict(template="{passage}", label="label"),
            "column 'label' has 1 different values, and a classification needs",
        ),
        (dict(template="{passage}", label="label", completion="{label}"), "a classification has no completion"),
        (dict(template="{passage.__class__}"), "has no column 'passage.__class__'. Its columns: passage, label."),
        (dict(template="{passage[0]}"), "has no column 'passage[0]'"),
        (dict(template="{passage:{label.__class__}}"), "only column names go in braces"),
        (dict(template="{passage!r}"), "only column names go in braces"),
        (dict(template="{pasage}"), "has no column 'pasage'. Its columns: passage, label."),
        (dict(template="{}"), "has no column ''"),
        (dict(template="no column"), "names no column. Columns of"),
        (dict(template="{passage"), "Write {{ for a brace"),
        (dict(template="{passage}", completion="{answer}"), "completion='{answer}': "),
        (
            dict(format="chat"),
            "format='chat' is unknown. Choose from messages, sharegpt, prompt-completion,",
        ),
        (dict(format="text", template="{passage}"), "format='text' and a template say two things. Give one"),
        (dict(format="alpaca"), "has the columns passage, label. Expected instruction and output; name others, such"),
        (dict(completion="{label}"), "needs a template for the prompt"),
        (dict(), "has the columns passage, label. Expected messages, or conversations, or prompt and completion, or"),
        (dict(), "name others, such as template='{passage}' with completion=' {label}'."),
        (dict(label="label"), "name others, such as template='{passage}'."),
        (dict(template="{passage}", batch_size=0), "batch_size=0 must be at least 1"),
        (dict(template="{passage}", max_length=1), "max_length=1 must be at least 2"),
        (dict(template="{passage}", samples=0), "samples=0 must be at least 1"),
        (dict(template="{passage}", seed=-1), "seed=-1 must be at least 0"),
        (dict(template="{passage}", offset=-1), "offset=-1 at least 0"),
        (dict(template="{passage}", offset=1), "no usable example among 1 rows read as template '{passage}' after the"),
        (dict(template="{passage}", seq2seq=True), "an encoder-decoder model needs a prompt"),
        (dict(template="{passage}", completion="{label}", max_length=4), "1 left out without a labelled token among"),
    ],
)
def test_bad_arguments_say_what_to_do(write, tokenizer, arguments, message):
    path = write([{"passage": "Ice floats.", "label": True}])
    with pytest.raises(LoraInitError, match=re.escape(message)) as caught:
        load_batches(path, tokenizer, **arguments)
    assert "\n" not in str(caught.value)
    assert str(path.parent.parent) not in str(caught.value)


def test_bad_messages_name_the_row(write, tokenizer):
    good = {"role": "user", "content": "hi"}
    path = write([{"messages": [good]}])
    with pytest.raises(LoraInitError, match="this tokenizer has no chat template"):
        load_batches(path, tokenizer)
    chatty = byte_tokenizer(chat_template=CHAT)
    path = write([{"messages": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(LoraInitError, match=r"data.jsonl, line 1: the chat template refuses .* no tools here"):
        load_batches(path, chatty)
    with pytest.raises(LoraInitError, match="line 1: messages must be a list of"):
        load_batches(write([{"messages": "hi"}]), chatty)


def test_bad_sources_are_one_clear_line(write, tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.csv").write_text("text\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "nothing").mkdir()
    write([{"text": "  "}, {"text": None}], "hollow.jsonl")
    (tmp_path / "numbers.json").write_text("[1, 2, 3]")
    (tmp_path / "words.jsonl").write_text('"a"\n"b"\n')
    (tmp_path / "semicolons.csv").write_text("text;kind\na, b;c\n")
    (tmp_path / "latin.csv").write_bytes("text\nplain\ncaf\xe9\n".encode("latin-1"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("a line\n".encode("utf-16"))
    for name, message in {
        "numbers.json": r"numbers.json: its rows are numbers, texts or lists. Expected objects: \{'text': ...\}",
        "words.jsonl": "its rows are numbers, texts or lists",
        "semicolons.csv": "columns are separated by a semicolon, expected a comma. Save it with commas",
        "latin.csv": "latin.csv, line 3: byte 0xe9 is not valid UTF-8, .* iconv -f LATIN1 -t UTF-8",
        "latin.jsonl": "latin.jsonl, line 1: byte 0xe9 is not valid UTF-8",
        "wide.txt": "byte 0xff is not valid UTF-8, .* iconv -f UTF-16",
        "missing.jsonl": "missing.jsonl': no such file or folder",
        "empty.jsonl": "the data is empty",
        "blank.csv": "the data is empty",
        "broken.jsonl": "datasets cannot read it: .*JSON",
        "image.png": r"files of this kind \(.png\). Expected one of .json, .jsonl, .csv, .tsv, .parquet, .txt",
        "nothing": "doesn't contain any data files",
        "hollow.jsonl": r"no usable example among 2 rows read as text \(2 left out with an empty field\)",
    }.items():
        with pytest.raises(LoraInitError, match=message) as caught:
            load_batches(tmp_path / name, tokenizer)
        assert "\n" not in str(caught.value), name
    with pytest.raises(LoraInitError, match=r"mix kinds of values in a column: .* Write all of it as text"):
        load_batches([{"text": "a"}, {"text": 1}], tokenizer)


def test_folder_reads_one_kind_and_one_split(write, tokenizer, tmp_path):
    write([{"text": "a"}], "plain/1.jsonl")
    write([{"text": "b"}], "plain/more/2.jsonl")
    write([{"text": "hidden"}], "plain/.cache/3.jsonl")
    (tmp_path / "plain/README.md").write_text("no data")
    batches = load_batches(tmp_path / "plain", tokenizer)
    assert sorted(texts(batches, tokenizer)) == ["a<eos>", "b<eos>"]
    assert batches.description.startswith("plain/: 2 of 2 examples")
    # A script beside the data is never run.
    (tmp_path / "plain/plain.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(LoraInitError, match="scripts are no longer supported"):
        load_batches(tmp_path / "plain", tokenizer)

    for name in ("train", "dev", "contest"):  # "test" inside a word marks no split
        write([{"text": name}], f"splits/{name}.jsonl")
    assert texts(load_batches(tmp_path / "splits", tokenizer), tokenizer) == ["train<eos>"]
    assert texts(load_batches(tmp_path / "splits", tokenizer, split="validation"), tokenizer) == ["dev<eos>"]
    with pytest.raises(LoraInitError, match=r"splits/, test: .* Unknown split .* one of \['train', 'validation'\]"):
        load_batches(tmp_path / "splits", tokenizer, split="test")

    write([{"text": "c"}], "mixed/1.jsonl")
    (tmp_path / "mixed/2.txt").write_text("d")
    assert texts(load_batches(tmp_path / "mixed", tokenizer), tokenizer) == ["c<eos>"]  # the kind there is most of
    with pytest.raises(LoraInitError, match=r"files of this kind \(.jsonl, .txt\)"):
        load_batches(tmp_path / "mixed" / "*", tokenizer)


def test_hub_id_goes_to_datasets_with_subset_and_split(monkeypatch, tokenizer):
    asked = {}
    monkeypatch.setattr("lora_init.loading.sources.check_hub", lambda *_: True)

    def load_dataset(**arguments):
        asked.update(arguments)
        return Dataset.from_list([{"text": "from afar"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    batches = load_batches("owner/name", tokenizer, subset="small", split="validation")
    assert asked == {"path": "owner/name", "name": "small", "split": "validation"}  # no flag that would run its code
    assert batches.description.startswith("owner/name (small), validation: 1 of 1 examples")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,b\n1,2,3\n4,5\n",
            "data.csv: datasets cannot read it: Length of header .* does not match",
        ),
        ('text,b\n1,2\n\n"x\ny",5\n4,5,6\n', "Expected 2 fields in line 5, saw 3"),
        ("text,b\n" + "x" * 200_000 + ",2\n4,5,6\n", "Expected 2 fields in line 3, saw 3"),
    ],
)
def test_a_record_with_too_many_fields_is_refused(tmp_path, tokenizer, content, message):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(LoraInitError, match=message):
        load_batches(tmp_path / "data.csv", tokenizer)


def test_data_in_memory_streams_patterns_and_standard_input(write, tokenizer, tmp_path, monkeypatch):
    import pandas

    rows = [{"text": f"example {i}"} for i in range(5)]
    expected = sorted(row["text"] + "<eos>" for row in rows)
    path = write(rows)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    write(rows[:2], "parts/a.jsonl"), write(rows[2:], "parts/b.jsonl")
    monkeypatch.setattr("sys.stdin", io.StringIO(path.read_text()))
    table = Dataset.from_list(rows)
    for source in (
        rows, table, table.to_iterable_dataset(), pandas.DataFrame(rows), datasets.DatasetDict(train=table), "-",
        tmp_path / "data.jsonl.gz", str(tmp_path / "parts" / "*.jsonl"), [tmp_path / f"parts/{n}.jsonl" for n in "ab"],
    ):  # fmt: skip
        assert sorted(texts(load_batches(source, tokenizer), tokenizer)) == expected, source
    for source, message in {
        str(tmp_path / "parts" / "*.csv"): "no such file or folder",
        (path, tmp_path / "missing.jsonl"): "2 files: datasets cannot read it: .*missing.jsonl",
        ("how are you?", "well"): r"no such files. For texts in memory, make rows of them: \[{'text': ...}, ...\]",
        3: "data of type int: expected a path",
        (1, 2): "data of type tuple: expected a path",
    }.items():
        with pytest.raises(LoraInitError, match=message):
            load_batches(source, tokenizer)
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "a"}\nnot json\n'))
    with pytest.raises(LoraInitError, match="standard input, line 2 is not JSON"):
        load_batches("-", tokenizer)


def test_a_split_or_subset_of_what_has_none_is_refused(write, tokenizer):
    path = write([{"text": "a"}])
    with pytest.raises(LoraInitError, match=r"split='validation' is for a folder or a data set on the hub"):
        load_batches(path, tokenizer, split="validation")
    with pytest.raises(LoraInitError, match=r"validation: .* Unknown split .* one of \['train'\]"):
        load_batches(path.parent, tokenizer, split="validation")
    with pytest.raises(LoraInitError, match=r"subset='small' is for a folder or a data set on the hub"):
        load_batches(path, tokenizer, subset="small")


def test_sample_depends_on_the_seed_and_neither_on_size_nor_batches(write, tokenizer):
    path = write([{"text": f"row {i:03d}"} for i in range(100)])

    def sample(**arguments):
        return set(texts(load_batches(path, tokenizer, **arguments), tokenizer))

    assert sample(samples=20, batch_size=1) == sample(samples=20, batch_size=7)
    assert sample(samples=20) < sample(samples=40)
    assert sample(samples=20) != sample(samples=20, seed=1)
    assert not sample(samples=20) & sample(samples=20, offset=20)
    assert sample(samples=20) | sample(samples=20, offset=20) == sample(samples=40)
    assert len(sample(samples=None)) == len(sample(samples=1000)) == 100
    first, second = (load_batches(path, tokenizer, samples=20) for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


def test_numbers_of_numpy_are_kept_as_json_has_them(write, tokenizer):
    path = write([{"text": f"row {i:03d}"} for i in range(20)])
    asked = dict(samples=8, offset=2, batch_size=2, max_length=9, seed=1)
    plain, given = (load_batches(path, tokenizer, **{k: of(v) for k, v in asked.items()}) for of in (int, np.int64))
    assert json.dumps(given.settings) == json.dumps(plain.settings)
    assert texts(given, tokenizer) == texts(plain, tokenizer)


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


def test_description_says_which_examples_in_words(write, tokenizer):
    path = write([{"text": f"row {i}"} for i in range(9)], "BoolQ/combined.jsonl")
    batches = load_batches(path, tokenizer, samples=3, offset=2, seed=5, max_length=64)
    assert (
        batches.description
        == "BoolQ/combined.jsonl: 3 of 9 examples, after the first 2, seed 5, at most 64 tokens, text"
    )
    assert isinstance(batches, list) and Batches().description == ""


def test_nothing_is_printed_and_progress_bars_are_as_before(write, tokenizer, capfd, tmp_path, monkeypatch):
    records = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    datasets.enable_progress_bars()
    load_batches(write([{"text": "a"}]), tokenizer)
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    with pytest.raises(LoraInitError):
        load_batches(tmp_path / "broken.jsonl", tokenizer)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "") and records == []


def test_batches_train_a_model(write):
    from tests.conftest import tiny_llama

    tokenizer = byte_tokenizer(eos_token="<eos>")
    model = tiny_llama(vocab_size=len(tokenizer))
    path = write([{"prompt": "1 + 1 =", "completion": f" {i}"} for i in range(6)])
    for batch in load_batches(path, tokenizer, batch_size=2):
        assert torch.isfinite(model(**batch).loss)
    assert lora_init.load_batches is load_batches


def test_a_cell_of_a_table_is_read_as_its_text(tmp_path, tokenizer):
    cells = ["007", "None", "1.50", "true", "NA", "2009-02-13", "1e5"]
    (tmp_path / "data.csv").write_text("prompt,completion\n" + "".join(f"q,{cell}\n" for cell in [*cells, ""]))
    with pytest.warns(UserWarning, match="of the first 8 rows 1 left out with an empty field"):
        batches = load_batches(tmp_path / "data.csv", tokenizer)
    assert sorted(texts(batches, tokenizer, "labels")) == sorted(cell + "<eos>" for cell in cells)


@pytest.mark.parametrize("form", ["{}\n{}\n{}\n", "[{},\n {},\n {}]"])
def test_dates_in_json_are_read_as_their_text(tmp_path, form):
    rows = [
        {"a": "2009-02-13", "c": [{"at": "2009-02-13T10:00:00"}], "d": "plain"},
        {"a": "2009-02-14", "c": [], "d": "plain"},
        {"a": None, "c": [{"at": "2009-02-13"}]},
    ]
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(form.format(*map(json.dumps, rows)).encode()))
    table = read_rows(tmp_path / "data.json.gz").table
    assert table["a"][:] == ["2009-02-13", "2009-02-14", None]
    assert table["c"][:] == [row["c"] for row in rows]
    assert table["d"][:] == ["plain", "plain", None]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_row_of_a_table_is_named_by_the_line_where_it_begins(tmp_path, separator):
    lines = [separator.join(fields) for fields in (["text", "note"], ['"two\nlines"', "a"], [], ["one", "b"], ["", ""])]
    file = tmp_path / f"data.{'csv' if separator == ',' else 'tsv'}.gz"
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    rows = read_rows(file)
    assert [rows.place(i).rpartition(", ")[2] for i in range(2)] == ["line 2", "line 5"]
    assert read_rows([{"text": "one"}]).place(0) == "data in memory, row 1"


def test_the_longest_column_of_text_is_proposed_and_never_a_list(write, tokenizer):
    row = {"ticket_id": 1, "tags": ["a long list", "of many words"], "body": "The pump drips.", "category": "leak"}
    path = write([row, row | {"category": "noise"}])
    with pytest.raises(LoraInitError, match=re.escape("such as template='{body}'.")):
        load_batches(path, tokenizer, label="category")
