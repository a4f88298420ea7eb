"""Backward passes: the numbers against autograd's, what they leave behind, and what cannot be differentiated."""

import pytest
import torch
from torch import nn

from lora_init.collection.activations import ActivationHooks, Sink
from lora_init.collection.backward import BackwardHooks
from lora_init.collection.collect import collect
from lora_init.errors import LoraInitError
from lora_init.layers import wrappers
from lora_init.layers.masks import TokenMasks
from lora_init.layers.running import call_model
from lora_init.layers.targets import find_targets
from tests.collection.made import counts_of, exact, labelled
from tests.conftest import MODELS, batches_for, refused, tiny_llama
from tests.layers.made import BOTH, mixtral


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_numbers_are_those_of_autograd(name):
    """On every architecture: weighted second moment, mean gradient, output moment and GoRA's importance."""
    model, batches = MODELS[name](), labelled(name)
    stats = collect(model, batches, rank=8, rho=2.0, gradients=True, tolerance=0.0)
    names = [n for i, n in enumerate(stats) if i % 3 == 0]
    truth = exact(model, batches, names, counts_of(model, batches))
    assert stats.provenance.gradients and stats.provenance.n_labels == sum(counts_of(model, batches))
    for layer in names:
        gradient, (mean, x, g) = stats.gradient(layer), truth[layer]
        best = torch.linalg.svdvals(mean)[:4].square().sum()
        # The spectra of random models are flat, and 16 directions are kept of up to 48.
        assert float((mean @ gradient.right[:4].double().T).square().sum() / best) > 0.96
        assert float((gradient.left[:4].double() @ mean).square().sum() / best) > 0.96
        assert float(gradient.singular_values[:4].square().sum() / best) == pytest.approx(1.0, abs=0.05)
        weighted = g.norm(dim=1, keepdim=True) * x  # padding has no gradient, so it adds nothing
        n = gradient.weighted.n_samples
        assert n == (len(x) if name in ("vit",) else n) and n <= len(x)
        assert gradient.weighted.total_variance == pytest.approx(float(weighted.square().sum()) / (n - 1), rel=1e-4)
        best = torch.linalg.eigvalsh(weighted.T @ weighted).flip(0)[:8].sum()
        found = (weighted @ gradient.weighted.components[:8].double().T).square().sum()
        assert float(found / best) > 0.97  # what 8 of 16 components promise, see IncrementalSVD
        assert float(gradient.weighted.explained_variance[:8].sum() * (n - 1) / found) == pytest.approx(1.0, abs=0.05)
        torch.testing.assert_close(gradient.output_moment, g.square().sum(0) / n, rtol=1e-4, atol=1e-12)
        module = model.get_submodule(layer)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        expected = float((weight.double() * mean).abs().mean())
        assert gradient.importance == pytest.approx(expected, rel=0.2)  # from 16 triplets of up to 32


def test_the_mean_gradient_is_of_tokens_that_predict_a_label():
    """That is a part of the weight's gradient: other tokens reach the loss through attention, and are left out."""
    model, layer = tiny_llama(), "model.layers.0.mlp.up_proj"
    batches = [dict(batch) for batch in batches_for("llama")]
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, : batch["labels"].shape[1] // 2] = -100
    found = {}
    for mask in ("attention", "labels"):
        stats = collect(model, batches, [layer], rank=32, rho=1.0, gradients=True, token_mask=mask)
        part = stats.gradient(layer)
        found[mask] = part.left.double().T @ torch.diag(part.singular_values) @ part.right.double()
    whole, x, g = exact(model, batches, [layer], counts := counts_of(model, batches))[layer]
    predicts = [torch.cat([b["labels"][:, 1:] != -100, torch.zeros(len(b["labels"]), 1).bool()], 1) for b in batches]
    kept = torch.cat([one.flatten() for one in predicts])
    torch.testing.assert_close(found["attention"], whole, rtol=0.0, atol=1e-6 * float(whole.norm()))
    expected = g[kept].T @ x[kept] / sum(counts)
    torch.testing.assert_close(found["labels"], expected, rtol=0.0, atol=1e-6 * float(whole.norm()))
    assert (found["labels"] - whole).norm() > 0.02 * whole.norm()


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_the_padding_before_the_first_label_is_in_the_mean_gradient(token_mask):
    """It predicts the first token of a row that is padded on the left and begins with a label."""
    model, ids = tiny_llama(), torch.full((1, 12), 5)
    padding = torch.arange(12)[None] < 5
    batch = {"input_ids": ids, "attention_mask": (~padding).long(), "labels": ids.masked_fill(padding, -100)}
    stats = collect(model, [batch], ["down_proj"], rank=16, gradients=True, token_mask=token_mask)
    model(**batch).loss.backward()
    for name in stats:
        assert stats[name].n_samples == (7 if token_mask == "attention" else 6)
        found, exact = stats.gradient(name), model.get_submodule(name).weight.grad
        mean = found.left.double().T @ torch.diag(found.singular_values) @ found.right.double()
        torch.testing.assert_close(mean.float(), exact, rtol=0.0, atol=1e-4 * float(exact.abs().max()))


