"""An OpenAI-compatible server on loopback, for tests of `verify`: tiny models, and faults planted in adapters."""

import copy
import json
import threading
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.commands import tokenizer_of

CHAT = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer():
    """Make a tokenizer of 64 words."""
    return tokenizer_of(["user", "assistant", *(f"w{i}" for i in range(58))], chat_template=CHAT)


@lru_cache(maxsize=8)
def _loaded(base, dtype):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


class Engine:
    """What is served: models by name with the name of their base, and how answers look."""

    def __init__(self, tokenizer):
        self.tokenizer, self.models, self.parents = tokenizer, {}, {}
        self.by_number, self.generation_prompt, self.paths = True, True, ("completions", "chat/completions")
        self.key, self.raw, self.asked = None, None, []
        self.status, self.headers, self.busy = None, {}, 0  # of every answer; how many are 429 first
        self.most = None  # values that are told

    def add(self, name, base, adapter=None, dtype=torch.float32, parent=None):
        model = copy.deepcopy(_loaded(base, dtype))  # in a tenth of the time that loading takes
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        self.models[name], self.parents[name] = model.to(dtype).eval(), parent

    @torch.no_grad()
    def answer(self, path, body):
        self.asked.append((path, body["model"]))
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        if path not in self.paths:
            return 404, {"detail": "Not Found"}
        chat = path == "chat/completions"
        text = body.get("prompt")
        if chat:
            text = self.tokenizer.apply_chat_template(
                body["messages"], tokenize=False, add_generation_prompt=self.generation_prompt
            )
        ids = torch.tensor([self.tokenizer(text)["input_ids"]])
        found = (
            self.models[body["model"]](ids)
            .logits[0, -1]
            .float()
            .log_softmax(-1)
            .topk(self.most or body.get("top_logprobs") or body["logprobs"])
        )
        names = [f"token_id:{i}" if self.by_number else self.tokenizer.decode([i]) for i in found.indices.tolist()]
        values = found.values.tolist()
        if chat:
            top = [{"token": name, "logprob": value} for name, value in zip(names, values, strict=True)]
            return 200, {"choices": [{"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]}
        return 200, {"choices": [{"logprobs": {"top_logprobs": [dict(zip(names, values, strict=True))]}}]}

    @contextmanager
    def running(self):
        """Serve on a free port of loopback; yield the URL."""
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(200, {"data": [{"id": name, "parent": up} for name, up in engine.parents.items()]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send(*engine.answer(self.path.removeprefix("/v1/"), body))

            def send(self, status, content):
                if engine.key and self.headers["Authorization"] != f"Bearer {engine.key}":
                    status, content = 401, {"error": f"wrong key {self.headers['Authorization']}"}
                data = engine.raw if engine.raw is not None else json.dumps(content).encode()
                status = engine.status or status
                if engine.busy:
                    engine.busy, status, data = engine.busy - 1, 429, b"<html>Too many requests"
                self.send_response(status)
                for name, value in engine.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def changed(adapter, directory, config=None, tensors=None):
    """Copy an adapter with changes of its config, and of its tensors by a function from a dict to a dict."""
    directory.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(settings | (config or {})))
    found = load_file(adapter / "adapter_model.safetensors")
    save_file((tensors or dict)(found), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def padded(tensors, rank=64):
    return {
        key: F.pad(t, (0, 0, 0, rank - len(t)) if "lora_A" in key else (0, rank - t.shape[1])).contiguous()
        for key, t in tensors.items()
    }


def without(kind):
    return lambda tensors: {key: t * (kind not in key or "lora_B" not in key) for key, t in tensors.items()}


def swapped(kind, one=0, another=1):
    """Exchange A and B of a kind of layer between two blocks."""
    other = {f".layers.{i}.": f".layers.{j}." for i, j in ((one, another), (another, one))}

    def swap(tensors):
        new = dict(tensors)
        for key in tensors:
            block = next((one for one in other if one in key), None)
            if block and kind in key:
                new[key.replace(block, other[block])] = tensors[key]
        return new

    return swap


def renamed(tensors):
    return {key.replace("model.layers", "model.language_model.layers"): t for key, t in tensors.items()}


def without_magnitudes(tensors):
    return {key: t for key, t in tensors.items() if "magnitude" not in key}


# What each adapter is served as, with the verdict and words that name the fault.
FAULTS = {
    "alpha doubled": ("plain", dict(config={"lora_alpha": 32}), "scaled", "by 2, alpha doubled"),
    "rsLoRA flag dropped": ("rslora", dict(config={"use_rslora": False}), "scaled", "rsLoRA not read"),
    "ranks padded without scaling": (
        "plain", dict(config={"r": 64}, tensors=padded), "scaled", "ranks padded to 64 without their scaling",
    ),
    "one kind of layer dropped": ("ranks", dict(tensors=without("v_proj")), "a part is missing", ": v_proj"),
    "A and B of one layer swapped between blocks": (
        "plain", dict(tensors=swapped("up_proj")), "another adapter", "layers changed or in other places",
    ),
    "prefix wrong": ("plain", dict(tensors=renamed), "ignored", "the base"),
    "own rank": ("ranks", dict(config={"alpha_pattern": {}}), "scaled", "lora_alpha over each layer's own rank"),
    "DoRA magnitudes dropped": (
        "dora", dict(config={"use_dora": False}, tensors=without_magnitudes), "a part is missing", "magnitudes of DoRA",
    ),
}  # fmt: skip
