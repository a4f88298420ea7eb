"""The head of a classifier is trained whole and saved with the adapter, in every way in: a checkpoint may lack it."""

import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from lora_init import initialize
from tests.conftest import tiny_bert

TEXT = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
DECODER = dict(vocab_size=64, d_model=16, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BART = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in
        (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
PIXELS = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8,
              patch_size=4, num_channels=1)  # fmt: skip
SOUND = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8,),
             conv_stride=(2,), conv_kernel=(3,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2)  # fmt: skip
# Class: its configuration, what the checkpoint of its body lacks, and PEFT's task type.
CLASSES = {
    "BertForSequenceClassification": (TEXT, ("classifier",), "SEQ_CLS"),
    "DistilBertForSequenceClassification": (
        dict(vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24), ("pre_classifier", "classifier"), "SEQ_CLS",
    ),
    "DebertaV2ForSequenceClassification": (TEXT, ("pooler", "classifier"), "SEQ_CLS"),
    "ModernBertForSequenceClassification": (
        TEXT | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        ("head", "classifier"), "SEQ_CLS",
    ),
    "XLNetForSequenceClassification": (
        dict(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24),
        ("sequence_summary", "logits_proj"), "SEQ_CLS",
    ),
    "LlamaForSequenceClassification": (TEXT | dict(num_key_value_heads=2, pad_token_id=0), ("score",), "SEQ_CLS"),
    "T5ForSequenceClassification": (
        DECODER | dict(d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
        ("classification_head",), "SEQ_CLS",
    ),
    "BartForSequenceClassification": (DECODER | BART, ("classification_head",), "SEQ_CLS"),
    "BertForTokenClassification": (TEXT, ("classifier",), "TOKEN_CLS"),
    "BertForQuestionAnswering": (TEXT, ("qa_outputs",), "QUESTION_ANS"),
    "BertForMultipleChoice": (TEXT, ("classifier",), None),
    "ViTForImageClassification": (PIXELS, ("classifier",), None),
    "Dinov2ForImageClassification": (PIXELS, ("classifier",), None),
    "ConvNextForImageClassification": (
        dict(num_channels=1, hidden_sizes=[8] * 4, depths=[1] * 4, patch_size=1), ("classifier",), None
    ),
    "SegformerForSemanticSegmentation": (
        dict(num_channels=1, hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8),
        ("decode_head",), None,
    ),
    "Wav2Vec2ForSequenceClassification": (SOUND, ("projector", "classifier"), None),
}  # fmt: skip


def batch_for(name):
    generator = torch.Generator().manual_seed(0)
    if "Image" in name or "Segmentation" in name:
        side = 8 if PIXELS is CLASSES[name][0] else 32
        return {"pixel_values": torch.randn(6, 1, side, side, generator=generator)}
    if name.startswith("Wav2Vec2"):
        return {"input_values": torch.randn(6, 64, generator=generator)}
    shape = (6, 2, 9) if "Choice" in name else (6, 9)
    ids = torch.randint(3, 64, shape, generator=generator)
    ids[..., -1] = 2
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def n_labels(name):
    return 2 if "Answering" in name else 3


def with_new_head(name, folder):
    """A model from a checkpoint that lacks the head."""
    settings, heads, _ = CLASSES[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings, num_labels=n_labels(name)))
    body = {key: value for key, value in model.state_dict().items() if not key.startswith(heads)}
    model.save_pretrained(folder, state_dict=body)
    return loaded(kind, folder, seed=1)


def loaded(kind, folder, seed):
    torch.manual_seed(seed)
    return kind.from_pretrained(folder, num_labels=n_labels(kind.__name__)).eval()


def logits(model, batch):
    with torch.no_grad():
        return next(value for key, value in model(**batch).items() if "logits" in key)