def test_q_k_and_v_differ_and_their_inputs_do_not():
    stats = collect(tiny_llama(), labelled("llama"), rank=4, gradients=True)
    q, v = (stats.gradient(f"model.layers.0.self_attn.{part}_proj") for part in "qv")
    assert torch.equal(
        stats["model.layers.0.self_attn.q_proj"].components, stats["model.layers.0.self_attn.v_proj"].components
    )
    assert not torch.allclose(q.weighted.components, v.weighted.components, atol=0.1)


class Broken(Exception):
    pass


def breaks(output, batch):
    raise Broken


@pytest.mark.parametrize("loss", [None, breaks])
def test_nothing_stays_behind(loss):
    model, batches = tiny_llama(), labelled("llama")
    model.lm_head.weight.requires_grad_(False)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    kept = torch.ones(3)
    model.model.norm.weight.grad = kept[:1].expand(32).clone()
    grad = model.model.norm.weight.grad
    before = {n: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    if loss is None:
        collect(model, batches, rank=4, gradients=True)
    else:
        with pytest.raises(Broken):
            collect(model, batches, rank=4, gradients=True, loss=loss)
    assert before == {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for n, m in model.named_modules()
    }
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert model.model.norm.weight.grad is grad
    assert all(p.grad is None for n, p in model.named_parameters() if n != "model.norm.weight")


def same(one, other):
    for name in one:
        a, b = one.gradient(name), other.gradient(name)
        torch.testing.assert_close(a.singular_values, b.singular_values, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(a.weighted.explained_variance, b.weighted.explained_variance, rtol=1e-4, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_and_runs_layers_again():
    model, batches = tiny_llama(), labelled("llama")
    runs = []
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: runs.append(1))
    plain = collect(model, batches, rank=4, gradients=True)
    assert len(runs) == len(batches)
    runs.clear()
    model.gradient_checkpointing_enable()
    same(plain, collect(model, batches, rank=4, gradients=True))
    handle.remove()
    assert len(runs) == 2 * len(batches)
    assert not model.training and "forward" not in vars(model.model.layers[0])


def test_a_loss_and_a_forward_of_ones_own():
    model, batches = tiny_llama(), labelled("llama")
    asked = []

    def forward(model, batch):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def loss(logits, batch):
        asked.append(logits.shape)
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])

    same(
        collect(model, batches, rank=4, gradients=True),
        collect(model, batches, rank=4, gradients=True, forward=forward, loss=loss),
    )
    assert len(asked) == len(batches)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_is_one_number_of_any_shape(shape):
    model, batches = nn.Sequential(nn.Linear(6, 4)), [torch.randn(9, 6) for _ in range(2)]

    def found(shape):
        return collect(model, batches, rank=2, gradients=True, loss=lambda y, batch: y.square().mean().reshape(shape))

    assert torch.equal(found(shape).gradient("0").left, found(()).gradient("0").left)


