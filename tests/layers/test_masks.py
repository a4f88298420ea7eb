"""Which rows count: shifted labels in passes with gradients, padding with labels, masks of the wrong shape."""

import re

import pytest
import torch
from torch import nn
from transformers import XLMConfig, XLMWithLMHeadModel

from lora_init import LoraInitError, collect
from lora_init.layers.masks import TokenMasks, shifts_labels
from tests.collection.made import recorded
from tests.conftest import batches_for, refused, tiny_bart_decoder, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.layers.made import bart, gpt2_with_cross_attention


def counted(model, batch, layer, token_mask="labels", gradients=True, width=4):
    """Give the positions [batch, length] whose rows count in a layer."""
    masks = TokenMasks(model, token_mask, gradients)
    masks.start(batch)
    shape = next(batch[key].shape for key in ("decoder_input_ids", "labels") if key in batch)
    rows = masks.rows(layer, torch.arange(shape.numel()).reshape(*shape, 1).expand(*shape, width).float())
    found = torch.zeros(shape.numel(), dtype=torch.bool)
    found[rows[:, 0].long()] = True
    return found.reshape(shape)


def labelled_at(*places, length=12):
    labels = torch.full((1, length), -100)
    labels[0, list(places)] = 5
    return {"input_ids": torch.full((1, length), 5), "attention_mask": torch.ones(1, length).long(), "labels": labels}


@pytest.mark.parametrize(("build", "gradients", "expected"), [
    (tiny_llama, True, [6, 7]),  # what is computed at 6 and 7 predicts the tokens at 7 and 8
    (tiny_gpt2, True, [6, 7]),
    (tiny_llama, False, [7, 8]),
    (lambda: tiny_bert("MaskedLM"), True, [7, 8]),  # predicts a token where it stands
    (lambda: tiny_bert("TokenClassification"), True, [7, 8]),
])  # fmt: skip
def test_a_label_counts_where_it_is_predicted_if_there_are_gradients(build, gradients, expected):
    model = build()
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear) or "c_attn" in name)
    assert counted(model, labelled_at(7, 8), layer, gradients=gradients)[0].nonzero().flatten().tolist() == expected


def test_a_label_of_the_first_token_is_predicted_by_nothing():
    """Not by the last one, which predicts what comes after the text."""
    assert counted(tiny_llama(), labelled_at(0, 4, 11), "a.layer")[0].nonzero().flatten().tolist() == [3, 10]


def test_inputs_before_the_last_label_count_in_a_decoder():
    """Later tokens read what has no label itself; by labels it does not count."""
    layer = "decoder.block.0.layer.0.SelfAttention.q"
    for token_mask, expected in (("attention", [0, 1, 2, 3, 4]), ("labels", [0, 1, 4])):
        found = counted(tiny_t5(), labelled_at(0, 1, 4), layer, token_mask=token_mask)
        assert found[0].nonzero().flatten().tolist() == expected


def test_the_rows_that_count_are_those_with_a_gradient():
    model, batch = tiny_llama(), labelled_at(4, 9)
    found = {}
    layer = model.model.layers[1].mlp.down_proj
    layer.register_full_backward_hook(lambda m, i, g: found.update(rows=g[0].abs().sum(-1) > 0))
    model(**batch).loss.backward()
    assert torch.equal(found["rows"], counted(model, batch, "model.layers.1.mlp.down_proj"))


@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_padding_that_predicts_the_first_token_of_a_row_counts(token_mask):
    batch = labelled_at(*range(12))
    batch["attention_mask"][0, :5], batch["labels"][0, :5] = 0, -100
    masks = TokenMasks(tiny_llama(), token_mask, gradients=True)
    masks.start(batch)
    x = torch.zeros(1, 12, 4)
    assert masks.tokens("", x, predicting=True).tolist() == [4, *range(5, 12 if token_mask == "attention" else 11)]
    assert len(masks.tokens("", x)) == (7 if token_mask == "attention" else 6)  # padding says nothing about inputs


LENGTHS = torch.tensor([5, 6, 7, 10])
SHORT = (torch.arange(10) < LENGTHS[:, None]).long()  # 28 tokens
SHORTER = (torch.arange(10) < torch.tensor([[3], [4], [5], [6]])).long()  # 18 tokens
IDS = torch.full((4, 10), 5)
INPUT = {"input_ids": IDS, "attention_mask": SHORT}


