"""Every start: the plain model's output before the first step, the counts that are promised, and the way back."""

import hashlib
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lora_init.adapters.peft_model import adapter_layers
from lora_init.collection.collect import collect
from lora_init.comparison import starts as starting
from lora_init.comparison.starts import (
    AdapterShape,
    PreparedModel,
    StartInputs,
    a_weights,
    adapter_files,
    check_quantized,
    hash_own,
    prepare,
    read_start,
)
from lora_init.comparison.variants import Variant
from lora_init.errors import LoraInitError
from lora_init.planning.allocate import allocate_ranks
from lora_init.starts.initializers import as_large_as_random, layer_generator
from lora_init.starts.starts import STARTS, BankWay, PeftStart, compared_names
from tests.comparison.made import assert_same, snapshot
from tests.conftest import MODELS, batches_for, refused, tiny_gpt2, tiny_llama

pytest.importorskip("peft")

TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
RANK = 4
# LoftQ needs a GPU; its own test stands in for the part of it that does. Full fine-tuning has no adapter.
BANK_STARTS = [start.name for start in STARTS if isinstance(start, BankWay)]
PEFT_STARTS = [start.name for start in STARTS if isinstance(start, PeftStart)]
HERE = [name for name in compared_names() if name not in ("loftq", "qera", "full", *BANK_STARTS)]
BY_GRADIENT = [start.name for start in STARTS if start.needs_gradient] + ["natural-gradient-frozen-a", "gradient-ranks"]
EVA = [name for name in compared_names() if name.startswith("eva") and name not in BY_GRADIENT]
MOVES_RANKS = ["eva-rho2", "eva-uncentred", "eva-ranks", "eva-frozen-a", "gradient-ranks"]
FROZEN = ["eva-frozen-a", "random-frozen-a", "natural-gradient-frozen-a"]
STEPS = ["lora-one", "natural-gradient-step"]
FROM_DATA = [*EVA, *BY_GRADIENT, "random-scaled"]


def drawn(rows, width, name):
    """A of the random start with seed 0."""
    return torch.nn.init.kaiming_uniform_(torch.empty(rows, width), a=5**0.5, generator=layer_generator(0, name))


class Case:
    def __init__(self, name):
        self.model, self.batches, self.task = MODELS[name](), batches_for(name), TASKS[name]
        self.asked = []
        self.collected, self.facts = {}, {}

    def statistics(self, center, gradients=False):
        self.asked.append((center, gradients))
        if (center, gradients) not in self.collected:
            self.collected[center, gradients] = collect(
                self.model, self.labelled() if gradients else self.batches, rank=RANK, rho=2.0, center=center,
                task_type=self.task, gradients=gradients,
            )  # fmt: skip
        return self.collected[center, gradients]

    def prepare(self, start, seed=0, batches=None, **shape):
        shape = AdapterShape(**dict(rank=RANK, lora_alpha=8, task_type=self.task) | shape)
        batches = self.batches if batches is None else batches
        own = start[1] if isinstance(start, tuple) and len(start) == 2 else None
        inputs = StartInputs(
            self.model, shape, seed, self.statistics, batches, lambda: self.labelled()[:2], own=own
        )  # fmt: skip
        return prepare(read_start(start), inputs)

    def made(self, start, seed=0, time=1):
        """What a start is, of which the model is released; made for the first or another time."""
        if (start, seed, time) not in self.facts:
            prepared = self.prepare(start, seed=seed)
            layers = adapter_layers(prepared.peft_model).values()
            self.facts[start, seed, time] = SimpleNamespace(
                a={name: a.detach().clone() for name, a in a_weights(prepared.peft_model).items()},
                trainable=sum(p.numel() for p in prepared.peft_model.parameters() if p.requires_grad),
                trainable_parameters=prepared.trainable_parameters, ranks=prepared.ranks,
                scalings={layer.scaling["default"] for layer in layers},
                sizes=[sum(layer.base_layer.weight.shape) for layer in layers],
            )  # fmt: skip
            prepared.release()
        return self.facts[start, seed, time]

    def labelled(self):
        return [{"labels": torch.arange(len(b["input_ids"])) % 2, **b} for b in self.batches]

    def logits(self, model=None):
        with torch.no_grad():
            return torch.cat([(model or self.model)(**batch).logits for batch in self.batches])


