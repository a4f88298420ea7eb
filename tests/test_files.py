"""Which files a command may write to, and what is read from those that come from elsewhere."""

import errno
import hashlib
import json
import os
import platform
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_init import files
from lora_init.errors import LoraInitError
from lora_init.files import (
    as_path,
    check_free,
    check_output,
    check_writable,
    digests_of,
    is_as_written,
    is_of,
    locked,
    new_directory,
    new_file,
    parse_json,
    read_fields,
    read_json,
    write_json,
    write_whole,
)  # fmt: skip
from tests.conftest import refused

KINDS = ["plan", "statistics file", "PNG picture", "SVG picture", "HTML page", "GGUF file"]


def write(path, kind):
    if kind == "statistics file":
        header = {"format": "lora_init.statistics", "header": json.dumps({"layers": "x" * 10_000})}
        save_file({"a": np.zeros(3)}, path, header)
    else:
        path.write_bytes(
            {
                "plan": json.dumps({"format": "lora_init.plan", "layers": {}}, indent=1).encode(),
                "PNG picture": b"\x89PNG\r\n\x1a\n...",
                "SVG picture": b'<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg></svg>',
                "HTML page": b"<!DOCTYPE html>\n<html></html>",
                "GGUF file": b"GGUF\3\0\0\0",
                "rows": b"prompt,completion\n<svg>,lora_init.plan\n",
                "nothing": b"",
                "weights": b"",
            }[kind]
        )
    if kind == "weights":
        save_file({"a": np.zeros(3)}, path, {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_file_of_the_same_kind_is_replaced_and_only_if_asked(tmp_path, kind):
    path = tmp_path / "file"
    check_writable(path, False, kind)
    for there in (*KINDS, "rows", "nothing", "weights"):
        write(path, there)
        if there == kind:
            check_writable(path, True, kind)
            refused(r"file exists\. Choose another name, or pass --overwrite", check_writable, path, False, kind)
        else:
            refused(f"is no {kind}, so it is never replaced", check_writable, path, True, kind)


@pytest.mark.parametrize("kind", ["statistics file", "weights"])
def test_what_a_file_of_tensors_is_may_stand_at_the_end_of_a_long_header(kind, tmp_path):
    """Statistics of a model with thousands of layers have a header of megabytes."""
    named = {"statistics file": "lora_init.statistics", "weights": "pt"}[kind]
    header = f'{{"__metadata__":{{"header":"{"x" * 10_000}","format":"{named}"}}}}'.encode()
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    if kind == "weights":
        refused("is no statistics file", check_writable, path, True, "statistics file")
    else:
        check_writable(path, True, kind)


def test_a_directory_is_no_file_and_has_to_exist(tmp_path):
    refused("is a directory, and a file is needed", check_writable, tmp_path, True, "plan")
    with pytest.raises(LoraInitError, match=r"there is no directory .*none. Create it first"):
        check_writable(tmp_path / "none" / "plan.json", False, "plan")


PROC = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no directory in which not even root makes files")


@PROC
@pytest.mark.parametrize("below", ["plan.json", "deep/er/adapter"])
def test_a_place_is_tried_and_not_asked_for_its_permissions(below):
    check = check_free if "/" in below else check_writable
    arguments = ("marker", ()) if "/" in below else ("plan",)
    with pytest.raises(LoraInitError, match=r"^/proc/.*: /proc cannot be written to \(No such file or directory\)"):
        check(Path("/proc", below), False, *arguments)


def test_only_a_directory_that_is_as_it_was_written_here_is_replaced(tmp_path):
    record, weights = tmp_path / "record.json", tmp_path / "weights"
    weights.write_text("a")
    asked = (tmp_path, True, record.name, (record.name, weights.name))
    refused("has no record.json, so", check_free, *asked)
    record.write_text(json.dumps({"sha256": digests_of(tmp_path, [weights.name])}))
    check_free(*asked)
    weights.write_text("b")
    refused("has been changed since", check_free, *asked)


def test_of_a_file_that_is_not_finished_nothing_stays(tmp_path):
    with pytest.raises(KeyError), new_file(tmp_path / "out") as fresh:
        fresh.write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_of_a_lock_nothing_stays_whatever_its_block_raises(tmp_path):
    for path in (tmp_path / "stats", tmp_path):  # a file and a directory
        with pytest.raises(KeyError), locked(path, ""):
            assert len([*tmp_path.iterdir()]) == 1
            raise KeyError
        assert not [*tmp_path.iterdir()]
        with locked(path, ""):  # and the next one gets it
            pass


def test_a_full_disk_and_a_file_in_the_way_are_found_before_the_work(tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").touch()
    with pytest.raises(LoraInitError, match=r"out: .*/file cannot be written to \(Not a directory\)"):
        check_free(tmp_path / "file" / "out", False, "marker", ())
    monkeypatch.setattr(Path, "write_bytes", full)
    refused("No space left on device", check_free, tmp_path / "out", False, "marker", ())
    refused("No space left on device", check_writable, tmp_path / "plan.json", False, "plan")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_gives_no_reason_is_named_all_the_same(tmp_path, monkeypatch):
    def fail(self, *content, **options):
        raise OSError("out of order")

    monkeypatch.setattr(Path, "mkdir", fail)
    refused("out: cannot be written: out of order", new_directory(tmp_path / "out", False, "marker", ()).__enter__)
    monkeypatch.setattr(Path, "write_bytes", fail)
    refused(r"cannot be written to \(out of order\)", check_free, tmp_path / "out", False, "marker", ())


def killed_while_writing(path, kind):
    """Let a process write a file or a directory, and die in the middle."""
    child = os.fork()
    if child == 0:
        try:
            writing = new_file(path) if kind == "file" else new_directory(path, False, "marker", ())
            with writing as fresh:
                (fresh if kind == "file" else fresh / "weights").write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_process_has_left_is_removed_by_the_next(kind, tmp_path):
    path, other = tmp_path / "out", tmp_path / "other"
    killed_while_writing(path, kind)
    killed_while_writing(other, kind)
    assert len(list(tmp_path.glob(".out.*.tmp"))) == 1
    with new_file(path) if kind == "file" else new_directory(path, False, "marker", ()) as mine:
        (mine if kind == "file" else mine / "weights").write_text("whole")
        assert list(tmp_path.glob(".out.*.tmp")) == [mine]
        if kind == "file":  # this process lives, so another save of the same file leaves alone what it writes
            write_whole(path, b"second")
            assert mine.exists()
    assert path.exists() and not list(tmp_path.glob(".out*"))
    assert len(list(tmp_path.glob(".other.*.tmp"))) == 1  # of another place


def test_one_process_at_a_time_and_the_next_when_that_is_gone(tmp_path):
    path, reading, writing = tmp_path / "stats", *os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(path, ""):
                os.write(writing, b".")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"."
        who = rf"stats is in use by process {child} on {re.escape(platform.node())} since 20\d\d-\S+ \S+\. Wait"
        with pytest.raises(LoraInitError, match=who), locked(path, "Wait."):
            pytest.fail("two have it")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(path, ""), pytest.raises(LoraInitError, match=f"process {os.getpid()} "), locked(path, ""):
        pytest.fail("two have it")
    assert not list(tmp_path.iterdir())


def test_what_a_terminal_would_obey_is_shown(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a\x1b[2J": ["\x9b1m", {"b": "one\n\ttwo é"}], "n": 1.5}))
    assert read_json(tmp_path / "a.json") == {"a\ufffd[2J": ["\ufffd1m", {"b": "one\n\ttwo é"}], "n": 1.5}


@pytest.mark.parametrize("n_others", [1, 3, 4])
def test_a_directory_with_more_in_it_is_not_replaced_and_what_it_has_is_named(n_others, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"sha256": {}}))
    others = [f"other{i}" for i in range(n_others)]
    for name in others:
        (tmp_path / name).touch()
    check_free(tmp_path, True, "record.json", ("record.json", *others))
    listed = ", ".join(others[:3]) + ", ..." * (n_others == 4)
    said = re.escape(f"holds more than an adapter ({listed}), which overwriting would delete")
    refused(said, check_free, tmp_path, True, "record.json", ("record.json",))


def test_a_mount_point_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    refused(f"^{tmp_path} is a mount point, which cannot be replaced. Name a directory in it", check_free, tmp_path,
            True, "marker", ())  # fmt: skip
    check_free(tmp_path / "in it", True, "marker", ())


@pytest.mark.parametrize(("text", "said"), [
    ('{"a": 1}\n{"a": 2}\n', "a.json holds more than one JSON object, as data on JSON lines do"),
    ('{"a": 1', "a.json is not JSON: .*The file is damaged"),
    ("[1]", "a.json: expected a JSON object. The file is damaged"),
    (b"\xff\xfe", "a.json is not JSON: .*The file is damaged"),
])  # fmt: skip
def test_a_file_that_is_no_json_object_is_told(text, said, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode() if isinstance(text, str) else text)
    refused(said, read_json, tmp_path / "a.json")


def test_a_folder_that_may_not_be_listed_is_written_to_all_the_same(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    write_whole(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").read_bytes() == b"{}"


def test_a_path_is_a_text_or_a_path_below_the_home_where_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/a", "") == as_path(Path("~/a"), "") == tmp_path / "a" and as_path("a", "") == Path("a")
    refused("^output is needed, as a path, and got int.$", as_path, 3, "output")
    (tmp_path / "plan.json").write_text('{"format": "lora_init.plan"}')
    refused("plan.json exists. Choose another", check_writable, "~/plan.json", False, "plan")
    check_writable("~/plan.json", True, "plan")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused("^~/full has no marker, so", check_free, "~/full", True, "marker", ())
    refused("full is a directory, and a file", check_output, Path("~/full"), "file")


@pytest.mark.parametrize(("name", "refusing"), [
    ("new", {}), ("file", dict.fromkeys(("directory", "folder"), "/file is a file, and a directory is needed.")),
    ("folder", {"file": "/folder is a directory, and a file is needed."}),
    ("none/new", {"file": "/none/new: there is no directory .*/none. Create it first."}),
    (".", dict.fromkeys(("file", "directory", ""), "^output '.': this directory itself cannot be written anew. Name")),
])  # fmt: skip
def test_what_stands_in_the_way_depends_on_what_is_to_be_written(name, refusing, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    path = Path(name) if name == "." else tmp_path / name
    for what in ("file", "directory", "folder", ""):
        if what in refusing:
            refused(refusing[what], check_output, path, what)
        else:
            check_output(path, what)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "folder"} and not [*Path().iterdir()]


def test_a_folder_itself_is_tried_and_not_the_place_beside_it(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(files, "check_place", tried.append)
    for what in ("folder", "directory", "file", ""):
        check_output(tmp_path / "new", what)
    assert tried == [tmp_path / "new" / "file", *[tmp_path / "new"] * 3]


def test_only_what_dead_processes_of_this_machine_have_left_here_is_swept(tmp_path, monkeypatch):
    ours, theirs = files._machine(), "00000000"
    assert re.fullmatch("[0-9a-f]{8}", ours)
    monkeypatch.setattr(files, "_runs", lambda pid: pid == 77)
    dead = [f".out.5-{ours}-0123abcd.tmp", f".out.999999999-{ours}-0123abcd.tmp"]
    kept = [
        f".out.77-{ours}-0123abcd.tmp", f".out.5-{theirs}-0123abcd.tmp", f".out.5-{ours}-0123abcd.old",
        f".out.5-{ours}-0123abc.tmp", f"out.5-{ours}-0123abcd.tmp", f".oat.5-{ours}-0123abcd.tmp",
        f".out.1234567890-{ours}-0123abcd.tmp",
    ]  # fmt: skip
    for name in [*dead, *kept]:
        (tmp_path / name).touch()
    (tmp_path / f".out.6-{ours}-0123abcd.tmp").mkdir()
    (tmp_path / f".out.6-{ours}-0123abcd.tmp" / "half").touch()
    files._sweep(tmp_path / "out", "tmp")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)
    files._sweep(tmp_path / "none" / "out", "tmp")  # where nothing can be left


def test_what_another_process_sweeps_at_the_same_time_does_not_end_the_sweeping(tmp_path, monkeypatch):
    names = [f".out.{pid}-{files._machine()}-0123abcd.tmp" for pid in (5, 6, 7)]
    for name in names:
        (tmp_path / name).touch()

    def swept(pid):
        if len([*tmp_path.iterdir()]) == 3:
            (tmp_path / names[pid - 5]).unlink()
        return False

    monkeypatch.setattr(files, "_runs", swept)
    files._sweep(tmp_path / "out", "tmp")
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_swept_whole_does_not_end_the_sweeping(tmp_path, monkeypatch):
    for pid in (5, 6):
        (tmp_path / f".out.{pid}-{files._machine()}-0123abcd.tmp").mkdir()
    tried = []

    def rmdir(path, *_, **__):
        tried.append(path)
        raise PermissionError(path)

    monkeypatch.setattr(files, "_runs", lambda pid: False)
    monkeypatch.setattr(files.os, "rmdir", rmdir)
    files._sweep(tmp_path / "out", "tmp")
    assert len(tried) == 2


def test_a_lock_that_somebody_has_removed_is_no_error(tmp_path):
    with locked(tmp_path / "run", ""):
        (tmp_path / ".run.lock").unlink()


def test_a_file_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.extend(path.read_bytes() for path in tmp_path.iterdir()))
    write_whole(tmp_path / "out", b"whole")
    assert synced == [b"whole"]


@pytest.mark.parametrize(("error", "runs"), [(None, True), (ProcessLookupError, False), (PermissionError, True)])
def test_a_process_of_somebody_else_runs(error, runs, monkeypatch):
    asked = []

    def kill(*words):
        asked.append(words)
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert files._runs(5) is runs and asked == [(5, 0)]  # 0 asks, and ends nothing


@pytest.mark.parametrize(("kind", "name"), [("directory", "run/.lock"), ("file", ".run.lock")])
def test_a_lock_lies_in_a_directory_and_beside_a_file(kind, name, tmp_path):
    if kind == "directory":
        (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", ""):
        said = (tmp_path / name).read_text()
        assert re.fullmatch(rf"process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d", said)
        for holder, shown in ((b"\xff", "another process"), (b"a\x1b[2J", "a\ufffd\\[2J")):
            (tmp_path / name).write_bytes(holder)
            refused(f"run is in use by {shown}. Wait.$", locked(tmp_path / "run", "Wait.").__enter__)
    assert not (tmp_path / name).exists()
    with pytest.raises(KeyError), locked(tmp_path / "run", ""):
        raise KeyError
    assert not (tmp_path / name).exists()


def test_what_a_failing_disk_keeps_is_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("old")
    lines = [
        r"out: cannot be written: No space left on device. Nothing was changed; free some space or choose another pl",
        r"out: cannot be written: no reason. Nothing was changed; free some space or choose another directory.$",
    ]
    with pytest.raises(LoraInitError, match=lines[0]), new_file(path) as fresh:
        fresh.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    path.unlink()
    path.mkdir()
    with pytest.raises(LoraInitError, match=lines[1]), new_directory(path, False, "marker", ()) as fresh:
        (fresh / "half").touch()
        raise OSError("no reason")
    assert [*tmp_path.iterdir()] == [path] and not [*path.iterdir()]


def test_a_directory_that_is_replaced_has_only_what_is_new(tmp_path):
    path, link = tmp_path / "deep" / "er" / "out", tmp_path / "link"
    link.symlink_to(path, target_is_directory=True)
    for content in ("first", "second"):
        with new_directory(link, True, "marker", ("marker", "first", "second")) as fresh:
            assert fresh.parent == path.parent and not [*fresh.iterdir()]
            write_json(fresh / "marker", {})
            (fresh / content).touch()
    assert sorted(entry.name for entry in path.iterdir()) == ["marker", "second"] and link.is_symlink()
    assert [*path.parent.iterdir()] == [path]
    line = refused("pass overwrite", check_free, path, False, "marker", ())
    assert line == f"{path} exists and is not empty. Choose another directory, or pass overwrite=True."


@pytest.mark.parametrize("error", [OSError("out of order"), KeyboardInterrupt()])
def test_a_directory_that_cannot_be_put_in_its_place_leaves_the_one_that_was_there(error, tmp_path, monkeypatch):
    path, rename, moved = tmp_path / "out", Path.rename, []
    path.mkdir()
    write_json(path / "marker", {})

    def failing(self, target):
        moved.append(target.name if self == path else self.name)
        if len(moved) == 2:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((LoraInitError, KeyboardInterrupt)), new_directory(path, True, "marker", ("marker",)) as fresh:
        (fresh / "new").touch()
    assert [*tmp_path.iterdir()] == [path] and [one.name for one in path.iterdir()] == ["marker"]
    assert [name[-4:] for name in moved] == [".old", ".tmp", ".old"]


def test_what_may_not_be_replaced_is_told_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "exists and is not empty"), (tmp_path / "file", "file is a file, and a directory")):
        refused(said, new_directory(path, False, "marker", ()).__enter__)


def test_somebody_who_writes_there_meanwhile_keeps_what_was_written(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(LoraInitError, match="exists and is not empty"), new_directory(path, False, "m", ()) as fresh:
        (fresh / "ours").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert [*tmp_path.iterdir()] == [path] and [one.name for one in path.iterdir()] == ["theirs"]


def test_what_a_killed_process_had_moved_away_stays_until_the_new_one_is_there(tmp_path):
    old = tmp_path / f".out.999999999-{files._machine()}-0123abcd.old"
    old.mkdir()
    with new_directory(tmp_path / "out", False, "marker", ()):
        assert old.exists()
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_a_record_is_of_the_files_that_it_has_hashes_of(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "folder").mkdir()
    digests = {"a": hashlib.sha256(b"one").hexdigest()}
    assert digests_of(tmp_path, ["a", "none", "folder"]) == digests
    for record, as_written in (
        ({"sha256": digests}, True), ({}, True), ({"sha256": digests | {"none": "0"}}, False), ({"sha256": []}, False),
        ({"sha256": {"a": "0"}}, False),
    ):  # fmt: skip
        write_json(tmp_path / "record", record)
        assert is_as_written(tmp_path, "record") is as_written, record
    assert not is_as_written(tmp_path, "nothing")


def test_json_is_written_to_be_read_by_people_and_read_with_care(tmp_path):
    write_json(tmp_path / "a", {"é": [1]})
    assert (tmp_path / "a").read_bytes() == b'{\n  "\\u00e9": [\n    1\n  ]\n}\n' and parse_json(b"[1]") == [1]
    with pytest.raises(ValueError, match=r"^nested too deeply$"):
        parse_json("[" * 100_000)


@dataclass
class Thing:
    """What `read_fields` makes."""

    size: float
    names: list[str] | None = None


def test_fields_are_read_by_their_types_and_those_of_other_versions_passed_over():
    assert read_fields(Thing, {"size": 1, "names": ["a"], "other": 3}) == Thing(1, ["a"])
    assert read_fields(Thing, {"size": 2.5}) == Thing(2.5)
    for values, said in (({"size": "1"}, "size='1'"), ({"size": 1, "names": [1]}, r"names=\[1\]")):
        with pytest.raises(ValueError, match=f"^Thing has {said}$"):
            read_fields(Thing, values)


@pytest.mark.parametrize(("hint", "fitting", "odd"), [
    (list[str] | None, [None, [], ["a", "b"]], ["a", [1], ["a", 1], {}]),
    (Optional[int], [None, 1], ["1", 1.5, [1]]),  # noqa: UP045 - another class at run time
    (dict[str, list[int]], [{}, {"a": [1]}], [[], {"a": 1}, {"a": [1], "b": ["x"]}]),
    (Mapping[str, float], [{"a": 1, "b": 0.5}], [{"a": 1, "b": "x"}, None]),
    (float, [1, 1.5], ["1", None]), (int, [1], [1.5, "1"]), (str, ["a"], [1, None]), (Any, [None, 1, [1]], []),
])  # fmt: skip
def test_a_value_is_of_a_type_if_all_that_it_holds_is(hint, fitting, odd):
    assert [is_of(value, hint) for value in fitting] == [True] * len(fitting)
    assert [is_of(value, hint) for value in odd] == [False] * len(odd)
