"""`lora-init ranks` from a statistics file: what it prints, writes and refuses."""

import json
import runpy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

from lora_init.building.build import build_adapter
from lora_init.cli import ranks as ranks_command
from lora_init.cli.app import app
from lora_init.cli.ranks import PlanOptions, _kinds_table, read_overrides
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.planning.allocate import allocate_ranks
from lora_init.planning.budgets import COVERAGES
from lora_init.planning.plan import load_plan
from lora_init.statistics.statistics import Statistics
from tests.conftest import batches_for, refused, tiny_llama
from tests.printed import printed


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    collect(tiny_llama(), batches_for("llama"), rank=4, rho=2.0, data="random tokens").save(path)
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["ranks", *map(str, arguments)], env={"COLUMNS": "100"})
    assert result.exit_code == code, result.output
    return result


def test_the_options_are_those_of_allocate_ranks(file, tmp_path):
    plan_file = tmp_path / "plan.json"
    run(
        file, "--parameters", "4k", "--policy", "cost-aware", "--rho", 1.5, "--min-rank", 1, "--max-rank", 6,
        "--tie", "q_proj,k_proj,v_proj", "--tie", "gate_proj, up_proj", "--override", "*.down_proj:max_rank=2",
        "--exclude", "layers.1.self_attn.o_proj", "--output", plan_file,
    )  # fmt: skip
    expected = allocate_ranks(
        Statistics.load(file), parameters="4k", policy="cost-aware", rho=1.5, min_rank=1, max_rank=6,
        tie=[("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")], overrides={"*.down_proj": {"max_rank": 2}},
        exclude="layers.1.self_attn.o_proj",
    )  # fmt: skip
    plan = load_plan(plan_file)
    assert dict(plan) == dict(expected) and plan.rank == expected.rank
    assert plan.parameters <= 4000


def test_it_prints_the_plan(file):
    text = run(file, "--rank", 4, "--rho", 2).stdout
    plan = allocate_ranks(Statistics.load(file), rank=4, rho=2)
    words = " ".join(text.split())
    for part in (
        "q_proj", "policy eva, budget rank=4", "56 of 56 ranks (100.00%)", "random tokens",
        f"total rank {plan.total_rank}", f"parameters {plan.parameters:,}", f"MB in float32 {plan.megabytes():.2f}",
        f"variance explained, mean {plan.explained_variance:.1%}",
    ):  # fmt: skip
        assert part in words, part
    assert text.splitlines()[-2].startswith("PEFT and vLLM (--max-lora-rank 8) take this adapter as it is. SGLang,")
    assert text.splitlines()[-1].startswith("Next: lora-init init MODEL --statistics")
    assert ", SGLang, llama.cpp, Ollama, TGI and LoRAX take" in run(file, "--rank", 8).stdout


def test_it_compares(file):
    lines = run(
        file, "--rank", 4, "--compare", "uniform", "--compare", "parameters=3k,policy=cost-aware"
    ).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "plan",
        "rank=4",
        "uniform",
        "parameters=3k,policy=cost-aware",
        "Next:",
    ]
    plan = allocate_ranks(Statistics.load(file), rank=4)
    assert lines[1].split()[4] == f"{plan.parameters:,}" and lines[1].split()[7] == f"{plan.explained_variance:.2%}"
    rows = json.loads(run(file, "--rank", 4, "--compare", "uniform", "--json").stdout)
    assert [row["policy"] for row in rows] == ["eva", "uniform"]
    assert {layer["rank"] for layer in rows[1]["layers"].values()} == {4}


