"""examples/notebook.ipynb runs from top to bottom in a kernel of its own, and shows what a reader is to see."""

import json
from pathlib import Path

import pytest

from tests.pages import MODEL, home  # noqa: F401 - a model whose tokenizer knows the words of the notebook

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def shown(cell):
    """What a cell shows, by type, and its text."""
    found = {}
    for output in cell.outputs:
        found |= output.get("data", {})
        found["text/plain"] = found.get("text/plain", "") + output.get("text", "")
    return found


def test_it_runs_and_shows_tables_and_pictures(home, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    (tmp_path / "HuggingFaceTB").symlink_to(home / "HuggingFaceTB")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = {cell.source.splitlines()[-1]: shown(cell) for cell in book.cells if cell.cell_type == "code"}
    assert "<td" in cells["stats"]["text/html"] and len(cells["stats"]["text/plain"]) < 120
    assert any("held_out" in found.get("text/html", "") for source, found in cells.items() if "to_pandas" in source)
    assert cells["ranks.plot()"]["image/png"]
    assert cells["repr(init)"]["text/plain"].startswith("'AdapterInit(eva: 14 layers of rank ")
    assert "trainable params" in cells["peft_model.print_trainable_parameters()"]["text/plain"]


def test_it_is_kept_small_with_its_outputs_and_words_for_its_pictures():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 150_000 and "/tmp/" not in text and "/home/" not in text
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "code":
            pictures = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
            assert not pictures or len(cell["metadata"]["alt"]) > 40
            assert [output for output in cell["outputs"] if output["output_type"] == "error"] == []
