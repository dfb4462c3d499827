"""``plugins check``: what a plugin author wants to know before a user finds out.

Notable: whether the entry module is light is seen in a fresh process, because in this one another plugin may have
imported torch already.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from eulerforge.api import API_VERSION, BackboneSpec, PresetSpec, SequenceMixerFinder, StrategySpec
from eulerforge.api.protocols import PROTOCOLS
from eulerforge.errors import PluginError
from eulerforge.plugins.describe import describe_keys
from eulerforge.plugins.records import CONFLICT, DISABLED, FAULTY, Offer, PluginRecord
from eulerforge.plugins.registry import Registry

HEAVY = ("torch", "transformers", "numpy", "bitsandbytes")
MARK = "eulerforge-light-import:"
SECONDS = 120

_PROBE = f"""
import importlib, json, sys
path, names, heavy = json.loads(sys.argv[1])
sys.path[:] = path
for name in names:
    importlib.import_module(name)
print({MARK!r} + json.dumps([name for name in heavy if name in sys.modules]), flush=True)
"""


@attrs.frozen
class Check:
    """One row: ``status`` is ok, failed or skipped, and ``reason`` says why it is not ok."""

    name: str
    status: str
    reason: str = ""

    @property
    def failed(self) -> bool:
        return self.status == "failed"


def check_plugin(registry: Registry, record: PluginRecord) -> tuple[Check, ...]:
    """Every check of one plugin, in the order in which they make sense."""
    if record.status == DISABLED:
        return (Check("load", "skipped", record.reason),)
    rows = [_row("light import", lambda: _light(_light_modules(record)))]
    if record.status in FAULTY and record.status != CONFLICT:
        rows.append(Check("load", "failed", record.reason))
        rows += [Check(name, "skipped", "the plugin does not load") for name in ("specs", "targets", "protocols")]
        return tuple(rows)
    rows.append(Check("load", "ok", f"API {API_VERSION}"))
    rows.append(Check("names", "failed" if record.status == CONFLICT else "ok", record.reason))
    if not record.offers:
        rows.append(Check("offers", "failed", "it offers nothing: no collecting hook gives a spec"))
    for offer in record.offers:
        rows += _check_offer(registry, offer)
    return tuple(rows)


def _light_modules(record: PluginRecord) -> list[str]:
    """The entry module and the modules of config classes: a preset is checked without torch."""
    configs = [offer.spec.config_target for offer in record.offers if isinstance(offer.spec, StrategySpec)]
    return list(dict.fromkeys(target.partition(":")[0] for target in [record.module, *configs]))


def _check_offer(registry: Registry, offer: Offer) -> Iterator[Check]:
    label = f"{offer.kind.replace('_', ' ')} {offer.name}"
    yield _row(f"{label}: fields", lambda: _fields(offer))
    spec = offer.spec
    if isinstance(spec, PresetSpec):
        yield _row(f"{label}: file", lambda: _preset_file(spec))
        return
    made: list[Any] = []
    yield _row(f"{label}: target", lambda: made.append(registry.create(offer.spec)))
    if made:
        yield _row(f"{label}: protocol", lambda: _protocol(offer, made[0]))
    else:
        yield Check(f"{label}: protocol", "skipped", "the target does not import")
    if isinstance(spec, StrategySpec):
        yield _row(f"{label}: config", lambda: _config(registry, spec))


def _row(name: str, check: Callable[[], str | None]) -> Check:
    try:
        reason = check()
    except PluginError as error:
        return Check(name, "failed", str(error))
    return Check(name, "failed", reason) if reason else Check(name, "ok")


def _light(modules: list[str]) -> str | None:
    arguments = [sys.executable, "-c", _PROBE, json.dumps([sys.path, modules, HEAVY])]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"importing {', '.join(modules)} takes longer than {SECONDS} s"
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not marked:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return f"importing {', '.join(modules)} ends the process: {last}"
    heavy = json.loads(marked[-1].removeprefix(MARK))
    return f"importing {', '.join(modules)} imports {', '.join(heavy)}; move that behind the target" if heavy else None


def _fields(offer: Offer) -> str | None:
    if not offer.spec.summary.strip():
        return "summary is empty"
    wanted = {"backbone": "model_types", "strategy": "groups", "phase_group": "groups"}.get(offer.kind)
    if wanted and not getattr(offer.spec, wanted):
        return f"{wanted} is empty"
    return None


def _preset_file(spec: PresetSpec) -> str | None:
    try:
        found = importlib.util.find_spec(spec.package)
    except (ImportError, ValueError):
        found = None
    folders = (found.submodule_search_locations or []) if found else []
    if any((Path(folder) / spec.file).is_file() for folder in folders):
        return None
    return f"the package {spec.package} has no file {spec.file}"


def _protocol(offer: Offer, made: Any) -> str | None:
    """What of the protocol is missing, or cannot be called as the core calls it."""
    if isinstance(offer.spec, BackboneSpec) and offer.spec.isolation == "gather":
        return _shape(PROTOCOLS[offer.kind], made) or _shape(SequenceMixerFinder, made)
    return _shape(PROTOCOLS[offer.kind], made)


def _shape(protocol: type, made: Any) -> str | None:
    for name in getattr(protocol, "__annotations__", {}):
        if not hasattr(made, name):
            return f"{type(made).__name__} has no {name}"
    for name, function in vars(protocol).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        own = getattr(made, name, None)
        if not callable(own):
            return f"{type(made).__name__} has no method {name}"
        parameters = list(inspect.signature(function).parameters)[1:]
        try:
            inspect.signature(own).bind(*parameters)
        except TypeError as error:
            return f"{name}{inspect.signature(own)} cannot be called as {name}({', '.join(parameters)}): {error}"
    return None


def _config(registry: Registry, spec: StrategySpec) -> str | None:
    config = registry.strategy_config(f"{registry.owner(spec).distribution}:{spec.name}")
    try:
        silent = [key.name for key in describe_keys(config) if not key.help.strip()]
    except (NameError, TypeError) as error:
        return f"an annotation of {config.__name__} cannot be resolved: {error}"
    return f"no help text: {', '.join(silent)}" if silent else None
