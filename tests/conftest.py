"""Shared fixtures: tiny random models of every architecture the package promises to work on. Nothing is downloaded."""

import functools
import gc
import os
import re
import signal
import sys
import types

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import pytest
import torch
from accelerate.utils import memory

from lora_init.errors import LoraInitError

# PEFT compiles the text of its README.md at each save, for 12 ms. It is the same one.
jinja2.Template.__new__ = functools.cache(jinja2.Template.__new__)
# For GPUs that are not here torch keeps each seed, with a text of the whole call stack, for 1 ms.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None
# transformers' trainers collect garbage as they begin to train, for 50 ms. Python does that, too.
memory.gc = types.SimpleNamespace(collect=int)
N_MODULES = pytest.StashKey[int]()


def pytest_configure():
    """Let Ctrl-C interrupt tests as it does in a terminal: a shell lets what it runs in the background ignore it.

    Garbage is collected from the first test on.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # it takes 2 to 6 s while files are imported


def pytest_collection_modifyitems(items):
    """Run the slow tests first: at the end one would keep a process alone, while the others are idle."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    gc.enable()
    gc.set_threshold(20_000, 20, 50)  # in three files it took 3.5 % of the time with Python's own, and 1.3 % so


def pytest_runtest_setup(item):
    """Spare the collector of garbage what libraries have made as they were imported: it took a tenth of the time."""
    if len(sys.modules) > item.config.stash.get(N_MODULES, 0) + 200:
        item.config.stash[N_MODULES] = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_fixture_setup(fixturedef):
    """Let what several tests share be the same, whichever of them comes first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
    # Tiny matrices: a second thread costs more than it brings, and far more beside other processes.
    torch.set_num_threads(1)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages bring things by a group of entry points: name to a thing or an exception; some twice."""
    from importlib.metadata import EntryPoint

    from lora_init import packages

    def install(group, *twice, **made):
        class Entry(EntryPoint):
            def load(self):
                if isinstance(made[self.name], BaseException):
                    raise made[self.name]
                return made[self.name]

        entries = [Entry(name, "theirs:THING", group) for name in [*made, *twice]]
        monkeypatch.setattr(packages, "entry_points", lambda group: [one for one in entries if one.group == group])
        forget()

    def forget():
        from lora_init.comparison import clusters
        from lora_init.planning import policies
        from lora_init.starts import starts

        for theirs in (starts._THEIRS, policies._THEIRS, clusters._THEIRS):
            vars(theirs).pop("entries", None)
        starts._load.cache_clear()

    yield install
    monkeypatch.undo()
    forget()


def refused(message, function, /, *arguments, **options):
    """Call what has to fail with one line that matches; return the line."""
    with pytest.raises(LoraInitError, match=message) as caught:
        function(*arguments, **options)
    assert_options_are_written(str(caught.value))
    return str(caught.value)


def assert_options_are_written(line):
    """A message of one line, in which no option stands as in the code, `{rank}`, instead of as a user writes it."""
    assert "\n" not in line, line
    # Templates have braces of their own, and stand in quotes; {answer} is a part of one.
    assert {*re.findall(r"\{[a-z_]+\}", re.sub(r"'.*?'", "", line))} <= {"{answer}"}, line


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ).eval()


def tiny_bert(task="SequenceClassification"):
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{task}" if task else "BertModel")(config).eval()


def tiny_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def tiny_bart_decoder():
    from transformers import BartConfig, BartForCausalLM

    config = BartConfig(vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    return BartForCausalLM(config).eval()


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert, "t5": tiny_t5, "vit": tiny_vit}


def batches_for(name, n_batches=4, batch_size=4, length=12, seed=0):
    """Random batches for a model of `MODELS`, with right padding of a different amount in every row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n_batches):
        if name == "vit":
            batches.append({"pixel_values": torch.randn(batch_size, 1, 16, 16, generator=generator)})
            continue
        ids = torch.randint(3, 64, (batch_size, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (batch_size, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        if name == "t5":
            batch["labels"] = ids[:, : length // 2].clone()
        elif name != "bert":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        batches.append(batch)
    return batches
