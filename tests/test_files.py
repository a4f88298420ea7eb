"""Which files a command may write to, and what is read from those that come from elsewhere."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_init.errors import LoraInitError
from lora_init.files import check_writable, read_json

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
            with pytest.raises(LoraInitError, match=r"file exists\. Choose another name, or pass --overwrite"):
                check_writable(path, False, kind)
        else:
            with pytest.raises(LoraInitError, match=f"is not an? {kind}, so it is never replaced"):
                check_writable(path, True, kind)


def test_a_directory_is_no_file_and_has_to_exist(tmp_path, monkeypatch):
    with pytest.raises(LoraInitError, match="is not a plan, so it is never replaced"):
        check_writable(tmp_path, True, "plan")
    with pytest.raises(LoraInitError, match=r"there is no directory .*none. Create it first"):
        check_writable(tmp_path / "none" / "plan.json", False, "plan")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(LoraInitError, match="cannot be written to"):
        check_writable(tmp_path / "plan.json", False, "plan")


def test_what_a_terminal_would_obey_is_shown(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a\x1b[2J": ["\x9b1m", {"b": "one\n\ttwo é"}], "n": 1.5}))
    assert read_json(tmp_path / "a.json") == {"a\ufffd[2J": ["\ufffd1m", {"b": "one\n\ttwo é"}], "n": 1.5}
