"""Statistics that are made up, and what is looked at on a model with an adapter."""

import torch
from torch import nn

from lora_init.layers.targets import find_targets
from lora_init.planning.allocate import RankAllocation
from lora_init.statistics.spectrum import Spectrum
from lora_init.statistics.statistics import Provenance, Statistics

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bert": "SEQ_CLS", "vit": None}


def made_up_statistics(model, target_modules="all-linear", k=8, task_type=None, model_id="", n_samples=500, **options):
    """Statistics with random orthonormal components: what they say doesn't matter to the adapter."""
    targets = find_targets(model, target_modules, task_type=task_type, **options)
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for name, target in targets.layers.items():
        width = target.in_features
        rows = torch.linalg.qr(torch.randn(width, min(k, width), generator=generator)).Q.T.contiguous()
        variances = torch.arange(len(rows), 0, -1).double()
        groups[name] = Spectrum(rows, variances, float(variances.sum()) * 2, torch.zeros(width), n_samples)
    return Statistics(
        groups=groups,
        group_of={name: name for name in groups},
        targets=targets.layers,
        unsupported=targets.unsupported,
        provenance=Provenance(
            model_id=model_id,
            model_class=type(model).__name__,
            fingerprint="",
            target_modules=target_modules,
            task_type=task_type,
            rank=4,
            n_samples=n_samples,
        ),
    )


def uneven(stats, rank=4):
    """A plan with every rank from 0 to 7, average `rank`."""
    return RankAllocation({name: i % 8 for i, name in enumerate(stats)}, rank, dict(stats.targets))


def logits(model, batch):
    with torch.no_grad():
        return next(v for k, v in model(**batch).items() if k in ("logits", "last_hidden_state"))


def lora_layers(peft_model):
    from peft.tuners.lora import LoraLayer

    return {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def snapshot(model):
    """Everything about a model that a failed `apply` could leave behind."""
    modules = {name: (id(one), one.training, len(one._forward_hooks)) for name, one in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    return modules, parameters, sorted(vars(model))


def same(before, after):
    weights = all(torch.equal(before[1][n][2], after[1][n][2]) for n in before[1])
    flags = {n: v[:2] for n, v in before[1].items()} == {n: v[:2] for n, v in after[1].items()}
    return before[0] == after[0] and flags and weights and before[2] == after[2]


def tiny(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias), nn.Tanh(), nn.Linear(32, 8, bias)).double()


def batches(n=4, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(64, 16, generator=generator, dtype=torch.float64) for _ in range(n)]
