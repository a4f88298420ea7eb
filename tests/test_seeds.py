"""What has a seed depends on it alone: not on the global generators, which it leaves as they were if it can."""

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_init
from lora_init.bank.generator import train_generator
from lora_init.loading.models import load_model
from tests.bank import made
from tests.commands import WORDS, save_model, tokenizer_of
from tests.conftest import batches_for, tiny_bert, tiny_llama

TOKENIZER = tokenizer_of(WORDS)
ROWS = [{"text": " ".join(WORDS[i % 17 : i % 17 + 3 + i % 4]), "kind": "ab"[i % 2]} for i in range(40)]
LLAMA = batches_for("llama")


def weights(model):
    return [value.clone() for value in model.state_dict().values()]


def adapted():
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.train(), LLAMA


def gathered():
    return lora_init.collect(tiny_llama(), LLAMA, ["q_proj"], rank=2, gradients=True, progress=False)


def built(method):
    return lambda stats, seed: [
        tensor
        for layer in lora_init.build_adapter(stats, 2, method, seed=seed).weights.values()
        for tensor in (layer.a, layer.b)
    ]


def dialed(given, seed):
    model, batches = given
    found = lora_init.dial(model, batches, batches_for("llama", n_batches=3, seed=9), seed=seed)
    return [torch.tensor([*found.strengths.values()])]


def bank(folder):
    for task in range(2):
        filled = made.add(folder / "bank", task, made.train(task, folder / f"task{task}", steps=2))
    return filled


def classified(model, seed):
    batches = lora_init.load_batches(ROWS, TOKENIZER, label="kind", template="{text}", samples=8)
    return weights(lora_init.initialize(model, batches, rank=2, method="random", seed=seed, progress=False))


# What is made before the seed counts, and what is made of it by a seed.
CASES = {
    "a sample": (lambda folder: ROWS, lambda rows, seed: [
        batch["input_ids"] for batch in lora_init.load_batches(rows, TOKENIZER, samples=12, seed=seed)
    ]),
    "a start of a classifier": (lambda folder: tiny_bert(), classified),
    "a new head": (
        lambda folder: str(save_model(tiny_llama(), folder / "model")),
        lambda path, seed: weights(load_model(path, task_type="SEQ_CLS", n_labels=3, seed=seed).model),
    ),
    "text of the base": (lambda folder: tiny_llama(), lambda model, seed: [
        torch.tensor([ord(letter) for letter in repr(lora_init.replay(model, TOKENIZER, n=4, length=8, seed=seed))])
    ]),
    "a dial": (lambda folder: adapted(), dialed),
    "a generator": (bank, lambda bank, seed: weights(train_generator(bank, steps=2, seed=seed).decoder)),
    **{f"the start {method}": (lambda folder: gathered(), built(method)) for method in ("random", "orthogonal")},
}  # fmt: skip

# Here transformers and PEFT draw, as they do without us.
DRAW = ("a start of a classifier", "a new head")


def states():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_seed_alone_decides_and_global_generators_stay(case, tmp_path):
    make, by_seed = CASES[case]
    found = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(0)
        (tmp_path / str(number)).mkdir()
        given = make(tmp_path / str(number))
        torch.manual_seed(number)
        random.seed(number)
        np.random.seed(number)
        before = states()
        found.append(by_seed(given, seed))
        assert case in DRAW or states() == before
    same, again, other = found
    assert all(torch.equal(*pair) for pair in zip(same, again, strict=True))
    assert len(same) != len(other) or any(not torch.equal(*pair) for pair in zip(same, other, strict=True))
