"""Which tokens of a batch count: padding, labels, and the two sides of an encoder-decoder."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_init.errors import LoraInitError, did_you_mean
from lora_init.layers.grid import cross_inputs
from lora_init.layers.targets import output_embedding
from lora_init.layers.wrappers import plain_names
from lora_init.third_party_internals import has_plain_loss

# The label of a token that has none: torch's cross entropy skips it, and so does every model of transformers.
IGNORED = -100


class NothingCountsError(LoraInitError):
    """No token of a batch counts, so the batch adds nothing."""


class _Mask(NamedTuple):
    """The tokens of a batch that count."""

    kept: Tensor  # bool [batch, length]
    numbers: Tensor | None  # of the tokens that count, in the flattened batch; None if all do


class TokenMasks:
    """Decide which rows of a layer's input are tokens that count.

    Which mask counts depends on the layer. Layers of a decoder, an encoder and the encoder of an encoder-decoder take
    `attention_mask`. Layers of the decoder of an encoder-decoder take `decoder_attention_mask`; without it, the mask
    follows from the labels; without these, all inputs count that the decoder is given. Layers that read the encoder's
    output, among them the keys and values of cross-attention, which are known by their names, take the encoder's mask;
    a decoder alone is given it as `encoder_attention_mask`. Inputs that have the shape of no mask count whole. So do
    the inputs of towers for images and sound, and of what joins them to the text model, whatever their shape.

    By labels, a pass without gradients counts the tokens that have a label: the answer as it stands in the text, since
    its inputs are described whatever is predicted from them. A pass with gradients counts the rows that the loss is
    computed from. In a causal language model these are the tokens *before* those with a label; anywhere else the two
    are the same. Padding before the first token of a row predicts it: that padding has a gradient, which counts.
    """

    def __init__(self, model: nn.Module, token_mask: str, gradients: bool = False) -> None:
        if token_mask not in ("attention", "labels"):
            raise LoraInitError(
                f"{{token_mask}}: {did_you_mean(str(token_mask), ('attention', 'labels'))}", token_mask=token_mask
            )
        self.by_labels = token_mask == "labels"
        self._gradients = gradients
        self._shifted = gradients and shifts_labels(model)
        self._encoder = encoder_of(model)
        self._encoder_prefix = "."  # no layer's name begins so
        for name, module in model.named_modules():
            if module is self._encoder:
                self._encoder_prefix = f"{name}."
                break
        self._cross_inputs = cross_inputs(plain_names(model))
        self._part_of = _text_parts(model)
        # A weak reference, to recognize the tensor by identity without keeping it in memory.
        self._encoder_output: weakref.ref[Tensor] | None = None
        self._main: _Mask | None = None
        self._predicting: _Mask | None = None
        self._encoder_rows: _Mask | None = None

    def hooks(self) -> list[Any]:
        """Register a hook that keeps what the encoder returns, and return its handle in a list, for its removal."""
        if self._encoder is None:
            return []
        return [self._encoder.register_forward_hook(self._keep_output)]

    def _keep_output(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]  # first in a tuple or ModelOutput
        self._encoder_output = weakref.ref(hidden)

    def start(self, batch: Any) -> None:
        """Take the masks of a batch; refuse those that are missing, of another shape, or keep no token."""
        if not isinstance(batch, Mapping):  # without names there are no masks, and every row counts
            batch = {}
        self._check_shapes(batch)
        labelled = _labelled(batch)
        if self._encoder is None:
            own = _as_mask(batch, "attention_mask")
            of_encoder = _as_mask(batch, "encoder_attention_mask")  # as a decoder alone is given it
        else:
            own = _decoder_mask(batch, labelled)
            of_encoder = _as_mask(batch, "attention_mask")
        # Labels in floats are of the classes of a sequence, not of tokens, though they may be as many.
        if self._gradients and labelled is not None and not batch["labels"].is_floating_point():
            _check_padding(labelled, own)
        if self._shifted and labelled is not None:
            # To the token before: its output predicts the label. The last token predicts nothing.
            labelled = nn.functional.pad(labelled[:, 1:], (0, 1))
        main = own
        if self.by_labels and labelled is not None:  # there are labels, as `_check_shapes` has found
            main = labelled
            if own is not None and own.shape == labelled.shape:
                main = labelled & own
        self._main = _numbered(main)
        self._predicting = self._with_gradient(batch, main, labelled)
        self._encoder_rows = _numbered(of_encoder)

    def _with_gradient(self, batch: Mapping[str, Any], main: Tensor | None, labelled: Tensor | None) -> _Mask | None:
        """Find the tokens that have a gradient: those that count, and those from which a label is predicted."""
        if self._shifted and main is not None and labelled is not None and labelled.shape == main.shape:
            return _numbered(main | labelled)
        if self._gradients and "start_positions" in batch:  # the softmax of an answer's ends is over padding, too
            return None
        return self._main

    def _check_shapes(self, batch: Mapping[str, Any]) -> None:
        """Compare the shapes of masks and labels with the shape of the tokens, before the model does."""
        labels, tokens = batch.get("labels"), batch.get("input_ids")
        got = "no labels"
        if isinstance(labels, Tensor):
            got = f"labels of shape {tuple(labels.shape)}"
        if self.by_labels and not (isinstance(labels, Tensor) and labels.dim() == 2):
            raise LoraInitError(
                f"{{token_mask}} needs a label for each token; got {got}. Use 'attention'.", token_mask="labels"
            )
        check_attention_mask(batch)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or "past_key_values" in batch:
            return
        per_token = self._encoder is None and (self.by_labels or self._shifted)
        # Labels of another kind, such as a class for each row, are for a model of one's own to take.
        if per_token and isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape != tokens.shape:
            raise LoraInitError(f"{got}, and input_ids {tuple(tokens.shape)}: a label for each token is needed.")

    def stop(self) -> None:
        """Forget the batch."""
        self._main = self._predicting = self._encoder_rows = self._encoder_output = None

    def rows(self, name: str, x: Tensor) -> Tensor:
        """Flatten a layer's input [..., d] to the rows [n, d] that count."""
        if x.dim() == 1:
            x = x[None]
        return rows_of(x, self.tokens(name, x))

    def tokens(self, name: str, x: Tensor, predicting: bool = False) -> Tensor | None:
        """Return the numbers of the rows of a layer's input [..., d] that count, or have a gradient; None if all do."""
        mask = self._mask_of(name, x, predicting)
        if mask is None or mask.numbers is None or not self._is_text(name):
            return None
        # A row for each token, or rows of something else, as of a pooled text: such inputs count whole.
        per_token = x.dim() == 3 and x.shape[:2] == mask.kept.shape
        flattened = x.dim() == 2 and x.shape[0] == mask.kept.numel()
        if per_token or flattened:
            return mask.numbers.to(x.device)
        return None

    def _mask_of(self, name: str, x: Tensor, predicting: bool) -> _Mask | None:
        """Choose the mask of a layer: the encoder's for what the encoder or a cross-attention reads of it."""
        mask = self._predicting if predicting else self._main
        # By identity first: encoder and decoder may be of equal length, so shapes do not tell them apart.
        from_encoder = self._encoder_output is not None and self._encoder_output() is x
        if from_encoder or name.startswith(self._encoder_prefix) or name in self._cross_inputs:
            return self._encoder_rows
        # What is neither by identity nor by name may still be of the encoder, as a projection between the two.
        if self._encoder is not None and (mask is None or x.shape[:2] != mask.kept.shape):
            return self._encoder_rows or mask
        return mask

    def _is_text(self, name: str) -> bool:
        # By the innermost part around a layer; "", the model itself, is always among the parts.
        while name not in self._part_of:
            name = name.rpartition(".")[0]
        return self._part_of[name]


