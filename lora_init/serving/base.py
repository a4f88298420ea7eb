"""The base model of an adapter: the names and widths of its layers, and the adapter merged into its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_init.errors import LoraInitError, first_line
from lora_init.files import read_json, write_json
from lora_init.layers.rows import check_peft
from lora_init.layers.targets import PREFIX, Target, file_prefixes, is_conv1d
from lora_init.loading.checkpoint import INDEX_FILE, Stored, as_saved, checkpoint_of, find_tensors
from lora_init.loading.models import CLASS_OF_TASK, TASK_TYPES, kind_of, on_meta, task_and_class
from lora_init.serving.trained import LINEAR, Layer, Trained, ends_of

# Tensors of a merged model go into files of about this size, and no more of them are in memory at once.
SHARD_BYTES = 2 * 10**9
# Weights in all forms, and what describes the plain model or an adapter.
_NOT_COPIED = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".index.json", "README.md",
    "adapter_config.json",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # the one directory of a tokenizer


@dataclass(frozen=True, eq=False)
class Base:
    """A base model without its weights."""

    source: str  # directory or hub id
    model: Any  # the model on the meta device
    widths: Mapping[str, tuple[int, int]]  # d_in and d_out of each linear layer and embedding by name, in model order
    # what the adapter's `target_parameters` selects, by the name in its file, in model order
    parameters: Mapping[str, Target]

    @property
    def config(self) -> Any:
        """Its configuration; of a multimodal model the configuration of the part which reads text."""
        return self.model.config.get_text_config()

    @property
    def architecture(self) -> str:
        """The class that the checkpoint was saved as."""
        return str((self.model.config.architectures or [type(self.model).__name__])[0])

    @property
    def embeddings(self) -> tuple[str, str]:
        """Names of the input embedding and of the output embedding, empty where there is none."""
        names = {id(module): name for name, module in self.model.named_modules()}
        try:
            first, last = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        except NotImplementedError:  # models of two towers, such as CLIP
            return "", ""
        return names.get(id(first), ""), names.get(id(last), "")

    @property
    def embedding_weights(self) -> tuple[str, str]:
        """Names of the weights of both, as parameters have them."""
        first, last = self.embeddings
        return f"{first}.weight", f"{last}.weight"

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one tensor."""
        return bool(getattr(self.model.config, "tie_word_embeddings", False)) and all(self.embeddings)


def read_config(source: str, trust_remote_code: bool = False) -> Any:
    """Read the configuration of a base model."""
    import transformers

    if not source:
        raise LoraInitError("the adapter names no base model. Name it by {base}.", base=...)
    try:
        name = str(Path(source).expanduser())
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise LoraInitError(
                f"the base model {source!r} needs code that comes with it. Read that code, then pass "
                "{trust_remote_code}.",
                trust_remote_code=True,
            ) from error
        raise LoraInitError(
            f"the base model {source!r} cannot be read: {first_line(error)} Name it by {{base}}.", base=...
        ) from error


def read_base(source: str, trained: Trained, for_engine: bool = False, trust_remote_code: bool = False) -> Base:
    """Build the base model on the meta device, in the class that the adapter's names are of, see `build_base`."""
    config = read_config(source, trust_remote_code)
    made = build_base(trained.config, source, config, for_engine, trust_remote_code)
    base = Base(source, made, widths_of(made), parameters_of(made, trained.config))
    layer = _first_misfit(trained, base)
    if layer is None:
        return base
    raise LoraInitError(
        f"the adapter's layer {layer!r} is not in {type(made).__name__} {source!r} with its widths. Is it the base "
        "that it was trained on ({base})? Load it with PEFT, which brings older names into the model's form, and save "
        "it again.",
        base=...,
    )


