"""What all tests of loading share."""

import json

import pytest
from datasets import config

from tests.loading.made import byte_tokenizer


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos_token="<eos>")


@pytest.fixture
def write(tmp_path):
    def to(rows, name="data.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return to