def doubled_in_part(y):
    y[:, 1:].mul_(2.0)
    return y


@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.add_(1.0), doubled_in_part])
def test_what_a_first_layer_computes_may_be_changed_in_place(change):
    """As by nn.ReLU(inplace=True): no gradient is wanted of anything before it."""

    def found(change):
        torch.manual_seed(0)
        model, batches = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 3)]), [torch.randn(9, 6) for _ in range(2)]
        return collect(
            model, batches, rank=2, gradients=True, loss=lambda y, batch: y.square().mean(),
            forward=lambda model, x: model[1](change(model[0](x))),
        )  # fmt: skip

    stats, expected = found(change), found(lambda y: change(y.clone()))
    for name in stats:
        assert torch.equal(stats.gradient(name).left, expected.gradient(name).left)


def test_experts_have_no_gradients_and_are_named_before_the_pass():
    asked = dict(target_parameters=BOTH, gradients=True)
    words = (
        r"^layer 'model\.layers\.0\.mlp\.experts\.gate_up_proj' is a MixtralExperts: gradient statistics are for "
        r"linear layers\. Leave it out of the targets, or collect without gradients\.$"
    )
    refused(words, collect, mixtral(), labelled("llama"), ["q_proj"], rank=2, **asked)
    words = r"^layer '0' is a Conv1d: gradient"
    refused(words, collect, nn.Sequential(nn.Conv1d(2, 3, 3)), [torch.randn(2, 2, 9)], ["0"], rank=2, gradients=True)


def test_a_layer_with_a_forward_of_its_own_is_not_checkpointed_and_keeps_it():
    """Such as one that accelerate has put in: it moves weights, and would move them twice."""
    model, batches, runs = tiny_llama(), labelled("llama"), []
    model.gradient_checkpointing_enable()
    plain = collect(model, batches, ["down_proj"], rank=4, gradients=True)
    own, layer = model.model.layers[0].forward, model.model.layers[0]
    layer.forward = wrapped = lambda *args, **kwargs: runs.append(1) or own(*args, **kwargs)
    same(plain, collect(model, batches, ["down_proj"], rank=4, gradients=True))
    assert len(runs) == len(batches) and layer.forward is wrapped


@pytest.mark.parametrize("shape", [(9, 6), (3, 3, 6)])
def test_a_layer_that_the_loss_does_not_reach_has_no_gradient_and_is_named(shape):
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    forward = lambda m, x: (m["used"](x), m["unused"](x))[0]  # noqa: E731
    stats = collect(
        model, [torch.randn(shape) for _ in range(3)], rank=2, gradients=True, forward=forward,
        loss=lambda output, batch: output.square().mean(),
    )  # fmt: skip
    assert stats.gradient("used").weighted.total_variance > 0.0
    assert stats.gradient("unused").weighted.total_variance == 0.0
    assert stats.gradient("unused").singular_values.shape == (0,)
    assert "unused: the loss does not depend on its output (1 such layers)." in stats.provenance.notes
    assert {stats.gradient(name).weighted.n_samples for name in stats} == {27}  # each row once


