"""The only place that uses what other libraries do not call public; a test holds that.

Each function has one use. If a new release breaks one, its test names it.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from types import CellType, FunctionType
from typing import Any

# torch.compile, activation checkpointing and FSDP's first version put a module with one of these names around another.
# They are no classes that could be asked for without importing dynamo or FSDP, a second each; since torch 2.0.
# Without them a wrapped model keeps the prefix in its names: take the new one from `state_dict()`.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def version_of(tensor: Any) -> int:
    """Read how often a tensor was changed in place; 0 in inference mode, where it is not counted.

    torch counts it for autograd and shows it nowhere else; since 0.4. Without it a tensor that was changed in place
    counts as read already: decline to share rows between layers instead.
    """
    if tensor.is_inference():
        return 0
    return int(tensor._version)


def goes_backward() -> bool:
    """Return whether this runs inside a backward pass, where checkpointing runs layers again.

    A caller's `forward` may go backward by itself, so a flag around our own call is not enough; torch has no public
    name for it; since 1.10. Without it rows of checkpointed layers count twice there: have the hooks set a flag.
    """
    import torch

    return bool(torch._C._current_graph_task_id() != -1)


def hook_of(module: Any) -> Any:
    """Read accelerate's hook of a module; None if it has none.

    `accelerate.hooks` adds and removes hooks and returns none; since 0.10. Without it offloaded weights are on the
    meta device: look for where `add_hook_to_module` puts the hook.
    """
    return getattr(module, "_hf_hook", None)


def forget_loader(accelerator: Any, loader: Any) -> None:
    """Let accelerate forget one loader that it has prepared: checkpoints of training would keep its place.

    `free_memory` forgets all; since 0.5. Without it a trainer's checkpoint has one more loader: look for what
    `prepare_data_loader` appends to.
    """
    # Of an accelerator without the list nothing is forgotten, and nothing is raised: see above what that means.
    loaders = getattr(accelerator, "_dataloaders", [])
    loaders[:] = [other for other in loaders if other is not loader]  # in place, since accelerate holds this list


def cells_of(function: FunctionType) -> list[tuple[CellType, Any]]:
    """Return the cells of the variables that a function has from outside, with their values; empty ones are left out.

    Of Python's data model; since 3.8 values of cells can be set. Without it a collator that counts in such a variable
    counts what a pass has read.
    """
    cells = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one: its variable was not set yet
            cells.append((cell, cell.cell_contents))
    return cells


def has_added_adapter(model: Any) -> bool:
    """Return whether `add_adapter` of transformers or diffusers has put layers into a model.

    `active_adapters()` raises without them, and where PEFT is too old for it; since 4.33 and 0.20. Without it such
    a model is refused, as one inside a PeftModel is: look for what `add_adapter` sets.
    """
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def is_gated(module: Any) -> bool:
    """Return whether a module is one of transformers' fused experts, whose first matrix may have a gate's half."""
    return hasattr(module, "_apply_gate")


def apply_gate(module: Any, up: Any) -> Any:
    """Compute what the second matrix of transformers' fused experts reads, from what the first one gives.

    Each model has its own gate, and only its module's `forward` calls it; since 5.0. Without it experts are no targets:
    look at `transformers.integrations.moe`.
    """
    return module._apply_gate(up)


def has_plain_loss(model: Any) -> bool:
    """Return whether a decoder of transformers has a plain cross entropy as its own loss, as BartForCausalLM has.

    `loss_type` says of them what it says of decoders that shift their labels; since 4.46. What tells them apart is
    which names their forward uses. If it breaks, gradients are taken at the wrong tokens: compare the loss with both.
    """
    # These three compute it elsewhere. Of 119 heads of transformers 5 that were built tiny no other loss is plain.
    if type(model).__name__ in ("XLMWithLMHeadModel", "FlaubertWithLMHeadModel", "ProphetNetForCausalLM"):
        return True
    forward = inspect.unwrap(type(model).forward)
    names = {*forward.__code__.co_names, *forward.__code__.co_varnames}
    shifts = any("shift" in name or name == "loss_function" for name in names)
    return type(model).__module__.startswith("transformers.") and "CrossEntropyLoss" in names and not shifts


def written_in(made: Any) -> list[str]:
    """Return the modules in which a class, or a function and all that it wraps, was written; empty where none says.

    A patch or a decorator may have the name and the module of what it replaces, by functools.wraps; its globals and
    `__wrapped__` are Python's own. If it breaks, a loss of somebody's own gets a rate that was measured for another.
    """
    if isinstance(made, type):
        return [made.__module__]
    modules = [getattr(made, "__globals__", {}).get("__name__", "")]
    if hasattr(made, "__wrapped__"):
        modules += written_in(made.__wrapped__)
    return modules


def usage_error() -> Any:
    """Return the class of all errors in the words of a command line: of click, or of typer's copy of it.

    typer has its own copy since 0.27, and only `BadParameter` is public. Without it a misspelt option prints a box.
    """
    from typer import BadParameter

    for kind in BadParameter.__mro__:
        if kind.__name__ == "UsageError":
            return kind
    raise LookupError("typer.BadParameter is no UsageError")
