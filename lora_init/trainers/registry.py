"""The doors: which file knows what `initialize` is given."""

from __future__ import annotations

from typing import Any

from lora_init.adapters.model_handles import Carrier, carrier_of
from lora_init.trainers.prompts import PromptTrainer
from lora_init.trainers.sentences import LIBRARY, Sentences, SentenceTrainer
from lora_init.trainers.trainers import TrainerDoor
from lora_init.trainers.trl import TRLTrainer

# By a module of the classes of what is given, so that no library is imported that is not in use; the first that fits.
CARRIERS = {LIBRARY: Sentences}
TRAINERS = {
    LIBRARY: SentenceTrainer,
    "trl.trainer.grpo_trainer.": PromptTrainer,
    "trl.trainer.rloo_trainer.": PromptTrainer,
    "trl.": TRLTrainer,
}


def is_trainer(given: Any) -> bool:
    """Return whether this is a trainer and no model, without importing transformers."""
    return hasattr(given, "get_train_dataloader") and hasattr(given, "train_dataset")


def find_carrier(model: Any) -> Carrier:
    """Find the door to a model."""
    carrier: Carrier = _found(CARRIERS, model, carrier_of)(model)
    return carrier


def find_trainer(trainer: Any) -> TrainerDoor:
    """Find the door to a trainer."""
    door: TrainerDoor = _found(TRAINERS, trainer, TrainerDoor)(trainer)
    return door


def _found(doors: dict[str, Any], given: Any, usual: Any) -> Any:
    modules = [f"{kind.__module__}." for kind in type(given).__mro__]
    return next((doors[name] for name in doors if any(one.startswith(name) for one in modules)), usual)
