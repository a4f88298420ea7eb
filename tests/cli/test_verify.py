"""The parts of `lora-init verify`: names, prompts and requests; tests/serving/test_verify.py asks a server."""

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import processors

from lora_init.adapters.init_config import Reading
from lora_init.cli import verify
from lora_init.cli.options import Loading
from lora_init.errors import LoraInitError
from tests.commands import tokenizer_of
from tests.conftest import refused
from tests.loading.made import byte_tokenizer


def test_an_adapter_has_the_name_of_its_directory_unless_a_single_one_has_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, other = Path(), Path("b")
    assert verify._names_of([here], "mine") == {here: tmp_path.name}
    assert verify._names_of([here, other], None) == {here: tmp_path.name, other: "b"}
    said = "^--model names one adapter. Several are asked for under the names of their directories.$"
    refused(said, verify._names_of, [here, other], "mine")


@pytest.mark.parametrize(
    ("several", "model", "wanted"), [(False, None, None), (False, "mine", "mine"), (True, None, "a")]
)
def test_a_name_that_was_typed_or_of_several_must_be_served(several, model, wanted):
    asked = []
    server = SimpleNamespace(find=lambda *words: asked.append(words) or ("there", "base"))
    found = verify._find_served(server, {Path("a"): "a"}, model, "base", verify._Failures(several))
    assert found == {Path("a"): ("there", "base")} and asked == [("a", wanted, "base")]


@pytest.mark.parametrize("texts", [["no base."], ["no base.", "no base."], ["one.", "two.", "one."]])
def test_where_no_adapter_can_be_asked_about_each_reason_is_said_once(texts, monkeypatch, capsys):
    paths = [Path(name) for name in "abc"[: len(texts)]]

    def bases(served, base, trusted, failures):
        failures.texts.update(zip(paths, texts, strict=True))
        return {}

    monkeypatch.setattr("lora_init.serving.server.Server", lambda *words: SimpleNamespace(models=[]))
    for name, found in {"_check_adapters": None, "_find_served": {}, "importing": nullcontext()}.items():
        monkeypatch.setattr(verify, name, lambda *words, found=found, **how: found)
    monkeypatch.setattr(verify, "_bases_of", bases)
    with pytest.raises(SystemExit) as ended:
        verify.verify(paths, "u", reading=Reading(), loading=Loading())
    assert ended.value.code == verify.UNKNOWN
    assert capsys.readouterr().err == f"error: {' '.join(dict.fromkeys(texts))}\n"


def test_an_error_of_one_of_several_is_noted_and_of_a_single_one_raised():
    failures = verify._Failures(several=True)
    with failures.noting(Path("a")):
        raise LoraInitError("{n} is wrong.", n=3)
    assert failures.texts == {Path("a"): "n=3 is wrong."}
    with pytest.raises(LoraInitError), verify._Failures(several=False).noting(Path("a")):
        raise LoraInitError("wrong.")
    with pytest.raises(KeyError), failures.noting(Path("b")):
        raise KeyError


@pytest.mark.parametrize(("prefers", "answers", "found"), [
    (True, {True}, True), (True, {False}, False), (True, {True, False}, True), (False, {True, False}, False),
    (False, {True}, True), (False, set(), None),
])  # fmt: skip
def test_the_form_that_is_preferred_is_asked_first(prefers, answers, found):
    asked = []

    def ask(model, prompt):
        asked.append((model, prompt))
        return {1: -1.0} if isinstance(prompt, list) in answers else {}

    server = SimpleNamespace(ask=ask, url="http://here")
    if found is None:
        said = "^http://here gives no log-probabilities, neither of texts nor of chats.$"
        refused(said, verify._asks_as_chat, server, "mine", prefers)
    else:
        assert verify._asks_as_chat(server, "mine", prefers) is found
    hello = {True: [{"role": "user", "content": "Hello"}], False: "The"}
    assert asked == [("mine", hello[prefers]), ("mine", hello[not prefers])][: 1 if found is prefers else 2]


