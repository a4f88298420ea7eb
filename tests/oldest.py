"""Prints the floors of pyproject.toml as constraints for pip, `>=` as `==`: what `make test-oldest` installs.

torch keeps its range, since a torch that the interpreter brings along will do.
"""

import re
from pathlib import Path

import tomllib

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = [line for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for line in lines]
FLOORS = [re.sub(r"\[.*\]", "", line).replace(">=", "==") for line in LINES]  # constraints name no extras
print(*(line for line in FLOORS if not line.startswith(("torch=", "lora-init"))), sep="\n")
