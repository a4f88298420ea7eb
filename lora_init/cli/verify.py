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

from lora_init.adapters.init_config import Reading
from lora_init.cli.console import busy, importing, in_words, print_error, print_next, print_result
from lora_init.cli.options import Loading, MaxLength, one_base
from lora_init.cli.tables import facts
from lora_init.errors import LoraInitError, explain

if TYPE_CHECKING:
    from rich.console import Console

    from lora_init.loading.models import LoadedModel
    from lora_init.serving.server import Server
    from lora_init.serving.verify import Verification

DIFFERS, UNKNOWN = 1, 2  # exit statuses: another thing is served; nothing could be asked, or nothing told
# Asked where no data is given: what these begin with, word by word.
_TEXTS = (
    "Question: Why do leaves turn red in autumn? Answer: Because the tree takes back what made them green.",
    "She was given the medicine twice a day, and after a week the doctor said that she could go home.",
    "Write a function that adds two numbers. def add(a, b): return a + b",
)

# By whether it is a chat.
_HELLO: Mapping[bool, Any] = {True: [{"role": "user", "content": "Hello"}], False: "The"}

EXAMPLE = """\b
Example:
$ lora-init verify served --url http://127.0.0.1:8000/v1 --data chat.jsonl
"""


@contextmanager
def _asking() -> Iterator[None]:
    """Exit with `UNKNOWN` after an error, so that `DIFFERS` means one thing."""
    try:
        yield
    except LoraInitError as error:
        print_error(explain(error, in_words))
        raise SystemExit(UNKNOWN) from None


@_asking()
def verify(
    directories: Annotated[
        list[Path], Argument(help="Directories of adapters of one base, as PEFT loads them.", show_default=False)
    ],
    url: Annotated[str, Option(help="Where the server's API begins: http://127.0.0.1:8000/v1.", show_default=False)],
    model: Annotated[str | None, Option(help="The adapter's name on the server. Default: the directory's.")] = None,
    served_base: Annotated[str | None, Option(help="The base's name there. Default: what the server says.")] = None,
    base: Annotated[str | None, Option(help="Base model here. Default: the one that the adapter names.")] = None,
    data: Annotated[
        str | None, Option(help="Data to take prompts from, as for init. Default: three sentences.")
    ] = None,
    *,
    reading: Reading,
    n: Annotated[int, Option("--n", min=1, help="Prompts to ask: those that the adapter changes most.")] = 32,
    max_length: MaxLength = 512,
    api_key: Annotated[str | None, Option(envvar="LORA_INIT_API_KEY", help="Key of the server.")] = None,
    timeout: Annotated[float, Option(min=0.1, help="Seconds to wait for an answer.")] = 60.0,
    loading: Loading,
) -> None:
    """Check whether a running server serves adapters as trained.

    Exits with 0 if so, with 1 if it serves anything else, with 2 if it could not be asked or nothing can be told.
    """
    from lora_init.serving.server import Server

    _check_there(directories)
    names = _names_of(directories, model)
    server, failures = Server(url, api_key, timeout), _Failures(several=len(names) > 1)
    _ = server.models  # where it does not answer, there is nothing to go on with
    served = _find_served(server, names, model, served_base, failures)
    with importing(data=data):
        from lora_init.loading.models import open_model
        from lora_init.serving.verify import AS_EXPORTED, AS_TRAINED, CANNOT_TELL
    sources = _bases_of(served, base, loading.trust_remote_code, failures)
    if not sources:
        raise LoraInitError(" ".join(dict.fromkeys(failures.texts.values())))
    source, any_name = one_base(sources.values()), served[next(iter(sources))][0]
    chats = _chats(data, reading, 2 * n)
    as_chat = _asks_as_chat(server, any_name, prefers_chat=bool(chats))
    loaded = loading.load(open_model(source, trust_remote_code=loading.trust_remote_code))
    _check_can_answer(loaded, source, as_chat)
    if as_chat and chats:
        prompts = chats
    else:
        prompts = _prompts(data, loaded.tokenizer, as_chat, **vars(reading), samples=2 * n, max_length=max_length)
    if not prompts:
        without = f"{server.url} has no /chat/completions, and " * bool(chats)
        raise LoraInitError(
            f"{without}no text of --data {data} has the same tokens as a prompt. Take other data, or none."
        )
    results: dict[Path, Verification] = {}
    for one in sources:
        with failures.noting(one), busy(f"computing and asking {n} of {len(prompts)} prompts"):
            results[one] = _verify_one(one, loaded, prompts, server, served[one], n)
    verdicts = {verification.verdict for verification in results.values()} - {AS_TRAINED, AS_EXPORTED}
    wrong = [one for one in names if one in failures.texts or results[one].verdict in verdicts]
    look = f"lora-init inspect {shlex.quote(str(wrong[0]))} --base {shlex.quote(source)}" if wrong else ""
    _show(names, results, failures.texts, look or _request(server.url, any_name, as_chat))
    if wrong:
        raise SystemExit(DIFFERS if verdicts - {CANNOT_TELL} else UNKNOWN)


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
    names = {directory: directory.expanduser().resolve().name for directory in directories}
    if model is not None and len(names) > 1:
        raise LoraInitError("--model names one adapter. Several are asked for under the names of their directories.")
    return names


