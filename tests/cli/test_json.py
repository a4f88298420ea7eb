"""Scripts read what commands print with --json: a key that goes or changes its kind shows here.

python -m tests.cli.test_json  # writes tests/cli/json_keys.json; CHANGELOG.md says what changed
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.cli.typed import COMMANDS, prepare
from tests.commands import run

AGAIN = "If that is meant, run `python -m tests.cli.test_json`."
KEPT = Path(__file__).with_name("json_keys.json")


def shape(value):
    """The keys of a value and of what it holds, and the kinds of all; layers and the like are one key, '*'."""
    if isinstance(value, dict):
        if value and (any("." in key or "/" in key for key in value) or all(key.isdigit() for key in value)):
            return {"*": shape(next(iter(value.values())))}
        return {key: shape(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return {bool: "truth", int: "number", float: "number", str: "text", type(None): "nothing"}[type(value)]


def printed(name, folder):
    result = run(*COMMANDS[name].format(folder).split(), "--json")
    assert result.exit_code == 0, (name, result.output)
    return shape(json.loads(result.stdout))


@pytest.fixture(scope="module")
def all_printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("json")
    prepare(folder)
    return {name: printed(name, folder) for name in COMMANDS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_keys_stay_as_scripts_know_them(name, all_printed):
    assert all_printed[name] == json.loads(KEPT.read_text(encoding="utf-8"))[name], AGAIN


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        found = {name: printed(name, Path(place)) for name in COMMANDS}
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{KEPT}\n")
