"""How Sphinx builds the documentation: `make docs` writes docs/_build/html."""

import sys
from pathlib import Path

import lora_init

sys.path.insert(0, str(Path(__file__).parent))  # for our own extensions

project = "lora_init"
author = "lora_init contributors"
copyright = "lora_init contributors"  # noqa: A001
version = release = lora_init.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "cli_reference",
    "notebook_page",
    "sample_report",
    "starts_table",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# Headings can be linked to by their text, as on GitHub: the same pages read well there.
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline", "deflist"]

# Docstrings are in Google's style and put names between single backticks.
default_role = "literal"
smartquotes = False  # --option stays --option
maximum_signature_line_length = 88
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "lora_init"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_copyright = False
copybutton_exclude = ".linenos, .gp"


def _keep_bars(app, what, name, obj, options, lines):
    """Leave |g| alone, which reStructuredText takes for a substitution."""
    lines[:] = [line.replace("|", "\\|") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _keep_bars)