def assert_kept(adapted, folder, batch):
    """Change all that is trained, save it, and load it on the checkpoint again, whose head is another one by then."""
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    adapted.eval()
    base = type(adapted.get_base_model())
    trained = logits(adapted, batch)
    adapted.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(loaded(base, folder, seed=5), folder / "adapter").eval()
    torch.testing.assert_close(logits(again, batch), trained)
    assert not torch.allclose(logits(loaded(base, folder, seed=5), batch), trained)


@pytest.mark.parametrize("name", CLASSES)
def test_a_new_head_is_saved_with_the_adapter(name, tmp_path):
    model, batch = with_new_head(name, tmp_path), batch_for(name)
    adapted = initialize(model, [batch], rank=1, rho=1, lora_alpha=8)
    assert adapted.peft_config["default"].task_type == CLASSES[name][2]
    assert_kept(adapted, tmp_path, batch)


ROWS = [{"text": " ".join("abcdefghij"[(i * k) % 10] for k in range(1, 7)), "kind": f"kind {i % 3}"} for i in range(96)]


@pytest.mark.filterwarnings("ignore:.*(learning_rate|lora_alpha) is ")
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "T5ForSequenceClassification",
                                  "ViTForImageClassification", "Wav2Vec2ForSequenceClassification"])  # fmt: skip
def test_a_trainer_of_a_classifier_keeps_its_head(name, tmp_path):
    model, batch = with_new_head(name, tmp_path), batch_for(name)
    column = {key: value.tolist() for key, value in batch.items()}
    rows = Dataset.from_dict({**column, "labels": [i % 3 for i in range(6)]})
    args = dict(per_device_train_batch_size=2, max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, TrainingArguments(tmp_path / "runs", save_strategy="no", **args), train_dataset=rows)
    adapted = initialize(trainer, rank=1, rho=1)
    assert adapted.peft_config["default"].lora_alpha == 2
    trainer.train()
    assert_kept(adapted, tmp_path, batch)


class Parts(torch.nn.Linear):
    """A head with a layer of its own, and another one in it."""

    def __init__(self):
        super().__init__(16, 3)
        self.before = torch.nn.Linear(16, 16)

    def forward(self, x):
        return super().forward(self.before(x))


class Own(torch.nn.Module):
    """A head of one's own on the body of a checkpoint."""

    def __init__(self):
        super().__init__()
        self.body, self.head = transformers.BertModel(transformers.BertConfig(**TEXT)), torch.nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.head(self.body(input_ids).last_hidden_state)


def test_a_head_of_several_layers_is_told_of_once(recwarn):
    model = Own().eval()
    model.head, model.scorer = Parts(), torch.nn.Linear(16, 2)
    initialize(model, [{"input_ids": torch.arange(12).reshape(2, 6)}], rank=1, target_modules=["query"])
    (told,) = [str(one.message) for one in recwarn if "checkpoint's class" in str(one.message)]
    assert told.startswith("head, scorer: no part") and told.endswith("modules_to_save=['head', 'scorer'].")


@pytest.mark.parametrize(("targets", "whole", "is_told"), [
    (None, None, True), (None, ["head"], False), (["query"], None, True), (["head"], None, False),
])  # fmt: skip
def test_a_head_of_ones_own_that_is_not_trained_whole_is_told_of(targets, whole, is_told, recwarn):
    """Its own weights are frozen and not saved: where they are random, the adapter is for another head next time."""
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    initialize(Own().eval(), [batch], rank=1, target_modules=targets or "all-linear", modules_to_save=whole)
    told = [str(one.message) for one in recwarn if "checkpoint's class" in str(one.message)]
    said = (
        "head: no part of the checkpoint's class, and its weights are neither trained nor saved. If they are random, "
        "train it whole: modules_to_save=['head']."
    )
    assert told == [said] * is_told


def test_a_head_that_peft_trains_for_the_task_is_not_told_of(recwarn):
    batch = {"input_ids": torch.arange(12).reshape(2, 6)}
    initialize(tiny_bert(), [batch], rank=1, target_modules=["query"], task_type="SEQ_CLS")
    assert not [one for one in recwarn if "checkpoint's class" in str(one.message)]