def bert_to_bert():
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    sizes = dict(vocab_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    sides = [BertConfig(**sizes, hidden_size=width, is_decoder=width > 32).to_dict() for width in (32, 40)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*(BertConfig(**side) for side in sides))
    config.pad_token_id, config.decoder_start_token_id = 0, 1
    return EncoderDecoderModel(config).eval()


@pytest.mark.parametrize(("build", "batch", "expected"), [
    (tiny_t5, {**INPUT, "decoder_input_ids": IDS},
     {"decoder.block.0.layer.0.SelfAttention.q": 40, "decoder.block.0.layer.1.EncDecAttention.k": 28}),
    (tiny_t5, {**INPUT, "decoder_inputs_embeds": torch.zeros(4, 10, 32)},
     {"decoder.block.0.layer.0.SelfAttention.q": 40}),
    (
        bart,  # without inputs of its own the decoder reads the encoder's
        INPUT,
        {"model.decoder.layers.0.self_attn.q_proj": 28, "model.decoder.layers.0.encoder_attn.v_proj": 28},
    ),
    (
        bert_to_bert,  # a projection is between the encoder's output and what reads it
        {**INPUT, "labels": IDS.masked_fill(SHORTER == 0, -100)},
        {
            "enc_to_dec_proj": 28,
            "decoder.bert.encoder.layer.0.crossattention.self.query": 18,
            "decoder.bert.encoder.layer.0.crossattention.self.key": 28,
            "decoder.bert.encoder.layer.0.crossattention.output.dense": 18,
        },
    ),
    (
        gpt2_with_cross_attention,
        {
            **INPUT,
            "encoder_hidden_states": torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(0)),
            "encoder_attention_mask": SHORTER,
        },
        {
            "transformer.h.0.attn.c_attn": 28,
            "transformer.h.0.crossattention.q_attn": 28,
            "transformer.h.0.crossattention.c_attn": 18,
        },
    ),
    (lambda: tiny_bert("MultipleChoice"),
     {"input_ids": IDS.reshape(2, 2, 10), "attention_mask": SHORT.reshape(2, 2, 10)},
     {"bert.encoder.layer.0.attention.self.query": 28, "classifier": 4}),
], ids=["t5", "t5 by embeddings", "bart", "encoder-decoder", "gpt2", "multiple choice"])  # fmt: skip
def test_padding_is_left_out_of_what_each_side_reads(build, batch, expected):
    """Encoder and decoder are of equal length, so the shape of an input says nothing."""
    stats = collect(build(), [batch], list(expected), rank=2)
    assert {name: stats[name].n_samples for name in expected} == expected


def test_the_rows_of_a_multiple_choice_are_those_of_its_tokens():
    model, name = tiny_bert("MultipleChoice"), "bert.encoder.layer.0.attention.self.query"
    mask = (torch.arange(10) < torch.tensor([[10], [7], [4], [2]])).long()
    batch = {"input_ids": torch.arange(3, 43).reshape(2, 2, 10), "attention_mask": mask.reshape(2, 2, 10)}
    rows = recorded(model, batch, name)[mask.bool()]
    torch.testing.assert_close(collect(model, [batch], [name], rank=2)[name].mean, rows.mean(0), atol=1e-6, rtol=1e-5)


def test_every_row_of_an_extractive_answer_has_a_gradient():
    """The softmax over places is over padding, too: without it the mean gradient pointed elsewhere (cosine 0.03)."""
    model, generator = tiny_bert("QuestionAnswering"), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 12), generator=generator)
    batch = {"input_ids": ids, "attention_mask": (torch.arange(12) < 5).long().expand(4, -1)}
    batch |= {"start_positions": torch.tensor([1, 2, 3, 0]), "end_positions": torch.tensor([2, 3, 4, 1])}
    name = "bert.encoder.layer.1.output.dense"
    stats = collect(model, [batch], [name], rank=4, gradients=True)
    (4 * model(**batch).loss).backward()
    exact, found = model.get_submodule(name).weight.grad / 4, stats.gradient(name)
    estimate = found.left.T.double() * found.singular_values @ found.right.double()
    assert float((estimate - exact).norm() / exact.norm()) < 0.1  # of 32 directions 20 are kept; it was 9
    assert stats[name].n_samples == 20  # what the layer reads is described by the text alone


