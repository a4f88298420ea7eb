"""The loader of a trainer: how long a training is by what it draws, and reading it without a trace."""

import itertools
import random
import threading
import types
from collections import Counter, deque
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import lora_init
from lora_init.rates.training_length import TrainingLength
from lora_init.trainers import loaders
from lora_init.trainers.loaders import check_repeats, examples_of_a_step, length_of, without_trace
from lora_init.trainers.trainers import TrainerIntegration
from tests.commands import tokenizer_of
from tests.conftest import tiny_llama
from tests.trainers.made import CHAT, WORDS, of_class, plain

# These trainers take the rates that a tiny model learns at.
pytestmark = pytest.mark.filterwarnings("ignore:.*(learning_rate|lora_alpha) is ")


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(WORDS, bos_token="<s>", chat_template=CHAT)


def by_weights(weights, n, replacement=True):
    return lambda data: torch.utils.data.WeightedRandomSampler(weights, n, replacement)


class Repeats(torch.utils.data.Sampler):
    """A sampler of one's own: a quarter of the rows four times in an epoch."""

    def __iter__(self):
        return iter([*range(4)] * 4)

    def __len__(self):
        return 16


class Tires(Repeats):
    """A sampler that raises within its second epoch: then each example is taken to come once in an epoch."""

    epoch = 0

    def __iter__(self):
        self.epoch += 1
        yield from range(8)
        if self.epoch > 1:
            raise RuntimeError("tired")
        yield from range(8, 16)


@pytest.mark.parametrize(
    ("sampler", "rows", "epochs"),
    [
        (lambda data: torch.utils.data.SubsetRandomSampler(range(8)), 8, 4),
        (lambda data: torch.utils.data.RandomSampler(data, num_samples=8), 16, 2.5),  # others in each epoch
        (by_weights([1.0] * 16, 8), None, 1 + 31 / 16),
        (by_weights([1.0] * 4 + [0.0] * 12, 16), 4, 1 + 63 / 4),
        (by_weights([1.0] + [0.0] * 15, 16), 4, 64),  # fewer than a step has
        (by_weights([3.0] * 4 + [1.0] * 12, 8), None, 1 + 31 * 48 / 24**2),  # as many rows as 12 that are drawn alike
        (by_weights([3.0] * 4 + [1.0] * 12, 16, replacement=False), 16, 4),
        (by_weights([1.0] * 8 + [0.0] * 8, 8, replacement=False), 8, 4),
        (lambda data: torch.utils.data.RandomSampler(range(8), num_samples=4), 8, 2.5),
        (torch.utils.data.RandomSampler, 16, 4),
        (lambda data: Repeats(), 4, 16),
        (lambda data: Tires(), 16, 4),
    ],
)
def test_an_example_is_seen_as_often_as_its_sampler_draws_it(sampler, rows, epochs, tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer, num_train_epochs=4, max_steps=-1)
    trainer.train_dataset = [{"input_ids": [1, 3, 5 + i], "labels": [2, 3, 4]} for i in range(16)]
    trainer._get_train_sampler = lambda *given: sampler(trainer.train_dataset)
    length = TrainerIntegration(trainer).length
    assert rows in (None, length.rows) and length.steps == len(trainer.get_train_dataloader()) * 4
    assert length.epochs == pytest.approx(epochs, rel=0.4 if epochs % 1 else 1e-6)
    assert (f"each drawn {length.epochs:.1f} times" in str(length)) == bool(length.seen)


@pytest.mark.parametrize("epochs", [0.5, 1.0, 1.25, 1.5, 1.75, 2.5])
def test_a_training_that_ends_within_an_epoch_of_plain_data_is_as_long_as_init_says(epochs, tmp_path, tokenizer):
    trainer = plain(tmp_path, tokenizer, num_train_epochs=epochs, max_steps=-1)
    trainer.train_dataset = [{"input_ids": [1, 3, 5 + i], "labels": [2, 3, 4]} for i in range(16)]
    length = TrainerIntegration(trainer).length
    assert (length.seen, length.epochs) == (0.0, max(1.0, epochs))


