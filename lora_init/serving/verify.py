"""Whether an engine serves an adapter as it was trained: its log-probabilities against those that PEFT computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.peft_model import adapter_layers, check_plain, with_adapter
from lora_init.errors import LoraInitError, check_number, is_whole
from lora_init.files import is_as_written, read_json
from lora_init.layers.grid import layer_grid
from lora_init.layers.running import disabled, restoring
from lora_init.loading.batches import check_tokenizer
from lora_init.packages import check_takes
from lora_init.serving.engines import VLLM_RANKS
from lora_init.serving.experts import Change, is_concatenated, misreadings
from lora_init.serving.export import RECORD_FILE
from lora_init.serving.trained import note_of
from lora_init.starts.weights import LoraWeights

AS_TRAINED, AS_EXPORTED, CANNOT_TELL = "served as trained", "served as exported", "cannot tell"
_TOKENS = 1024  # of a batch, whose logits are held
_TOP = 20  # likeliest tokens, on which the effect of an adapter counts: as many as servers tell
_OTHER_BASE = 0.03  # share of the variance within prompts; a served base that misses more of it is another one
# What may be left over: so many times the engine's noise, and a share of the effect, since an adapter is rounded, too.
# A factor that is searched explains nine tenths. One wrong layer of two hundred left a hundredth (SmolLM2 in vLLM).
_NOISES, _LEFT, _LEFT_BY_FAULT, _LEFT_WITHOUT_NOISE = 3.0, 0.001, 0.1, 0.2
# The weight of a part that is not as trained is this far from its own, and each other weight this near, in an answer of
# which that much is the adapter. Another base, a token too many or a missing block move the weights of all parts.
_PART_OFF, _PART_SAME, _PART_FITS = 0.1, 0.02, 0.0
_PROMPTS = 0.75  # share of the prompts that fit where a router may have sent tokens of the rest to other experts
EXPERTS = "experts"  # how modules of experts are called, and the part that they are
Ask = Callable[[Any], Mapping[Any, float]]


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Distances are root mean squares of differences of log-probabilities.

    Attributes:
        verdict: "served as trained"; "served as exported", which is the same of an export that lost a part of the
            update; "ignored", "scaled", "a part is missing", "another adapter", "another base or template", or "cannot
            tell"; a `ServingWatch` also has "stale".
        text: The verdict in one line, with its reason and numbers.
        effect: How far the adapter moves the likeliest tokens.
        noise: How far the served base is from the local one; None if it is not served.
        residual: How far what is served is from the adapter in PEFT; None if nothing was compared.
        prompts: Prompts with an answer.
        values: Log-probabilities that were compared.
    """

    verdict: str
    text: str
    effect: float
    noise: float | None
    residual: float | None
    prompts: int
    values: int


@dataclass(frozen=True, eq=False)
class Fault:
    """A way to serve an adapter wrongly: factors on the scalings of layers, or DoRA without its magnitudes."""

    verdict: str
    reason: str
    factors: Mapping[str, float]
    magnitudes: bool = True
    # what is done to A and B of fused experts, and the end of the names of those parameters that it is done to
    experts: tuple[str, Change] | None = None


_AS_TRAINED = Fault(AS_TRAINED, "", {})


