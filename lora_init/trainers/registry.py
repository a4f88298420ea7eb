"""The registry of integrations: which file knows the model or trainer that `initialize` is given."""

from __future__ import annotations

from typing import Any

from lora_init.adapters.model_handles import ModelHandle, handle_of
from lora_init.trainers.prompts import PromptIntegration
from lora_init.trainers.sentences import LIBRARY, SentenceHandle, SentenceIntegration
from lora_init.trainers.trainers import TrainerIntegration
from lora_init.trainers.trl import TRLIntegration

# By a module of the classes of what is given, so that no library is imported that is not in use; the first that fits.
# So a narrower name comes before a wider one: GRPOTrainer is of TRL, too. A name ends with a dot, see `_find`. What is
# not found here is taken for a model or `Trainer` of transformers.
HANDLES = {LIBRARY: SentenceHandle}
TRAINERS = {
    LIBRARY: SentenceIntegration,
    "trl.trainer.grpo_trainer.": PromptIntegration,
    "trl.trainer.rloo_trainer.": PromptIntegration,
    "trl.": TRLIntegration,
}


def is_trainer(given: Any) -> bool:
    """Return whether this is a trainer, of any library, and no model; without importing transformers."""
    return hasattr(given, "get_train_dataloader") and hasattr(given, "train_dataset")


def find_handle(model: Any) -> ModelHandle:
    """Find how a model is handled: whether it has an adapter, and of which library it is."""
    handle: ModelHandle = _find(HANDLES, model, handle_of)(model)
    return handle


def find_trainer(trainer: Any) -> TrainerIntegration:
    """Find the integration of a trainer, by its library."""
    integration: TrainerIntegration = _find(TRAINERS, trainer, TrainerIntegration)(trainer)
    return integration


def _find(known: dict[str, Any], given: Any, usual: Any) -> Any:
    """Return the first of the known whose name a module begins with, of the class or of one that it is made from."""
    # With a dot at the end, so that "trl." is not the beginning of "trlx".
    modules = tuple(f"{kind.__module__}." for kind in type(given).__mro__)
    for name, integration in known.items():
        if any(module.startswith(name) for module in modules):
            return integration
    return usual
