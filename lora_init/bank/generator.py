"""Prompts -> the weights of an adapter: the decoder of Drag-and-Drop LLMs (arXiv 2506.16406), sized to a bank.

As in the paper, a batch of prompts is the condition, a cascade of hyper-convolutions turns its embeddings into a grid
of weights, and pairs of a batch of prompts and a checkpoint of the same task teach it by the squared error.
What differs: one vector for each prompt instead of one for each of its tokens; weights less their mean over the
bank, over the standard deviation of each A and B; before that, each adapter is rotated (B A stays) to be as near as
possible to the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_init.bank.store import GENERATOR, Bank
from lora_init.errors import LoraInitError
from lora_init.serving.compress import factorise, truncate
from lora_init.serving.trained import Layer
from lora_init.statistics.tensorfile import TensorFile, write_tensors

N_PROMPTS = 32  # of one condition
STEPS = 1600  # of one condition each
_LEARNING_RATE = 1e-3
_HEIGHT, _WIDTH = 10, 128  # of a token, near the paper's 10 x 130
# Between the blocks, and fewer where there is less to write. For 15 tasks of a 135M model at rank 4 that is 2.9M
# parameters. They reproduce 20 % of what distinguishes the tasks' adapters after 400 s on one core; with 64 channels it
# was 13 % after 350 s.
_CHANNELS = 256
_FORMAT, _VERSION = "lora_init.generator", 1


class HyperConv(nn.Module):
    """Turn a grid [n, l, c] into one of another size by three convolutions, each with one axis as its channels."""

    def __init__(self, size: tuple[int, int, int], new_size: tuple[int, int, int]) -> None:
        super().__init__()
        (n, l, c), (new_n, new_l, new_c) = size, new_size  # noqa: E741 - the paper's letters
        self.along_c = nn.Conv2d(c, new_c, 3, padding=1)
        self.along_l = nn.Conv2d(l, new_l, 3, padding=1)
        self.along_n = nn.Conv2d(n, new_n, 3, padding=1)

    def forward(self, grid: Tensor) -> Tensor:
        """Map [batch, n, l, c] to [batch, n', l', c']."""
        # Conv2d takes the axis after the batch for its channels, so that axis is brought there and back.
        grid = self.along_c(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # batch, n, l, c'
        grid = self.along_l(nn.functional.leaky_relu(grid).transpose(1, 2)).transpose(1, 2)  # batch, n, l', c'
        mapped: Tensor = self.along_n(nn.functional.leaky_relu(grid))  # batch, n', l', c'
        return mapped


class Decoder(nn.Module):
    """A cascade of hyper-convolutions from embeddings [batch, prompts, d] to a grid of weights [batch, n, 10, 128]."""

    def __init__(self, width: int, n_tokens: int) -> None:
        super().__init__()
        self.columns = math.ceil(width / _HEIGHT)
        channels = min(_CHANNELS, max(32, n_tokens // 3))
        sizes = [
            (N_PROMPTS, _HEIGHT, self.columns), (N_PROMPTS, _HEIGHT, channels), (channels, _HEIGHT, _WIDTH),
            (n_tokens, _HEIGHT, _WIDTH),
        ]  # fmt: skip
        self.blocks = nn.ModuleList(HyperConv(a, b) for a, b in pairwise(sizes))

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map a batch of conditions to a batch of grids."""
        missing = self.columns * _HEIGHT - embeddings.shape[-1]
        padded = nn.functional.pad(embeddings, (0, missing))
        grid = padded.view(*padded.shape[:-1], _HEIGHT, self.columns)  # batch, prompts, d -> batch, prompts, 10, d / 10
        for i, block in enumerate(self.blocks):
            if i:  # the first block reads the embeddings as they are
                grid = nn.functional.leaky_relu(grid)
            grid = block(grid)
        return grid


@dataclass(frozen=True, eq=False)
class Generator:
    """A trained decoder with what its numbers mean."""

    decoder: Decoder
    shapes: Mapping[str, tuple[int, int, int]]  # for each layer, its rank, d_in and d_out
    center: Tensor  # mean of the weights over the bank, float32 [n weights]
    scale: Tensor  # standard deviation of each layer's A and of its B, spread over their weights, float32 [n weights]
    shift: Tensor  # mean of the embeddings of the bank's prompts, float32 [d]
    spread: Tensor  # their standard deviation, float32 [d]
    tasks: Sequence[str]  # tasks of the bank when it was trained
    explained: float  # share of the variance of the bank's weights that it reproduces from prompts that it did not see

    @torch.no_grad()
    def generate(self, embeddings: Tensor) -> dict[str, Layer]:
        """Make each layer, under a scaling of 1, from the embeddings of prompts, float32 [n, d]."""
        condition = _conditions((embeddings - self.shift) / self.spread, torch.arange(N_PROMPTS))
        grid = self.decoder(condition[None])[0]  # tokens, 10, 128
        # The last token is used in part, where the weights are no multiple of its size.
        flat = grid.flatten()[: len(self.center)] * self.scale + self.center
        return _unflattened(flat, self.shapes)

    def save(self, bank: Bank) -> Path:
        """Write it into the bank, instead of an earlier one."""
        state = {f"decoder {name}": value for name, value in self.decoder.state_dict().items()}
        own = {name: getattr(self, name) for name in ("center", "scale", "shift", "spread")}
        header = {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()}, "tasks": list(self.tasks),
            "explained": self.explained, "fingerprint": bank.fingerprint,
        }  # fmt: skip
        return write_tensors(bank.path / GENERATOR, _FORMAT, _VERSION, header, state | own)


def load_generator(bank: Bank) -> Generator:
    """Read the generator of a bank."""
    path = bank.path / GENERATOR
    if not path.is_file():
        raise LoraInitError(f"{bank.path} has no generator yet. Train it: lora-init bank train {bank.path}.")
    file = TensorFile(path, _FORMAT, _VERSION)
    with file.checking("the generator"):
        header = file.header
        if header["fingerprint"] != bank.fingerprint:
            raise LoraInitError(f"{path} is for another base model. Train it again: lora-init bank train {bank.path}.")
        shapes = {str(name): (int(r), int(d_in), int(d_out)) for name, (r, d_in, d_out) in header["shapes"].items()}
        center, scale = file.tensor("center"), file.tensor("scale")
        shift, spread = file.tensor("shift"), file.tensor("spread")
        if not len(center) == len(scale) == _n_weights(shapes):  # before a decoder is made for so many
            raise ValueError(f"{len(center)} weights instead of {_n_weights(shapes)}")
        decoder = Decoder(len(shift), _n_tokens(shapes))
        decoder.load_state_dict({name: file.tensor(f"decoder {name}") for name in decoder.state_dict()})
        return Generator(
            decoder.eval(), shapes, center, scale, shift, spread, list(header["tasks"]), float(header["explained"])
        )


def train_generator(
    bank: Bank,
    rank: int | None = None,
    steps: int = STEPS,
    seed: int = 0,
    say: Callable[[int, float], None] = lambda step, loss: None,
) -> Generator:
    """Train a generator on the adapters of a bank, all entries of two tasks or more, and their prompts.

    Adapters of a higher rank are cut to `rank`, by default the least of the bank's. `say` receives the step and its
    loss, the mean squared error over the variance of the weights.
    """
    if len(bank.tasks) < 2:
        raise LoraInitError(f"{bank.path} has one task, and a generator learns from what differs. Add another task.")
    rank = rank or min(entry.rank for entry in bank.entries.values())
    adapters = aligned(bank, rank)
    shapes = _shapes(next(iter(adapters.values())))
    weights = {name: _flattened(adapter) for name, adapter in adapters.items()}
    del adapters  # which holds all weights a second time
    first, *others = weights.values()
    if all(torch.equal(flat, first) for flat in others):
        raise LoraInitError(f"the adapters of {bank.path} are all the same. A generator learns from what differs.")
    # The decoder writes numbers of about one size: what distinguishes an adapter from the mean, over the spread of each
    # A and B.
    center = torch.stack(list(weights.values())).mean(0)
    scale = _scales([flat - center for flat in weights.values()], shapes)
    prompts = _prompts(bank)
    all_prompts = torch.cat(list(prompts.values()))
    shift, spread = all_prompts.mean(0), all_prompts.std(0).clamp_min(1e-6)  # a dimension may be constant
    # The last eighth of each task's prompts is never trained on: `explained` is measured with it.
    seen, unseen = {}, {}
    for name, rows in prompts.items():
        standardized = (rows - shift) / spread
        n_seen = max(1, len(rows) * 7 // 8)
        seen[name], unseen[name] = standardized[:n_seen], standardized[n_seen:]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw from the global generator, which is the caller's
        torch.manual_seed(seed)
        decoder = Decoder(all_prompts.shape[1], _n_tokens(shapes))
    optimizer = torch.optim.AdamW(decoder.parameters(), _LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    names = list(weights)

    def error(name: str, rows: Tensor, chosen: Tensor) -> Tensor:
        grid = decoder(_conditions(rows, chosen)[None])[0]
        off: Tensor = grid.flatten()[: len(center)] - (weights[name] - center) / scale
        return off.square().mean()

    for step in range(steps):
        name = names[int(torch.randint(len(names), (1,), generator=generator))]
        rows = seen[name]
        # With replacement: a task may have fewer prompts than a condition takes.
        loss = error(name, rows, torch.randint(len(rows), (N_PROMPTS,), generator=generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        say(step + 1, float(loss.detach()))
    decoder.eval()
    left, total = [], []  # of each adapter, the squared errors of the decoder and of the mean of all
    with torch.no_grad():
        for name in names:
            left.append(float(error(name, unseen[name], torch.arange(N_PROMPTS))))
            total.append(float(((weights[name] - center) / scale).square().mean()))
    explained = 1.0 - sum(left) / sum(total)
    return Generator(decoder, shapes, center, scale, shift, spread, list(bank.tasks), explained)


def _prompts(bank: Bank) -> dict[str, Tensor]:
    """Read the embeddings of each entry's prompts, [n, d]; refuse an entry with a single one."""
    prompts = {name: bank.embeddings(name) for name in bank.entries}
    for name, rows in prompts.items():
        if len(rows) < 2:  # one to train on, one to measure with
            raise LoraInitError(f"entry {name!r} of {bank.path} has a single prompt. Add it with more of its data.")
    return prompts


# B A does not determine B and A: for every rotation R, (B R^T)(R A) is the same update. Two adapters that do the same
# may therefore have quite different numbers, and their mean means nothing. Rotated to be near one of them, numbers at
# the same place belong together.
def aligned(bank: Bank, rank: int) -> dict[str, dict[str, Layer]]:
    """Bring all adapters to one rank, and rotate each to be as near as possible to the first one."""
    adapters: dict[str, dict[str, Layer]] = {}
    first: dict[str, Layer] | None = None
    for name in bank.entries:
        cut = {n: balanced(layer, rank) for n, layer in bank.layers(name).items()}
        if first is None:
            first = cut
        elif _shapes(cut) != _shapes(first):
            raise LoraInitError(f"entry {name!r} of {bank.path} adapts other layers than the first. Leave it out.")
        else:
            cut = {n: _rotated(cut[n], first[n]) for n in first}
        adapters[name] = cut
    return adapters


def balanced(layer: Layer, rank: int) -> Layer:
    """Compute the update's best approximation of a rank, with A A^T = B^T B and a scaling of 1."""
    whole = layer.rescaled(1.0).padded(max(rank + 1, layer.rank))  # one more, so that `truncate` always acts
    return truncate(whole, factorise(whole), rank).padded(rank)


def _rotated(layer: Layer, to: Layer) -> Layer:
    # B R^T and R A are the same B A, nearest where R is this polar factor (Procrustes problem, Schoenemann 1966).
    u, _, vh = torch.linalg.svd((to.a @ layer.a.T + to.b.T @ layer.b).double())
    rotation = (u @ vh).float()
    return replace(layer, a=rotation @ layer.a, b=layer.b @ rotation.T)


def _shapes(adapter: Mapping[str, Layer]) -> dict[str, tuple[int, int, int]]:
    """Return rank, d_in and d_out of each layer."""
    return {name: (layer.rank, *layer.widths) for name, layer in adapter.items()}


def _parts(adapter: Mapping[str, Layer]) -> list[Tensor]:
    """Return A [r, d_in] and B transposed [r, d_out] of each layer, in the order in which they are flattened."""
    parts: list[Tensor] = []
    for layer in adapter.values():
        parts += (layer.a, layer.b.T)
    return parts


def _flattened(adapter: Mapping[str, Layer]) -> Tensor:
    return torch.cat([part.flatten() for part in _parts(adapter)])


def _unflattened(flat: Tensor, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, Layer]:
    """Make layers of scaling 1 from what `_flattened` returns."""
    sizes: list[int] = []
    for rank, d_in, d_out in shapes.values():
        sizes += (rank * d_in, rank * d_out)
    parts = iter(torch.split(flat, sizes))
    layers = {}
    for name, (rank, _, _) in shapes.items():
        a, b_transposed = next(parts).view(rank, -1), next(parts).view(rank, -1)
        layers[name] = Layer(a, b_transposed.T, 1.0)
    return layers


def _scales(differences: Sequence[Tensor], shapes: Mapping[str, tuple[int, int, int]]) -> Tensor:
    """Compute the standard deviation of each A and each B over the bank, spread over its weights."""
    squares = torch.stack(list(differences)).square().mean(0)
    scales = []
    for part in _parts(_unflattened(squares, shapes)):
        deviation = part.mean().sqrt().clamp_min(1e-12)  # 0 for an A or B in which all adapters agree
        scales.append(deviation.expand(part.numel()))
    return torch.cat(scales)


def _n_tokens(shapes: Mapping[str, tuple[int, int, int]]) -> int:
    return math.ceil(_n_weights(shapes) / (_HEIGHT * _WIDTH))


def _n_weights(shapes: Mapping[str, tuple[int, int, int]]) -> int:
    return sum(rank * (d_in + d_out) for rank, d_in, d_out in shapes.values())


def _conditions(rows: Tensor, chosen: Tensor) -> Tensor:
    """Take the chosen rows, from the beginning again where there are fewer, [prompts, d]."""
    return rows[chosen % len(rows)]