@pytest.fixture(scope="module", params=sorted(TASKS))
def case(request):
    torch.manual_seed(0)
    return Case(request.param)


def trained(prepared, batch):
    """Take one step that changes all trainable parameters, and leave gradients behind."""
    model = prepared.peft_model.train()
    output = model(**batch).logits
    output.float().square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


@pytest.mark.parametrize("start", HERE)
@pytest.mark.slow
def test_a_start_leaves_the_output_and_release_the_model(case, start):
    before, output = snapshot(case.model), case.logits()
    prepared = case.prepare(start)
    started = case.logits(prepared.peft_model)
    if start in STEPS:
        assert not torch.equal(started, output)
    elif start in (*PEFT_STARTS, "lora-ga"):  # a weight that was split and summed again is off by rounding
        assert (started - output).abs().max() < 1e-5 * output.abs().max()
        layer = next(iter(adapter_layers(prepared.peft_model).values()))
        assert bool(layer.lora_B["default"].weight.any())
    else:
        assert torch.equal(started, output)
    trained(prepared, case.batches[0])
    assert not torch.equal(case.logits(prepared.peft_model), output)
    prepared.release()
    assert_same(before, snapshot(case.model))
    assert torch.equal(case.logits(), output)


@pytest.mark.parametrize("start", ["full+24-alpha", "random+9-steps+equal-parameters", "eva+2-alpha+4-alpha"])
def test_a_way_that_a_start_cannot_be_run_is_refused_before_anything_is_loaded(start):
    refused(r"cannot be run with equal|no adapter that could be scaled|said once", read_start, start)


@pytest.mark.parametrize("start", HERE)
@pytest.mark.slow
def test_a_start_with_an_alpha_of_its_own_has_that_scaling_and_the_same_a(case, start):
    plain, scaled = case.made(start), case.made(f"{start}+24-alpha+5-batches")  # the batches are those of the caller
    assert (plain.scalings, scaled.scalings) == ({8 / RANK}, {24 / RANK})
    if start not in (*STEPS, *PEFT_STARTS, "lora-ga"):  # A B is a step or a part of the weight, whatever alpha is
        assert all(torch.equal(a, scaled.a[key]) for key, a in plain.a.items())


@pytest.mark.parametrize("start", HERE)
@pytest.mark.slow
def test_seeds(case, start):
    one, again, other = (case.made(start, seed, time).a for seed, time in ((0, 1), (0, 2), (1, 1)))
    assert all(torch.equal(one[name], again[name]) for name in one)
    depends = start.startswith("random") or start in ("gaussian", "orthogonal", "eva-ranks", "gradient-ranks")
    assert [torch.equal(one[name], other[name]) for name in one] == [not depends] * len(one)


@pytest.mark.slow
def test_parameter_counts(case):
    def count(start):
        made = case.made(start)
        assert made.trainable_parameters == made.trainable
        assert made.scalings == {8 / RANK}, start
        return made.trainable, made.ranks, max(made.sizes)

    expected, ranks, step = count("random")
    assert set(ranks.values()) == {RANK}
    for start in HERE:
        plain, ranks, _ = count(start)
        if start in FROZEN:
            assert plain < 0.7 * expected
        if start not in MOVES_RANKS:
            assert start in FROZEN or (plain == expected and set(ranks.values()) == {RANK})
            if start in FROZEN or start in FROM_DATA:
                equal, equal_ranks, _ = count(f"{start}+equal-parameters")
                assert equal == expected or (start in FROZEN and set(equal_ranks.values()) == {2 * RANK})
            continue
        equal, equal_ranks, _ = count(f"{start}+equal-parameters")
        assert sum(ranks.values()) <= RANK * len(case.statistics(True))
        assert max(ranks.values()) <= 2 * RANK and len(set(ranks.values())) > 1
        full = start == "eva-frozen-a" and all(own == 2 * RANK for own in equal_ranks.values())
        assert equal <= expected and (full or equal > expected - step), start


