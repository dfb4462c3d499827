"""Finding presets: a path, or the bare name of one that is bundled or that a plugin brings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import attrs

from eulerforge.api import PresetSpec
from eulerforge.config.location import resolve_location
from eulerforge.config.suggest import nearest
from eulerforge.errors import UsageError

SUFFIXES = (".toml", ".yml", ".yaml")


@attrs.frozen(kw_only=True)
class ResolvedPreset:
    """A preset file; ``note`` says when it is not the path that was asked for."""

    path: Path
    name: str
    origin: str
    note: str | None = None


def bundled_folder() -> Path:
    """Inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    checkout = package.parent / "presets"
    inside = package / "presets"
    return inside if inside.is_dir() else checkout


def list_presets(extra: Iterable[PresetSpec] = ()) -> list[ResolvedPreset]:
    """The bundled presets and those of plugins, by name."""
    folder = bundled_folder()
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
    found = [ResolvedPreset(path=path, name=path.stem, origin="eulerforge-core") for path in files]
    for spec in extra:
        path = resolve_location(f"pkg://{spec.package}/{spec.file}")
        found.append(ResolvedPreset(path=path, name=spec.name, origin=spec.package))
    return sorted(found, key=lambda preset: preset.name)


def find_preset(text: str, extra: Iterable[PresetSpec] = ()) -> ResolvedPreset:
    """The preset that ``--preset`` names.

    A path that does not exist but whose file name is a bundled preset uses that one and says so.

    Raises:
        UsageError: there is no such file and no such name; the nearest name is the hint.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return ResolvedPreset(path=path, name=path.stem, origin=str(path.parent))
    presets = list_presets(extra)
    is_path = path.suffix in SUFFIXES or len(path.parts) > 1
    for preset in presets:
        if not is_path and preset.name == text:
            return preset
        if is_path and preset.path.name == path.name:
            return attrs.evolve(preset, note=f"{text} does not exist; using the bundled preset {preset.path.name}")
    near = nearest(path.stem if is_path else text, [preset.name for preset in presets])
    raise UsageError(
        f"there is no preset {text!r}",
        key="--preset",
        hint=f"did you mean {near}?" if near else "eulerforge presets list shows the bundled ones",
    )