def test_which_models_shift():
    models = (tiny_llama, tiny_gpt2, tiny_t5, tiny_bert, tiny_vit, tiny_bart_decoder)
    shifting = [shifts_labels(build()) for build in models]
    assert shifting == [True, True, False, False, False, False]
    assert not shifts_labels(nn.Linear(2, 2)) and not shifts_labels(tiny_bert(None))
    torch.manual_seed(0)
    xlm, ids = XLMWithLMHeadModel(XLMConfig(vocab_size=20, emb_dim=8, n_layers=1, n_heads=2)).eval(), torch.arange(3, 9)
    with torch.no_grad():
        found = xlm(ids[None], labels=ids[None])
    assert torch.isclose(found.loss, nn.functional.cross_entropy(found.logits[0], ids)) and not shifts_labels(xlm)


def test_labels_on_padding_are_refused_where_a_loss_is_computed():
    batch = batches_for("llama")[0]
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(LoraInitError, match=r"^\d+ labels are on padding.*Set these labels to -100\.$"):
        TokenMasks(tiny_llama(), "attention", gradients=True).start(batch)
    TokenMasks(tiny_llama(), "attention").start(batch)  # without gradients nothing reads them
    # Negative: several classes of a sequence, as many as it has tokens, are no labels of tokens.
    TokenMasks(tiny_bert(), "attention", gradients=True).start({**batch, "labels": torch.ones(4, 12)})


@pytest.mark.parametrize(("changes", "token_mask", "message"), [
    (dict(attention_mask=torch.ones(4, 9)), "attention", "attention_mask has shape (4, 9), and input_ids (4, 12)."),
    (dict(attention_mask=torch.ones(12)), "attention", "attention_mask has shape (12,), and input_ids (4, 12)."),
    (dict(labels=torch.ones(4, 1)), "labels", "labels of shape (4, 1), and input_ids (4, 12)"),
    (dict(labels=torch.ones(4)), "labels", "got labels of shape (4,). Use 'attention'."),
    (dict(labels=None), "labels", "got no labels. Use 'attention'."),
    (dict(attention_mask=torch.zeros(4, 12)), "attention", "the mask keeps 0 of 48 tokens"),
])  # fmt: skip
def test_masks_of_another_shape_are_one_line(changes, token_mask, message):
    batch = {**batches_for("llama")[0], **changes}
    refused(re.escape(message), TokenMasks(tiny_llama(), token_mask).start, batch)


@pytest.mark.parametrize(("build", "token_mask", "gradients", "fit"), [
    (tiny_llama, "attention", False, True),  # nobody reads them
    (tiny_llama, "attention", True, False),
    (tiny_llama, "labels", False, False),
    (tiny_bert, "attention", True, True),  # several classes of a sequence
    (tiny_t5, "labels", False, True),  # an answer has its own length
])  # fmt: skip
def test_labels_of_another_length_are_refused_where_each_is_of_a_token(build, token_mask, gradients, fit):
    masks = TokenMasks(build(), token_mask, gradients)
    batch = {**batches_for("llama")[0], "labels": torch.ones(4, 3, dtype=torch.long)}
    if fit:
        masks.start(batch)
    else:
        refused(r"^labels of shape \(4, 3\), and input_ids \(4, 12\): a label for each token is n", masks.start, batch)


def test_an_input_of_one_dimension_is_one_row():
    masks = TokenMasks(tiny_llama(), "attention")
    masks.start(batches_for("llama")[0])
    assert torch.equal(masks.rows("a.layer", torch.arange(4.0)), torch.tensor([[0.0, 1.0, 2.0, 3.0]]))


def test_a_mask_of_another_name_is_refused_as_it_was_given():
    refused("token_mask='label': Did you mean labels", TokenMasks, tiny_llama(), "label")


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
THREE = {"input_ids": torch.full((2, 3), 5), "attention_mask": MASK}


