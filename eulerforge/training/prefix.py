"""The layers below the first trained one, computed once per row and read in later epochs.

Notable: nothing below the first trained parameter ever changes, and a document's hidden states there depend on the
document alone, since neither padding nor a packed neighbour is seen. So they are kept, in the precision in which they
are computed, in a file of a stated size that has no name any more once it is open: no run finds those of another one.
A micro-batch whose rows are all there passes through stand-ins instead of the layers; that this gives the same numbers
is proven on made-up tokens before the run begins. What differs is rounding alone: a row is read as it was computed
beside the neighbours of its first epoch.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eulerforge.config.cachedir import cache_root
from eulerforge.data.prefixes import Document
from eulerforge.errors import ConfigError, RunError, UsageError
from eulerforge.models.sizes import gib
from eulerforge.training.standins import Through, standing_in

KEY = "training.cache_frozen_prefix"
PROBE_LENGTH = 24


class FrozenPrefix:
    """Hidden states of every row below decoder layer ``first``.

    Args:
        decoder: has ``layers``; the embedding and ``layers[:first]`` never train.
        tokens: of all rows together.
    """

    def __init__(self, decoder: Any, first: int, *, tokens: int, width: int, dtype: torch.dtype) -> None:
        self.decoder, self.first = decoder, first
        self.bytes = tokens * width * dtype.itemsize
        self._states = _unnamed_file(self.bytes, tokens * width, dtype).view(tokens, width)
        self._places: dict[int, int] = {}
        self._used = 0

    @contextmanager
    def reading(self, lines: list[list[Document]], device: torch.device) -> Iterator[None]:
        """The context of a forward pass over these rows: it reads what is there, or keeps what is computed.

        Args:
            lines: what lies in each line of the micro-batch, a document for each row and the same in every epoch.
        """
        if all(document.row in self._places for line in lines for document in line):
            with self._standing_in(self._read(lines).to(device)):
                yield
            return
        hook = self.decoder.layers[self.first - 1].register_forward_hook(
            lambda _module, _arguments, states: self._keep(lines, states)
        )
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, lines: list[list[Document]], states_BTH: torch.Tensor) -> None:
        for at, place, index, size in _documents(lines):
            if index not in self._places:
                self._states[self._used : self._used + size] = states_BTH[at, place : place + size].cpu()
                self._places[index] = self._used
                self._used += size

    def _read(self, lines: list[list[Document]]) -> torch.Tensor:
        """(B, T, H); zeros where a line is filled up, which no document sees."""
        longest = max(sum(map(len, line)) for line in lines)
        states_BTH = torch.zeros(len(lines), longest, self._states.shape[1], dtype=self._states.dtype)
        for at, place, index, size in _documents(lines):
            start = self._places[index]
            states_BTH[at, place : place + size] = self._states[start : start + size]
        return states_BTH

    def _standing_in(self, states_BTH: torch.Tensor) -> AbstractContextManager[None]:
        layers = self.decoder.layers
        return standing_in(layers, {at: _StandIn(layers[at], states_BTH) for at in range(self.first)})

    @torch.no_grad()
    def prove(self, model: Any) -> None:
        """Raises RunError unless the model gives the same states with the stand-ins as with the layers."""
        vocabulary, was_training = int(model.get_input_embeddings().weight.shape[0]), model.training
        ids = (torch.arange(PROBE_LENGTH, device=model.device) * 7 % vocabulary)[None]
        seen: list[Any] = []
        hook = self.decoder.layers[self.first - 1].register_forward_hook(lambda *call: seen.append(call[2]))
        model.eval()
        try:
            whole = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            hook.remove()
            if not isinstance(seen[0], torch.Tensor):
                raise RunError(
                    f"a decoder layer gives a {type(seen[0]).__name__}, not its hidden states",
                    key=KEY,
                    hint=f"--set {KEY}=false",
                )
            with self._standing_in(seen[0]):
                again = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            hook.remove()
            model.train(was_training)
        if not torch.allclose(whole, again, rtol=1e-3, atol=1e-5):
            raise RunError(
                "the model's upper layers read more of the lower ones than their hidden states",
                key=KEY,
                hint=f"--set {KEY}=false",
            )


class _StandIn(Through):
    """Gives known hidden states where a layer would compute them."""

    def __init__(self, layer: nn.Module, states_BTH: torch.Tensor) -> None:
        super().__init__(layer)
        self.__dict__["states_BTH"] = states_BTH

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        states_BTH: torch.Tensor = self.__dict__["states_BTH"]
        # a line may be filled up beyond the longest that there is (``data/packing.py``)
        return F.pad(states_BTH, (0, 0, 0, hidden_states.shape[1] - states_BTH.shape[1]))


def _documents(lines: list[list[Document]]) -> Iterator[tuple[int, int, int, int]]:
    """(line, place in it, row, tokens) of each document."""
    for at, line in enumerate(lines):
        place = 0
        for document in line:
            yield at, place, document.row, len(document)
            place += len(document)


def first_trained_layer(model: Any, trained_names: tuple[str, ...]) -> int:
    """The lowest decoder layer in which something ever trains.

    Raises:
        ConfigError: nothing lies below it, something outside of it trains that lies below, or a layer below drops out.
    """
    decoder, wanted = model.get_decoder(), set(trained_names)
    trained = {id(tensor) for name, tensor in model.named_parameters() if name in wanted}
    below = [at for at, layer in enumerate(decoder.layers) if any(id(p) in trained for p in layer.parameters())]
    first = min(below, default=len(decoder.layers))
    if first == 0 or any(id(p) in trained for p in model.get_input_embeddings().parameters()):
        what = "the embedding" if first else "layer 0"
        raise ConfigError(
            f"{what} trains in one of the phases: nothing below it is frozen that could be computed once",
            key=KEY,
            hint=f"--set {KEY}=false, or a higher injection.start_layer",
        )
    for layer in decoder.layers[:first]:
        for module in layer.modules():
            rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
            if isinstance(rate, float) and rate > 0:
                raise ConfigError(
                    f"a frozen layer drops out with {rate}: it gives other numbers in each epoch",
                    key=KEY,
                    hint=f"--set {KEY}=false",
                )
    return first


def _unnamed_file(size: int, numbers: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file in the cache folder that the system deletes when the process ends.

    Raises:
        UsageError: the disk has no room for it.
    """
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > 0.9 * free:
        raise UsageError(
            f"the hidden states of all rows are {gib(size)}, and {gib(free)} are free in {folder}",
            key=KEY,
            hint=f"--set {KEY}=false, or point EULERFORGE_CACHE at a larger disk",
        )
    with tempfile.NamedTemporaryFile(dir=folder, prefix="prefix-", delete=False) as file:
        file.truncate(size)
    try:
        return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype)
    finally:
        Path(file.name).unlink()
