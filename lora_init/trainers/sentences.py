"""sentence-transformers: the model inside a SentenceTransformer or CrossEncoder, and its trainer's batches and loss."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_init.adapters.adapter_init import AdapterInit
from lora_init.adapters.init_config import InitConfig
from lora_init.adapters.model_handles import ModelHandle, handle_of
from lora_init.errors import LoraInitError, in_one_line
from lora_init.layers.running import restoring
from lora_init.trainers.trainers import TrainerIntegration

LIBRARY = "sentence_transformers."
_BATCH_SIZE = 16  # texts that are run at once, where texts are given


class SentenceHandle(ModelHandle):
    """A SentenceTransformer, CrossEncoder or the like; the transformer inside it holds the adapter."""

    base_stays = "sentence-transformers saves the adapter without them"

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        holders = list(_holders(given))
        if len(holders) != 1:
            raise LoraInitError(
                f"the {type(given).__name__} has {len(holders)} models of transformers inside, and one is expected. "
                "Initialize that one by itself, on tokens."
            )
        self.holder, self.attribute = holders[0]
        self.inner = handle_of(getattr(self.holder, self.attribute))
        # An adapter goes on the model inside, so what can be done with it is what can be done with that.
        self.in_place, self.wraps_anew = self.inner.in_place, self.inner.wraps_anew

    @property
    def model(self) -> nn.Module:
        """The model of transformers."""
        return self.inner.model

    def read(self, config: InitConfig) -> InitConfig:
        """Add what an adapter that is there says."""
        return self.inner.read(config)

    def feed(self, batches: Any, config: InitConfig) -> tuple[Any, InitConfig]:
        """Tokenize texts, or pairs for a CrossEncoder, as the model does; run it whole."""
        if isinstance(batches, (list, tuple)) and batches and isinstance(batches[0], (str, list, tuple)):
            tokenize = getattr(self.given, "preprocess", None) or self.given.tokenize  # its name before 5.3
            config = config.with_options(data=config.run.data or f"{len(batches)} texts")
            starts = range(0, len(batches), _BATCH_SIZE)
            batches = [tokenize(list(batches[i : i + _BATCH_SIZE])) for i in starts]
        # The modules of the library write into the batch that they get, so they get a copy.
        forward = config.run.forward or (lambda model, batch: model(dict(batch)))
        # What is collected are inputs of the model inside; what runs is the whole, which pools and compares.
        return batches, config.with_options(forward=lambda _, batch: forward(self.given, batch))

    @contextmanager
    def opened(self, config: InitConfig) -> Iterator[InitConfig]:
        """Open the model inside, and let its hooks run: the library calls `model.forward`, which is past them."""
        with self.inner.opened(config) as config:
            self.trains_head = self.inner.trains_head
            own, forward = vars(self.model), self.model.forward

            # The model's own __call__ runs the hooks and then `forward`, which has to be the true one meanwhile.
            def called(*args: Any, **kwargs: Any) -> Any:
                own["forward"] = forward
                try:
                    return self.model(*args, **kwargs)
                finally:
                    own["forward"] = called

            with restoring("forward", [self.model]):
                own["forward"] = called
                yield config

    def name_of_adapter(self, asked_for: str | None) -> str:
        """Return the name of the adapter of the model inside."""
        return self.inner.name_of_adapter(asked_for)

    def put(self, init: AdapterInit, adapter_name: str) -> Any:
        """Put the adapter on the model inside, and return the whole."""
        setattr(self.holder, self.attribute, self.inner.put(init, adapter_name))
        return self.given


class SentenceIntegration(TrainerIntegration):
    """SentenceTransformerTrainer, CrossEncoderTrainer and the like, with the loss they were given."""

    gives_loss = True

    def find_handle(self) -> ModelHandle:
        """Find the model inside."""
        return SentenceHandle(self.trainer.model)

    @contextmanager
    def opened(self, config: InitConfig) -> Iterator[tuple[InitConfig, Iterator[Any]]]:
        """Open it as another trainer; the losses of the pass do not count as losses of training."""
        with restoring("accum_loss_components", [self.trainer]), super().opened(config) as options_and_batches:
            # A copy takes the losses of the pass: `restoring` puts back the object, not what is in it.
            self.trainer.accum_loss_components = copy.deepcopy(self.trainer.accum_loss_components)
            yield options_and_batches

    def forward(self, with_labels: bool) -> Any:
        """Return how a batch is run: by the trainer's loss, which runs the model on each column."""

        def forward(_: nn.Module, batch: Any) -> Any:
            try:
                # A copy, since the trainer takes columns out of what it gets.
                return {"loss": self.trainer.compute_loss(self.trainer.model, dict(batch))}
            except (ValueError, TypeError, KeyError, IndexError) as error:
                raise LoraInitError(
                    f"the loss of the {self.name} cannot take its batch of {', '.join(batch)}: {in_one_line(error)} "
                    "Training would fail, too: check the columns."
                ) from error

        return forward

    def batches(self, loader: Any) -> Iterator[Any]:
        """Read batches: of tokens for each column, or of texts, which the loss of a CrossEncoder tokenizes."""
        yield from loader


def _holders(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Find where the outermost models of transformers are, or adapters on them; a model may hold others inside."""
    for name, child in module.named_children():
        if isinstance(child, PreTrainedModel) or hasattr(child, "peft_config"):
            yield module, name
        else:
            yield from _holders(child)
