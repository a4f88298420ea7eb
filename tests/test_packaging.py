"""What a package index gets: a small source distribution, and a README whose links lead somewhere."""

import os
import re
import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path

from lora_init.errors import EXTRAS

ROOT = Path(__file__).parent.parent


def test_what_is_said_to_install_a_library_installs_it():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = {}
    for extra, needs in re.findall(r"^(\w+) = (\[.*\])", text.partition("optional-dependencies]")[2], re.MULTILINE):
        for name in re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?>=', needs) if extra not in ("test", "dev", "docs") else ():
            listed[name.replace("scikit-learn", "sklearn")] = extra
    assert listed == EXTRAS


def test_the_source_distribution_and_its_page(tmp_path):
    about = {"GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "a/b", "GITHUB_REF_NAME": "v1"}
    code = f"from hatchling.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | about, check=True, capture_output=True, text=True
    )
    file = tmp_path / built.stdout.split()[-1]
    with tarfile.open(file) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        info = message_from_bytes(archive.extractfile(f"{file.name.removesuffix('.tar.gz')}/PKG-INFO").read())
    assert {"lora_init/__init__.py", "README.md", "hatch_build.py", "benchmarks/results/dial.svg"} <= set(names)
    assert not [
        name
        for name in names
        if name.startswith("benchmarks/results/") and not name.endswith((".svg", ".png", ".json"))
    ]
    assert file.stat().st_size < 3_000_000
    assert "Repository, https://example.org/a/b" in info.get_all("Project-URL")
    targets = re.findall(r"\]\(([^)\s]*)\)", info.get_payload())
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert "https://example.org/a/b/blob/v1/docs/learning-rates.md" in targets
