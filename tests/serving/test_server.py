"""An OpenAI-compatible server as it is asked: its list of models, its log-probabilities, and its refusals."""

import json
import math

import pytest

from lora_init.serving.server import Server
from tests.conftest import refused
from tests.serving.engine import Engine

pytest.importorskip("httpx2")
TEXT, CHAT = "the cat", [{"role": "user", "content": "the cat"}]


def asked(answer, call, **parents):
    """Call a function of a server that has these models, and answers so; return the result and what it was sent."""
    engine, bodies = Engine(None), []
    engine.parents = parents
    engine.answer = lambda path, body: bodies.append((path, body)) or answer(body)
    with engine.running() as url:
        return call(Server(url)), bodies


def told(values):
    return 200, {"choices": [{"logprobs": {"top_logprobs": [values]}}]}


@pytest.mark.parametrize(("url", "key"), [("http://127.0.0.1:8000/\x00v1", None), ("http://127.0.0.1/v1", "schlüssel")])
def test_characters_that_neither_an_address_nor_a_key_can_have_are_refused(url, key):
    said = refused(r"^url= or api_key= has characters that neither can have\.$", Server, url, key)
    assert "schl" not in said


def test_a_list_of_models_that_is_refused_is_an_error():
    engine = Engine(None)
    engine.status, engine.raw = 400, b'{"error": {"message": "no such list"}}'
    with engine.running() as url:
        said = refused("/v1 answers 400: no such list", lambda: Server(url).models)
    assert said.endswith("An OpenAI-compatible API often ends in /v1.")


@pytest.mark.parametrize(("parents", "found"), [
    (dict(a=None), ("a", None)),
    (dict(base=None, mine="base"), ("mine", "base")),
    (dict(base=None, mine="base", name="base"), ("name", "base")),
    (dict(base=None, one="base", two="base"), "has several models. Name one by model=: base, one, two."),
    (dict(a=None, b=None), "has several models. Name one by model=: a, b."),
    ({}, r"^http://127.*/v1 has no models\. Start it with the adapter\.$"),
])  # fmt: skip
def test_an_adapter_is_found_by_its_name_or_as_the_only_one(parents, found):
    def find(server):
        if isinstance(found, str):
            return refused(found, server.find, "name")
        return server.find("name")

    result, _ = asked(None, find, **parents)
    assert result == found or isinstance(found, str)


@pytest.mark.parametrize(("prompt", "more", "less"), [
    (TEXT, {"logprobs": 20, "return_tokens_as_token_ids": True}, {"logprobs": 5}),
    (CHAT, {"logprobs": True, "top_logprobs": 20, "return_tokens_as_token_ids": True},
     {"logprobs": True, "top_logprobs": 5}),
])  # fmt: skip
@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_tells_less_than_vllm_is_asked_for_less(prompt, more, less, status):
    def answer(body):
        if "return_tokens_as_token_ids" in body:
            return status, {"error": "logprobs must be at most 5"}
        return told({"a": -1.0})

    found, bodies = asked(answer, lambda server: server.ask("m", prompt))
    key = "prompt" if prompt is TEXT else "messages"
    common = {"model": "m", key: prompt, "max_tokens": 1, "temperature": 0}
    assert found == {"a": -1.0} and [body for _, body in bodies] == [common | more, common | less]
    assert {path for path, _ in bodies} == {"completions" if prompt is TEXT else "chat/completions"}


def test_a_server_that_refuses_both_is_an_error():
    said, bodies = asked(
        lambda body: (400, {"message": "no logprobs"}), lambda server: refused("answers", server.ask, "m", TEXT)
    )
    assert said.endswith("/v1 answers 400: no logprobs.") and len(bodies) == 2


@pytest.mark.parametrize(("logprobs", "found"), [
    ({"top_logprobs": [{"token_id:7": -1.0, "token_id:8": -2}]}, {7: -1.0, 8: -2.0}),
    ({"top_logprobs": [{"cat": -1.0, "7": -2.0}]}, {"cat": -1.0, "7": -2.0}),  # a text of one digit is no number
    ({"top_logprobs": [{"a": None, "b": -9999.0, "c": 0.5, "d": 0.005, "e": -999.0}]}, {"d": 0.005, "e": -999.0}),
    ({"content": [{"token": "a", "logprob": -1.0, "top_logprobs": [
        {"token": "a", "logprob": -1.0}, {"token": "b", "id": 5, "logprob": -2.0}]}]}, {"a": -1.0, 5: -2.0}),
    ({"content": [{"token": "token_id:3", "logprob": -1.0, "top_logprobs": []}]}, {3: -1.0}),
    ({"content": [], "top_logprobs": None}, {}),
    (None, {}),
])  # fmt: skip
def test_log_probabilities_are_read_in_each_form_that_servers_have(logprobs, found):
    answer = 200, {"choices": [{"logprobs": logprobs}]}
    result, _ = asked(lambda body: answer, lambda server: server.ask("m", TEXT))
    assert result == found and all(math.isfinite(value) for value in result.values())
    assert {type(key) for key in result} == {type(key) for key in found}


