"""The command `lora-init verify`: whether a running server serves an adapter as it was trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_init.adapters.init_config import DATA, Reading
from lora_init.cli.console import busy, importing, in_words, print_error, print_next, print_result
from lora_init.cli.options import Loading, MaxLength, one_base
from lora_init.cli.tables import facts
from lora_init.errors import LoraInitError, explain
from lora_init.loading.examples import MAX_LENGTH

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.loading.models import LoadedModel
    from lora_init.serving.server import Server
    from lora_init.serving.verify import Verification

# Exit statuses. A script that deploys adapters must tell a server that serves something else from one that is not up.
DIFFERS, UNKNOWN = 1, 2  # another thing is served; nothing could be asked, or nothing told
# Sentences whose beginnings are the prompts where no data is given.
_TEXTS = (
    "Question: Why do leaves turn red in autumn? Answer: Because the tree takes back what made them green.",
    "She was given the medicine twice a day, and after a week the doctor said that she could go home.",
    "Write a function that adds two numbers. def add(a, b): return a + b",
)

# A prompt to try a server with, by whether it is a chat.
_HELLO: Mapping[bool, Any] = {True: [{"role": "user", "content": "Hello"}], False: "The"}

EXAMPLE = """\b
Example:
$ lora-init verify served --url http://127.0.0.1:8000/v1 --data chat.jsonl
"""


@contextmanager
def _unknown_after_errors() -> Iterator[None]:
    """Exit with `UNKNOWN` after an error, so that `DIFFERS` means one thing."""
    try:
        yield
    except LoraInitError as error:
        print_error(explain(error, in_words))
        raise SystemExit(UNKNOWN) from None


@_unknown_after_errors()
def verify(
    directories: Annotated[
        list[Path], Argument(help="Directories of adapters of one base, as PEFT loads them.", show_default=False)
    ],
    url: Annotated[str, Option(help="Where the server's API begins: http://127.0.0.1:8000/v1.", show_default=False)],
    model: Annotated[str | None, Option(help="The adapter's name on the server. Default: the directory's.")] = None,
    served_base: Annotated[str | None, Option(help="The base's name there. Default: what the server says.")] = None,
    base: Annotated[str | None, Option(help="Base model here. Default: the one that the adapter names.")] = None,
    data: Annotated[
        str | None, Option(metavar=DATA, help="Data to take prompts from, as for init. Default: three sentences.")
    ] = None,
    *,
    reading: Reading,
    # Where an adapter changes nothing, an answer cannot tell whether it was applied.
    n: Annotated[int, Option("--n", min=1, help="Prompts to ask: those that the adapter changes most.")] = 32,
    max_length: MaxLength = MAX_LENGTH,
    # A key on the command line stays in the shell's history, hence the variable.
    api_key: Annotated[str | None, Option(envvar="LORA_INIT_API_KEY", help="Key of the server.")] = None,
    timeout: Annotated[float, Option(min=0.1, help="Seconds to wait for an answer.")] = 60.0,
    loading: Loading,
) -> None:
    """Check whether a running server serves adapters as trained.

    Exits with 0 if so, with 1 if it serves anything else, with 2 if it could not be asked or nothing can be told.
    """
    from lora_init.serving.server import Server

    _check_adapters(directories)
    names = _names_of(directories, model)
    server, failures = Server(url, api_key, timeout), _Failures(several=len(names) > 1)
    _ = server.models  # a server that does not answer is found out before torch is imported
    served = _find_served(server, names, model, served_base, failures)
    with importing(data=data):
        from lora_init.loading.models import open_model
        from lora_init.serving.verify import AS_EXPORTED, AS_TRAINED, CANNOT_TELL
    sources = _bases_of(served, base, loading.trust_remote_code, failures)
    if not sources:
        raise LoraInitError(" ".join(dict.fromkeys(failures.texts.values())))  # each reason once
    # One base is loaded for all. Any adapter's name will do to try the server with.
    source, any_name = one_base(sources.values()), served[next(iter(sources))][0]
    # Twice as many prompts as are asked, so that there is a choice: those that the adapter changes most.
    chats = _chats(data, reading, 2 * n)
    as_chat = _asks_as_chat(server, any_name, prefers_chat=bool(chats))
    loaded = loading.load(open_model(source, trust_remote_code=loading.trust_remote_code))
    _check_can_answer(loaded, source, as_chat)
    if as_chat and chats:
        prompts = chats
    else:
        prompts = _prompts(data, loaded.tokenizer, as_chat, **vars(reading), samples=2 * n, max_length=max_length)
    if not prompts:
        text = f"no text of --data {data} has the same tokens as a prompt. Take other data, or none."
        if chats:
            text = f"{server.url} has no /chat/completions, and {text}"
        raise LoraInitError(text)
    results: dict[Path, Verification] = {}
    for directory in sources:
        with failures.noting(directory), busy(f"computing and asking {n} of {len(prompts)} prompts"):
            results[directory] = _verify_one(directory, loaded, prompts, server, served[directory], n)
    # What an export lost is no fault of the server.
    bad_verdicts = {verification.verdict for verification in results.values()} - {AS_TRAINED, AS_EXPORTED}
    # Adapters that could not be asked about, or in whose place something else is served.
    wrong = []
    for directory in names:
        if directory in failures.texts or results[directory].verdict in bad_verdicts:
            wrong.append(directory)
    if wrong:
        next_command = f"lora-init inspect {shlex.quote(str(wrong[0]))} --base {shlex.quote(source)}"
    else:
        next_command = _request(server.url, any_name, as_chat)
    _show(names, results, failures.texts, next_command)
    # What certainly differs outweighs what could not be told.
    if bad_verdicts - {CANNOT_TELL}:
        raise SystemExit(DIFFERS)
    if wrong:
        raise SystemExit(UNKNOWN)


# A server that serves ten adapters is not asked ten times by hand: what is wrong with one must not hide the others.
@dataclass(frozen=True)
class _Failures:
    """What went wrong with each of several adapters, while the others go on; with a single one nothing does."""

    several: bool
    texts: dict[Path, str] = field(default_factory=dict)

    @contextmanager
    def noting(self, directory: Path) -> Iterator[None]:
        """Note an error of the block for an adapter, or raise it if there is no other adapter."""
        try:
            yield
        except LoraInitError as error:
            if not self.several:
                raise
            self.texts[directory] = explain(error, in_words)


def _names_of(directories: Iterable[Path], model: str | None) -> dict[Path, str]:
    """Name each adapter after its directory; refuse the `model` that only a single one can be."""
    # The commands that `export` writes serve an adapter under the name of its directory.
    names = {directory: directory.expanduser().resolve().name for directory in directories}
    if model is not None and len(names) > 1:
        raise LoraInitError("--model names one adapter. Several are asked for under the names of their directories.")
    return names


def _find_served(
    server: Server, names: Mapping[Path, str], model: str | None, base: str | None, failures: _Failures
) -> dict[Path, tuple[str, str | None]]:
    """Find under which name each adapter and its base are served; of several each has the name of its directory."""
    served = {}
    for directory, name in names.items():
        # A name that was typed must be there. For a single adapter without one the server may have another name.
        wanted = name if failures.several else model
        with failures.noting(directory):
            served[directory] = server.find(name, wanted, base)
    return served


def _bases_of(served: Iterable[Path], base: str | None, trusted: bool, failures: _Failures) -> dict[Path, str]:
    """Name the base of each adapter that fits it."""
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.serving.fit import check_fit

    sources = {}
    for directory in served:
        with failures.noting(directory):
            check_fit(directory, base, trust_remote_code=trusted).check()
            sources[directory] = base or AdapterDirectory(directory).base
    return sources


def _asks_as_chat(server: Server, model: str, prefers_chat: bool) -> bool:
    """Return whether a server gives log-probabilities of chats or of texts, the preferred form first."""
    for as_chat in (prefers_chat, not prefers_chat):
        # The result is empty if the answer has no log-probabilities, or if the server has no such address.
        if server.ask(model, _HELLO[as_chat]):
            return as_chat
    raise LoraInitError(f"{server.url} gives no log-probabilities, neither of texts nor of chats.")


def _check_can_answer(loaded: LoadedModel, source: str, as_chat: bool) -> None:
    """Refuse a base whose log-probabilities of the server's prompts cannot be computed."""
    # Servers answer with the next token, so only models that predict one can be compared.
    if loaded.task_type != "CAUSAL_LM":
        what = f"a {type(loaded.model).__name__}"
    elif as_chat and not loaded.tokenizer.chat_template:
        what = "without a chat template"
    else:
        return
    raise LoraInitError(f"{source!r} is {what}, so this server's log-probabilities cannot be computed here.")


