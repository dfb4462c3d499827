"""Attention per document of a packed batch: no padding computed, no T x T mask, no token that sees another document.

Notable: the function is registered with transformers under a name of its own, so every model that goes through its
attention interface can use it, and no code of torch or transformers is replaced. The documents' borders travel as the
keyword argument ``segments`` of the decoder's call; there is no global state. A call without ``segments`` (generation,
a padded batch) is transformers' own ``sdpa``.

On the CPU each document is a handful of matrix products (``training/document_products.py``). On CUDA it is flash-attn
where that is installed, else torch's own varlen kernel, and flex_attention (``training/flex.py``) for what they do not
take.
Suffixes of tensor names: N tokens of the whole batch, Q query heads, K key heads, D head width, M tokens of the longest
document; a first D counts documents.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any, cast

import attrs
import torch
import torch.nn.functional as F

from eulerforge.data.packing import Segments
from eulerforge.errors import RunError
from eulerforge.models.device import is_ampere_or_later
from eulerforge.training import flex
from eulerforge.training.document_products import causal_mask, document_products

NAME = "eulerforge_documents"
_HALF = (torch.float16, torch.bfloat16)


def register() -> str:
    """Make the function known to transformers; give back its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, documents_attention)
    # calls without segments go to sdpa, so they get sdpa's mask
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


_CHANGES_SCORES = ("s_aux", "position_bias")
"""What some families hand to their attention besides: sinks, a bias by distance."""


def no_mask(device: torch.device | str) -> torch.Tensor:
    """What a packed call gives as attention_mask.

    transformers hands a four-dimensional mask through untouched, so it builds no T x T mask; one without elements
    cannot be used by mistake: any other attention function fails on its shape.
    """
    return torch.empty(1, 1, 0, 0, device=device)


