"""A model without weights, built from its config.json alone: what an injection reaches is known before a byte is read.

The class is the one that loading would choose, because ``AutoModelForCausalLM`` chooses for both: of a Qwen3.5
checkpoint the text model, of a multimodal Gemma 3 the whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eulerforge.config.location import expanded
from eulerforge.config.schema import RunConfig
from eulerforge.errors import ModelError, first_line
from eulerforge.models.soundness import check_folder
from eulerforge.models.source import can_only_be_here, from_hub_failed, no_config, resolve_source


def meta_model(run: RunConfig, dtype: torch.dtype | None = None) -> Any:
    """The run's model on the meta device: every module with its shapes, no memory, in eval mode.

    ``dtype`` None is the precision of transformers' own choice, which is not the run's.

    Of a hub id only config.json is fetched.
    A GGUF file is converted first, because reading the header of one takes as long as converting a small one.

    Raises:
        ModelError: there is no such model, or its config.json describes none that transformers can build.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    location = _config_location(run)
    if isinstance(location, Path):
        check_folder(location, weights=False)
    trust = run.model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(location, revision=run.model.revision, trust_remote_code=trust)
        # the meta device draws no numbers, but a class with code of its own may
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            chosen = {} if dtype is None else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **chosen).eval()
    except Exception as error:
        first = first_line(error)
        if isinstance(error, OSError) and isinstance(location, str):
            raise from_hub_failed(run.model_name, error) from error
        raise ModelError(
            f"{run.model_name}: no model can be built from its config.json: {first}",
            key="model_name",
            hint="--debug shows the whole error; a model with code of its own needs model.trust_remote_code = true",
        ) from error


def _config_location(run: RunConfig) -> str | Path:
    """What ``AutoConfig`` opens: a folder, whether it holds weights or not, or a hub id."""
    name = run.model_name
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise no_config(name, path)
        return path
    if not (can_only_be_here(name) or name.endswith(".gguf")) and name.count("/") == 1:
        return name
    return resolve_source(name, revision=run.model.revision).folder