def test_what_is_left_out_of_an_epoch_comes_in_another(tmp_path, tokenizer):
    trainer = plain(
        tmp_path, tokenizer, num_train_epochs=12, max_steps=-1, per_device_train_batch_size=9,
        dataloader_drop_last=True,
    )  # fmt: skip
    trainer.train_dataset = [{"input_ids": [1, 3, 5 + i], "labels": [2, 3, 4]} for i in range(16)]
    length = TrainerIntegration(trainer).length
    assert (length.steps, length.batch_size, length.rows) == (12, 9, 16) and 6 < length.epochs < 9  # 12 * 9 / 16 = 6.75


class OwnLoader(Trainer):
    def get_train_dataloader(self):
        rows = [{"input_ids": [1, 3, 5 + i], "labels": [2, 3, 4]} for i in range(16)]
        return torch.utils.data.DataLoader(rows, 4, shuffle=True, collate_fn=self.data_collator)


def test_the_length_of_a_trainer_with_a_loader_of_its_own_is_that_of_its_loader(tmp_path, tokenizer):
    trainer = of_class(OwnLoader)(tmp_path, tokenizer)
    trainer.train_dataset, trainer.args.max_steps = None, 24
    length = TrainerIntegration(trainer).length
    assert (length.steps, length.batch_size, length.rows, length.epochs) == (24, 4, 16, 6)


class Lists:
    """A sampler of batches that does not say how large they are."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __iter__(self):
        numbers = iter(range(sum(self.sizes)))
        return iter([[next(numbers) for _ in range(size)] for size in self.sizes])

    def __len__(self):
        return len(self.sizes)


class InTokens(torch.utils.data.BatchSampler):
    """Batches of eight that say how many tokens a batch may have."""

    def __init__(self, n):
        super().__init__(range(n), 8, False)
        self.batch_size, self.n = 512, n

    def __iter__(self):
        return iter(torch.arange(self.n).split(8))

    def __len__(self):
        return self.n // 8


class Endless(torch.utils.data.Sampler):
    """Other rows in each epoch, without an end."""

    def __init__(self, n):
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        while True:
            yield from range(8 * self.epoch, 8 * self.epoch + 8)

    def __len__(self):
        return 8


class Unsized:
    def __iter__(self):
        return iter([[*range(8)], [*range(8, 16)]])


class Steady(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": [1, 3, 5], "labels": [2, 3, 4]}] * 64)


READY = [{"input_ids": torch.arange(24).reshape(8, 3), "labels": torch.arange(24).reshape(8, 3)} for _ in range(2)]


def first(items):
    return items[0]


def in_parts(items):
    return {"input_ids": torch.ones(4 * len(items), 3, dtype=torch.int64)}


def whole_batches(n):
    return torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(range(n)), 8, False)


class Bulk(list):
    """Rows that are asked for a whole batch, as those of datasets are."""

    def __getitem__(self, which):
        return {"input_ids": torch.ones(len(which), 40, dtype=torch.int64)}


@pytest.mark.parametrize(("data", "how", "size", "rows"), [
    (Steady(), dict(batch_size=8), 8, None),
    (range(16), dict(batch_sampler=Lists([8, 8])), 8, 16),
    (range(64), dict(batch_sampler=InTokens(64)), 8, 64),
    (range(400), dict(batch_size=4, sampler=Endless(400)), 4, 192),
    (range(16), dict(batch_sampler=Unsized()), 4, None),  # what the arguments say
    (range(64), dict(batch_sampler=Lists([32, *[2] * 16])), 64 / 17, 64),  # by tokens
    (READY, dict(batch_size=None), 8, 16),
    (READY, dict(batch_size=1, collate_fn=first), 8, 16),
    (READY, dict(batch_size=None, sampler=torch.utils.data.RandomSampler(READY, num_samples=2)), 8, 16),
    ([{key: value[:1] for key, value in READY[0].items()}, *READY[:1] * 3], dict(batch_size=None), 25 / 4, 25),
    (READY[:1] * 4, dict(batch_size=2, collate_fn=in_parts), 8, 16),
    ([{"input_ids": [1, 3]}] * 16, dict(batch_size=8, collate_fn=DataCollatorWithFlattening()), 8, 16),
    (Bulk(range(16)), dict(batch_size=None, sampler=whole_batches(16)), 8, 16),
])  # fmt: skip
def test_the_size_of_a_step_is_that_of_the_loader(data, how, size, rows, tmp_path, tokenizer):
    trainer = of_class(Trainer)(tmp_path, tokenizer)
    trainer.args.max_steps, trainer.args.gradient_accumulation_steps = 24, 2
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(data, **how)
    length = TrainerIntegration(trainer).length
    assert (length.batch_size, length.rows, length.steps) == (round(2 * size), rows, 24)


class Masks:
    """A collator that masks labels by a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, items):
        ids = torch.tensor([item["input_ids"] for item in items])
        return {"input_ids": ids, "labels": ids.where(torch.rand(ids.shape, generator=self.generator) < 0.5, -100)}


