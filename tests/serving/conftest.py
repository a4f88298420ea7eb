"""What all tests of serving share."""

import shutil

import pytest
import torch

from tests.conftest import tiny_llama


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory):
    """A base on disk, and the state of the generator after it was made."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(num_hidden_layers=3).save_pretrained(folder)
    return folder, torch.get_rng_state()


@pytest.fixture
def base(saved_base, tmp_path):
    folder, state = saved_base
    torch.set_rng_state(state)  # who draws now has other numbers than those of the base
    return shutil.copytree(folder, tmp_path / "base")
