"""Starts by the gradient: what they maximise, against autograd; the papers' formulas; what becomes of the model."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn

import lora_init
from lora_init.adapters.peft_model import adapter_layers
from lora_init.building.build import build_adapter
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.planning.allocate import allocate_ranks
from lora_init.starts.initializers import natural_gradient, natural_gradient_step, natural_step, scaled_by_gamma
from lora_init.starts.starts import find_start
from lora_init.statistics.gradient_spectrum import GradientSpectrum
from lora_init.statistics.spectrum import Spectrum
from tests.collection.made import counts_of, exact, labelled
from tests.conftest import refused, tiny_gpt2, tiny_llama

RANK = 4
STEPS = ["lora-one", "natural-gradient-step"]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, batches = tiny_llama(), labelled("llama")
    # All directions, so that what is tested is the start and not the decomposition.
    return model, batches, collect(model, batches, rank=16, rho=3.0, gradients=True, center=False)


def a_of(stats, method, rank=RANK, **options):
    return {name: a for name, (a, _) in build_adapter(stats, rank, method, unit_rows=True, **options).weights.items()}


class PerToken(nn.Module):
    """A layer with a B of its own for every token, so that autograd gives the gradient of each."""

    def __init__(self, layer, a):
        super().__init__()
        self.layer, self.a, self.b = layer, a, None

    def forward(self, x):
        self.b = torch.zeros(*x.shape[:-1], self.layer.out_features, len(self.a), requires_grad=True)
        return self.layer(x) + (self.b @ (x.detach() @ self.a.T)[..., None])[..., 0]


def squared_gradients(model, batches, name, a, per_token):
    """Sum of |dL/dB|^2 by autograd, L the summed loss: of a B for each token, or of one B for all of them."""
    parent, _, last = name.rpartition(".")
    plain = model.get_submodule(name)
    layer = PerToken(plain, a)
    total, shared = 0.0, 0.0
    setattr(model.get_submodule(parent), last, layer)
    try:
        for batch, count in zip(batches, counts_of(model, batches), strict=True):
            (model(**batch).loss * count).backward()
            total += float(layer.b.grad.double().square().sum())
            shared = shared + layer.b.grad.double().flatten(0, -3).sum(0)
    finally:
        setattr(model.get_submodule(parent), last, plain)
        model.zero_grad(set_to_none=True)
    return total if per_token else float(shared.square().sum())


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
)
@pytest.mark.parametrize(("method", "per_token"), [("eva-grad", True), ("grad-a", False)])
def test_the_chosen_a_has_the_largest_squared_gradient_of_b(case, method, per_token, name):
    """eva-grad of the gradient of single tokens, grad-a of the mean gradient: the value is autograd's, and maximal."""
    model, batches, stats = case
    found = {
        m: squared_gradients(model, batches, name, a_of(stats, m)[name], per_token)
        for m in (method, "eva", "orthogonal")
    }
    gradient, n = stats.gradient(name), stats.gradient(name).weighted.n_samples
    if per_token:
        promised = float(gradient.weighted.explained_variance[:RANK].sum()) * (n - 1)
    else:
        promised = float(gradient.singular_values[:RANK].square().sum()) * stats.provenance.n_labels**2
    assert found[method] == pytest.approx(promised, rel=1e-3)
    assert found[method] > found["eva"] and found[method] > found["orthogonal"]
    for seed in range(5):
        a = a_of(stats, "orthogonal", seed=seed)[name]
        assert squared_gradients(model, batches, name, a, per_token) < found[method]


def reference(mean, rank, method, gamma):
    """A and B by the papers, from the full gradient."""
    u, s, v = torch.linalg.svd(mean, full_matrices=False)
    scale = mean.shape[0] ** 0.25 / gamma**0.5
    if method == "lora-ga":
        return scale * v[:rank], scale * u[:, rank : 2 * rank]
    root = (s[:rank] / s[0]).sqrt()
    return scale * root[:, None] * v[:rank], -scale * u[:, :rank] * root


@pytest.mark.parametrize("method", ["lora-ga", "lora-one"])
@pytest.mark.parametrize("gamma", [None, 4.0])
def test_the_papers_formulas(case, method, gamma):
    model, batches, stats = case
    init = build_adapter(stats, RANK, method, gamma=gamma)
    truth = exact(model, batches, list(stats), counts_of(model, batches))
    for name, (a, b) in init.weights.items():
        expected_a, expected_b = reference(truth[name][0], RANK, method, gamma or find_start(method).gamma)
        if method == "lora-one":
            torch.testing.assert_close(b.double() @ a.double(), expected_b @ expected_a, rtol=0.0, atol=1e-4)
        for got, expected in ((a, expected_a), (b.T, expected_b.T)):  # singular vectors have no sign
            signs = (got.double() * expected).sum(1, keepdim=True).sign()
            torch.testing.assert_close(got.double() * signs, expected, rtol=0.0, atol=2e-3)


