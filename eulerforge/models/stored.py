"""Frozen weights that stay in the half precision of their file where a run multiplies in fp32.

A processor without bf16 products multiplies fp32 alone at speed. Most checkpoints are bf16, and every bf16 number is an
fp32 one: the weight is widened as it is multiplied, so a run has the bits of one whose weights are fp32, at half their
memory, and they stay the file's own pages. So it is with linear layers and with fused experts (``models/experts.py``).
Embeddings, output head, norms, routers and a vision tower are widened once, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from eulerforge.config.schema import LoadPrecision
from eulerforge.errors import ModelError, first_line
from eulerforge.models import processor
from eulerforge.models.dequantized import linear
from eulerforge.models.device import DTYPE_NAMES, DTYPES, base_dtype
from eulerforge.models.experts import StoredExperts, is_known, store
from eulerforge.models.room import fresh_rooms, room
from eulerforge.models.sizes import gib
from eulerforge.models.soundness import dtypes_of, is_quantized, most_common

HALVES = {name: DTYPES[name] for name in processor.HALVES}
CALL_THEIR_LAYERS = {
    "llama", "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text",
    "gemma3", "gemma3_text", "mixtral",
}  # fmt: skip
"""Types of transformers' models that never read the weight of a linear layer."""
FEW_ROWS = 16
"""Of so many samples at most a new token takes as long as reading the weight."""
PART = 1 << 20
"""Numbers that are widened and multiplied at a time: 4 MiB of fp32 stay in the cache, and the calls cost little."""


