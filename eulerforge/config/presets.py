"""Finding presets: a path, or the bare name of one that is bundled or that a plugin brings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import attrs

from eulerforge.api import PresetSpec
from eulerforge.config.location import expanded, resolve_location
from eulerforge.config.suggest import nearest
from eulerforge.errors import PluginError, Problem, UsageError

SUFFIXES = (".toml", ".yml", ".yaml")
CORE = "eulerforge-core"


@attrs.frozen(kw_only=True)
class ResolvedPreset:
    """A preset file; ``note`` says when it is not the path that was asked for.

    ``problem`` says why a plugin's preset cannot be used; ``path`` is then only what the plugin wrote.
    """

    path: Path
    name: str
    origin: str
    note: str | None = None
    problem: Problem | None = None


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
    found = [ResolvedPreset(path=path, name=path.stem, origin=CORE) for path in files]
    found += [_of_plugin(spec) for spec in extra]
    return sorted(found, key=lambda preset: preset.name)


def _of_plugin(spec: PresetSpec) -> ResolvedPreset:
    """A plugin's preset; that its file is not there must not hide the other presets."""
    try:
        path = resolve_location(f"pkg://{spec.package}/{spec.file}")
        if not path.is_file():
            raise UsageError(f"{spec.file} is a folder", hint="the plugin's author names the file in it")
    except UsageError as error:
        return ResolvedPreset(path=Path(spec.file), name=spec.name, origin=str(spec.package), problem=error.problems[0])
    return ResolvedPreset(path=path, name=spec.name, origin=spec.package)


def find_preset(text: str, extra: Iterable[PresetSpec] = ()) -> ResolvedPreset:
    """The preset that ``--preset`` names.

    A path that does not exist but whose file name is a bundled preset uses that one and says so.
    A bundled preset comes before a plugin's of the same name.

    Raises:
        UsageError: there is no such file and no such name; the nearest name is the hint.
        PluginError: a plugin offers the name, and not the file.
    """
    path = expanded(text)
    if path.is_file():
        return ResolvedPreset(path=path, name=path.stem, origin=str(path.parent))
    presets = list_presets(extra)
    is_path = path.suffix in SUFFIXES or len(path.parts) > 1
    for preset in sorted(presets, key=lambda preset: preset.origin != CORE):
        if not is_path and preset.name == text:
            return _usable(preset)
        if is_path and preset.origin == CORE and preset.path.name == path.name:
            return attrs.evolve(preset, note=f"{text} does not exist; using the bundled preset {preset.path.name}")
    names = [preset.name for preset in presets]
    near = nearest(path.stem if is_path else text, names)
    hint = f"did you mean {near}?" if near else "eulerforge presets list shows the bundled ones"
    if not near and not is_path and (alike := [name for name in names if text.lower() in name]):
        hint = f"give the whole name: {', '.join(alike[:6])}{' ...' if len(alike) > 6 else ''}"
    raise UsageError(f"there is no preset {text!r}", key="--preset", hint=hint)


def _usable(preset: ResolvedPreset) -> ResolvedPreset:
    if preset.problem is None:
        return preset
    raise PluginError(
        f"the preset {preset.name} of the package {preset.origin} cannot be used: {preset.problem.message}",
        key="--preset",
        hint=preset.problem.hint or "eulerforge presets list shows the others",
    )