def test_snippets_go_to_stdout_and_messages_do_not(file, tmp_path):
    result = run(file, "--rank", 4, "--format", "axolotl", "--lora-alpha", 8, "--output", tmp_path / "p.json",
                 "--plot", tmp_path / "p.svg")  # fmt: skip
    assert yaml.safe_load(result.stdout)["lora_r"] == 4
    assert "p.json: written" in result.stderr and "p.svg: written" in result.stderr
    assert (tmp_path / "p.svg").stat().st_size > 1000
    options = ["--rank", 4, "--format", "llama-factory", "--output", tmp_path / "p.json", "--overwrite"]
    assert str(tmp_path / "p.json") in run(file, *options).stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["--rank", 4, "--parameters", "1M"], "--rank 4 and --parameters 1M are 2 budgets. Give one."),
    (["--rank", 0], "--rank 0: a whole number from 1"),
    (["--rank", 9], "Collect again with rank 9"),
    (["--exclude", "q_prj"], "--exclude q_prj matches no layer. Closest: q_proj"),
    (["--override", "down_proj"], "--override 'down_proj': write it like"),
    (["--override", "down_proj:max=8"], "overrides['down_proj']: 'max' is no limit. Choose from rank, min_rank"),
    (["--override", "down_proj:max_rank=x"], "max_rank='x', expected a whole number of at least 0"),
    (["--compare", "rho=x"], "--rho x, expected a number of at least 1"),
    (["--allowed-ranks", "8;16"], "--allowed-ranks '8;16': expected whole numbers separated by commas"),
    (["--compare", "best"], "--compare 'best': expected a policy, or a change such as 'rank=8'."),
    (["--compare", "size=3"], "--compare 'size=3': 'size' is unknown"),
    (["--compare", "rank="], "'rank=' is not of the form key=value"),
    (["--plot", "plan.pdf"], "pictures are written as"),
    (["--format", "peft", "--json"], "Leave --compare and --json out"),
    (["--rho", "inf"], "--rho inf, expected a number of at least 1"),
    (["--dtype", "bfloat16"], "--dtype is for --megabytes"),
    (["--coverage", "total", "--compare", "uniform"], "--coverage is for --variance"),
    (["--lora-alpha", 8], "--lora-alpha and --use-rslora are for --format"),
    (["--use-rslora", "--json"], "--lora-alpha and --use-rslora are for --format"),
    (["--format", "csv", "--lora-alpha", 8], "are for --format, but json and csv hold no scaling."),
    (["--format", "json", "--use-rslora"], "are for --format, but json and csv hold no scaling."),
    (["--variance", 0.5, "--rho", 2], "--rho does nothing with --variance or --policy uniform."),
    (["--rank", 4, "--policy", "uniform", "--rho", 2], "--rho does nothing with --variance or --policy uniform."),
    (["--variance", 0.5, "--policy", "uniform"], "--policy does nothing with --variance in every layer. Leave it out"),
    (["--format", "peft", "--lora-alpha", 0], "--lora-alpha 0, expected a number above 0"),
    (["--tie", "q_proj"], "ties nothing"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_1(file, arguments, message):
    result = run(file, *arguments, code=1)
    assert message in result.stderr and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_nothing_is_replaced_without_overwrite(file, tmp_path):
    statistics = file.read_bytes()
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\n")
    for output in (file, rows):
        for option in ("--output", "--plot"):
            name = output if option == "--output" else output.rename(output.with_suffix(".svg"))
            for more in ([], ["--overwrite"]):
                assert "is never replaced" in run(file, option, name, *more, code=1).stderr
            name.rename(output)
    assert file.read_bytes() == statistics and rows.read_text() == "prompt,completion\n"
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = (file, "--output", plan, "--plot", picture)
    run(*arguments, "--rank", 2)
    before = plan.read_bytes(), picture.read_bytes()
    assert "pass --overwrite to replace this plan" in run(*arguments, "--rank", 3, code=1).stderr
    assert "pass --overwrite to replace this PNG picture" in run(file, "--plot", picture, code=1).stderr
    assert (plan.read_bytes(), picture.read_bytes()) == before
    run(*arguments, "--rank", 3, "--overwrite")
    assert load_plan(plan).rank == 3 and picture.read_bytes() != before[1]
    assert "both name" in run(file, "--output", "a.svg", "--plot", "a.svg", code=1).stderr


@pytest.mark.slow
def test_the_example_plans_with_and_without_a_file(file, tmp_path, monkeypatch, capfd):
    script = Path(__file__).parents[2] / "examples" / "rank_budget.py"
    for arguments in ([], [str(file), "2k", "3k"]):
        monkeypatch.setattr("sys.argv", [str(script), *arguments, "--output", str(tmp_path)])
        runpy.run_path(str(script), run_name="__main__")
        out = capfd.readouterr().out
        assert "cost-aware" in out and "an adapter of" in out
        plan = load_plan(tmp_path / "plan.json")
        assert f"{plan.parameters:,} parameters" in out
        assert yaml.safe_load((tmp_path / "axolotl.yaml").read_text())["lora_r"] in (plan.rank, max(plan.values()))
        assert (tmp_path / "plan.svg").stat().st_size > 10_000


def test_each_row_of_a_comparison_shows_how_many_more_parameters_it_has(file):
    shown = run(file, "--rank", 2, "--rho", 2, "--compare", "uniform", "--compare", "rank=4,policy=uniform").stdout
    asked = (dict(rank=2), dict(rank=2, policy="uniform"), dict(rank=4, policy="uniform"))
    first, *others = (allocate_ranks(Statistics.load(file), rho=2.0, **one).parameters for one in asked)
    heads, *rows, _ = shown.splitlines()
    assert "to first" in heads
    for row, parameters in zip(rows, [first, *others], strict=True):
        assert f" {parameters / first - 1:+.1%} " in row


def test_the_table_of_kinds_says_where_ranks_and_parameters_go(file):
    stats = Statistics.load(file)
    names = [name for name in stats if name.endswith(("q_proj", "down_proj"))]
    (a, b), (c, d) = ([name for name in names if name.endswith(kind)] for kind in ("q_proj", "down_proj"))
    plan = replace(
        allocate_ranks(stats, rank=2), ranks=dict.fromkeys(stats, 0) | {a: 3, b: 3, c: 2, d: 5},
        targets={name: stats.targets[name] for name in stats},
    )  # fmt: skip
    rows = {row["layers"]: row for row in _kinds_table(plan).rows}
    cost = {name: sum((stats.targets[name].in_features, stats.targets[name].out_features)) for name in names}
    assert plan.parameters == 3 * cost[a] + 3 * cost[b] + 2 * cost[c] + 5 * cost[d]
    for kind, rank, total, parameters in (
        ("q_proj", "3", "6", 6 * cost[a]), ("down_proj", "2-5", "7", 7 * cost[c]),
    ):  # fmt: skip
        row = next(row for name, row in rows.items() if kind in name)
        assert (row["count"], row["rank"], row["total rank"]) == ("2", rank, total)
        assert row["parameters"] == f"{parameters:,}" and row["share"] == f"{parameters / plan.parameters:.1%}"


def test_a_pattern_that_is_given_twice_has_the_limits_of_both():
    read = read_overrides(["*.v:max_rank=8", "*.q:max_rank=2", "*.v:multiple_of=4", "*.v:max_rank=6"])
    assert read == {"*.v": {"max_rank": 6, "multiple_of": 4}, "*.q": {"max_rank": 2}}


@pytest.mark.parametrize(("texts", "said"), [
    (["*.v"], "--override '*.v': write it like '*.down_proj:max_rank=8'."),
    ([" :max_rank=8"], "--override ' :max_rank=8': write it like '*.down_proj:max_rank=8'."),
    (["*.v:max_rank"], "--override '*.v:max_rank': 'max_rank' is not of the form key=value."),
    (["*.v:max_rank= "], "--override '*.v:max_rank= ': 'max_rank=' is not of the form key=value."),
])  # fmt: skip
def test_a_limit_has_a_pattern_a_key_and_a_value(texts, said):
    with pytest.raises(LoraInitError) as caught:
        read_overrides(texts)
    assert str(caught.value) == said


def test_values_of_limits_are_numbers_where_they_can_be():
    texts = [" *.v : max-rank = 8 ,rho=1.5,allowed_ranks=8/16", "*.q:max_rank=²,min_rank=x,rho=1e1"]
    assert read_overrides(texts) == {
        "*.v": {"max_rank": 8, "rho": 1.5, "allowed_ranks": (8, 16)},
        "*.q": {"max_rank": "²", "min_rank": "x", "rho": 10.0},
    }
    assert ranks_command._number("9" * 5000) == "9" * 5000  # which Python reads as no number


BASE = {"rank": None, "total_rank": 5, "policy": "eva", "rho": 2.0}


@pytest.mark.parametrize(("text", "expected"), [
    ("uniform", BASE | {"policy": "uniform"}), ("rho=1", BASE | {"rho": 1}),
    ("megabytes=0.5,policy=uniform", {"megabytes": 0.5, "policy": "uniform", "rho": 2.0}),
    ("rank=3", {"rank": 3, "policy": "eva", "rho": 2.0}), ("min-rank=1", BASE | {"min_rank": 1}),
])  # fmt: skip
def test_a_variant_changes_what_it_names_and_a_budget_takes_the_place_of_the_other(text, expected):
    assert ranks_command.read_variants([text], BASE) == {text: expected} and BASE["total_rank"] == 5


@pytest.mark.parametrize(("key", "value", "read"), [
    ("total-rank", "9", 9), ("parameters", "2.5M", "2.5M"), ("fraction", "0.01", 0.01), ("variance", "0.5", 0.5),
    ("dtype", "bfloat16", "bfloat16"), ("coverage", "total", "total"), ("policy", "uniform", "uniform"),
    ("max-rank", "8", 8), ("multiple-of", "4", 4), ("allowed-ranks", "8/16", (8, 16)),
])  # fmt: skip
def test_each_limit_of_a_plan_can_be_varied(key, value, read):
    assert ranks_command.read_variants([f"{key}={value}"], BASE)[f"{key}={value}"][key.replace("-", "_")] == read


@pytest.mark.parametrize("words", [
    "--megabytes 0.01 --dtype float16 --compare rank=2", "--rank 2 --dtype float16 --compare megabytes=0.01",
    "--variance 0.2 --coverage total --compare rank=2", "--rank 2 --coverage total --compare variance=0.2",
])  # fmt: skip
def test_what_one_of_several_plans_reads_may_be_given(words, file):
    assert "rank=2" in run(file, *words.split()).output


@pytest.mark.parametrize(("text", "said"), [
    ("unifrom", "--compare 'unifrom': expected a policy, or a change such as 'rank=8'. Did you mean uniform? Choose"),
    ("tie=1", "--compare 'tie=1': 'tie' is unknown. "), ("rank", "--compare 'rank': expected a policy"),
])  # fmt: skip
def test_a_variant_that_is_none(text, said):
    with pytest.raises(LoraInitError) as caught:
        ranks_command.read_variants([text], BASE)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("changes", "spent"), [
    ({}, "56 of 56 ranks (100.00%)"), ({"parameters": "4k", "rank": None}, None),
    ({"variance": 0.5, "rank": None}, "least"), ({"variance": 0.5, "rank": None, "coverage": "total"}, "total"),
])  # fmt: skip
def test_what_a_plan_spends_is_said_in_the_unit_of_its_budget(file, changes, spent):
    plan = allocate_ranks(Statistics.load(file), **{"rank": 4, "rho": 2.0} | changes)
    variance = f"{plan.total_rank:,} ranks for {plan.spent:.2%} of the variance{{}}; 50.00% asked for"
    expected = {
        None: f"{plan.parameters:,} of 4,000 parameters ({plan.parameters / 4000:.2%})", "total": variance.format(""),
        "least": variance.format(" of the layer with least"),
    }.get(spent, spent)  # fmt: skip
    assert ranks_command._spent(plan) == expected
    assert ranks_command._spent(replace(plan, budget=None)) == "by hand"


