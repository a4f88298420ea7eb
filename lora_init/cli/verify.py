"""The command `lora-init verify`: whether a running server serves an adapter as it was trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_init.adapters.asked import Reading
from lora_init.cli.console import busy, importing, in_words, print_error, print_next, print_result
from lora_init.cli.options import Loading, MaxLength, one_base
from lora_init.cli.tables import facts
from lora_init.errors import LoraInitError, explain

if TYPE_CHECKING:
    from rich.console import Console

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
    names = {directory: directory.expanduser().resolve().name for directory in directories}
    if model is not None and len(names) > 1:
        raise LoraInitError("--model names one adapter. Several are asked for under the names of their directories.")
    server, several = Server(url, api_key, timeout), len(names) > 1
    failed: dict[Path, str] = {}

    @contextmanager
    def noting(directory: Path) -> Iterator[None]:
        """Go on with the others where one of several fails."""
        try:
            yield
        except LoraInitError as error:
            if not several:
                raise
            failed[directory] = explain(error, in_words)

    served: dict[Path, tuple[str, str | None]] = {}
    sources: dict[Path, str] = {}
    _ = server.models  # where it does not answer, there is nothing to go on with
    for one, name in names.items():
        with noting(one):
            served[one] = server.find(name, name if several else model, served_base)
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.loading.models import open_model
        from lora_init.serving.fit import check_fit
        from lora_init.serving.verify import AS_EXPORTED, AS_TRAINED, CANNOT_TELL, verify
    for one in served:
        with noting(one):
            if not loading.trust_remote_code:
                check_fit(one, base).check()
            sources[one] = base or AdapterDirectory(one).base
    if not sources:
        raise LoraInitError(" ".join(dict.fromkeys(failed.values())))
    source, any_name = one_base(sources.values()), served[next(iter(sources))][0]
    chats = [] if data is None or reading.template else _chats(data, reading, 2 * n)
    chat = next((form for form in (bool(chats), not chats) if server.ask(any_name, _HELLO[form])), None)
    if chat is None:
        raise LoraInitError(f"{server.url} gives no log-probabilities, neither of texts nor of chats.")
    loaded = loading.load(open_model(source, trust_remote_code=loading.trust_remote_code))
    if loaded.task_type != "CAUSAL_LM" or (chat and not loaded.tokenizer.chat_template):
        what = f"a {type(loaded.model).__name__}" if loaded.task_type != "CAUSAL_LM" else "without a chat template"
        raise LoraInitError(f"{source!r} is {what}, so this server's log-probabilities cannot be computed here.")
    prompts: list[Any] = chats
    if not (chat and chats):
        settings = dict(vars(reading), samples=2 * n, max_length=max_length)
        texts = _beginnings() if data is None else _texts(data, loaded.tokenizer, **settings)
        prompts = [[{"role": "user", "content": text}] if chat else text for text in dict.fromkeys(texts)]
    if not prompts:
        without = f"{server.url} has no /chat/completions, and " * bool(chats)
        raise LoraInitError(
            f"{without}no text of --data {data} has the same tokens as a prompt. Take other data, or none."
        )
    results: dict[Path, Verification] = {}
    for directory in sources:
        name, base_name = served[directory]
        with noting(directory), busy(f"computing and asking {n} of {len(prompts)} prompts"):
            ask, at_base = partial(server.ask, name), partial(server.ask, base_name) if base_name else None
            results[directory] = verify(directory, loaded.model, loaded.tokenizer, prompts, ask, at_base, n=n)
    verdicts = {found.verdict for found in results.values()} - {AS_TRAINED, AS_EXPORTED}
    wrong = [one for one in names if one in failed or results[one].verdict in verdicts]
    look = f"lora-init inspect {shlex.quote(str(wrong[0]))} --base {shlex.quote(source)}" if wrong else ""
    _show(names, results, failed, look or _request(server.url, any_name, chat))
    if verdicts or failed:
        raise SystemExit(DIFFERS if verdicts - {CANNOT_TELL} else UNKNOWN)


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


def _chats(data: str, reading: Reading, most: int) -> list[Any]:
    """Read messages up to the first answer, if that is what the data has."""
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
