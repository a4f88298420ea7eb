"""The tables of a report, cell by cell."""

import pytest

from lora_init.comparison.findings import summarise
from lora_init.comparison.tables import run_tables
from tests.comparisons import broken, exact, record, settings

TABLES = {
    "differences": """
        start | difference | in per cent | interval | detectable | of the headroom | pairs | verdict
        eva | −0.0200 | −9.5 % | −9.5 % to −9.5 % | 0.00 % | 50 % | 3 | better
        eva+2-batches | −0.0100 | −4.8 % | −4.8 % to −4.8 % | 0.00 % | 25 % | 3 | better
        pissa | +0.0100 | +4.8 % | +4.8 % to +4.8 % | 0.00 % | −25 % | 3 | worse
        olora | – | – | – | – | – | – | no statement
    """,
    "learning_rates": """
        start | 1e-5 | 1e-4 | 3e-4 | 1e-3 | 3e-3 | 1e-2
        random | – | 0.2300 | – | 0.2100* | 0.2200 | –
        random+120-steps | – | – | – | 0.1800* | – | –
        eva | – | 0.2100 | – | 0.1900* | 0.2000 | unstable, 2 of 3
        eva+2-batches | – | 0.2200 | – | 0.2000* | 0.2100 | –
        pissa | – | 0.2400 | – | 0.2200* | 0.2300 | failed
        olora | – | – | – | – | – | failed
        full | 0.1900 | 0.1700* | 0.1800 | – | – | –
    """,
    "best": """
    start | rate | lora_alpha | runs | mean loss | lowest to highest | steps to random's best | loss at step 0 | gamma
    random | 1e-3 | 16 | 3 | 0.2100 | 0.2000 to 0.2200 | 60, never, never | 2.3000 | –
    random+120-steps | 1e-3 | 16 | 3 | 0.1800 | 0.1700 to 0.1900 | 120, 120, 120 | 2.3000 | –
    eva | 1e-3 | 16 | 3 | 0.1900 | 0.1800 to 0.2000 | 20, 40, 60 | 2.3000 | 40, 41, 42
    eva+2-batches | 1e-3 | 16 | 3 | 0.2000 | 0.1900 to 0.2100 | 40, 60, never | 2.3000 | –
    pissa | 1e-3 | 16 | 3 | 0.2200 | 0.2100 to 0.2300 | never, never, never | 2.3000 | –
    full | 1e-4 | – | 3 | 0.1700 | 0.1600 to 0.1800 | 20, 20, 20 | 2.3000 | –
    """,
    "metrics": """
        start | accuracy | accuracy, start − random | macro F1 | macro F1, start − random | MCC | MCC, start − random
        random | 0.790 | – | 0.690 | – | 0.500 | –
        random+120-steps | 0.790 | −0.000 to +0.000 | 0.690 | −0.000 to +0.000 | 0.500 | −0.000 to +0.000
        eva | 0.810 | +0.020 to +0.020 | 0.710 | +0.020 to +0.020 | 0.600 | +0.100 to +0.100
        eva+2-batches | 0.800 | +0.010 to +0.010 | 0.700 | +0.010 to +0.010 | 0.500 | −0.000 to +0.000
        pissa | 0.780 | −0.010 to −0.010 | 0.680 | −0.010 to −0.010 | 0.500 | −0.000 to +0.000
        full | 0.830 | +0.040 to +0.040 | 0.730 | +0.040 to +0.040 | 0.500 | −0.000 to +0.000
    """,
    "cost": """
        start | parameters | scale of A | start, s | start, in steps | training, s | peak, MB
        random | 1,234 | 0.5774 | 0.0 | 0.0 | 60.0 | 2,503
        random+120-steps | 1,234 | 0.5774 | 0.0 | 0.0 | 60.0 | 2,503
        eva | 1,234 | 0.5774 | 20.0 | 20.0 | 60.0 | 2,503
        eva+2-batches | 1,234 | 0.5774 | 1.5 | 1.5 | 60.0 | 2,503
        pissa | 1,300 | 0.5774 | 1.5 | 1.5 | 60.0 | 2,503
        full | 5,000 | – | 1.5 | 1.5 | 60.0 | 2,503
    """,
    "forgetting": """
        start | retained before | retained after | change
        random | 3.0000 | 3.1000 | +0.1000
        random+120-steps | 3.0000 | 3.1000 | +0.1000
        eva | 3.0000 | 3.1000 | +0.1000
        eva+2-batches | 3.0000 | 3.1500 | +0.1500
        pissa | 3.0000 | 3.2000 | +0.2000
        full | 3.0000 | 3.1000 | +0.1000
    """,
}
DIALED = """
    start | rise on other text | start − random | interval
    random | +0.1000 | – | –
    eva | +0.0100 | −0.0900 | −0.0900 to −0.0900
    eva+2-batches | +0.1500 | +0.0500 | +0.0500 to +0.0500
    pissa | – | – | –
"""
SOME_RUNS = """
    start | rate | seed | status | loss | accuracy | macro F1 | MCC | retained | training, s
    random | 1e-4 | 0 | finished | 2.3000 0.2400 0.2250 0.2200 | 0.780 | 0.680 | 0.500 | 3.0100 | 60.0
    eva | 1e-2 | 0 | unstable | 2.3000 | – | – | – | – | –
    eva | 1e-2 | 1 | finished | 2.3000 0.0300 0.0150 0.0100 | 0.600 | 0.590 | 0.200 | 3.5000 | 61.5
    olora | 1e-2 | 0 | failed | – | – | – | – | – | –
    full | 3e-4 | 2 | finished | 2.3000 0.2100 0.1950 0.1900 | 0.810 | 0.710 | 0.500 | 3.3000 | 60.0
"""


