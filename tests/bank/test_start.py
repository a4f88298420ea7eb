"""The ways from a bank to a start: each finds the task it is for, and an unrelated bank is refused."""

import math
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lora_init.adapters.init_config import Shape
from lora_init.bank.embeddings import embed
from lora_init.bank.generator import balanced, load_generator, train_generator
from lora_init.bank.mixture import MOST_PASSES, find_weights, stack
from lora_init.bank.similarity import neighbours
from lora_init.bank.start import mixed_adapter, mixture, start_from_bank
from lora_init.bank.store import add_entry, open_bank
from lora_init.collection.collect import collect
from lora_init.collection.losses import mean_loss
from lora_init.errors import LoraInitError
from lora_init.loading.models import LoadedModel
from lora_init.serving.trained import Layer, read_trained
from lora_init.statistics.statistics import Provenance
from lora_init.statistics.tensorfile import TensorFile, write_tensors
from tests.bank import made
from tests.conftest import refused, tiny_bert, tiny_llama, tiny_t5
from tests.loading.made import bert_tokenizer, byte_tokenizer


def update(layer):
    return layer.scaling * layer.b @ layer.a


def start(bank, task, by="nearest", **more):
    aside = more.pop("aside", made.batches(task, 4, seed=5))
    loss_of = None if aside is None else partial(mean_loss, batches=aside)
    embeddings = embed(made.base(), made.batches(task, 8, seed=4))
    return start_from_bank(bank, made.base(), embeddings, loss_of, by, rank=4, **more)


def test_embeddings_are_of_prompts_alone():
    model, batches = made.base(), made.batches(1)
    other = [dict(batch, input_ids=batch["input_ids"].masked_fill(batch["labels"] != -100, 7)) for batch in batches]
    assert torch.equal(embed(model, batches), embed(model, other))
    states = model.model(batches[0]["input_ids"][:1, :6], output_hidden_states=True).hidden_states
    assert torch.allclose(embed(model, batches)[0], states[1][0].mean(0), atol=1e-6)


def bert():
    return LoadedModel(tiny_bert(None), bert_tokenizer(), None, False)


def test_an_encoder_reads_the_text_of_the_prompts():
    """By its own tokens, and its last layer; nothing that is special to the base's tokenizer is in the text."""
    tokenizer, encoder = byte_tokenizer(), bert()
    ids = torch.tensor([tokenizer("<|im_start|>a b c")["input_ids"] + [7]])
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 7
    found = embed(made.base(), [{"input_ids": ids, "labels": labels}], tokenizer, encoder)
    read = encoder.tokenizer("a b c", return_tensors="pt")
    states = encoder.model(**read, output_hidden_states=True).hidden_states
    assert torch.allclose(found[0], states[-1][0].mean(0), atol=1e-6)


def test_an_encoder_reads_as_much_of_a_prompt_as_it_takes():
    tokenizer, encoder = byte_tokenizer(), bert()
    encoder.tokenizer.model_max_length = 4
    long, short = ({"input_ids": torch.tensor([tokenizer(text)["input_ids"]])} for text in ("a b c d e", "a b"))
    found = embed(made.base(), [long, short], tokenizer, encoder)
    assert torch.equal(found[0], found[1])


def test_the_middle_layer_is_that_after_half_of_the_blocks():
    model, ids = tiny_llama(num_hidden_layers=4), torch.randint(3, 60, (1, 6))
    states = model.model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(embed(model, [{"input_ids": ids}])[0], states[2][0].mean(0))


def test_an_encoder_decoder_embeds_by_its_encoder():
    model, ids = tiny_t5(), torch.randint(3, 64, (1, 9))
    states = model.encoder(ids, output_hidden_states=True).hidden_states
    found = embed(model, [{"input_ids": ids}])
    assert len(states) == 3 and torch.allclose(found[0], states[1][0].mean(0), atol=1e-6)


class Silent(torch.nn.Module):
    def forward(self, input_ids, attention_mask, output_hidden_states):
        return input_ids


IDS = {"input_ids": torch.arange(3, 13).view(2, 5)}


def of_nan():
    """A model with NaN in one token's embedding, which one prompt has."""
    model = made.base()
    model.model.embed_tokens.weight.data[IDS["input_ids"][0, 0]] = math.nan
    return model


