"""What cannot be had is refused before torch is imported; what a cache may have is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_init.errors import LoraInitError
from lora_init.loading.hub import check_hub

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from lora_init.cli.app import app
try: app(sys.argv[1:])
except SystemExit as end: print(end.code, *({"torch", "transformers", "datasets"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("command", ["init", "compare"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_hub_id_that_cannot_be_had_is_refused_before_torch_is_imported(command, at, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("a line")
    names = ["model", "text.txt"]
    names[at] = "nobody/nothing"
    words = [sys.executable, "-c", PROGRAM, command, *names, "-o", "out"]
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1\n"
    what = ["model", "data"][at]
    assert f"error: {what} 'nobody/nothing': no such file or folder, not in the hub's cache, and the hub" in done.stderr


@pytest.mark.parametrize("place", ["hub/datasets--owner--Name", "data/owner___name"])
def test_what_a_cache_may_have_is_left_to_those_who_read_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    with pytest.raises(LoraInitError, match="HF_HUB_OFFLINE is set"):
        check_hub("owner/Name", "dataset")
    (tmp_path / place).mkdir(parents=True)
    check_hub("owner/Name", "dataset")
    with pytest.raises(LoraInitError, match="model 'owner/Name'"):
        check_hub("owner/Name", "model")
