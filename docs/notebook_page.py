"""Sphinx extension: write examples/notebook.ipynb, with its outputs, below the text of notebook.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _append_cells)
    return {"parallel_read_safe": True}


def _append_cells(app: Any, page: str, source: list[str]) -> None:
    if page == "notebook":
        cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
        source[0] = "\n\n".join([part for cell in cells for part in _parts(cell)] + [source[0]])


def _parts(cell: Any) -> Iterator[str]:
    text = "".join(cell["source"])
    yield text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            picture = "".join(data["image/png"]).replace("\n", "")
            yield f'<img alt="{cell["metadata"]["alt"]}" src="data:image/png;base64,{picture}">'
        elif "text/html" in data:
            page = "".join(data["text/html"])
            yield f'````{{raw}} html\n<div class="cell-output">{page}</div>\n````'
        else:
            yield "```text\n{}\n```".format("".join(data.get("text/plain") or output["text"]).rstrip())
