"""Whether the hub has something, asked once, before anything large is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from lora_init.errors import LoraInitError, first_line

_SECONDS = 3.0  # that the hub may take to answer; then the cache decides


def check_hub(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Refuse what cannot be had, in a second; return whether the hub has it, False if only a cache does."""
    import huggingface_hub.utils
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    what = {"model": "model", "dataset": "data"}[kind]
    utils: Any = huggingface_hub.utils
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        utils.validate_repo_id(name)
        # Not by HfApi: before its first question it asks for a list of coding agents, and waits for that, too.
        headers = {}
        if token := huggingface_hub.get_token():
            headers["authorization"] = f"Bearer {token}"
        url = f"{constants.ENDPOINT}/api/{kind}s/{name}"
        utils.hf_raise_for_status(utils.get_session().get(url, timeout=_SECONDS, headers=headers))
    except GatedRepoError:
        return True  # the download says what has to be accepted, and where
    except (HFValidationError, RepositoryNotFoundError):
        raise LoraInitError(
            f"{what} {name!r}: no such file or folder, and the hub has nothing of this name that you may read. Check "
            "the spelling; for a private one log in with `hf auth login`."
        ) from None
    except Exception as error:  # whatever its HTTP library raises without a network
        # Two caches: of files as they are on the hub, and of tables that `datasets` made of them.
        places = [Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")]
        prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")).expanduser()
        if kind == "dataset" and prepared.is_dir():
            # `datasets` spells the name as it likes, only the owner's as it is.
            places += [place for place in prepared.iterdir() if place.name.startswith(name.partition("/")[0])]
        if not any(place.is_dir() for place in places):
            raise LoraInitError(
                f"{what} {name!r}: no such file or folder, not in the hub's cache, and the hub cannot be reached: "
                f"{first_line(error)}"
            ) from error
        return False
    return True


def stay_offline() -> None:
    """Let this process ask caches alone, before transformers and `datasets` are imported, which then read it."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True  # huggingface_hub, imported already, does not read the variable again