@pytest.mark.parametrize(("task", "template", "as_chat", "what"), [
    ("CAUSAL_LM", None, False, None), ("CAUSAL_LM", "x", True, None),
    ("CAUSAL_LM", None, True, "without a chat template"),
    ("SEQ_CLS", "x", False, "a SimpleNamespace"),
])  # fmt: skip
def test_a_base_must_be_able_to_answer_as_the_server_does(task, template, as_chat, what):
    loaded = SimpleNamespace(task_type=task, tokenizer=SimpleNamespace(chat_template=template), model=SimpleNamespace())
    if what is None:
        verify._check_can_answer(loaded, "base", as_chat)
    else:
        said = f"^'base' is {what}, so this server's log-probabilities cannot be computed here.$"
        refused(said, verify._check_can_answer, loaded, "base", as_chat)


@pytest.mark.parametrize(("base_name", "asks_base"), [("llama", True), (None, False)])
def test_a_server_is_asked_by_the_names_that_it_has(base_name, asks_base, monkeypatch):
    got = {}

    def compared(directory, model, tokenizer, prompts, ask, ask_base, n):
        got.update(locals())
        return "verdict"

    monkeypatch.setattr("lora_init.serving.verify.verify", compared)
    loaded, server = SimpleNamespace(model="model", tokenizer="tokenizer"), SimpleNamespace(ask=lambda *words: words)
    assert verify._verify_one(Path("a"), loaded, ["x"], server, ("mine", base_name), 7) == "verdict"
    assert got["ask"]("x") == ("mine", "x") and (got["ask_base"] is not None) is asks_base
    assert not asks_base or got["ask_base"]("x") == ("llama", "x")
    given = {name: got[name] for name in ("directory", "model", "tokenizer", "prompts", "n")}
    assert given == {"directory": Path("a"), "model": "model", "tokenizer": "tokenizer", "prompts": ["x"], "n": 7}


def test_without_data_the_prompts_are_the_beginnings_of_three_sentences_each_once():
    texts = verify._prompts(None, None, as_chat=False)
    expected = [" ".join(words[:n]) for words in map(str.split, verify._TEXTS) for n in range(3, len(words))]
    assert texts == expected and len({*texts}) == len(texts) and texts[0] == "Question: Why do"
    assert verify._prompts(None, None, as_chat=True) == [[{"role": "user", "content": text}] for text in texts]


@pytest.mark.parametrize(("as_chat", "path", "body"), [
    (False, "completions", {"model": "it's", "prompt": "The", "max_tokens": 64}),
    (True, "chat/completions",
     {"model": "it's", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}),
])  # fmt: skip
def test_the_request_that_is_printed_can_be_pasted(as_chat, path, body):
    *words, data = shlex.split(verify._request("http://here/v1", "it's", as_chat))
    assert words == ["curl", f"http://here/v1/{path}", "--json"] and json.loads(data) == body


