"""Trainers in two processes, as `accelerate launch` starts them: one adapter in both, before training and after it."""

import hashlib
from importlib.util import find_spec

import pytest

from tests.processes import free_port, run


def images(folder, **settings):
    import torch
    from transformers import Trainer, TrainingArguments

    from tests.conftest import tiny_vit

    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(1, 16, 16, generator=generator), "labels": i % 3} for i in range(48)]
    return Trainer(tiny_vit(), TrainingArguments(str(folder), **settings), train_dataset=rows)


def images_in_place(folder, **settings):
    from tests.trainers.made import add_adapter

    trainer = images(folder, **settings)
    add_adapter(trainer.model, target_modules=["query", "value", "q_proj", "v_proj"], modules_to_save=["classifier"])
    return trainer


def embeddings(folder, **settings):
    from tests.trainers.sentences import trainer_of

    return trainer_of(folder, **settings)


def rerankers(folder, **settings):
    from tests.trainers.sentences import reranker_trainer

    # With the other value CrossEncoderTrainer fails in two processes by itself, without any adapter.
    return reranker_trainer(folder, ddp_find_unused_parameters=False, **settings)


def digest(model):
    """Hash all that is trained."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.update(name.replace("module.", "").encode() + parameter.detach().numpy().tobytes())
    return found.hexdigest()


def start_and_train(rank, size, folder, kinds):
    import torch

    import lora_init

    found = {}
    for kind in kinds:
        file = folder / f"{kind}.safetensors"
        torch.manual_seed(0)  # the one before has left other random numbers in each process
        settings = dict(per_device_train_batch_size=4, max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True)
        trainer = globals()[kind](folder, **settings | dict(save_strategy="no", disable_tqdm=True))
        assert trainer.args.world_size == size
        before = digest(trainer.model)
        lora_init.initialize(trainer, statistics=file, **({} if "in_place" in kind else {"rank": 2}))
        start, used = digest(trainer.model), lora_init.Statistics.load(file).provenance.settings["used"]
        trainer.train()
        found[kind] = [before, start, digest(trainer.model), used]
    return found


def started(rank, size, folder, samples):
    """Start by StartCallback, and return how many batches of four the pass read in each process."""
    from peft import LoraConfig, get_peft_model

    import lora_init

    settings = dict(per_device_train_batch_size=4, max_steps=2, report_to="none", use_cpu=True, save_strategy="no")
    trainer = images(folder, **settings)
    targets = ["query", "value", "q_proj", "v_proj"]
    trainer.model = trainer.model_wrapped = get_peft_model(trainer.model, LoraConfig(r=2, target_modules=targets))
    file = folder / "callback.safetensors"
    trainer.add_callback(lora_init.StartCallback(method="eva", samples=samples, statistics=file, tolerance=0.0))
    trainer.train()
    return lora_init.Statistics.load(file).provenance.settings["used"]


@pytest.mark.slow
def test_samples_are_those_of_all_processes(tmp_path):
    assert run(started, 2, tmp_path, 32, MASTER_PORT=free_port(), USE_LIBUV="0") == [[4, 4], [4, 4]]


@pytest.mark.slow  # two processes that import what trainers need
def test_both_have_the_same_adapter(tmp_path):
    kinds = ["images", "images_in_place"]
    if find_spec("sentence_transformers"):
        from tests.trainers.sentences import encoder

        encoder(tmp_path)  # written here: in a group of processes only the first one saves
        kinds += ["embeddings", "rerankers"]
    first, second = run(start_and_train, 2, tmp_path, kinds, MASTER_PORT=free_port(), USE_LIBUV="0")
    assert first == second and [*first] == kinds
    for before, start, trained, used in first.values():
        assert len({before, start, trained}) == 3
        assert len(used) == 2 and min(used) > 0  # each from batches of its own