def test_ranks_compete_by_what_the_start_says(case):
    stats = case.statistics(True, gradients=True)
    plans = [allocate_ranks(stats, rank=RANK, rho=2.0, policy=policy) for policy in ("eva", "gradient")]
    by_data, by_gradient = ({name: rank for name, rank in plan.items() if rank} for plan in plans)
    assert by_data != by_gradient == case.made("gradient-ranks").ranks


def test_narrow_layers_take_more_ranks_for_equal_parameters():
    case = Case("llama")
    case.model = tiny_llama(intermediate_size=512)
    prepared = case.prepare("eva-rho2+equal-parameters")
    assert sum(prepared.ranks.values()) > 1.2 * RANK * len(prepared.ranks)
    layers = adapter_layers(prepared.peft_model).values()
    assert {layer.scaling["default"] for layer in layers} == {8 / RANK}


def test_full_fine_tuning_trains_the_model_itself_in_float32():
    case = Case("llama")
    case.model.to(torch.bfloat16)
    before = snapshot(case.model)
    prepared = case.prepare("full")
    assert prepared.peft_model is case.model and prepared.ranks == {} and prepared.a_scale == 0.0
    assert prepared.trainable_parameters == sum(p.numel() for p in case.model.parameters())
    assert {p.dtype for p in case.model.parameters()} == {torch.float32}
    trained(prepared, case.batches[0])
    prepared.release()
    assert_same(before, snapshot(case.model))
    refused("start 'full' has no adapter", case.prepare, "full+32-alpha")


@pytest.mark.parametrize("start", FROZEN)
def test_frozen_a_trains_b_alone(case, start):
    prepared = case.prepare(start)
    named = dict(prepared.peft_model.named_parameters())
    assert not any(p.requires_grad for n, p in named.items() if "lora_A" in n)
    assert all(p.requires_grad for n, p in named.items() if "lora_B" in n)
    prepared.release()


def test_a_of_the_starts_from_data(case):
    """eva-rho2 has the ranks and the directions, eva-ranks only the ranks, eva only the directions."""

    def a_of(start):
        prepared = case.prepare(start)
        found = {name: a.detach().clone() for name, a in a_weights(prepared.peft_model).items()}
        prepared.release()
        return found

    eva, uniform, ranks, uncentred = map(a_of, ["eva-rho2", "eva", "eva-ranks", "eva-uncentred"])
    stats = case.statistics(True)
    assert {n: len(a) for n, a in eva.items()} == {n: len(a) for n, a in ranks.items()}
    for name, a in eva.items():
        assert torch.equal(a, as_large_as_random(stats[name], stats[name].components[: len(a)]))
        assert torch.equal(uniform[name], as_large_as_random(stats[name], stats[name].components[:RANK]))
        width = a.shape[1]
        assert torch.equal(ranks[name], drawn(len(a), width, name))
    second_moment = case.statistics(False)
    for name, a in uncentred.items():
        assert torch.equal(a, as_large_as_random(second_moment[name], second_moment[name].components[: len(a)]))
    assert any(not torch.equal(eva[name][:1], uncentred[name][:1]) for name in eva if name in uncentred)


def interrupted(batches):
    yield batches[0]
    raise KeyboardInterrupt


def test_corda_reads_the_rows_without_padding(case, monkeypatch):
    """Its covariance is that of the rows that count, one sequence after the other."""
    import peft.tuners.lora.corda as corda

    seen = {}

    def collect_eigens(model, config, verbose):
        seen.update({n: m.covariance_matrix.clone() for n, m in corda.target_modules(model, config)})
        return original(model, config, verbose)

    original = corda.collect_eigens
    monkeypatch.setattr(corda, "collect_eigens", collect_eigens)
    prepared = case.prepare("corda", batches=iter(case.batches))
    prepared.release()
    name = next(name for name in seen if name.endswith(("layers.0.mlp.up_proj", "layer.0.intermediate.dense")))
    expected, rows = 0, []
    handle = case.model.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    for batch in case.batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            case.model(input_ids=ids[mask.bool()][None])
            scaled = rows[-1] / rows[-1].max().abs()
            expected = expected + (scaled.T @ scaled).detach()
    handle.remove()
    torch.testing.assert_close(seen[name], expected / len(rows), rtol=1e-5, atol=1e-5)