@pytest.mark.parametrize(("shape", "tokens"), [
    ((2, 3, 4), [0, 1, 3]),
    ((6, 4), [0, 1, 3]),  # the same rows, flattened
    ((2, 4), None),  # a pooled text
    ((3, 2, 4), None),
    ((2, 3), None),
    ((2, 3, 1, 4), None),
])  # fmt: skip
def test_rows_are_chosen_where_there_is_one_for_each_token(shape, tokens):
    masks, x = TokenMasks(tiny_llama(), "attention"), torch.randn(shape)
    masks.start(THREE)
    found = masks.tokens("a.layer", x)
    assert found is tokens is None or found.tolist() == tokens
    flat = x.reshape(-1, shape[-1])
    assert torch.equal(masks.rows("a.layer", x), flat if tokens is None else flat[tokens])
    masks.stop()
    assert masks.tokens("a.layer", x) is None  # nothing is known of the next batch


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3), torch.ones(2, 3, 3), torch.ones(2, 1, 3, 3).bool(), [[1, 1, 0]] * 2]
)
def test_a_mask_that_keeps_all_or_says_who_attends_to_whom_selects_nothing(mask):
    masks = TokenMasks(tiny_llama(), "attention")
    masks.start(THREE | {"attention_mask": mask})
    assert masks.tokens("a.layer", torch.randn(2, 3, 4)) is None


def test_a_mask_may_cover_what_is_in_a_cache():
    masks = TokenMasks(tiny_llama(), "attention")
    longer = torch.ones(2, 5)
    longer[0, 0] = 0
    masks.start(THREE | {"attention_mask": longer, "past_key_values": None})
    refused(re.escape("attention_mask has shape (2, 5)"), masks.start, THREE | {"attention_mask": longer})
    masks.start([torch.ones(2, 3)])  # without names there are no masks
    assert masks.tokens("a.layer", torch.randn(2, 3, 4)) is None


def test_by_labels_both_have_to_keep_a_token():
    labels = torch.tensor([[-100, 5, 5], [-100, 5, -100]])
    masks = TokenMasks(tiny_llama(), "labels")
    masks.start(THREE | {"labels": labels})
    assert masks.tokens("a.layer", torch.randn(2, 3, 4)).tolist() == [1]
    masks.start({"input_ids": THREE["input_ids"], "labels": labels})  # without a mask of padding
    assert masks.tokens("a.layer", torch.randn(2, 3, 4)).tolist() == [1, 2, 4]


def test_the_output_of_an_encoder_is_known_until_the_batch_ends():
    """By identity: of the same shape, and in a layer that a name does not tell."""
    model = tiny_t5()
    masks = TokenMasks(model, "attention")
    (handle,) = masks.hooks()
    assert TokenMasks(tiny_llama(), "attention").hooks() == []
    batch = THREE | {"decoder_input_ids": torch.full((2, 3), 5), "decoder_attention_mask": 1 - MASK}
    masks.start(batch)
    output = model.encoder(input_ids=THREE["input_ids"]).last_hidden_state
    handle.remove()
    assert masks.tokens("odd", output).tolist() == [0, 1, 3] and masks.tokens("odd", output + 0).tolist() == [2, 4, 5]
    assert masks.tokens("encoder.block.0.x", output + 0).tolist() == [0, 1, 3]
    assert masks.tokens("decoder.block.0.layer.1.EncDecAttention.v", output + 0).tolist() == [0, 1, 3]
    assert masks.tokens("odd", torch.randn(2, 4, 4)) is None
    masks.stop()
    masks.start(batch)
    assert masks.tokens("odd", output).tolist() == [2, 4, 5]


@pytest.mark.parametrize(("loss_type", "shifts"), [
    ("ForCausalLM", True), ("ForConditionalGeneration", True), ("ForMaskedLM", False), ("", False), (None, True),
])  # fmt: skip
def test_a_kind_of_loss_shifts_labels(loss_type, shifts):
    model = nn.Linear(2, 2)
    model.loss_type = loss_type
    model.get_output_embeddings = lambda: model
    assert shifts_labels(model) is shifts
    if loss_type is None:
        model.get_output_embeddings = lambda: None
        assert not shifts_labels(model)