def _verify_one(
    directory: Path, loaded: LoadedModel, prompts: list[Any], server: Server, names: tuple[str, str | None], n: int
) -> Verification:
    """Compare what an adapter computes with what the server answers under the names of the adapter and its base."""
    from lora_init.serving.verify import verify

    adapter_name, base_name = names
    ask = partial(server.ask, adapter_name)
    ask_base = None
    if base_name:  # a server may have adapters alone
        ask_base = partial(server.ask, base_name)
    return verify(directory, loaded.model, loaded.tokenizer, prompts, ask, ask_base, n=n)


def _prompts(data: str | None, tokenizer: Any, as_chat: bool, **settings: Any) -> list[Any]:
    """Make prompts of the texts of data, or of some sentences without data."""
    beginnings = _beginnings() if data is None else _texts(data, tokenizer, **settings)
    texts = list(dict.fromkeys(beginnings))  # each once: examples of a template begin alike
    if as_chat:
        return [[{"role": "user", "content": text}] for text in texts]
    return texts


def _beginnings() -> Iterator[str]:
    """Yield the beginnings of the sentences, from three words to all but one."""
    for sentence in _TEXTS:
        words = sentence.split()
        for n_words in range(3, len(words)):
            yield " ".join(words[:n_words])


def _request(url: str, model: str, as_chat: bool) -> str:
    """Write the command that asks the server something, for a user who wants to see it answer."""
    address, key = ("chat/completions", "messages") if as_chat else ("completions", "prompt")
    body = json.dumps({"model": model, key: _HELLO[as_chat], "max_tokens": 64})
    return f"curl {url}/{address} --json {shlex.quote(body)}"