def test_orthogonal_rows_have_the_size_of_random_ones(case):
    """As in the adapter that `init --method orthogonal` makes, where inputs are alike in all directions."""
    sizes = []
    for name in ("random", "orthogonal"):
        prepared = case.prepare(name, rank=2)
        sizes.append(prepared.a_scale)
        prepared.release()
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


@pytest.mark.parametrize(("start", "model", "options", "message"), [
    ("pissa", tiny_llama, dict(target_modules=["embed_tokens", "q_proj"]),
     "linear layers, 'model.embed_tokens' is a Emb"),
    ("olora", tiny_gpt2, dict(), "PEFT computes it for nn.Linear only, and 'transformer.h.0.attn.c_attn' is a Conv1D"),
    ("pissa", tiny_llama, dict(rank=20), "k_proj' has 16 singular vectors, and rank 20 asks for more"),
    ("loftq", tiny_llama, dict(), "bitsandbytes|GPU|CUDA"),
])  # fmt: skip
def test_starts_that_do_not_apply_say_why(start, model, options, message):
    with pytest.raises(LoraInitError, match=message):
        shape = AdapterShape(**dict(rank=RANK, lora_alpha=8, task_type="CAUSAL_LM") | options)
        prepare(Variant(start), StartInputs(model(), shape, 0))


def test_loftq_rounds_the_base_and_release_brings_it_back(monkeypatch):
    """The rounding itself is bitsandbytes' and needs a GPU: here a coarse rounding takes its place."""

    def loftq_init(weight, num_bits, reduced_rank, num_iter):
        assert (num_bits, reduced_rank, num_iter) == (4, RANK, 1)
        rounded = (weight.detach() * 50).round() / 50
        u, s, vh = torch.linalg.svd(weight.detach() - rounded, full_matrices=False)
        root = s[:reduced_rank].sqrt()
        return rounded, root[:, None] * vh[:reduced_rank], u[:, :reduced_rank] * root

    monkeypatch.setattr("peft.utils.loftq_utils.loftq_init", loftq_init)  # where older releases of PEFT look
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq_init, raising=False)
    case = Case("llama")
    before, output = snapshot(case.model), case.logits()
    prepared = case.prepare("loftq")
    changed = [n for n, v in case.model.named_parameters() if n.endswith("base_layer.weight") and v.max() > 0]
    assert len(changed) == 14 and set(prepared.ranks.values()) == {RANK}
    assert not torch.equal(case.logits(prepared.peft_model), output)
    prepared.release()
    assert_same(before, snapshot(case.model))


def own_function(model, seed):
    from peft import LoraConfig, get_peft_model

    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "query"], init_lora_weights="gaussian"))


def test_a_start_of_ones_own_from_a_function(case):
    before = snapshot(case.model)
    prepared = case.prepare(("mine", own_function), seed=3)
    assert set(prepared.ranks.values()) == {3} and len(prepared.ranks) == 2
    assert not prepared.peft_model.get_base_model().training
    trained(prepared, case.batches[0])
    prepared.release()
    assert_same(before, snapshot(case.model))


def test_a_start_of_ones_own_from_a_directory(case, tmp_path):
    made = case.prepare("orthogonal", rank=2, seed=5)
    expected = {name: a.detach().clone() for name, a in a_weights(made.peft_model).items()}
    made.peft_model.save_pretrained(tmp_path / "adapter")
    made.release()
    before = snapshot(case.model)
    for seed in (0, 1):
        prepared = case.prepare(("mine", tmp_path / "adapter"), seed=seed)
        assert all(torch.equal(a, expected[name]) for name, a in a_weights(prepared.peft_model).items())
        assert set(prepared.ranks.values()) == {2} and prepared.trainable_parameters > 0
        trained(prepared, case.batches[0])
        prepared.release()
    assert_same(before, snapshot(case.model))


def fails(model, seed):
    raise KeyError("no such thing")


