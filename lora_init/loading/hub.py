"""Whether the hub has something, asked once: without a network its client would try again for half a minute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lora_init.errors import LoraInitError, first_line

_SECONDS = 3.0


def check_hub(name: str, kind: Literal["model", "dataset"]) -> None:
    """Refuse what cannot be had. It takes a second: neither torch nor transformers nor `datasets` is imported.

    Raises:
        LoraInitError: No cache has the model or data set, and the hub cannot be asked, or has nothing of this name.
    """
    from huggingface_hub import constants

    places = [Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")]
    kept = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")).expanduser()
    if kind == "dataset" and kept.is_dir():  # `datasets` spells the name as it likes, only the owner's as it is
        places += [place for place in kept.iterdir() if place.name.startswith(name.partition("/")[0])]
    if not any(place.is_dir() for place in places) and (reason := why_not_asked(name, kind)):
        what = "model" if kind == "model" else "data"
        raise LoraInitError(f"{what} {name!r}: no such file or folder, not in the hub's cache, and {reason}.")


def why_not_asked(name: str, kind: Literal["model", "dataset"]) -> str:
    """Ask the hub whether it has a model or data set; say why if it cannot be asked, so that only its cache is left.

    Returns:
        The reason, in words that end a sentence; an empty text if the hub has answered.

    Raises:
        LoraInitError: The hub has nothing of this name.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "TRUE", "YES"}:
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    import huggingface_hub.utils
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    what = "model" if kind == "model" else "data"
    try:
        utils: Any = huggingface_hub.utils
        utils.validate_repo_id(name)
        # Not by HfApi: before its first question it asks for a list of coding agents, and waits for that, too.
        token = huggingface_hub.get_token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"{huggingface_hub.constants.ENDPOINT}/api/{kind}s/{name}"
        utils.hf_raise_for_status(utils.get_session().get(url, timeout=_SECONDS, headers=headers))
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


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's clients from the network within the block."""
    import datasets
    import huggingface_hub

    settings: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in settings]
    try:
        for module in settings:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value