def test_a_row_of_a_comparison_has_each_figure_of_its_plan(file):
    stats = Statistics.load(file)
    excluded = allocate_ranks(stats, rank=4, rho=2.0, exclude=["q_proj"])
    plans = {"first": allocate_ranks(stats, rank=2, policy="uniform"), "other": excluded}
    first, other = ranks_command.comparison_table(plans).rows
    assert first == {
        "plan": "first", "rank": "2", "layers": "14", "total": "28", "params": f"{plans['first'].parameters:,}",
        "to first": "+0.0%", "MB": f"{plans['first'].parameters * 4 / 1e6:.2f}",
        "explained": f"{plans['first'].explained_variance:.2%}",
        "least": f"{min(plans['first'].explained.values()):.1%}",
    }  # fmt: skip
    used = {name: rank for name, rank in excluded.items() if rank}
    least = min(excluded.explained[name] for name in used)
    assert (other["rank"], other["layers"], other["least"]) == (
        f"{min(used.values())}-{max(used.values())}", str(len(used)), f"{least:.1%}",
    )  # fmt: skip
    assert other["to first"] == f"{excluded.parameters / plans['first'].parameters - 1:+.1%}" and len(used) == 12
    totals = ranks_command._totals(excluded)
    assert totals == {
        "layers with an adapter": "12 of 14", "rank": f"{min(used.values())} to {max(used.values())}",
        "total rank": f"{sum(used.values()):,}", "parameters": f"{excluded.parameters:,}",
        "MB in float32": f"{excluded.parameters * 4 / 1e6:.2f}",
        "MB in bfloat16": f"{excluded.parameters * 2 / 1e6:.2f}",
        "variance explained, mean": f"{excluded.explained_variance:.1%}",
    }  # fmt: skip
    uniform = allocate_ranks(stats, total_rank=excluded.total_rank, policy="uniform", exclude=["q_proj"])
    rows = ranks_command.totals_against_uniform(excluded, stats)
    assert rows == [(name, text, ranks_command._totals(uniform)[name]) for name, text in totals.items()]


