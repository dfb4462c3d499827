"""Whether and how the documents of a packed row are kept apart in this model, and the proof that they are.

Notable: a backbone declares it (``BackboneSpec.isolation``), this room installs it and takes it out again, bit for bit.
Attention is switched to ``training/attention.py`` through transformers' own setting; a module that mixes tokens by
other means gets torch's forward hooks, which gather a packed row's documents into right-padded rows and scatter the
result back. No module is replaced, so no parameter changes its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import nn

from eulerforge.api import BackboneAdapter, BackboneSpec, SequenceMixerFinder
from eulerforge.data.batches import Batch
from eulerforge.data.packing import Segments
from eulerforge.errors import PluginError, RunError
from eulerforge.training.attention import NAME, can_import, describe, heads_of, kernel_for, register
from eulerforge.training.forward import hidden_states

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_LENGTHS = ((9, 14, 9), (14, 9, 9))
"""Tokens of the documents of two rows, where x has 9 and y has 14: x y x and y x z.

Half as many cost a quarter less, and in bf16 a leak of one layer alone came close to what is allowed.
"""
PROBE_PREFIX = 5
"""Tokens with which z begins as x does."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""How far a hidden state of an untouched document may move, as a share of its own length."""


@attrs.frozen(kw_only=True, eq=False)
class Isolation:
    """How packed documents are kept apart; ``reason`` says why they are not, and is empty when they are.

    ``attention`` is the kernel in words, ``mixers`` the number of modules that mix tokens by other means, ``mixing``
    how documents are kept apart there, and ``pads`` whether that computes padding. ``goes_on`` says that documents can
    go on from a common prefix. ``leak`` is what ``prove`` measured.
    """

    attention: str = ""
    mixers: int = 0
    mixing: str = ""
    pads: bool = False
    goes_on: bool = False
    reason: str = ""
    leak: float | None = None
    _undo: tuple[Callable[[], None], ...] = ()

    @property
    def possible(self) -> bool:
        return not self.reason

    def remove(self) -> None:
        """Put the model back as it was."""
        for undo in self._undo:
            undo()

    def line(self, packing: str) -> str:
        """What a run says at its start."""
        if packing == "off":
            return "rows are padded, sorted by length" + (f": {self.reason}" if self.reason else "")
        gathered = f"; {self.mixers} modules that mix tokens otherwise: {self.mixing}" if self.mixers else ""
        return f"rows are packed ({packing}); attention: {self.attention}{gathered}"

    def to_json(self, packing: str) -> dict[str, Any]:
        return {
            "packing": packing,
            "attention": self.attention,
            "mixers": self.mixers,
            "mixing": self.mixing,
            "reason": self.reason,
            "leak": self.leak,
        }


def isolate(
    model: Any,
    spec: BackboneSpec,
    adapter: BackboneAdapter,
    *,
    keep_attention: bool = False,
    device: torch.device | None = None,
) -> Isolation:
    """Make the model ready for packed rows, as its backbone says that it can be.

    Args:
        spec: of the backbone that covers the model's family fully.
        keep_attention: the preset names an attention implementation; transformers keeps documents apart in it.
        device: where the run trains, which a model on the meta device does not say; None: where the model is.

    Raises:
        PluginError: the backbone declares ``gather``, and its adapter cannot say where.
    """
    if spec.isolation == "none":
        return Isolation(reason=f"backbone {spec.name} does not say how documents in one row are kept apart")
    device = device or model.device
    undo: list[Callable[[], None]] = []
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    attention, goes_on = f"transformers' {before}, as model.attn_implementation says", False
    if not keep_attention:
        decoder.set_attn_implementation(register())
        if decoder.config._attn_implementation != NAME:
            return Isolation(reason=f"{type(model).__name__} does not use transformers' attention interface")
        undo.append(lambda: decoder.set_attn_implementation(before))
        kernel, why = _kernel(model, device)
        attention, goes_on = describe(kernel, why), kernel == "matmul" and device.type == "cpu"
    hooks = [_Gather(module) for module in _mixers(model, spec, adapter)]
    undo += [hook.remove for hook in hooks]
    if not hooks:
        return Isolation(attention=attention, goes_on=goes_on, undo=tuple(undo))
    fast = _border_kernels(device)
    mixing = "flash-linear-attention with documents' borders" if fast else "documents gathered into padded rows"
    return Isolation(attention=attention, mixers=len(hooks), mixing=mixing, pads=not fast, undo=tuple(undo))


def _kernel(model: Any, device: torch.device) -> tuple[str, str]:
    """The kernel that the layers will ask for in training, by the model's config; and why no better one."""
    text = model.config.get_text_config()
    return kernel_for(
        device,
        model.dtype,
        heads_of(model.config),
        dropout=getattr(text, "attention_dropout", None) or 0.0,
        softcap=getattr(text, "attn_logit_softcapping", None),
    )


def _mixers(model: Any, spec: BackboneSpec, adapter: BackboneAdapter) -> Sequence[nn.Module]:
    if spec.isolation != "gather":
        return []
    if not isinstance(adapter, SequenceMixerFinder):
        raise PluginError(
            f"backbone {spec.name} declares isolation 'gather', but its adapter has no find_sequence_mixers",
            hint="--set data.packing=off; report it to the plugin's author",
        )
    return [
        layer.get_submodule(path)
        for layer in adapter.find_transformer_layers(model)
        for path in adapter.find_sequence_mixers(layer)
    ]