def _check_adapters(directories: list[Path]) -> None:
    """Refuse to ask about nothing; where some are adapters, the others are reported beside them."""
    if not any((directory.expanduser() / "adapter_config.json").is_file() for directory in directories):
        raise LoraInitError(f"{directories[0]} is no adapter directory: it has no adapter_config.json.")


def _show(
    names: Mapping[Path, str], results: Mapping[Path, Verification], failed: Mapping[Path, str], command: str
) -> None:
    """Print the verdicts, and the command that one runs next."""
    texts, entries = {}, []
    for directory, name in names.items():
        if directory in results:
            texts[name] = results[directory].text
            entries.append({"directory": str(directory)} | asdict(results[directory]))
        else:
            texts[name] = f"error: {failed[directory]}"
            entries.append({"directory": str(directory), "error": failed[directory]})

    def show(console: Console, _: Any) -> None:
        if len(names) == 1:
            console.print(*texts.values(), markup=False)
        else:
            console.print(facts(texts))
        print_next(console, command)

    # The error of a single adapter was raised, so there is one result then.
    content: Any = entries if len(names) > 1 else asdict(*results.values())
    print_result(content, show)


def _chats(data: str | None, reading: Reading, most: int) -> list[Any]:
    """Read messages up to the first answer, if that is what the data has."""
    # A template makes texts of the data, whatever columns they have.
    if data is None or reading.template:
        return []
    from lora_init.loading.sources import read_rows

    table = read_rows(data, reading.subset, reading.split).table
    if "messages" not in table.column_names:
        return []
    chats = []
    for messages in table["messages"][:most]:
        before = _before_answer(messages)
        if before:  # empty for a chat that begins with the answer, or has none
            chats.append(before)
    return chats


def _before_answer(messages: Any) -> Any:
    """Return the messages before the first of an assistant; none if there is no such message."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            return messages[:i]
    return messages[:0]


def _texts(data: str, tokenizer: Any, **settings: Any) -> Iterator[str]:
    """Cut examples where the answer begins, and in its middle, where the text has the same tokens again."""
    from lora_init.loading.batches import load_batches

    # A server takes a text and makes tokens of it by itself, while a cut is made between tokens. Only where both have
    # the same tokens do the answers here and there belong together.
    for batch in load_batches(data, tokenizer, batch_size=1, **settings):
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()  # 1 x tokens -> tokens
        # The first token is no answer: nothing would be left to ask. Without labels the whole text is the prompt.
        answer = [i for i, label in enumerate(labels) if label >= 0 and i] or [len(ids)]
        for cut in (ids[: answer[0]], ids[: answer[len(answer) // 2]]):
            text = tokenizer.decode(cut).removeprefix(tokenizer.bos_token or "")  # which the tokenizer adds again
            # With a space at the beginning and without, which some tokenizers add by themselves.
            for candidate in (text, text.lstrip(" ")):
                if tokenizer(candidate)["input_ids"] == cut:
                    yield candidate
