"""How strongly each layer of a trained adapter acts: measured on its task and on text that the model should keep."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_init.adapters.directory import carried
from lora_init.adapters.peft_model import adapter_layers, adds_nothing
from lora_init.collection.losses import token_losses
from lora_init.errors import LoraInitError, check_number, warn
from lora_init.keep.dialed import BEST, UNIFORM, Change, Dial, Point, signed
from lora_init.keep.replay import replayed
from lora_init.layers.masks import IGNORED, shifts_labels
from lora_init.layers.running import call_model, evaluating, on_device_of, restoring
from lora_init.layers.wrappers import without_adapter
from lora_init.loading.batches import as_batches, count_examples, group_by_length
from lora_init.progress import Progress, Say
from lora_init.serving.trained import OTHER_UPDATES
from lora_init.starts.starts import changes_base

if TYPE_CHECKING:
    from peft import PeftModel

STRONGEST = 1.5  # of one layer, in a fit
_WEAKEST = 1e-3  # of all layers, as asked: far below it B is zero in types of 16 bits
_START, _STEPS, _RATE = 0.7, 24, 0.06
CURVE = (0.0, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2)
# Weights of the text to keep that are tried while the rule holds, each from the strengths found with the one before.
_WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_MORE_STEPS, _LOWER_RATE = 16, 0.05
_GAIN = 0.01  # of the rise as trained: what a weight must take off for the next one to be tried
_MOST_BATCHES = 48  # of a loader
_LEAST = 6  # examples, and texts to keep
_SHARED = 0.1  # of the text to keep that may be examples of the task
KEPT_BATCH = 4  # texts to keep in a batch
_BACKWARD = 3  # forward passes that a step of a fit takes as long as
LOSE = 0.02
_PLAIN = {"input_ids", "attention_mask", "labels"}


def _check_limit(name: str, value: Any) -> None:
    """Refuse a value of a rule that is out of range."""
    least, hint = (_WEAKEST, " 0 is the base.") if name == "strength" else (0, "")
    check_number(name, value, least, hint=hint)
    if name == "lose" and value > 1.0:
        raise LoraInitError(f"{{lose}} is {value:.0%} more loss. Write 2 % as 2% or 0.02.", lose=value)


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
                said = f"{{strength}}: above {STRONGEST:g} the dial itself chooses none; 1 is as trained."
                warn(said, strength=value)
        if self.uniform and self.strength is not None:
            raise LoraInitError("{strength} is one for all layers already. Leave {uniform} out.", **vars(self))
        if not given:
            object.__setattr__(self, "lose", LOSE)

    def __str__(self) -> str:
        if self.strength is not None:
            return f"strength {self.strength:g}, as asked"
        if self.keep_within is not None:
            return f"the best task with text to keep at most {self.keep_within:g} above the base's loss"
        return f"the least forgetting at most {100 * (self.lose or 0):g} % above the task's loss at the best strength"

    def limit(self, curve: Sequence[Point]) -> float:
        """Return the highest loss on the task that may be chosen."""
        return math.inf if self.lose is None else min(point.task for point in curve) * (1.0 + self.lose)

    def choose(self, limit: float, *groups: Sequence[Point]) -> Point:
        """Choose in the first group where a point does what was asked; if none does, what forgets least of the last."""
        for points in groups:
            if self.keep_within is not None:
                within = sorted((p for p in points if p.rise <= self.keep_within), key=lambda p: p.task)
            else:
                within = sorted((p for p in points if p.task <= limit), key=lambda p: p.rise)
            if within:
                return within[0]
        return min(groups[-1], key=lambda p: p.rise)

    def missed(self, chosen: Point) -> list[str]:
        """Return a note if no point did what was asked, so that the one was chosen that forgets least."""
        if self.keep_within is not None and chosen.rise > self.keep_within:
            return ["no strength keeps what was asked for; the one that forgets least was taken"]
        return []

    def broken(self, task: Mapping[str, Change], keep: Mapping[str, Change]) -> list[str]:
        """Return a note if the limit, which held on the examples to choose by, is broken on those of the report."""
        lost = 0.0 if self.lose is None else task["chosen"].loss / task[BEST].loss - 1.0
        rise = keep["chosen"].change
        if self.lose is not None and lost > self.lose:
            measured = f"{100 * lost:.2g} % above the task's loss at the best strength, and {100 * self.lose:g} %"
        elif self.keep_within is not None and rise > self.keep_within:
            measured = f"text to keep {rise:.3f} above the base's loss, and {self.keep_within:g}"
        else:
            return []
        return [f"measured is {measured} was the limit. Dial on more examples, or set a lower limit"]


def check_dialable(config: Mapping[str, Any], whole: Iterable[str], where: str) -> None:
    """Refuse an adapter, called `where`, that is more than a factor times A and B: `whole` names its other tensors."""
    without = ("use_dora", "lora_bias", "ensure_weight_tying", *OTHER_UPDATES)
    other = next((key for key in without if config.get(key)), None)
    trained = next(iter(whole), None)
    origin = carried(config) if carried(config).get("rank") in (None, config.get("r")) else {}
    began = config.get("init_lora_weights")
    began = began if isinstance(began, str) else str(origin.get("method") or "")
    if other is not None:
        raise LoraInitError(f"{where} has {other}, which has no strength that could be scaled alone. Use plain LoRA.")
    if trained is not None or config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        raise LoraInitError(
            f"{where} holds {trained or 'a head'}, trained whole, which has no strength: the rest would not fit it at "
            "another. Dial adapters of A and B alone, of language models."
        )
    if changes_base(began) or origin.get("corrects_base") or origin.get("error_size"):
        raise LoraInitError(
            f"{where} began as {began}, which changes or corrects the base: at strength 0 that is not your model. "
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
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_dialable(model.peft_config[name].to_dict(), (key for key in tensors if ".lora_" not in key), where)
    if all(adds_nothing(layer, name) for layer in layers.values()):
        raise LoraInitError(f"{where}: B A is zero in every layer, so it was never trained. Train it first.")
    _check_scalable(layers, where)
    if batches is None and strength is not None:
        if keep is not None or tokenizer is not None:
            said = "{strength} without batches measures nothing: leave {keep} and {tokenizer} out."
            raise LoraInitError(said, strength=strength, keep=..., tokenizer=...)
        dialed = Dial.unmeasured(str(rule), dict.fromkeys(layers, strength))
    else:
        dialed = turn(model, rule, batches, keep, tokenizer, seed, say)
    for at, b in _outputs(model).items():
        b.data *= dialed.strengths[at]
    return dialed


def _check_scalable(layers: Mapping[str, Any], where: str) -> None:
    """Refuse layers whose B cannot be multiplied by a strength."""
    for name, layer in layers.items():
        if layer.merged:
            raise LoraInitError(f"{where} is merged into the base. Call unmerge_adapter() first.")
        if isinstance(layer.get_base_layer(), nn.MultiheadAttention):
            raise LoraInitError(
                f"{where} adapts {name!r}, an nn.MultiheadAttention: two adapters, one inside the other."
            )


def turn(model: PeftModel, rule: Rule, batches: Any, keep: Any, tokenizer: Any, seed: int, say: Say) -> Dial:
    """Choose as `dial` does, of an adapter that may be dialed, and leave it as it is."""
    shifted = shifts_labels(model)
    task = _read(as_batches(batches, model, seed), "batches", shifted)
    n = count_examples(task)
    if own := keep is None:
        if tokenizer is None:
            raise LoraInitError(
                "dial() needs {keep}, batches of text to keep, or tokenizer=: then the base writes it.", keep=...
            )
        wanted = max(n // 2, _LEAST)
        keep = replayed(model, tokenizer, wanted, seed, min(wanted // 3, KEPT_BATCH), say)
    kept = _read(as_batches(keep, model, seed), "keep", shifted)
    if not own:
        texts = _sequences(kept)
        share = len(texts & _sequences(task)) / len(texts)
        if share >= _SHARED:
            raise LoraInitError(f"keep: {share:.0%} of its texts are examples of the task. Pass text of another kind.")
    parts, others = (_thirds(source, rule, seed, shifted) for source in (task, kept))
    return replace(_search(model, parts, others, rule, say), read=(n, count_examples(kept)))


_Parts = tuple[list[Any], list[Any], list[Any]]


def _read(batches: Iterable[Any], what: str, shifted: bool) -> list[Any]:
    """Read the batches that have labels: all of a list, of a loader the first."""
    if batches is None:
        raise LoraInitError("dial() needs batches of the task, unless {strength} says what to do.", strength=...)
    labelled = []
    for batch in batches if isinstance(batches, Sequence) else islice(batches, _MOST_BATCHES):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise LoraInitError(f"{what}: a batch has no labels [batch, length], as a language model takes them.")
        if _has_label(batch, shifted):
            labelled.append(batch)
    check_enough(sum(len(_examples(batch, shifted)) for batch in labelled), what)
    return labelled


def check_enough(n: int, what: str) -> None:
    """Refuse too few examples to deal out."""
    if n < _LEAST:
        raise LoraInitError(f"{what}: {n} example{'s' * (n > 1)}, and at least {_LEAST} are needed. Take 36 or more.")


def _thirds(batches: list[Any], rule: Rule, seed: int, shifted: bool) -> _Parts:
    """Split batches into those to fit, to choose and to report by; where nothing is fitted, or chosen, all others.

    Examples are dealt at random: a batch holds some of similar length, and loss and forgetting depend on the length.
    """
    if rule.strength is not None:
        return [], batches, batches
    examples = [example for batch in batches for example in _examples(batch, shifted)]
    random.Random(seed).shuffle(examples)
    size = max(len(batch["labels"]) for batch in batches)
    fit, choose, report = (list(_batched(examples[i::3], size, seed)) for i in range(3))
    return fit, fit + choose if rule.uniform else choose, report


def _has_label(batch: Any, shifted: bool) -> bool:
    """Return whether a token of a batch is predicted; a model that shifts labels never predicts the first one."""
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    return bool((labels != IGNORED).any())


def _examples(batch: Any, shifted: bool) -> list[Any]:
    """Split a batch into examples that have labels; one that is not made of rows stays whole."""
    if not is_of_rows(batch):
        return [batch]
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(len(batch["labels"]))]
    return [row for row in rows if _has_label(row, shifted)]


def is_of_rows(batch: Any) -> bool:
    """Return whether each tensor of a batch has a row for each example, so that it can be dealt out by examples."""
    n = len(batch["labels"])
    # Positions of text, height and width, [3, batch, length], are no rows, even of three examples.
    positions = batch.get("position_ids")
    is_odd = isinstance(positions, Tensor) and positions.dim() == 3
    rows = [isinstance(value, Tensor) and value.dim() > 1 and len(value) == n for value in batch.values()]
    return all(rows) and not is_odd


def _batched(examples: Iterable[Any], size: int, seed: int) -> Iterator[Any]:
    """Put examples of one form into batches, padded on the right; without a mask for that they also have one length."""
    groups = defaultdict(list)
    for one in examples:
        of_length = 2 if "attention_mask" in one else 1
        form = [(name, *value.shape[of_length:]) for name, value in one.items()] if is_of_rows(one) else id(one)
        groups[str(form)].append(one)
    for group in groups.values():
        for rows in group_by_length(group, size, seed, lambda one: int(one["labels"].shape[1])):
            if len(rows) == 1:
                yield rows[0]
                continue
            padding = {name: IGNORED if name == "labels" else 0 for name in rows[0]}
            yield {name: pad_sequence([row[name][0] for row in rows], True, pad) for name, pad in padding.items()}


def _sequences(batches: list[Any]) -> set[tuple[int, ...]]:
    """Collect the tokens of all examples, without padding, and their labels."""
    sequences = set()
    for batch in batches:
        ids = batch.get("input_ids", batch["labels"])
        used = batch.get("attention_mask", torch.ones_like(ids)).expand_as(ids) != 0
        rows = zip(ids, used, batch["labels"], strict=True)
        sequences |= {(*row[at].tolist(), *labels[labels != IGNORED].tolist()) for row, at, labels in rows}
    return sequences


def _search(model: PeftModel, task: _Parts, kept: _Parts, rule: Rule, say: Say) -> Dial:
    def read(layers: Mapping[str, float], third: int) -> list[Tensor]:
        with strengths(model, layers):
            return [example_losses(model, part[third]) for part in (task, kept)]

    def measure(layers: Mapping[str, float], weight: float | None) -> Point:
        on_task, on_kept = map(_ratio, read(layers, 1))
        strength = sum(layers.values()) / len(layers)
        how = f"strength {strength:.3g}" + ("" if weight is None else f" on average, fitted with weight {weight:g}")
        spent = 1.0 if weight is None else 1.0 + fit / 2  # each fit is measured twice
        progress.ended(f"{how}: task {on_task:.3f}, text to keep {signed(on_kept - base, 3)}", spent)
        return Point(strength, on_task, on_kept - base, weight, layers)

    nothing = dict.fromkeys(_outputs(model), 0.0)
    steps = CURVE[1:] if rule.strength is None else sorted({rule.strength, 1.0})
    fit = _BACKWARD * _STEPS / max(len(task[0]), 1)  # in passes over the examples to choose by
    fits = 0 if rule.uniform or rule.strength is not None else len(_WEIGHTS)
    progress = Progress(1 + len(steps) + fits * (2 + fit) + 4, say)  # at most: fits end when the rule breaks
    task_at_0, base = map(_ratio, read(nothing, 1))
    progress.ended(f"strength 0: task {task_at_0:.3f}")
    curve = [Point(0.0, task_at_0, 0.0, None, nothing)]
    curve += [measure(dict.fromkeys(nothing, step), None) for step in steps]
    notes, fitted, reported = list[str](), [], {"base": curve[0], "trained": curve[1 + steps.index(1.0)]}
    if rule.strength is not None:
        chosen = curve[1 + steps.index(rule.strength)]
    else:
        limit = rule.limit(curve[1:])
        chosen = rule.choose(limit, curve[1:])
        if not rule.uniform:
            reported[UNIFORM] = chosen
            found = fits_of(model, task[0], kept[0], rule, limit, reported["trained"].rise, measure)
            fitted = [point for point in found if point.strength]  # with zeros alone there is no adapter
            # Layers of their own come first: on few examples one strength for all often seems as good by chance.
            chosen = rule.choose(limit, fitted if rule.keep_within is None else [], [*curve[1:], *fitted])
        notes = rule.missed(chosen)
    if rule.lose is not None:
        reported[BEST] = min(curve[1:], key=lambda point: point.task)
    at = {name: read(point.layers, 2) for name, point in (reported | {"chosen": chosen}).items()}
    on_task = {name: change_of(losses[0], at["trained"][0]) for name, losses in at.items()}
    on_kept = {name: change_of(losses[1], at["base"][1]) for name, losses in at.items()}
    sizes = len(at["base"][0]), len(at["base"][1])
    notes = notes or rule.broken(on_task, on_kept)
    return Dial(str(rule), chosen, tuple(curve), tuple(fitted), on_task, on_kept, sizes, tuple(notes))


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
        points = [measure(half, weight), measure(layers, weight)]
        yield from points
        kept = rule.keep_within is not None and points[1].rise <= rule.keep_within
        if kept or points[1].task > limit or points[1].rise > least - _GAIN * max(trained, 0.0):
            break
        least = points[1].rise


def _ratio(losses: Tensor) -> float:
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def change_of(losses: Tensor, reference: Tensor) -> Change:
    """Compare two losses of the same examples; the interval is for a ratio of sums over examples."""
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
    each = values if isinstance(values, Mapping) else dict.fromkeys(layers, values)
    with restoring("scaling", layers.values()):
        for name, value in each.items():
            before = layers[name].scaling
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
    names, outputs = zip(*_outputs(model).items(), strict=True)
    trained = [b.detach().clone() for b in outputs]
    begin = [start[name] if isinstance(start, Mapping) else start for name in names]
    values = torch.tensor(begin, requires_grad=True)
    adam = torch.optim.Adam([values], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    with restoring("requires_grad", model.parameters()), restoring("data", outputs), evaluating(model):
        model.requires_grad_(False)
        for b in outputs:
            b.requires_grad_(True)
        for step in range(steps):
            for b, whole, value in zip(outputs, trained, values.tolist(), strict=True):
                b.data = whole * value
            gradient = torch.zeros(len(names))
            for batches, share in ((task, 1.0), (keep, weight)):
                losses, labelled = label_losses(model, batches[step % len(batches)])
                loss = share * losses.sum() / labelled.sum()
                gradients = torch.autograd.grad(loss, outputs, materialize_grads=True)
                # B is value * trained, so the derivative by the value is <dL/dB, trained>, also at 0.
                slopes = [float((g.float() * b).sum()) for g, b in zip(gradients, trained, strict=True)]
                gradient += torch.tensor(slopes)  # layers may be on several devices
            values.grad = gradient
            adam.step()
            schedule.step()
            values.data.clamp_(0.0, STRONGEST)
    return dict(zip(names, values.tolist(), strict=True))


def _active(model: PeftModel) -> tuple[str, dict[str, Any]]:
    (name,) = model.active_adapters
    return name, {at: layer for at, layer in adapter_layers(model).items() if name in layer.scaling}


def _outputs(model: PeftModel) -> dict[str, nn.Parameter]:
    name, layers = _active(model)
    weights = {}
    for at, layer in layers.items():
        embedding = getattr(layer, "lora_embedding_B", {})
        weights[at] = embedding[name] if name in embedding else layer.lora_B[name].weight
    return weights


def label_losses(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Compute the loss of each label, zero where there is none, and where there is one; both [batch, length]."""
    batch, shifted = on_device_of(model, batch), shifts_labels(model)
    if shifted and batch.keys() == _PLAIN:
        return token_losses(model, batch)
    plain: Any = without_adapter(model)
    labels, logits = batch["labels"], call_model(plain, batch, with_labels=not shifted).logits
    if logits.shape[:2] != labels.shape:
        more = ", ".join(sorted({*batch} - _PLAIN)) or "nothing else"
        raise LoraInitError(
            f"a batch has labels {list(labels.shape)}, and with {more} beside tokens {type(plain).__name__} returns "
            f"logits {list(logits.shape[:2])}. Pass batches with a label for each of these."
        )
    labels, logits = (labels[:, 1:], logits[:, :-1]) if shifted else (labels, logits)
    losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, labels != IGNORED


@torch.inference_mode()
def example_losses(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Sum the loss of each example and count its labels, in evaluation mode: float64 [examples, 2] on the CPU."""
    with evaluating(model):
        pairs = [label_losses(model, batch) for batch in batches]
        rows = [torch.stack([losses.double().sum(1), labelled.double().sum(1)], 1).cpu() for losses, labelled in pairs]
    found = torch.cat(rows)
    if not float(found[:, 1].sum()):
        raise LoraInitError("no token has a label, so there is no loss. Check labels and max_length.")
    if not math.isfinite(float(found.sum())):
        raise LoraInitError("the loss is NaN or infinite: training went wrong. Use an earlier checkpoint.")
    return found
