"""An OpenAI-compatible server: which models it has, and its log-probabilities of the token after a prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from lora_init.errors import LoraInitError, in_one_line, require
from lora_init.files import parse_json

# As much as vLLM tells, tokens by number; if that is refused, what the OpenAI API has.
_ASKED: Any = {False: {"logprobs": 20}, True: {"logprobs": True, "top_logprobs": 20}}
_LESS: Any = {False: {"logprobs": 5}, True: {"logprobs": True, "top_logprobs": 5}}
_REFUSED, _NOT_THERE, _BUSY = (400, 422), (404, 405, 501), (429, 502, 503, 504)
# Seconds before a busy server is asked again where it does not say how many; the last is the most that it gets.
_WAITS = (1.0, 3.0, 10.0, 30.0)
_LARGEST = 2**24  # bytes of an answer
_ENDS = " An OpenAI-compatible API often ends in /v1."


class Server:
    """A server at a URL such as `http://127.0.0.1:8000/v1`; `key` is sent to it and shown nowhere."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 60.0) -> None:
        require("httpx2")
        import httpx2

        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx2.Client(base_url=url, timeout=timeout, headers=headers)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise LoraInitError(
                "{url} or {api_key} has characters that neither can have.", url=..., api_key=...
            ) from error
        address = self._client.base_url
        self._secrets = [secret for secret in (key, address.password) if secret]
        self.url = str(address.copy_with(userinfo=b"")).rstrip("/")
        if address.scheme not in ("http", "https") or not address.host:
            raise LoraInitError("{url} is no address of a server, such as http://127.0.0.1:8000/v1.", url=self.url)

    @cached_property
    def models(self) -> dict[str, Any] | None:
        """What it serves: name to the name of the base, if it is an adapter; None if it has no list."""
        status, answer = self._send("models")
        if status in _NOT_THERE:
            return None
        if status != 200:
            raise self._error(status, answer, _ENDS)
        entries: Any = ()
        if isinstance(answer, dict):
            entries = answer.get("data") or ()
        models = {}
        for entry in entries:
            if isinstance(entry, dict):
                models[str(entry.get("id"))] = entry.get("parent")  # of an adapter in vLLM
        return models

    def find(self, name: str, model: str | None = None, base: str | None = None) -> tuple[str, str | None]:
        """Find what an adapter of this name and its base are called there; None if the base is not served beside it."""
        parents = self.models
        if parents is None:
            if model is None:
                raise LoraInitError(f"{self.url}/models is not there. Name the adapter by {{model}}.{_ENDS}", model=...)
            return model, base
        for given in (model, base):
            if given is not None and given not in parents:
                raise self._which_model(f"no model {given!r}", parents)
        chosen = [model] if model else _candidates(name, parents)
        if len(chosen) != 1:
            raise self._which_model("several models", parents)
        choice = chosen[0]
        # The base: the one that is named, else the adapter's by the server's list, else the only other model.
        return choice, base or parents[choice] or _only_model_beside(choice, parents)

    def _which_model(self, what: str, parents: Mapping[str, Any]) -> LoraInitError:
        if not parents:
            return LoraInitError(f"{self.url} has no models. Start it with the adapter.")
        return LoraInitError(f"{self.url} has {what}. Name one by {{model}}: {', '.join(parents)}.", model=...)

    def ask(self, model: str, prompt: Any) -> dict[int | str, float]:
        """Request log-probabilities of the token after a text, or of the first one of the answer to messages.

        They go by the token's number or, where a server does not tell it, its text; empty if it tells none.
        """
        chat = not isinstance(prompt, str)
        path, key = ("chat/completions", "messages") if chat else ("completions", "prompt")
        request = {"model": model, key: prompt, "max_tokens": 1, "temperature": 0}
        # Numbers of tokens are exact, and several tokens may have one text.
        status, answer = self._send(path, request | _ASKED[chat] | {"return_tokens_as_token_ids": True})
        if status in _REFUSED:
            status, answer = self._send(path, request | _LESS[chat])
        if status in _NOT_THERE:
            return {}
        if status != 200:
            raise self._error(status, answer)
        try:
            return _read(answer["choices"][0].get("logprobs") or {})
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise LoraInitError(f"{self.url} answers in another form than the OpenAI API's.") from error

    def _send(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON of an answer, or its text; a busy server is asked again."""
        import httpx2

        for wait in (*_WAITS, None):  # the last answer counts, busy or not
            content = b""
            try:
                # In parts, so that an answer without an end is refused at the limit.
                with self._client.stream("GET" if body is None else "POST", path, json=body) as answer:
                    for part in answer.iter_bytes(2**16):
                        content += part
                        if len(content) > _LARGEST:
                            raise LoraInitError(f"{self.url} answers with more than {_LARGEST >> 20} MB. Is it an API?")
            except httpx2.TimeoutException as error:
                raise LoraInitError(
                    f"{self.url} gives no answer in time. Let it have longer by {{timeout}}.", timeout=...
                ) from error
            except httpx2.HTTPError as error:
                raise LoraInitError(
                    f"{self.url} does not answer: {in_one_line(error)} Is the server running?"
                ) from error
            status = answer.status_code
            if status not in _BUSY or wait is None:
                break
            retry_after = answer.headers.get("Retry-After", "")
            # It may also be a date.
            time.sleep(min(int(retry_after), _WAITS[-1]) if retry_after.isdecimal() else wait)
        if status in (401, 403):
            raise LoraInitError(f"{self.url} refuses the key ({status}). Give another one by {{api_key}}.", api_key=...)
        try:
            reply: Any = parse_json(content)
        except ValueError as error:
            if status == 200:
                raise LoraInitError(f"{self.url} answers with no JSON.{_ENDS}") from error
            reply = content.decode(errors="replace")
        if answer.has_redirect_location:
            raise self._error(status, f"it is at {answer.headers['Location']}", " Give that by {url}.")
        if status not in (200, *_REFUSED, *_NOT_THERE):
            raise self._error(status, reply)
        return status, reply

    def _error(self, status: int, reply: Any, remedy: str = "") -> LoraInitError:
        """Make the error of a status and of what came with it, without secrets."""
        # OpenAI's form is {"error": {"message": ...}}; other servers leave out a level or both.
        for key in ("error", "message"):
            if isinstance(reply, dict):
                reply = reply.get(key, reply)
        text = in_one_line(ValueError(reply))
        for secret in self._secrets:
            text = text.replace(secret, "...")
        return LoraInitError(f"{self.url} answers {status}: {text}{remedy}", url=...)


def _candidates(name: str, parents: Mapping[str, Any]) -> list[str]:
    """List the models that an adapter may be: the one of its name, else all adapters, else all models."""
    if name in parents:
        return [name]
    return [model for model, parent in parents.items() if parent] or [*parents]


def _only_model_beside(name: str, parents: Mapping[str, Any]) -> str | None:
    """Return the one other model that is no adapter; None if there are none or several."""
    others = [other for other, parent in parents.items() if other != name and not parent]
    return others[0] if len(others) == 1 else None


def _read(answer: Mapping[str, Any]) -> dict[int | str, float]:
    """Read the log-probabilities of the first token, in the form of completions or of chats."""
    first: Any = next(iter(answer.get("content") or answer.get("top_logprobs") or ()), None) or {}
    values = first  # of completions: token to log-probability
    if "top_logprobs" in first:  # of chats: an entry for each token, or the chosen one alone
        values = {}
        for entry in first["top_logprobs"] or [first]:
            values[entry.get("id", entry["token"])] = entry["logprob"]  # some servers have numbers, too
    log_probabilities: dict[int | str, float] = {}
    for token, value in values.items():
        # -9999 is how vLLM writes minus infinity. Rounding may leave a certain token a little above zero.
        if value is None or not -1e3 < float(value) < 0.01:
            continue
        number = str(token).removeprefix("token_id:")  # "token_id:7" is how vLLM writes a number
        if isinstance(token, int) or number == token:
            log_probabilities[token] = float(value)
        else:
            log_probabilities[int(number)] = float(value)
    return log_probabilities
