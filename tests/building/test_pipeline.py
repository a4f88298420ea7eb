"""The steps from a model and data to an adapter stand once, and keywords are sorted once."""

import pytest
from torch import nn

from lora_init import LoraInitError, initialize
from lora_init.adapters.directory import carried
from lora_init.adapters.init_config import InitConfig
from lora_init.building.pipeline import choose, read, split
from lora_init.layers.targets import find_targets
from tests.collection.made import labelled
from tests.conftest import refused, tiny_llama, tiny_vit
from tests.loading.made import byte_tokenizer


@pytest.mark.parametrize(("wrong", "right"), [("exclude_module", "exclude_modules"), ("lora_alfa", "lora_alpha")])
def test_a_misspelt_keyword_is_refused_before_anything_is_read(wrong, right):
    def never():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(LoraInitError, match=rf"^initialize\(\) has no argument {wrong}=. Did you mean {right}\?"):
        initialize(tiny_llama(), never(), **{wrong: ["lm_head"]})


@pytest.mark.parametrize(("n", "left"), [(257, 241), (300, 256)])
def test_what_a_step_is_measured_on_is_no_part_of_the_statistics(n, left):
    rows = [{"text": f"row {i}"} for i in range(n)]
    config = choose(InitConfig.from_arguments("test", "lora-one", samples=256, batch_size=4), classifies=False)
    batches, beyond = read(rows, byte_tokenizer(), config, seq2seq=False, known=())
    found = split(batches, beyond)
    assert [sum(len(b["input_ids"]) for b in part) for part in (found.held_out, found.batches)] == [16, left]
    if left < 256:  # a statistics file of the whole sample is another one
        assert found.batches.settings["set aside"] == 16 and found.data == f"{batches.description}, 16 set aside"
    else:
        assert found.data == batches.description and "set aside" not in found.batches.settings


class OfClasses(list):
    classes = ("a", "b", "c")  # as `load_batches` says of labelled data


def test_a_recommended_start_without_its_gradients_becomes_the_usual_one():
    """Convolutions have no gradients here. One that was asked for is not exchanged."""
    (conv,) = (name for name, module in tiny_vit().named_modules() if isinstance(module, nn.Conv2d))
    linear = next(iter(find_targets(tiny_vit()).layers))
    layers, batches = [linear, conv], OfClasses(labelled("vit"))
    with pytest.warns(UserWarning, match="collect without gradients. So the start is eva, from what the layers read.$"):
        adapted = initialize(tiny_vit(), batches, rank=2, target_modules=layers)
    assert carried(adapted.peft_config["default"].to_dict())["method"] == "eva"
    refused(conv, initialize, tiny_vit(), batches, rank=2, target_modules=layers, method="natural-gradient")
    adapted = initialize(tiny_vit(), batches, rank=2, target_modules=[linear])
    assert carried(adapted.peft_config["default"].to_dict())["method"] == "natural-gradient"