def rows_of(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Flatten [..., d] to rows [n, d], all or those with the numbers `tokens`."""
    flat = x.reshape(-1, x.shape[-1])
    if tokens is None:
        return flat
    return flat.index_select(0, tokens)


def _text_parts(model: nn.Module) -> dict[str, bool]:
    """Find the parts of a model with a configuration, by name, and whether each works on the tokens of the text."""
    # The head works on tokens, too, and has no configuration of its own.
    output = output_embedding(model)
    text = getattr(getattr(model, "config", None), "text_config", None)
    if text is None:
        return {"": True}
    parts = {"": False}  # what joins the towers belongs to no part
    for name, module in plain_names(model).items():
        config = getattr(module, "config", None)
        if module is output or (name and hasattr(config, "model_type")):
            # Towers for images and sound have configurations of other classes.
            parts[name] = module is output or type(config) is type(text)
    return parts


def encoder_of(model: nn.Module) -> nn.Module | None:
    """Find the encoder of an encoder-decoder; None for every other model."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not is_encoder_decoder or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()  # type: ignore[operator]
    if isinstance(encoder, nn.Module) and encoder is not model:
        return encoder
    return None


def shifts_labels(model: nn.Module) -> bool:
    """Check whether a model's own loss predicts the label of a token from the tokens before it."""
    if encoder_of(model) is not None:
        return False
    kind = getattr(model, "loss_type", "")
    if has_plain_loss(model):
        return False
    if kind is None:  # the loss of transformers for heads that it has no other name for, such as GPT2LMHeadModel
        return output_embedding(model) is not None
    return kind.endswith(("ForCausalLM", "ForConditionalGeneration"))


def _numbered(kept: Tensor | None) -> _Mask | None:
    if kept is None:
        return None
    numbers = kept.flatten().nonzero().flatten()  # -> tokens
    if not len(numbers):
        raise NothingCountsError(
            f"the mask keeps 0 of {kept.numel()} tokens, so no layer received rows. Check attention_mask and labels."
        )
    if len(numbers) == kept.numel():  # nothing to select, so no input is copied
        return _Mask(kept, None)
    return _Mask(kept, numbers)


def _labelled(batch: Mapping[str, Any]) -> Tensor | None:
    """Find which tokens have a label, [batch, length]; None where labels are not of tokens."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != IGNORED
    return None


def check_attention_mask(batch: Mapping[str, Any]) -> None:
    """Refuse an attention mask that does not have one entry for each token."""
    mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
    # With a cache, the mask covers the cached tokens, too, and is longer than the tokens.
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or "past_key_values" in batch:
        return
    if isinstance(mask, Tensor) and mask.dim() <= 2 and mask.shape != tokens.shape:
        raise LoraInitError(
            f"attention_mask has shape {tuple(mask.shape)}, and input_ids {tuple(tokens.shape)}. "
            "Both need one entry for each token."
        )


def _as_mask(batch: Mapping[str, Any], key: str) -> Tensor | None:
    mask, tokens = batch.get(key), batch.get("input_ids")
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 3 and isinstance(tokens, Tensor) and mask.shape == tokens.shape:
        mask = mask.flatten(0, 1)  # multiple choice, [batch, choices, length]
    if mask.dim() == 2:
        return mask.bool()
    return None  # masks of other dimensions say which token attends to which, not which tokens exist


def _decoder_mask(batch: Mapping[str, Any], labelled: Tensor | None) -> Tensor | None:
    """Find which inputs of a decoder count; None if they are made of the encoder's."""
    mask = _as_mask(batch, "decoder_attention_mask")
    if mask is None and labelled is not None:  # up to the last label: what has none before it is read later on
        mask = labelled.flip(1).cumsum(1).flip(1) > 0
    if mask is not None:
        return mask
    for key in ("decoder_input_ids", "decoder_inputs_embeds"):
        inputs = batch.get(key)
        if isinstance(inputs, Tensor):
            return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)  # all of them
    return None


def _check_padding(labelled: Tensor, attended: Tensor | None) -> None:
    """Refuse labels where the attention mask is 0."""
    if attended is None or attended.shape != labelled.shape:
        return
    on_padding = int((labelled & ~attended).sum())
    if on_padding:
        raise LoraInitError(
            f"{on_padding} labels are on padding, where the attention mask is 0: the loss would count them, and "
            f"gradients leave padding out. Set these labels to {IGNORED}."
        )