def check_prompts(prompts: Any) -> None:
    """Refuse one text in place of a list, and what is neither a text nor a chat."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise LoraInitError(f"prompts={prompts!r}: expected a list of texts or chats.")
    for prompt in prompts:
        if not isinstance(prompt, (str, list)) or prompt == []:
            raise LoraInitError(f"prompts has {prompt!r}: expected texts, or chats as lists of messages.")


def verify(
    directory: str | Path, model: Any, tokenizer: Any, prompts: Sequence[Any], served: Ask, base: Ask | None = None,
    *, n: int = 32,
) -> Verification:  # fmt: skip
    """Find out what an engine serves under the name of an adapter.

    First the `n` prompts are chosen that the adapter changes most. The engine's log-probabilities of the token after
    them are compared with what PEFT computes for the adapter; if they differ, also for the base, for other scalings,
    and for the adapter without one kind of layer. The distance of the served base from the local one is the noise; a
    fault with a smaller effect is not seen. Cost: two forward passes for each prompt, and for each of the `n` about 40
    if something is wrong, or 150 if there are experts.

    Args:
        directory: The adapter, as PEFT loads it.
        model: The plain base model, which is restored afterwards.
        tokenizer: The base model's.
        prompts: Texts, which the engine reads as `tokenizer(text)` does, or chats as lists of messages.
        served: A function from a prompt to log-probabilities of the next token, by the number or the text of a token,
            for as many tokens as the engine returns.
        base: The same function for the base model in that engine.
        n: Number of prompts to ask about, at most.

    Raises:
        LoraInitError: There is no prompt, or the adapter is damaged, of another base, or in need of its start.
    """
    adapter = AdapterDirectory(directory)
    adapter.check_fits_plain_base()
    check_prompts(prompts)
    check_number("n", n, 1, whole=True)
    if not prompts:
        raise LoraInitError("verify needs a prompt, and got none.")
    check_plain(model, "verify()")
    check_tokenizer(tokenizer)
    check_takes(served, "served=", "prompt")
    if base is not None:
        check_takes(base, "base=", "prompt")
    with with_adapter(model, adapter) as peft_model:
        local = Local(peft_model.eval(), tokenizer)
        faults = local.faults()
        plain, trained = local.run(prompts, faults[0]), local.run(prompts)  # [prompts, vocabulary]
        likeliest = trained.topk(min(_TOP, trained.shape[1])).indices  # prompts x vocabulary -> prompts x _TOP
        effects = (trained - plain).gather(1, likeliest).square().mean(1)  # prompts x _TOP -> prompts
        chosen = _most_telling(effects, plain, trained, torch.tensor(tokenizer.all_special_ids))[:n]
        plain, trained, asked = plain[chosen], trained[chosen], [prompts[i] for i in chosen.tolist()]
        effect = float(effects[chosen].mean().sqrt())
        # If the adapter has no effect, no answer could tell whether it is served: the engine is not asked.
        ask_adapter, ask_base = (served, base) if effect else (None, None)
        observed, at_base = local.observe(ask_adapter, asked), local.observe(ask_base, asked)
        run = partial(local.run, asked)
        diagnosis = diagnose(observed, at_base, plain, trained, effect, faults, run, local.routed)
    diagnosis = replace(diagnosis, text="; ".join((diagnosis.text, *note_of(adapter.path))))
    if not is_as_written(adapter.path, RECORD_FILE) or diagnosis.verdict != AS_TRAINED:
        return diagnosis
    lost = read_json(adapter.path / RECORD_FILE).get("error")  # the record may be anybody's
    if not lost or not isinstance(lost, float):
        return diagnosis
    text = diagnosis.text.replace(AS_TRAINED, f"{AS_EXPORTED}, which lost {lost:.2%} of the update", 1)
    return replace(diagnosis, verdict=AS_EXPORTED, text=text)


def _most_telling(effects: Tensor, plain: Tensor, trained: Tensor, special_ids: Tensor) -> Tensor:
    """Order prompts by the effect of the adapter, falling; those come last whose text ends next."""
    # Where the text ends next, some engines return no log-probabilities.
    ends = torch.isin(plain.argmax(1), special_ids) | torch.isin(trained.argmax(1), special_ids)
    # Effects are not negative; -1 / (1 + effect) is, and rises with the effect.
    return effects.where(~ends, -1 / (1 + effects)).argsort(descending=True, stable=True)


def diagnose(
    observed: Tensor,  # log-probabilities of what is served as the adapter, [prompts, vocabulary]; NaN: not returned
    at_base: Tensor,  # the same of the served base
    plain: Tensor,  # of the local base
    trained: Tensor,  # of the local base with the adapter
    effect: float,  # root mean square of the difference of the two on the likeliest tokens
    faults: Sequence[Fault],  # what may have gone wrong; the first is that the base is served
    run: Callable[[Fault], Tensor],  # computes log-probabilities under a fault, if the adapter does not fit
    routed: bool = False,  # whether a router may send tokens elsewhere in another precision
) -> Verification:
    """Return the first verdict that holds of what an engine returned, compared with what PEFT computes.

    The distance of the served base from the local one is the unit of everything else: the precision and the kernels of
    the engine, which would be there without any fault. A fault is named if what is served is closer to the adapter
    under that fault than to the adapter as trained; that the base answers, if it is close to what the base answered.
    Nothing is explained that is as far off as the whole effect. If the base was not asked, only a large part of the
    effect counts.
    """
    returned = ~observed.isnan()
    answered, values, measured = int(returned.any(1).sum()), int(returned.sum()), not bool(at_base.isnan().all())
    # Each is NaN where nothing was returned, and no comparison below holds of it.
    noise, residual, from_base = _distance(at_base, plain), _distance(observed, trained), _distance(observed, plain)
    # What may be left: `allowed` of an adapter that is served as trained, `by_base` of what the base answers, `by_list`
    # of another fault of the list, and `of_effect` of a factor that is searched. A distance above `suspicious` is worth
    # looking for faults.
    of_effect = _LEFT_BY_FAULT * max(effect, from_base)
    if measured:
        allowed = by_list = min(_NOISES * noise + _LEFT * effect, effect)
        suspicious = allowed / 2  # small faults leave less than what is allowed
        by_base = allowed / 2  # of two answers of one engine
        known = f"noise {noise:.2g}"
    else:
        allowed = suspicious = _LEFT_WITHOUT_NOISE * effect
        by_list = by_base = of_effect
        known = "noise not known: the base was not asked"

    def compute(fault: Fault) -> Tensor:
        """Take the base as the engine computes it, where it was asked."""
        return at_base if measured and fault is faults[0] else run(fault)

    def verdict(name: str, reason: str) -> Verification:
        text = f"{name}: {reason} ({answered} prompts, {values} values; effect of the adapter {effect:.2g}, {known})"
        off = residual if values else None
        return Verification(name, text, effect, noise if measured else None, off, answered, values)

    if effect == 0:
        return verdict(CANNOT_TELL, "the adapter changes nothing in PEFT either; is B zero?")
    if 4 * answered < len(plain):
        return verdict(CANNOT_TELL, "hardly an answer has tokens that are the tokenizer's")
    if measured and noise**2 > _OTHER_BASE * _variance_within_prompts(plain, ~at_base.isnan()):
        return verdict("another base or template", f"the served base is {noise:.2g} off")
    if effect < 2 * noise:
        return verdict(CANNOT_TELL, f"the effect would have to be {2 * noise:.2g} at least")
    # Before "as trained": a fault so small that it leaves less than what is allowed still has a name if it fits better.
    if residual > suspicious:
        limits = _Limits(0.7 * residual, by_base, by_list, max(by_list, of_effect))
        fitting = _fault_that_fits(observed, faults, compute, limits)
        if fitting is not None:
            fault, distance = fitting
            return verdict(
                fault.verdict,
                f"{fault.reason}; {distance:.2g} off from it, {residual:.2g} off from the adapter as trained",
            )
    if how_far := _as_trained(observed, trained, allowed, measured and routed):
        return verdict(AS_TRAINED, how_far)
    fits = max(0.0, 1 - (residual / from_base) ** 2)  # the share of the served effect that this adapter explains
    what = _other_adapter(fits, measured)
    if fits > _PART_FITS:
        what += _other_part(observed, plain, trained, faults, run)
    return verdict("another adapter", f"{what}; {fits:.0%} fits, {residual:.2g} off")


def _other_adapter(fits: float, measured: bool) -> str:
    """Describe which adapter may be served instead, by how much of this one is in what is served."""
    near = "this one compressed, or with layers changed or in other places"
    what = near if fits > 0.5 else "that of another task, say"
    return what if measured else f"{what}, or another base or template"


def _as_trained(observed: Tensor, trained: Tensor, allowed: float, routed: bool) -> str:
    """Describe how far off what fits is; of a router all but a few prompts have to fit. Empty if it does not."""
    residual = _distance(observed, trained)
    if residual <= allowed:
        return f"{residual:.2g} off"
    per_prompt = (observed - trained).square().nanmean(1).sqrt()  # prompts x vocabulary -> prompts
    most = float(per_prompt.nanquantile(_PROMPTS))
    if not routed or not most <= allowed:  # a quantile that is NaN is not allowed
        return ""
    several, answered = int((per_prompt > allowed).sum()), int((~per_prompt.isnan()).sum())
    return f"{most:.2g} off, but for {several} of {answered} prompts, whose tokens a router may have sent elsewhere"


def _distance(observed: Tensor, local: Tensor) -> float:
    return float((observed - local).square().nanmean().sqrt())


def _variance_within_prompts(values: Tensor, returned: Tensor) -> float:
    """Compute the variance around each prompt's mean, of prompts with two values or more; NaN if there is none."""
    rows = values.where(returned, torch.nan)[returned.sum(1) > 1]
    return float((rows - rows.nanmean(1, keepdim=True)).square().nanmean())