@pytest.mark.parametrize(("arguments", "label"), [
    ({}, "rank=7"), ({"rank": 4}, "rank=4"), ({"parameters": "1M"}, "parameters=1M"),
    ({"variance": 0.5, "policy": "uniform"}, "variance=0.5,policy=uniform"),
])  # fmt: skip
def test_the_plan_of_the_options_is_named_as_a_variant_is(arguments, label):
    every = dict.fromkeys(ranks_command._BUDGETS) | {"policy": "eva"} | arguments
    assert ranks_command._label(every, 7) == label


@pytest.mark.parametrize(("model", "plan", "words"), [
    ("tiny", None, "lora-init init tiny --statistics 'my s' -o adapter"),
    ("", Path("my plan"), "lora-init init MODEL --statistics 'my s' --ranks 'my plan' -o adapter"),
])  # fmt: skip
def test_the_next_command_names_the_plan_if_there_is_a_file_of_it(model, plan, words):
    assert ranks_command._init_command(model, Path("my s"), plan) == words


def test_both_coverages_can_be_asked_for():
    assert get_args(ranks_command.Coverage) == COVERAGES


def test_options_that_are_not_given_are_what_allocate_ranks_has():
    assert PlanOptions().arguments() == {
        **dict.fromkeys(("rank", "total_rank", "parameters", "fraction", "megabytes", "variance", "rho", "max_rank")),
        "dtype": "float32", "coverage": "every-layer", "policy": "eva", "min_rank": 0, "multiple_of": 1,
        "allowed_ranks": None, "tie": [], "uniform_per_kind": False, "exclude": [], "overrides": {},
    }  # fmt: skip
    given = PlanOptions(
        allowed_ranks="8,16", tie=["a, b"], exclude=["c"], dtype="float16", coverage="total"
    ).arguments()
    names = ("allowed_ranks", "tie", "exclude", "dtype", "coverage")
    assert [given[name] for name in names] == [[8, 16], [["a", "b"]], ["c"], "float16", "total"]


