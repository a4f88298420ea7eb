"""The README and the addresses as a package index shows them, where links into a clone lead nowhere.

The workflow that publishes says which repository it runs in, so no address stands in the project, and a fork has its
own. Anywhere else the README stays as it is.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class IndexPage(MetadataHookInterface):
    """Fills in `readme` and `urls` of pyproject.toml."""

    def update(self, metadata: dict) -> None:
        """Make links of the README absolute, to the files of the tag that is published."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["urls"] = {}
        if "GITHUB_REPOSITORY" in os.environ:
            home = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}"
            tag = os.environ["GITHUB_REF_NAME"]
            text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{home}/raw/{tag}/", text)
            text = re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\g<1>{home}/blob/{tag}/", text)
            metadata["urls"] = {
                "Repository": home,
                "Documentation": f"{home}/blob/{tag}/docs/index.md",
                "Changelog": f"{home}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{home}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
