"""Models that are wrapped, sharded over processes, or split over devices: names and results of the plain model."""

import copy
import os

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from lora_init import Statistics, allocate_ranks, build_adapter, collect
from lora_init.collection import loop
from lora_init.layers.identity import fingerprint
from lora_init.layers.wrappers import gathered, unwrapped
from tests.collection.made import SETTINGS, kept, llama, message
from tests.conftest import batches_for
from tests.processes import Processes, run
from tests.versions import needs_fsdp_on_cpu

pytestmark = pytest.mark.slow  # several processes


def assert_same(one, other):
    """Equal bit for bit in all but time."""
    assert list(one) == list(other) and one.group_of == other.group_of
    for name in one:
        for part in ("components", "explained_variance", "mean", "total_variance", "n_samples"):
            a, b = getattr(one[name], part), getattr(other[name], part)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, (name, part)
    for part in ("fingerprint", "n_batches", "n_samples", "stop_reason", "notes", "n_labels"):
        assert getattr(one.provenance, part) == getattr(other.provenance, part)
    for name in one if one.provenance.gradients else ():
        a, b = one.gradient(name), other.gradient(name)
        assert (a.importance, a.weighted.total_variance) == (b.importance, b.weighted.total_variance)
        for part in ("left", "singular_values", "right", "output_moment"):
            assert torch.equal(getattr(a, part), getattr(b, part)), (name, part)


def fully_sharded(model, whole=True, linear=False):
    if linear:
        fully_shard(model.model.layers[0].mlp.up_proj)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model) if whole else model


def wrapped_and_sharded(rank, size, folder):
    batches, found = batches_for("llama", 12), {}

    def keep(name, model, data):
        found[name] = kept(collect(model, data, **SETTINGS), folder, f"{name}-{rank}")

    keep("plain", llama(), batches)
    keep("ddp", torch.nn.parallel.DistributedDataParallel(llama()), batches)
    keep("fsdp", sharded := fully_sharded(llama(), linear=True), batches)
    keep("fsdp-parts", fully_sharded(llama(), whole=False), batches)
    keep("fsdp-uneven", fully_sharded(llama()), batches[:9] if rank == 0 else batches[9:])
    keep("plain-uneven", llama(), batches[:9] if rank == 0 else batches[9:])
    keep("fsdp-empty", fully_sharded(llama()), batches if rank == 1 else [])
    keep("plain-empty", llama(), batches if rank == 1 else [])
    data = [torch.randn(4, 8)]
    mesh = init_device_mesh("cpu", (size,))
    split = parallelize_module(torch.nn.Sequential(torch.nn.Linear(8, 8)), mesh, {"0": RowwiseParallel()})
    found["tensor parallel"] = message(lambda: collect(split, data, **SETTINGS))
    # Batches of any kind are lent to a process that has none.
    pairs = [(batch["input_ids"], batch["attention_mask"]) for batch in batches]
    keep("fsdp-pairs-empty", fully_sharded(llama()), pairs if rank == 1 else [])
    keep("plain-pairs-empty", llama(), pairs if rank == 1 else [])
    # The model is as it was, and trains.
    plain, batch = llama(), batches[0]
    for model in (sharded, plain):
        model(**batch).loss.backward()
    of = plain.model.layers[0].mlp.up_proj.weight.grad
    theirs = sharded.model.layers[0].mlp.up_proj.weight.grad.full_tensor()
    found["gradient"] = float((of - theirs).abs().max())
    return found


@needs_fsdp_on_cpu
def test_wrapped_and_sharded_models(tmp_path):
    first, second = run(wrapped_and_sharded, 2, tmp_path)
    assert all(first[name] == second[name] for name in first if isinstance(first[name], str))
    for name in ("ddp", "fsdp", "fsdp-parts", "fsdp-uneven", "fsdp-empty", "fsdp-pairs-empty"):
        plain = f"plain{name.removeprefix('fsdp')}" if name.endswith(("uneven", "empty")) else "plain"
        stats, expected = (Statistics.load(tmp_path / f"{one}-0") for one in (name, plain))
        assert_same(stats, expected)
        assert stats.provenance.model_class == "LlamaForCausalLM"
        assert {target.kind for target in stats.targets.values()} == {"Linear"}
        one, other = (
            build_adapter(found, allocate_ranks(found, rank=2)).save_pretrained(tmp_path / f"{name}-{i}-adapter")
            for i, found in enumerate((stats, expected))
        )
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
    for found in (first, second):
        kind, text = found["tensor parallel"]
        assert kind == "LoraInitError" and text.startswith("Sequential is split by tensor parallelism")
    assert first["gradient"] == second["gradient"] == 0.0  # the mean over two equal processes