RHO = "--rho does nothing with --variance or --policy uniform."
POLICY = "--policy does nothing with --variance in every layer. Leave it out, or give a --coverage."


@pytest.mark.parametrize(("given", "changes", "said"), [
    ({"dtype": "float16"}, [{}, {"megabytes": 1}], None), ({"coverage": "total"}, [{"variance": 0.5}, {}], None),
    ({"dtype": "float16"}, [{"variance": 0.5}], "--dtype is for --megabytes."), ({}, [{}], None),
    ({"coverage": "total"}, [{"megabytes": 1}], "--coverage is for --variance."),
    ({"rho": 2.0}, [{"policy": "uniform"}, {}], None), ({"rho": 2.0}, [{"policy": "uniform"}, {"variance": 0.5}], RHO),
    ({"policy": "greedy"}, [{"variance": 0.5}], POLICY), ({"policy": "greedy"}, [{"variance": 0.5}, {}], None),
    ({"policy": "greedy"}, [{"variance": 0.5, "coverage": "total"}], None),
])  # fmt: skip
def test_what_some_plans_read_needs_one_of_them(given, changes, said):
    plans = [{"policy": "eva", "coverage": "every-layer"} | change for change in changes]
    if said is None:
        ranks_command._check_unread(PlanOptions(**given), plans)
    else:
        refused(f"^{said}$", ranks_command._check_unread, PlanOptions(**given), plans)