class _Gather:
    """Two hooks on a module: a packed row's documents go in as right-padded rows, and come out as the packed row.

    With kernels that know documents' borders the borders go in instead.
    """

    def __init__(self, module: nn.Module) -> None:
        self._segments: Segments | None = None
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        segments: Segments | None = kwargs.pop("segments", None)
        self._segments = None
        if segments is None:
            return args, kwargs
        packed = args[0] if args else kwargs["hidden_states"]
        if _border_kernels(packed.device) and segments.shape[0] == 1:
            return args, {**kwargs, "cu_seq_lens_q": segments.cu_seqlens, "seq_idx": segments.document_of}
        self._segments = segments
        rows = segments.gather(packed.flatten(0, 1))
        return ((rows, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": rows})

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        segments, self._segments = self._segments, None
        if segments is None:
            return output
        return segments.scatter(output).unflatten(0, segments.shape)


def _border_kernels(device: torch.device) -> bool:
    """Whether both fast kernels of Gated DeltaNet are there, in a transformers that gives them the borders."""
    return device.type == "cuda" and _knows_borders()


@cache
def _knows_borders() -> bool:
    import transformers
    from transformers.utils import is_causal_conv1d_available, is_flash_linear_attention_available

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < (5, 20) or not (is_flash_linear_attention_available() and is_causal_conv1d_available()):
        return False
    # a package that was built for another torch is there and cannot be imported
    return can_import("causal_conv1d") and can_import("fla.ops.gated_delta_rule")


@torch.no_grad()
def leak(model: Any, *, seed: int = 0, shares: bool = False) -> float:
    """How far a hidden state of a document moves at most when what lies around it in its row is another thing, as a
    share of its own length; zero is what it should be.

    Of two rows, x y x and y x z, each place has a document that lies elsewhere too, beside others: what any document
    takes from any other one, before or behind it, is not the same in both places, and what all documents of a row
    take from the whole of it is not the same in both rows. What follows the hidden states mixes no tokens. Each state
    is measured by its own length: one large channel of all states would hide a leak of the last layers.
    With ``shares`` x and z are computed once more, as documents that go on from what they begin with alike.
    """
    was_training = model.training
    model.eval()
    try:
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(seed))
        x, y, z = ids.split(PROBE_LENGTHS[0], 1)
        z[:, :PROBE_PREFIX] = x[:, :PROBE_PREFIX]
        first_row, second_row = (x, y, x), (y, x, z)
        after: tuple[int | None, ...] = ()
        if shares:  # a third pass would cost as much as each of the two, whose tokens are few
            second_row += (*x.split((PROBE_PREFIX, x.shape[1] - PROBE_PREFIX), 1), z[:, PROBE_PREFIX:])
            after = (None, None, None, None, 3, 3)
        x_first, y_second, x_third = _probe_states(model, first_row)
        y_first, x_second, z_third, *shared = _probe_states(model, second_row, after)
        pairs = [(x_first, x_third), (x_first, x_second), (y_first, y_second), (z_third, z_third)]
        if shares:
            prefix, x_rest, z_rest = shared
            pairs += [(x_first, torch.cat([prefix, x_rest], 1)), (z_third, torch.cat([prefix, z_rest], 1))]
        return float(torch.stack([_moved(*pair) for pair in pairs]).max())  # NaN stays NaN, in z too
    finally:
        model.train(was_training)


def _moved(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """The largest distance of two tokens' states, (B, T, H) each, as a share of the first one's length."""
    length = one.norm(dim=-1).clamp_min(torch.finfo(one.dtype).tiny)
    return ((one - two).norm(dim=-1) / length).max()


def prove(model: Any, *, shares: bool = False) -> float:
    """The leak of a model, which is within tolerance, with prefixes that documents share too if ``shares``.

    Raises:
        RunError: a document sees another one, or the model's code takes no packed row.
    """
    try:
        found = leak(model, shares=shares)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        raise RunError(
            f"a packed row cannot be computed: {type(error).__name__}: {error}",
            key="data.packing",
            hint="--set data.packing=off trains on padded rows; report it to the backbone's author",
        ) from error
    allowed = TOLERANCE.get(model.dtype, 1e-4)
    if not found <= allowed:
        raise RunError(
            f"packed documents see each other: replacing some moves the hidden states of another by {found:.2g} of"
            f" their length (allowed: {allowed:.0e})",
            key="data.packing",
            hint="--set data.packing=off trains on padded rows; report the leak to the backbone's author",
        )
    return found


def _probe_states(
    model: Any, documents: tuple[torch.Tensor, ...], after: tuple[int | None, ...] = ()
) -> tuple[torch.Tensor, ...]:
    """The hidden states of each document, (1, its tokens, H), of a packed row of documents of ids (1, tokens)."""
    ids, lengths = torch.cat(documents, 1), tuple(part.shape[1] for part in documents)
    segments = Segments(lengths=lengths, shape=(1, ids.numel()), device=model.device, after=after)
    starts = zip(segments.before, lengths, strict=True)
    positions = torch.cat([torch.arange(first, first + length) for first, length in starts])[None]
    nothing = ids.new_empty(0)
    batch = Batch(
        input_ids=ids.to(model.device),
        attention_mask=None,
        label_at=nothing,
        next_labels=nothing,
        tokens=ids.numel(),
        position_ids=positions.to(model.device),
        segments=segments,
    )
    return hidden_states(model, batch).float().split(lengths, 1)
