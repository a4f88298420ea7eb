"""The commands `lora-init dial` and `replay`: keep what the model knew, after training and while training."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from lora_init.adapters.init_config import DATA, Reading
from lora_init.cli.commands import offered
from lora_init.cli.console import busy, importing, print_next, print_result, refuse_idle, say
from lora_init.cli.options import (
    BaseModel,
    Loading,
    LoadingQuantized,
    MaxLength,
    TrainedAdapter,
    of_adapter,
    read_share,
)
from lora_init.cli.tables import facts
from lora_init.errors import LoraInitError, require, warn
from lora_init.files import is_same_place
from lora_init.loading.examples import MAX_LENGTH

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = """\b
Example:
$ lora-init dial trained held-out.jsonl -o kept
"""
REPLAY_EXAMPLE = """\b
Example:
$ lora-init replay MODEL -o replay.jsonl --n 64 --chat
"""


def dial(
    adapter: TrainedAdapter,
    data: Annotated[
        str | None,
        Argument(help="Examples of its task that it was not trained on; --strength needs none.", show_default=False),
    ] = None,
    *,
    output: Annotated[Path, Option("--output", "-o", help="Directory to write.", show_default=False)],
    keep: Annotated[
        str | None,
        Option(metavar=DATA, help="Text to keep, read by its own columns. Default: the base model writes some."),
    ] = None,
    lose: Annotated[
        str | None, Option(help="Most loss on the task above the best strength's, such as 2% (the default).")
    ] = None,
    keep_within: Annotated[
        float | None, Option(help="Instead of --lose: most rise of the loss on text to keep.")
    ] = None,
    strength: Annotated[float | None, Option(help="Instead of --lose: this strength in all layers.")] = None,
    uniform: Annotated[bool, Option(help="One strength for all layers.")] = False,
    # By default strengths are multiplied into B, which every engine reads.
    alpha_pattern: Annotated[
        bool,
        of_adapter(help="Write strengths to alpha_pattern, which few engines read, and leave B."),
    ] = False,
    base: BaseModel = None,
    reading: Reading,
    # 36 examples are nine batches of four.
    samples: Annotated[int, Option(min=36, help="Examples of the task at most; half as many texts to keep.")] = 192,
    max_length: MaxLength = MAX_LENGTH,
    seed: Annotated[
        int,
        Option(min=0, rich_help_panel="The pass over the data", help="Seed of the sample and of what the base writes."),
    ] = 0,
    loading: LoadingQuantized,
    overwrite: Annotated[bool, Option(help="Replace what an earlier dial wrote.")] = False,
) -> None:
    """Find how strongly each layer of a trained ADAPTER should act, so that the model keeps what it knew."""
    require("matplotlib")  # for the picture, at the end
    _check_options(data, keep, strength)
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.adapters.peft_model import with_adapter
        from lora_init.files import check_free
        from lora_init.keep.dial import KEPT_BATCH, Rule, check_dialable, check_enough, choose_dial
        from lora_init.keep.dialed import OURS, Dial, write_dialed
        from lora_init.loading.batches import load_batches, load_other
        from lora_init.loading.models import open_model
        from lora_init.serving.base import read_base, with_changed_copies
        from lora_init.serving.fit import check_fit
        from lora_init.serving.support import export_options
        from lora_init.serving.trained import read_trained, with_parameters
    rule = Rule(None if lose is None else read_share("--lose", lose), keep_within, strength, uniform)
    # From headers and the adapter's own file first: all that is refused here costs no second.
    check_free(output, overwrite, **OURS)
    trained = read_trained(adapter)
    check_dialable(trained.config, trained.others, str(adapter))  # refuses what no strength can scale, such as a head
    trusted = loading.trust_remote_code
    check_fit(adapter, base, trust_remote_code=trusted).check()
    plain = read_base(base or trained.base, trained, trust_remote_code=trusted)
    trained = with_changed_copies(with_parameters(trained, plain.parameters), plain)
    if trained.adds_nothing:
        raise LoraInitError(f"{adapter}: B A is zero in every layer, so it was never trained. Train it first.")
    # A strength for all layers that was typed is not chosen, so nothing is loaded.
    if data is None and strength is not None:
        dialed = Dial.unmeasured(str(rule), dict.fromkeys(trained.layers, strength))
    else:
        source = open_model(base or trained.base, trust_remote_code=trusted)
        source.check_quantized(loading.quantize)
        # Of a checkpoint that is quantized itself nothing need be said.
        if trained.quantized and not loading.quantize and getattr(source.config, "quantization_config", None) is None:
            how = trained.quantized
            warn(f"{adapter} was made on a base in {how}, and this one is not: --quantize {how}.")
        fit: dict[str, Any] = dict(tokenizer=source.tokenizer, max_length=max_length, seed=seed, seq2seq=source.seq2seq)
        # Examples are dealt into three parts, batch by batch: nine batches at least, so that each part has three.
        batches = load_batches(data, **vars(reading), samples=samples, batch_size=min(samples // 9, 8), **fit)
        check_enough(batches.n, f"DATA {data}")
        kept = None
        if keep is not None:
            # Half as many texts to keep, as the help says.
            size = min(samples // 6, KEPT_BATCH)
            kept = load_other(keep, samples=samples // 2, batch_size=size, **fit)
            check_enough(kept.n, f"--keep {keep}")
        loaded = loading.load(source)
        with busy("measuring strengths"), with_adapter(loaded.model, AdapterDirectory(adapter)) as model:
            writer = source.tokenizer if kept is None else None
            dialed = choose_dial(model, rule, batches, kept, writer, seed, say)
    path = write_dialed(output, trained, plain, dialed, overwrite, alpha_pattern)
    summary = {"written": str(path)} | dialed.summary()
    # As it was written: how it is exported depends on what it holds, such as an alpha_pattern.
    written = AdapterDirectory(output)
    options = export_options(written.config, written.shapes)
    if trained.others:  # a changed weight of the base, which is for PEFT
        options = None
    words = ["lora-init export", shlex.quote(str(output)), options, "-o", shlex.quote(f"{output}-served")]
    export = " ".join(filter(None, words))

    def show(console: Console, _: Any) -> None:
        console.print(facts(summary))
        print_next(console, export)

    print_result({"path": str(path)} | dialed.to_dict(), show, written=True)


def _check_options(data: str | None, keep: str | None, strength: float | None) -> None:
    """Refuse options that need DATA if there is none, and the task's own data as text to keep."""
    if data is None and (strength is None or keep is not None):
        reason = "strengths are chosen on its task" if strength is None else "--keep is measured beside the task"
        raise LoraInitError(f"{reason}: name DATA, or --strength 0.8 alone for that strength in all layers.")
    if data is None:
        idle = [*offered(Reading, LoadingQuantized), "samples", "max_length", "seed"]
        refuse_idle(idle, "without DATA nothing is measured")
    # The dial would then keep the loss on the task, which is what it may give away.
    if keep is not None and data is not None and is_same_place(keep, data):
        raise LoraInitError(f"--keep {keep} is the task's own data. Name text of another kind, or leave --keep away.")


