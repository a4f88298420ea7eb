"""Models, batches and helpers that several tests of collection need."""

import json
from hashlib import sha256

import pytest
import torch
from torch import nn

from lora_init import find_targets
from lora_init.collection.activations import Sink
from lora_init.collection.losses import count_labels
from lora_init.layers.running import call_model
from lora_init.statistics.statistics import FORMAT, FORMAT_VERSION
from lora_init.statistics.tensorfile import TensorFile
from tests.conftest import batches_for, tiny_llama


def all_rows(model, batches, name):
    return torch.cat([recorded(model, b, name)[b["attention_mask"].bool()] for b in batches])


def low_rank_inputs(n_batches, n=64, d=24, rank=3, seed=0, noise=0.05):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, rank, generator=generator)).Q
    return [
        torch.randn(n, rank, generator=generator) @ basis.T + noise * torch.randn(n, d, generator=generator)
        for _ in range(n_batches)
    ]


def two_layers():
    return nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


class Into(Sink):
    def __init__(self, rows):
        self.rows = rows


@torch.no_grad()
def run(hooks, batch, rows, forward=call_model):
    with hooks.watch(batch, Into(rows)) as moved:
        forward(hooks.model, moved)


def recorded(model, batch, name):
    """What a plain hook sees."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()(**batch)
    handle.remove()
    return inputs[0]


def labelled(name, **options):
    """Batches of `batches_for` with labels for every model."""
    batches = batches_for(name, **options)
    for i, batch in enumerate(batches):
        rows = len(next(iter(batch.values())))
        batch.setdefault("labels", (torch.arange(rows) + i) % 2)
    return batches


def exact(model, batches, names, counts):
    """Of each layer the gradient of the mean loss over all labels, by autograd; and rows x and g of the summed loss."""
    rows = {name: ([], []) for name in names}
    total, n = dict.fromkeys(names, 0.0), 0

    def after(name):
        def hook(module, args, output):
            output.retain_grad()
            kept[name] = (args[0].detach(), output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(after(name)) for name in names]
    for batch, count in zip(batches, counts, strict=True):
        kept = {}
        model.zero_grad()
        (model(**batch).loss * count).backward()
        n += count
        for name in names:
            x, y = kept[name]
            rows[name][0].append(x.flatten(0, -2))
            rows[name][1].append(y.grad.flatten(0, -2))
            weight = model.get_submodule(name).weight
            total[name] += (weight.grad if isinstance(model.get_submodule(name), nn.Linear) else weight.grad.T).double()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return {name: (total[name] / n, *(torch.cat(part).double() for part in rows[name])) for name in names}


def counts_of(model, batches):
    return [count_labels(model, batch) for batch in batches]


SETTINGS = {"rank": 4, "tolerance": 0.0}


Q = "model.layers.1.self_attn.q_proj"


def llama(seed=5):
    torch.manual_seed(seed)
    return tiny_llama()


def kept(stats, folder, name):
    """Keep statistics; return a hash of all of their file: its header has the hash of every tensor."""
    file = TensorFile(stats.save(folder / name), FORMAT, FORMAT_VERSION)
    return sha256(json.dumps(file.header).encode()).hexdigest()


def message(work):
    """The error of some work: its type and text; empty if there is none."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def plain():
    torch.manual_seed(3)
    return tiny_llama(hidden_size=64, intermediate_size=128)


def hqq_4bit(directory):
    """transformers refuses HQQ on a CPU; its layers work there."""
    quantize = pytest.importorskip("hqq.core.quantize")
    model = plain()
    for name in find_targets(model).layers:
        parent, _, child = name.rpartition(".")
        config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
        layer = quantize.HQQLinear(model.get_submodule(name), config, compute_dtype=torch.float32, device="cpu")
        setattr(model.get_submodule(parent), child, layer)
    return model.eval()


class PackedLinear(nn.Module):
    """What a GPTQ layer shows: widths, buffers with packed weights, a forward; no weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", (layer.weight.detach() * 1000).round().to(torch.int32))

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) / 1000).T


def rounded(model, bits=3):
    """Round weights in place, in groups of 64."""
    for name in find_targets(model).layers:
        weight = model.get_submodule(name).weight.data
        groups = weight.view(-1, 64)
        step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / (2**bits - 1)
        groups.copy_((groups / step).round() * step)
    return model