def planted(d_in=7, d_out=5, k=3, center=True):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    axes = lambda n, d: torch.linalg.qr(draw(d, n)).Q.T.contiguous()  # noqa: E731
    variance = torch.tensor([50.0, 9.0, 4.0], dtype=torch.float64)
    spectrum = Spectrum(axes(k, d_in), variance, 63.0 + 2.0, draw(d_in) if center else torch.zeros(d_in), 100)
    moment = draw(d_out).double().square() + 0.1
    values = torch.tensor([3.0, 2.0, 0.5], dtype=torch.float64)
    return spectrum, GradientSpectrum(spectrum, axes(k, d_out), values, axes(k, d_in), moment, 1.0, 1)


def dense(spectrum, gradient, rank):
    """S_x, S_y and the mean gradient of a planted layer as a start of this rank knows them, float64."""
    v, variance, mean = spectrum.components[:rank].double(), spectrum.explained_variance[:rank], spectrum.mean.double()
    rest = (spectrum.total_variance - variance.sum()) / (7 - rank)
    s_x = v.T @ torch.diag(variance - rest) @ v + rest * torch.eye(7) + mean[:, None] * mean
    s_x = s_x + 0.01 * s_x.trace() / 7 * torch.eye(7)
    s_y = torch.diag(gradient.output_moment + 0.01 * gradient.output_moment.mean())
    u, s, v = gradient.left[: 2 * rank], gradient.singular_values[: 2 * rank], gradient.right[: 2 * rank]
    return s_x, s_y, u.double().T @ torch.diag(s) @ v.double()


@pytest.mark.parametrize("center", [True, False])
def test_the_natural_gradient_against_dense_inverses(center):
    spectrum, gradient = planted(center=center)
    s_x, s_y, mean_gradient = dense(spectrum, gradient, 3)
    natural = -torch.linalg.inv(s_y) @ mean_gradient @ torch.linalg.inv(s_x)
    left, values, right = natural_step(spectrum, gradient, 3)
    torch.testing.assert_close(left.double().T @ torch.diag(values) @ right.double(), natural, rtol=0.0, atol=1e-5)

    s_x, s_y, mean_gradient = dense(spectrum, gradient, 2)
    natural = -torch.linalg.inv(s_y) @ mean_gradient @ torch.linalg.inv(s_x)
    root_x, root_y = (h @ torch.diag(e.sqrt()) @ h.T for e, h in map(torch.linalg.eigh, (s_x, s_y)))
    u, s, vh = torch.linalg.svd(root_y @ natural @ root_x)
    inverses = torch.linalg.inv(root_y), torch.linalg.inv(root_x)
    expected = inverses[0] @ u[:, :2] @ torch.diag(s[:2]) @ vh[:2] @ inverses[1]
    left, values, right = natural_step(spectrum, gradient, 2)
    torch.testing.assert_close(left.double().T @ torch.diag(values) @ right.double(), expected, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(values, torch.linalg.svdvals(expected)[:2], rtol=1e-5, atol=0.0)

    # More directions than twice the rank, collected for another start, change nothing.
    first, gradient_of_two = (
        natural_step(spectrum, gradient, 1),
        replace(
            gradient, left=gradient.left[:2], singular_values=gradient.singular_values[:2], right=gradient.right[:2]
        ),
    )
    for own, other in zip(first, natural_step(spectrum, gradient_of_two, 1), strict=True):
        torch.testing.assert_close(own, other, rtol=0.0, atol=0.0)

    a = natural_gradient(spectrum, gradient, 2)
    assert torch.allclose(a, right) and torch.allclose(a @ a.T, torch.eye(2), atol=1e-6)
    a, b = scaled_by_gamma(natural_gradient_step(spectrum, gradient, 2), gamma=64.0)
    step = expected / values[0] * 5**0.5 / 64
    torch.testing.assert_close(b.double() @ a.double(), step, rtol=0.0, atol=1e-6)


def tiny_copy(model):
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def loss_of(model, batches):
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)


@torch.no_grad()
def logits(model, batches):
    return torch.cat([model(**batch).logits.flatten() for batch in batches])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("correct_base", [True, False])
