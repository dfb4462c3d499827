"""From ``model_name`` to a local folder in the Hugging Face format, whatever it was before."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import attrs

from eulerforge.config.location import SCHEME, expanded, resolve_location
from eulerforge.errors import ModelError, first_line

HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
HUB_COPIES = ("consolidated*.safetensors", "original/*")
"""Weights in a second form, beside those that transformers reads."""
RUN_FILE, MANIFEST, EXPORT_FILE = "resolved_config.toml", "manifest.json", "eulerforge_export.json"
"""What a run's folder holds, each of its checkpoints, and each export."""
NO_MODEL = "give a folder with config.json and safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
MOST_CAUSES = 10
_COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@attrs.frozen(kw_only=True)
class BaseSource:
    """A base model on disk: ``kind`` is folder, gguf or hub, ``folder`` holds config, tokenizer and safetensors."""

    kind: str
    name: str
    folder: Path


def resolve_source(
    model_name: str, *, revision: str | None = None, say: Callable[[str], None] | None = None
) -> BaseSource:
    """The local folder of a model: a folder as it is, a GGUF file converted once, a hub id from the hub's cache.

    Raises:
        ModelError: there is no such model, or the folder holds no safetensors.
    """
    if model_name.startswith("pkg://") or model_name.endswith(".gguf"):
        path = resolve_location(model_name)
    else:
        path = expanded(model_name)
    if path.suffix == ".gguf":
        from eulerforge.models.gguf import converted_folder

        if not path.is_file():
            raise ModelError(f"there is no file {path}", key="model_name", hint="give the path of a .gguf file")
        return BaseSource(kind="gguf", name=model_name, folder=converted_folder(path, say=say))
    if path.is_dir():
        return BaseSource(kind="folder", name=model_name, folder=_checked(path, model_name))
    if can_only_be_here(model_name) or model_name.count("/") != 1:
        raise ModelError(f"there is no model folder {model_name!r}", key="model_name", hint=NO_MODEL)
    folder = _checked(_from_hub(model_name, revision), model_name, pickles_left=True)
    return BaseSource(kind="hub", name=model_name, folder=folder)


def can_only_be_here(model_name: str) -> bool:
    """Whether this is no name that the hub could have."""
    return expanded(model_name).is_absolute() or model_name.startswith((".", "~", SCHEME))


def _checked(folder: Path, model_name: str, *, pickles_left: bool = False) -> Path:
    """With ``pickles_left`` no pickle file was downloaded, so that one may be what the weights are in."""
    if not (folder / "config.json").is_file():
        raise no_config(model_name, folder)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth"))
        raise ModelError(
            f"{model_name}: the folder has no {WEIGHT_FILES[0]} and no {WEIGHT_FILES[1]}",
            key="model_name",
            hint="its weights are pickle files, which can run code: convert them to safetensors first"
            if pickled
            else "its weights may be pickle files, which can run code: name a model that has safetensors"
            if pickles_left
            else "a base model needs safetensors weights",
        )
    return folder


def no_config(model_name: str, folder: Path) -> ModelError:
    """The error for a folder that holds no model."""
    what = "the folder has no config.json"
    hint = "give the folder of a Hugging Face model: config.json, tokenizer files and safetensors"
    if (folder / "adapter_config.json").exists():
        what = "the folder holds a PEFT adapter, no model"
        hint = "give the base that it belongs to, or a folder into which it was merged"
    elif (folder / RUN_FILE).is_file():
        what = "the folder is a run of EulerForge, no model"
        hint = f"eulerforge merge {folder} makes a model to go on from"
    elif (folder / MANIFEST).is_file() and (folder.resolve().parent / RUN_FILE).is_file():
        what = "the folder is a checkpoint of a run of EulerForge, no model"
        hint = f"eulerforge merge {folder} makes a model to go on from"
    return ModelError(f"{model_name}: {what}", key="model_name", hint=hint)


def _from_hub(model_name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return Path(
            snapshot_download(
                model_name, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_COPIES)
            )
        )
    except Exception as error:  # the network's errors are of several libraries' classes
        raise from_hub_failed(model_name, error) from error


def from_hub_failed(model_name: str, error: Exception) -> ModelError:
    """The error for a model that the hub did not give."""
    from huggingface_hub.errors import GatedRepoError

    cause: BaseException | None = error
    gated = "gated repo" in str(error)
    for _ in range(MOST_CAUSES):
        gated = gated or isinstance(cause, GatedRepoError)
        cause = cause and (cause.__cause__ or cause.__context__)
    return ModelError(
        f"{model_name} is neither a local folder nor to be had from the hub: {first_line(error)}",
        key="model_name",
        hint=f"accept its licence at https://huggingface.co/{model_name}, then `hf auth login`, or set HF_TOKEN"
        if gated
        else "check the name and the network and run it again, which keeps what is downloaded; or put in a local folder"
        " with --set model_name=FOLDER",
    )


def revision_of(source: BaseSource, asked: str | None) -> str | None:
    """The commit of a model of the hub, whose branch may be another one tomorrow; else what was asked for."""
    commit = source.folder.name
    return commit if source.kind == "hub" and _COMMIT.fullmatch(commit) else asked
