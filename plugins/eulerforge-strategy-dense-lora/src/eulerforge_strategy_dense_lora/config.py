"""The strategy's own keys; light, so that a preset is checked without torch."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from eulerforge.api import InjectionConfig, Problem, setting


@attrs.frozen(kw_only=True)
class AttentionLoRAConfig:
    """LoRA on attention projections."""

    enabled: bool = setting(False, help="Adapt attention projections too")
    keywords: tuple[str, ...] = setting(("q_proj", "v_proj"), help="Names of the attention projections to adapt")
    lora_r: int | None = setting(None, help="Rank of the attention adapters; default: injection.lora_r")
    lora_alpha: float | None = setting(
        None, gt=0, help="Alpha of the attention adapters; default: injection.lora_alpha"
    )

    def check(self) -> Iterable[Problem]:
        if self.lora_r is not None:
            yield from rank_problems(self.lora_r)
        if self.enabled and not self.keywords:
            yield Problem(
                key="keywords", message="attention LoRA is enabled without a keyword", hint='["q_proj", "v_proj"]'
            )


@attrs.frozen(kw_only=True)
class DenseLoRAConfig(InjectionConfig):
    """Keys of ``injection`` when its strategy is ``dense_lora``."""

    target_keywords: tuple[str, ...] = setting(
        ("gate_proj", "up_proj", "down_proj"), help="Names of the feed-forward projections to adapt"
    )
    lora_r: int = setting(16, help="Rank of the adapters; typically 16 to 64")
    lora_alpha: float = setting(32.0, gt=0, help="Scaling factor: the adapter's output is multiplied by alpha / r")
    lora_dropout: float = setting(0.0, ge=0, lt=1, help="Dropout on the adapter's input while training")
    use_rslora: bool = setting(False, help="Scale by alpha / sqrt(r), which keeps large ranks stable")
    attn_lora: AttentionLoRAConfig = setting(factory=AttentionLoRAConfig, help="LoRA on attention projections")

    def check(self) -> Iterable[Problem]:
        yield from super().check()
        yield from rank_problems(self.lora_r)
        if not self.target_keywords and not self.attn_lora.enabled:
            yield Problem(
                key="target_keywords",
                message="No trainable parameters: no target keyword, and attn_lora is off",
                hint='target_keywords = ["gate_proj", "up_proj", "down_proj"]',
            )


def rank_problems(r: int) -> Iterable[Problem]:
    if r < 1:
        yield Problem(
            key="lora_r",
            message=f"LoRA layers will act as Identity: the rank is {r}",
            hint="lora_r must be 1 or higher",
        )
