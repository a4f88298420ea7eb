"""A model and data on disk, and the smallest command."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_init.cli.console import Running, running
from tests.commands import save_model, write_data
from tests.conftest import tiny_llama


@pytest.fixture(autouse=True)
def _nothing_typed():
    """Begin without the options that the test before has typed."""
    vars(running).update(vars(Running()))


@pytest.fixture(scope="package")
def home(tmp_path_factory):
    """A folder with a model and data in it; tests write elsewhere."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)  # or its weights would depend on which tests ran before
    save_model(tiny_llama(), home / "model")
    write_data(home)
    return home


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the picture of a dial, which takes as long as the dial itself."""
    monkeypatch.setattr("lora_init.keep.dialed.Dial.plot", lambda dialed: SimpleNamespace(savefig=Path.touch))


@pytest.fixture
def command(home, tmp_path):
    """The smallest `init` that works, to which tests add."""
    return ["init", str(home / "model"), str(home / "text.txt"), "-o", str(tmp_path / "out"), "--rank", "4"]