def lines(text):
    return [line.strip() for line in text.strip().splitlines()]


def written(table):
    return [" | ".join(row) for row in [list(table.columns), *table.values.tolist()]]


@pytest.fixture(scope="module")
def tables():
    """Of the runs as they are, and with the strengths of their adapters."""
    dialed = [
        run | {"dial": [[1.0, (run["report_loss"] or [9])[-1], (run["retain_loss"] or [9])[-1]]]} for run in exact()
    ]
    starts = ["random", "eva", "eva+2-batches", "pissa", "olora", "full"]
    return [run_tables(summarise(runs, settings(starts=starts))) for runs in (exact(), dialed)]


@pytest.mark.parametrize("name", [*TABLES, "runs", "frontiers"])
def test_each_cell_of_a_table(name, tables):
    plain, dialed = tables
    if name == "frontiers":
        assert written(dialed[name]) == lines(DIALED) and name not in plain
        return
    assert [*plain] == [*TABLES, "runs"] and [*dialed] == ["differences", "frontiers", *[*plain][1:]]
    if name == "runs":
        rows, some = written(plain[name]), lines(SOME_RUNS)
        assert len(rows) == 1 + len(exact()) and [row for row in rows if row in some] == some
    else:
        assert written(plain[name]) == lines(TABLES[name])


def test_tables_that_say_nothing_are_left_out():
    assert run_tables(summarise([], settings())) == {}
    failed = run_tables(summarise([broken("failed", "no room", start="eva", trainable_parameters=None)], settings()))
    assert {name: written(table) for name, table in failed.items()} == {
        "differences": ["start | verdict", "eva | no statement"],
        "learning_rates": ["start | 1e-3", "eva | failed"],
        "runs": ["start | rate | seed | status", "eva | 1e-3 | 0 | failed"],
    }
    one = run_tables(summarise([record(), record("eva", final=0.16)], settings()))["differences"]
    assert written(one) == lines("""
        start | difference | in per cent | pairs | verdict
        eva | −0.0100 | −5.9 % | 1 | no statement
    """)


def test_the_table_of_strengths_is_there_where_some_runs_have_none():
    runs = exact()
    for run in runs:
        if run["status"] == "finished" and run["start"] != "pissa":  # whose base is changed
            run["dial"] = [[1.0, run["report_loss"][-1], run["retain_loss"][-1]]]
    assert written(run_tables(summarise(runs, settings()))["frontiers"])[:-1] == lines(DIALED)[:-1]


def test_a_rate_has_the_mean_of_its_runs_that_finished_and_a_star_if_it_is_the_best():
    runs = [record("random", 1e-3, 0, 0.2), broken("failed", "no room", rate=1e-3, seed=1)]
    runs += [record("random", 3e-3, seed, 0.3 + seed) for seed in (0, 1)]
    runs += [broken("unstable", "NaN", rate=1e-2, seed=seed) for seed in (0, 1)]
    runs += [broken("failed", "no room", rate=1e-2, seed=2), broken("failed", "no room", rate=3e-2)]
    assert written(run_tables(summarise(runs, settings()))["learning_rates"]) == lines("""
        start | 1e-3 | 3e-3 | 1e-2 | 3e-2
        random | 0.2000* | 0.8000 | unstable, 2 of 2 | failed
    """)


def test_without_random_nothing_is_measured_by_its_best_run():
    runs = [record("eva", 1e-3, seed, 0.2 + seed) for seed in (0, 1)]
    assert written(run_tables(summarise(runs, settings()))["best"]) == lines("""
        start | rate | lora_alpha | runs | mean loss | lowest to highest | loss at step 0
        eva | 1e-3 | 16 | 2 | 0.7000 | 0.2000 to 1.2000 | 2.3000
    """)