class StoredLinear(nn.Linear):
    """A linear layer whose weight (out, in) is stored in half precision and multiplied in fp32."""

    compute_dtype = torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.compute_dtype:
            # model code that casts its states to the weight's precision would lose what fp32 was chosen for
            raise ModelError(
                f"a layer that multiplies in fp32 got {str(x.dtype).removeprefix('torch.')} states: the model's code"
                " casts them to the precision that the weight is stored in",
                key="model.load_precision.mode",
                hint="--set model.load_precision.mode=fp32 stores what it multiplies",
            )
        return self._in_parts(x) if self.reads_more(x) else linear(self, x)

    def reads_more(self, x: torch.Tensor) -> bool:
        """Whether the product takes as long as reading the weight: of one new token each of a few samples.

        Never of a loss, whose rows have two tokens at least: its bits are those of the whole product.
        """
        one_each = x.ndim > 2 and x.shape[-2] == 1 and x.numel() <= FEW_ROWS * self.in_features
        plain = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return one_each and plain

    def dequantize_into(self, out_OI: torch.Tensor) -> None:
        """Write the weight into ``out_OI``."""
        out_OI.copy_(self.weight.detach())

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a tensor of its own."""
        return self.weight.detach().to(dtype)

    def plain(self) -> None:
        """Make this an ``nn.Linear`` that stores what it multiplies, in place, its parameter the same object."""
        self.weight.data = self.dequantized(torch.float32)
        self.__class__ = nn.Linear  # type: ignore[assignment]

    def _in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """Widened and multiplied while it is in the cache: half the bytes of an fp32 weight are read."""
        made = x.new_empty(*x.shape[:-1], self.out_features)
        count = max(1, PART // self.in_features)
        for first in range(0, self.out_features, count):
            rows = slice(first, min(first + count, self.out_features))
            part_PI = room("stored part", (rows.stop - first, self.in_features), x).copy_(self.weight[rows])
            made[..., rows] = F.linear(x, part_PI, None if self.bias is None else self.bias[rows])
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stored={self.weight.dtype}"


class StoredOps:
    """Reading a stored weight, and the plain layer that a merge puts in its place."""

    def dequantize(self, module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.dequantized(torch.float32)
        return weight

    @torch.no_grad()
    def plain(self, module: Any, weight: torch.Tensor) -> nn.Module:
        module.plain()
        module.weight.copy_(weight)
        return module  # type: ignore[no-any-return]


@attrs.frozen(kw_only=True)
class Storage:
    """How a base is stored: ``dtype`` is that of its linear layers, ``loaded`` the one in which all of it is loaded.

    ``by_file`` is whether nobody asked for it: then only what loses nothing is stored so.
    """

    dtype: torch.dtype
    loaded: torch.dtype
    by_file: bool

    def after(self, model: Any) -> Storage | None:
        """What to load in instead, where ``model``, loaded so or on the meta device, computed numbers of its own in it.

        As Gemma 3 does with the scale of its embedding, which is no weight: they would be rounded.
        """
        saved = model.state_dict().keys()
        rounds = any(buffer.dtype == self.loaded for name, buffer in model.named_buffers() if name not in saved)
        return attrs.evolve(self, loaded=torch.float32) if rounds and self.loaded != torch.float32 else None


def storage_of(precision: LoadPrecision, folder: Path, device: torch.device) -> Storage | None:
    """How a base is loaded and stored; None where it stores what it multiplies.

    ``auto`` stores so on the CPU alone: on a card a weight would be widened in a pass of its own. A base to quantize is
    loaded so, and what of it is not quantized is stored so.

    Raises:
        ModelError: a file's header cannot be read.
    """
    if precision.mode == "fp32" or base_dtype(precision, device) != torch.float32:
        return None
    counts, by_file = dtypes_of(folder), precision.mode not in HALVES
    file_dtype = most_common(counts)
    dtype = file_dtype if by_file else HALVES[precision.mode]
    if by_file and (device.type != "cpu" or dtype not in HALVES.values() or is_quantized(folder)):
        return None
    # of a file of two precisions the wider one would be rounded on the way
    loaded = torch.float32 if file_dtype == dtype and len(counts) > 1 else dtype
    return Storage(dtype=dtype, loaded=loaded, by_file=by_file)


@attrs.frozen(kw_only=True)
class StoredReport:
    """How many weights are stored in ``dtype``, their bytes there, and how many are not: they would lose, or train.

    ``fused`` of them are tensors that hold all experts of a layer, the others those of linear layers. ``found`` is how
    many were, before a strategy that reads weights itself was asked. ``loaded`` is the precision in which all was
    loaded at first, ``experts`` the bytes of fused ones that are fp32, because their layout is not known.
    """

    dtype: torch.dtype
    found: int
    count: int
    fused: int
    bytes: int
    left: int
    experts: int
    loaded: torch.dtype
    trained: int = 0

    def __bool__(self) -> bool:
        """Whether there is anything to say: of a quantized base all layers may be quantized."""
        return bool(self.found or self.left)

    def line(self) -> str:
        """What a run says."""
        half = DTYPE_NAMES[self.dtype]
        counts = {"linear layers": self.count - self.fused, "fused expert tensors": self.fused}
        named = [f"{count} {name}" for name, count in counts.items() if count] or ["0 linear layers"]
        said = f"weights: {' and '.join(named)} stay {half}"
        if self.count:
            said += f", {gib(self.bytes)} instead of {gib(2 * self.bytes)}, and are multiplied in fp32"
        # a strategy may also have copied layers
        if (read := self.found - self.count - self.trained) > 0:
            said += f"; {read} are fp32, because the strategy may read them itself"
        said += f"; {self.left} hold numbers that it cannot hold and are fp32" if self.left else ""
        said += f"; {self.trained} train, in fp32" if self.trained else ""
        return said + (f"; fused experts are fp32, {gib(self.experts)}" if self.experts else "")

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        linear = self.count - self.fused
        counts = {"layers": linear, "fused_experts": self.fused, "left": self.left, "trained": self.trained}
        return {"dtype": DTYPE_NAMES[self.dtype], **counts}


@torch.no_grad()
def keep_stored(model: Any, storage: Storage, *, all_wide: bool = False) -> StoredReport:
    """Store the decoder's frozen weights in ``storage.dtype``, in place, and all else in fp32.

    A tied weight stays tied. On the meta device every weight is taken as one that loses nothing. With ``all_wide`` none
    is stored so, as of a model without weights that is to be quantized.
    """
    layers = getattr(model.get_decoder(), "layers", ()) if hasattr(model, "get_decoder") else ()
    left = 0
    for module in [module for layer in layers for module in layer.modules()] if not all_wide else ():
        linear = type(module) is nn.Linear
        if not (linear or is_known(module)):
            continue
        for parameter in [module.weight] if linear else module.parameters(recurse=False):
            was, weight = parameter.data, parameter.data.to(storage.dtype)
            loses = weight.dtype != was.dtype and not was.is_meta and not torch.equal(weight.to(was.dtype), was)
            if storage.by_file and loses:
                left += 1
                continue
            parameter.data = weight
            if linear:
                module.__class__ = StoredLinear
            else:
                store(module, torch.float32)
    kept = {id(weight) for weight in _stored_weights(model)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in kept and tensor.dtype in HALVES.values():
            tensor.data = tensor.data.float()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.dtype = torch.float32
    modules = [module for layer in layers for module in layer.modules()]
    others = [module for module in modules if not isinstance(module, (nn.modules.conv._ConvNd, StoredExperts))]
    unknown = [p for module in others for p in module.parameters(recurse=False) if p.ndim == 3]
    return StoredReport(
        dtype=storage.dtype,
        found=len(kept),
        **_counts(model),
        left=left,
        experts=sum(p.nbytes for p in unknown),
        loaded=storage.loaded,
    )


def _stored_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (StoredLinear, StoredExperts)):
            for parameter in module.parameters(recurse=False):
                # neither a bias nor a quantized weight
                if parameter.ndim > 1 and parameter.is_floating_point() and parameter.dtype != module.compute_dtype:
                    yield parameter


def _counts(model: nn.Module) -> dict[str, int]:
    weights = list(_stored_weights(model))
    return {
        "count": len(weights),
        "fused": sum(weight.ndim == 3 for weight in weights),
        "bytes": sum(weight.nbytes for weight in weights),
    }


def refuses_stored(model: Any) -> str | None:
    """Why a model cannot compute with stored weights, because its code reads them; None where it can.

    The tests hold that the families of ``CALL_THEIR_LAYERS`` do; any other, and code that comes with a model, is asked
    with a pass over two tokens.
    """
    if type(model).__module__.startswith("transformers.") and str(model.config.model_type) in CALL_THEIR_LAYERS:
        return None
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad(), fresh_rooms():
            model.get_decoder()(input_ids=ids, use_cache=False)
    except Exception as error:  # noqa: BLE001 - whatever it raises, it would raise in the run
        return first_line(error)
    return None


def widen(model: nn.Module, names: Iterable[str] | None = None) -> int:
    """Make modules plain, in fp32: those of the parameters ``names``, or all; gives back how many weights were stored.

    A quantized weight stays as it is.
    """
    chosen = None if names is None else {name.rpartition(".")[0] for name in names}
    before = sum(1 for _ in _stored_weights(model))
    for path, module in list(model.named_modules()):
        if chosen is None or path in chosen:
            if isinstance(module, StoredLinear):
                module.plain()
            elif isinstance(module, StoredExperts):
                module.widen()
    return before - sum(1 for _ in _stored_weights(model))


def widen_trained(model: nn.Module, names: Iterable[str], report: StoredReport) -> StoredReport:
    """Make plain what a phase trains, and count what is still stored, which an injection may have changed too."""
    trained = widen(model, names)
    return attrs.evolve(report, **_counts(model), trained=trained)  # type: ignore[arg-type]
