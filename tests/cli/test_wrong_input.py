"""Wrong input, and the line that each gets, before any weights are read."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import lora_init
from lora_init.loading.models import ModelSource
from tests.commands import WORDS, assert_one_line_error, run, save_model
from tests.comparisons import SMALL, make_home
from tests.conftest import refused, tiny_llama

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("wrong"))
    tokenizer = AutoTokenizer.from_pretrained(save_model(tiny_llama(), home / "chat"))
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(home / "chat")

    def write(name, rows):
        (home / name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))

    def chat(*turns):
        return {"messages": [dict(zip(("role", "content"), turn, strict=False)) for turn in turns]}

    texts = [{"text": f"the cat {word}"} for word in WORDS]
    asked = [chat(("user", f"the {word}"), ("assistant", "sat on")) for word in WORDS]
    write("text.jsonl", texts)
    write("cut.jsonl", [*texts[:7], '{"text": "the ca\n', *texts[7:]])
    write("ended.jsonl", [*texts[:7], '{"text": "the ca'])
    write("chats.jsonl", asked)
    write("questions.jsonl", [chat(("user", f"the {word}")) for word in WORDS])
    write("silent.jsonl", [*asked[:4], chat(("user", "the cat"), ("assistant",)), *asked[5:]])
    turns = [{"from": "human", "value": "the cat"}, {"from": "gpt"}]
    write("sharegpt.jsonl", [{"conversations": turns}])
    write("pair.jsonl", [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in asked])
    write("scores.csv", ["text,score\n", *(f"the cat {word},{i % 10 / 10}\n" for i, word in enumerate(WORDS))])
    write("scores2.csv", ["sentence,score\n", *(f"the cat {word},{i % 3}\n" for i, word in enumerate(WORDS))])
    write("one.jsonl", texts[:1])
    trained = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trained.peft_config["default"].base_model_name_or_path = str(home / "llama")
    trained.save_pretrained(home / "trained")
    write("rank8.safetensors", [])
    (home / "rank8.safetensors").unlink()
    made = run("init", home / "llama", home / "text.jsonl", "-o", home / "a", "--rank", 8,
               "--statistics", home / "rank8.safetensors")  # fmt: skip
    assert made.exit_code == 0, made.output
    return home


INIT = ["init", "llama", "text.jsonl", "-o", "out"]
COMPARE = ["compare", "llama", "rows.jsonl", "--template", "{passage}", "-o", "out"]
COMMANDS = {
    "rate above one": (
        [*COMPARE, "--learning-rates", "5"], "--learning-rates 5: expected positive numbers up to 1",
    ),
    "fractional classes": (
        ["init", "bert", "scores.csv", "--template", "{text}", "--label", "score", "-o", "out"],
        "column 'score' has 10 different numbers with fractions, from 0 to 0.9. They are measured values, not classes",
    ),
    "steps beside a rate": (
        [*INIT, "--learning-rate", "1e-3", "--steps", 300], "--steps: only the rule's rate depends on it",
    ),
    "dry run to a file": ([*INIT, "--dry-run", "-o", "text.jsonl"], "text.jsonl is a file, and a directory is needed"),
    "dry comparison to a file": (
        [*COMPARE, "--dry-run", "-o", "text.jsonl"], "text.jsonl is a file, and a directory is needed",
    ),
    "no answers": (
        ["init", "chat", "questions.jsonl", "-o", "out"],
        "no token of its 19 examples has a label, so there is nothing to learn. A chat needs a turn of the assistant's",
    ),
    "no chat template": (
        ["init", "llama", "chats.jsonl", "-o", "out"],
        "has a column 'messages', but this tokenizer has no chat template, as those of base models. Use the model that",
    ),
    "no chat template for pairs": (
        ["init", "llama", "pair.jsonl", "-o", "out"], "the row has messages, but this tokenizer has no chat template",
    ),
    "no content": (
        ["init", "chat", "silent.jsonl", "-o", "out"],
        "silent.jsonl, line 5: message 2, of 'assistant', has no content. Leave out the row.",
    ),
    "no value": (["init", "chat", "sharegpt.jsonl", "-o", "out"], "line 1: message 2, of 'assistant', has no content"),
    "cut line": (["init", "llama", "cut.jsonl", "-o", "out"], "cut.jsonl, line 8 is not JSON: "),
    "cut file": (["init", "llama", "ended.jsonl", "-o", "out"], "ended.jsonl, line 8 is not JSON: Unterminated string"),
    "more than was collected": (
        ["init", "llama", "-o", "out", "--rank", 32, "--statistics", "rank8.safetensors"],
        "--rank 32 lets a layer have rank 32, and 'model.layers.0.self_attn.q_proj' and 13 other layers would take "
        "more than the 16 components that were collected.",
    ),
    "smallest above largest": (
        ["ranks", "rank8.safetensors", "--min-rank", 8, "--max-rank", 4], "--min-rank 8 is above --max-rank 4.",
    ),
    "a rank for a plan": (
        [*INIT, "--ranks", "8"], "8: the plan could not be read: No such file or directory. Name a file that",
    ),
    "a rank for a policy": (
        ["ranks", "rank8.safetensors", "--compare", "8"], "--compare '8': expected a policy, or a change such as",
    ),
    "gpu": ([*INIT, "--device", "gpu"], "device 'gpu' cannot be used here: expected auto, cpu, cuda, cuda:1 or mps."),
    "gpu to compare": ([*COMPARE, "--device", "gpu"], "device 'gpu' cannot be used here: expected auto, cpu, cuda"),
    "template for nothing": (
        [*COMPARE, "--retain-template", "{x}"], "--retain-template '{x}' goes with --retain-data.",
    ),
    "answer for nothing": ([*COMPARE, "--answer", "right"], "--answer right goes with --options."),
    "options that are none": (
        ["compare", "llama", "text.jsonl", "-o", "out", "--options", "nope"], "--options nope is not a column, and",
    ),
    "columns of text to retain": (
        [*COMPARE, "--report-samples", 12, "--retain-data", "scores2.csv", "--retain-template", "{x}"],
        "--retain-template '{x}': wrong0/scores2.csv has no column 'x'. Its columns: sentence, score.",
    ),
    "text to retain without a template": (
        [*COMPARE, "--report-samples", 12, "--retain-data", "scores2.csv"],
        "or instruction and output, or text. Name one by --retain-template",
    ),
    "columns of text to replay": (
        [*COMPARE, "--report-samples", 12, "--replay", "scores2.csv"],
        "or instruction and output, or text. Rename one of them.",
    ),
    "columns of text to keep": (
        ["dial", "trained", "rows.jsonl", "--template", "{passage}", "-o", "out", "--keep", "scores2.csv"],
        "or instruction and output, or text. Rename one of them.",
    ),
    "one example to dial": (["dial", "trained", "one.jsonl", "-o", "out"], "DATA one.jsonl: 1 example, and at least 6"),
    "one text to keep": (
        ["dial", "trained", "text.jsonl", "-o", "out", "--keep", "one.jsonl"], "--keep one.jsonl: 1 example, and at",
    ),
    "no data to export by": (["export", "trained", "-o", "out", "--data", "none.jsonl"], "none.jsonl': no such file"),
    "no bank": ([*INIT, "--method", "from-bank", "--bank", "none"], "none is no bank: it has no bank.json. Make one:"),
    "no bank to compare": (
        [*COMPARE, "--starts", "bank-nearest", "--bank", "none"], "none is no bank: it has no bank.json. Make one:",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_says_in_one_line_what_is_wrong(case, home, monkeypatch):
    words, line = COMMANDS[case]
    monkeypatch.chdir(home)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert_one_line_error(run(*words), line)
    assert not (home / "out").exists()


ROWS = [{"text": "the cat sat"}] * 4
CHATS = [{"messages": [{"role": "user", "content": "the cat"}]}] * 4
CALLS = {
    "rows without tokenizer": (
        lambda compare: lora_init.initialize(tiny_llama(), ROWS),
        r"batches are rows of text with the columns text, and tokens are needed\. Pass tokenizer=, the model's\.",
    ),
    "chats without tokenizer": (
        lambda compare: lora_init.initialize(tiny_llama(), CHATS), "rows of text with the columns messages, and tokens",
    ),
    "texts without tokenizer": (
        lambda compare: lora_init.initialize(tiny_llama(), ["the cat"]), "batches are rows of text, and tokens",
    ),
    "another spelling": (
        lambda compare: lora_init.initialize(tiny_llama(), ROWS, tokeniser=1),
        r"initialize\(\) has no argument tokeniser=\. Did you mean tokenizer\?",
    ),
    "another spelling to compare": (
        lambda compare: compare(seed=3), r"compare\(\) has no argument seed=\. Did you mean seeds\?",
    ),
    "a duration in words": (
        lambda compare: compare(time="20m"), "time='20m': expected a number above zero, in seconds",
    ),
    "starts in one text": (
        lambda compare: compare(starts="random,eva"),
        r"starts='random,eva' is one text\. Pass a list: starts=\['random', 'eva'\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_says_in_one_line_what_is_wrong(case, home, tmp_path, monkeypatch):
    call, line = CALLS[case]
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("a model was loaded"))

    def compare(**changes):
        return lora_init.compare(str(home / "llama"), home / "rows.jsonl", tmp_path / "out", **SMALL | changes)

    refused(line, call, compare)
