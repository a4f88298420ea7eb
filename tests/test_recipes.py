"""The recipes of CONTRIBUTING: an option and a start are added in one place each, and everything follows."""

import re
import shutil
from pathlib import Path

import pytest

import lora_init
from tests.processes import ANEW, command_line, free_port, run

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
BEGIN = """
import inspect, json, torch
from typer.testing import CliRunner
from lora_init import LoraInitError, initialize
from lora_init.adapters.directory import carried
from lora_init.cli.app import app

def model():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))

def run(**options):
    try:
        return initialize(model(), [torch.randn(32, 4) for _ in range(4)], rank=2, progress=False, **options)
    except LoraInitError as error:
        print(error)

def help_has(*words):
    text = "".join(CliRunner().invoke(app, ["init", "--help-all"]).stdout.split())
    return all(word in text for word in words)
"""


PROGRAM = """
print(inspect.signature(initialize).parameters["sides"])
print(help_has("--sides", "Sidestostart."))
run(side=2)
run(sides=0)
config = run(sides=2).peft_config["default"]
print(carried(config.to_dict())["sides"])
print(help_has("first-rows"))
adapted = run(method="first-rows", unit_rows=True)
layer = adapted.base_model.model[0]
print(torch.equal(layer.lora_A["default"].weight, layer.base_layer.weight[:2]))
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What a copy of the package prints, in which each block stands before a line of its file."""
    folder = tmp_path_factory.mktemp("recipes")
    option, function, start = (
        next(block for block in BLOCKS if word in block) for word in ("sides:", "def first_rows", "Start(")
    )
    blocks = {
        "adapters/init_config": (option, "    use_dora: Annotated"),
        "starts/starts": (start, "    FullTraining(FULL"),
    }
    blocks["starts/initializers"] = (f"{function}\n\n", "def random(")
    shutil.copytree(Path(lora_init.__file__).parent, folder / "lora_init", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (block, line) in blocks.items():
        file = folder / "lora_init" / f"{name}.py"
        source = file.read_text(encoding="utf-8")
        assert source.count(line) == 1
        file.write_text(source.replace(line, f"{block}{line}"), encoding="utf-8")
    (folder / "program.py").write_text(ANEW.format(folder=str(folder)) + BEGIN + PROGRAM)
    ((code, out, err),) = run(command_line, 1, folder, str(folder / "program.py"), MASTER_PORT=free_port())
    assert code == 0, err
    return out.splitlines()


def test_an_option_is_in_the_signature_the_help_the_check_and_the_record(printed):
    signature, in_help, name, value, record = printed[:5]
    assert signature == "sides: int = 1"
    assert name.startswith("initialize() has no argument side=. Did you mean sides?")
    assert value == "sides=0, expected a whole number of at least 1."
    assert in_help == "True" and record == "2"


def test_a_start_is_in_the_help_and_makes_an_adapter(printed):
    assert printed[5:] == ["True", "True"]
