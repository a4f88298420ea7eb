"""How the options that several commands have are declared and read."""

from types import SimpleNamespace

import pytest

from lora_init.adapters.init_config import Ranks, Sample
from lora_init.cli.commands import offered
from lora_init.cli.options import Length, Loading, LoadingQuantized, as_declared, one_base
from lora_init.rates.training_length import TrainingLength
from tests.conftest import refused


def test_an_option_that_init_has_keeps_its_limits_and_its_help():
    for kind, name in ((Sample, "samples"), (Sample, "max_length"), (Ranks, "rank")):
        declared = as_declared(kind, name)
        assert declared["min"] >= 1 and declared["help"] and "first" not in declared
        declared.clear()
        assert as_declared(kind, name)  # a copy


@pytest.mark.parametrize(("kind", "more"), [(Loading, {}), (LoadingQuantized, {"quantize": "nf4"})])
def test_weights_are_read_as_was_asked(kind, more):
    source = SimpleNamespace(name="m", load=lambda **options: options)
    loading = kind(dtype="bfloat16", device="cpu", trust_remote_code=True, **more)
    assert loading.load(source, seed=3) == {"dtype": "bfloat16", "device": "cpu", "seed": 3, **more}
    assert loading.trust_remote_code  # which `open_model` was given
    assert kind().load(source)["dtype"] == kind().load(source)["device"] == "auto"


def test_a_length_is_planned_of_what_was_typed():
    assert Length(steps=7, train_batch_size=3).plan(30) == TrainingLength.plan(30, 7, None, 3)
    assert Length(epochs=2.0).plan(30) == TrainingLength.plan(30, None, 2.0, 8)
    assert offered(Length) == ["steps", "epochs", "train_batch_size"]


def test_the_adapters_of_a_command_have_one_base():
    assert one_base(["a", "a"]) == "a"
    refused("^the adapters are of a, b. Take those of one base, or name --base.$", one_base, ["b", "a", "b"])
