"""The peak memory of a run before a weight is read: its parts, and the largest batch that fits.

Notable: weights, adapters and optimizer are counted on the model that has shapes only; activations and workspace come
from one layer of each kind, computed on a few tokens (``training/onelayer.py``). What the process holds before is
measured. What the C library's heap holds beside the blocks that are alive is in ``training/heap.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eulerforge.data.packing import Layout
from eulerforge.models.device import base_dtype
from eulerforge.models.experts import WHOLE_BYTES, StoredExperts, is_known
from eulerforge.models.processor import QUANTIZED_MODES
from eulerforge.models.quantized import parameter_count, plan_of
from eulerforge.models.stored import StoredReport
from eulerforge.training.attention import heads_of
from eulerforge.training.document_blocks import kept_numbers
from eulerforge.training.estimate import Estimate
from eulerforge.training.forward import softcap_of
from eulerforge.training.heap import heap_bytes
from eulerforge.training.kernelcache import KEPT
from eulerforge.training.layerblocks import LayerBlocks
from eulerforge.training.limits import Room
from eulerforge.training.loss import block_rows, chunk_rows
from eulerforge.training.onelayer import CHUNK, TOKENS, kind_of, record_layer
from eulerforge.training.peak import LossBlocks, MicroBatch, step_peak
from eulerforge.training.recompute import SWITCH, enable_gradient_checkpointing, is_recomputed

if TYPE_CHECKING:
    from eulerforge.config.schema import RunConfig

KERNEL = 576 << 10
"""What one of oneDNN's compiled kernels of half-precision products takes, as many as are kept in runs over mixed rows.
Measured: with one kept instead of 192, what was alive in the heap of such a run was 103 to 106 MiB less."""
KERNELS_OF_ONE_LENGTH = 64
"""Kernels where all rows are of one length; such a run of three layers compiled 52."""
CUBLAS_WORKSPACE = 32 << 20
"""What cuBLAS takes on a Hopper card; less on others."""
MOST_ROWS = 1 << 20


class Estimator:
    """What a run of ``model`` would take; its parameters may be on the meta device.

    Args:
        model: injected, isolated where rows are packed, and in the phase that is to be estimated.
        layers: the decoder's, from the lowest on.
        device: where the run would train.
        file_dtype: the precision of the weights on the disk.
        ever_trained: names of the parameters that some phase trains.
        one_length: whether all rows have as many tokens, so that few kernels are compiled.
        room: what there was before the model was loaded; None: what there is now, it is not loaded yet.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        layers: Sequence[Any],
        *,
        layout: Layout,
        device: torch.device,
        file_dtype: torch.dtype,
        ever_trained: Sequence[str],
        one_length: bool = False,
        room: Room | None = None,
        stored: StoredReport | None = None,
    ) -> None:
        self.config, self.model, self.layers, self.layout = config, model, list(layers), layout
        self.device, self.file_dtype, self.stored = device, file_dtype, stored
        self.dtype = base_dtype(config.model.load_precision, device)
        self.kernels = KERNELS_OF_ONE_LENGTH if one_length else KEPT
        self._recorded: dict[Any, LayerBlocks] = {}
        parameters = dict(model.named_parameters())
        self.trained = 4 * sum(parameters[name].numel() for name in ever_trained)
        self.base_numbers = sum(parameter_count(p) for p in parameters.values()) - self.trained // 4
        self._layers(0)  # before the next line, so that what the libraries take for themselves is counted
        self.room = room or Room.now(device)

    def estimate(self, batch: MicroBatch, every: int) -> Estimate:
        """Of micro-batches of this size, each ``every``-th layer computed again (0: none)."""
        layers = self._layers(every)
        training = self.config.training
        accumulates = self._micro_batches > 1
        step = step_peak(layers, batch, self._loss(batch.tokens), accumulates=accumulates)
        optimizer = self.trained * 2 if training.optimizer == "adamw" else self.trained // 2
        weights, load, dequantized = self._weights(layers)
        activations = step.activations + self._probabilities(batch, every)
        kept = activations + step.gradients + optimizer
        return Estimate(
            base=self.room.base,
            weights=weights,
            adapters=self.trained,
            gradients=step.gradients,
            optimizer=optimizer,
            activations=activations,
            loss=step.loss,
            workspace=step.workspace + _rooms(layers, batch) + dequantized + self._of_libraries,
            heap=heap_bytes(kept, step, len(layers)) if self.device.type == "cpu" else 0,
            load=self.room.base + load,
            free=self.room.free,
            tokens=batch.tokens,
        )

    def _probabilities(self, batch: MicroBatch, every: int) -> int:
        """Bytes of those that attention keeps for its backward pass (``training/document_products.py``)."""
        text = self.model.config.get_text_config()
        if self.device.type != "cpu" or not batch.documents or getattr(text, "attn_logit_softcapping", None):
            return 0
        heads, key_heads, width = heads_of(self.model.config)
        windows = [
            getattr(text, "sliding_window", None) if kind == "sliding_attention" else None
            for index, kind in enumerate(self._layer_types)
            if kind != "linear_attention" and not is_recomputed(index, every)
        ]
        if every:
            windows.append(None)  # the one that is being computed again
        return sum(
            count * kept_numbers(batch.documents, heads, key_heads, width, window) * self.dtype.itemsize
            for window, count in Counter(windows).items()
        )

    @property
    def _layer_types(self) -> list[str]:
        return getattr(self.model.config.get_text_config(), "layer_types", None) or [""] * len(self.layers)

    def largest_batch(self, every: int, *, longest: int) -> int:
        """Tokens of the largest micro-batch of rows of ``longest`` tokens that fits; 0 when not even one row does."""

        def fits(rows: int) -> bool:
            return self.estimate(MicroBatch.of_rows(rows, longest, packed=self._packed), every).fits

        if not fits(1):
            return 0
        most = 1
        while most < MOST_ROWS and fits(2 * most):
            most *= 2
        least, most = most, 2 * most
        while most - least > max(1, least // 64):
            middle = (least + most) // 2
            least, most = (middle, most) if fits(middle) else (least, middle)
        return least * longest

    @property
    def _of_libraries(self) -> int:
        if self.device.type == "cuda":
            return CUBLAS_WORKSPACE
        return 0 if self.dtype == torch.float32 else self.kernels * KERNEL

    @property
    def _packed(self) -> bool:
        return self.layout.packing != "off"

    @property
    def _micro_batches(self) -> int:
        """Of a step, at least 2 as soon as there is more than one: then gradients are there from the start."""
        training = self.config.training
        if self.layout.packing != "flat":
            return training.grad_accum_steps
        rows = training.batch_size * training.grad_accum_steps
        return 1 if rows * self.layout.max_length <= self.layout.token_budget else 2

    def _weights(self, layers: Sequence[LayerBlocks]) -> tuple[int, int, int]:
        """Bytes of the weights in a step, at the peak of loading them, and of the largest that is made plain again."""
        read = self.base_numbers * self.file_dtype.itemsize
        plain = self.base_numbers * self.dtype.itemsize
        at_first = self.dtype if self.stored is None else self.stored.loaded
        loaded = self.base_numbers * at_first.itemsize
        # weights in the precision of their file are the file's own pages, for as long as one of them is used
        mapped = self.device.type == "cpu" and self.file_dtype == at_first
        # a card gets each weight in its last precision; the file is read into the main memory
        load = loaded if mapped or self.device.type == "cuda" else loaded + read
        precision = self.config.model.load_precision
        if precision.mode in QUANTIZED_MODES:
            plan = plan_of(self.model, precision, self.dtype)
            quantized = plan.quantized_bytes + plan.expert_bytes + plan.other_bytes
            quantized -= self.trained // 4 * self.dtype.itemsize
            one, fused = self._largest_weight, self._largest_fused
            # on a card an int8 weight passes through fp32; a layer is quantized there from 16 bits
            again = one * (self.dtype.itemsize + 4 * (self.device.type == "cuda" and precision.mode == "int8"))
            if self.device.type == "cuda":
                return quantized, quantized + one * (self.dtype.itemsize + 2), again
            # quantized as it is read: the files' pages, what is done, and the tensor that it is at
            return quantized, read + quantized + max(one, fused) * at_first.itemsize, again
        if self.stored is not None:
            half, stored = self.stored.bytes // self.stored.dtype.itemsize, self.stored.bytes
            rest = plain - half * self.dtype.itemsize
            if fused := sum(weight.nbytes for weight in self._experts(StoredExperts)):
                # made anew from single ones, beside the files' pages, which are then given back
                return stored + rest, read + fused + rest, 0
            # loading has looked at every weight, so all pages of the file are there
            if mapped:
                return rest + (read if stored else 0), rest + read, 0
            return stored + rest, load, 0
        anew = sum(layer.laid_out if mapped else layer.grown for layer in layers)
        return plain + anew, load, 0

    @property
    def _largest_weight(self) -> int:
        """Numbers of the largest that is made plain at once: of a linear layer, an expert, or on a card all."""
        modules = (module for layer in self.layers for module in layer.modules())
        found = [module.weight.numel() for module in modules if type(module) is nn.Linear]
        for weight in self._experts():
            whole = self.device.type == "cuda" and weight.numel() * self.dtype.itemsize <= WHOLE_BYTES
            found.append(weight.numel() if whole else weight[0].numel())
        return max(found, default=0)

    @property
    def _largest_fused(self) -> int:
        return max((weight.numel() for weight in self._experts()), default=0)

    def _experts(self, kind: type[nn.Module] = nn.Module) -> Iterator[torch.Tensor]:
        """The weights of fused experts in a layout that is known."""
        for module in (module for layer in self.layers for module in layer.modules()):
            if isinstance(module, kind) and is_known(module):
                yield from module.parameters(recurse=False)

    def _loss(self, tokens: int) -> LossBlocks:
        """As ``training/loss.py`` computes it: a chunk of logits, a block of it in fp32, states and their gradient."""
        text = self.model.config.get_text_config()
        vocabulary, width, size = int(text.vocab_size), int(text.hidden_size), self.dtype.itemsize
        rows = min(tokens, chunk_rows(vocabulary, size, self.device))
        block = min(rows, block_rows(vocabulary, self.device))
        # of a block in fp32: probabilities; soft-capped logits, their square and their slope
        copies = 4 if softcap_of(self.model) else 1
        work = 4 * block * vocabulary * copies + 3 * tokens * width * size
        return LossBlocks(room=rows * vocabulary * size, work=work)

    def _layers(self, every: int) -> list[LayerBlocks]:
        """The blocks of every layer, each kind of layer computed once."""
        if every:
            enable_gradient_checkpointing(self.model)
        try:
            trains = [any(p.requires_grad for p in layer.parameters()) for layer in self.layers]
            below = any(p.requires_grad for p in self.model.get_input_embeddings().parameters())
            types = self._layer_types
            for index, layer in enumerate(self.layers):
                if hasattr(layer, SWITCH):
                    setattr(layer, SWITCH, is_recomputed(index, every))
            found = []
            for index, layer in enumerate(self.layers):
                takes = below or any(trains[:index])
                kind = kind_of(layer, types[index], takes_gradient=takes)
                if kind not in self._recorded:
                    self._recorded[kind] = record_layer(
                        self.model,
                        index,
                        device=self.device,
                        packed=self._packed,
                        takes_gradient=takes,
                        tokens=CHUNK if types[index] == "linear_attention" else TOKENS,
                        offload=self.config.training.offload_activations,
                    )
                found.append(self._recorded[kind])
            return found
        finally:
            for layer in self.layers:
                if hasattr(layer, SWITCH):
                    setattr(layer, SWITCH, False)


def _rooms(layers: Sequence[LayerBlocks], batch: MicroBatch) -> int:
    """Bytes of what the layers share, each room as large as the layer that needs most of it."""
    sizes: dict[Any, int] = {}
    for layer in {id(layer): layer for layer in layers}.values():
        for name, size in layer.rooms.items():
            sizes[name] = max(sizes.get(name, 0), size.at(batch.tokens, batch.square))
    return sum(sizes.values())