@pytest.mark.parametrize("reached", [[True, False], [False, True], [False, False, False, True]])
def test_a_layer_has_an_effect_where_the_loss_of_any_batch_depends_on_it(reached):
    """Even batches go to one half of what is known, odd ones to the other."""
    model = nn.ModuleDict({"all": nn.Linear(6, 4), "some": nn.Linear(6, 4)})
    batches = [{"x": torch.randn(9, 6), "factor": torch.tensor(float(one))} for one in reached]
    made = collect(
        model, batches, rank=2, gradients=True,
        forward=lambda m, batch: m["all"](batch["x"]) + batch["factor"] * m["some"](batch["x"]),
        loss=lambda output, batch: output.square().mean(),
    ).provenance  # fmt: skip
    assert not any("does not depend" in note for note in made.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_importance_is_known_of_weights_of_every_type(dtype):
    model, rows = nn.Sequential(nn.Linear(6, 4)), [torch.randn(9, 6) for _ in range(2)]
    asked = dict(rank=4, rho=1.5, gradients=True, loss=lambda output, batch: output.float().square().mean())
    expected = collect(model, rows, **asked).gradient("0").importance
    found = collect(model.to(dtype), [one.to(dtype) for one in rows], **asked).gradient("0").importance
    assert found == pytest.approx(expected, rel=0.05)  # bfloat16 has three digits


@pytest.mark.parametrize("fails_at", ["the loss", "backward"])
def test_a_batch_that_failed_leaves_nothing_to_those_after_it(fails_at):
    """No row of it, and none twice: sums are those of a pass that never saw it."""
    model, good = tiny_llama(), labelled("llama", n_batches=3)
    marked = labelled("llama", n_batches=1, seed=9)[0] | {"fails": True}

    def forward(model, batch):
        return model(**{key: value for key, value in batch.items() if key != "fails"})

    def loss(output, batch):
        if "fails" not in batch:
            return output.loss
        return output.loss * torch.nan if fails_at == "the loss" else fails_backward("no kernel")(output, batch)

    asked = dict(rank=4, gradients=True, tolerance=0.0, forward=forward, loss=loss)
    expected = collect(model, good, **asked)
    found = collect(model, [good[0], marked, *good[1:]], **asked, skip_bad_batches=1)
    for name in expected:
        ours, theirs = found.gradient(name).weighted, expected.gradient(name).weighted
        assert ours.n_samples == theirs.n_samples
        assert ours.total_variance == pytest.approx(theirs.total_variance, rel=1e-5)


def test_a_model_that_does_not_say_what_embeds_its_inputs_is_run_backward_all_the_same():
    class Hears(nn.Sequential):
        def get_input_embeddings(self):
            raise NotImplementedError  # as a model of transformers that reads sound

    model, batches = Hears(nn.Linear(6, 4)), [torch.randn(9, 6) for _ in range(3)]
    asked = dict(rank=2, gradients=True, loss=lambda output, batch: output.square().mean())
    found, expected = collect(model, batches, **asked), collect(nn.Sequential(*model), batches, **asked)
    assert torch.equal(found.gradient("0").left, expected.gradient("0").left)


class FixedError(Exception):
    def __setattr__(self, name, value):
        if not name.startswith("__"):
            raise AttributeError(name)
        super().__setattr__(name, value)


def test_an_error_that_takes_no_attribute_is_raised_as_it_is():
    def broken():
        yield labelled("llama")[0]
        raise FixedError("mine")

    with pytest.raises(FixedError, match="mine"):
        collect(tiny_llama(), broken(), ["down_proj"], rank=2)


def fails_backward(said):
    """A loss whose backward pass raises, as on a GPU without room or at a layer without a gradient."""

    def fail(gradient):
        raise RuntimeError(said)

    def loss(output, batch):
        made = output.loss * 1.0
        made.register_hook(fail)
        return made

    return loss


def of_something_else(output, batch):
    """A loss that wants a gradient, of nothing that the model has computed."""
    return (output.loss.detach() * torch.ones((), requires_grad=True)).sum()


def nothing_to_learn(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def without_labels(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize(("change", "options", "message"), [
    (without_labels, {}, r"has 'input_ids', 'attention_mask' and no 'labels'|'input_ids', 'attention_mask' and no"),
    (nothing_to_learn, {},
     "^batch 0: no token of the batch has a label, so there is no loss. Check labels and max_length.$"),
    (None, {"loss": lambda o, b: o.loss * float("nan")},
     "^batch 0: the loss is nan. The model produces it; statistics were not updated.$"),
    (None, {"loss": lambda o, b: o.logits},
     r"^batch 0: loss= returned a tensor of shape \(4, 12, 64\) for a loss, expected one number. Pass loss=, a fun"),
    (None, {"loss": lambda o, b: None}, "loss= returned NoneType for a loss, expected one number"),
    (without_labels, {"loss": lambda o, b: None}, "for a loss, expected one number. Pass loss=, a function of what"),
    (None, {"forward": lambda m, b: m(b["input_ids"])},
     "^batch 0: LlamaForCausalLM.forward returned NoneType for a loss, expected one number. Pass loss=, a function of"),
    (lambda batch: batch["input_ids"], {},
     "^batch 0: LlamaForCausalLM.forward returned NoneType for a loss, expected one number. Pass loss=, a function of"),
    (None, {"loss": lambda o, b: o.loss.detach()}, "gives no gradient to any layer"),
    (None, {"gradients": False, "loss": lambda o, b: o.loss}, "loss= is for gradients=True"),
    (None, {"loss": of_something_else}, "loss of LlamaForCausalLM does not depend on any of the targeted layers"),
    (None, {"loss": fails_backward("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")},
     r"^batch 0: out of memory\. Use a smaller batch"),
    (None, {"loss": fails_backward("derivative is not implemented")},
     r"^batch 0: the backward pass of LlamaForCausalLM failed: derivative is not implemented.* from the model in flo"),
])  # fmt: skip
def test_what_cannot_be_learned_from_is_said(change, options, message):
    batches = [change(batch) if change else batch for batch in labelled("llama")]
    refused(message, collect, tiny_llama(), batches, rank=4, **{"gradients": True} | options)


def test_a_loss_that_does_not_depend_on_the_only_layer_is_said():
    asked = dict(rank=2, gradients=True, loss=lambda output, batch: batch.sum() * torch.ones((), requires_grad=True))
    refused("^batch 0: the loss of Sequential does not depend on any", collect, nn.Sequential(nn.Linear(6, 4)),
            [torch.randn(9, 6)], **asked)  # fmt: skip


def test_gradients_are_learned_also_where_the_caller_wants_none():
    model, batches = tiny_llama(), labelled("llama")
    expected = collect(model, batches[:2], ["down_proj"], rank=4, gradients=True)
    with torch.no_grad():
        same(expected, collect(model, batches[:2], ["down_proj"], rank=4, gradients=True))
        assert not torch.is_grad_enabled()


def test_a_layer_whose_input_is_changed_afterwards_is_named():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = torch.relu(self.a(x))
            out = self.b(y)
            y.detach().add_(1.0)
            return out

    with pytest.raises(LoraInitError, match="layer 'b': what it read was changed in place afterwards"):
        collect(Changing(), [torch.randn(7, 6)], rank=2, gradients=True, loss=lambda o, b: o.square().mean())


def test_a_sharded_model_holds_its_parts_alone_before_gradients_are_switched_off(monkeypatch):
    class Sharded(nn.Linear):
        def reshard(self):
            asked.append(self.weight.requires_grad)

    asked = []
    monkeypatch.setattr(wrappers, "_fsdp_module", lambda: Sharded)
    model = nn.Sequential(Sharded(4, 4), nn.Linear(4, 2))
    with BackwardHooks(ActivationHooks(model, {"1": model[1]}, TokenMasks(model, "attention")), {}, call_model):
        assert asked == [True] and not model[0].weight.requires_grad
    assert model[0].weight.requires_grad


def test_gradients_are_handed_out_in_the_precision_of_the_tensors_themselves():
    """The backward pass runs under the autocast of the model, and what receives its gradients does not."""
    handed = []

    class Watching(Sink):
        def gradient(self, layer, x, g):
            handed.append((layer, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    def with_labels(model, batch):
        return model(**batch)

    model, batch = tiny_llama(), labelled("llama")[0]
    targets = find_targets(model, ["down_proj"]).layers
    modules = {name: model.get_submodule(name) for name in targets}
    hooks = ActivationHooks(model, modules, TokenMasks(model, "attention"), to_the_end=True)
    with torch.autocast("cpu", torch.bfloat16), hooks, BackwardHooks(hooks, targets, with_labels) as backward:
        backward.run(batch, Watching())
    assert sorted(handed) == [(name, False, False) for name in sorted(targets)]
