"""Words of the command line, read the same by every command."""

from __future__ import annotations

import re


def read_modules(text: str) -> str | list[str]:
    """Read names separated by commas as a list; what has a character that no name has is a regular expression."""
    if text.lower() == "all-linear" or re.search(r"[^\w.,\s-]", text):
        return text
    return read_names(text)


def read_names(text: str) -> list[str]:
    """Read names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def unescape(template: str | None) -> str | None:
    r"""Read \n and \t as newline and tab, which are hard to type in a shell."""
    return None if template is None else template.replace("\\n", "\n").replace("\\t", "\t")
