"""Which files a command may write to, and what is read from those that come from elsewhere."""

import errno
import json
import os
import platform
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_init.errors import LoraInitError
from lora_init.files import (
    check_free,
    check_writable,
    digests_of,
    locked,
    new_directory,
    new_file,
    read_json,
    write_whole,
)  # fmt: skip
from tests.conftest import refused

KINDS = ["plan", "statistics file", "PNG picture", "SVG picture", "HTML page"]


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
