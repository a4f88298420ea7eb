"""Whether an engine serves an adapter as it was trained: its log-probabilities against those that PEFT computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_init.adapters.directory import AdapterDirectory
from lora_init.adapters.peft_model import adapter_layers, check_plain, with_adapter
from lora_init.errors import LoraInitError
from lora_init.files import is_as_written, read_json
from lora_init.layers.grid import layer_grid
from lora_init.layers.running import disabled, restoring
from lora_init.packages import check_takes
from lora_init.serving.engines import VLLM_RANKS
from lora_init.serving.experts import Change, misreadings
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
# A weight of a part as trained is this close to one, in an answer of which that much is the adapter.
_PART_OFF, _PART_FITS = 0.2, 0.0
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
    wrong = next((one for one in prompts if not isinstance(one, (str, list))), None)
    if wrong is not None:
        raise LoraInitError(f"prompts has {wrong!r}: expected texts, or chats as lists of messages.")


def verify(
    directory: str | Path, model: Any, tokenizer: Any, prompts: Sequence[Any], served: Ask, base: Ask | None = None,
    *, n: int = 32,
) -> Verification:  # fmt: skip
    """Find out what an engine serves under the name of an adapter.

    First the `n` prompts are chosen that the adapter changes most. The engine's log-probabilities of the token after
    them are compared with what PEFT computes for the adapter; if they differ, also for the base, for other scalings,
    and for the adapter without one kind of layer. The distance of the served base from the local one is
    the noise; a fault with a smaller effect is not seen. Cost: two forward passes for each prompt, and for each of the
    `n` about 40 if something is wrong, or 150 if there are experts.

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
    if not prompts or n < 1:
        raise LoraInitError(f"verify needs a prompt, and got {len(prompts)}, of which {{n}} are asked.", n=n)
    check_plain(model, "verify()")
    for ask, name in ((served, "served="), (base, "base=")):
        if ask is not None or name == "served=":
            check_takes(ask, name, "prompt")
    with with_adapter(model, adapter) as peft_model:
        local = Local(peft_model.eval(), tokenizer)
        faults = local.faults()
        plain, trained = local.run(prompts, faults[0]), local.run(prompts)
        likeliest = trained.topk(min(_TOP, trained.shape[1])).indices
        effects = (trained - plain).gather(1, likeliest).square().mean(1)
        # Where the text ends next, some engines tell nothing.
        ends = [torch.isin(rows.argmax(1), torch.tensor(tokenizer.all_special_ids)) for rows in (plain, trained)]
        chosen = effects.where(~(ends[0] | ends[1]), -1 / (1 + effects)).argsort(descending=True, stable=True)[:n]
        plain, trained, asked = plain[chosen], trained[chosen], [prompts[i] for i in chosen.tolist()]
        effect = float(effects[chosen].mean().sqrt())
        observed, at_base = (local.observe(ask if effect else None, asked) for ask in (served, base))
        run = partial(local.run, asked)
        diagnosis = diagnose(observed, at_base, plain, trained, effect, faults, run, local.routed)
    diagnosis = replace(diagnosis, text="; ".join((diagnosis.text, *note_of(adapter.path))))
    lost = read_json(adapter.path / RECORD_FILE).get("error") if is_as_written(adapter.path, RECORD_FILE) else None
    if not lost or not isinstance(lost, float) or diagnosis.verdict != AS_TRAINED:
        return diagnosis
    text = diagnosis.text.replace(AS_TRAINED, f"{AS_EXPORTED}, which lost {lost:.2%} of the update", 1)
    return replace(diagnosis, verdict=AS_EXPORTED, text=text)


