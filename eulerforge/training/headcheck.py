"""Whether the model's logits are what the loss takes for them: the head's product with the decoder's last states.

Notable: some families scale their logits on the way out (Granite, Cohere); trained on the product alone they would
learn by another loss, and nobody would see it. The layers let the states through, so that the check costs one product.
"""

from __future__ import annotations

from typing import Any

import torch

from eulerforge.errors import RunError, first_line
from eulerforge.training.forward import logits_of
from eulerforge.training.standins import Through, standing_in

TOKENS = 4
TOLERANCE = 2**-6
"""Of the largest logit: a rounding of bf16 and another order of sums, and less than any scale that is worth having."""


@torch.no_grad()
def check_head(model: Any) -> str | None:
    """A warning where the model cannot be asked; None where its logits are the head's.

    Raises:
        RunError: the logits are others.
    """
    decoder, was_training = model.get_decoder(), model.training
    states: list[torch.Tensor] = []
    handle = decoder.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    ids = torch.arange(1, TOKENS + 1, device=model.device)[None]
    try:
        model.eval()
        with standing_in(decoder.layers, {at: Through(layer) for at, layer in enumerate(decoder.layers)}):
            found = model(input_ids=ids, use_cache=False).logits.float()
        wanted = logits_of(model, states[-1]).float()
    except Exception as error:  # noqa: BLE001 - a model's own code may raise anything
        return f"the logits could not be compared with the head's: {type(error).__name__}: {first_line(error)}"
    finally:
        handle.remove()
        model.train(was_training)
    apart = float((found - wanted).abs().max())
    largest = float(torch.maximum(found.abs().max(), wanted.abs().max()))
    if not apart <= TOLERANCE * largest:
        raise RunError(
            f"{type(model).__name__} gives other logits than its output head (apart by {apart:.3g}, the largest is"
            f" {largest:.3g}): the loss would be another than the model's",
            key="backbone",
            hint="a model that scales its logits cannot be trained yet; report it to the backbone's author",
        )
    return None
