"""The registry of starts, and starts that other packages bring."""

import math
import subprocess
import sys
from functools import partial
from inspect import signature

import pytest
import torch

from lora_init import Start, build_adapter, collect, initialize
from lora_init.adapters.directory import AdapterDirectory
from lora_init.starts.starts import (
    BANK_WAYS,
    STARTS,
    buildable,
    changes_base,
    compared_names,
    find_recipe,
    find_start,
    load_function,
    start_names,
)  # fmt: skip
from tests.conftest import batches_for, refused, tiny_llama

RANK = 3


def test_importing_the_registry_takes_no_torch():
    program = "import sys, lora_init.starts.starts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_registry_knows_what_functions_take():
    named = [start for start in STARTS if start.takes]
    unnamed = [start.name for start in STARTS if start.function and not start.takes]
    assert not unnamed, f"add takes= to the Start of {', '.join(unnamed)}: the parameters of its function"
    for start in named:
        parameters = tuple(signature(load_function(start.function)).parameters)
        assert start.takes == parameters, f"takes= of the start {start.name} must be {parameters}"


def test_pefts_values_of_init_lora_weights_name_the_starts_that_change_weights():
    assert all(map(changes_base, ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq", "lora_ga", "lora-ga"]))
    assert not any(map(changes_base, ["eva", "gaussian", "lora-one", "full", "unheard-of", ""]))


@pytest.mark.parametrize(("name", "moves_ranks", "reads_data"), [
    ("eva", False, True), ("natural-gradient", False, True), ("random-scaled", False, True), ("qera", False, True),
    ("random", False, False), ("orthogonal", False, False), ("random-frozen-a", False, False),
    ("eva-rho2", True, True), ("eva-ranks", True, True), ("gradient-ranks", True, True),
])  # fmt: skip
def test_data_are_read_for_directions_or_for_ranks(name, moves_ranks, reads_data):
    recipe = find_recipe(name)
    assert (recipe.moves_ranks, recipe.reads_data) == (moves_ranks, reads_data)


@pytest.mark.parametrize(("name", "takes_step", "measures", "corrects"), [
    ("eva", False, (False, False), (False, False)),
    ("natural-gradient-step", True, (True, False), (False, False)),  # whose gamma may be given
    ("lora-one", True, (True, False), (False, False)),
    ("lora-ga", False, (False, False), (False, False)),  # the base is corrected, and no loss tells its steps apart
    ("qera", False, (True, True), (True, True)),
    ("pissa", False, (False, False), (False, False)),
    ("olora", False, (False, False), (False, False)),
    ("loftq", False, (False, False), (False, True)),  # a plain base is rounded, and not corrected
    ("bank-nearest", True, (True, True), (False, False)),
    ("full", False, (False, False), (False, False)),
])  # fmt: skip
def test_a_loss_is_measured_where_a_step_is_searched_or_a_correction_checked(name, takes_step, measures, corrects):
    start = find_start(name)
    assert start.takes_step is takes_step and tuple(map(start.measures, (None, 2.0))) == measures
    assert tuple(map(start.corrects, (False, True))) == corrects
    assert start.changes_output is (takes_step or name == "qera")


def test_the_name_of_a_variation_says_what_is_varied():
    for name in [name for name in compared_names() if name not in start_names()]:
        recipe, (first, _, rest) = find_recipe(name), name.partition("-")
        if name.endswith("-ranks"):  # another start's ranks, with random
            assert recipe.start.name == "random" and recipe.moves_ranks
            assert recipe.policy == first and recipe.needs_gradient is (first == "gradient")
            assert recipe.is_made_by_init is (first == "eva") and recipe.resized is (first != "eva")
        else:
            assert name.startswith(f"{recipe.start.name}-") and recipe.is_made_by_init and recipe.resized
        assert recipe.center is ("uncentred" not in rest) and recipe.freeze_a is ("frozen-a" in rest)
        if "rho" in rest:
            assert recipe.rho == float(rest[3])


@pytest.fixture
def packages(installed):
    return partial(installed, "lora_init.starts")


@pytest.fixture(scope="module")
def stats():
    return collect(tiny_llama(), batches_for("llama"), rank=RANK, rho=1.0, task_type="CAUSAL_LM")


def leading(spectrum, rank):
    return spectrum.components[:rank]


def test_a_start_of_another_package_is_built_and_named_in_the_origin(packages, stats, tmp_path):
    packages(lead=Start("lead", "as eva", function=leading))
    assert start_names()[-1] == "lead" and "lead" in buildable()
    init = build_adapter(stats, RANK, "lead")
    for name, (a, b) in build_adapter(stats, RANK, "eva").weights.items():
        assert torch.equal(init.weights[name][0], a) and not b.any()
    directory = init.save_pretrained(tmp_path / "adapter")
    assert AdapterDirectory(directory).origin["package"] == "an unknown package"
    assert AdapterDirectory(directory).config["init_lora_weights"] is True


@pytest.mark.parametrize(("function", "said"), [
    (lambda spectrum, rank: spectrum.components[: rank - 1], r"returned \[\[2, 32\]\], expected A of shape \[\[3, 32"),
    (lambda rank: [1.0] * rank, r"returned \['list'\]"),
    (lambda spectrum, rank: torch.full((rank, spectrum.components.shape[1]), torch.nan), "returned NaN or inf"),
    (lambda spectrum, rank: torch.full((rank, spectrum.components.shape[1]), 1e300, dtype=torch.float64),
     "too large for float32"),
    (lambda spectrum, rank: (spectrum.components[:rank],) * 2, "expected A of shape .* set b_is_zero=False"),
    (lambda spectrum, rank: sys.exit(7), "its function raised SystemExit: 7"),
    (lambda spectrum, rank: 1 / 0, "its function raised ZeroDivisionError: division by zero"),
    (lambda spectra, rank: spectra, "its function asks for spectra, and there is spectrum, gradient"),
    ("lora_init.building.build:nothing", "cannot be imported: AttributeError"),
])  # fmt: skip
def test_what_a_start_of_another_package_does_wrong_is_one_line_with_its_name(packages, stats, function, said):
    packages(theirs=Start("theirs", "", function=function))
    said = refused(said, build_adapter, stats, RANK, "theirs")
    assert "'theirs'" in said and "an unknown package" in said


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory"), KeyboardInterrupt()])
def test_a_lack_of_memory_in_a_start_of_another_package_keeps_its_error(packages, stats, error):
    def fail(rank):
        raise error

    packages(theirs=Start("theirs", "", function=fail))
    with pytest.raises(type(error)) as caught:
        build_adapter(stats, RANK, "theirs")
    assert caught.value is error


@pytest.mark.parametrize("thing", [leading, "eva", Start("none", "without a function")])
def test_what_is_no_start_with_a_function_is_refused_by_its_entry(packages, stats, thing):
    packages(theirs=thing)
    words = "'theirs' of an unknown package: theirs:THING is no lora_init.Start with a function.$"
    refused(words, build_adapter, stats, RANK, "theirs")


def test_an_unknown_start_is_named_with_the_nearest_one():
    refused("^start 'evva' is unknown. Did you mean eva. Choose from eva, ", find_start, "evva")
    refused("^start 'evva' is unknown", find_recipe, "evva")


@pytest.mark.parametrize("way", ["nearest", "mixture", "generated", "mean"])
def test_a_start_from_a_bank_is_made_by_the_options_that_it_names(way):
    start = find_start(f"bank-{way}")
    assert start is BANK_WAYS[way] and start.init_options == ("--method", "from-bank", "--by", way, "--bank", "BANK")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"gamma": -1}, "gamma=-1, expected a positive number"),
        ({"gamma": 0}, "gamma=0,"),
        ({"gamma": math.inf}, "gamma=inf"),
    ],
)
def test_what_cannot_be_true_of_a_start_is_refused_where_it_is_made(what, said):
    refused(f"start 'odd': {said}", Start, "odd", "", function=leading, **what)
    assert Start("small", "", function=leading, gamma=0.01).gamma == 0.01


def test_a_start_may_take_the_weight_of_the_base(packages, stats):
    def rows(weight, rank):
        return weight[:rank]

    packages(rows=Start("rows", "", function=rows))
    model = tiny_llama()
    adapted = initialize(model, batches_for("llama"), rank=RANK, method="rows", unit_rows=True)
    layer = adapted.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert torch.equal(layer.lora_A["default"].weight, layer.base_layer.weight[:RANK])
    refused("the start is made from its weight", build_adapter, stats, RANK, "rows")
    b_infinite = Start("b", "", b_is_zero=False, function=lambda weight, rank: (weight[:rank], weight[:, :rank] / 0))
    packages(b=b_infinite)
    refused("returned NaN or inf", build_adapter, stats, RANK, "b", model=tiny_llama())


@pytest.mark.parametrize("name", ["eva", "eva-rho2"])
def test_a_start_of_another_package_with_a_name_of_ours_is_told_of(name, installed):
    installed("lora_init.starts", **{name: Start(name, "", function=lambda rank: rank)})
    with pytest.warns(UserWarning, match=f"start '{name}' of .* is not used: this name is lora_init's own"):
        assert find_recipe(name).start is find_start("eva")