def replay(
    model: Annotated[str, Argument(help="Directory or hub id of the model.", show_default=False)],
    output: Annotated[Path, Option("--output", "-o", help="JSON lines to write.", show_default=False)],
    # `lora_init.replay` has the same defaults; its module imports torch.
    n: Annotated[int, Option("--n", min=1, help="Number of texts.")] = 256,
    length: Annotated[int, Option(min=1, help="Tokens of a text, of an answer at most.")] = 64,
    seed: Annotated[int, Option(min=0, help="Seed of what is drawn.")] = 0,
    chat: Annotated[bool, Option(help="Answers to short questions, by the chat template.")] = False,
    *,
    loading: Loading,
) -> None:
    """Let MODEL write texts at temperature 1, to be mixed into training so that it keeps what it knew."""
    output = output.expanduser()
    # JSON lines are what data are, so nothing tells a file of ours from one of the user's.
    if output.exists():
        raise LoraInitError(f"{output} exists, and is never replaced. Choose another name.")
    if output.suffix not in (".jsonl", ".json"):  # by which commands tell how to read it
        raise LoraInitError(
            f"{output}: texts are written as JSON lines. Name the file so: {output.stem or 'texts'}.jsonl."
        )
    with importing(model):
        from lora_init.files import write_whole
        from lora_init.keep.replay import check_texts
        from lora_init.keep.replay import replay as write
        from lora_init.loading.models import open_model
    source = open_model(model, trust_remote_code=loading.trust_remote_code)
    if source.task_type != "CAUSAL_LM":
        raise LoraInitError(f"{model} is a {source.saved_as or source.auto_class}, which continues no text.")
    check_texts(source.config, source.tokenizer, length, chat)
    loaded = loading.load(source)
    with busy(f"writing {n} texts"):
        rows = write(loaded.model, loaded.tokenizer, n, length, seed, chat, say)
    write_whole(output, "".join(json.dumps(row) + "\n" for row in rows).encode())
    # A row has a `text`, or `messages` for chats: `load_batches` tells by the column.
    result = {"path": str(output.resolve()), "texts": len(rows), "columns": [*rows[0]], "seed": seed}
    shown = {name: str(value) for name, value in result.items()}

    def show(console: Console, _: Any) -> None:
        console.print(facts(shown))
        print_next(console, "train with one of these beside eight examples of the task: docs/dial.md, Replay")

    print_result(result, show, written=True)