def diagnose(
    observed: Tensor,  # log-probabilities of what is served as the adapter, [prompts, vocabulary]; NaN: not told
    at_base: Tensor,  # the same of the served base
    plain: Tensor,  # of the local base
    trained: Tensor,  # of the local base with the adapter
    effect: float,  # root mean square of the difference of the two on the likeliest tokens
    faults: Sequence[Fault],  # what may have gone wrong; the first is that the base is served
    run: Callable[[Fault], Tensor],  # computes log-probabilities under a fault, if the adapter does not fit
    routed: bool = False,  # whether a router may send tokens elsewhere in another precision
) -> Verification:
    """Return the first verdict that holds of what an engine told, compared with what PEFT computes."""
    told = ~observed.isnan()
    answered, values, measured = int(told.any(1).sum()), int(told.sum()), not bool(at_base.isnan().all())
    noise, residual, from_base = _distance(at_base, plain), _distance(observed, trained), _distance(observed, plain)

    def verdict(name: str, reason: str) -> Verification:
        known = f"noise {noise:.2g}" if measured else "noise not known: the base was not asked"
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
    allowed = _NOISES * noise + _LEFT * effect if measured else _LEFT_WITHOUT_NOISE * effect
    if residual > (allowed / 2 if measured else allowed):  # small faults leave less than what is allowed
        of_effect = _LEFT_BY_FAULT * max(effect, from_base)
        by_list = allowed if measured else of_effect
        fitting = _fault_that_fits(observed, faults, run, 0.7 * residual, by_list, max(by_list, of_effect))
        if fitting is not None:
            fault, distance = fitting
            return verdict(
                fault.verdict,
                f"{fault.reason}; {distance:.2g} off from it, {residual:.2g} off from the adapter as trained",
            )
    if how_far := _as_trained(observed, trained, allowed, measured and routed):
        return verdict(AS_TRAINED, how_far)
    fits = max(0.0, 1 - (residual / from_base) ** 2)
    what = _in_words(fits, measured) + (_other_part(observed, plain, faults, run) if fits > _PART_FITS else "")
    return verdict("another adapter", f"{what}; {fits:.0%} fits, {residual:.2g} off")


def _in_words(fits: float, measured: bool) -> str:
    near, more = "this one compressed, or with layers changed or in other places", ", or another base or template"
    return (near if fits > 0.5 else "that of another task, say") + ("" if measured else more)


def _as_trained(observed: Tensor, trained: Tensor, allowed: float, routed: bool) -> str:
    """Describe how far off what fits is; of a router all but a few prompts have to fit. Empty if it does not."""
    each, residual = (observed - trained).square().nanmean(1).sqrt(), _distance(observed, trained)
    most, several = float(each.nanquantile(_PROMPTS)), int((each > allowed).sum())
    others = f"{several} of {int((~each.isnan()).sum())} prompts, whose tokens a router may have sent elsewhere"
    if residual <= allowed:
        return f"{residual:.2g} off"
    return f"{most:.2g} off, but for {others}" if routed and most <= allowed else ""


def _distance(observed: Tensor, local: Tensor) -> float:
    return float((observed - local).square().nanmean().sqrt())


def _variance_within_prompts(values: Tensor, told: Tensor) -> float:
    """Compute the variance around each prompt's mean, of prompts with two values or more; NaN if there is none."""
    rows = values.where(told, torch.nan)[told.sum(1) > 1]
    return float((rows - rows.nanmean(1, keepdim=True)).square().nanmean())


def _fault_that_fits(
    observed: Tensor,
    faults: Sequence[Fault],
    run: Callable[[Fault], Tensor],
    most: float,  # distance above which a fault fits hardly better than the adapter as trained
    by_list: float,  # distance up to which a fault of the list explains what is served
    by_search: float,  # the same for a factor that is searched
) -> tuple[Fault, float] | None:
    """Return the first fault that explains what is served, or else the closest factor on all scalings if it does."""
    closest = math.inf
    for fault in faults:
        distance = _distance(observed, run(fault))
        if distance <= min(by_list, most):
            return fault, distance
        closest = min(closest, distance)

    fitting = _factor_that_fits(observed, "", [*faults[0].factors], run)
    if fitting[0] is None or fitting[1] > min(by_search, most, closest):
        experts = next((one.factors for one in faults if one.reason == EXPERTS), {})
        fitting = _factor_that_fits(observed, f"{EXPERTS} ", [name for name, by in experts.items() if not by], run)
        by_search = max(by_list, _LEFT_BY_FAULT * most)  # nine tenths of what is off, since experts do less than all
    factor, distance = fitting
    return (factor, distance) if factor is not None and distance <= min(by_search, most, closest) else None