class _Limits(NamedTuple):
    """Distances up to which what is served is explained."""

    most: float  # above it a fault fits hardly better than the adapter as trained
    by_base: float  # by the first of the list, the base
    by_list: float  # by another fault of the list
    by_search: float  # by a factor that is searched


def _fault_that_fits(
    observed: Tensor, faults: Sequence[Fault], run: Callable[[Fault], Tensor], limits: _Limits
) -> tuple[Fault, float] | None:
    """Return the first fault that explains what is served, or else the closest factor on all scalings if it does.

    A factor that is searched explains something of almost any answer, so faults of the list come first, and a factor
    also has to be closer than each of them.
    """
    most, by_base, by_list, by_search = limits
    closest = math.inf
    for fault in faults:
        distance = _distance(observed, run(fault))
        if distance <= min(by_base if fault is faults[0] else by_list, most):
            return fault, distance
        closest = min(closest, distance)

    factor, distance = _factor_that_fits(observed, "", [*faults[0].factors], run)
    if factor is None or distance > min(by_search, most, closest):
        factor, distance = _factor_that_fits(observed, f"{EXPERTS} ", _expert_layers(faults), run)
        by_search = max(by_list, _LEFT_BY_FAULT * most)  # nine tenths of what is off, since experts do less than all
    return (factor, distance) if factor is not None and distance <= min(by_search, most, closest) else None