@pytest.mark.parametrize("policy", ["eva", "uniform"])
def test_ranks_that_are_only_compared_with_do_not_warn(file, monkeypatch, policy):
    def warn(*arguments, **options):
        warnings.warn("few directions", stacklevel=2)
        return plan

    stats = Statistics.load(file)
    plan = allocate_ranks(stats, rank=2, policy=policy)
    monkeypatch.setattr("lora_init.planning.allocate.allocate_ranks", warn)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ranks_command.totals_against_uniform(plan, stats)
        assert not said
        warnings.warn("later", stacklevel=1)  # which is heard as before
    assert [str(one.message) for one in said] == ["later"]


def test_notes_of_a_plan_are_printed_as_they_are_written(file):
    stats = Statistics.load(file)
    plan = allocate_ranks(stats, rank=2)
    before = printed(ranks_command.show_plan, plan, stats)
    after = printed(ranks_command.show_plan, replace(plan, notes=("[b]one[/b]", "two")), stats)
    assert [line for line in after if line not in before] == ["note: [b]one[/b]", "note: two"]


@pytest.mark.parametrize(("options", "lora_alpha", "use_rslora", "path"), [
    ([], 8.0, False, "plan.json"), (["--lora-alpha", 6], 6.0, False, "plan.json"),
    (["--lora-alpha", 3, "--use-rslora"], 3.0, True, "plan.json"), (["--output", "my.json"], 8.0, False, "my.json"),
])  # fmt: skip
def test_a_tool_is_told_the_scaling_the_rate_and_where_the_plan_is(
    file, options, lora_alpha, use_rslora, path, tmp_path, monkeypatch
):
    asked = []

    def snippet(plan, tool, *arguments):
        asked.append((dict(plan), tool, *arguments))
        return "settings"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_init.planning.snippets.snippet", snippet)
    assert run(file, "--rank", 4, "--format", "peft", *options).stdout == "settings"
    stats = Statistics.load(file)
    plan = allocate_ranks(stats, rank=4)
    built = build_adapter(stats, plan, lora_alpha=lora_alpha, use_rslora=use_rslora)
    assert asked == [(dict(plan), "peft", lora_alpha, use_rslora, path, built.recommended, built.how_to_train)]


def test_a_tool_reads_one_plan(file):
    said = run(file, "--format", "peft", "--compare", "uniform", code=1)
    assert said.stderr == "error: --format prints one plan for one tool. Leave --compare and --json out.\n"


@pytest.mark.parametrize("options", [["--output", "plan.json"], ["--plot", "plan.svg"]])
def test_quiet_leaves_out_the_tables_of_what_was_written(file, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_init.plots.pictures.save_picture", lambda plan, stats, path: path)
    assert run(file, "-q", *options).stdout == ""
    assert "q_proj" in run(file, "-q").stdout  # what was asked for is printed


def test_a_picture_without_its_library_is_refused_before_anything_is_written(file, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_init.errors.find_spec", lambda name: None if name == "matplotlib" else name)
    said = run(file, "--output", tmp_path / "plan.json", "--plot", tmp_path / "plan.svg", code=1)
    assert "this needs matplotlib, which is not installed" in said.stderr and not [*tmp_path.iterdir()]