def build_base(
    adapter: Mapping[str, Any], source: str, config: Any, for_engine: bool = False, trust_remote_code: bool = False
) -> Any:
    """Build a base model without weights, in the one class in which it would be loaded for an adapter.

    That is the class of the adapter's task, or the one that the adapter names; else, and for an engine, the class that
    the checkpoint was saved as. Which class has the adapter's names does not count. Code that comes with it is reached
    only through the Auto class of the task.
    """
    import transformers

    saved, task = str((config.architectures or [""])[0]), adapter.get("task_type")
    first = "" if for_engine else _class_for(adapter, saved, config)
    names = [first, saved, "AutoModel"]
    if trust_remote_code and getattr(config, "auto_map", None):
        names = [task_and_class(source, config, task if task in TASK_TYPES else None)[1]]
    for name in dict.fromkeys(names):  # each once, in this order
        if is_for(name, config) is False:
            continue
        model = on_meta(getattr(transformers, name, None), config, trust_remote_code)
        if model is not None:
            return model
    raise LoraInitError(
        f"{source!r} is of a class that transformers does not know. Name the base by {{base}}.", base=...
    )


def _class_for(adapter: Mapping[str, Any], saved: str, config: Any) -> str:
    """Return the class of the adapter's task, or the one that it names; `saved` is the checkpoint's."""
    task, mapping = adapter.get("task_type"), adapter.get("auto_mapping") or {}
    if not task:
        return str(mapping.get("base_model_class"))
    kind = kind_of(saved, bool(getattr(config, "is_encoder_decoder", False)))
    if kind and kind[0] == task:  # more exact than the task's class, which is an AutoModel
        return saved
    return CLASS_OF_TASK.get(str(task), "")


def config_class_of(name: str) -> Any:
    """Return the class of the configuration that models of a class of transformers have; None for another name."""
    import transformers

    return getattr(getattr(transformers, name, None), "config_class", None)


def is_for(name: str, config: Any) -> bool | None:
    """Return whether a class of transformers is for models of a configuration; None for a name of no such class."""
    kind = config_class_of(name)
    if kind is None:
        return None
    # A class for text takes the text part of a multimodal model's configuration.
    return isinstance(config, kind) or isinstance(config.get_text_config(), kind)


def parameters_of(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Target]:
    """Find what `target_parameters` selects as PEFT does, by the names in the adapter's file, in model order.

    A weight of two dimensions counts as one expert; a linear layer's is adapted as the layer is. Refuses experts whose
    A and B the PEFT that is installed, or the one that made the adapter, exchanges.
    """
    wanted, fused, linear = config.get("target_parameters") or (), [], {}
    for owner, module in model.named_modules():
        for ending, parameter in module.named_parameters(recurse=False):
            name = f"{owner}.{ending}"
            if parameter.dim() not in (2, 3) or not any(f".{name}".endswith(f".{key}") for key in wanted):
                continue
            if type(module) is nn.Linear:  # some routers are linear layers that return more
                linear[owner] = Target(name, "Linear", module.in_features, module.out_features)
                continue
            experts, d_out, d_in = (1, *parameter.shape)[-3:]
            if parameter.dim() == 3:
                # The PEFT that is installed, and the one that made the adapter.
                check_peft(name, module)
                check_peft(name, module, str(config.get("peft_version") or ""))
                if getattr(module, "is_transposed", False):  # [experts, d_in, d_out], as GPT-OSS has them
                    d_out, d_in = d_in, d_out
            fused.append(Target(name, type(module).__name__, d_in, d_out, experts=experts))
    prefixes, by_file_name = file_prefixes(fused), {}
    for target in fused:
        by_file_name[prefixes[target.name].removeprefix(PREFIX)] = target
    return linear | by_file_name