def _expert_layers(faults: Sequence[Fault]) -> list[str]:
    """List the layers of experts: those that the fault without the part of that name has at zero."""
    for fault in faults:
        if fault.reason == EXPERTS:
            return [name for name, factor in fault.factors.items() if not factor]
    return []


def _factor_that_fits(
    observed: Tensor, what: str, names: Sequence[str], run: Callable[[Fault], Tensor]
) -> tuple[Fault | None, float]:
    """Find the closest factor on the scalings of layers, and how far what is served is from it; None for about 1.

    Factors are searched as powers of two: on a grid of half powers, and from its best point by parabolas. One parabola
    is not enough where the adapter acts strongly: with llama.cpp's server it called a factor of 3 "by 2.54".
    """
    if not names:
        return None, math.inf

    def scaled(power: float) -> Fault:
        return Fault("scaled", f"{what}by {2**power:.3g}", dict.fromkeys(names, 2**power))

    @cache  # a point costs forward passes over all prompts, and the rounds below share points
    def square(power: float) -> float:
        return _distance(observed, run(scaled(power))) ** 2

    lowest = min((power / 2 for power in range(-9, 10)), key=square)
    for step in (0.5, 0.25, 0.125):  # to the lowest point of the parabola through three, and again nearer to it
        before, at, after = square(lowest - step), square(lowest), square(lowest + step)
        curvature = max(before - 2 * at + after, 1e-12)  # three points on a line have none to divide by
        # At most one step: where the curvature is small, the parabola's lowest point is far outside of the three.
        lowest += step * max(-1.0, min(1.0, 0.5 * (before - after) / curvature))
    is_factor = 0.2 < abs(lowest) < 6  # less than 15 % is noise, as a rule
    return scaled(lowest) if is_factor else None, math.sqrt(square(lowest))


def _other_part(
    observed: Tensor, plain: Tensor, trained: Tensor, faults: Sequence[Fault], run: Callable[[Fault], Tensor]
) -> str:
    """Name the one part of the blocks that is not as trained where all others are; empty if that is not so.

    What is served is taken for a sum of what each part does alone, and so is the adapter as trained. Least squares give
    the weights of both: they differ for a part that is not as trained.
    """
    names = [*faults[0].factors]
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[-2:][0], []).append(name)  # the module that the layer is in, if any
    if len(parts) < 2:
        return ""
    returned, effects = ~observed.isnan(), []
    for members in parts.values():
        alone = Fault("", "", dict.fromkeys(names, 0.0) | dict.fromkeys(members, 1.0))
        effects.append((run(alone) - plain)[returned])  # prompts x vocabulary -> values
    a = torch.stack(effects, 1).double()  # values x parts
    b = torch.stack([(one - plain)[returned] for one in (observed, trained)], 1).double()  # values x 2
    served, own = torch.linalg.lstsq(a, b).solution.unbind(1)
    # A part that adds nothing has no weight either time, and is as trained.
    off = dict(zip(parts, (served / own - 1).abs().nan_to_num(0.0).tolist(), strict=True))
    *_, next_to_it, most = sorted(off, key=off.__getitem__)
    return f"; {most} alone not as trained" if off[most] > _PART_OFF and off[next_to_it] < _PART_SAME else ""


