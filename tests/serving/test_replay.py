"""The base writes, the same under the same seed, and what it writes is read as data."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from lora_init import LoraInitError, load_batches
from lora_init.serving.replay import replay, replayed
from tests.commands import save_model
from tests.conftest import tiny_llama, tiny_t5

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


def test_a_text_begins_with_any_token_and_has_no_end(tokenizer):
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(0, 64, 2))  # half of what it draws would end the text
    batches = replayed(model, tokenizer, 20, 0, 8)
    rows = [row for batch in batches for row in batch["labels"].tolist()]
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    assert all(len(ids) == 65 for ids in rows) and len({ids[0] for ids in rows}) > 10
    texts = replay(model, tokenizer, n=20)  # the same, as text
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows] == [row["text"] for row in texts]
    assert tokenizer.eos_token_id is not None and not any(ids[-1] == tokenizer.eos_token_id for ids in rows)


def test_for_chats_it_answers_questions(tokenizer):
    tokenizer.chat_template = TEMPLATE
    rows = replay(tiny_llama(), tokenizer, n=20, length=12, chat=True)
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) > 15 and all(row["messages"][1]["content"].strip() for row in rows)
    assert "text" in replay(tiny_llama(), tokenizer, n=1, length=12)[0]


def test_what_cannot_write_is_refused(tokenizer, monkeypatch):
    with pytest.raises(LoraInitError, match="T5ForConditionalGeneration continues no text"):
        replay(tiny_t5(), tokenizer)
    with pytest.raises(LoraInitError, match="no chat template"):
        replay(tiny_llama(), tokenizer, chat=True)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_, **__: " ")
    with pytest.raises(LoraInitError, match="only empty texts"):
        replay(tiny_llama(), tokenizer, n=1)