def adapted():
    return get_peft_model(tiny_llama(), LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"))


class Numpy(torch.utils.data.Sampler):
    """A sampler by numpy's numbers."""

    def __init__(self, n):
        self.n, self.generator = n, np.random.default_rng(3)

    def __iter__(self):
        return iter(self.generator.permutation(self.n).tolist())

    def __len__(self):
        return self.n


@pytest.mark.parametrize("kind", ["shuffled", "sampler", "batch sampler"])
def test_training_draws_as_it_would_have_from_generators_that_a_trainer_keeps(kind, tmp_path, tokenizer):
    def batches(starts):
        trainer = plain(tmp_path, tokenizer, max_steps=2)
        generator = torch.Generator().manual_seed(3)
        how = {
            "shuffled": dict(batch_size=4, shuffle=True, generator=generator),
            "sampler": dict(batch_size=4, sampler=Numpy(16)),
            "batch sampler": dict(batch_sampler=torch.utils.data.BatchSampler(Numpy(16), 4, False)),
        }[kind]
        rows = [{"input_ids": [1, 3, 5 + i]} for i in range(16)]
        loader = torch.utils.data.DataLoader(rows, collate_fn=Masks(torch.Generator().manual_seed(4)), **how)
        trainer.get_train_dataloader = lambda: loader
        if starts:
            lora_init.initialize(trainer, rank=2, progress=False)
        return [value.tolist() for batch in loader for value in batch.values()]

    assert batches(True) == batches(False)


def test_a_callback_leaves_the_generator_of_a_collator(tmp_path, tokenizer):
    def labels(*callbacks):
        trainer, seen = plain(tmp_path, tokenizer, model=adapted(), max_steps=2), []
        trainer.data_collator = Masks(torch.Generator().manual_seed(4))
        trainer.train_dataset = [{"input_ids": [1, 3, 5 + i]} for i in range(16)]
        trainer.model.register_forward_pre_hook(
            lambda model, args, given: seen.append(given["labels"].tolist()) if model.training else None,
            with_kwargs=True,
        )
        for one in callbacks:
            trainer.add_callback(one)
        trainer.train()
        return seen

    assert labels(lora_init.StartCallback(samples=8)) == labels()


class Own(torch.utils.data.Sampler):
    """A sampler of one's own, whose order changes with what it keeps; it cannot be copied."""

    def __init__(self, order):
        self.order, self.lock = order, threading.Lock()

    def __iter__(self):
        return iter([int(one) for one in self.order(16)])

    def __len__(self):
        return 16


class InPlace:
    """Shuffle what is kept, in place, as samplers by buckets do."""

    def __init__(self, kind):
        self.kept = kind(range(16))

    def __call__(self, n):
        random.shuffle(self.kept) if isinstance(self.kept, (list, deque)) else np.random.shuffle(self.kept)
        return self.kept


class Counts:
    """Begin where the last epoch has ended."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, n):
        self.kept["n"] += 1
        return [(i + int(self.kept["n"])) % n for i in range(n)]


class Draws:
    def __init__(self):
        self.inner = types.SimpleNamespace(generator=random.Random(0))

    def __call__(self, n):
        return self.inner.generator.sample(range(n), n)


class Augmented(torch.utils.data.Dataset):
    """Rows that are drawn anew each time."""

    def __init__(self):
        self.generator, self.seen = np.random.default_rng(0), []

    def __len__(self):
        return 16

    def __getitem__(self, i):
        self.seen.append(i)
        return {"input_ids": [1, 3, 5 + i, int(self.generator.integers(3, 20)), 3 + len(self.seen) % 16]}


class Collators:
    """A collator that is a method, and counts; one that is a closure over a generator."""

    def __init__(self):
        self.n = 0

    def method(self, items):
        self.n += 1
        return stacked(items, self.n)


def closure():
    generator = random.Random(0)
    return lambda items: stacked(items, generator.randrange(9))


def stacked(items, added=0):
    ids = torch.tensor([[*item["input_ids"], 3 + added % 16] for item in items])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


class Frozen(dict):
    """A mapping of one's own, as diffusers' configurations are: it refuses to be changed."""

    def update(self, *given):
        raise TypeError("frozen")

    clear = update


class Changes:
    """A transform: its generator is made when it is needed, replaced each time, and it counts on its class."""

    n = 0
    config = Frozen(width=3)

    def __init__(self):
        self.own, self.features = Frozen(width=3), inferred()

    def __call__(self, n):
        if not hasattr(self, "generator"):
            self.generator = random.Random(5)
        self.n += 1
        number = self.generator.randrange(n) + self.n
        self.generator = random.Random(number)
        return number % n


@torch.inference_mode()
def inferred():
    return torch.zeros(3)


class Slots:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = np.random.RandomState(0)

    def draw(self, n):
        return int(self.generator.randint(n))


class Transformed(torch.utils.data.Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return {"input_ids": [1, 3, 5 + i, 3 + self.transform(16)]}


GENERATOR = random.Random(1)


def by_a_global_generator(n):
    return GENERATOR.randrange(n)


def parted(data):
    for _ in range(3):
        data = torch.utils.data.Subset(data, range(len(data)))
    return torch.utils.data.ConcatDataset([data])


def counting():
    n = 0

    def collate(items):
        nonlocal n
        n += 1
        return stacked(items, n)

    return collate


def by_default():
    def collate(items, generator=random.Random(0), *, counts=Counter()):  # noqa: B006, B008
        counts["n"] += 1
        collate.n += 1
        return stacked(items, generator.randrange(9) + counts["n"] + collate.n)

    collate.n = 0
    return collate


def streamed():
    generator = random.Random(0)
    rows = Dataset.from_list([{"input_ids": [1, 3, 5 + i]} for i in range(16)]).to_iterable_dataset()
    return rows.map(lambda row: {"input_ids": [*row["input_ids"], generator.randrange(3, 20)]}).with_format("torch")


class AtRandom(Transformed):
    def __init__(self):
        super().__init__(random.randrange)


KEEP = {
    "a list in place": lambda: dict(sampler=Own(InPlace(list))),
    "a deque in place": lambda: dict(sampler=Own(InPlace(deque))),
    "an array in place": lambda: dict(sampler=Own(InPlace(np.array))),
    "a counter in a dict": lambda: dict(sampler=Own(Counts({"n": 0}))),
    "a counter in a tensor": lambda: dict(sampler=Own(Counts({"n": torch.tensor(0)}))),
    "a generator further inside": lambda: dict(sampler=Own(Draws())),
    "batches of such a sampler": lambda: dict(
        batch_sampler=torch.utils.data.BatchSampler(Own(InPlace(list)), 4, False)
    ),
    "a method that counts": lambda: dict(collate_fn=Collators().method),
    "a closure": lambda: dict(collate_fn=closure()),
    "a closure that counts": lambda: dict(collate_fn=counting()),
    "defaults and an attribute of a function": lambda: dict(collate_fn=by_default()),
    "a stream with a generator": lambda: {"rows": streamed()},
    "workers that go on": lambda: {"rows": AtRandom(), "num_workers": 1, "persistent_workers": True},
    "a data set with a generator": lambda: {"rows": Augmented()},
    "what a transform makes, replaces and counts": lambda: {"rows": Transformed(Changes())},
    "a transform far inside": lambda: {"rows": parted(Transformed(Changes()))},
    "a method of another object with slots": lambda: {"rows": Transformed(Slots().draw)},
    "a generator of the module": lambda: {"rows": Transformed(by_a_global_generator)},
}  # fmt: skip


def batches_of_training(kind, how, folder, tokenizer):
    """What training sees of a loader that keeps something, after a start or without one."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0), GENERATOR.seed(1)
    model, config = tiny_llama(num_hidden_layers=1), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    model = model if how == "initialize" else get_peft_model(model, config)
    trainer, seen = plain(folder, tokenizer, model=model, max_steps=4), []
    given = {"collate_fn": stacked, "rows": [{"input_ids": [1, 3, 5 + i]} for i in range(16)]} | KEEP[kind]()
    rows = trainer.train_dataset = given.pop("rows")
    size = {} if "batch_sampler" in given else {"batch_size": 4}
    loader = torch.utils.data.DataLoader(rows, **size, **given)
    trainer.get_train_dataloader = lambda: loader
    if how == "StartCallback":
        trainer.add_callback(lora_init.StartCallback(samples=8))
    if how == "initialize":
        lora_init.initialize(trainer, rank=2, target_modules=["q_proj"], progress=False)
    trainer.model.register_forward_pre_hook(
        lambda model, args, given: seen.append(given["input_ids"].tolist()) if model.training else None,
        with_kwargs=True,
    )
    random.seed(1), np.random.seed(1)
    trainer.train()
    return seen


@pytest.fixture(scope="module")
def without_a_start(tokenizer, tmp_path_factory):
    return cache(lambda kind: batches_of_training(kind, "nothing", tmp_path_factory.mktemp("without"), tokenizer))


@pytest.mark.parametrize("how", ["initialize", "StartCallback"])
@pytest.mark.parametrize("kind", KEEP)
def test_training_gets_the_batches_that_it_would_have_got(kind, how, tmp_path, tokenizer, without_a_start):
    assert batches_of_training(kind, how, tmp_path, tokenizer) == without_a_start(kind) != []


def test_what_cannot_be_put_back_is_told(tmp_path, tokenizer):
    trainer, numbers = plain(tmp_path, tokenizer), itertools.count()
    trainer.train_dataset, trainer.data_collator = Transformed(lambda n: next(numbers) % n), stacked
    with pytest.warns(UserWarning, match="the loader's first batch is another one each time that it is read"):
        lora_init.initialize(trainer, rank=2, progress=False)


class Keys(torch.utils.data.Sampler):
    def __iter__(self):
        return iter([[i // 4, i % 4] for i in range(16)])

    def __len__(self):
        return 16


def test_an_adapter_that_the_data_hold_is_started_all_the_same(tmp_path, tokenizer):
    trainer, begun = plain(tmp_path, tokenizer, model=adapted(), max_steps=1), []
    trainer.train_dataset = Transformed(Changes())
    trainer.train_dataset.held = {name: one for name, one in trainer.model.state_dict().items() if "lora_A" in name}
    before = {name: one.clone() for name, one in trainer.train_dataset.held.items()}
    trainer.data_collator = stacked
    trainer.add_callback(lora_init.StartCallback(samples=8))
    trainer.model.register_forward_pre_hook(
        lambda model, args, given: begun.append({name: one.clone() for name, one in model.state_dict().items()})
        if model.training else None, with_kwargs=True,
    )  # fmt: skip
    trainer.train()
    assert not any(torch.equal(begun[0][name], one) for name, one in before.items())


def test_keys_that_are_lists_are_counted(tmp_path, tokenizer):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, key):
            return {"input_ids": [1, 3, 5 + 4 * key[0] + key[1]]}

    trainer = plain(tmp_path, tokenizer, num_train_epochs=3, max_steps=-1)
    loader = torch.utils.data.DataLoader(Rows(), 4, sampler=Keys(), collate_fn=stacked)
    trainer.get_train_dataloader = lambda: loader
    length = TrainerIntegration(trainer).length
    assert (length.rows, length.epochs, length.batch_size) == (16, 3.0, 4)


def test_a_step_has_the_examples_of_all_processes():
    args = types.SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=3, world_size=4)
    assert examples_of_a_step(args) == 24


@pytest.mark.parametrize(("drawn", "numbers"), [
    (3, [3]), (torch.tensor(3), [3]), (torch.tensor([1, 2]), [1, 2]), (np.array([1, 2]), [1, 2]), (range(2), [0, 1]),
    ((1, torch.tensor(2)), [1, 2]), ([[1, 2], {"a": 1}], ["[1, 2]", "{'a': 1}"]), ("key", ["key"]),
])  # fmt: skip
def test_what_a_sampler_draws_can_be_counted(drawn, numbers):
    assert loaders._numbers(drawn) == numbers


@pytest.mark.parametrize(("batch", "rows"), [
    ({"input_ids": torch.ones(2, 3), "lengths": torch.ones(7)}, 2),
    ({"pixel_values": torch.ones(4, 1, 2), "lengths": torch.ones(5), "loss": torch.tensor(1.0), "text": "a" * 9}, 5),
    # Three texts packed into two rows, with padding after the second; one position for all rows; padding before a text.
    ({"input_ids": torch.ones(2, 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]])}, 3),
    ({"input_ids": torch.ones(4, 3), "position_ids": torch.tensor([[0, 1, 2]])}, 4),
    ({"input_ids": torch.ones(2, 4), "position_ids": torch.tensor([[0, 0, 0, 1], [1, 1, 0, 1]])}, 2),
    # Qwen's positions of text, height and width; those of RoBERTa, which begin later.
    ({"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]]).expand(3, 1, 4)}, 2),
    ({"input_ids": torch.ones(2, 3), "position_ids": torch.tensor([[2, 3, 4], [2, 3, 1]])}, 2),
])  # fmt: skip
def test_the_rows_of_a_batch_are_counted_by_its_tokens_if_it_has_any_and_packed_texts_each(batch, rows):
    assert loaders._rows_of(batch) == rows


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("packed", [{"packing": True}, {"padding_free": True, "max_length": None}, {}])
def test_a_step_of_packed_rows_has_the_texts_that_are_in_them(packed, streamed, tmp_path, tokenizer):
    """By the texts that training sees, whose positions begin with 0 or whose rows have no positions."""
    trl = pytest.importorskip("trl")
    max_steps = 4 if streamed else 6  # the longest texts come first in a stream: all of it, once
    settings = dict(per_device_train_batch_size=4, report_to=[], bf16=False, max_steps=max_steps, max_length=64)
    args = trl.SFTConfig(str(tmp_path), **settings | packed)
    texts = Dataset.from_list([{"text": " ".join(WORDS[:3] * (1 + i % 3))} for i in range(160)])
    texts = texts.to_iterable_dataset() if streamed else texts
    trainer = trl.SFTTrainer(tiny_llama(), args, train_dataset=texts, processing_class=tokenizer)
    found, seen = TrainerIntegration(trainer).length, []
    step = trainer.training_step

    def counted(model, inputs, *rest, **more):
        positions = inputs.get("position_ids")
        seen.append(len(inputs["input_ids"]) if positions is None else int((positions == 0).sum()))
        return step(model, inputs, *rest, **more)

    trainer.training_step = counted
    trainer.train()
    assert found.batch_size == pytest.approx(np.mean(seen), rel=0.2 if streamed else 0.15)
    assert (found.batch_size > 12) == ("packing" in packed)
    assert found.rows == (None if streamed else pytest.approx(160, rel=0.15))


def arguments(**more):
    settings = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "world_size": 1}
    return types.SimpleNamespace(**settings | more)


def of_ids(items):
    return {"input_ids": torch.ones(len(items), 2)}


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_that_draw_parts_draw_all_of_the_data_together(shuffle):
    """In each epoch another part, if they are shuffled: one process sees more rows than its share."""
    sampler = torch.utils.data.DistributedSampler(range(16), num_replicas=2, rank=0, shuffle=shuffle)
    loader = torch.utils.data.DataLoader(range(16), 4, sampler=sampler, collate_fn=of_ids)
    for epochs in (1, 2, 5):
        length = loaders.length_of(arguments(world_size=2), 2 * epochs, loader)
        assert length == TrainingLength(2 * epochs, 8, 16) and length.epochs == epochs
    accumulated = arguments(world_size=2, gradient_accumulation_steps=2)
    assert loaders.length_of(accumulated, 4, loader) == TrainingLength(4, 16, 16)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_training_that_ends_within_an_epoch_has_the_examples_of_a_whole_one(steps):
    sampler = torch.utils.data.SubsetRandomSampler(range(8))
    loader = torch.utils.data.DataLoader(range(16), 4, sampler=sampler, collate_fn=of_ids)
    assert loaders.length_of(arguments(), steps, loader) == TrainingLength(steps, 4, 8)


def test_a_batch_that_is_split_among_processes_has_no_more_examples():
    nothing = loaders._Drawn()
    for split, n in ((True, 6.0), (False, 18.0)):
        inner = types.SimpleNamespace(split_batches=split)
        dispatches = dict(batch_sampler=types.SimpleNamespace(), split_batches=split)  # batches of a plain sampler
        for how in (dict(batch_sampler=inner), dict(split_batches=split), dispatches):
            loader = types.SimpleNamespace(batch_size=6, **how)
            assert loaders._examples_of_a_batch(arguments(world_size=3), loader, nothing) == n
    of_arguments = loaders._examples_of_a_batch(arguments(world_size=3), types.SimpleNamespace(), nothing)
    assert of_arguments == 12.0
    drawn = loaders._Drawn([[1], [2, 3, 4]], 1.0, 2.5)
    assert loaders._examples_of_a_batch(arguments(), types.SimpleNamespace(batch_size=9), drawn) == 5.0


def test_a_training_without_a_loader_is_as_long_as_its_arguments_say():
    asked = arguments(gradient_accumulation_steps=3, world_size=2)
    assert loaders.length_of(asked, 7) == loaders.length_of(asked, 7.0, None) == TrainingLength(7, 24)
    loader = torch.utils.data.DataLoader(range(10), 4, collate_fn=of_ids)
    assert loaders.length_of(arguments(), 3, loader) == TrainingLength(3, 4, 10)
    assert loaders.length_of(arguments(gradient_accumulation_steps=9), 3, loader) == TrainingLength(3, 10, 10)


def test_long_epochs_are_not_drawn(monkeypatch):
    loader = torch.utils.data.DataLoader(range(10), 4, collate_fn=of_ids)
    drawn = loaders._draw(loader, 1.5)
    assert drawn == loaders._Drawn([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [0, 1, 2, 3], [4, 5, 6, 7]], 1.5, 1.0)
    monkeypatch.setattr(loaders, "_MOST_DRAWN", 10)
    assert loaders._draw(loader, 4.0) == loaders._Drawn(drawn.batches[:3], 1.0, 1.0)
    monkeypatch.setattr(loaders, "_MOST_DRAWN", 9)
    assert loaders._draw(loader, 4.0) == loaders._Drawn([], 0.0, 1.0)


def test_models_are_not_copied_with_what_holds_them():
    model, shared = torch.nn.Linear(2, 2), [1]
    held = types.SimpleNamespace(model=model, kept=[1], shared=shared, inner=types.SimpleNamespace(model=model))
    copied = loaders._copied(held, shared)
    assert copied is not held and copied.kept == [1] and copied.kept is not held.kept
    assert copied.model is copied.inner.model is model and copied.shared is shared
    locked = types.SimpleNamespace(lock=threading.Lock())
    method = Collators().method
    assert loaders._copied(locked) is locked and loaders._copied(method) is method
    nested = types.SimpleNamespace(a=types.SimpleNamespace(b=types.SimpleNamespace(c=model)))
    assert [*loaders._models_in(nested)] == [model] and [*loaders._models_in(types.SimpleNamespace(x=nested))] == []


def test_streams_of_datasets_begin_anew_and_others_may_be_there_once():
    stream = Dataset.from_list([{"a": 1}]).to_iterable_dataset()
    used_up = [loaders.is_used_up(rows) for rows in (Steady(), stream, [1], None)]
    assert used_up == [True, False, False, False]


def test_a_loader_is_as_it_was_after_it_was_read():
    class Closes:
        ended = 0

        def end(self):
            self.ended += 1

    generator, collate = torch.Generator().manual_seed(3), Collators()
    inner = torch.utils.data.DataLoader(
        [{"input_ids": [1, i]} for i in range(8)], 4, shuffle=True, generator=generator, collate_fn=collate.method,
        num_workers=1, persistent_workers=True,
    )  # fmt: skip
    loader, before = Closes(), generator.get_state().clone()
    loader.base_dataloader, loader.generator = inner, torch.Generator().manual_seed(4)
    of_loader, method = loader.generator.get_state().clone(), inner.collate_fn
    with loaders.without_trace(loader):
        assert inner.persistent_workers is False
        torch.rand(1, generator=generator), torch.rand(1, generator=loader.generator)
        collate.n = 5
        inner.collate_fn = None
    assert torch.equal(generator.get_state(), before) and torch.equal(loader.generator.get_state(), of_loader)
    assert (inner.persistent_workers, inner.collate_fn, collate.n, loader.ended) == (True, method, 0, 1)


class Raises:
    """A part of a loader that raises whatever is done with it, but for its length."""

    def __len__(self):
        return 8

    def _raise(self, *_):
        raise RuntimeError("mine")

    __call__ = __getitem__ = __iter__ = __deepcopy__ = _raise


@pytest.mark.parametrize("part", ["dataset", "collate_fn", "sampler"])
@pytest.mark.filterwarnings("error")
def test_what_raises_when_it_is_looked_at_is_left_for_training_to_raise(part, tmp_path):
    parts = {"dataset": [*range(8)], "collate_fn": None, "sampler": None} | {part: Raises()}
    loader, args = torch.utils.data.DataLoader(batch_size=4, **parts), TrainingArguments(tmp_path, max_steps=2)
    with without_trace(loader):
        pass
    check_repeats(loader)
    assert length_of(args, 2, loader).batch_size == 4
    with pytest.raises(RuntimeError, match="mine"):
        next(iter(loader))


def test_a_collator_with_a_variable_that_comes_later_is_read_without_a_trace():
    def collate(items):
        return items if len(items) < 9 else later

    loader = torch.utils.data.DataLoader([*range(8)], 4, collate_fn=collate)
    with without_trace(loader):
        assert next(iter(loader)) == [0, 1, 2, 3]
    later = None
    assert collate([]) == [] and later is None


@pytest.mark.parametrize(("why", "stop_reason", "n_batches", "rows"), [
    (loaders._AS_NEW, "exhausted", 50, 400), (loaders._AS_NEW, "exhausted", 1, 48),
    (loaders._AS_NEW, "converged", 50, None), ("another", "exhausted", 50, None),
])  # fmt: skip
def test_a_stream_has_as_many_examples_as_a_pass_to_its_end_has_read(why, stop_reason, n_batches, rows):
    """A batch of one process has 48 / 3 / 2 of them, and a step is no larger than the data."""
    made = types.SimpleNamespace(provenance=types.SimpleNamespace(stop_reason=stop_reason, n_batches=n_batches))
    length = TrainingLength(5, 48, why=why)
    expected = length if rows is None else TrainingLength(5, 48, rows)
    args = arguments(gradient_accumulation_steps=3, world_size=2)
    assert loaders.of_stream(length, args, made) == expected and loaders.of_stream(None, args, made) is None