def test_lora_ga_keeps_the_output_and_is_saved_as_an_ordinary_adapter(make, correct_base, tmp_path):
    batches = labelled("llama")
    model = make()
    plain = tiny_copy(model)
    before, output = {n: p.detach().clone() for n, p in model.named_parameters()}, logits(model, batches)
    stats = collect(model, batches, rank=RANK, gradients=True)
    init = build_adapter(stats, allocate_ranks(stats, rank=3, rho=1.3), "lora-ga", lora_alpha=8, gamma=2.0)
    assert init.corrects_base and not init.changes_output
    init.save_pretrained(tmp_path / "start")
    peft_model = init.apply(model, correct_base=correct_base)
    # As off by rounding as a weight that was taken apart: B A is as large as the weights here.
    assert (logits(peft_model, batches) - output).abs().max() < 1e-4 * output.abs().max()
    weights = {n.replace(".base_layer", ""): p for n, p in peft_model.get_base_model().named_parameters()}
    same = [torch.equal(weights[n], p) for n, p in before.items() if n.removesuffix(".weight") in init.weights]
    assert same == [not correct_base] * len(init.weights)

    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained = logits(peft_model, batches)
    assert (trained - output).abs().max() > 1e-2 * output.abs().max()
    peft_model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    again = PeftModel.from_pretrained(plain, tmp_path / "trained").eval()
    assert (logits(again, batches) - trained).abs().max() < 1e-4 * trained.abs().max()
    layers = adapter_layers(again)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {n: 2 * r for n, r in init.ranks.items()}


def test_a_saved_start_goes_on_a_corrected_base(case, tmp_path):
    model, batches, stats = case
    output = logits(model, batches)
    for use_rslora in (False, True):
        init = build_adapter(stats, RANK, "lora-ga", use_rslora=use_rslora)
        init.save_pretrained(tmp_path / "start", overwrite=True)
        assert "lora_init.correct_base(base_model, directory)" in (tmp_path / "start" / "README.md").read_text()
        base = tiny_copy(model)
        wrong = PeftModel.from_pretrained(tiny_copy(model), tmp_path / "start").eval()
        assert (logits(wrong, batches) - output).abs().max() > 1e-2 * output.abs().max()
        lora_init.correct_base(base, tmp_path / "start")
        right = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True).eval()
        assert (logits(right, batches) - output).abs().max() < 1e-4 * output.abs().max()
    twice = tiny_copy(model)
    lora_init.correct_base(twice, tmp_path / "start")
    for other in (twice, tiny_gpt2()):
        with pytest.raises(LoraInitError, match=r"was made for another model than this .* or its weights have been c"):
            lora_init.correct_base(other, tmp_path / "start")
    right.save_pretrained(tmp_path / "trained")
    no_start = "trained has no lora_init.json of its weights, so it is no adapter before"
    refused(no_start, lora_init.correct_base, tiny_copy(model), tmp_path / "trained")
    for directory in ("start", "trained"):
        with pytest.raises(LoraInitError, match=f"{directory} began as lora-ga, .*does not fit the plain base"):
            lora_init.intruder_dimensions(tiny_copy(model), tmp_path / directory)
    converted = dict(path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    right.save_pretrained(tmp_path / "converted", **converted)
    assert lora_init.intruder_dimensions(tiny_copy(model), tmp_path / "converted").count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(method="lora-ga", ranks=16),
            r"rank 16 needs 32 singular vectors of the mean gradient, and there are 16. Give no layer more than rank "
            "8, or collect from more data or for a larger rank",
        ),
        (dict(method="eva-grad", gamma=3.0), "gamma=3.0 with method='eva-grad': it is a positive number, for 'natural"),
        (dict(method="lora-one", gamma=-1.0), "gamma=-1.0 with method='lora-one'"),
        (dict(method="lora-one", use_dora=True), "starts with B other than zero, and DoRA"),
        (dict(method="eva-gradd"), "Did you mean eva-grad. Choose from eva, .*eva-grad"),
    ],
)
def test_what_cannot_be_built_is_said(case, options, message):
    refused(message, build_adapter, case[2], **dict(ranks=RANK) | options)


def test_a_tied_output_embedding_does_not_change_the_input_embedding(tmp_path):
    model, batches = tiny_llama(tie_word_embeddings=True), labelled("llama")
    output = logits(model, batches)
    stats = collect(model, batches, ["lm_head", "q_proj"], rank=RANK, gradients=True)
    init = build_adapter(stats, 2, "lora-ga", gamma=2.0)
    refused("'lm_head' shares its weight with another module", init.apply, model)
    peft_model = init.apply(model, correct_base=False)
    for a, b in init.weights.values():  # the model has copies of them
        a.zero_(), b.zero_()
    assert (logits(peft_model, batches) - output).abs().max() < 1e-4 * output.abs().max()
