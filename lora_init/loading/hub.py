"""Whether the hub has something, asked once: without a network its client would try again for half a minute."""

from __future__ import annotations

import os
from typing import Literal

from lora_init.errors import LoraInitError, first_line

_SECONDS = 3.0


def why_not_asked(name: str, kind: Literal["model", "dataset"]) -> str:
    """Ask the hub whether it has a model or data set; say why if it cannot be asked, so that only its cache is left.

    Returns:
        The reason, in words that end a sentence; an empty text if the hub has answered.

    Raises:
        LoraInitError: The hub has nothing of this name.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "TRUE", "YES"}:
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    what = "model" if kind == "model" else "data"
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except GatedRepoError:
        return ""  # the download says what has to be accepted, and where
    except (HFValidationError, RepositoryNotFoundError):
        raise LoraInitError(
            f"{what} {name!r}: no such file or folder, and the hub has nothing of this name that you may read. Check "
            "the spelling; for a private one log in with `hf auth login`."
        ) from None
    except Exception as error:  # whatever its HTTP library raises without a network
        return f"the hub cannot be reached: {first_line(error).rstrip('.')}"
    return ""