def with_gradients(rank, size, folder):
    batches, found = batches_for("llama", 12), {}
    uneven = batches[:9] if rank == 0 else batches[9:]
    models = {"plain": llama(), "ddp": torch.nn.parallel.DistributedDataParallel(llama())}
    models |= {"fsdp": fully_sharded(llama()), "fsdp-linear": fully_sharded(llama(), linear=True)}
    models["fsdp"](**batches[0])  # leaves the outermost part whole
    for name, model in models.items():
        loop.SAVE_EVERY = 0.0 if name == "fsdp" else 60.0  # by one process: what needs the weights has to wait
        stats = collect(model, uneven, **SETTINGS, gradients=True, statistics=folder / f"{name}-file")
        found[name] = (
            kept(stats, folder, f"{name}-{rank}"),
            [n for n, p in model.named_parameters() if p.grad is not None],
        )
    # They are as they were, and train.
    for model in models.values():
        model(**batches[rank]).loss.backward()
    plain, *others = (unwrapped(model).model.layers[0].mlp.up_proj.weight.grad for model in models.values())
    torch.distributed.all_reduce(plain)
    found["trained"] = [float((plain / size - gathered(other)).abs().max()) for other in others]
    found["trainable"] = [all(p.requires_grad for p in model.parameters()) for model in models.values()]
    return found


@needs_fsdp_on_cpu
def test_gradients_of_wrapped_and_sharded_models(tmp_path):
    first, second = run(with_gradients, 2, tmp_path)
    plain = Statistics.load(tmp_path / "plain-0")
    for name in ("plain", "ddp", "fsdp", "fsdp-linear"):
        assert first[name] == second[name] and first[name][1] == []  # nothing was left in any .grad
        stats = Statistics.load(tmp_path / f"{name}-0")
        if name != "fsdp-linear":  # a layer that is sharded by itself gets a tensor object of its own
            assert_same(stats, plain)
        for layer in plain:
            a, b = stats.gradient(layer), plain.gradient(layer)
            torch.testing.assert_close(a.output_moment, b.output_moment, rtol=1e-4, atol=1e-12)
            assert a.importance == pytest.approx(b.importance, rel=1e-3)
    assert first["trainable"] == [True] * 4
    assert max(first["trained"]) < 1e-7


def broken_halfway(rank, size, folder, moment):
    """A process fails in the middle of a pass that all make together."""

    def forward(model, batch):
        passes.append(1)
        if rank == 1 and len(passes) == 4 and moment == "forward":
            model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        return model(**batch)

    def loss(output, batch):
        return output.loss * (torch.nan if rank == 1 and len(passes) == 4 else 1.0)

    passes, batches = [], batches_for("llama", 24)
    options = {"gradients": True, "loss": loss} if moment == "loss" else {}
    found = message(lambda: collect(fully_sharded(llama()), batches, **SETTINGS, forward=forward, **options))
    if rank == 1:
        assert found[1].startswith("batch 7: the loss is nan" if moment == "loss" else "division by zero"), found
        os._exit(9)  # as an error that nobody catches does
    return found[0] != ""


@needs_fsdp_on_cpu
@pytest.mark.parametrize("moment", ["forward", "loss"])
def test_a_sharded_model_that_breaks_in_one_process_ends_the_other(moment, tmp_path):
    processes = Processes(broken_halfway, 2, tmp_path, moment)
    assert processes.wait() == [0, 9], processes.stderr(0)


def offloaded(model, tmp_path):
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model, tmp_path):
    return disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))


def split(model, tmp_path):
    """One layer here, another on disk; `device_map="auto"` does no more where memory is short."""
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    device_map |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


@pytest.mark.parametrize("way", [offloaded, on_disk, split], ids=lambda way: way.__name__)
def test_models_that_accelerate_splits(way, tmp_path):
    plain, batches = llama(), batches_for("llama", 10)
    model = way(copy.deepcopy(plain), tmp_path / "weights")
    expected, stats = collect(plain, batches, **SETTINGS), collect(model, batches, **SETTINGS)
    assert_same(stats, expected)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())  # taken away again
    assert fingerprint(model) == fingerprint(plain)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, plain(**batches[0]).logits)
