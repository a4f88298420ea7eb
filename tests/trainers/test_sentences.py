"""Embeddings and rerankers: the adapter inside a model of sentence-transformers, from its trainer's batches."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_init
from lora_init.adapters.peft_model import adapter_layers
from lora_init.errors import LoraInitError
from lora_init.trainers.sentences import SentenceIntegration

library = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402

from tests.trainers.made import add_adapter, seen_by  # noqa: E402
from tests.trainers.sentences import LOSSES, PAIRS, TEXTS, encoder, made, reranker_trainer, trainer_of  # noqa: E402


def statistics_of(trainer, folder, **options):
    file = folder / f"{len(list(folder.iterdir()))}.safetensors"
    model = lora_init.initialize(trainer, rank=2, statistics=file, tolerance=0, **options)
    assert model is trainer.model
    return lora_init.Statistics.load(file)


@pytest.mark.parametrize(("loss", "method"), zip(LOSSES, ["eva", "natural-gradient"] * 2, strict=True))
def test_the_trainer_trains_the_adapter_and_the_library_reads_it_again(loss, method, tmp_path):
    trainer = trainer_of(tmp_path, loss)
    model, before = trainer.model, trainer.model.encode(TEXTS)
    assert lora_init.initialize(trainer, rank=2, method=method, exclude_modules=".*pooler.*") is model is trainer.model
    assert abs(model.encode(TEXTS) - before).max() < 1e-6  # B is zero
    assert not trainer.accum_loss_components["train"]
    trainer.train()
    layers = adapter_layers(model[0].model)
    assert len(layers) == 12 and all(layer.lora_B["default"].weight.any() for layer in layers.values())
    assert abs(model.encode(TEXTS) - before).max() > 1e-4
    model.save_pretrained(str(tmp_path / "saved"))
    again = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(again.encode(TEXTS) - model.encode(TEXTS)).max() < 1e-5


def test_statistics_are_of_the_tokens_of_every_column_with_their_prompts(tmp_path):
    trainer = trainer_of(tmp_path)
    model = trainer.model
    tokens = [model.preprocess([f"j i: {text}"]) for text in TEXTS] + [model.preprocess([t]) for t in PAIRS["positive"]]
    bare = copy.deepcopy(model[0].model)
    batches = [{key: one[key] for key in ("input_ids", "attention_mask")} for one in tokens]
    expected = lora_init.collect(bare, batches, rank=2, tolerance=0)
    found = statistics_of(trainer, tmp_path)
    assert found.provenance.n_batches == 4 and found.provenance.data == "training batches of SentenceTransformerTrainer"
    for name in expected:
        if "pooler" not in name:  # it reads one token of each text
            assert (
                found[name].n_samples == expected[name].n_samples == sum(int(b["attention_mask"].sum()) for b in tokens)
            )
            assert found.total_variance(name) == pytest.approx(expected.total_variance(name), rel=1e-4)


def test_the_cached_loss_has_the_gradients_of_the_plain_one(tmp_path):
    plain, cached = trainer_of(tmp_path), trainer_of(tmp_path)
    cached.loss = losses.CachedMultipleNegativesRankingLoss(cached.model, mini_batch_size=2)
    one, other = (
        statistics_of(t, tmp_path, method="natural-gradient", exclude_modules=".*pooler.*") for t in (plain, cached)
    )
    for name in one:
        assert other.gradient(name).weighted.total_variance == pytest.approx(
            one.gradient(name).weighted.total_variance, rel=1e-3
        )
        assert other[name].n_samples == one[name].n_samples  # the first of its two passes does not count twice


class InParts(losses.MultipleNegativesRankingLoss):
    """A loss of two components, each of which the trainer adds up by its name until it writes them."""

    def forward(self, *arguments, **options):
        loss = super().forward(*arguments, **options)
        return {"one": loss / 4, "other": loss * 3 / 4}


def test_what_the_trainer_has_added_up_for_its_next_report_is_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.loss = InParts(trainer.model)
    trainer.accum_loss_components["train"]["one"] = torch.tensor(3.0)
    before = copy.deepcopy(trainer.accum_loss_components)
    lora_init.initialize(trainer, rank=2)
    assert trainer.accum_loss_components == before


def test_training_reads_the_batches_that_the_statistics_are_from(tmp_path, monkeypatch):
    seen, trained = seen_by(SentenceIntegration, monkeypatch), []
    trainer = trainer_of(tmp_path)
    lora_init.initialize(trainer, rank=2)
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        trained.append(inputs["anchor_input_ids"].clone()), step(model, inputs, *rest)
    )[1]  # fmt: skip
    trainer.train()
    assert len(trained) == 3 and all(
        torch.equal(ours["anchor_input_ids"], theirs) for ours, theirs in zip(seen, trained, strict=False)
    )


@pytest.mark.parametrize(("label", "method"), [(True, "natural-gradient"), (False, "eva")])
def test_a_reranker_keeps_its_head(label, method, tmp_path):
    trainer = reranker_trainer(tmp_path, label)
    model = trainer.model
    assert lora_init.initialize(trainer, rank=2, method=method) is model
    before = {
        name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and "classifier" in name
    }
    trainer.train()
    assert before and not any(torch.equal(model.get_parameter(name), old) for name, old in before.items())
    model.save_pretrained(str(tmp_path / "saved"))
    again, pairs = library.CrossEncoder(str(tmp_path / "saved"), device="cpu"), list(zip(*PAIRS.values(), strict=True))
    assert np.ptp(model.predict(pairs)) > 0 and abs(again.predict(pairs) - model.predict(pairs)).max() < 1e-5


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_without_a_trainer_texts_are_enough(kind, tmp_path):
    model = encoder(tmp_path, kind, **({"num_labels": 1} if kind == "CrossEncoder" else {}))
    data = TEXTS if kind == "SentenceTransformer" else list(zip(*PAIRS.values(), strict=True))
    assert lora_init.initialize(model, data, rank=2, statistics=(file := tmp_path / "stats.safetensors")) is model
    assert lora_init.Statistics.load(file).provenance.data == f"{len(data)} texts"
    assert adapter_layers(model[0].model) and model[0].model.peft_config["default"].r == 2
    tokens = [model.preprocess(data[:16]), model.preprocess(data[16:])]
    other = encoder(tmp_path, kind, **({"num_labels": 1} if kind == "CrossEncoder" else {}))
    lora_init.initialize(other, tokens, rank=2, forward=lambda model, batch: model(dict(batch)))
    ours, theirs = (adapter_layers(one[0].model) for one in (model, other))
    assert all(
        torch.equal(layer.lora_A["default"].weight, theirs[n].lora_A["default"].weight) for n, layer in ours.items()
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_an_adapter_that_is_there_is_taken_whichever_way_it_came(in_place, tmp_path):
    changes = dict(r=2, lora_alpha=4, target_modules=["query", "value"])
    model = encoder(tmp_path)
    if in_place:
        add_adapter(model[0].model, **changes)
    else:
        model[0].model = get_peft_model(model[0].model, LoraConfig(**changes))
    trainer = trainer_of(tmp_path, model=model)
    lora_init.initialize(trainer)
    layers = adapter_layers(model[0].model)
    assert len(layers) == 4 and {layer.r["default"] for layer in layers.values()} == {2}
    trainer.train()


def router(folder):
    from sentence_transformers.base.modules import Router

    one, other = encoder(folder), encoder(folder)
    return library.SentenceTransformer(modules=[Router.for_query_document([*one], [*other])], device="cpu")


def begun(folder):
    trainer = trainer_of(folder)
    trainer.train()
    return trainer


REFUSED = {
    "changes the base": (
        trainer_of, {"method": "lora-ga", "rank": 2}, "changes the base weights, and sentence-transformers saves"
    ),
    "has begun": (begun, {}, "has an optimizer already"),
    "two models": (router, {"batches": TEXTS}, "SentenceTransformer has 2 models of transformers inside"),
    "no texts": (encoder, {}, "batches are missing"),
    "one column": (
        lambda folder: made(
            library.SentenceTransformerTrainer, model := encoder(folder), folder, {"anchor": TEXTS},
            losses.MultipleNegativesRankingLoss(model),
        ),
        {}, "cannot take its batch of .*anchor_input_ids.*check the columns",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_use_is_one_line(case, tmp_path):
    make, arguments, message = REFUSED[case]
    given = make(tmp_path)
    model = getattr(given, "model", given)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LoraInitError, match=message):
        lora_init.initialize(given, **arguments)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
