"""A trainer of TRL: its loss by name, answers that stand beside each other in a batch, a head that it fuses."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from lora_init.adapters.init_config import InitConfig
from lora_init.errors import LoraInitError
from lora_init.layers.masks import IGNORED
from lora_init.layers.running import restoring
from lora_init.layers.targets import find_targets
from lora_init.trainers.trainers import TrainerIntegration


class TRLIntegration(TrainerIntegration):
    """SFTTrainer, DPOTrainer and the like."""

    # DPOTrainer before 0.29 has prompts and answers apart.
    advice = "A DPOTrainer needs TRL 0.29 or newer; for another, initialize the plain model on load_batches(...)."

    @property
    def has_plain_loss(self) -> bool:
        """Whether it is an SFTTrainer that trains by the loss of the model."""
        return (self.source_of_loss == "SFTTrainer" and not self.changes_loss) or super().has_plain_loss

    def forward(self, with_labels: bool) -> Any:
        """Return how a batch is run: with the loss of routers weighed as TRL weighs it, and models do not know."""
        run, weight = super().forward(with_labels), getattr(self.trainer, "router_aux_loss_coef", None)

        def forward(model: Any, batch: Any) -> Any:
            if weight is None or not hasattr(model, "router_aux_loss_coef"):
                return run(model, batch)
            # The model weighs this loss by an attribute of its own.
            with restoring("router_aux_loss_coef", [model]):
                model.router_aux_loss_coef = weight
                return run(model, batch)

        return forward

    def check(self, config: InitConfig) -> None:
        """Refuse, too, an adapter on a head by whose weight alone TRL multiplies, as TRL does."""
        super().check(config)
        if self.handle.wraps_anew:
            _check_head(self.handle.model, config.given.get("target_modules", ()), self.name)

    def batches(self, loader: Any) -> Iterator[Any]:
        """Read batches; both answers in a batch of DPOTrainer count."""
        for batch in super().batches(loader):
            # The mask marks the answers: prompts and padding are left out.
            if "labels" not in batch and "completion_mask" in batch:
                yield {**batch, "labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)}
            else:
                yield batch


def _check_head(model: Any, target_modules: Any, trainer: str) -> None:
    taken = inspect.signature(model.forward, follow_wrapped=False).parameters  # TRL's forward is wrapped as the model's
    if not target_modules or "fused_lm_head" not in taken:
        return
    head = model.get_output_embeddings()
    # By identity, since a head may be selected by a name, an ending or an expression.
    selected = find_targets(model, target_modules).layers
    if any(model.get_submodule(layer) is head for layer in selected):
        raise LoraInitError(
            f"{trainer} computes its loss from the weight of the head alone, so that an adapter there would never be "
            "trained. Leave the head out of target_modules, or train it whole: modules_to_save."
        )
