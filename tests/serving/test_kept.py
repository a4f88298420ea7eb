"""What a merge keeps of an adapter, against brute force, and what it does to the model's answers."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lora_init
from lora_init import LoraInitError, export_adapter
from lora_init.adapters.directory import AdapterDirectory
from lora_init.serving import kept as kept_room
from lora_init.serving.base import plan_merge, read_base
from lora_init.serving.kept import ROUNDINGS, Divergence, Kept, divergence, kept_by_merge
from lora_init.serving.trained import read_trained, with_parameters
from tests.commands import save_model
from tests.conftest import tiny_gpt2, tiny_llama
from tests.layers.made import BOTH, mixtral
from tests.serving.made import load
from tests.versions import needs_experts_by_peft

KINDS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
MADE = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": mixtral}


def make(tmp_path, kind="llama", size=1.0, dtype=torch.bfloat16):
    """Write a base and an adapter whose change is about `size` of the weights."""
    base = save_model(MADE[kind]().to(dtype), tmp_path / "base")
    more = {} if kind in KINDS else dict(target_parameters=BOTH)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=KINDS.get(kind, ["q_proj"]), **more)
    model = get_peft_model(load(base).float(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.03 * size)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained", base


def read(directory):
    trained = read_trained(directory)
    base = read_base(trained.base, trained)
    return with_parameters(trained, base.parameters), base


def kept(directory, dtype=None, stats=None):
    trained, base = read(directory)
    return kept_by_merge(base, trained, plan_merge(base, trained), dtype, stats)


def weights(directory, base):
    """W and s B A of each layer, [d_out, d_in], from PEFT itself."""
    model = load(base)
    plain = {name: module.weight.float() for name, module in model.named_modules() if hasattr(module, "weight")}
    for name, layer in read_trained(directory).layers.items():
        weight = plain[name].mT if layer.widths != plain[name].shape[::-1] else plain[name]
        yield name, weight.detach(), layer.scaling * layer.b @ layer.a


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_rounding_leaves_of_the_sum(kind, dtype, tmp_path):
    directory, base = make(tmp_path, kind)
    found, seen = kept(directory, dtype), 0
    for name, weight, change in weights(directory, base):
        after, before = ROUNDINGS[dtype](weight + change), ROUNDINGS[dtype](weight)
        assert found[name].arrives == pytest.approx(
            float(((after - before) * change).sum() / change.square().sum()), rel=1e-3
        )
        noise = (after - weight - change).norm() / change.norm()
        assert found[name].ratio == pytest.approx(float(noise), rel=1e-2)  # the change is a difference of float32
        seen += 1
    assert seen == len(found) == 4


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("mixtral", marks=needs_experts_by_peft)])
def test_the_change_is_all_of_the_update_in_however_many_tensors_a_weight_is_kept(kind, tmp_path):
    """A checkpoint has a tensor for each expert; the model, one parameter for all of them."""
    directory, _ = make(tmp_path, kind)
    found, trained = kept(directory, "bfloat16"), read(directory)[0]
    assert found.keys() == trained.layers.keys() and len(found) == (6 if kind == "mixtral" else 4)
    assert sum(found.values(), Kept()).change == pytest.approx(trained.update_size**2, rel=1e-3)


def test_a_change_below_the_rounding_is_warned_of(tmp_path):
    large, _ = make(tmp_path)
    whole = sum(kept(large).values(), Kept())
    assert whole.arrives == pytest.approx(1.0, abs=0.01) and whole.ratio < 0.1 and whole.advice().startswith("Merge: ")
    small, base = make(tmp_path / "small", size=0.001)
    lost = sum(kept(small).values(), Kept())
    assert lost.is_doubtful and lost.arrives < 0.5 and "Keep the adapter, or merge in a wider type" in lost.advice()
    with pytest.warns(UserWarning, match=r"in the type of its weights: Keep the adapter, or merge in a wider type: \d"):
        export_adapter(small, tmp_path / "merged", merge_into=str(base))
    exact, base = make(tmp_path / "exact", size=0.001, dtype=torch.float32)
    assert kept(exact) == {}  # which export takes as nothing to warn of
    assert len(kept(exact, "bfloat16")) == 4
    export_adapter(exact, tmp_path / "exact/merged", merge_into=str(base))


def test_with_statistics_it_counts_where_the_data_are(tmp_path):
    directory, base = make(tmp_path)
    batches = [{"input_ids": torch.randint(3, 23, (8, 20))} for _ in range(4)]
    stats = lora_init.collect(load(base).float(), batches, rank=4, rho=1.0, max_batches=4)
    found = kept(directory, "int8", stats)
    for name, weight, change in weights(directory, base):
        spectrum = stats[name]
        v, rest = spectrum.components.double(), spectrum.noise_variance
        second = (v.mT * (spectrum.explained_variance - rest).clamp_min(0)) @ v + rest * torch.eye(v.shape[1]).double()
        second += torch.outer(spectrum.mean.double(), spectrum.mean.double())
        noise = (ROUNDINGS["int8"](weight + change) - weight - change).double()
        assert found[name].noise == pytest.approx(float((noise @ second * noise).sum()), rel=1e-4)
    with pytest.raises(LoraInitError, match="the statistics do not know layer"):
        kept(directory, "int8", lora_init.collect(load(base).float(), batches, ["q_proj"], rank=4, rho=1.0))


def test_the_divergence_is_that_of_the_merged_model(tmp_path):
    directory, base = make(tmp_path, size=2.0)
    ids = torch.randint(3, 23, (4, 12))
    labels = ids.masked_fill(torch.arange(12) < torch.tensor([[7], [0], [0], [0]]), -100)
    batches = [{"input_ids": ids, "labels": labels}]
    found = {dtype: divergence(load(base).float(), AdapterDirectory(directory), batches, dtype) for dtype in ROUNDINGS}
    export_adapter(directory, tmp_path / "merged", merge_into=str(base))
    from peft import PeftModel

    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(base).float(), directory)(input_ids=ids).logits.log_softmax(-1)
        merged, plain = (load(at).float()(input_ids=ids).logits.log_softmax(-1) for at in (tmp_path / "merged", base))
    for others, divergent in ((merged, found["bfloat16"].merged), (plain, found["bfloat16"].base)):
        expected = (adapted.exp() * (adapted - others)).sum(-1)[:, :-1][labels[:, 1:] != -100]
        assert divergent == pytest.approx(float(expected.mean()), rel=1e-3) and len(expected) == 38
    assert {one.tokens for one in found.values()} == {38}
    assert found["float16"].merged < found["bfloat16"].merged < found["nf4"].merged < found["nf4"].base
    with pytest.raises(LoraInitError, match="no example has a token with a label"):
        divergence(load(base).float(), AdapterDirectory(directory), [], "nf4")


def test_the_rows_that_are_rounded_are_those_of_each_output_of_a_conv1d_too(tmp_path):
    """It has its weight transposed, so that a model rounded along the rows that it has would be another."""
    directory, base = make(tmp_path, "gpt2", size=20.0, dtype=torch.float32)
    ids = torch.randint(3, 23, (2, 9))
    found = divergence(load(base), AdapterDirectory(directory), [{"input_ids": ids, "labels": ids}], "int8")
    adapted, rounded = load(base), load(base)
    modules = dict(rounded.named_modules())
    for name, weight, change in weights(directory, base):
        after = weight + change  # [d_out, d_in]
        step = after.abs().max(1, keepdim=True).values / 127
        modules[name].weight.data = ((after / step).round() * step).mT
        adapted.get_submodule(name).weight.data = after.mT
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for model in (adapted, rounded))
    assert found.merged == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert found.tokens == 16 and 0 < found.merged < found.base


@pytest.mark.parametrize(("along", "noise", "lost", "first"), [
    (1.0, 0.0, None, "Merge:"),
    (0.5, 1.0, None, "Merge:"),
    (0.49, 0.0, None, "Keep the adapter, or merge in a wider type:"),
    (0.5, 1.1, None, "Measure on data before you merge:"),
    (0.0, 9.0, 0.001, "Merge:"),  # what was measured decides, where it was
    (1.0, 0.0, kept_room._LITTLE + 0.001, "Merge in a wider type where you can:"),
    (1.0, 0.0, kept_room._MUCH + 0.001, "Keep the adapter, or merge in a wider type:"),
])  # fmt: skip
def test_the_advice_goes_by_what_arrives_and_then_by_what_was_measured(along, noise, lost, first):
    merge = Kept(1.0, along, noise)
    assert merge.advice(lost).startswith(f"{first} ")
    assert merge.is_doubtful == (along < 0.5 or noise > 1.0)


def test_the_divergence_is_over_as_many_tokens_as_are_enough(tmp_path, monkeypatch):
    directory, base = make(tmp_path)
    monkeypatch.setattr(kept_room, "_MOST_TOKENS", 15)
    ids = torch.randint(3, 23, (6, 6))  # two rows of five predicted tokens a batch
    read = []

    def batches():
        for part in ids.split(2):
            read.append(len(part))
            yield {"input_ids": part, "labels": part}

    class Again:
        def __iter__(self):
            return batches()

    assert divergence(load(base).float(), AdapterDirectory(directory), Again(), "float16").tokens == 15
    assert len(read) == 3 * 2  # with the adapter, without, and merged: the third batch is not read


def test_kept_adds_up_and_of_no_change_all_arrives():
    both = Kept(4.0, 1.0, 9.0) + Kept(12.0, 3.0, 27.0)
    assert both == Kept(16.0, 4.0, 36.0) and (both.arrives, both.ratio) == (0.25, 1.5)
    assert (Kept().arrives, Kept().ratio, Kept().is_doubtful) == (1.0, 0.0, False)


@pytest.mark.parametrize(("merge", "lost", "advice"), [
    (Kept(4.0, 4.0, 0.04), None, "Merge: 100.0% of the change arrives, under 0.1 times as much noise."),
    (Kept(4.0, 3.0, 16.0), None,
     "Measure on data before you merge: 75.0% of the change arrives, under 2 times as much noise."),
    (Kept(4.0, 1.0, 4.0), None,
     "Keep the adapter, or merge in a wider type: 25.0% of the change arrives, under 1 times as much noise."),
    (Kept(1.0, 1.0, 0.0), 0.02, "Merge: answers move by 2.0% of what the adapter moves them."),
    (Kept(1.0, 1.0, 0.0), 0.1,
     "Merge in a wider type where you can: answers move by 10.0% of what the adapter moves them."),
    (Kept(1.0, 1.0, 0.0), 0.11,
     "Keep the adapter, or merge in a wider type: answers move by 11.0% of what the adapter moves them."),
    (Kept(1.0, 1.0, 0.0), 0.0, "Merge: answers move by 0.0% of what the adapter moves them."),
])  # fmt: skip
def test_the_advice_is_one_line_with_its_numbers(merge, lost, advice):
    assert merge.advice(lost) == advice


def test_rounding_is_to_the_steps_of_each_type():
    weight = torch.tensor([[254.0, 1.9, -3.1, 0.9], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(ROUNDINGS["int8"](weight), torch.tensor([[254.0, 2.0, -4.0, 0.0], [0.0] * 4]))
    for dtype in ("bfloat16", "float16"):
        random = torch.randn(3, 5)
        assert torch.equal(ROUNDINGS[dtype](random), random.to(getattr(torch, dtype)).float())
        assert ROUNDINGS[dtype](random).dtype == torch.float32


def test_the_share_that_is_lost_is_of_what_the_adapter_does():
    assert Divergence(0.5, 2.0, 3).lost == 0.25 and Divergence(0.5, 0.0, 3).lost is None


def test_a_weight_that_was_trained_whole_is_not_a_change_that_rounding_takes(tmp_path):
    trained, base = read(make(tmp_path)[0])
    whole = replace(trained, others={"base_model.model.lm_head.weight": torch.ones(64, 32)})
    sources = plan_merge(base, whole)
    assert sources["lm_head.weight"].parameter == "lm_head.weight"
    assert kept_by_merge(base, whole, sources) == kept_by_merge(base, trained, plan_merge(base, trained))
