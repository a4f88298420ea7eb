"""The base writes, the same under the same seed, and what it writes is read as data."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from lora_init import LoraInitError, load_batches
from lora_init.keep.replay import replay, replayed, sample_texts
from tests.commands import save_model
from tests.conftest import refused, tiny_gpt2, tiny_llama, tiny_t5

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_model(tiny_llama(), tmp_path))


def test_of_an_adapted_model_the_base_writes(tokenizer):
    base = tiny_llama()
    expected = replay(base, tokenizer, n=20, length=12)
    assert len(expected) == 20 and replay(base, tokenizer, n=5, length=12) == expected[:5]
    assert replay(base, tokenizer, n=20, length=12, seed=1) != expected
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    before = torch.random.get_rng_state()
    assert replay(model, tokenizer, n=20, length=12) == expected
    assert torch.equal(before, torch.random.get_rng_state())
    assert sum(len(batch["labels"]) for batch in load_batches(expected, tokenizer)) == 20


@torch.no_grad()
@pytest.mark.parametrize("ends", [[2], [*range(2, 64, 4)]])
def test_it_writes_as_the_model_has_it_whatever_the_checkpoint_says(ends, tokenizer):
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2)  # with a distribution that is far from even
    said = dict(
        top_k=5, top_p=0.5, min_p=0.2, repetition_penalty=1.5, no_repeat_ngram_size=1, temperature=0.3,
        suppress_tokens=[5, 6, 7], begin_suppress_tokens=[8], forced_eos_token_id=9, bad_words_ids=[[10]],
        do_sample=False, num_beams=1,
    )  # fmt: skip
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    model.generation_config.eos_token_id = ends
    batches = replayed(model, tokenizer, 256, 0, 32)
    losses, expected = [], []
    for batch in batches:
        logits = model(batch["input_ids"]).logits[:, :-1].double()
        ended = logits.clone()
        ended[..., ends] = -torch.inf  # what ends a text is left out
        loss = -logits.log_softmax(-1)
        drawn = ended.softmax(-1)
        losses.append(loss.gather(-1, batch["labels"][:, 1:, None]).flatten())
        expected.append((drawn * loss).sum(-1).flatten())
    difference = torch.cat(losses) - torch.cat(expected)  # of mean 0 given the tokens before
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / len(difference) ** 0.5
    assert not torch.isin(batches[0]["labels"], torch.tensor(ends)).all() and float(difference.std()) > 0.1


def test_padding_before_a_question_changes_no_answer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    short, long = [3, 4, 5], [*range(3, 20)]
    for model in (tiny_llama(initializer_range=0.2), tiny_gpt2()):
        with torch.no_grad():
            alone = model(torch.tensor([short])).logits[0, -1].softmax(-1)
        torch.manual_seed(0)
        rows = sample_texts(model, [short, long] * 2000, 1, 0, [], True)
        found = torch.bincount(torch.tensor(rows[::2])[:, 0], minlength=64) / 2000
        assert (found - alone).abs().max() < 5 * 0.5 / 2000**0.5


def test_for_chats_it_answers_questions(tokenizer):
    tokenizer.chat_template = TEMPLATE
    rows = replay(tiny_llama(), tokenizer, n=20, length=12, chat=True)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) > 15 and all(row["messages"][1]["content"].strip() for row in rows)
    assert "text" in replay(tiny_llama(), tokenizer, n=1, length=12)[0]
    always = tiny_llama()
    always.generation_config.eos_token_id = [*range(64)]  # an answer ends with its first token
    rows = sample_texts(always, [[3], [4, 5]], 12, 0, [*range(64)], True)
    assert [len(row) for row in rows] == [1, 1]


def test_what_cannot_write_is_refused(tokenizer, monkeypatch):
    refused("T5ForConditionalGeneration continues no text", replay, tiny_t5(), tokenizer)
    for more in ({}, {"chat": True}):
        tokenizer.chat_template = TEMPLATE
        with pytest.raises(LoraInitError, match=r"length=3000: .* and the model takes 64"):
            replay(tiny_gpt2() if more else tiny_llama(), tokenizer, length=3000, **more)
    tokenizer.chat_template = None
    refused("no chat template", replay, tiny_llama(), tokenizer, chat=True)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: " ")
    refused("only empty texts", replay, tiny_llama(), tokenizer, n=1)


def test_the_models_own_way_of_writing_is_as_it_was(tokenizer):
    model = tiny_llama()
    model.generation_config.top_k = 7
    before = model.generation_config
    replay(model, tokenizer, n=2, length=4)
    assert model.generation_config is before and before.top_k == 7
