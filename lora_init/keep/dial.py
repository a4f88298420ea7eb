"""How strongly each layer of a trained adapter acts: measured on its task and on text that the model should keep."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_init.adapters.directory import carried
from lora_init.adapters.peft_model import adapter_layers, adds_nothing
from lora_init.collection.losses import token_losses
from lora_init.errors import LoraInitError, check_number, check_switches, warn
from lora_init.keep.dialed import BEST, UNIFORM, Change, Dial, Point, signed
from lora_init.keep.replay import replayed
from lora_init.layers.masks import IGNORED, shifts_labels
from lora_init.layers.running import (
    call_model,
    check_batches,
    check_labels,
    evaluating,
    naming_strange_tokens,
    on_device_of,
    restoring,
)
from lora_init.layers.wrappers import without_adapter
from lora_init.loading.batches import as_batches, count_examples, group_by_length
from lora_init.packages import check_takes
from lora_init.progress import Progress, Say
from lora_init.serving.trained import OTHER_UPDATES
from lora_init.starts.starts import changes_base

if TYPE_CHECKING:
    from peft import PeftModel

# How strengths are chosen. One strength for all layers is measured first, at the values of CURVE. Then a strength for
# each layer is fitted by gradient on the loss of the task plus a weight times the loss on text to keep, with a weight
# that rises until the user's rule breaks: a single weight stopped short where an adapter forgets little, and left half
# of the forgetting for a third of the loss that was allowed. The rule chooses among all points that were measured.

STRONGEST = 1.5  # of one layer, in a fit
_WEAKEST = 1e-3  # of all layers, as requested: far below it B is zero in types of 16 bits
_START, _STEPS, _RATE = 0.7, 24, 0.06  # of the first fit: strength of each layer, steps of Adam, learning rate
CURVE = (0.0, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2)  # 0 is the base, 1 is as trained
# Weights of the text to keep that are tried while the rule holds, each from the strengths fitted with the last one.
_WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_MORE_STEPS, _LOWER_RATE = 16, 0.05  # of the fits after the first, which begin near their end
_GAIN = 0.01  # share of the rise as trained that a weight must take off for the next one to be tried
_MOST_BATCHES = 48  # of a loader, which may have no end
_LEAST = 6  # examples, and texts to keep
_SHARED = 0.1  # share of the text to keep at which examples of the task among it are refused
KEPT_BATCH = 4  # texts to keep in a batch
_BACKWARD = 3  # forward passes that a step of a fit takes as long as
LOSE = 0.02  # the default rule
_PLAIN = {"input_ids", "attention_mask", "labels"}


def _check_limit(name: str, value: Any) -> None:
    """Refuse a value of a rule that is out of range."""
    if name == "strength":
        check_number(name, value, _WEAKEST, hint=" 0 is the base.")
    else:
        check_number(name, value, 0)
    # Above 1 a user probably meant per cent.
    if name == "lose" and value > 1.0:
        raise LoraInitError(f"{{lose}} is {value:.0%} more loss. Write 2 % as 0.02.", lose=value)


@dataclass(frozen=True)
class Rule:
    """What a user asks of the dial: one of the first three. Refuses several, and what is out of range."""

    lose: float | None = None
    keep_within: float | None = None
    strength: float | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None and name != "uniform"}
        if len(given) > 1:
            both = " and ".join(f"{{{name}}}" for name in given)
            raise LoraInitError(f"{both} are both given. One of them says what is chosen.", **dict.fromkeys(given, ...))
        for name, value in given.items():
            _check_limit(name, value)
            if name == "strength" and value > STRONGEST:
                text = f"{{strength}}: above {STRONGEST:g} the dial itself chooses none; 1 is as trained."
                warn(text, strength=value)
        check_switches(uniform=self.uniform)
        if self.uniform and self.strength is not None:
            raise LoraInitError("{strength} is one for all layers already. Leave {uniform} out.", **vars(self))
        if not given:
            # Not a default of the field: `lose` beside another rule would then look as if the user had given both.
            object.__setattr__(self, "lose", LOSE)

    def __str__(self) -> str:
        if self.strength is not None:
            return f"strength {self.strength:g}, as asked"
        if self.keep_within is not None:
            return f"the best task with text to keep at most {self.keep_within:g} above the base's loss"
        return f"the least forgetting at most {100 * (self.lose or 0):g} % above the task's loss at the best strength"

    def limit(self, curve: Sequence[Point]) -> float:
        """Return the highest loss on the task that may be chosen."""
        if self.lose is None:
            return math.inf
        # Above the best strength, not above strength 1: an adapter that was trained too long is not at its best there.
        return min(point.task for point in curve) * (1.0 + self.lose)

    def choose(self, limit: float, *groups: Sequence[Point]) -> Point:
        """Choose from the first group that has a point within the rule; without one, what forgets least of the last.

        Among several points within the rule the other loss decides: the task's under `keep_within`, or else the one on
        text to keep.
        """
        for points in groups:
            if self.keep_within is not None:
                within = [point for point in points if point.rise <= self.keep_within]
                best = min(within, key=_task_loss, default=None)
            else:
                within = [point for point in points if point.task <= limit]
                best = min(within, key=_rise, default=None)
            if best is not None:
                return best
        return min(groups[-1], key=_rise)

    def missed(self, chosen: Point) -> list[str]:
        """Return a note if no point did what was asked, so that the one was chosen that forgets least."""
        if self.keep_within is not None and chosen.rise > self.keep_within:
            return ["no strength keeps what was asked for; the one that forgets least was taken"]
        return []

    def broken(self, task: Mapping[str, Change], keep: Mapping[str, Change]) -> list[str]:
        """Return a note if the limit, which held on the examples to choose by, is broken on the report's examples."""
        measured = ""  # rounded as it is said: what is beyond a limit by less is not
        if self.lose is not None:
            lost = round(task["chosen"].loss / task[BEST].loss - 1.0, 4)
            if lost > self.lose:
                measured = f"{100 * lost:.3g} % above the task's loss at the best strength, and {100 * self.lose:g} %"
        elif self.keep_within is not None:
            rise = round(keep["chosen"].change, 3)
            if rise > self.keep_within:
                measured = f"text to keep {rise:.3f} above the base's loss, and {self.keep_within:g}"
        if not measured:
            return []
        return [f"measured is {measured} was the limit. Dial on more examples, or set a lower limit"]


