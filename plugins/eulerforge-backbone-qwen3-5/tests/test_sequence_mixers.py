"""Where tokens of Qwen3.5 meet outside of attention: in every layer of linear attention, and nowhere else."""

from __future__ import annotations

import pytest

from eulerforge.api import SequenceMixerFinder
from eulerforge.testing.tiny_models import tiny_model
from eulerforge_backbone_qwen3_5.adapter import Qwen35Adapter


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_5_multimodal", "qwen3_5_moe_multimodal"])
def test_linear_attention_alone(family: str) -> None:
    model, adapter = tiny_model(family), Qwen35Adapter()
    assert isinstance(adapter, SequenceMixerFinder)
    kinds = model.config.get_text_config().layer_types
    found = [tuple(adapter.find_sequence_mixers(layer)) for layer in adapter.find_transformer_layers(model)]
    assert found == [("linear_attn",) if kind == "linear_attention" else () for kind in kinds]
    assert len(set(found)) == 2
