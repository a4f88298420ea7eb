"""What cannot be had is refused before torch is imported; what a cache may have is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from lora_init.errors import LoraInitError
from lora_init.loading.batches import load_batches
from lora_init.loading.hub import check_hub
from lora_init.loading.models import check_model_source, open_model
from lora_init.loading.sources import check_data
from tests.conftest import refused

ROOT = Path(__file__).parents[2]
# Each line of its input is a command, which runs in a fork of a program that has imported the app alone.
PROGRAM = """
import json, os, sys
from lora_init.cli.app import app
for line in sys.stdin:
    folder, words = json.loads(line)
    if os.fork():
        os.wait()
        print(flush=True)
        continue
    os.chdir(folder)
    sys.stdout, sys.stderr = open("stdout", "w"), open("stderr", "w")
    try: app(words)
    except SystemExit as end: print(end.code, *({"torch", "transformers", "datasets"} & sys.modules.keys()))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def run_apart():
    """Run a command in a folder, in a process without torch; return what it printed, and what it wrote to stderr."""
    words, environment = [sys.executable, "-c", PROGRAM], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:

        def run(folder, *words):
            program.stdin.write(json.dumps([str(folder), words]) + "\n")
            program.stdin.flush()
            program.stdout.readline()
            return [(folder / name).read_text() for name in ("stdout", "stderr")]

        yield run
        program.stdin.close()


@pytest.mark.parametrize("command", ["init", "compare"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_hub_id_that_cannot_be_had_is_refused_before_torch_is_imported(command, at, run_apart, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "text.txt").write_text("a line")
    names = ["model", "text.txt"]
    names[at] = "nobody/nothing"
    stdout, stderr = run_apart(tmp_path, command, *names, "-o", "out")
    assert stdout == "1\n"
    what = ["model", "data"][at]
    assert f"error: {what} 'nobody/nothing': no such file or folder, not in the hub's cache, and the hub" in stderr


@pytest.mark.parametrize("words", [["--template", "{nope}"], ["--label", "nope", "--template", "{body}"], []])
def test_a_column_that_is_not_there_is_refused_before_torch_is_imported(words, run_apart, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "mail.csv").write_text("id,body,kind\n1,hello world,a\n2,good bye,b\n")
    stdout, stderr = run_apart(tmp_path, "init", "model", "mail.csv", "-o", "out", *words)
    assert stdout == "1 datasets\n"
    assert stderr.count("\n") == 1 and "id, body, kind" in stderr and "mail.csv" in stderr


def no_network(*_, **__):
    raise ConnectionError("no route to the hub\nwith details")


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(get=no_network))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.mark.parametrize("place", ["hub/datasets--owner--Name", "data/owner___name"])
def test_without_a_network_a_cache_is_asked_alone(place, tmp_path, no_hub):
    refused(r"^data 'owner/Name': no such file .* be reached: no route to the hub\.$", check_data, "owner/Name")
    assert not constants.HF_HUB_OFFLINE
    (tmp_path / place).mkdir(parents=True)
    check_data("owner/Name")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    refused(r"model 'owner/Name': .*HF_HUB_OFFLINE is set", check_model_source, "owner/Name")


def test_a_model_that_only_the_cache_has_is_read_from_there(tmp_path, no_hub):
    refused(
        r"^model 'owner/Name': no such file .* be reached: no route to the hub\.$", check_model_source, "owner/Name"
    )
    assert not constants.HF_HUB_OFFLINE
    (tmp_path / "hub/models--owner--Name").mkdir(parents=True)
    check_model_source("owner/Name")
    assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(("error", "known"), [
    (None, True),
    (GatedRepoError, True),  # the download says what has to be accepted
    (RepositoryNotFoundError, False),
])  # fmt: skip
@pytest.mark.parametrize("token", ["hf_secret", None])
def test_a_hub_is_asked_once_with_the_users_token(error, known, token, no_hub, monkeypatch):
    asked = {}

    def judge(response):
        if error is not None:
            raise error.__new__(error)  # without a response, which is of another library by the release

    session = SimpleNamespace(get=lambda url, **options: asked.update(options, url=url))
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.utils.hf_raise_for_status", judge)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    if known:
        assert check_hub("owner/Name", "dataset")
    else:
        said = refused(
            "^data 'owner/Name': no such file or folder, and the hub has nothing", check_hub, "owner/Name", "dataset"
        )
        assert "that you may read" in said and "hf_secret" not in said
    headers = {} if token is None else {"authorization": "Bearer hf_secret"}
    assert asked == {"url": f"{constants.ENDPOINT}/api/datasets/owner/Name", "timeout": 3.0, "headers": headers}
    if known:
        assert check_hub("owner/Name", "model")
        assert asked["url"] == f"{constants.ENDPOINT}/api/models/owner/Name"


def test_a_name_that_no_repository_can_have_is_refused_without_asking(no_hub):
    refused("^model 'a//b': no such file or folder, and the hub has nothing", check_hub, "a//b", "model")


def test_a_hub_that_does_not_answer_is_one_line_in_python_too(tmp_path, no_hub, monkeypatch):
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise OSError("nothing in the cache")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    monkeypatch.setattr("datasets.load_dataset", from_pretrained)
    refused(r"^model 'owner/Name': no such file .* be reached: no route to the hub\.$", open_model, "owner/Name")
    with pytest.raises(LoraInitError, match=r"^data 'owner/Name': no such file .* be reached: no route to the hub\.$"):
        load_batches("owner/Name", tokenizer=None)
    assert not asked  # their clients would try for half a minute
    (tmp_path / "hub/models--owner--Name").mkdir(parents=True)
    refused("nothing in the cache", open_model, "owner/Name")
    assert asked["local_files_only"] and not constants.HF_HUB_OFFLINE  # what else the process asks is not our business


@pytest.mark.parametrize(("place", "kind", "cached"), [
    ("hub/datasets--owner--Name", "dataset", True), ("hub/models--owner--Name", "dataset", False),
    ("home/datasets/owner___name", "dataset", True), ("home/datasets/other___name", "dataset", False),
    ("home/datasets/owner___name", "model", False), ("hub/models--owner--Name", "model", True),
])  # fmt: skip
def test_a_cache_has_what_is_of_this_kind_and_owner(place, kind, cached, tmp_path, no_hub, monkeypatch):
    monkeypatch.delenv("HF_DATASETS_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    (tmp_path / place).mkdir(parents=True)
    if cached:
        assert check_hub("owner/Name", kind) is False
    else:
        refused("not in the hub's cache, and the hub cannot be reached: no route", check_hub, "owner/Name", kind)
    shutil.rmtree(tmp_path / place)
    (tmp_path / place).touch()  # a file is no cache
    if "hub" in place:
        refused("not in the hub's cache", check_hub, "owner/Name", kind)


def test_the_cache_of_tables_may_lie_below_the_home(tmp_path, no_hub, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", "~/tables")
    (tmp_path / "tables" / "owner___name").mkdir(parents=True)
    assert check_hub("owner/Name", "dataset") is False