@pytest.mark.parametrize(("model", "batches", "message"), [
    (made.base, [], "^there is no prompt to embed: .* Pass at least one example"),
    (made.base, [IDS["input_ids"]], "^a batch has no input_ids, and a bank embeds text"),
    (made.base, [{"pixel_values": torch.ones(1, 3)}], "^a batch has no input_ids, and a bank embeds text"),
    (of_nan, [IDS], "^LlamaForCausalLM makes NaN or inf of a prompt"),
    (Silent, [IDS], "^Silent returns no hidden states to embed prompts by. Pass an encoder"),
])  # fmt: skip
def test_what_cannot_be_embedded_is_one_line(model, batches, message):
    refused(message, embed, model(), batches)


def test_the_nan_of_an_encoder_is_named_as_its_own():
    ids = torch.tensor([byte_tokenizer()("a b")["input_ids"]])
    encoder = bert()
    encoder.model.embeddings.word_embeddings.weight.data[:] = math.inf
    refused("^BertModel makes NaN", embed, made.base(), [{"input_ids": ids}], byte_tokenizer(), encoder)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_nearest_is_the_task_itself(task, bank):
    found = start(bank, task)
    assert found.neighbours[0].name == f"task{task}" and found.weights == {f"task{task}": 1.0}
    assert found.neighbours[0].distance < 0.5 < found.neighbours[1].distance
    before, after = found.init.losses
    assert after < before - 0.3


def test_distances_do_not_depend_on_the_scale_of_a_dimension(bank, monkeypatch):
    new = embed(made.base(), made.batches(1, seed=4))
    before = neighbours(bank, new)
    factor = torch.logspace(-2, 3, new.shape[1])
    plain = type(bank).embeddings
    monkeypatch.setattr(type(bank), "embeddings", lambda self, name: plain(self, name) * factor)
    after = neighbours(bank, new * factor)
    assert [one.name for one in after] == [one.name for one in before]
    assert after[0].distance == pytest.approx(before[0].distance, rel=1e-4)


@pytest.mark.parametrize("similarity", ["subspaces", "both"])
def test_statistics_find_the_nearest_too(similarity, trained, tmp_path):
    for task in range(3):
        file = tmp_path / f"{task}.safetensors"
        collect(made.base(), made.batches(task), "all-linear", rank=4, statistics=file)
        bank = made.add(tmp_path / "bank", task, trained[f"task{task}"], statistics=file)
    stats = collect(made.base(), made.batches(2, seed=4), "all-linear", rank=4)
    found = neighbours(bank, embed(made.base(), made.batches(2, seed=4)), stats, similarity)
    assert found[0].task == "task2" and 1.0 >= found[0].overlap > found[1].overlap
    with pytest.raises(LoraInitError, match="compares statistics, and there are none"):
        neighbours(bank, embed(made.base(), made.batches(2)), None, similarity)


def test_statistics_that_cannot_be_compared_are_refused(trained, tmp_path):
    file, embeddings = tmp_path / "q.safetensors", embed(made.base(), made.batches(1))
    stats = collect(made.base(), made.batches(1), ["q_proj"], rank=2, statistics=file)
    other = collect(made.base(), made.batches(1), ["v_proj"], rank=2)
    bank = made.add(tmp_path / "bank", 0, trained["task0"], statistics=file)
    assert neighbours(bank, embeddings, stats, "subspaces")[0].overlap > 0
    refused("^the statistics of entry 'task0' are about other layers", neighbours, bank, embeddings, other, "both")
    strange = replace(stats, provenance=replace(stats.provenance, fingerprint="0" * 32))
    for similarity in ("embeddings", "subspaces"):
        words = "^the statistics are of another model (.*) than .*bank"
        refused(words, neighbours, bank, embeddings, strange, similarity)
    bank = made.add(tmp_path / "bank", 1, trained["task1"])
    refused("^entry 'task1' of .*bank has no statistics. Compare", neighbours, bank, embeddings, stats, "subspaces")
    assert [one.overlap for one in neighbours(bank, embeddings, stats)] == [None, None]