def _factor_that_fits(
    observed: Tensor, what: str, names: Sequence[str], run: Callable[[Fault], Tensor]
) -> tuple[Fault | None, float]:
    """Find the closest factor on the scalings of layers, and how far what is served is from it; None for about 1."""
    if not names:
        return None, math.inf

    def scaled(power: float) -> Fault:
        return Fault("scaled", f"{what}by {2**power:.3g}", dict.fromkeys(names, 2**power))

    @cache
    def square(power: float) -> float:
        return _distance(observed, run(scaled(power))) ** 2

    lowest = min((power / 2 for power in range(-9, 10)), key=square)
    for step in (0.5, 0.25, 0.125):  # to the lowest point of the parabola through three, and again nearer to it
        before, at, after = (square(lowest + way * step) for way in (-1, 0, 1))
        lowest += step * max(-1.0, min(1.0, 0.5 * (before - after) / max(before - 2 * at + after, 1e-12)))
    is_factor = 0.2 < abs(lowest) < 6  # less than 15 % is noise, as a rule
    return scaled(lowest) if is_factor else None, math.sqrt(square(lowest))


def _other_part(observed: Tensor, plain: Tensor, faults: Sequence[Fault], run: Callable[[Fault], Tensor]) -> str:
    """Name the one part of the blocks that is not as trained where all others are; empty if that is not so.

    What is served is taken for a sum of what each part does alone, and those as trained have a weight of about one.
    """
    names = [*faults[0].factors]
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[-2:][0], []).append(name)
    if len(parts) < 2:
        return ""
    told = ~observed.isnan()
    effects = [(run(Fault("", "", {n: float(n in part) for n in names})) - plain)[told] for part in parts.values()]
    weights = torch.linalg.lstsq(torch.stack(effects, 1).double(), (observed - plain)[told].double()[:, None]).solution
    wrong = [part for part, weight in zip(parts, weights[:, 0].tolist(), strict=True) if abs(weight - 1.0) > _PART_OFF]
    return f"; {wrong[0]} alone not as trained" if len(wrong) == 1 else ""


