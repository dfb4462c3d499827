"""``eulerforge plugins list | show | check | new``: what is installed, whether it keeps the contract, your own."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from eulerforge.api import BackboneSpec, PhaseGroupSpec, PresetSpec, StrategySpec
from eulerforge.cli import plugins_new
from eulerforge.cli.output import emit_json, print_table, say, tell
from eulerforge.cli.plugin_options import add_plugin_options, registry_from
from eulerforge.errors import PluginError
from eulerforge.plugins import Offer, PluginRecord, Registry
from eulerforge.plugins.discovery import canonical

LIST_HEADERS = ("NAME", "KIND", "OFFERS", "VERSION", "DISTRIBUTION", "STATUS", "REASON")
KEY_HEADERS = ("KEY", "TYPE", "DEFAULT", "HELP")
CHECK_HEADERS = ("CHECK", "STATUS", "REASON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four subcommands, each with ``--json`` and the options that block plugins."""
    commands = parser.add_subparsers(dest="plugins_command", required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="all installed plugins with their status")
    show = commands.add_parser("show", help="what one plugin offers, with every configuration key")
    check = commands.add_parser("check", help="whether a plugin keeps the contract")
    new = commands.add_parser("new", help="write a distribution of your own, with tests that pass")
    plugins_new.add_arguments(new)
    for name, one in (("show", show), ("check", check)):
        one.add_argument(
            "name", metavar="NAME", help=f"the plugin to {name}: its own name, one that it offers, or DISTRIBUTION:NAME"
        )
    for one in (listing, show, check, new):
        one.add_argument("--json", action="store_true", help="machine-readable output on stdout")
        add_plugin_options(one)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; gives back the exit code."""
    # a listing shows what is wrong instead of stopping at it; strictness is then a matter of the exit code
    registry = registry_from(argparse.Namespace(**{**vars(args), "strict_plugins": False}))
    code = {"list": _list, "show": _show, "check": _check, "new": plugins_new.run}[args.plugins_command](args, registry)
    return PluginError.exit_code if args.strict_plugins and registry.faults() else code


def _list(args: argparse.Namespace, registry: Registry) -> int:
    if args.json:
        emit_json({"plugins": [record.to_json() for record in registry.records]})
    elif not registry.records:
        say("no plugin is installed: pip install 'eulerforge-core[plugins]' brings the standard ones")
    else:
        print_table(LIST_HEADERS, [_list_row(record) for record in registry.records])
    return 0


def _list_row(record: PluginRecord) -> tuple[str, ...]:
    kinds = dict.fromkeys(_words(offer.kind) for offer in record.offers)
    offers = [
        offer.name + (f" ({', '.join(offer.spec.groups)})" if isinstance(offer.spec, PhaseGroupSpec) else "")
        for offer in record.offers
    ]
    reason = f"{record.reason}. {record.hint}" if record.hint else record.reason
    return (
        record.name,
        ", ".join(kinds),
        ", ".join(offers),
        record.version,
        record.distribution,
        record.status,
        reason,
    )


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def find_records(registry: Registry, name: str) -> tuple[PluginRecord, ...]:
    """The plugins that a user means: by entry, distribution or qualified name, else by something that they offer.

    Raises:
        PluginError: there is none.
    """
    wanted = canonical(name)
    names = [(record, *_names(record)) for record in registry.records]
    found = [record for record, own, _ in names if wanted in own]
    found = found or [record for record, _, offered in names if wanted in offered]
    if found:
        return tuple(found)
    offered_names = {offer.name for record in registry.records for offer in record.offers}
    known = sorted({record.name for record in registry.records} | offered_names)
    near = difflib.get_close_matches(name, known, n=1)
    raise PluginError(
        f"there is no plugin {name!r}",
        hint=f"did you mean {near[0]!r}?" if near else "eulerforge plugins list shows the installed plugins",
    )


def _names(record: PluginRecord) -> tuple[set[str], set[str]]:
    own, distribution = canonical(record.name), canonical(record.distribution)
    offered = {canonical(label) for offer in record.offers for label in offer.labels}
    return {own, distribution, f"{distribution}:{own}"}, offered | {f"{distribution}:{label}" for label in offered}


def _show(args: argparse.Namespace, registry: Registry) -> int:
    records = find_records(registry, args.name)
    described = [
        {**record.to_json(), "offers": [_offer_json(registry, one) for one in record.offers]} for record in records
    ]
    if args.json:
        emit_json({"plugins": described})
        return 0
    for record, shown in zip(records, described, strict=True):
        tell("\n".join(_head(record)))
        for offer in shown["offers"]:
            tell("\n" + "\n".join(_offer_lines(offer)))
            if offer.get("keys"):
                print_table(KEY_HEADERS, [_key_row(key) for key in offer["keys"]])
    return 0


def _head(record: PluginRecord) -> Iterator[str]:
    yield f"{record.name}: {record.status}"
    yield f"  distribution: {record.distribution} {record.version}"
    yield f"  entry module: {record.module}"
    if record.reason:
        yield f"  reason: {record.reason}"
    if record.hint:
        yield f"  hint: {record.hint}"


def _offer_json(registry: Registry, offer: Offer) -> dict[str, Any]:
    spec = offer.spec
    shown: dict[str, Any] = {**offer.to_json(), "summary": spec.summary}
    if isinstance(spec, PresetSpec):
        return {**shown, "package": spec.package, "file": spec.file}
    shown |= {"target": spec.target, "docs_url": spec.docs_url}
    if isinstance(spec, BackboneSpec):
        shown |= {
            "model_types": list(spec.model_types),
            "partial_model_types": list(spec.partial_model_types),
            "roles": list(spec.roles),
            "isolation": spec.isolation,
        }
    elif isinstance(spec, PhaseGroupSpec):
        shown["groups"] = list(spec.groups)
    elif isinstance(spec, StrategySpec):
        shown |= {"groups": list(spec.groups), "stored_weights": spec.stored_weights, **_keys_json(registry, spec)}
    return shown


def _keys_json(registry: Registry, spec: StrategySpec) -> dict[str, Any]:
    # imported here, because listing needs no config class
    from eulerforge.plugins.describe import describe_keys

    try:
        config = registry.strategy_config(f"{registry.owner(spec).distribution}:{spec.name}")
        keys = [{**attrs.asdict(key), "default_text": key.default_text} for key in describe_keys(config, "injection.")]
    except (PluginError, NameError, TypeError) as error:
        return {"keys": [], "keys_error": str(error)}
    return {"keys": keys}


def _offer_lines(offer: dict[str, Any]) -> Iterator[str]:
    yield f"{_words(offer['kind'])} {offer['name']}: {offer['summary']}"
    for field in ("aliases", "model_types", "partial_model_types", "roles", "groups"):
        if offer.get(field):
            yield f"  {_words(field)}: {', '.join(offer[field])}"
    for field in ("isolation", "target", "docs_url", "file", "keys_error"):
        if offer.get(field):
            yield f"  {_words(field)}: {offer[field]}"
    if "stored_weights" in offer:
        how = "stay in half precision" if offer["stored_weights"] else "become fp32"
        yield f"  stored weights: {how} where a CPU multiplies in fp32"


def _key_row(key: dict[str, Any]) -> tuple[str, ...]:
    choices = f" (one of {', '.join(map(str, key['choices']))})" if key["choices"] else ""
    return (key["name"], key["type"], key["default_text"], key["help"] + choices)


def _check(args: argparse.Namespace, registry: Registry) -> int:
    # imported here, because it brings subprocess and only this command needs it
    from eulerforge.plugins.checks import Check, check_plugin

    results: list[tuple[PluginRecord, Sequence[Check]]] = [
        (record, check_plugin(registry, record)) for record in find_records(registry, args.name)
    ]
    passed = not any(check.failed for _, checks in results for check in checks)
    if args.json:
        plugins = [{**record.to_json(), "checks": [attrs.asdict(row) for row in rows]} for record, rows in results]
        emit_json({"passed": passed, "plugins": plugins})
    else:
        for record, rows in results:
            tell(f"{record.qualified_name} {record.version}")
            print_table(CHECK_HEADERS, [(row.name, row.status, row.reason) for row in rows])
    return 0 if passed else PluginError.exit_code
