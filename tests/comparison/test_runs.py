"""The log on disk: whole lines, resumed, never mixed, never lost."""

import errno
import json
import math

import pytest

from lora_init.comparison import runs as run_log
from lora_init.comparison.runs import RunLog, peek, read_runs
from lora_init.errors import LoraInitError

SETTINGS = {
    "task": "t", "rank": 8, "data": "d", "evaluation_points": (0, 4), "starts": ["random"], "learning_rates": [1e-3],
    "seeds": [0], "sweep": "halving", "match_scale": False, "threads": 1, "versions": {}, "processor": "",
    "command": "",
}  # fmt: skip


def record(seed=0, **changes):
    return dict(
        task="t", start="random", matched_scale=False, equal_parameters=False, seed=seed, learning_rate=1e-3,
        status="finished", validation_loss=[1.0, 0.5],
    ) | changes  # fmt: skip


def test_runs_come_back(tmp_path):
    log = RunLog(tmp_path / "a" / "b", SETTINGS)
    log.append(record())
    log.append(record(1, validation_loss=[math.nan, math.inf]))
    again = RunLog(tmp_path / "a" / "b", SETTINGS)
    assert list(again.records.values()) == [record(), record(1, validation_loss=[None, None])]
    assert again.records == log.records
    assert json.loads((log.directory / "settings.json").read_text())["rank"] == 8


def test_of_two_records_of_a_run_the_later_counts(tmp_path):
    log = RunLog(tmp_path, SETTINGS)
    for line in (record(status="failed"), record(1), record()):
        log.append(line)
    assert [r["seed"] for r in read_runs(tmp_path)] == [1, 0]
    assert read_runs(tmp_path)[1]["status"] == "finished"


@pytest.mark.parametrize("torn", [b"{", b'{"task": "t", "start"', b"\xff\xfe"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    RunLog(tmp_path, SETTINGS).append(record())
    file = tmp_path / "runs.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + torn)
    assert read_runs(tmp_path) == [record()]
    log = RunLog(tmp_path, SETTINGS)
    assert file.read_bytes() == whole
    log.append(record(1))
    assert len(read_runs(tmp_path)) == 2


def test_a_damaged_line_within_is_an_error(tmp_path):
    RunLog(tmp_path, SETTINGS).append(record())
    file = tmp_path / "runs.jsonl"
    file.write_bytes(b'{"task": 1}\n' + file.read_bytes())
    with pytest.raises(LoraInitError, match="line 1: not a run"):
        RunLog(tmp_path, SETTINGS)


def test_another_configuration_is_refused_and_named(tmp_path):
    RunLog(tmp_path, SETTINGS).append(record())
    before = (tmp_path / "settings.json").read_bytes()
    for changes, message in (
        ({"rank": 4}, "rank was 8, now 4"),
        ({"rank": 4, "data": "x"}, "rank was 8, now 4; data was 'd', now 'x'"),
        ({"new": 1}, "new was None, now 1"),
    ):
        for opening in (RunLog, peek):
            with pytest.raises(LoraInitError, match=message):
                opening(tmp_path, {**SETTINGS, **changes})
    assert (tmp_path / "settings.json").read_bytes() == before
    RunLog(tmp_path, {**SETTINGS, "threads": 2, "versions": {"torch": "9"}, "command": "x", "match_scale": True})


def test_starts_rates_and_seeds_may_be_added(tmp_path):
    RunLog(tmp_path, SETTINGS)
    grown = RunLog(tmp_path, {**SETTINGS, "starts": ["eva"], "learning_rates": [3e-3, 1e-3], "seeds": [0, 1]}).settings
    assert (grown["starts"], grown["learning_rates"], grown["seeds"]) == (["random", "eva"], [1e-3, 3e-3], [0, 1])
    assert RunLog(tmp_path, SETTINGS).settings["starts"] == ["random", "eva"]


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(LoraInitError, match="holds no comparison"):
        RunLog(tmp_path, SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(LoraInitError, match="cannot be written"):
        RunLog(tmp_path / "thesis.tex", SETTINGS)
    assert peek(tmp_path, SETTINGS) == {}


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    log = RunLog(tmp_path, SETTINGS)
    log.append(record())
    whole = (tmp_path / "runs.jsonl").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(run_log.os, "fsync", full)
        with pytest.raises(LoraInitError, match=r"No space left on device\. The runs that ended before are kept"):
            log.append(record(1))
    assert (tmp_path / "runs.jsonl").read_bytes() == whole
    log.append(record(1))
    assert len(read_runs(tmp_path)) == 2


def test_damaged_settings_are_an_error(tmp_path):
    RunLog(tmp_path, SETTINGS)
    for content in ("{", "[]"):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(LoraInitError, match=r"settings.json"):
            RunLog(tmp_path, SETTINGS)