def _find_served(
    server: Server, names: Mapping[Path, str], model: str | None, base: str | None, failures: _Failures
) -> dict[Path, tuple[str, str | None]]:
    """Find under which name each adapter and its base are served; of several each has the name of its directory."""
    served = {}
    for one, name in names.items():
        with failures.noting(one):
            served[one] = server.find(name, name if failures.several else model, base)
    return served


def _bases_of(served: Iterable[Path], base: str | None, trusted: bool, failures: _Failures) -> dict[Path, str]:
    """Name the base of each adapter that fits it; names are not compared where code of others would have to run."""
    from lora_init.adapters.directory import AdapterDirectory
    from lora_init.serving.fit import check_fit

    sources = {}
    for one in served:
        with failures.noting(one):
            if not trusted:
                check_fit(one, base).check()
            sources[one] = base or AdapterDirectory(one).base
    return sources


def _asks_as_chat(server: Server, model: str, prefers_chat: bool) -> bool:
    """Return whether a server gives log-probabilities of chats or of texts, the preferred form first."""
    for as_chat in (prefers_chat, not prefers_chat):
        if server.ask(model, _HELLO[as_chat]):
            return as_chat
    raise LoraInitError(f"{server.url} gives no log-probabilities, neither of texts nor of chats.")


def _check_can_answer(loaded: LoadedModel, source: str, as_chat: bool) -> None:
    """Refuse a base whose log-probabilities of the server's prompts cannot be computed."""
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

    ask = partial(server.ask, names[0])
    ask_base = partial(server.ask, names[1]) if names[1] else None
    return verify(directory, loaded.model, loaded.tokenizer, prompts, ask, ask_base, n=n)


def _prompts(data: str | None, tokenizer: Any, as_chat: bool, **settings: Any) -> list[Any]:
    """Make prompts of the texts of data, or of some sentences without data."""
    texts = dict.fromkeys(_beginnings() if data is None else _texts(data, tokenizer, **settings))
    return [[{"role": "user", "content": text}] if as_chat else text for text in texts]


def _beginnings() -> Iterator[str]:
    for words in map(str.split, _TEXTS):
        yield from (" ".join(words[:i]) for i in range(3, len(words)))


def _request(url: str, model: str, chat: bool) -> str:
    body = json.dumps({"model": model, "messages" if chat else "prompt": _HELLO[chat], "max_tokens": 64})
    return f"curl {url}/{'chat/' * chat}completions --json {shlex.quote(body)}"


def _check_there(directories: list[Path]) -> None:
    """Refuse to ask about nothing; where some are adapters, the others are reported beside them."""
    if not any((one.expanduser() / "adapter_config.json").is_file() for one in directories):
        raise LoraInitError(f"{directories[0]} is no adapter directory: it has no adapter_config.json.")


def _show(
    names: Mapping[Path, str], results: Mapping[Path, Verification], failed: Mapping[Path, str], command: str
) -> None:
    """Print the verdicts, and the command that one runs next."""
    texts = {name: results[one].text if one in results else f"error: {failed[one]}" for one, name in names.items()}
    about = [
        {"directory": str(one)} | (asdict(results[one]) if one in results else {"error": failed[one]}) for one in names
    ]

    def show(console: Console, _: Any) -> None:
        if len(names) == 1:
            console.print(*texts.values(), markup=False)
        else:
            console.print(facts(texts))
        print_next(console, command)

    print_result(about if len(names) > 1 else asdict(*results.values()), show)


def _chats(data: str | None, reading: Reading, most: int) -> list[Any]:
    """Read messages up to the first answer, if that is what the data has."""
    if data is None or reading.template:
        return []
    from lora_init.loading.sources import read_rows

    table = read_rows(data, reading.subset, reading.split).table
    rows = table["messages"][:most] if "messages" in table.column_names else []
    answers = [next((i for i, one in enumerate(row) if one["role"] == "assistant"), 0) for row in rows]
    return [row[:i] for row, i in zip(rows, answers, strict=True) if i]


def _texts(data: str, tokenizer: Any, **settings: Any) -> Iterator[str]:
    """Cut examples where the answer begins, and in its middle, where the text has the same tokens again."""
    from lora_init.loading.batches import load_batches

    for batch in load_batches(data, tokenizer, batch_size=1, **settings):
        ids, labels = (batch[key][0].tolist() for key in ("input_ids", "labels"))
        answer = [i for i, label in enumerate(labels) if label >= 0 and i] or [len(ids)]
        for cut in (ids[: answer[0]], ids[: answer[len(answer) // 2]]):
            text = tokenizer.decode(cut).removeprefix(tokenizer.bos_token or "")
            yield from (one for one in (text, text.lstrip(" ")) if tokenizer(one)["input_ids"] == cut)
