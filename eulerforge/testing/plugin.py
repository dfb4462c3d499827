"""What every plugin owes: an entry point, an API number, a light import, true specs. ``plugins check`` as tests."""

from __future__ import annotations

import functools

from eulerforge.plugins.checks import Check, check_plugin
from eulerforge.testing.fault import require
from eulerforge.testing.installed import record_of, registry, require_loaded

MENDS = {
    "light import": "import heavy modules in the module of the target, not in the entry or config module",
    "names": "choose a name of your own; of two equal ones neither wins",
    "offers": "decorate a hook such as eulerforge_backbones with hookimpl and return a spec",
    "fields": "fill the field in the spec",
    "file": "put the preset below the package and into the wheel",
    "target": "write target = 'package.module:attribute' of something that can be imported",
    "protocol": "the protocols in eulerforge.api say which methods and arguments",
    "config": "declare every key with setting(default, help=...) in an attrs class that extends InjectionConfig",
}


@functools.cache
def checks_of(entry_module: str) -> tuple[Check, ...]:
    """The rows of ``plugins check``; a fresh process looks at the import, so it is done once."""
    return check_plugin(registry(), record_of(entry_module))


class PluginConformance:
    """Inherit it in a class whose name starts with ``Test``, and name the entry module."""

    plugin = ""
    """The entry module, as the entry point names it: ``"eulerforge_backbone_acme.plugin"``."""

    def test_it_is_installed_and_loads(self) -> None:
        """An entry point names it, it imports, its API number is one that the core serves."""
        require_loaded(record_of(self.plugin))

    def test_its_import_is_light(self) -> None:
        """A fresh process that imports its entry and config modules has no torch in it."""
        self._hold("light import")

    def test_it_offers_something_under_names_of_its_own(self) -> None:
        """It offers something, and no other plugin offers the same name."""
        self._hold("names", "offers")

    def test_its_specs_are_complete(self) -> None:
        """Every spec has a summary and the fields that its kind needs."""
        self._hold("fields", "file")

    def test_its_targets_have_the_shape_of_their_protocol(self) -> None:
        """Every target imports, and its methods can be called as the core calls them."""
        self._hold("target", "protocol")

    def test_its_keys_are_documented(self) -> None:
        """A strategy's config class extends InjectionConfig, and every key has a help text."""
        self._hold("config")

    def _hold(self, *names: str) -> None:
        rows = checks_of(self.plugin)
        for row in rows:
            name = row.name.rpartition(": ")[2]
            if name in names:
                require(not row.failed, f"{row.name} of {self.plugin} fails, {row.reason}", MENDS[name])
