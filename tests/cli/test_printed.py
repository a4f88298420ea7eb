"""What each command prints has been read: a line that goes, comes or changes shows here. Numbers are left out.

python -m tests.cli.test_printed  # writes tests/cli/printed.txt anew: read what changed
"""

import os
import re
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.cli.typed import COMMANDS, prepare
from tests.commands import run

AGAIN = "If that is meant, run `python -m tests.cli.test_printed`, and read what changed."
KEPT = Path(__file__).with_name("printed.txt")
# Of one seed, so that no verdict depends on how numbers fall; then once more, when all has been run.
COMPARED = (
    "compare {0}/model {0}/text.txt --steps 2 --batch-size 2 --seeds 1 --starts random,eva --learning-rates 1e-3 "
    "--selection-samples 4 --report-samples 4 --rank 2 --max-length 8 -o {0}/compared"
)
MORE = {"compare": COMPARED, "compare again": COMPARED, "inspect of a comparison": "inspect {0}/compared"}


def printed(folder):
    """The output of all commands, as they are typed for files in one's home directory; nothing is written elsewhere."""
    before = Path.cwd()
    (folder / "elsewhere").mkdir()
    os.chdir(folder / "elsewhere")
    try:
        texts = []
        for name, words in (COMMANDS | MORE).items():
            if name == "dial":  # what it says depends on how losses fall
                continue
            typed = words.format("~")
            with patch.dict(os.environ, COLUMNS="100", HOME=str(folder)):
                result = run(*typed.split())
            assert result.exit_code == 0 and not [*Path().iterdir()], result.output
            text = result.output.replace(str(folder), "FOLDER")
            text = re.sub(r"\b[0-9a-f]{16,}\b", "#", text)  # fingerprints
            text = re.sub(r"(?<![\w-])[+\u2212-]?\d[\d,.]*(e[+-]?\d+)?(\+cpu)?", "#", text)
            text = re.sub(r"# (min|h)\b", "# s", text)  # as long as a machine takes
            text = text.replace("Time: about # s to # s", "Time: about # s")  # and as sure of it as it is
            text = text.replace("higher than random", "lower than random")  # after two steps
            lines = [" ".join(line.split()) for line in text.splitlines()]
            texts.append("\n".join([f"$ lora-init {typed}", *filter(None, lines)]))
        return "\n\n".join(texts) + "\n"
    finally:
        os.chdir(before)


def made():
    with tempfile.TemporaryDirectory() as place:  # a short name, so that no line is folded because of it
        folder = Path(place).resolve() / "a[bold]b"
        folder.mkdir()
        prepare(folder)
        return printed(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_what_each_command_prints_has_been_read():
    assert made().splitlines() == KEPT.read_text(encoding="utf-8").splitlines(), AGAIN


if __name__ == "__main__":
    KEPT.write_text(made(), encoding="utf-8")
