"""An option is declared once, as a field of a dataclass, and all that shows or checks options follows."""

import subprocess
import sys

import lora_init.adapters.asked

# The file with one field more, in the place of the module before anything imports it.
PROGRAM = """
import inspect, sys, types
import lora_init.adapters
module = sys.modules["lora_init.adapters.asked"] = types.ModuleType("lora_init.adapters.asked")
declared = "    use_dora: Annotated"
assert (source := open(sys.argv[1]).read()).count(declared) == 1
added = "    two_sided: Annotated[bool, dict(help='Start both sides.')] = False\\n"
exec(compile(source.replace(declared, added + declared), sys.argv[1], "exec"), vars(module))

import torch
from typer.testing import CliRunner
from lora_init import LoraInitError, initialize
from lora_init.cli.app import app

print(inspect.signature(initialize).parameters["two_sided"])
print(*[line for line in CliRunner().invoke(app, ["init", "--help-all"]).stdout.splitlines() if "two-sided" in line])
for wrong in ({"two_sides": True}, {"two_sided": True}):
    try:
        initialize(torch.nn.Linear(2, 2), **wrong)
    except LoraInitError as error:
        print(error)
"""


def test_an_option_that_is_added_to_its_declaration_is_shown_offered_and_known():
    command = [sys.executable, "-c", PROGRAM, lora_init.adapters.asked.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    signature, command_line, wrong, right = done.stdout.splitlines()
    assert signature == "two_sided: bool = False"
    assert "--two-sided" in command_line and "Start both sides." in command_line
    assert wrong.startswith("initialize() has no argument two_sides=. Did you mean two_sided?")
    assert right.startswith("batches are missing")