class Local:
    """The adapter in PEFT: its log-probabilities, also under faults, and the tokens that an engine means."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name, self.size = model.active_adapter, 0
        self.layers = adapter_layers(model, self.name)  # another adapter may be on more
        self._read: dict[str, Tensor] = {}  # tokens of prompts, which are the same under each of a hundred faults

    def _tokens(self, prompt: Any) -> Tensor:
        key = repr(prompt)
        if key not in self._read:
            is_text = isinstance(prompt, str)
            text = prompt
            if not is_text:
                text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            # A template writes the special tokens itself.
            self._read[key] = self.tokenizer(text, add_special_tokens=is_text, return_tensors="pt")["input_ids"][0]
        return self._read[key]

    @torch.no_grad()
    def run(self, prompts: Sequence[Any], fault: Fault = _AS_TRAINED) -> Tensor:
        """Compute log-probabilities of the next token, float32 [prompts, vocabulary]."""
        rows, texts = [], [self._tokens(prompt) for prompt in prompts]
        step = max(1, _TOKENS // max(map(len, texts)))  # texts of a batch
        with self._under(fault):
            for first in range(0, len(texts), step):
                batch = texts[first : first + step]
                # Padding on the right is after everything that a token attends to, so it needs no mask.
                ids = pad_sequence(batch, batch_first=True).to(self.model.device)  # [texts, longest]
                logits = self.model(input_ids=ids).logits  # [texts, longest, vocabulary]
                for tokens, of_text in zip(batch, logits, strict=True):
                    rows.append(of_text[len(tokens) - 1].float().log_softmax(-1).cpu())
        self.size = len(rows[0])
        return torch.stack(rows)

    @property
    def routed(self) -> bool:
        """Whether the base has experts."""
        return any(f".{EXPERTS}." in name for name, _ in self.model.named_parameters())

    @cached_property
    def _fused(self) -> dict[str, Any]:
        """The layers that are fused experts."""
        return {name: layer for name, layer in self.layers.items() if getattr(layer, "num_experts", 1) > 1}

    @contextmanager
    def _under(self, fault: Fault) -> Iterator[None]:
        """Put a fault on PEFT's layers while the block runs."""
        layers = self.layers.values()
        with restoring("scaling", layers), restoring("lora_variant", layers), ExitStack() as stack:
            if fault.verdict == "ignored":
                stack.enter_context(disabled(self.model))
            for name, factor in fault.factors.items():
                layer = self.layers[name]
                layer.scaling = layer.scaling | {self.name: layer.scaling[self.name] * factor}
                if not (factor and fault.magnitudes):  # DoRA rescales a layer's output even if B A is zero
                    layer.lora_variant = {}
            if fault.experts is not None:
                ending, change = fault.experts
                for name, layer in self._fused.items():
                    if name.endswith(ending):
                        self._change_experts(layer, change, stack)
            yield

    def _change_experts(self, layer: Any, change: Change, stack: ExitStack) -> None:
        """Change A and B of fused experts until the stack is closed."""
        a, b = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
        kept = LoraWeights(a.data, b.data)
        # PEFT's fused matrices -> [experts, r, d_in] and [experts, d_out, r], which are changed, and back.
        changed = change(kept.of_experts(layer.num_experts)).fused()
        for parameter, old, new in zip((a, b), kept, changed, strict=True):
            stack.callback(setattr, parameter, "data", old)
            parameter.data = new

    def observe(self, ask: Ask | None, prompts: Sequence[Any]) -> Tensor:
        """Read answers of an engine, [prompts, vocabulary]; NaN where there is none, or a text of several tokens."""
        answers = torch.full((len(prompts), self.size), torch.nan)
        if not ask:
            return answers
        for row, prompt in zip(answers, prompts, strict=True):
            answer = ask(prompt)
            if not isinstance(answer, Mapping):
                raise LoraInitError(
                    f"served= and {{base}} return {type(answer).__name__}, expected token: log-probability.", base=...
                )
            for token, value in answer.items():
                number = int(token) if is_whole(token) else self._numbers.get(token)
                if number is not None and 0 <= number < self.size:
                    row[number] = value  # a row is a view of `answers`
        return answers

    @cached_property
    def _numbers(self) -> dict[str, int | None]:
        """Numbers of tokens by their text, as tokenizers and engines write it; None where several have it."""
        numbers: dict[str, int | None] = {}
        for number, name in enumerate(self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))):
            # As the vocabulary has it, the same with SentencePiece's sign for a space, and as text.
            for text in {str(name), str(name).replace("▁", " "), self.tokenizer.decode([number])}:
                numbers[text] = None if text in numbers else number
        return numbers

    def faults(self) -> list[Fault]:
        """List what engines are known to do to an adapter; first, to leave it out."""
        names = [*self.layers]
        faults = [Fault("ignored", "what answers is the base", dict.fromkeys(names, 0.0))]
        for factors, reasons in self._other_scalings().items():
            reason = " or ".join(reasons)
            if len({*factors}) == 1:
                reason = f"by {factors[0]:.3g}, {reason}"
            faults.append(Fault("scaled", reason, dict(zip(names, factors, strict=True))))
        part_factors = [0.0]
        if self._fused:  # some engines scale the experts alone
            part_factors += [2.0, 0.5]
        parts = self._parts()
        for factor in part_factors:
            for part, members in parts.items():
                faults.append(self._of_part(part, members, factor))
        if any(layer.lora_variant for layer in self.layers.values()):
            faults.append(Fault("a part is missing", "the magnitudes of DoRA", dict.fromkeys(names, 1.0), False))
        if self._fused:
            first = next(iter(self._fused.values()))
            halves = is_concatenated(first.get_base_layer())
            for (verdict, reason), experts in misreadings(first.num_experts, halves).items():
                faults.append(Fault(verdict, reason, {}, experts=experts))
        return faults

    def _of_part(self, part: str, members: Collection[str], factor: float) -> Fault:
        """Describe one part by a factor, all others as trained."""
        factors = dict.fromkeys(self.layers, 1.0) | dict.fromkeys(members, factor)
        if not factor:
            return Fault("a part is missing", part, factors)
        return Fault("scaled", f"{part} by {factor:g}", factors)

    def _parts(self) -> dict[str, set[str]]:
        """Collect layers by kind and by module, and experts by block, where these are not all layers."""
        parts = {kind: {*layers.values()} for kind, layers in layer_grid(self.layers).by_kind.items()}
        for name in self.layers:
            parts.setdefault(name.split(".")[-2:][0], set()).add(name)
        for name in self._fused:
            parts.setdefault(name.rpartition(".")[0], set()).add(name)
        return {part: members for part, members in parts.items() if len(members) < len(self.layers)}

    def _other_scalings(self) -> dict[tuple[float, ...], list[str]]:
        """Compute the factors by which layers are off where an engine reads scalings wrongly, each with its reasons."""
        config = self.model.active_peft_config
        rooms = {max(layer.r[self.name] for layer in self.layers.values()), *VLLM_RANKS}
        factors: dict[str, list[float]] = {}  # by reason, of each layer
        for layer in self.layers.values():
            rank, alpha, scaling = layer.r[self.name], layer.lora_alpha[self.name], layer.scaling[self.name]
            served = {
                "alpha doubled": 2 * scaling,
                "rsLoRA not read": alpha / rank,
                "lora_alpha over each layer's own rank": config.lora_alpha / rank,
                "lora_alpha / r everywhere, patterns not read": config.lora_alpha / config.r,
            }
            for room in rooms:
                served[f"ranks padded to {room} without their scaling"] = scaling * min(1, rank / room)
            for reason, other in served.items():
                factor = other / scaling if scaling else 1.0  # no factor makes anything of a layer that adds nothing
                # Rounded, so that reasons with the same result are one fault.
                factors.setdefault(reason, []).append(round(factor, 4))
        reasons: dict[tuple[float, ...], list[str]] = {}
        for reason, of_layers in factors.items():
            reasons.setdefault(tuple(of_layers), []).append(reason)
        reasons.pop((1.0,) * len(self.layers), None)  # which is as trained
        return reasons
