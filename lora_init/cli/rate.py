"""The command `lora-init rate`: the learning rate of any adapter that was not trained yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from lora_init.adapters.init_config import Reading
from lora_init.cli.console import busy, importing, print_next, print_result
from lora_init.cli.options import BaseModel, Length, Loading, MaxLength
from lora_init.errors import LoraInitError
from lora_init.loading.examples import MAX_LENGTH

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = """\b
Example:
$ lora-init rate adapter sums.jsonl --base MODEL --steps 300
"""


def rate(
    adapter: Annotated[Path, Argument(help="Directory of a LoRA adapter before training.", show_default=False)],
    data: Annotated[str, Argument(help="What it will be trained on, as for init.", show_default=False)],
    base: BaseModel = None,
    *,
    length: Length,
    reading: Reading,
    max_length: MaxLength = MAX_LENGTH,
    loading: Loading,
) -> None:
    """Print the learning rate of an ADAPTER from a few forward passes, whoever made it."""
    with importing(data=data):
        from lora_init.adapters.directory import AdapterDirectory
        from lora_init.adapters.measured_rate import learning_rate
        from lora_init.adapters.peft_model import with_adapter
        from lora_init.layers.targets import HEADS
        from lora_init.loading.batches import load_batches
        from lora_init.loading.models import open_model
        from lora_init.serving.fit import check_fit
    directory = AdapterDirectory(adapter)
    base = base or directory.base
    if not base:
        raise LoraInitError(f"{adapter} does not name its base model. Pass --base.")
    check_fit(adapter, base, trust_remote_code=loading.trust_remote_code).check()
    # The rule is of B = 0, where the first steps change B alone. A start with another B is measured when it is made.
    if not directory.has_zeros:
        remedy = "`lora-init inspect` has its rate." if directory.is_start else "Name the adapter before its training."
        raise LoraInitError(f"{adapter}: B is not zero, and the rule is for adapters before training. {remedy}")
    # A classifier's base may be a language model without the head; for other adapters the checkpoint's class is right.
    task_type = directory.config.get("task_type")
    classifies = task_type in HEADS
    source = open_model(base, task_type=task_type if classifies else None, trust_remote_code=loading.trust_remote_code)
    # A few examples do: the rule takes a mean over their tokens and a geometric mean over the layers.
    batches = load_batches(
        data, source.tokenizer, **vars(reading), samples=64, max_length=max_length, seq2seq=source.seq2seq
    )
    planned = length.plan(batches.settings.get("rows"))  # refuses what contradicts, before the weights are read
    loaded = loading.load(source, n_labels=directory.n_labels)
    with busy("measuring"), with_adapter(loaded.model, directory) as model:
        rule = learning_rate(
            model, batches, steps=length.steps, epochs=length.epochs, train_batch_size=planned.batch_size,
            freeze_a=bool(directory.origin.get("freeze_a")),
        )  # fmt: skip
    first, last = rule.layers[0], rule.layers[-1]  # in the order of how far a step moves their outputs
    result = {
        "learning_rate": rule.rate, "range": rule.range, "steps": rule.steps, "epochs": rule.length.epochs,
        "moves_most": first, "moves_least": last, "left_out": [*rule.left_out],
    }  # fmt: skip
    text = f"{rule}\nMoves most: {first}; least: {last}."
    if rule.left_out:
        text += f"\n{len(rule.left_out)} layers say nothing, such as {rule.left_out[0]}."

    def show(console: Console, _: Any) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        dial = "" if classifies else "; then lora-init dial TRAINED HELD-OUT-DATA -o kept"  # which takes no classifier
        print_next(console, f"train with it{dial}")

    print_result(result, show)
