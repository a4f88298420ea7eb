"""Convolutions: patches as rows, their statistics, and the adapter that PEFT reads."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lora_init import ExactPCA, allocate_ranks, build_adapter, collect, find_targets
from lora_init.layers.rows import MAX_PATCHES, patches_of
from tests.conftest import refused
from tests.versions import NO_CONFIG

# A convolution and the shape of its input: what varies in the world.
CONVOLUTIONS = {
    "plain": (lambda: nn.Conv2d(3, 8, 3), (2, 3, 9, 7)),
    "strided": (lambda: nn.Conv2d(3, 8, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 3, 9, 7)),
    "one by one": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
    "same, even kernel": (lambda: nn.Conv2d(3, 8, (4, 3), padding="same"), (2, 3, 6, 7)),
    "valid": (lambda: nn.Conv2d(3, 8, 3, padding="valid"), (2, 3, 6, 7)),
    "reflected": (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 7)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 6, 7)),
    "dilated, same": (lambda: nn.Conv2d(3, 8, 3, dilation=2, padding="same"), (2, 3, 8, 7)),
    "without a batch": (lambda: nn.Conv2d(3, 8, 3, padding=1), (3, 9, 7)),
    "audio": (lambda: nn.Conv1d(5, 8, 3, stride=2, padding=1), (2, 5, 20)),
    "audio, same": (lambda: nn.Conv1d(5, 8, 4, padding="same"), (2, 5, 20)),
    "video": (lambda: nn.Conv3d(2, 8, (2, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1)), (2, 2, 6, 5, 5)),
}


class Net(nn.Module):
    """One convolution, so that its input is the batch itself."""

    def __init__(self, convolution):
        super().__init__()
        self.conv = convolution
        self.config = NO_CONFIG

    def forward(self, x):
        return self.conv(x)


def setting(name, n_batches=4):
    build, shape = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(1)
    # Neighbours alike, as in pictures and sound: variances that fall.
    return Net(build()).eval(), [torch.randn(shape, generator=generator).cumsum(-1) / 4 for _ in range(n_batches)]


def applied(model, batches, **arguments):
    stats = collect(model, batches, ["conv"], rank=4, **arguments)
    return build_adapter(stats, 4).apply(copy.deepcopy(model)), stats


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_a_is_what_pefts_a_returns(name):
    model, batches = setting(name)
    peft_model, stats = applied(model, batches)
    a = peft_model.base_model.model.conv.lora_A["default"]
    rows = patches_of("conv", model.conv).rows(batches[0])
    expected = a(batches[0]).detach()
    channels_last = expected.movedim(-len(stats.targets["conv"].kernel) - 1, -1).reshape(-1, 4)
    torch.testing.assert_close(rows @ a.weight.detach().flatten(1).T, channels_last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_statistics_are_those_of_explicit_patches(name):
    model, batches = setting(name)
    stats = collect(model, batches, ["conv"], rank=4)
    exact = ExactPCA()
    for x in batches:
        # Unfolding by hand: a convolution with one output channel for each entry of the patch.
        width = stats.targets["conv"].in_features
        peft_a = build_adapter(stats, 4).apply(copy.deepcopy(model)).base_model.model.conv.lora_A["default"]
        pick = torch.eye(width).reshape(width, *peft_a.weight.shape[1:])
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(peft_a.kernel_size)]
        cut = conv(x if x.dim() == pick.dim() else x[None], pick, stride=peft_a.stride, padding=peft_a.padding)
        exact.partial_fit(cut.movedim(1, -1).reshape(-1, width))
    spectrum, best = stats["conv"], exact.spectrum()
    assert spectrum.n_samples == best.n_samples
    assert spectrum.total_variance == pytest.approx(best.total_variance, rel=1e-5)
    torch.testing.assert_close(spectrum.mean, best.mean, atol=1e-5, rtol=1e-5)
    k = spectrum.n_components
    # What a running decomposition may lose after four batches; each of its components is somewhat short.
    assert float(spectrum.explained_variance.sum()) > 0.98 * float(best.explained_variance[:k].sum())


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_adapter_changes_nothing_and_loads_in_peft(name, use_dora, tmp_path, recwarn):
    model, batches = setting(name)
    if use_dora and name in ("grouped", "without a batch"):
        pytest.skip("PEFT's DoRA takes neither")
    stats = collect(model, batches, ["conv"], rank=4)
    ranks = allocate_ranks(stats, rank=4)
    init = build_adapter(stats, ranks, use_dora=use_dora)
    init.save_pretrained(tmp_path / "adapter", model=model)
    before = model(batches[0]).detach()
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter", is_trainable=True)
    peft_model = init.apply(model)
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in peft_model.state_dict().items())
    for adapted in (loaded, peft_model):
        torch.testing.assert_close(adapted(batches[0]).detach(), before, atol=0 if not use_dora else 1e-5, rtol=0)
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    magnitudes = stats.targets["conv"].out_features if use_dora else 0
    assert trainable == ranks.parameters + magnitudes == init.n_parameters()
    assert not [w for w in recwarn if "missing" in str(w.message)]
    size = sum(t.numel() * 4 for key, t in load_file(tmp_path / "adapter/adapter_model.safetensors").items())
    assert size == 4 * trainable == round(ranks.megabytes() * 10**6) + 4 * magnitudes


def test_ranks_of_a_grouped_convolution_are_multiples_of_its_groups():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=4)
            self.linear = nn.Linear(7, 5)

        def forward(self, x):
            return self.linear(self.grouped(x))

    stats = collect(Two(), [torch.randn(2, 4, 6, 7) for _ in range(3)], ["grouped", "linear"], rank=3)
    for policy in ("eva", "uniform", "cost-aware"):
        plan = allocate_ranks(stats, rank=3, policy=policy)
        assert plan["grouped"] % 4 == 0, policy
        assert plan.total_rank <= 6
    refused("layer 'grouped': rank 3 is no multiple of its 4 groups", build_adapter, stats, 3)


def test_large_images_give_a_bounded_sample_of_patches():
    patches = patches_of("conv", nn.Conv2d(3, 8, 3, padding=1))
    x = torch.randn(3, 3, 120, 100)
    everything = patches.rows(x, most=10**6)
    sampled = patches.rows(x)
    assert len(everything) == 3 * 120 * 100
    assert len(sampled) == MAX_PATCHES
    assert torch.equal(sampled, patches.rows(x))
    # Drawn over all images and places, without repetition.
    known = {tuple(row): i for i, row in enumerate(everything[:, 9:13].tolist())}
    drawn = [known[tuple(row)] for row in sampled[:, 9:13].tolist()]
    assert len(set(drawn)) == MAX_PATCHES
    assert {i // 12000 for i in drawn} == {0, 1, 2}
    counts = torch.bincount(torch.tensor(drawn) % 100 // 10, minlength=10)
    assert counts.min() > 0.7 * MAX_PATCHES / 10


def test_a_dilated_convolution_that_peft_gets_wrong_is_refused():
    model = Net(nn.Conv2d(3, 8, 3, dilation=2))
    refused(r"layer 'conv': PEFT's adapter leaves out dilation=\(2, 2\)", find_targets, model, ["conv"])
    from peft import LoraConfig, get_peft_model

    broken = get_peft_model(model, LoraConfig(r=2, target_modules=["conv"]))
    with pytest.raises(RuntimeError):  # why it is refused: this would be the first step of training
        broken(torch.randn(1, 3, 9, 9))
