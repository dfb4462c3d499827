"""What a checkpoint says of itself: how far the run is (``state.json``), and which files it has (``manifest.json``).

The manifest is written when the others are on the disk: a folder that has one was complete.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import attrs

from eulerforge.api import InjectionReport
from eulerforge.config.atomic import STAGING_PREFIX, fsync_path, sha256_of, write_json_atomic
from eulerforge.errors import CheckpointError
from eulerforge.models.source import MANIFEST as MANIFEST_FILE

STATE_FILE = "state.json"
SCHEMA = 1
OTHER_HINT = "use another checkpoint of the run"


@attrs.define(kw_only=True)
class TrainState:
    """How far a run is. ``step`` counts finished optimizer steps; ``seconds`` is time spent in steps.

    ``skipped`` counts the steps whose loss or gradient was not finite.
    ``identity`` says what the run is made of, by configuration key; ``before`` is what was measured of the base.
    ``held_out`` is the last held-out loss, {step, loss}; ``run_id`` tells the checkpoints of two runs apart.
    """

    step: int = 0
    tokens: int = 0
    label_tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    run_id: str = ""
    held_out: dict[str, Any] = attrs.field(factory=dict)
    identity: dict[str, Any] = attrs.field(factory=dict)
    before: dict[str, Any] = attrs.field(factory=dict)


def write_state(folder: Path, state: TrainState) -> None:
    write_json_atomic(folder / STATE_FILE, attrs.asdict(state))


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint or of ``final``.

    Raises:
        CheckpointError: it is not there or not readable.
    """
    try:
        return TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read: {error}", hint=OTHER_HINT) from error


def write_manifest(
    folder: Path,
    kind: str,
    step: int,
    report: InjectionReport,
    *,
    run_id: str = "",
    held_out: float | None = None,
) -> None:
    """Flush every file of ``folder`` to the disk, then list each with size and hash: the last file to be written."""
    from eulerforge import __version__

    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(STAGING_PREFIX)]
    for path in paths:
        fsync_path(path)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    manifest = {"schema": SCHEMA, "kind": kind, "step": step, "run_id": run_id, "eulerforge": __version__}
    manifest |= {"held_out_loss": held_out, "files": files}
    write_json_atomic(folder / MANIFEST_FILE, {**manifest, "injection": report.to_json()})


def verify(folder: Path, *, only: Collection[str] | None = None) -> Mapping[str, Any]:
    """The manifest of a folder whose files are all there, unchanged; with ``only``, those that the caller will read.

    Raises:
        CheckpointError: it says which file is wrong and how.
    """
    manifest = read_manifest(folder)
    wanted = {name: facts for name, facts in manifest["files"].items() if only is None or name in only}
    check_sizes(folder, wanted)
    for name, facts in wanted.items():
        if sha256_of(folder / name) != facts["sha256"]:
            raise CheckpointError(f"{folder / name} has changed since it was written", hint=OTHER_HINT)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        for facts in manifest["files"].values():
            facts["size"], facts["sha256"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST_FILE}: it is not complete", hint=OTHER_HINT) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST_FILE} cannot be read: {error}", hint=OTHER_HINT) from error
    if manifest.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{folder} has format {manifest.get('schema')}, this version reads {SCHEMA}", hint=OTHER_HINT
        )
    return manifest


def check_sizes(folder: Path, files: Mapping[str, Any]) -> None:
    for name, facts in files.items():
        path = folder / name
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"{folder / MANIFEST_FILE} names a file outside its folder: {name}", hint=OTHER_HINT)
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing", hint=OTHER_HINT)
        if path.stat().st_size != facts["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {facts['size']}", hint=OTHER_HINT)