def test_a_stack_is_the_weighted_sum(bank):
    one, two = (bank.layers(name) for name in ("task0", "task1"))
    for name, layer in stack([one, two], [0.7, -0.2]).items():
        assert torch.allclose(update(layer), 0.7 * update(one[name]) - 0.2 * update(two[name]), atol=1e-6)


def test_a_stack_takes_layers_that_only_one_has():
    one = {"x": Layer(torch.ones(2, 3), torch.ones(4, 2), 1.0)}
    two = {"y": Layer(torch.ones(1, 3), torch.ones(4, 1), 5.0)}
    found = stack([one, two], [2.0, 3.0])
    assert torch.equal(update(found["x"]), torch.full((4, 3), 4.0))
    assert torch.equal(update(found["y"]), torch.full((4, 3), 15.0))


def test_weights_are_those_with_the_lowest_loss(bank):
    """A planted loss: the weights 0.5 and -0.25 of two adapters are the best, and the search does not see them."""
    adapters = [bank.layers(name) for name in ("task0", "task1")]
    wanted = stack(adapters, [0.5, -0.25])
    model = made.base()

    def loss_of(model):
        error = 0.0
        for name, of in wanted.items():
            layer = model.get_submodule(name)
            found = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            error += float((found - update(of)).square().sum())
        return error

    about = Provenance("", "LlamaForCausalLM", bank.fingerprint, [])
    weights, passes = find_weights(model, adapters, partial(mixed_adapter, model, about, "mixture"), loss_of)
    assert weights == pytest.approx([0.5, -0.25], abs=0.02) and passes <= MOST_PASSES
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_mean_has_all_tasks_alike(bank):
    assert start(bank, 1, "mean").weights == dict.fromkeys(("task1", "task0", "task2"), 1 / 3)


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_balanced_factors_are_the_best_of_their_rank(rank):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 10, generator=generator), torch.randn(8, 4, generator=generator)
    cut = balanced(Layer(a, b, 2.0), rank)
    assert cut.a.shape == (rank, 10) and cut.b.shape == (8, rank) and cut.scaling == 1.0
    u, values, vh = torch.linalg.svd(2.0 * b @ a)
    best = u[:, :rank] * values[:rank] @ vh[:rank]
    assert torch.allclose(cut.b @ cut.a, best, atol=1e-4)
    assert torch.allclose(cut.a @ cut.a.T, cut.b.T @ cut.b, atol=1e-4)