def _task_loss(point: Point) -> float:
    return point.task


def _rise(point: Point) -> float:
    return point.rise


def check_dialable(config: Mapping[str, Any], whole: Iterable[str], where: str) -> None:
    """Refuse an adapter, called `where`, that is more than a factor times A and B: `whole` names its other tensors."""
    without = ("use_dora", "lora_bias", "ensure_weight_tying", *OTHER_UPDATES)
    other = next((key for key in without if config.get(key)), None)
    if other is not None:
        raise LoraInitError(f"{where} has {other}, which has no strength that could be scaled alone. Use plain LoRA.")
    trained = next(iter(whole), None)
    # PEFT trains the head of these tasks whole, beside the adapter.
    if trained is not None or config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        raise LoraInitError(
            f"{where} holds {trained or 'a head'}, trained whole, which has no strength: the rest would not fit it at "
            "another. Dial adapters of A and B alone, of language models."
        )
    origin = carried(config)
    if origin.get("rank") not in (None, config.get("r")):
        origin = {}  # another rank than its start had: the origin does not describe these tensors
    method = config.get("init_lora_weights")
    if not isinstance(method, str):
        method = str(origin.get("method") or "")
    if changes_base(method) or origin.get("corrects_base") or origin.get("error_size"):
        raise LoraInitError(
            f"{where} began as {method}, which changes or corrects the base: at strength 0 that is not your model. "
            "Convert it by `lora-init export --start DIRECTORY`, naming the adapter before training, and dial that."
        )