def about_another(model, seed):
    return own_function(tiny_llama(), seed)


@pytest.mark.parametrize(("function", "message"), [
    (fails, "start 'mine': its function raised KeyError: 'no such thing'"),
    (lambda model, seed: None, "start 'mine': its function returned NoneType, expected a PeftModel around the model"),
    (lambda model, seed: model, "start 'mine': its function returned LlamaForCausalLM, expected a PeftModel"),
    (about_another, "start 'mine': its function returned PeftModel, expected a PeftModel around the model that it was"),
])  # fmt: skip
def test_a_function_that_makes_no_start_is_named_and_leaves_the_model(function, message):
    case = Case("llama")
    before = snapshot(case.model)
    refused(f"^{message}", case.prepare, ("mine", function))
    assert_same(before, snapshot(case.model))


@pytest.mark.parametrize(("start", "inputs", "message"), [
    ("eva", {}, "this start learns from data, and there is none"),
    ("lora-one", {}, "this start learns from data, and there is none"),
    ("corda", {}, "^start 'corda' reads data, and there is no batch"),
    ("bank-nearest", {}, "^a start from a bank needs bank=, whose prompts are embedded by the base model itself"),
    ("bank-nearest", {"bank": SimpleNamespace(encoder="another")}, "whose prompts are embedded by the base model its"),
])  # fmt: skip
def test_a_start_without_what_it_learns_from_is_refused(start, inputs, message):
    model = tiny_llama()
    before = snapshot(model)
    asked = StartInputs(model, AdapterShape(rank=RANK, lora_alpha=8, task_type="CAUSAL_LM"), 0, **inputs)
    refused(message, prepare, Variant(start), asked)
    assert_same(before, snapshot(model))


def test_ctrl_c_leaves_the_model():
    case = Case("llama")
    before = snapshot(case.model)
    with pytest.raises(KeyboardInterrupt):
        case.prepare("corda", batches=interrupted(case.batches))
    assert_same(before, snapshot(case.model))


class Packed(torch.nn.Parameter):
    """Stands in for the classes of quantized weights."""


@pytest.mark.parametrize("weight", [
    Packed(torch.zeros(32, 32)), torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False),
])  # fmt: skip
def test_quantized_weights_are_not_taken_apart(weight):
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj.weight = weight
    asked = StartInputs(model, AdapterShape(rank=RANK, lora_alpha=8, task_type="CAUSAL_LM"), 0)
    said = "^start 'pissa' takes weights apart, 'model.layers.1.self_attn.o_proj' is quantized. Load the model in float"
    refused(said, prepare, Variant("pissa"), asked)


