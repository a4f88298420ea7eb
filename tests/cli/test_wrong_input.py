"""Wrong input, and the line that each gets, before any weights are read."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import lora_init
from lora_init.adapters.directory import AdapterDirectory, write_files
from lora_init.loading.models import ModelSource
from tests.adapters.made import made_up_statistics
from tests.commands import WORDS, assert_one_line_error, run, save_model
from tests.comparisons import SMALL, make_home
from tests.conftest import batches_for, refused, tiny_llama
from tests.serving.engine import word_tokenizer

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
    write("told.jsonl", [{"conversations": [{"from": "narrator", "value": "the cat"}, *turns]}])
    write("pair.jsonl", [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in asked])
    write("scores.csv", ["text,score\n", *(f"the cat {word},{i % 10 / 10}\n" for i, word in enumerate(WORDS))])
    write("scores2.csv", ["sentence,score\n", *(f"the cat {word},{i % 3}\n" for i, word in enumerate(WORDS))])
    write("one.jsonl", texts[:1])
    write("lists.jsonl", ["[1, 2]\n"] * 4)
    write("options.yaml", ["- partition\n"])
    write("garbage.safetensors", ["garbage"])
    write("nulls.jsonl", [{"text": None}] * 4)
    trained = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trained.peft_config["default"].base_model_name_or_path = str(home / "llama")
    trained.save_pretrained(home / "trained")
    write("rank8.safetensors", [])
    (home / "rank8.safetensors").unlink()
    tensors = AdapterDirectory(home / "trained").tensors()
    for name, config, changed in [
        ("nan", {}, {next(iter(tensors)): torch.tensor([[math.nan]])}),
        ("hollow", {}, dict.fromkeys(tensors)),
        ("spelled", {"r": "4"}, {}),
        ("nameless", {"base_model_name_or_path": None}, {}),
        ("elsewhere", {"base_model_name_or_path": "./bert"}, {}),
    ]:
        (home / name).mkdir()
        kept = {key: value for key, value in (tensors | changed).items() if value is not None}
        write_files(home / name, kept, dict(AdapterDirectory(home / "trained").config) | config)
    made = run("init", home / "llama", home / "text.jsonl", "-o", home / "a", "--rank", 8,
               "--statistics", home / "rank8.safetensors")  # fmt: skip
    assert made.exit_code == 0, made.output
    made = run("init", home / "llama", home / "text.jsonl", "-o", home / "b", "--samples", 16,
               "--statistics", home / "other.safetensors")  # fmt: skip
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
    "a model for data": (
        ["init", "llama", "llama", "-o", "out"],
        "data llama: this is the directory of a model. Name a file, or a folder of data.",
    ),
    "a narrator": (
        ["init", "chat", "told.jsonl", "-o", "out"],
        "told.jsonl, line 1: a message is from 'narrator', and expected is one of human, gpt, chatgpt, bot,",
    ),
    "lists for rows": (["init", "llama", "lists.jsonl", "-o", "out"], "lists.jsonl: its rows are numbers, texts or li"),
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
        "scores2.csv has no column 'x'. Its columns: sentence, score.",
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
    "nowhere": ([*INIT, "-o", ""], "output '.': this directory itself cannot be written anew. Name one in it."),
    "here": ([*INIT, "-o", "."], "output '.': this directory itself cannot be written anew. Name one in it."),
    "a module that is none": (
        [*INIT, "--modules-to-save", "lm_haed"],
        "--modules-to-save lm_haed is no module of LlamaForCausalLM. Closest: lm_head",
    ),
    "empty texts": (["init", "llama", "nulls.jsonl", "-o", "out"], "Check the columns and --max-length."),
    "a layer to exclude": (
        ["ranks", "rank8.safetensors", "--exclude", "zzz"], "--exclude zzz matches no layer. Names end in",
    ),
    "a layer to tie": (["ranks", "rank8.safetensors", "--tie", "a,b"], "--tie a matches no layer. Names end in"),
    "ranks that are multiples": (
        ["ranks", "rank8.safetensors", "--multiple-of", 50], "Raise --max-rank, or lower --multiple-of.",
    ),
    "shares of two files": (
        ["merge", "rank8.safetensors", "other.safetensors", "-o", "out", "--weights", "0.5"],
        "--weights 0.5: 1 for 2 parts, and their sum is 0.5, expected positive numbers whose sum is 1",
    ),
    "texts in a table": (
        ["replay", "llama", "-o", "out.csv"], "out.csv: texts are written as JSON lines. Name the file so: out.jsonl.",
    ),
    "two sizes": (
        ["export", "trained", "-o", "out", "--rank", 2, "--parameters", 100],
        "--rank 2 and --parameters 100 are both given.",
    ),
    "a merged model for an engine": (
        ["export", "trained", "-o", "out", "--merge-into", "llama", "--engine", "vllm"],
        "with --merge-into leave --engine, --rank, --keep-ranks and budgets away.",
    ),
    "how to read no data": (
        ["export", "trained", "-o", "out", "--template", "{x}"], "--template: that is for --data. Leave it out.",
    ),
    "statistics that are none": (
        ["bank", "add", "out", "trained", "--data", "text.jsonl", "--statistics", "garbage.safetensors"],
        "garbage.safetensors is not a whole safetensors file",
    ),
    "an encoder that is none": (
        ["bank", "add", "out", "trained", "--data", "text.jsonl", "--encoder", "./none"], "model './none': no such",
    ),
    **{
        f"{share} GPUs for a run": (
            [*COMPARE, "--cluster", "ray", "--gpus-per-run", share],
            f"--gpus-per-run {share}: expected a share of one GPU, or a whole number.",
        )
        for share in ("-1", "nan", "1.5")
    },
    "a cluster of no host": ([*COMPARE, "--cluster", "ray://"], "cluster 'ray://' names no address. Start one with"),
    "epochs without end": ([*INIT, "--epochs", "1e12"], "--epochs 1000000000000, expected a number above 0, 10,000"),
    "an encoder to write": (
        ["replay", "bert", "-o", "out.jsonl"], "bert is a BertForSequenceClassification, which continues no text.",
    ),
    "an encoder to compare": (
        ["compare", "bert", "rows.jsonl", "--template", "{passage}", "-o", "out"],
        "bert' is a BertForSequenceClassification, and a comparison trains causal language models",
    ),
    "no name for a bank": (
        ["bank", "add", "", "trained", "--data", "text.jsonl"], "output '.': this directory itself cannot be written",
    ),
    "how to read no task": (
        ["dial", "trained", "-o", "out", "--strength", "0.8", "--template", "{x}", "--dtype", "float32"],
        "--template, --dtype: without DATA nothing is measured. Leave them out.",
    ),
    "how to read what is inspected": (
        ["inspect", "trained", "--template", "{x}"], "--template: that is for --data. Leave it out.",
    ),
    "steps of no start": (
        ["inspect", "trained", "--steps", 300], "--steps: only the rate of an adapter that is not trained yet depends",
    ),
    "one strength for all, twice": (
        ["dial", "trained", "-o", "out", "--strength", "0.8", "--uniform"],
        "--strength 0.8 is one for all layers already. Leave --uniform out.",
    ),
    "an adapter of NaN": (["inspect", "nan"], ".lora_A.weight has NaN or infinite numbers, as after a training that"),
    "an adapter of nothing": (["inspect", "hollow"], "adapter_model.safetensors holds no tensors."),
    "a rank in words": (["inspect", "spelled"], "damaged: r is '4', and a rank of at least 1 is expected."),
    "a bank of no base": (
        ["bank", "add", "out", "nameless", "--data", "text.jsonl"],
        "nameless does not name its base model. Name it with --model.",
    ),
    "a rate of no base": (
        ["rate", "nameless", "text.jsonl"], "nameless does not name its base model. Pass --base.",
    ),
    "intruders of no base": (
        ["inspect", "nameless", "--intruders"], "nameless does not name its base model. Name it with --base.",
    ),
    "losses on two bases": (
        ["export", "trained", "elsewhere", "-o", "out", "--data", "text.jsonl"],
        "llama. Take those of one base, or name --base.",
    ),
    "one start for two": (
        ["export", "trained", "spelled", "-o", "out", "--start", "trained"],
        "--start is one adapter before its training. Export those that have one one by one.",
    ),
    "no data and no statistics": (
        ["init", "llama", "-o", "out"], "DATA is missing. Name it, or name with --statistics a file that exists.",
    ),
    "no data and a file that is not there": (
        ["init", "llama", "-o", "out", "--statistics", "none"],
        "--statistics none: no such file. Name one that exists, or DATA to make it from.",
    ),
    **{
        f"{number} for a rate": (
            [*INIT, "--learning-rate", number], f"--learning-rate {number}: expected a number between 0 and 1",
        )
        for number in ("0", "1", "nan")
    },
    **{
        f"{option} without a merge": (["inspect", "trained", option, file], "--data and --statistics are for --merge.")
        for option, file in (("--data", "text.jsonl"), ("--statistics", "rank8.safetensors"))
    },
    **{
        f"standard input for {option}": (
            [*COMPARE[:2], "-", *COMPARE[3:], option, value],
            "DATA '-': workers read the data, too, and standard input is read once. Name a file.",
        )
        for option, value in (("--workers", 2), ("--cluster", "ray"))
    },
    "neither statistics nor a plan": (
        ["inspect", "garbage.safetensors"], "garbage.safetensors is neither statistics nor a plan. Name what",
    ),
    "nothing to inspect": (["inspect", "out.none"], "out.none: no such file or directory. Expected statistics, a"),
    "a list of options": (
        [*COMPARE, "--cluster", "slurm:options.yaml"], "options.yaml holds no options, such as `partition: gpu`.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_says_in_one_line_what_is_wrong(case, home, monkeypatch):
    words, line = COMMANDS[case]
    monkeypatch.chdir(home)
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert_one_line_error(run(*words), line)
    assert not (home / "out").exists()


USAGE = {
    "a word for steps": (["--steps", "10k"], "'--steps': 10k should be a valid integer. See lora-init init --help."),
    "a word for a rate": (["--learning-rate", "measured"], "'--learning-rate': measured should be a valid number."),
    "no examples in a step": (["--train-batch-size", 0], "'--train-batch-size': 0 should be greater than or equal to"),
    "a word for epochs": (["--epochs", "three"], "'--epochs': three should be a valid number."),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_says_what_was_got(case):
    words, line = USAGE[case]
    assert_one_line_error(run(*INIT, *words), line, code=2)


def rate(**options):
    return lora_init.learning_rate(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), [], **options)


def trained():
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


def ask(prompt):
    return {0: -1.0}


ROWS = [{"text": "the cat sat"}] * 4
CHATS = [{"messages": [{"role": "user", "content": "the cat"}]}] * 4
TOKENS = {name: torch.ones(2, 4, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}
STRANGE = TOKENS | dict.fromkeys(("input_ids", "labels"), torch.full((2, 4), 999))
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
    "half a step": (lambda compare: rate(steps=10.5), "steps=10.5, expected a whole number of at least 1"),
    "half an example": (
        lambda compare: rate(steps=9, train_batch_size=1.5),
        "train_batch_size=1.5, expected a whole number of at least 1",
    ),
    "a table for batches": (
        lambda compare: lora_init.collect(tiny_llama(), pandas.DataFrame(ROWS)),
        "collect got a DataFrame for the batches",
    ),
    "no statistics": (
        lambda compare: lora_init.Statistics.load(None),
        "a lora_init.statistics file is needed, as a path, and got None",
    ),
    "a model to export": (
        lambda compare: lora_init.export_adapter(tiny_llama(), "out"),
        "an adapter directory is needed, as a path, and got LlamaForCausalLM",
    ),
    "nowhere to export to": (
        lambda compare: lora_init.export_adapter("trained", None), "output is needed, as a path, and got NoneType",
    ),
    "a number for the adapter before training": (
        lambda compare: lora_init.export_adapter("trained", "served", start=3),
        "start: the adapter before training is needed, as a path, and got int",
    ),
    "a list of engines": (
        lambda compare: lora_init.export_adapter("trained", "served", ["vllm"]),
        r"^engine \['vllm'\] is unknown. Did you mean vllm",
    ),
    "a number for a file of statistics": (
        lambda compare: lora_init.collect(tiny_llama(), batches_for("llama"), statistics=3),
        "statistics: a file is needed, as a path, and got int",
    ),
    "two rates": (
        lambda compare: lora_init.initialize(tiny_llama(), [], learning_rate=np.array(["measured", "a"])),
        "^learning_rate=array.*: 'measured' sets the rate of a trainer",
    ),
    "a number for names of parameters": (
        lambda compare: lora_init.collect(tiny_llama(), batches_for("llama"), target_parameters=3),
        "^target_parameters=3: expected a regular expression, or a list of names",
    ),
    "no layer to leave out": (
        lambda compare: lora_init.collect(tiny_llama(), batches_for("llama"), exclude_modules=0),
        "^exclude_modules=0: expected a regular expression",
    ),
    "a list of types": (
        lambda compare: lora_init.allocate_ranks(made_up_statistics(tiny_llama()), megabytes=1, dtype=["float16"]),
        r"^dtype=\['float16'\] is unknown",
    ),
    "a list of policies": (
        lambda compare: lora_init.allocate_ranks(made_up_statistics(tiny_llama()), policy=["eva"]),
        r"^policy=\['eva'\] is unknown",
    ),
    "half a text": (
        lambda compare: lora_init.replay(tiny_llama(), AutoTokenizer, n=1.5),
        "n=1.5, expected a whole number of at least 1",
    ),
    "no tokenizer to write with": (
        lambda compare: lora_init.replay(tiny_llama(), None), "tokenizer=None: expected the model's",
    ),
    "one prompt to watch": (
        lambda compare: lora_init.ServingWatch(word_tokenizer(), "the cat", ask),
        "prompts='the cat': expected a list of texts or chats",
    ),
    "a number to watch": (
        lambda compare: lora_init.ServingWatch(word_tokenizer(), [5], ask), "prompts has 5: expected texts, or chats",
    ),
    "None to watch": (
        lambda compare: lora_init.ServingWatch(word_tokenizer(), ["the cat", None], ask),
        "prompts has None: expected texts, or chats",
    ),
    "a watch without a tokenizer": (
        lambda compare: lora_init.ServingWatch(None, ["the cat"], ask), "tokenizer=None: expected the model's",
    ),
    "a task of no name": (
        lambda compare: lora_init.find_targets(tiny_llama(), task_type=["CAUSAL_LM"]), "task_type=.'CAUSAL_LM'., exp",
    ),
    "nothing to watch": (lambda compare: lora_init.ServingCallback(5), "watch=5: a ServingWatch is needed"),
    "the loss of a name": (
        lambda compare: lora_init.mean_loss("llama", []), "mean_loss.. takes a model in this place and got str",
    ),
    "the loss without labels": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [{"input_ids": torch.ones(1, 4).long()}]),
        "a batch has no labels, so its loss is unknown. Give it labels, or pass loss=",
    ),
    "angles of two spaces": (
        lambda compare: lora_init.principal_angles(torch.eye(3), torch.eye(4)), r"got \[3, 3\], expected two tensors",
    ),
    "angles of lists": (
        lambda compare: lora_init.principal_angles([[1.0]], torch.eye(1)), "got list, expected two tensors",
    ),
    "the class of an executor": (
        lambda compare: compare(executor=ThreadPoolExecutor), "and got the class ThreadPoolExecutor",
    ),
    "a tensor for starts": (lambda compare: compare(starts=torch.tensor(3)), "starts=tensor.3.: expected names, or"),
    "a table for rates": (
        lambda compare: compare(learning_rates=torch.ones(2, 2)), "learning_rates=.*1.0.*: expected numbers",
    ),
    "a table for alpha": (lambda compare: compare(lora_alpha=np.ones(3)), "lora_alpha=array.*, expected a num"),
    "a list for a sweep": (lambda compare: compare(sweep=["full"]), "sweep=.'full'. is unknown"),
    "shares of a graphics card": (lambda compare: compare(gpus_per_run=np.ones(2)), "gpus_per_run=array.*: expected"),
    "more seeds than there are": (lambda compare: compare(seeds=10**20), "seeds=10*, expected a whole number"),
    "a chat without a turn": (
        lambda compare: lora_init.ServingWatch(word_tokenizer(), [[]], ask), "prompts has ..: expected texts, or chats",
    ),
    "a rate of its own for a callback": (
        lambda compare: lora_init.StartCallback(learning_rate=np.ones(2)), "learning_rate=array.*: 'measured'",
    ),
    "a tensor for layers": (
        lambda compare: lora_init.find_targets(tiny_llama(), torch.tensor(3)), "target_modules=tensor.3.: expected",
    ),
    "no list of starts": (lambda compare: compare(starts=5), "starts=5: expected names, or pairs of a name and an"),
    "code as a text": (
        lambda compare: compare(trust_remote_code="no"), "trust_remote_code='no', expected True or False",
    ),
    "no text to keep": (
        lambda compare: compare(retain_data="a.jsonl", retain_samples=-1), "retain_samples=-1, expected a whole",
    ),
    "a column as a number": (lambda compare: compare(label=3), "label=3, expected a text"),
    "a seed of a split as a text": (lambda compare: compare(data_seed="x"), "data_seed='x', expected a whole number"),
    "nowhere to say it": (lambda compare: compare(say=None), "say= is None, expected a function of .text."),
    "a seed to write by": (
        lambda compare: lora_init.replay(tiny_llama(), word_tokenizer(), seed="1"), "seed='1', expected a whole number",
    ),
    "nowhere to say what is written": (
        lambda compare: lora_init.replay(tiny_llama(), word_tokenizer(), say=5), "say= is 5, expected a function",
    ),
    "a number for starts": (lambda compare: compare(starts=[5]), "starts has 5: expected names, or pairs of a name"),
    "half a step of a run": (lambda compare: compare(steps=1.5), "steps=1.5, expected a whole number of at least 1"),
    "rates taken away": (lambda compare: compare(extend=-1), "extend=-1, expected a whole number of at least 0"),
    "a word for a share": (lambda compare: compare(warmup="0.1"), "warmup='0.1': expected a share of the steps"),
    "a word for batches": (
        lambda compare: compare(statistics_batches="8"), "statistics_batches=.'8'.: expected numbers of batches",
    ),
    "one point beyond the end": (
        lambda compare: compare(evaluation_points=9), "evaluation_points=.0, 6, 9.: expected rising steps from 0 to 6",
    ),
    "a word for a switch": (
        lambda compare: lora_init.initialize(tiny_llama(), ROWS, freeze_a="no"), "freeze_a='no', expected True or Fal",
    ),
    "a truth value for a number": (
        lambda compare: lora_init.collect(tiny_llama(), [], skip_bad_batches=True),
        "skip_bad_batches=True, expected a whole number",
    ),
    "numbers for functions": (
        lambda compare: lora_init.find_step_size(tiny_llama(), 5, 5), r"build is 5, expected a function of \(gamma\)",
    ),
    "text for nothing": (
        lambda compare: lora_init.dial(trained(), strength=0.5, tokenizer=AutoTokenizer), "measures nothing: leave",
    ),
    "fractions for tokens": (
        lambda compare: lora_init.collect(tiny_llama(), [{"input_ids": torch.ones(2, 4)}]),
        r"input_ids of the batch are torch.float32 \[2, 4\], expected whole numbers",
    ),
    "truth values for tokens": (
        lambda compare: lora_init.collect(tiny_llama(), [{"input_ids": torch.ones(2, 4, dtype=torch.bool)}]),
        r"input_ids of the batch are torch.bool \[2, 4\], expected whole numbers \[batch, length\] in int64",
    ),
    "no tokens": (
        lambda compare: lora_init.collect(tiny_llama(), [{"input_ids": torch.ones(2, 0, dtype=torch.int64)}]),
        r"input_ids of the batch are torch.int64 \[2, 0\], expected whole numbers",
    ),
    "texts for tokens": (
        lambda compare: lora_init.collect(tiny_llama(), [{"input_ids": "the cat"}]), "input_ids of the batch are str",
    ),
    "one strength for all layers": (
        lambda compare: lora_init.dial(tiny_llama(), strength=0.5, uniform=True), "Leave uniform=True out",
    ),
    "the loss of a file": (
        lambda compare: lora_init.mean_loss(tiny_llama(), Path("rows.jsonl")), "got a PosixPath for the batches",
    ),
    "the loss of one batch": (
        lambda compare: lora_init.mean_loss(tiny_llama(), TOKENS), "mean_loss.. got a dict for the batches, expected",
    ),
    "the loss of texts": (
        lambda compare: lora_init.mean_loss(tiny_llama(), ["the cat"]), "mean_loss.. got texts for the batches",
    ),
    "the loss of texts of a loader": (
        lambda compare: lora_init.mean_loss(tiny_llama(), iter(["the cat"])), "the batch holds no input of Llama",
    ),
    "the loss of lists of batches": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [[TOKENS]]), "a batch is a list of batches. Pass all of th",
    ),
    "a pass over lists of batches": (
        lambda compare: lora_init.collect(tiny_llama(), [[TOKENS]]), "batch 0: a batch is a list of batches. Pass all",
    ),
    "a start from lists of batches": (
        lambda compare: lora_init.initialize(tiny_llama(), [[TOKENS]]), "batch 0: a batch is a list of batches. Pass",
    ),
    "the loss of strange tokens": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [TOKENS, STRANGE]),
        "batch 1: .*Has it a token or a label that is not in the model's vocabulary",
    ),
    "the loss of a strange label": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [TOKENS | {"labels": STRANGE["labels"]}]),
        "batch 0: .*Has it a token or a label that is not in the model's vocabulary",
    ),
    "the loss of fewer labels than tokens": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [TOKENS | {"labels": TOKENS["labels"][:, 1:]}]),
        r"labels of the batch are torch.int64 \[\d, \d+\], expected \[\d, \d+\] as input_ids, in int64",
    ),
    "the loss of labels in 32 bits, of several devices": (
        lambda compare: lora_init.mean_loss(
            torch.nn.DataParallel(tiny_llama()), [TOKENS | {"labels": TOKENS["labels"].int()}]
        ),
        "labels of the batch are torch.int32 .*, in int64",
    ),
    "the loss of labels that are turned": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [TOKENS | {"labels": TOKENS["labels"].T}]),
        r"labels of the batch are torch.int64 \[\d+, \d+\], expected \[\d+, \d+\] as input_ids",
    ),
    "the loss of labels in 8 bits": (
        lambda compare: lora_init.mean_loss(tiny_llama(), [TOKENS | {"labels": TOKENS["labels"].to(torch.uint8)}]),
        "labels of the batch are torch.uint8 .*, in int64",
    ),
    "gradients of fractions for labels": (
        lambda compare: lora_init.collect(
            tiny_llama(), [TOKENS | {"labels": TOKENS["labels"].float()}], gradients=True
        ),
        "batch 0: labels of the batch are torch.float32 .*, in int64",
    ),
    "a dial by fewer labels than tokens": (
        lambda compare: lora_init.dial(trained(), [TOKENS | {"labels": TOKENS["labels"][:, 1:]}] * 6, [TOKENS] * 6),
        "labels of the batch are torch.int64 .* as input_ids",
    ),
    "a language model for a classifier": (
        lambda compare: lora_init.initialize(tiny_llama(), [TOKENS], task_type="SEQ_CLS"),
        "task_type='SEQ_CLS' trains a head, and LlamaForCausalLM has none. Leave it out, or load a model that has",
    ),
    "a dial by nothing": (
        lambda compare: lora_init.dial(trained(), True, []), r"dial\(\) got a bool for the batches, expected",
    ),
    "a dial by texts": (
        lambda compare: lora_init.dial(trained(), iter(["the cat"]), []), "batches: a batch is a str, expected a mapp",
    ),
    "a dial by strange tokens": (
        lambda compare: lora_init.dial(trained(), [STRANGE] * 6, [TOKENS] * 6),
        "a batch: .*Has it a token or a label that is not in the model's vocabulary",
    ),
    "a word for a seed": (
        lambda compare: lora_init.dial(trained(), [TOKENS], [TOKENS], seed="1"), "seed='1', expected a whole number",
    ),
    "a name for a model to start": (
        lambda compare: lora_init.initialize("llama", [TOKENS]), r"initialize\(\) takes a model .* Load it by from_pre",
    ),
    "a number for a model to start": (
        lambda compare: lora_init.initialize(5, [TOKENS]), r"initialize\(\) takes a model in this place and got int",
    ),
    "a name for a model to correct": (
        lambda compare: lora_init.correct_base("llama", "a"), r"correct_base\(\) takes a model .* Load it by from_pre",
    ),
    "a name for a model to look through": (
        lambda compare: lora_init.find_targets("llama"), r"find_targets\(\) takes a model in this place and got str",
    ),
    "no directory for runs": (
        lambda compare: lora_init.compare("llama", "rows.jsonl", None), "output is needed, as a path, and got NoneType",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_a_call_says_in_one_line_what_is_wrong(case, home, tmp_path, monkeypatch):
    call, line = CALLS[case]
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("a model was loaded"))

    def compare(**changes):
        return lora_init.compare(str(home / "llama"), home / "rows.jsonl", tmp_path / "out", **SMALL | changes)

    refused(line, call, compare)