def test_of_several_directories_one_must_be_an_adapter(tmp_path):
    (tmp_path / "a").mkdir()
    said = f"^{tmp_path / 'a'} is no adapter directory: it has no adapter_config.json.$"
    refused(said, verify._check_adapters, [tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_config.json").touch()
    verify._check_adapters([tmp_path / "a", tmp_path / "b"])


USER, ANSWER = ({"role": role, "content": "x"} for role in ("user", "assistant"))


@pytest.mark.parametrize(("messages", "before"), [
    ([USER, ANSWER, USER, ANSWER], [USER]), ([USER, USER, ANSWER], [USER, USER]), ([ANSWER, USER], []), ([USER], []),
    ([], []),
])  # fmt: skip
def test_a_prompt_is_what_comes_before_the_first_answer(messages, before):
    assert verify._before_answer(messages) == before


def test_chats_of_the_data_are_the_prompts_unless_a_template_makes_texts_of_them(write_rows):
    chats = write_rows([{"messages": [USER, ANSWER]}, {"messages": [ANSWER]}, {"messages": [USER, USER, ANSWER]}] * 2)
    assert verify._chats(chats, Reading(), 4) == [[USER], [USER, USER], [USER]]
    assert verify._chats(chats, Reading(template="{messages}"), 4) == verify._chats(None, Reading(), 4) == []
    assert verify._chats(write_rows([{"text": "a"}]), Reading(), 4) == []


@pytest.fixture
def write_rows(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def test_a_text_is_cut_where_its_answer_begins_and_in_the_middle_of_it(write_rows):
    rows = write_rows([{"prompt": "ab", "completion": "cdefg"}])
    assert [*verify._texts(rows, byte_tokenizer())] == ["ab", "ab", "abcd", "abcd"]
    assert verify._prompts(rows, byte_tokenizer(), as_chat=False) == ["ab", "abcd"]
    first = write_rows([{"prompt": "ab", "completion": "!defg"}])  # the token of number 0
    assert [*verify._texts(first, byte_tokenizer())] == ["ab", "ab", "ab!d", "ab!d"]
    plain = write_rows([{"text": "abcde"}])
    assert {*verify._texts(plain, byte_tokenizer())} == {"a", "abc"}  # the first token is no answer


def test_a_text_that_has_other_tokens_is_no_prompt(write_rows):
    tokenizer = tokenizer_of(["a", "b", "c"], bos_token="<s>")
    special = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    ends = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = ends
    rows = write_rows([{"prompt": "a b", "completion": " c"}])
    assert [*verify._texts(rows, tokenizer)] == [" a b", "a b", " a b c", "a b c"]  # its first token is added again
    half = write_rows([{"text": "a\u00e9b"}])  # a letter of two bytes, which are two tokens
    assert {*verify._texts(half, byte_tokenizer())} == {"a"}


@pytest.mark.parametrize(("as_chat", "chats", "prompts"), [
    (True, ["a chat"], ["a chat"]), (False, ["a chat"], ["a text"]), (True, [], ["a text"]), (False, [], ["a text"]),
])  # fmt: skip
@pytest.mark.parametrize("n", [None, 5])
def test_twice_as_many_prompts_are_read_as_are_asked_in_the_form_that_the_server_takes(
    n, as_chat, chats, prompts, monkeypatch
):
    asked, a = {}, Path("a")

    def step(place, result):
        monkeypatch.setattr(
            place, lambda *words, **how: asked.update({place.rpartition(".")[2]: (*words, how)}) or result
        )

    loaded = SimpleNamespace(tokenizer="words")
    for name, result in {
        "_check_adapters": None, "_find_served": {a: ("mine", "llama")}, "_bases_of": {a: "base"}, "_chats": chats,
        "_asks_as_chat": as_chat, "_check_can_answer": None, "_prompts": ["a text"], "_show": None,
        "_verify_one": SimpleNamespace(verdict="served as trained"), "importing": nullcontext(),
    }.items():  # fmt: skip
        step(f"lora_init.cli.verify.{name}", result)
    step("lora_init.serving.server.Server", SimpleNamespace(models=[], url="u"))
    step("lora_init.loading.models.open_model", SimpleNamespace(name="base", load=lambda **how: loaded))
    reading, loading = Reading(completion=" {b}"), Loading(trust_remote_code=True)
    more = {} if n is None else {"n": n, "timeout": 2.0, "max_length": 9}
    verify.verify([a], "u", data="d", reading=reading, api_key="key", loading=loading, **more)
    n = n or 32
    assert asked["Server"] == ("u", "key", more.get("timeout", 60.0), {})
    assert asked["_chats"] == ("d", reading, 2 * n, {}) and asked["_asks_as_chat"][-1] == {"prefers_chat": bool(chats)}
    assert asked["open_model"] == ("base", {"trust_remote_code": True}) and asked["_bases_of"][2] is True
    assert asked["_verify_one"][2] == prompts and asked["_verify_one"][-2:] == (n, {})
    if prompts == ["a text"]:
        how = vars(reading) | {"samples": 2 * n, "max_length": more.get("max_length", 512)}
        assert asked["_prompts"] == ("d", "words", as_chat, how)


def test_chats_are_those_of_the_subset_and_split_that_are_named(monkeypatch):
    asked = []
    rows = SimpleNamespace(table=SimpleNamespace(column_names=["text"]))
    monkeypatch.setattr("lora_init.loading.sources.read_rows", lambda *words: asked.append(words) or rows)
    assert verify._chats("d", Reading(subset="main", split="test"), 4) == []
    assert asked == [("d", "main", "test")]