def dial(
    model: PeftModel,
    batches: Any = None,
    keep: Any = None,
    *,
    tokenizer: Any = None,
    lose: float | None = None,
    keep_within: float | None = None,
    strength: float | None = None,
    uniform: bool = False,
    seed: int = 0,
    say: Say = lambda text: None,
) -> Dial:
    """Choose how strongly each layer of a trained adapter acts, and multiply it into B, in place.

    A third of the examples, dealt at random, is for fitting a strength for each layer by gradient, a third for choosing
    between these and one strength for all layers, a third for the report; with `uniform` the first two thirds are for
    choosing. Cost: about 60 forward passes over a third of the examples, 20 with `uniform`.

    Args:
        model: A PEFT model of a language model, trained by LoRA or rsLoRA.
        batches: Of the task, as `collect` takes them, with labels; at least six examples. A list is read whole, of a
            loader 48 batches. Not needed with `strength`, which is then not measured; if given, all of it is for the
            report.
        keep: Batches of text that the model should still predict as well. Default: the base writes it itself, half as
            many texts as there are examples of the task.
        tokenizer: Needed only for that.
        lose: Share by which the task's loss may exceed that of the best strength; then the least forgetting. The
            default, 0.02.
        keep_within: Instead of `lose`: most rise of the loss on text to keep; then the best task.
        strength: Instead of `lose`: this one in all layers.
        uniform: Choose one strength for all layers.
        seed: Of how examples are dealt, and of the text that the base writes.
        say: Receives lines about the progress.

    Returns:
        The strengths and losses.

    Raises:
        LoraInitError: The adapter was never trained, is disabled, one of several that are active or of a kind whose
            strength cannot be scaled, examples are too few or have no labels, both are the same, or arguments are out
            of range.
    """
    from peft import get_peft_model_state_dict

    rule = Rule(lose, keep_within, strength, uniform)
    if not hasattr(model, "peft_config"):
        raise LoraInitError(f"dial() takes a PEFT model with one active adapter and got {type(model).__name__}.")
    active = model.active_adapters
    if len(active) != 1:
        raise LoraInitError(f"the adapters {', '.join(active)} are active. Call set_adapter() with the one to dial.")
    name, layers = _active(model)
    where = f"adapter {name!r}"
    if any(layer.disable_adapters for layer in layers.values()):
        raise LoraInitError(f"{where} is disabled, so what would be measured is the base. Enable it first.")
    _check_scalable(layers, where)
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_dialable(model.peft_config[name].to_dict(), (key for key in tensors if ".lora_" not in key), where)
    if all(adds_nothing(layer, name) for layer in layers.values()):
        raise LoraInitError(f"{where}: B A is zero in every layer, so it was never trained. Train it first.")
    if batches is None and strength is not None:
        if keep is not None or tokenizer is not None:
            raise LoraInitError(
                "{strength} without batches measures nothing: leave {keep} and {tokenizer} out.",
                strength=strength,
                keep=...,
                tokenizer=...,
            )
        dialed = Dial.unmeasured(str(rule), dict.fromkeys(layers, strength))
    else:
        dialed = choose_dial(model, rule, batches, keep, tokenizer, seed, say)
    # Into B and not into `scaling`, which is not saved: PEFT computes it anew from the configuration.
    for at, b in _outputs(model).items():
        b.data *= dialed.strengths[at]
    return dialed


def _check_scalable(layers: Mapping[str, Any], where: str) -> None:
    """Refuse layers whose B cannot be multiplied by a strength."""
    for name, layer in layers.items():
        # Then the weight of the base holds the update, whatever the scaling is.
        if layer.merged:
            raise LoraInitError(f"{where} is merged into the base. Call unmerge_adapter() first.")
        if any(weight.is_meta for key, weight in layer.named_parameters() if "lora_" in key):
            raise LoraInitError(f"{where} is offloaded, at least in part. Load the model in memory to scale its B.")
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            raise LoraInitError(
                f"{where} adapts {name!r}, an nn.MultiheadAttention: two adapters, one inside the other."
            )