def documents_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query (B, Q, T, D), key and value (B, K, T, D); the result is (B, T, Q, D).

    Raises:
        RunError: the batch is packed, but the model's code did not hand ``segments`` on to its attention; or no kernel
            computes this attention.
    """
    if changed := sorted(name for name in _CHANGES_SCORES if kwargs.get(name) is not None):
        raise _not_computed(f"attention with {', '.join(changed)}")
    if segments is None:
        _refuse_no_mask(module, attention_mask)
        return _sdpa()(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window,
            softcap=softcap, **kwargs,
        )  # fmt: skip
    if value.shape[-1] != query.shape[-1]:
        raise _not_computed(f"attention whose values are {value.shape[-1]} wide and queries {query.shape[-1]}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window is not None and sliding_window < segments.longest else None
    q_NQD, k_NKD, v_NKD = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    heads = (query.shape[1], key.shape[1], query.shape[-1])
    kernel, _ = kernel_for(query.device, query.dtype, heads, dropout=dropout, softcap=softcap)
    if segments.after and kernel != "matmul":  # a module may drop out where the config does not say so
        raise _not_computed("a prefix that rows share", "data.share_prefixes", "--set data.share_prefixes=false")
    out_NQD = _KERNELS[kernel](q_NQD, k_NKD, v_NKD, _Call(segments, scale, window, softcap, dropout))
    return out_NQD.unflatten(0, segments.shape), None


def _not_computed(
    what: str,
    key: str = "data.packing",
    hint: str = "--set data.packing=off trains on padded rows, with the model's own attention",
) -> RunError:
    return RunError(f"{what} is not computed for packed rows", key=key, hint=hint)


def kernel_for(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    *,
    dropout: float = 0.0,
    softcap: float | None = None,
) -> tuple[str, str]:
    """The kernel for packed calls: ``matmul``, ``flash-attn``, ``varlen``, ``flex`` or ``padded``; and why no better.

    Whether flex can be used is tried out once, which compiles it: that takes a while, and is over before a run begins.

    Args:
        heads: query heads, key heads and their width.
    """
    if dropout:
        return "padded", "attention dropout"
    if device.type == "cpu":
        return "matmul", ""
    general = "padded" if softcap is None else "matmul"
    if device.type != "cuda":
        return general, f"no kernel for variable lengths on {device.type}"
    if dtype in _HALF and heads[2] <= 256 and _runs_flash_attention(device):
        if _has_flash_attn():
            return "flash-attn", ""
        if softcap is None and _varlen_arguments() is not None:
            return "varlen", ""
    refusal = flex.refusal(device, dtype, heads, softcap is not None)
    return (general, f"flex_attention cannot be used: {refusal}") if refusal else ("flex", "")


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads and their width, as a config of transformers says them."""
    text = config.get_text_config()
    queries = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or queries)
    return queries, keys, int(getattr(text, "head_dim", None) or text.hidden_size // queries)


def describe(kernel: str, why: str = "") -> str:
    """The kernel's name as a person reads it, and why it is not a better one."""
    name = {
        "matmul": "matrix products per document",
        "flash-attn": "flash-attn, variable lengths",
        "varlen": "torch varlen",
        "flex": "torch flex_attention, compiled",
        "padded": "scaled_dot_product_attention over documents padded to the longest",
    }[kernel]
    return f"{name} ({why})" if why else name


@attrs.frozen
class _Call:
    """What a kernel needs besides q, k and v: ``window`` counts the keys that a query sees, itself included."""

    segments: Segments
    scale: float
    window: int | None
    softcap: float | None
    dropout: float


def _matmul(q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, call: _Call) -> torch.Tensor:
    borders = call.segments
    return document_products(q_NQD, k_NKD, v_NKD, borders.lengths, call.scale, call.window, call.softcap, borders.after)


def _flash(q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, call: _Call) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    borders, longest = call.segments.cu_seqlens, call.segments.longest
    out: torch.Tensor = flash_attn_varlen_func(
        q_NQD, k_NKD, v_NKD, borders, borders, longest, longest, softmax_scale=call.scale, causal=True,
        window_size=_window(call), softcap=call.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


def _varlen(q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, call: _Call) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = call.segments.cu_seqlens, call.segments.longest
    settings: dict[str, Any] = {"scale": call.scale, "window_size": _window(call)}
    # torch 2.11 shares key heads without being told so; later versions want the word
    if "enable_gqa" in (_varlen_arguments() or ()):
        settings["enable_gqa"] = True
    q_NQD, k_NKD, v_NKD = q_NQD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    out = varlen_attn(q_NQD, k_NKD, v_NKD, borders, borders, longest, longest, **settings)
    return cast(torch.Tensor, out)


def _flex(q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, call: _Call) -> torch.Tensor:
    return flex.flex_documents(q_NQD, k_NKD, v_NKD, call.segments, call.scale, call.window, call.softcap)


def _window(call: _Call) -> tuple[int, int]:
    """Keys before and behind a query, as the variable-length kernels count them."""
    return (-1 if call.window is None else call.window - 1, 0)


@cache
def _has_flash_attn() -> bool:
    """Every layer asks, and where it is not installed the whole path of imports is searched for it."""
    return can_import("flash_attn", "flash_attn_varlen_func")


def can_import(module: str, name: str | None = None) -> bool:
    """Whether a package is there, can be loaded (one that was built for another torch cannot) and has this name."""
    try:
        found = importlib.import_module(module)
    except Exception:  # noqa: BLE001 - what cannot be loaded is not used, whatever it raises
        return False
    return name is None or hasattr(found, name)


@cache
def _runs_flash_attention(device: torch.device) -> bool:
    """Both kernels are FlashAttention 2, which asks for compute capability 8.0."""
    return is_ampere_or_later(device)


@cache
def _varlen_arguments() -> frozenset[str] | None:
    """The keyword arguments of torch's varlen attention; None when it lacks one that we need."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"scale", "window_size"} <= names else None


def _padded(q_NQD: torch.Tensor, k_NKD: torch.Tensor, v_NKD: torch.Tensor, call: _Call) -> torch.Tensor:
    """Documents gathered into rows padded on the right, which a causal query never sees."""
    if call.softcap is not None:
        raise RunError("attention dropout and soft-capping together are not supported", hint="--set data.packing=off")
    q_DQMD, k_DKMD, v_DKMD = (call.segments.gather(states).transpose(1, 2) for states in (q_NQD, k_NKD, v_NKD))
    mask = None
    if call.window is not None:
        longest = call.segments.longest
        mask = causal_mask(longest, longest, call.window, 1, q_NQD.dtype, q_NQD.device)
    out_DQMD = F.scaled_dot_product_attention(
        q_DQMD, k_DKMD, v_DKMD, mask, call.dropout, is_causal=mask is None, scale=call.scale, enable_gqa=True
    )
    return call.segments.scatter(out_DQMD.transpose(1, 2))


_KERNELS = {"matmul": _matmul, "flash-attn": _flash, "varlen": _varlen, "flex": _flex, "padded": _padded}


def _sdpa() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def _refuse_no_mask(module: torch.nn.Module, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and attention_mask.numel() == 0:
        raise RunError(
            f"{type(module).__name__} was not told where the documents of a packed row begin: the model's code does not"
            " hand keyword arguments on to its attention",
            hint="--set data.packing=off",
        )