class Local:
    """The adapter in PEFT: its log-probabilities, also under faults, and the tokens that an engine means."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer, self.layers = model, tokenizer, adapter_layers(model)
        self.name, self.size = model.active_adapter, 0

    @torch.no_grad()
    def run(self, prompts: Sequence[Any], fault: Fault = _AS_TRAINED) -> Tensor:
        """Compute log-probabilities of the next token, float32 [prompts, vocabulary]."""
        rows, texts, template = [], [], self.tokenizer.apply_chat_template
        for prompt in prompts:
            chat = not isinstance(prompt, str)
            text = template(prompt, add_generation_prompt=True, tokenize=False) if chat else prompt
            texts.append(self.tokenizer(text, add_special_tokens=not chat, return_tensors="pt")["input_ids"][0])
        step = max(1, _TOKENS // max(map(len, texts)))
        with self._under(fault):
            for batch in (texts[i : i + step] for i in range(0, len(texts), step)):
                # Padding on the right is after everything that a token attends to.
                logits = self.model(input_ids=pad_sequence(batch, batch_first=True).to(self.model.device)).logits
                ends = (logits[i, len(text) - 1] for i, text in enumerate(batch))
                rows += [end.float().log_softmax(-1).cpu() for end in ends]
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
        layers, off = self.layers.values(), fault.verdict == "ignored"
        with restoring("scaling", layers), restoring("lora_variant", layers), ExitStack() as stack:
            if off:
                stack.enter_context(disabled(self.model))
            for name, factor in fault.factors.items():
                layer = self.layers[name]
                layer.scaling = layer.scaling | {self.name: layer.scaling[self.name] * factor}
                if not (factor and fault.magnitudes):
                    layer.lora_variant = {}
            end, change = fault.experts or ("", None)
            fused = {name: layer for name, layer in self._fused.items() if change and name.endswith(end)}
            for layer in fused.values():
                parts = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
                kept = LoraWeights(*(part.data for part in parts))
                new = change(kept.of_experts(layer.num_experts)).fused()  # type: ignore[misc]
                for part, old, changed in zip(parts, kept, new, strict=True):
                    stack.callback(setattr, part, "data", old)
                    part.data = changed
            yield

    def observe(self, ask: Ask | None, prompts: Sequence[Any]) -> Tensor:
        """Read answers of an engine, [prompts, vocabulary]; NaN where there is none, or a text of several tokens."""
        told = torch.full((len(prompts), self.size), torch.nan)
        for row, prompt in zip(told, prompts, strict=True):
            answer = ask(prompt) if ask else {}
            if not isinstance(answer, Mapping):
                raise LoraInitError(
                    f"served= and {{base}} return {type(answer).__name__}, expected token: log-probability.", base=...
                )
            for token, value in answer.items():
                number = token if isinstance(token, int) else self._numbers.get(token)
                if number is not None and 0 <= number < self.size:
                    row[number] = value
        return told

    @cached_property
    def _numbers(self) -> dict[str, int | None]:
        """Numbers of tokens by their text, as tokenizers and engines write it; None where several have it."""
        numbers: dict[str, int | None] = {}
        for number, name in enumerate(self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))):
            for text in {str(name), str(name).replace("▁", " "), self.tokenizer.decode([number])}:
                numbers[text] = None if text in numbers else number
        return numbers

    def faults(self) -> list[Fault]:
        """List what engines are known to do to an adapter; first, to leave it out."""
        names = [*self.layers]
        faults = [Fault("ignored", "what answers is the base", dict.fromkeys(names, 0.0))]
        for factors, same in self._other_scalings().items():
            alike = f"by {factors[0]:.3g}, " if len({*factors}) == 1 else ""
            faults.append(Fault("scaled", alike + " or ".join(same), dict(zip(names, factors, strict=True))))
        parts = self._parts()
        for factor in (0.0, 2.0, 0.5) if self._fused else (0.0,):
            for part, members in parts.items():
                by = {name: factor if name in members else 1.0 for name in names}
                missing = Fault("a part is missing", part, by)
                faults.append(Fault("scaled", f"{part} by {factor:g}", by) if factor else missing)
        if any(layer.lora_variant for layer in self.layers.values()):
            faults.append(Fault("a part is missing", "the magnitudes of DoRA", dict.fromkeys(names, 1.0), False))
        if self._fused:
            first = next(iter(self._fused.values()))
            halves = bool(getattr(first.get_base_layer(), "is_concatenated", True))
            for (verdict, reason), experts in misreadings(first.num_experts, halves).items():
                faults.append(Fault(verdict, reason, {}, experts=experts))
        return faults

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
        config, names = self.model.active_peft_config, [*self.layers]
        rank, alpha, scaling = (
            {name: getattr(layer, what)[self.name] for name, layer in self.layers.items()}
            for what in ("r", "lora_alpha", "scaling")
        )
        served = {
            "alpha doubled": {name: 2 * scaling[name] for name in names},
            "rsLoRA not read": {name: alpha[name] / rank[name] for name in names},
            "lora_alpha over each layer's own rank": {name: config.lora_alpha / rank[name] for name in names},
            "lora_alpha / r everywhere, patterns not read": dict.fromkeys(names, config.lora_alpha / config.r),
        }
        for most in {max(rank.values()), *VLLM_RANKS}:
            padded = {name: scaling[name] * min(1, rank[name] / most) for name in names}
            served[f"ranks padded to {most} without their scaling"] = padded
        reasons: dict[tuple[float, ...], list[str]] = {}
        for reason, of in served.items():
            reasons.setdefault(tuple(round(of[name] / scaling[name], 4) for name in names), []).append(reason)
        reasons.pop((1.0,) * len(names), None)  # which is as trained
        return reasons
