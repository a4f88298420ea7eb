"""What `init`, a dry run and the outlook of a comparison print: each line, and what each fact changes."""

import io
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

from lora_init.cli.compare import show_comparison, show_outlook
from lora_init.cli.console import running
from lora_init.cli.dry_run import show_estimate
from lora_init.cli.summary import show_bank_summary, show_summary
from tests.printed import changed, printed

MADE = dict(
    adapter="out", method="eva", ranks={"a": 4, "b": 8, "c": 0}, lora_alpha=16.0, scaling=2.0, parameters=12345,
    train="Train at 1e-3.", correction=None, megabytes=1.26, megabytes_at_one_rank=2.5, serving="vLLM takes it.",
    load="by PEFT", notes=["a note"], next="train it",
)  # fmt: skip
FROM_BANK = dict(
    adapter="out", neighbours=[{"said": name} for name in ("first", "second", "third", "fourth")], gamma=0.5,
    weights={"a": 0.75, "b": -0.25}, loss_before=2.5, loss_at_start=2.25, parameters=12345, next="train it",
)  # fmt: skip
ESTIMATE = dict(
    layers=14, unsupported={}, parameters=12345, rank=8, data="chat", batches=32, tokens=65536, weights_bytes=2.5e9,
    statistics_bytes=2e7, offloaded_bytes_read=8e10, operations=3.21e13, operations_per_second=1.5e11, seconds=300.0,
)  # fmt: skip
OUTLOOK = dict(
    swept=[0, 1], others=[2, 3, 4], data="chat, 800 rows", n_runs=16, ended=3, may_add={}, seconds=3600.0,
    most_seconds=3600.0, dial_seconds=0.0, pace=dict(step=0.0123), detectable={3: 0.02, 5: 0.01, 8: 0.005},
    scatter=0.003,
    starts=[dict(name="random", own_rate=None, rates=[1e-4, 1e-3], runs=7),
            dict(name="eva", own_rate=3e-4, rates=[1e-4, 3e-4], runs=9)],
)  # fmt: skip
WHOLE = {
    "init": (show_summary, MADE, """
        out: eva, rank 4 to 8 (average 6) in 2 of 3 layers, lora_alpha 16 (scaling 2), 12,345 parameters.
        Train at 1e-3.
        1.3 MB. vLLM takes it. `export` makes 2.5 MB of it at one rank, 1.3 MB with --keep-ranks.
        Load it: by PEFT
        note: a note
        Ranks, data and what they capture: lora-init inspect out
        Next: train it"""),
    "from a bank": (show_bank_summary, FROM_BANK, """
        nearest first
        second
        third
        weights +0.75 a, -0.25 b
        size 2 x the update
        loss 2.5000 -> 2.2500 before any training
        parameters 12,345
        adapter out
        Next: train it"""),
    "dry run of init": (show_estimate, ESTIMATE, """
        layers 14 take an adapter
        parameters 12,345 at rank 8 everywhere
        data chat
        pass 32 batches at most, 65,536 tokens
        memory weights 2.50 GB, statistics 0.02 GB, and the activations of one batch
        offloaded 80.00 GB to read, the weights once a batch, if device_map leaves them on disk
        work 32.10 TFLOP in matrix products
        time 200 to 450 s on an idle machine at 150 GFLOP/s, several times that beside other work"""),
    "dry run of compare": (show_outlook, OUTLOOK, """
        start learning rates on seeds 0, 1 on seeds 2 to 4 runs
        random 1e-4 1e-3 the best 7
        eva 1e-4 3e-4* the best and 3e-4* 9
        * is the measured rate, as init prints it.
        Data: chat, 800 rows.
        16 runs, 3 ended.
        Time: about 1 h; a step takes 0.012 s.
        Detectable at best: with 5 seeds 1.0 %, with 8 seeds 0.50 % of the loss, where runs scatter by 0.30 % \
as ours did."""),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_each_line_is_printed_in_its_place(kind):
    view, about, expected = WHOLE[kind]
    assert printed(view, about) == [line.strip() for line in expected.strip().splitlines()]


FIRST, SIZE = (line.strip() for line in WHOLE["init"][2].strip().splitlines()[::2][:2])
CORRECTION = dict(errors={"a": (1.0, 0.5), "b": (2.0, 0.2)}, losses=dict(float=2.0, quantised=None, corrected=None),
                  share_closed=None)  # fmt: skip
ERRORS = (
    "error of layers: 30% of the error of the quantized weights is left (median), 10% at least (b), 50% at most (a)"
)
RAISED = dict(float=2.0, quantised=2.0, corrected=1.9)
ALONE = dict(starts=[OUTLOOK["starts"][0]])
RUNS, TIME = "16 runs, 3 ended.", "Time: about 1 h; a step takes 0.012 s."
SHOWN = WHOLE["dry run of compare"][2].splitlines()[-1].strip()
CHANGES = {
    "one rank": (show_summary, MADE, dict(ranks={"a": 4, "b": 4}), [FIRST, SIZE], [
        FIRST.replace("4 to 8 (average 6) in 2 of 3", "4 in 2 of 2"), "1.3 MB. vLLM takes it."]),
    "corrected": (show_summary, MADE, dict(correction=CORRECTION), [], [
        "loss: not measured: without DATA no examples are set aside", ERRORS]),
    "corrected in vain": (show_summary, MADE, dict(correction=CORRECTION | dict(losses=RAISED)), [], [
        "loss: 2 in float, 2 quantised, 1.9 corrected: quantization does not raise it", ERRORS]),
    "of prompts": (show_bank_summary, FROM_BANK, dict(weights={}), ["weights +0.75 a, -0.25 b"], [
        "weights none: generated from the prompts"]),
    "no labels": (show_bank_summary, FROM_BANK, dict(loss_before=None), ["loss 2.5000 -> 2.2500 before any training"], [
        "loss not measured: no labelled examples"]),
    "unsupported": (show_estimate, ESTIMATE, dict(unsupported={"a": "Embedding", "b": "Embedding"}), [
        "layers 14 take an adapter"], ["layers 14 take an adapter, 2 keep PEFT's own start"]),
    "no data": (show_estimate, ESTIMATE, dict(data=None), ["data chat"], [
        "data none: the statistics file is used as it is"]),
    "added": (show_outlook, OUTLOOK, dict(may_add=dict(rates=4, seeds=0, longer=2)), [RUNS], [
        "16 runs, 3 ended; at most 4 more at rates beside a best one at the edge, 2 more of random for twice the "
        "steps, if a start is better."]),
    "added seeds": (show_outlook, OUTLOOK, dict(may_add=dict(rates=0, seeds=3, longer=0)), [RUNS], [
        "16 runs, 3 ended; at most 3 more on seeds that are added where they still decide."]),
    "more time": (show_outlook, OUTLOOK, dict(most_seconds=7200.0, dial_seconds=600.0), [TIME], [
        "Time: about 1 h to 2 h, 10 min of it to evaluate adapters at several strengths (--no-dial leaves it out); a "
        "step takes 0.012 s."]),
    "no measured rate": (show_outlook, OUTLOOK, ALONE, [
        "eva 1e-4 3e-4* the best and 3e-4* 9", "* is the measured rate, as init prints it."], []),
    "one seed": (show_outlook, OUTLOOK | ALONE, dict(swept=[3], others=[]), [
        "start learning rates on seeds 0, 1 on seeds 2 to 4 runs", "random 1e-4 1e-3 the best 7", SHOWN], [
        "start learning rates on seed 3 runs", "random 1e-4 1e-3 7", "One seed shows no difference. Take 5."]),
    "odd seeds": (show_outlook, OUTLOOK, dict(others=[2, 3, 5]), [
        "start learning rates on seeds 0, 1 on seeds 2 to 4 runs"], [
        "start learning rates on seeds 0, 1 on seeds 2, 3, 5 runs"]),
    "random alone": (show_outlook, OUTLOOK, dict(detectable={3: 0.02}), [SHOWN], ["Nothing is compared with random."]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_a_fact_changes_its_own_lines_and_no_other(case):
    view, about, changes, gone, come = CHANGES[case]
    assert changed(view, about, changes) == (gone, come)


def test_a_note_that_was_a_warning_is_not_printed_again(monkeypatch):
    monkeypatch.setattr(running, "warned", {"a note"})
    assert "note: a note" not in printed(show_summary, MADE)


def test_a_comparison_says_all_that_was_found_in_its_order(monkeypatch):
    tables = {"differences": pd.DataFrame([{"start": "eva[1]", "loss": "2 %"}]), "runs": pd.DataFrame([{"start": "x"}])}
    monkeypatch.setattr("lora_init.comparison.tables.run_tables", lambda summary: tables)
    found = SimpleNamespace(
        answer="answer", caveats=["caveat"], notes=["note [b]"], facts="facts", headroom="headroom",
        headline="headline",
        verdicts=[SimpleNamespace(sentence="verdict")], as_recommended=["recommended"], equal_time=["time"],
        forgetting=["forgets"], data_needed=["data"], command="lora-init compare",
    )  # fmt: skip
    assert printed(show_comparison, found) == [
        "answer", "note: caveat", "note: note [b]", "", "facts", "headroom", "headline", "verdict", "recommended",
        "time", "forgets", "data", "", "", "differences", "start loss", "eva[1] 2 %", "", "lora-init compare",
    ]  # fmt: skip


def test_names_rates_and_numbers_of_an_outlook_stay_whole_where_the_width_is_short():
    rates = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    starts = [dict(name="natural-gradient", own_rate=1e-4, rates=rates, runs=7),
              dict(name="eva[bold]", own_rate=3e-4, rates=rates, runs=12345)]  # fmt: skip
    out = io.StringIO()
    show_outlook(Console(file=out, width=44), OUTLOOK | dict(starts=starts, data="[b]chat[/b], " + "many rows " * 9))
    table, text = out.getvalue().split("* is the measured rate")
    words = table.split()
    for name in ("natural-gradient", "1e-5", "3e-5", "1e-4*", "3e-4", "1e-3", "3e-3", "3e-4*", "7", "12345"):
        assert name in words, table
    lines = table.splitlines()
    ends = [line.index(number) + len(number) for number in (" 7", "12345") for line in lines if number in line]
    assert len({*ends}) == 1, table
    assert f"Data: [b]chat[/b], {'many rows ' * 9}." in text.splitlines()


def test_a_command_for_a_directory_can_be_typed_as_it_is_printed():
    *_, line, _ = printed(show_summary, MADE | dict(adapter="my out[b]"))
    assert line == "Ranks, data and what they capture: lora-init inspect 'my out[b]'"