def widths_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return d_in and d_out of each linear layer and embedding by name, in model order."""
    widths = {}
    module: Any
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear)) or is_conv1d(module):
            d_out, d_in = module.weight.shape
            if is_transposed(module):
                d_in, d_out = d_out, d_in
            widths[name] = d_in, d_out
    return widths


def is_transposed(module: nn.Module) -> bool:
    """Return whether the weight is [d_in, d_out]."""
    return isinstance(module, nn.Embedding) or is_conv1d(module)


def _first_misfit(trained: Trained, base: Base) -> str | None:
    """Return the first layer of the adapter that is not in the model, or of other widths there."""
    there = dict(base.widths)
    for name, target in base.parameters.items():
        there[name] = target.in_features, target.out_features
    layers = {name: layer.widths for name, layer in trained.layers.items()}
    for name, tensors in trained.unnamed.items():
        end_of_a, end_of_b = ends_of(tensors)
        a, b = tensors[end_of_a], tensors[end_of_b]
        layers[name] = (a.shape[-1], b.shape[0]) if a.dim() == b.dim() == 2 else (0, 0)  # which no layer has
    for name, widths in layers.items():
        if there.get(name) != widths:
            return name
    return None


def with_changed_copies(trained: Trained, base: Base, start: Trained | None = None) -> Trained:
    """Keep the weights of the base that its checkpoint has otherwise: rows of new tokens, set before training.

    So it keeps those that cannot be compared, since the checkpoint is not here, quantized or no safetensors. A weight
    that `start` changed is first put back: what the adapter learned is for the plain base.
    """
    sources: dict[str, MergeSource] = {}
    if trained.copies:
        sources = {name: MergeSource(**vars(stored)) for name, stored in checkpoint_of(base.source)[1].items()}
    # A checkpoint has tied embeddings once, under either name.
    tied = base.embedding_weights if base.tied else ()
    changed = {}
    for key, copied in trained.copies.items():
        layer = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        plain, rounding = copied, torch.zeros(1)
        if start is not None and copied.is_floating_point():
            plain, rounding = _put_back(copied, start.layers[layer])
        names = (*_pieces(base, f"{layer}.weight", sources), f"{layer}.weight", *tied)
        own = next((sources[name].read() for name in names if name in sources), None)
        if own is None or own.shape != plain.shape or not _is_near(own.to(plain.dtype), plain, rounding):
            changed[key] = plain.to(copied.dtype)
    return replace(trained, others={**trained.others, **changed})


def bring_checkpoint(merge_into: str | None, trained: Trained) -> None:
    """Download the base of a merge, with which the adapter's copies of its weights are compared."""
    if merge_into is not None and trained.copies:
        find_tensors(merge_into)


