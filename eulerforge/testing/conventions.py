"""What the name and the shape of a weight say of its role, independent of any adapter's table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from eulerforge.api import Site

NAMES: Mapping[str, tuple[str, ...]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o", "out"),
    "qkv_proj": ("qkv",),
    "in_proj_qkv": ("qkv",),
    "out_proj": ("o", "out"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate_up_proj": ("gate_up",),
    "w1": ("gate",),
    "w2": ("down",),
    "w3": ("up",),
    "fc1": ("up",),
    "fc2": ("down",),
}
"""The last word of a role, by the usual name of the module or parameter."""

READS = ("q", "k", "v", "qkv", "gate", "up", "gate_up")
"""Roles whose weight reads the layer's hidden states; those in ``WRITES`` write them."""
WRITES = ("o", "out", "down")
PARTS = ("attn", "linear_attn", "ffn", "experts", "shared_expert")


def role_by_name(site: Site) -> tuple[str, ...]:
    """The last words of a role that fit the site's name; empty when the name says nothing."""
    return NAMES.get(site.name, ())


def hidden_width(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def wrong_shape(layer: nn.Module, site: Site, width: int) -> str:
    """Why the role does not fit the weight's shape, in words; empty when it does or nothing is known."""
    part, _, end = site.role.rpartition(".")
    if part not in PARTS:
        return ""
    module = layer.get_submodule(site.path)
    if site.parameter is None:
        outputs, inputs = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    else:
        outputs, inputs = module.get_parameter(site.parameter).shape[-2:]
    if end in READS and inputs != width:
        return f"it reads {inputs} values where the layer's width is {width}"
    if end in WRITES and outputs != width:
        return f"it writes {outputs} values where the layer's width is {width}"
    return ""
