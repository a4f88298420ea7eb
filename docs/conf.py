"""How Sphinx builds the documentation: `make docs` writes docs/_build/html.

The pages are whole on a code host. The site has in addition a table of contents, made of the links of `index.md`, and
below `python.md` the docstrings of all public names. Of pages that it does not have it names the file.
"""

import re

import lora_init

project = "lora_init"
author = "lora_init contributors"
copyright = "lora_init contributors"  # noqa: A001
version = release = lora_init.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

# Headings can be linked to by their text, as on GitHub: the same pages read well there.
myst_heading_anchors = 3

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


def _make_page_of_site(app, page, source):
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([\w/-]+\.md)[^)]*\)", r"\1 (`\2`)", source[0])
    if page == "index":
        pages = "\n".join(re.findall(r"\]\(([\w-]+)\.md\)", source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"
    elif page == "python":
        kinds = {name: getattr(lora_init, name) for name in lora_init.__all__}
        directives = "\n\n".join(
            f".. autofunction:: lora_init.{name}" if not isinstance(kind, type)
            else f".. autoexception:: lora_init.{name}" if issubclass(kind, Exception)
            else f".. autoclass:: lora_init.{name}\n   :members:"
            for name, kind in kinds.items()
        )  # fmt: skip
        source[0] += f"\n## All names\n\n```{{eval-rst}}\n{directives}\n```\n"


def setup(app):
    app.connect("autodoc-process-docstring", _keep_bars)
    app.connect("source-read", _make_page_of_site)
