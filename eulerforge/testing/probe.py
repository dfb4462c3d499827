"""What the kit measures with: models whose numbers are large enough to see, and plain LoRA from the core's own blocks.

Notable: no strategy distribution is needed to test a backbone, and no backbone distribution to test a strategy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from eulerforge.api import BackboneAdapter, InjectionConfig, InjectionReport, SiteReport
from eulerforge.lora.experts import ExpertsPath
from eulerforge.lora.linear import LoRALinear
from eulerforge.lora.state import adapter_state
from eulerforge.lora.targets import Target, select_targets
from eulerforge.lora.wrap import wrap_experts, wrap_linear

RANK, ALPHA = 4, 8.0
TOLERANCE = 2e-5
"""How far logits may differ that should be equal, as a share of the largest one."""


def loud(model: nn.Module, seed: int = 1) -> Any:
    """The same model in fp32 and eval mode with weights large enough that no fault hides in small numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model.float().eval()


def ids_for(model: Any) -> torch.Tensor:
    """Token ids of shape (2, 24), special tokens left out."""
    end = min(int(model.get_input_embeddings().weight.shape[0]), 120)
    return torch.randint(3, end, (2, 24), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any) -> torch.Tensor:
    """Logits of ``ids_for(model)`` in fp32, without a gradient."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids_for(model), use_cache=False).logits.float()
    return logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference as a share of the largest value (at least 1)."""
    return float((one - other).abs().max()) / max(1.0, float(other.abs().max()))


def rounding(model: Any, logits: torch.Tensor) -> float:
    """How far the logits move when every parameter moves by a rounding error; a recurrent layer amplifies it."""
    generator = torch.Generator().manual_seed(3)
    jittered = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in jittered.parameters():
            parameter.mul_(1 + (torch.rand(parameter.shape, generator=generator) - 0.5) * 2**-22)
    return distance(logits_of(jittered), logits)


def perturb(model: nn.Module, seed: int = 2) -> None:
    """Move every adapter tensor, so that each one counts in the output."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


def backward(model: Any) -> None:
    """Gradients of a loss over all tokens."""
    ids = ids_for(model)
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()


def keywords_of(model: nn.Module, adapter: BackboneAdapter) -> tuple[str, ...]:
    """The names of all places to which the adapter gives a role."""
    layers = adapter.find_transformer_layers(model)
    sites = (site for layer in layers for site in adapter.find_sites(layer))
    return tuple(dict.fromkeys(site.name for site in sites if site.role != "other"))


def inject(
    model: nn.Module,
    adapter: BackboneAdapter,
    config: InjectionConfig | None = None,
    keywords: Sequence[str] | None = None,
) -> InjectionReport:
    """Plain LoRA on every place that the keywords mean (default: all that have a role), in place; the base is frozen.

    Groups are ``attn_lora`` for attention roles and ``lora`` for the others.
    """
    model.requires_grad_(False)
    selection = select_targets(model, adapter, config or InjectionConfig(), keywords or keywords_of(model, adapter))
    places: dict[str, list[Target]] = {}
    for target in selection.targets:
        places.setdefault(target.path, []).append(target)
    sites = tuple(site for targets in places.values() for site in _wrap(model, targets))
    # mypy takes the converter `tuple` of a field for a generic function
    return InjectionReport(
        strategy="probe",
        sites=sites,  # type: ignore[arg-type]
        layers=selection.layers,  # type: ignore[arg-type]
        depth=selection.depth,
        keywords=selection.keywords,
        unmatched=selection.unmatched,
        partial=selection.partial,
    )


def _wrap(model: nn.Module, targets: list[Target]) -> list[SiteReport]:
    path = targets[0].path
    names = {target.parameter: target for target in targets if target.parameter is not None}
    generators = {name: torch.Generator().manual_seed(len(path) + len(name)) for name in names}
    if not names:
        linear = wrap_linear(model, path, r=RANK, alpha=ALPHA, generator=torch.Generator().manual_seed(len(path)))
        return [_site(targets[0], linear, path)]
    experts = wrap_experts(model, path, tuple(names), r=RANK, alpha=ALPHA, generators=generators)
    return [_site(target, experts.paths[name], f"{path}.{name}") for name, target in names.items()]


def _site(target: Target, low_rank: LoRALinear | ExpertsPath, prefix: str) -> SiteReport:
    attention = target.role.startswith(("attn.", "linear_attn."))
    return SiteReport(
        path=target.path,
        layer=target.layer,
        role=target.role,
        group="attn_lora" if attention else "lora",
        keyword=target.keyword,
        r=RANK,
        alpha=ALPHA,
        scaling=ALPHA / RANK,
        in_features=low_rank.in_features,
        out_features=low_rank.out_features,
        parameters=(f"{prefix}.lora_A", f"{prefix}.lora_B"),  # type: ignore[arg-type]
        parameter_count=low_rank.lora_A.numel() + low_rank.lora_B.numel(),
        base_parameter=target.parameter,
    )