@pytest.mark.parametrize(("data", "found"), [
    ([{"id": "a"}, {"id": "b", "parent": "a"}, "c"], {"a": None, "b": "a"}),
    ([], {}),
    (None, {}),
])  # fmt: skip
def test_models_are_listed_with_their_bases(data, found):
    engine = Engine(None)
    engine.raw = json.dumps({"data": data}).encode()
    with engine.running() as url:
        assert Server(url).models == found
        engine.raw = b"[]"
        assert Server(url).models == {}
        for engine.status in (404, 405, 501):
            server = Server(f"{url}/")
            assert server.models is None and server.find("x", "mine", "base") == ("mine", "base")
            said = (
                f"^{url}/models is not there. Name the adapter by model=. An OpenAI-compatible API often ends in /v1.$"
            )
            refused(said, server.find, "x")


@pytest.mark.parametrize(("model", "base", "found"), [
    ("one", None, ("one", "base")),
    ("one", "two", ("one", "two")),
    (None, "two", ("name", "two")),
    ("other", None, ("other", "base")),
    ("base", None, ("base", "other")),  # no adapter, and beside one that is none
    ("x", None, "^http://\\S+/v1 has no model 'x'. Name one by model=: base, other, one, two, name.$"),
    (None, "x", "^http://\\S+/v1 has no model 'x'. Name one by model=: base, other, one, two, name.$"),
])  # fmt: skip
def test_what_is_named_is_looked_up(model, base, found):
    def find(server):
        if isinstance(found, str):
            return refused(found, server.find, "name", model, base)
        return server.find("name", model, base)

    parents = {"base": None, "other": None, "one": "base", "two": "base", "name": "base"}
    result, _ = asked(None, find, **parents)
    assert result == found or isinstance(found, str)


def test_of_several_bases_none_is_taken():
    result, _ = asked(None, lambda server: server.find("name", "a"), a=None, b=None, c=None, d="b")
    assert result == ("a", None)


@pytest.mark.parametrize(("answer", "status", "said"), [
    ({"error": {"message": "broken"}}, 500, "broken."),
    ({"error": "broken"}, 500, "broken."),
    ({"message": "broken"}, 418, "broken."),
    ({"detail": "broken"}, 500, "{'detail': 'broken'}."),
    ("broken by secret-key and pass-word", 500, "broken by ... and ...."),
])  # fmt: skip
def test_an_error_is_told_in_the_words_of_the_server_without_secrets(answer, status, said):
    engine = Engine(None)
    engine.status, engine.raw = status, json.dumps(answer).encode()
    with engine.running() as url:
        server = Server(url.replace("//", "//user:pass-word@"), "secret-key")
        assert server.url == url
        for ask in (lambda: server.models, lambda: server.ask("m", TEXT)):
            assert refused("answers", ask) == f"{url} answers {status}: {said}"


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_without_completions_tells_nothing(status):
    found, bodies = asked(lambda body: (status, {}), lambda server: server.ask("m", TEXT))
    assert found == {} and len(bodies) == 1


@pytest.mark.parametrize(
    "answer", [{}, {"choices": []}, {"choices": [{"logprobs": {"top_logprobs": [{"a": "x"}]}}]}, []]
)
def test_an_answer_of_another_form_is_an_error(answer):
    said = r"^http://\S+/v1 answers in another form than the OpenAI API's\.$"
    asked(lambda body: (200, answer), lambda server: refused(said, server.ask, "m", TEXT))


@pytest.mark.parametrize(("status", "after", "waits"), [
    *((status, None, [1, 3, 10, 30]) for status in (429, 502, 503, 504)), (429, "7", [7] * 4), (503, "31", [30] * 4),
    (503, "Fri, 31 Dec 1999 23:59:59 GMT", [1, 3, 10, 30]),
])  # fmt: skip
def test_a_busy_server_is_asked_five_times(status, after, waits, monkeypatch):
    engine, slept = Engine(None), []
    monkeypatch.setattr("lora_init.serving.server.time.sleep", slept.append)
    engine.status, engine.raw = status, b"busy"
    engine.headers = {} if after is None else {"Retry-After": after}
    with engine.running() as url:
        assert refused("answers", Server(url).ask, "m", TEXT) == f"{url} answers {status}: busy."
    assert slept == waits


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_an_error_whatever_comes_with_it(status):
    engine = Engine(None)
    engine.status, engine.raw = status, b"<html>"
    with engine.running() as url:
        said = rf"^{url} refuses the key \({status}\)\. Give another one by api_key=\.$"
        refused(said, lambda: Server(url, "key").models)
    refused("^url='ftp://127.0.0.1/v1' is no address of a server, such as http", Server, "ftp://127.0.0.1/v1")
