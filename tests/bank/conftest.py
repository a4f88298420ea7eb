import shutil
from dataclasses import replace

import pytest

from tests.bank import made


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Directories of adapters for three tasks, two checkpoints of the first."""
    folder = tmp_path_factory.mktemp("trained")
    found = {f"task{task}": made.train(task, folder / f"task{task}") for task in range(3)}
    return {"task0-early": made.train(0, folder / "early", steps=10), **found}


@pytest.fixture(scope="session")
def whole(trained, tmp_path_factory):
    """A bank of all four, of which each test gets a copy."""
    path = tmp_path_factory.mktemp("whole") / "bank"
    made.add(path, 0, trained["task0-early"], "task0-early")
    for task in (0, 1, 2):
        found = made.add(path, task, trained[f"task{task}"])
    return found


@pytest.fixture
def bank(whole, tmp_path):
    shutil.copytree(whole.path, tmp_path / "bank")
    return replace(whole, path=tmp_path / "bank")
