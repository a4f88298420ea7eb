"""The base writes, the same under the same seed, and what it writes is read as data."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from lora_init import LoraInitError, load_batches
from lora_init.keep import replay as room
from lora_init.keep.replay import check_texts, replay, replayed, sample_texts
from tests.commands import WORDS, save_model, tokenizer_of
from tests.conftest import refused, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

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
    assert torch.equal(before, torch.random.get_rng_state()) and model.training
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
    refused("BertModel continues no text", replay, tiny_bert(None), tokenizer)
    refused("tokenizer", replay, tiny_llama(), "a name")
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


def written(monkeypatch, texts=None):
    """Let `sample_texts` note what it is called with, and write these texts, or a word after each prompt."""
    calls = []

    def write(model, prompts, *rest):
        calls.append((prompts, *rest))
        return texts or [[5]] * len(prompts)

    monkeypatch.setattr(room, "sample_texts", write)
    return calls


def test_all_questions_are_asked_before_one_comes_again(tokenizer, monkeypatch):
    tokenizer.chat_template, calls, said = TEMPLATE, written(monkeypatch), []
    model = tiny_llama()
    model.generation_config.eos_token_id = [9, 7]
    rows = replay(model, tokenizer, 97, 6, chat=True, say=said.append)
    asked = [row["messages"][0]["content"] for row in rows]
    assert len({*asked[:96]}) == 96 and asked[96] == asked[0] and asked[:2] == [
        "Explain the sea.", "Write a short story about a journey.",
    ]  # fmt: skip
    assert rows[0]["messages"][1] == {"role": "assistant", "content": tokenizer.decode([5])}
    assert [len(prompts) for prompts, *_ in calls] == [32] * 4
    assert [[*rest] for _, *rest in calls] == [[6, tokenizer.pad_token_id, [2, 7, 9], True]] * 4
    assert [line.partition(";")[0] for line in said] == [f"{n} of 97 texts written" for n in (32, 64, 96, 97)]


def test_a_question_is_a_users_and_is_followed_by_what_an_answer_begins_with(tokenizer, monkeypatch):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}two {% endif %}{{ m.content[:7] }} {% endfor %}"
        "{% if add_generation_prompt %}the cat{% endif %}"
    )
    calls = written(monkeypatch)
    replay(tiny_llama(), tokenizer, 1, 6, chat=True)
    ((prompts, *_),) = calls
    words = tokenizer.decode(prompts[0]).split()
    assert "two" in words and words[-2:] == ["the", "cat"]


def test_a_text_begins_with_a_token_that_both_model_and_tokenizer_have(monkeypatch):
    calls, large = written(monkeypatch), tokenizer_of([*WORDS, *(f"w{i}" for i in range(200))])
    for tokenizer, most in ((large, 63), (tokenizer_of(WORDS), 3 + len(WORDS))):
        calls.clear()
        batches = replayed(tiny_llama(), tokenizer, 300, 0, 128)
        begun = {prompt[0] for prompts, *_ in calls for prompt in prompts}
        assert max(begun) == most and min(begun) == 0
        assert [len(batch["labels"]) for batch in batches] == [128, 128, 44]
        texts = [[*prompt, 5] for prompts, *_ in calls for prompt in prompts][:300]
        assert [row for batch in batches for row in batch["input_ids"].tolist()] == texts
        assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
        assert {
            tuple(rest) for _, *rest in ((0, length, pad, *ends, stops) for _, length, pad, ends, stops in calls)
        } == {(64, 0, 2, False)}


def test_empty_texts_are_left_out_and_no_more_than_four_times_as_many_are_written(tokenizer, monkeypatch):
    calls = written(monkeypatch, [[0]] * 31 + [[5]])  # padding is no text
    monkeypatch.setattr(torch, "randint", lambda n, shape: torch.zeros(shape, dtype=torch.long))
    assert replay(tiny_llama(), tokenizer, n=2) == [{"text": tokenizer.decode([5])}] and len(calls) == 1
    calls.clear()
    assert replay(tiny_llama(), tokenizer, n=24) == [{"text": tokenizer.decode([5])}] * 3 and len(calls) == 3


@pytest.mark.parametrize(("chat", "longest"), [(False, 1), (True, 10)])
def test_a_text_may_be_as_long_as_the_model_has_positions(chat, longest, tokenizer):
    """The last token is drawn, and never read."""
    tokenizer.chat_template = TEMPLATE
    config = tiny_llama().config
    most = 64 + 1 - longest
    check_texts(config, tokenizer, most, chat)
    said = f"length={most + 1}: with its beginning a text has 66 tokens, and the model takes 64"
    for own in (config, SimpleNamespace(get_text_config=lambda: config)):  # also of a model of text and images
        refused(said, check_texts, own, tokenizer, most + 1, chat)
    check_texts(SimpleNamespace(get_text_config=object), tokenizer, 10**6, chat)  # of a model without a limit


@pytest.mark.parametrize("wrong", [dict(n=0), dict(n=1.5), dict(length=0), dict(length=2.5), dict(chat="no")])
def test_numbers_that_no_text_can_have_are_refused(wrong, tokenizer):
    ((name, value),) = wrong.items()
    refused(f"{name}={value!r}, expected", replay, tiny_llama(), tokenizer, **wrong)