def choose_dial(model: PeftModel, rule: Rule, batches: Any, keep: Any, tokenizer: Any, seed: int, say: Say) -> Dial:
    """Choose as `dial` does, of an adapter that may be dialed, and leave it as it is."""
    check_number("seed", seed, -(2**63), whole=True)
    check_takes(say, "say=", "text")
    seed = int(seed)  # `random` takes no number of numpy
    shifted = shifts_labels(model)
    task = _read(as_batches(batches, model, seed), "batches", shifted)
    n = count_examples(task)
    if keep is None:
        if tokenizer is None:
            raise LoraInitError(
                "dial() needs {keep}, batches of text to keep, or tokenizer=: then the base writes it.", keep=...
            )
        n_texts = max(n // 2, _LEAST)
        # At least three batches, since the texts are dealt to three thirds.
        written = replayed(model, tokenizer, n_texts, seed, min(n_texts // 3, KEPT_BATCH), say)
        kept = _read(as_batches(written, model, seed), "keep", shifted)
    else:
        if tokenizer is not None:
            raise LoraInitError("{keep} is text already: leave tokenizer= out, or {keep}.", keep=...)
        kept = _read(as_batches(keep, model, seed), "keep", shifted)
        texts = _sequences(kept)
        share = len(texts & _sequences(task)) / len(texts)
        if share >= _SHARED:
            raise LoraInitError(f"keep: {share:.0%} of its texts are examples of the task. Pass text of another kind.")
    task_parts = _thirds(task, rule, seed, shifted)
    kept_parts = _thirds(kept, rule, seed, shifted)
    with naming_strange_tokens("a batch"):
        dialed = _search(model, task_parts, kept_parts, rule, say)
    return replace(dialed, read=(n, count_examples(kept)))


class _Thirds(NamedTuple):
    """Batches, by what they are for: no batch that chooses is also in the report."""

    fit: list[Any]
    choose: list[Any]
    report: list[Any]


def _read(batches: Iterable[Any], what: str, shifted: bool) -> list[Any]:
    """Read the batches that have labels: all of a list, but only the first batches of a loader."""
    if batches is None:
        raise LoraInitError("dial() needs batches of the task, unless {strength} says what to do.", strength=...)
    check_batches(batches, "dial()")
    if not isinstance(batches, Sequence):
        batches = islice(batches, _MOST_BATCHES)
    labelled, n_examples = [], 0
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise LoraInitError(f"{what}: a batch is a {type(batch).__name__}, expected a mapping with input_ids.")
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise LoraInitError(f"{what}: a batch has no labels [batch, length], as a language model takes them.")
        if shifted:
            check_labels(batch.get("input_ids"), labels)
        if _has_label(batch, shifted):
            labelled.append(batch)
            n_examples += len(_examples(batch, shifted))
    check_enough(n_examples, what)
    return labelled


def check_enough(n: int, what: str) -> None:
    """Refuse too few examples to deal out."""
    if n < _LEAST:
        raise LoraInitError(f"{what}: {n} example{'s' * (n != 1)}, and at least {_LEAST} are needed. Take 36 or more.")


def _thirds(batches: list[Any], rule: Rule, seed: int, shifted: bool) -> _Thirds:
    """Split batches into those to fit, to choose and to report by.

    If one strength for all layers is chosen, nothing is fitted, and that third helps to choose. If the strength is
    given, nothing is chosen either, and all batches are for the report.

    Examples are dealt at random: a batch holds some of similar length, and loss and forgetting depend on the length.
    """
    if rule.strength is not None:
        return _Thirds([], batches, batches)
    examples = []
    for batch in batches:
        examples += _examples(batch, shifted)
    random.Random(seed).shuffle(examples)
    size = max(len(batch["labels"]) for batch in batches)  # which fits the memory, as the caller's batches did
    fit = list(_batched(examples[0::3], size, seed))
    choose = list(_batched(examples[1::3], size, seed))
    report = list(_batched(examples[2::3], size, seed))
    if rule.uniform:
        choose = fit + choose
    return _Thirds(fit, choose, report)


def _has_label(batch: Any, shifted: bool) -> bool:
    """Return whether a token of a batch is predicted; a model that shifts labels never predicts the first one."""
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    return bool((labels != IGNORED).any())


def _examples(batch: Any, shifted: bool) -> list[Any]:
    """Split a batch into examples that have labels; one that is not made of rows stays whole."""
    if not is_of_rows(batch):
        return [batch]
    examples = []
    for i in range(len(batch["labels"])):
        # A slice and not an index, so that an example is a batch of one: [batch, ...] -> [1, ...].
        row = {name: value[i : i + 1] for name, value in batch.items()}
        if _has_label(row, shifted):
            examples.append(row)
    return examples


def is_of_rows(batch: Any) -> bool:
    """Return whether each tensor of a batch has a row for each example, so that it can be dealt out by examples."""
    n = len(batch["labels"])
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        # Positions of text, height and width, [3, batch, length], are no rows, even of three examples.
        return False
    for value in batch.values():
        has_rows = isinstance(value, Tensor) and value.dim() > 1 and len(value) == n
        if not has_rows:
            return False
    return True


def _form_of(example: Any) -> str:
    """Return what two examples must have in common to stand in one batch."""
    if not is_of_rows(example):
        return str(id(example))  # it stands alone
    # With a mask the length, axis 1, may differ: padding is then masked. Without one it must be the same.
    first_axis = 2 if "attention_mask" in example else 1
    return str([(name, *value.shape[first_axis:]) for name, value in example.items()])


def _batched(examples: Iterable[Any], size: int, seed: int) -> Iterator[Any]:
    """Put examples of one form into batches, padded on the right; without a mask for that they also have one length."""
    groups = defaultdict(list)
    for example in examples:
        groups[_form_of(example)].append(example)
    for group in groups.values():
        for rows in group_by_length(group, size, seed, lambda row: int(row["labels"].shape[1])):
            if len(rows) == 1:
                yield rows[0]  # it may not consist of tensors alone
            else:
                yield _pad(rows)


def _pad(rows: list[Any]) -> dict[str, Tensor]:
    """Pad batches of one example on the right and put them together: rows x [1, length, ...] -> [rows, length, ...]."""
    batch = {}
    for name in rows[0]:
        padding = IGNORED if name == "labels" else 0
        batch[name] = pad_sequence([row[name][0] for row in rows], True, padding)
    return batch


def _sequences(batches: list[Any]) -> set[tuple[int, ...]]:
    """Collect the tokens of all examples, without padding, and their labels."""
    sequences = set()
    for batch in batches:
        # Without tokens, as where embeddings are passed, the labels stand for them.
        ids = batch.get("input_ids", batch["labels"])
        used = batch.get("attention_mask", torch.ones_like(ids)).expand_as(ids) != 0
        for row, is_used, labels in zip(ids, used, batch["labels"], strict=True):
            sequences.add((*row[is_used].tolist(), *labels[labels != IGNORED].tolist()))
    return sequences


def _search(model: PeftModel, task: _Thirds, kept: _Thirds, rule: Rule, say: Say) -> Dial:
    """Measure one strength for all layers, fit one for each layer if the rule allows it, choose, and report."""
    at_zero = dict.fromkeys(_outputs(model), 0.0)
    steps = list(CURVE[1:])
    if rule.strength is not None:
        steps = sorted({rule.strength, 1.0})
    fits_layers = rule.strength is None and not rule.uniform
    # Time is counted in passes over the examples to choose by. Of the fits this is the most: they end when the rule
    # breaks. Each is measured twice. The 4 stands for the readings of the report.
    fit_passes = _BACKWARD * _STEPS / max(len(task.fit), 1)
    passes = 1 + len(steps) + 4.0
    if fits_layers:
        passes += len(_WEIGHTS) * (2 + fit_passes)
    progress = Progress(passes, say)
    base_task, base_kept = map(_ratio, _losses_at(model, at_zero, task.choose, kept.choose))
    progress.ended(f"strength 0: task {base_task:.3f}")

    def measure(layers: Mapping[str, float], weight: float | None) -> Point:
        on_task, on_kept = map(_ratio, _losses_at(model, layers, task.choose, kept.choose))
        strength = sum(layers.values()) / len(layers)
        how, spent = f"strength {strength:.3g}", 1.0
        if weight is not None:
            how += f" on average, fitted with weight {weight:g}"
            spent += fit_passes / 2  # each fit is measured twice
        progress.ended(f"{how}: task {on_task:.3f}, text to keep {signed(on_kept - base_kept, 3)}", spent)
        return Point(strength, on_task, on_kept - base_kept, weight, layers)

    curve = [Point(0.0, base_task, 0.0, None, at_zero)]
    for step in steps:
        curve.append(measure(dict.fromkeys(at_zero, step), None))
    trained = curve[1 + steps.index(1.0)]
    reported = {"base": curve[0], "trained": trained}
    fitted: list[Point] = []
    if rule.strength is not None:
        chosen = curve[1 + steps.index(rule.strength)]
    else:
        # Strength 0 is no choice: an adapter of zeros is none.
        limit = rule.limit(curve[1:])
        chosen = rule.choose(limit, curve[1:])
        if fits_layers:
            reported[UNIFORM] = chosen
            for point in fits_of(model, task.fit, kept.fit, rule, limit, trained.rise, measure):
                if point.strength:  # with zeros alone there is no adapter
                    fitted.append(point)
            groups = [[*curve[1:], *fitted]]
            if rule.keep_within is None:
                # Layers of their own come first: on few examples one strength for all often seems as good by chance.
                groups.insert(0, fitted)
            chosen = rule.choose(limit, *groups)
    if rule.lose is not None:
        reported[BEST] = min(curve[1:], key=_task_loss)
    reported["chosen"] = chosen
    on_task, on_kept, sizes = _report(model, task.report, kept.report, reported)
    notes: list[str] = []
    if rule.strength is None:
        notes = rule.missed(chosen)
    notes = notes or rule.broken(on_task, on_kept)
    return Dial(str(rule), chosen, tuple(curve), tuple(fitted), on_task, on_kept, sizes, tuple(notes))


def _losses_at(
    model: PeftModel, layers: Mapping[str, float], task: list[Any], kept: list[Any]
) -> tuple[Tensor, Tensor]:
    """Compute the losses of examples of the task and of text to keep at strengths of the layers."""
    with strengths(model, layers):
        return example_losses(model, task), example_losses(model, kept)


def _report(
    model: PeftModel, task: list[Any], kept: list[Any], points: Mapping[str, Point]
) -> tuple[dict[str, Change], dict[str, Change], tuple[int, int]]:
    """Measure points on examples held out from the choice: the task's changes, the changes of text to keep, and sizes.

    The task is compared with the adapter as trained, which a user has today; text to keep with the base, which knew it.
    """
    task_losses, kept_losses = {}, {}
    for name, point in points.items():
        task_losses[name], kept_losses[name] = _losses_at(model, point.layers, task, kept)
    on_task = {name: change_of(losses, task_losses["trained"]) for name, losses in task_losses.items()}
    on_kept = {name: change_of(losses, kept_losses["base"]) for name, losses in kept_losses.items()}
    return on_task, on_kept, (len(task_losses["base"]), len(kept_losses["base"]))


def fits_of(
    model: PeftModel,
    task: list[Any],
    keep: list[Any],
    rule: Rule,
    limit: float,
    trained: float,
    measure: Callable[[Mapping[str, float], float | None], Point],
) -> Iterator[Point]:
    """Fit strengths of the layers with rising weights of the text to keep, until the rule breaks or nothing is gained.

    Half way from each to those before is measured, too: weights are coarse, and with few examples a fit goes too far.
    """
    layers, least = dict.fromkeys(_outputs(model), _START), math.inf
    for weight in _WEIGHTS:
        more = (_MORE_STEPS, _LOWER_RATE) if least < math.inf else ()
        before, layers = layers, fit_strengths(model, task, keep, weight, layers, *more)
        half = {name: (value + before[name]) / 2 for name, value in layers.items()}
        # Both are measured before one is yielded: a caller sees them in pairs.
        half_point, full_point = measure(half, weight), measure(layers, weight)
        yield half_point
        yield full_point
        is_kept = rule.keep_within is not None and full_point.rise <= rule.keep_within
        # Where nothing was forgotten the rise as trained is not above zero: then any fall is a gain.
        gains_little = full_point.rise > least - _GAIN * max(trained, 0.0)
        if is_kept or full_point.task > limit or gains_little:
            break
        least = full_point.rise


def _ratio(losses: Tensor) -> float:
    """Compute the loss of a label from the columns of `example_losses`: long examples count for more."""
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def change_of(losses: Tensor, reference: Tensor) -> Change:
    """Compare two losses of the same examples; the interval is for a ratio of sums over examples.

    Examples are drawn, not labels, so that both sums are random. The variance is the linearized ratio's: it squares
    (difference - change x labels) of each example, which sum to zero before they are squared.
    """
    change = _ratio(losses) - _ratio(reference)
    n = len(losses)
    rest = losses[:, 0] - reference[:, 0] - change * losses[:, 1]
    error = 1.96 * math.sqrt(float(rest.square().sum()) * n / max(n - 1, 1)) / float(losses[:, 1].sum())
    return Change(_ratio(losses), change, error)


@contextmanager
def strengths(model: PeftModel, values: float | Tensor | Mapping[str, float | Tensor]) -> Iterator[None]:
    """Multiply what the active adapter adds, in all layers or layer by layer, while the block runs.

    At 1 the adapter acts as trained, at 0 the model is its base, except for modules that were trained whole. Layers not
    named keep theirs. Tensors may require gradients, except for experts that PEFT adapts as parameters.
    """
    adapter, layers = _active(model)
    if not isinstance(values, Mapping):
        values = dict.fromkeys(layers, values)
    with restoring("scaling", layers.values()):
        for name, value in values.items():
            before = layers[name].scaling
            # Another dictionary, since `restoring` puts back the one that was there, with what it then holds.
            layers[name].scaling = before | {adapter: before[adapter] * value}
        yield


def fit_strengths(
    model: PeftModel,
    task: Sequence[Any],
    keep: Sequence[Any],
    weight: float,
    start: float | Mapping[str, float] = _START,
    steps: int = _STEPS,
    rate: float = _RATE,
) -> dict[str, float]:
    """Find a strength for each layer by gradient on the loss of the task plus `weight` times the loss on text to keep.

    Adam with a rate that falls to 0 linearly; strengths stay between 0 and `STRONGEST`. The model is afterwards as it
    was. A step costs a forward and a backward pass on a batch of each, without gradients of the base.
    """
    outputs = _outputs(model)
    matrices = list(outputs.values())
    trained = [b.detach().clone() for b in matrices]
    if not isinstance(start, Mapping):
        start = dict.fromkeys(outputs, start)
    # One leaf of a value for each layer: [layers].
    values = torch.tensor([start[name] for name in outputs], requires_grad=True)
    adam = torch.optim.Adam([values], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    with restoring("requires_grad", model.parameters()), restoring("data", matrices), evaluating(model):
        # Gradients of B alone: gradients of the base would cost memory and time.
        model.requires_grad_(False)
        for b in matrices:
            b.requires_grad_(True)
        for step in range(steps):
            # Into B itself, and not by `strengths`: PEFT adapts experts as parameters, where a scaling has no gradient.
            for b, b_trained, value in zip(matrices, trained, values.tolist(), strict=True):
                b.data = b_trained * value
            gradient = torch.zeros(len(matrices))
            # One backward pass for each of the two: so the activations of only one batch are alive at a time.
            for batches, share in ((task, 1.0), (keep, weight)):
                losses, labelled = label_losses(model, batches[step % len(batches)])
                loss = share * losses.sum() / labelled.sum()
                # A layer that a batch does not reach, such as an expert without tokens, has a gradient of zero.
                gradients = torch.autograd.grad(loss, matrices, materialize_grads=True)
                # B is value * trained, so the derivative by the value is <dL/dB, trained>, also at 0.
                slopes = [float((g.float() * b).sum()) for g, b in zip(gradients, trained, strict=True)]
                gradient += torch.tensor(slopes)  # floats, since layers may be on several devices
            values.grad = gradient
            adam.step()
            schedule.step()
            values.data.clamp_(0.0, STRONGEST)  # below 0 a layer would do the opposite of what it learned
    return dict(zip(outputs, values.tolist(), strict=True))


def _active(model: PeftModel) -> tuple[str, dict[str, Any]]:
    """Return the name of the one active adapter, and the layers that have it."""
    (name,) = model.active_adapters
    return name, adapter_layers(model, name)


def _outputs(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the matrix B of each layer of the active adapter."""
    name, layers = _active(model)
    matrices = {}
    for at, layer in layers.items():
        # PEFT keeps B of an embedding as a parameter, of other layers as a module.
        embedding = getattr(layer, "lora_embedding_B", {})
        matrices[at] = embedding[name] if name in embedding else layer.lora_B[name].weight
    return matrices


def label_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss of each label, zero where there is none, and where there is one; both [batch, length]."""
    batch, shifted = on_device_of(model, batch), shifts_labels(model)
    if shifted and batch.keys() == _PLAIN:
        return token_losses(model, batch)  # logits only where there are labels
    plain: Any = without_adapter(model)
    labels = batch["labels"]
    # A model that shifts labels makes its logits without them: they would only add the cost of a loss.
    logits = call_model(plain, batch, with_labels=not shifted).logits  # batch x length x vocabulary
    if logits.shape[:2] != labels.shape:
        more = ", ".join(sorted({*batch} - _PLAIN)) or "nothing else"
        raise LoraInitError(
            f"a batch has labels {list(labels.shape)}, and with {more} beside tokens {type(plain).__name__} returns "
            f"logits {list(logits.shape[:2])}. Pass batches with a label for each of these."
        )
    if shifted:
        labels, logits = labels[:, 1:], logits[:, :-1]
    # cross_entropy wants classes on axis 1: batch x length x vocabulary -> batch x vocabulary x length.
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, labels != IGNORED


@torch.inference_mode()
def example_losses(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Sum the loss of each example and count its labels, in evaluation mode: float64 [examples, 2] on the CPU."""
    rows = []
    with evaluating(model):
        for batch in batches:
            losses, labelled = label_losses(model, batch)
            # batch x length -> batch x (loss, labels)
            rows.append(torch.stack([losses.double().sum(1), labelled.double().sum(1)], 1).cpu())
    examples = torch.cat(rows)
    if not float(examples[:, 1].sum()):
        raise LoraInitError("no token has a label, so there is no loss. Check labels and max_length.")
    if not math.isfinite(float(examples.sum())):
        raise LoraInitError("the loss is NaN or infinite: training went wrong. Use an earlier checkpoint.")
    return examples