@pytest.fixture(scope="module")
def with_generator(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("generator") / "bank"
    for task in range(3):
        bank = made.add(path, task, trained[f"task{task}"])
    train_generator(bank, steps=240).save(bank)
    return bank


def test_what_is_generated_is_for_the_prompts(with_generator):
    """From prompts that it did not see, the weights are nearer to those of their task than to any other's."""
    generator = load_generator(with_generator)
    assert generator.explained > 0.3
    for task in range(3):
        made_for = generator.generate(embed(made.base(), made.batches(task, seed=9)))
        apart = {}
        for name in with_generator.entries:
            wanted = with_generator.layers(name)
            differences = (update(layer) - update(wanted[n]) for n, layer in made_for.items())
            apart[name] = sum(float(difference.square().sum()) for difference in differences)
        assert min(apart, key=apart.get) == f"task{task}"
        before, after = start(with_generator, task, "generated").init.losses
        assert after < before - 0.3


def test_embeddings_count_by_how_far_they_are_from_the_banks_mean(with_generator):
    generator, embeddings = load_generator(with_generator), embed(made.base(), made.batches(0, seed=9))
    moved = replace(generator, shift=generator.shift + 5.0).generate(embeddings + 5.0)
    for name, layer in generator.generate(embeddings).items():
        assert torch.allclose(moved[name].b, layer.b, rtol=1e-3, atol=1e-5)


def test_an_entry_of_other_widths_than_the_models_is_refused():
    name = "model.layers.0.self_attn.q_proj"
    wide = {name: Layer(torch.ones(1, 3), torch.ones(4, 1), 1.0)}
    refused(
        f"an adapter of {name!r}, 3 -> 4, which is none of this model",
        mixed_adapter,
        made.base(),
        Provenance("", "", "", []),
        "nearest",
        wide,
    )


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.q_proj", "score"])
def test_an_entry_of_a_layer_that_is_none_of_the_models_own_is_refused(name):
    """A head for classes is trained whole, and is no layer to adapt."""
    there = {"model.layers.0.self_attn.q_proj": Layer(torch.ones(1, 32), torch.ones(32, 1), 1.0)}
    odd = there | {name: Layer(torch.ones(1, 32), torch.ones(2, 1), 1.0)}
    model = AutoModelForSequenceClassification.from_config(made.base().config)
    refused(re.escape(name), mixed_adapter, model, Provenance("", "", "", [], task_type="SEQ_CLS"), "nearest", odd)


def test_a_sum_is_measured_at_its_full_size():
    name = "model.layers.0.self_attn.q_proj"
    update_of = {name: Layer(torch.randn(3, 32), torch.randn(32, 3), 1.0)}
    found = mixed_adapter(made.base(), Provenance("", "", "", []), "mixture", update_of)
    a, b = found.weights[name]
    torch.testing.assert_close(found.scaling * b @ a, update(update_of[name]))


def test_the_search_for_its_size_begins_at_the_full_one(bank, monkeypatch):
    """It was good where it was trained; a start from gradients has no size of its own, and begins elsewhere."""
    begun = []

    def search(model, build, loss_of, gamma=None, first=None):
        begun.append(first)
        return build(first)

    monkeypatch.setattr("lora_init.bank.start.find_step_size", search)
    start(bank, 0)
    assert begun == [1.0]


def test_a_mixture_is_of_the_nearest_alone_if_there_are_many(bank, monkeypatch):
    monkeypatch.setattr("lora_init.bank.start.MOST_ADAPTERS", 2)
    found = mixture(bank, ["task1", "task0", "task2"], None, lambda adapters: ([0.7, 0.3], 3))
    assert found.weights == {"task1": 0.7, "task0": 0.3} and found.passes == 3


def test_a_model_that_has_an_adapter_is_no_base_and_a_wrapped_one_is(bank):
    wrapped = torch.nn.DataParallel(made.base())
    wrapped.module.config.name_or_path = "org/base"
    embeddings = embed(made.base(), made.batches(1))
    found = start_from_bank(bank, wrapped, embeddings, None, rank=4)
    assert (found.init.provenance.model_id, found.init.provenance.model_class) == ("org/base", "LlamaForCausalLM")
    assert not any(name.startswith("module.") for name in found.init.targets)
    adapted = found.init.apply(made.base())
    refused(
        r"already has an adapter.* give start_from_bank\(\) the plain", start_from_bank, bank, adapted, embeddings, None
    )


def test_a_size_that_is_given_is_taken_and_the_loss_is_told_with_it(bank):
    found = start(bank, 1, shape=Shape(gamma=3.0)).init
    assert found.gamma == 3.0 and found.losses[1] < found.losses[0]


def test_rotating_an_adapter_changes_nothing(trained, tmp_path):
    """The same adapter twice, once with its A and B rotated: there is nothing left to tell apart."""
    from lora_init.bank.generator import aligned
    from lora_init.bank.store import add_entry
    from lora_init.serving.trained import read_trained

    bank = made.add(tmp_path / "bank", 0, trained["task0"])
    found = read_trained(trained["task0"])
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    for name, layer in found.layers.items():
        found.layers[name] = Layer(rotation @ layer.a, layer.b @ rotation.T, layer.scaling)
    bank = add_entry(bank, "rotated", found, bank.embeddings("task0"), task="rotated", data="")
    adapters = aligned(bank, 4)
    for name, layer in adapters["task0"].items():
        assert torch.allclose(adapters["rotated"][name].a, layer.a, atol=1e-4)
        assert torch.allclose(adapters["rotated"][name].b, layer.b, atol=1e-4)


@pytest.mark.parametrize("by", ["nearest", "mean"])
def test_an_unrelated_bank_says_take_none(by, trained, tmp_path):
    """The bank's adapters push answers that are wrong for this task: no size of them lowers the loss."""
    bank = made.add(tmp_path / "bank", 0, trained["task0"])
    flipped = [
        dict(batch, labels=batch["labels"].where(batch["labels"] == -100, batch["labels"] - 30))
        for batch in made.batches(0, 4, seed=5)
    ]
    assert "--method eva" in refused("take none", start, bank, 0, by, aside=flipped)


def test_never_worse_than_the_plain_model(bank):
    for task in range(4):
        for by in ("nearest", "mixture", "mean"):
            try:
                before, after = start(bank, task, by).init.losses
            except LoraInitError as error:
                assert "take none" in str(error)
            else:
                assert after < before


@pytest.mark.parametrize("gamma", [1.0, 4.0])
def test_the_update_is_that_of_the_entry_over_gamma(gamma, bank):
    found = start(bank, 1, aside=None, shape=Shape(gamma=gamma)).init
    for name, (a, b) in found.weights.items():
        layer = bank.layers("task1")[name]
        assert torch.allclose(found.scaling * b @ a, layer.scaling * layer.b @ layer.a / gamma, atol=1e-5)


def test_the_adapter_is_one_that_peft_trains(bank, tmp_path):
    from peft import PeftModel

    found = start(bank, 1).init
    path = found.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(made.base(), path, is_trainable=True)
    assert mean_loss(model, made.batches(1, 4, seed=5)) == pytest.approx(found.losses[1], rel=1e-5)
    assert all(not math.isnan(float(p.detach().sum())) for p in model.parameters())
    assert "B is not zero" in (path / "README.md").read_text() and found.method == "bank-nearest"
    model(**made.batches(1)[0]).loss.backward()


@pytest.mark.parametrize(("by", "more", "message"), [
    ("neerest", {}, "by='neerest' is unknown. Did you mean nearest"),
    ("generated", {}, "has no generator yet. Train it: lora-init bank train"),
    ("mixture", dict(aside=None), "^a mixture is chosen by the loss on labelled examples, and there are none. Take ne"),
])  # fmt: skip
def test_what_cannot_be_is_refused(by, more, message, bank):
    refused(message, start, bank, 1, by, **more)


def test_a_generator_needs_adapters_of_the_same_layers(bank, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    get_peft_model(made.base(), config).save_pretrained(tmp_path / "other")
    bank = made.add(bank.path, 1, tmp_path / "other", name="other")
    refused("adapts other layers than the first", train_generator, bank, steps=1)


def test_a_generator_learns_from_what_differs_between_tasks(trained, tmp_path):
    path = tmp_path / "bank"
    bank = made.add(path, 0, trained["task0"])
    refused("bank has one task, and a generator learns from what differs. Add another", train_generator, bank, steps=1)
    bank = made.add(path, 0, trained["task0-early"], name="more")  # of the same task
    refused("bank has one task, and", train_generator, bank, steps=1)
    same = made.add(tmp_path / "same", 0, trained["task0"])
    same = made.add(tmp_path / "same", 1, trained["task0"])
    refused("^the adapters of .*same are all the same. A generator", train_generator, same, steps=1)
    bank = made.add(path, 1, trained["task1"])
    single = bank.embeddings("task1")[:1]
    bank = add_entry(bank, "single", read_trained(trained["task2"]), single, task="task2", data="")
    refused("^entry 'single' of .*bank has a single prompt. Add it with more", train_generator, bank, steps=1)


@pytest.mark.parametrize(("change", "message"), [
    (dict(fingerprint="0" * 32), "^.*generator.safetensors is for another base model. Train it again: lora-init bank"),
    (dict(shapes={"q": [2, 4, 5]}), "weights instead of 18"),
])  # fmt: skip
def test_a_generator_that_does_not_fit_the_bank_is_refused(change, message, with_generator, tmp_path):
    path = tmp_path / "bank"
    shutil.copytree(with_generator.path, path)
    file = path / "generator.safetensors"
    written = TensorFile(file, "lora_init.generator", 1)
    tensors = {name: written.tensor(name) for name in written.header["digests"]}
    write_tensors(file, "lora_init.generator", 1, written.header | change, tensors)
    refused(message, load_generator, open_bank(path))


def test_prompts_are_embedded_without_dropout_and_the_mode_stays():
    model = made.tiny_llama(attention_dropout=0.5)
    expected = embed(model.eval(), made.batches(0))
    assert torch.equal(embed(model.train(), made.batches(0)), expected) and model.training


def test_prompts_are_embedded_each_by_its_own_tokens(monkeypatch):
    """Of a text that has labels throughout all tokens count, and padding never does."""
    model = made.base()
    ids = torch.randint(3, 60, (4, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [4], [6]])).long()
    labels = torch.full_like(ids, -100)
    labels[0, 4:], labels[1, 2:], labels[2], labels[3] = 5, 5, 5, 1
    found = embed(model, [{"input_ids": ids, "attention_mask": mask, "labels": labels}])
    plain = embed(model, [{"input_ids": row[None, :n]} for row, n in zip(ids, (4, 2, 4, 6), strict=True)])
    assert torch.equal(found, plain) and found.dtype == torch.float32 and not found.requires_grad
    classes = embed(model, [{"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}])  # no labels of tokens
    assert torch.equal(classes, embed(model, [{"input_ids": ids}])) and len(classes) == 4
    monkeypatch.setattr("lora_init.bank.embeddings.MOST_PROMPTS", 3)
    assert torch.equal(embed(model, iter([{"input_ids": ids[:2]}] * 2)), classes[[0, 1, 0]])


def test_what_a_start_says_of_itself(bank):
    found = start(bank, 1, aside=None, shape=Shape(lora_alpha=6.0, gamma=2.0))
    made_of = found.init.provenance
    names = sorted(found.init.targets)
    assert (made_of.model_class, made_of.fingerprint, made_of.rank) == ("LlamaForCausalLM", bank.fingerprint, 4)
    assert made_of.data == "adapters of task0, task1, task2" and made_of.target_modules == names and len(names) == 6
    assert made_of.n_parameters == made.base().num_parameters() and made_of.task_type == "CAUSAL_LM"
    assert (found.init.lora_alpha, found.init.rank, found.init.gamma, found.passes) == (6.0, 4, 2.0, 0)
    plain = start(bank, 1, aside=None).init
    assert plain.lora_alpha == 2 * 4 and plain.gamma == 1.0
    # Its size is shared by both factors.
    for name, (a, b) in plain.weights.items():
        assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-3), name
    order = neighbours(bank, embed(made.base(), made.batches(2)))
    assert start(bank, 1, aside=None, order=order).weights == {"task2": 1.0}


def test_weights_are_searched_from_each_alone_and_their_mean(monkeypatch):
    """What is measured first, how often at most, and that a loss that is not finite is no choice."""
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    widths = {layers[0]: (32, 32), layers[1]: (48, 32)}
    adapters = [
        {name: Layer(torch.randn(1 + i, d_in), torch.randn(d_out, 1 + i), 1.0) for name, (d_in, d_out) in
         list(widths.items())[: 2 - i]}
        for i in range(2)
    ]  # fmt: skip
    model, seen = made.base(), []
    sums = {name: layer.b for name, layer in stack(adapters, [1.0, 1.0]).items()}

    def loss_of(model):
        lora = model.get_submodule(layers[0]).lora_B["default"].weight
        seen.append(lora.detach().clone())
        return math.nan if len(seen) == 1 else float((lora - 0.5 * sums[layers[0]]).square().sum())

    build = partial(mixed_adapter, model, Provenance("", "LlamaForCausalLM", "", []), "mixture")
    weights, passes = find_weights(model, adapters, build, loss_of)
    whole = sums[layers[0]]
    for found, (one, other) in zip(seen, ((1, 0), (0, 1), (0.5, 0.5)), strict=False):
        assert torch.allclose(found, whole * torch.tensor([one, other, other]))
    assert weights == [0.5, 0.5] and passes == len(seen) <= MOST_PASSES
    # The search begins a step of a quarter from the best of these.
    assert float((seen[3] / whole - 0.5).abs().max()) == pytest.approx(0.25, abs=1e-4)
    # Where the search ends is worse than where it has been.
    with monkeypatch.context() as patched:
        patched.setattr("scipy.optimize.minimize", lambda measure, first, **_: measure([3.0, 3.0]))
        assert find_weights(model, adapters, build, loss_of) == ([0.5, 0.5], 4)
    monkeypatch.setattr("lora_init.bank.mixture.MOST_PASSES", 8)
    assert find_weights(model, adapters, build, loss_of)[1] <= 8
    monkeypatch.setattr("lora_init.errors.find_spec", lambda name: None)
    refused("^this needs scipy, which is not installed", find_weights, model, adapters, build, loss_of)