def test_what_peft_raises_is_named_and_a_lack_of_memory_is_what_it_was(monkeypatch):
    def fail(model, config):
        model.lm_head.weight.data.zero_()
        raise next(errors)

    errors = iter([ValueError("no such\nthing"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes.")])
    monkeypatch.setattr("peft.get_peft_model", fail)
    case = Case("llama")
    before = snapshot(case.model)
    refused("^start 'pissa' does not apply here, PEFT says: no such", case.prepare, "pissa")
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):  # the workbench knows what to do
        case.prepare("pissa")
    assert_same(before, snapshot(case.model))


def test_a_is_found_where_it_is_a_matrix():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]))
    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert {name: tuple(a.shape) for name, a in a_weights(model).items()} == dict.fromkeys(names, (2, 32))
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Flatten(), torch.nn.Linear(4, 5))
    assert [*a_weights(get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"])))] == ["2"]


def test_a_start_of_ones_own_is_known_by_its_files_or_its_name(tmp_path):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "README.md": b"a"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    expected = hashlib.sha256(b"{}weights").hexdigest()[:16]
    assert hash_own(tmp_path) == hash_own(str(tmp_path)) == expected
    (tmp_path / "README.md").write_bytes(b"b")
    assert hash_own(tmp_path) == expected
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(files[name] + b" ")
        assert hash_own(tmp_path) != expected
        (tmp_path / name).write_bytes(files[name])
    assert hash_own(own_function) == hash_own(partial(own_function, seed=3)) == "own_function"
    assert hash_own(Case.prepare) == "Case.prepare" and hash_own(torch.nn.ReLU()) == "ReLU"


def test_the_scale_of_a_is_the_root_mean_square_of_the_norms_of_its_rows():
    from peft import LoraConfig, get_peft_model

    for layers, norms, scale in (
        (["q_proj", "down_proj"], [1.0, 5.0, 7.0, 0.0], 75**0.5 / 2), (["q_proj"], [0.5, 0.0], 0.125**0.5),
        (["embed_tokens"], [], 0.0),
    ):  # fmt: skip
        model = get_peft_model(tiny_llama(num_hidden_layers=1), LoraConfig(r=2, target_modules=layers))
        rows = [row for a in a_weights(model).values() for row in a.data]
        for row, norm in zip(rows, norms, strict=True):
            row.zero_()[3] = -norm
        prepared = PreparedModel(model, 0.0, None, lambda: None, False)
        assert prepared.a_scale == pytest.approx(scale) and set(prepared.ranks.values()) == {2}


def unseeded(model, seed):
    """An adapter that is drawn without a seed of its own."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "query"]))


def test_what_a_start_draws_is_that_of_its_seed_and_leaves_the_random_state(case):
    drawn = []
    for seed, state in ((3, 1), (3, 2), (4, 2)):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        prepared = case.prepare(("mine", unseeded), seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        drawn.append(torch.cat([a.detach().flatten() for a in a_weights(prepared.peft_model).values()]))
        prepared.release()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_a_function_that_changes_one_weight_by_its_last_bit_has_changed_the_base():
    def touches(model, seed):
        weight = model.get_input_embeddings().weight
        weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(9.0))
        return unseeded(model, seed)

    case = Case("llama")
    for function, changes in ((unseeded, False), (touches, True)):
        prepared = case.prepare(("mine", function))
        assert prepared.changes_base is changes
        prepared.release()


@pytest.mark.parametrize(("starts", "is_quantized", "has_float", "said"), [
    ("random full pissa eva", False, False, None),
    ("random full loftq qera", True, True, None),
    ("mine random", True, False, None),
    ("mine qera", False, False, "^start 'qera' corrects a quantized base. Load it so: quantize='nf4'"),
    ("mine qera+8-alpha", True, False, r"^start 'qera\+8-alpha' needs the model before it was quantized"),
    ("random full", True, False, "^start 'full' needs the model before .* Name its directory by weights="),
    ("full pissa", True, True, "^start 'pissa' changes base weights, and these are quantized. Leave it out"),
])  # fmt: skip
def test_each_of_the_starts_has_to_go_with_the_base(starts, is_quantized, has_float, said):
    variants = map(Variant.parse, starts.split())
    if said is None:
        check_quantized(variants, is_quantized, has_float)
    else:
        refused(said, check_quantized, variants, is_quantized, has_float)


@pytest.mark.parametrize("pair", [
    ("mine",), ("mine", own_function, 3), (own_function, "mine"), ("", own_function), ("eva", own_function),
    ("+4-steps", own_function), ("mine", None), ("mine", "nowhere"),
])  # fmt: skip
def test_a_start_of_ones_own_is_a_new_name_and_what_makes_it(pair, tmp_path, monkeypatch):
    said = "no adapter directory, nor a function" if pair[0] == "mine" and len(pair) == 2 else "a pair is needed, of"
    refused(f"^start .*{said}", read_start, pair)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    assert read_start(("mine", "~")) == read_start(("mine", own_function)) == Variant("mine")


@pytest.mark.parametrize(("name", "allowed"), [
    ("eva", True), ("eva-ranks", True), ("random-frozen-a", True), ("eva-frozen-a", True), ("random", False),
    ("pissa", False), ("bank-nearest", False), ("orthogonal", False),
])  # fmt: skip
def test_equal_parameters_are_for_starts_whose_ranks_or_size_may_differ(name, allowed):
    start = f"{name}+equal-parameters"
    if allowed:
        assert read_start(start) == Variant(name, equal_parameters=True)
    else:
        refused(f"^start '{name}' takes no ranks from data, so it cannot be run with equal", read_start, start)


@pytest.mark.parametrize("training", [True, False])
def test_corda_runs_the_model_without_dropout_and_leaves_no_hook(training):
    case = Case("bert")
    expected = case.made("corda").a
    case.model.train(training)
    before = snapshot(case.model)
    prepared = case.prepare("corda")
    assert all(torch.equal(a, expected[name]) for name, a in a_weights(prepared.peft_model).items())
    assert {module.training for module in prepared.peft_model.modules()} == {training}
    assert not any(module._forward_pre_hooks for module in prepared.peft_model.modules())
    prepared.release()
    unmasked = [{"input_ids": case.batches[0]["input_ids"]}]
    refused("^start 'corda' does not apply here, PEFT says: 'attention_mask'", case.prepare, "corda", batches=unmasked)
    assert_same(before, snapshot(case.model))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("start", ["random", "pissa", ("mine", unseeded)], ids=["random", "pissa", "of one's own"])
def test_an_adapter_is_in_the_mode_of_its_model_and_for_its_task(start, training):
    case = Case("llama")
    case.model.train(training)
    prepared = case.prepare(start)
    assert {module.training for module in prepared.peft_model.modules()} == {training}
    task = None if isinstance(start, tuple) else "CAUSAL_LM"
    assert prepared.peft_model.peft_config["default"].task_type == task


def test_the_files_of_an_adapter_are_read_without_advice(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "v_proj"]))
    with warnings.catch_warnings(action="error"):
        filters = [*warnings.filters]
        files = adapter_files(model)
        assert warnings.filters == filters
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path)
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()


def test_pissa_goes_with_every_layer_that_has_as_many_singular_vectors():
    shape = AdapterShape(rank=16, lora_alpha=8, task_type="CAUSAL_LM")  # as many as k_proj has outputs
    for model in (tiny_llama(num_hidden_layers=1), tiny_gpt2()):
        prepared = prepare(Variant("pissa"), StartInputs(model, shape, 0))
        assert set(prepared.ranks.values()) == {16}


def test_a_start_from_a_bank_has_the_lora_alpha_of_the_comparison(monkeypatch):
    made = []

    def start_from_bank(*_, **shape):
        made.append(shape)
        return SimpleNamespace(init=SimpleNamespace(apply=lambda model: model, gamma=0.5))

    monkeypatch.setattr("lora_init.bank.start.start_from_bank", start_from_bank)
    monkeypatch.setattr("lora_init.bank.embeddings.embed", lambda *words: None)
    shape = AdapterShape(3, lora_alpha=7)
    inputs = StartInputs(tiny_llama(), shape, 0, bank=SimpleNamespace(encoder=""), held_out=list)
    prepared = prepare(Variant.parse(BANK_STARTS[0]), inputs)
    assert prepared.gamma == 0.5 and (made[0]["rank"], made[0]["shape"].lora_alpha) == (3, 7)


@pytest.mark.parametrize("name", ["loftq", "loftq+9-alpha"])
def test_a_correction_of_a_quantized_base_has_the_lora_alpha_of_its_run(name, monkeypatch):
    made = []

    def build_adapter(stats, rank, start, **shape):
        made.append((rank, shape["lora_alpha"]))
        return SimpleNamespace(apply=lambda model: model)

    monkeypatch.setattr(starting, "build_adapter", build_adapter)
    prepare(Variant.parse(name), StartInputs(tiny_llama(), AdapterShape(3, lora_alpha=7), 0, errors="of the base"))
    assert made == [(3, Variant.parse(name).alpha or 7)]


@pytest.mark.parametrize(("layers", "times"), [(["down_proj"], 2), (["up_proj"], 1.5)])  # 64 or 32 inputs
def test_a_frozen_a_of_as_many_parameters_has_twice_the_rank_at_most(layers, times):
    """As many directions as statistics have: with wide inputs B alone could have more ranks than that."""
    prepared = Case("llama").prepare("random-frozen-a+equal-parameters", target_modules=layers)
    assert len(prepared.ranks) == 2 and {*prepared.ranks.values()} == {times * RANK}