def _put_back(weight: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """Add to a weight what its start took off it, in float32; return by how much each number may be rounded, too."""
    a, b = layer.a.float(), layer.b.float()
    taken, most = layer.scaling * (b @ a), abs(layer.scaling) * (b.abs() @ a.abs())  # [d_out, d_in]
    if layer.ends != LINEAR:  # an embedding is [d_in, d_out]
        taken, most = taken.T, most.T
    plain = weight.float() + taken
    step = max(torch.finfo(tensor.dtype).eps for tensor in (weight, layer.a, layer.b))
    return plain, 4 * step * (plain.abs() + most)


def _is_near(weight: Tensor, other: Tensor, rounding: Tensor) -> bool:
    return bool(((weight.float() - other.float()).abs() <= rounding).all())


@dataclass(frozen=True)
class MergeSource(Stored):
    """Where a tensor of a merged model comes from.

    An output embedding that was tied and no longer is has another name in the checkpoint.
    """

    parameter: str = ""  # the model's parameter that it is, or is a part of, if the adapter changes that; else empty
    expert: int | None = None  # which expert of the parameter it is; None for all
    # what transformers calls it when it brings the parameter, or one expert alone, into the form of checkpoints;
    # empty where the checkpoint has the model's form
    piece: str = ""


def plan_merge(base: Base, trained: Trained) -> dict[str, MergeSource]:
    """Find what each tensor of a merged model is made from, and refuse now what could not be merged later."""
    if trained.config.get("alora_invocation_tokens"):
        raise LoraInitError("aLoRA leaves tokens before its invocation as they are, and merged it would not. Use PEFT.")
    sources = {name: MergeSource(**vars(stored)) for name, stored in find_tensors(base.source).items()}
    layers = {}
    for name, layer in trained.layers.items():
        layers[name if layer.experts else f"{name}.weight"] = layer  # experts are named by their parameter
    wanted = [*layers, *(key.removeprefix(PREFIX) for key in trained.others)]
    problem = _untie(base, trained, wanted, sources)
    for name in wanted:
        pieces = _pieces(base, name, sources)
        # The first problem is reported, unless a shape is wrong: that one comes with what to do about it.
        problem = problem or _why_not_merged(base, name, layers.get(name), pieces)
        if pieces and name not in layers:
            _check_shape(base, name, trained.others[PREFIX + name])
        sources |= pieces
    if any(layer.magnitude is not None and layer.ends != LINEAR for layer in layers.values()):
        problem = problem or "DoRA on an embedding gives lengths to columns"
    if problem is not None:
        raise LoraInitError(
            f"{problem}, so it is not merged here. PEFT's merge_and_unload() on the loaded model does it."
        )
    return sources


def _why_not_merged(base: Base, name: str, layer: Layer | None, pieces: Mapping[str, MergeSource]) -> str | None:
    """Return why a parameter cannot be merged into the tensors of the checkpoint that it is in; None if it can."""
    if not pieces:
        return f"{base.source!r} has no tensor {name!r} in its checkpoint, or in another form"
    # DoRA's lengths are of the rows that the model has, not of a piece in another form.
    if layer is not None and layer.magnitude is not None and next(iter(pieces.values())).piece:
        return f"DoRA: {base.source!r} has {name!r} in another form in its checkpoint"
    return None


def _untie(base: Base, trained: Trained, wanted: Collection[str], sources: dict[str, MergeSource]) -> str | None:
    """Find a source for each of two tied embeddings if the adapter changes one; return what prevents that."""
    first, last = pair = base.embedding_weights
    names: dict[int, set[str]] = {}  # all names of each parameter
    for name, parameter in base.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    for same in names.values():
        changed = sorted(same.intersection(wanted))
        if changed and len(same) > 1 and not same.issubset(pair):
            raise LoraInitError(
                f"{changed[0]!r} is also {', '.join(sorted(same - {changed[0]}))} in {type(base.model).__name__}. "
                "Files of this model have one weight for all, so it is not merged. Serve model and adapter with PEFT."
            )
    if not base.tied or not {first, last} & set(wanted):
        return None
    for name, other in ((first, last), (last, first)):
        if other in sources:
            sources.setdefault(name, sources[other])
    if not {first, last} <= sources.keys():
        return f"{base.source!r} has its tied embeddings under other names in its checkpoint"
    if trained.config.get("ensure_weight_tying"):
        return "ensure_weight_tying keeps two adapters equal"
    return None


def _check_shape(base: Base, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that was trained whole in another size, as embeddings are after new tokens."""
    shape, how = base.model.get_parameter(name).shape, "Load it so (num_labels=)"
    if name.removesuffix(".weight") in base.embeddings:
        how = "After new tokens: call resize_token_embeddings() on the base"
    if tensor.shape != shape:
        raise LoraInitError(
            f"{name!r} is {list(tensor.shape)} in the adapter and {list(shape)} in {base.source!r}. {how}, save "
            "it, and merge into that."
        )


def _pieces(base: Base, name: str, sources: Mapping[str, MergeSource]) -> dict[str, MergeSource]:
    """Find the tensors of the checkpoint that a parameter of the model is in; none if that is not known."""
    try:
        parameter = base.model.get_parameter(name)
        whole = of_one = as_saved(base.model, name, parameter)
        if parameter.dim() > 2:  # what becomes of one expert tells whether experts are stored one by one
            of_one = as_saved(base.model, name, parameter[:1])
    except (AttributeError, KeyError, ValueError, RuntimeError, NotImplementedError):
        return {}  # no such parameter, or a conversion that needs more than it to be undone
    if whole.get(name) is parameter or not all(piece in sources for piece in whole):
        # Saved as the model has it. The model may also read experts transposed, where shapes tell.
        shapes = [parameter.shape]
        if parameter.dim() == 3:
            shapes.append(parameter.mT.shape)
        stored = sources.get(name)
        if not stored or stored.shape not in shapes:
            return {}
        return {name: replace(stored, parameter=name)}
    pieces: dict[str, MergeSource] = {}
    for piece, tensor in of_one.items():
        places = _places(piece, parameter, whole[piece].shape, tensor.shape)
        if places is None:
            return {}
        for place, expert in places.items():
            if place not in whole or sources[place].shape != whole[place].shape:
                return {}
            pieces[place] = replace(sources[place], parameter=name, expert=expert, piece=piece)
    return pieces


def _places(
    piece: str, parameter: Tensor, of_all: Sequence[int], of_one: Sequence[int]
) -> dict[str, int | None] | None:
    """Name the tensors of a checkpoint that a piece of a parameter is in, each with its expert, None for all experts.

    `of_all` is the piece's shape for the whole parameter, `of_one` its shape for expert 0 alone. None if neither
    is a form in which experts are stored.
    """
    if parameter.dim() != 3:
        return {piece: None}
    if of_all == of_one:  # one tensor for each expert; this is expert 0
        head, _, tail = piece.rpartition(".0.")
        return {f"{head}.{expert}.{tail}": expert for expert in range(len(parameter))}
    if of_all != (len(parameter), *of_one[1:]):
        return None
    return {piece: None}


def write_merged(directory: Path, trained: Trained, base: Base, sources: Mapping[str, MergeSource]) -> None:
    """Write the merged model with its tokenizer: tensor by tensor, each in the type that it had."""
    folder = next(iter(sources.values())).file.parent
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, directory / path.name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, directory / _TEMPLATES)
    changed = {source.parameter for source in sources.values()}
    config = read_json(folder / "config.json")
    # An adapter of one of two tied embeddings makes them differ.
    if base.tied and not changed.isdisjoint(base.embedding_weights):
        config["tie_word_embeddings"] = False
    write_json(directory / "config.json", config)
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    # Tensors stand file by file, so that a file is opened once; an embedding that was untied comes last.
    for path, group in groupby(sources.items(), key=lambda item: item[1].file):
        with safe_open(path, framework="pt") as file:
            for name, source in group:
                shard[name] = merged(file.get_tensor(source.name), source, trained, base)
                is_last = len(shard) + len(index) == len(sources)
                if is_last or sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
                    # The number of the shards is known only at the end; the index names each file.
                    part = f"model-{len(set(index.values())) + 1:05}.safetensors"
                    save_file(shard, directory / part, metadata={"format": "pt"})
                    index |= dict.fromkeys(shard, part)
                    shard = {}
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": index})


def merged(weight: Tensor, source: MergeSource, trained: Trained, base: Base) -> Tensor:
    """Change a tensor of the checkpoint as the adapter says, in its own type; of experts, one after another."""
    name = source.parameter
    if not name:
        return weight
    fused = base.model.get_parameter(name).dim() == 3
    if fused and source.expert is None:
        for expert, part in enumerate(weight):  # in place: no second copy of all experts
            part.copy_(merged(part, replace(source, expert=expert), trained, base))
        return weight
    trained_whole = trained.others.get(PREFIX + name)
    if trained_whole is not None:
        tensor = trained_whole
        if source.expert is not None:
            tensor = tensor[source.expert : source.expert + 1]  # [experts, ...] -> [1, ...]
    else:
        tensor = _change(weight, source, trained, base)
        if fused:
            tensor = tensor[None]  # [d_out, d_in] -> [1, d_out, d_in]
    # What follows is linear in the tensor, so a change goes the same way as a weight.
    if source.piece:
        tensor = as_saved(base.model, name, tensor)[source.piece]
    if tensor.dim() > weight.dim():  # the weight is of this expert alone
        tensor = tensor[0]
    if fused and tensor.shape != weight.shape:  # the checkpoint has experts transposed
        tensor = tensor.mT
    if trained_whole is None:
        tensor = weight.float() + tensor
    return tensor.to(weight.dtype).contiguous()


def _change(weight: Tensor, source: MergeSource, trained: Trained, base: Base) -> Tensor:
    """Compute what the adapter adds to a weight of the model or of one expert, in float32 and in its form."""
    name, owner = source.parameter, source.parameter.rpartition(".")[0]
    layer, module = trained.layers.get(name) or trained.layers[owner], base.model.get_submodule(owner)
    a, b = layer.a, layer.b
    if layer.experts:
        a, b = a[source.expert or 0], b[source.expert or 0]
    change = layer.scaling * (b.float() @ a.float())  # [d_out, d_in]
    transposed = is_transposed(module) and not layer.experts
    if base.model.get_parameter(name).dim() == 3:
        transposed = getattr(module, "is_transposed", False)
    if layer.magnitude is not None:  # DoRA: each row of the sum gets its length
        plain = weight.float()
        if transposed:
            plain = plain.T
        summed = plain + change
        change = summed * (layer.magnitude.float()[:, None] / torch.linalg.norm(summed, dim=1, keepdim=True)) - plain
    return change.T if transposed else change
