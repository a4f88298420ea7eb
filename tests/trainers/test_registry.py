"""Which integration a trainer has, by the library of its class or of those that it is made from; and TRL's own."""

from types import SimpleNamespace

import pytest

from lora_init.trainers.prompts import PromptIntegration
from lora_init.trainers.registry import TRAINERS, _find
from lora_init.trainers.sentences import SentenceIntegration
from lora_init.trainers.trainers import TrainerIntegration

trl = pytest.importorskip("trl")

from lora_init.trainers.trl import TRLIntegration  # noqa: E402


@pytest.mark.parametrize("kind", [trl.SFTTrainer, type("Mine", (trl.SFTTrainer,), {"__module__": "mine"})])
def test_a_class_made_from_a_librarys_has_its_integration(kind):
    assert _find(TRAINERS, object.__new__(kind), TrainerIntegration) is TRLIntegration


@pytest.mark.parametrize(("module", "expected"), [
    ("trl.trainer.sft_trainer", TRLIntegration), ("trl", TRLIntegration), ("trlx.trainer", TrainerIntegration),
    ("trl.trainer.grpo_trainer", PromptIntegration), ("trl.trainer.grpo_trainer_of_mine", TRLIntegration),
    ("sentence_transformers", SentenceIntegration), ("sentence_transformers_of_mine", TrainerIntegration),
    ("mine.trl.trainer", TrainerIntegration),
])  # fmt: skip
def test_a_library_is_known_by_its_whole_name(module, expected):
    kind = type("Mine", (), {"__module__": module})
    assert _find(TRAINERS, kind(), TrainerIntegration) is expected


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.0), (0.5, 0.5), (None, 0.001)])
def test_the_loss_of_routers_is_weighed_as_the_trainer_weighs_it(weight, expected, monkeypatch):
    monkeypatch.setattr(TrainerIntegration, "forward", lambda *_: lambda model, batch: model.router_aux_loss_coef)
    model = SimpleNamespace(router_aux_loss_coef=0.001)
    integration = object.__new__(TRLIntegration)
    integration.trainer = SimpleNamespace(router_aux_loss_coef=weight)
    run = integration.forward(with_labels=True)
    assert run(model, {}) == expected and model.router_aux_loss_coef == 0.001
