"""GRPO and RLOO: prompts, and answers that the model gives itself."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel

import lora_init
from lora_init.adapters.peft_model import adapter_layers
from lora_init.trainers.prompts import PromptIntegration, answered
from tests.conftest import refused, tiny_llama
from tests.loading.made import bert_tokenizer
from tests.trainers.made import seen_by

trl = pytest.importorskip("trl")
LORA = dict(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
WORDS = "abcdefghij"


def trainer_of(kind, folder, chats=False, peft_config=None, **more):
    tokenizer = bert_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # an older TRL hands all to the model
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}a"
    texts = [" ".join(WORDS[(i + k) % 10] for k in range(1 + i % 4)) for i in range(16)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chats else texts
    settings = dict(
        output_dir=str(folder / "out"), per_device_train_batch_size=4, num_generations=2, max_completion_length=5,
        max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True,
    )  # fmt: skip
    return getattr(trl, f"{kind}Trainer")(
        tiny_llama(), reward_funcs=lambda completions, **more: [float(len(str(one))) for one in completions],
        args=getattr(trl, f"{kind}Config")(**settings | more), train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer, peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "chats"), [("GRPO", False), ("RLOO", True)])
def test_the_statistics_are_of_prompts_with_answers_of_the_models_own(kind, chats, tmp_path, monkeypatch):
    seen = seen_by(PromptIntegration, monkeypatch)
    with_config = chats or kind == "RLOO"  # which loads a second model as its reference otherwise
    trainer = trainer_of(kind, tmp_path, chats, LoraConfig(**LORA) if with_config else None)
    before = torch.random.get_rng_state()
    file = tmp_path / "statistics.safetensors"
    adapted = lora_init.initialize(trainer, statistics=file, tolerance=0, **({} if with_config else {"rank": 2}))
    assert trainer.model is adapted and isinstance(adapted, PeftModel)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert lora_init.Statistics.load(file).provenance.n_samples == sum(int(b["attention_mask"].sum()) for b in seen)
    assert sum(len(batch["input_ids"]) for batch in seen) == 16  # each prompt once
    for batch in seen:
        answers = batch["labels"] != -100
        assert (answers.sum(1) >= 1).all() and (answers.sum(1) <= 5).all()
        assert not (answers & ~batch["attention_mask"].bool()).any()
        for row, kept in zip(batch["input_ids"], answers, strict=True):
            assert 2 not in row[kept][:-1]  # nothing after the end
    trainer.train()
    assert any(layer.lora_B["default"].weight.any() for layer in adapter_layers(adapted).values())


SAMPLING = {
    "all tokens": {},  # where transformers alone would take the 50 likeliest
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.5),
    "min_p": dict(min_p=0.9),
    "repetition": dict(repetition_penalty=5.0),
    "more": dict(generation_kwargs={"suppress_tokens": [*range(3, 40)]}),
    "more wins": dict(top_k=3, generation_kwargs={"top_k": 1}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
@pytest.mark.parametrize("asked", SAMPLING)
def test_answers_are_sampled_as_the_trainer_samples_them(asked, backend, tmp_path):
    trainer = trainer_of("GRPO", tmp_path, peft_config=LoraConfig(**LORA), temperature=2.0, **SAMPLING[asked])
    theirs, model = trainer.generation_config, trainer.model.get_base_model()
    model.generation_config.top_k = 2  # the checkpoint's own, which the trainer does not take
    prompts = [" ".join(WORDS[: 1 + i % 3]) for i in range(8)]
    if backend == "vllm":  # which a trainer asks by its arguments
        del trainer.generation_kwargs
        if trainer.args.generation_kwargs:
            trainer.args.generation_kwargs = {**trainer.args.generation_kwargs, "frequency_penalty": 1.0}  # its own
    torch.manual_seed(0)
    ours = answered(prompts, trainer, model)
    tokens = trainer.processing_class(text=prompts, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    expected = model.generate(tokens["input_ids"], attention_mask=tokens["attention_mask"], generation_config=theirs)
    assert torch.equal(ours["input_ids"], expected)


@pytest.mark.parametrize(("method", "message"), [
    ("lora-ga", "changes the base weights, and GRPOTrainer compares what it trains with the model without its adapter"),
    ("natural-gradient", "needs the gradient of the training loss, and this GRPOTrainer computes a loss of its own"),
])  # fmt: skip
def test_starts_that_do_not_fit_are_refused(method, message, tmp_path):
    refused(message, lora_init.initialize, trainer_of("GRPO", tmp_path), method=method)


def stand_in(**more):
    """A trainer, as far as `answered` reads one, of a model that samples nothing: the likeliest token comes."""
    tokenizer = bert_tokenizer()
    settings = {"do_sample": False, "max_new_tokens": 4} | more
    return SimpleNamespace(processing_class=tokenizer, args=SimpleNamespace(), generation_kwargs=settings)


def test_each_prompt_is_answered_once_whatever_its_group_and_how_often_it_comes():
    integration = object.__new__(PromptIntegration)
    integration.trainer, integration.handle = stand_in(), SimpleNamespace(model=tiny_llama())
    one, two = ([{"prompt": text}] * 3 for text in ("a b", "c"))
    loader = [one + two, one + two, two + one, two, two, one]
    sizes = [len(batch["input_ids"]) for batch in integration.batches(loader)]
    assert sizes == [2, 2, 1, 1]  # what comes again at once is left out; in another order or later it counts


def test_what_is_no_prompt_is_refused():
    for prompts in ([None], ["a", None], ["a", [{"role": "user", "content": "a"}]], [[], 3]):
        said = "^the batches of SimpleNamespace have no column prompt of texts or messages. Initialize the plain model"
        refused(said, answered, prompts, stand_in(), tiny_llama())


@pytest.mark.parametrize("chats", [False, True])
def test_special_tokens_are_those_of_the_template_or_of_the_tokenizer_and_never_both(chats):
    trainer, texts = stand_in(), ["a b", "c"]
    trainer.processing_class.chat_template = "[CLS] {% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompts = [[{"role": "user", "content": text}] for text in texts] if chats else texts
    batch = answered(prompts, trainer, tiny_llama())
    expected = [[1, 4, 5], [0, 1, 6]] if chats else [[1, 4, 5, 2], [0, 1, 6, 2]]
    assert batch["input_ids"][:, : len(expected[0])].tolist() == expected


@pytest.mark.parametrize("ends", [None, "the first", "another"])
def test_an_answer_lasts_to_its_first_end_or_is_whole_where_there_is_none(ends):
    model, trainer = tiny_llama(), stand_in()
    model.generation_config.eos_token_id = None
    whole = answered(["a b", "c"], trainer, model)
    answer = whole["input_ids"][:, -4:]
    assert (whole["labels"][:, -4:] == answer).all() and (whole["labels"][:, :-4] == -100).all()
    if ends is not None:  # of the trainer; the checkpoint's own where that has none
        end = int(answer[0, 1] if ends == "the first" else answer.max() + 1)
        trainer.generation_kwargs["eos_token_id"] = end
        kept = (answered(["a b", "c"], trainer, model)["labels"] != -100).sum(1).tolist()
        expected = [[*row.tolist(), end].index(end) + 1 for row in answer]
        assert kept == [min(n, 4) for n in expected]


def test_what_follows_the_first_end_is_no_answer():
    model, answers = tiny_llama(), torch.tensor([[5, 2, 6, 2], [5, 6, 7, 8]])
    model.generate = lambda input_ids, **settings: torch.cat([input_ids, answers], 1)
    model.generation_config.eos_token_id = 7  # the trainer's own goes before it
    batch = answered(["a b", "c"], stand_in(eos_token_id=2), model)
    assert batch["labels"][:, -4:].tolist() == [[5, 2, -100, -100], [5, 6, 7, 8]]
    assert batch["attention_mask"][:, -4:].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_messages_are_written_with_the_settings_that_the_trainer_has_for_its_template():
    trainer = stand_in()
    trainer.args.chat_template_kwargs = {"extra": "b"}
    trainer.processing_class.chat_template = (
        "{{ extra }} {% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} c{% endif %}"
    )
    batch = answered([[{"role": "user", "content": "a"}]], trainer, tiny_llama())
    assert batch["input_ids"][0, :3].tolist() == [5, 4, 6]
