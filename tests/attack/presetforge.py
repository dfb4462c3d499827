"""Presets made from the schema itself, written so that the line of every key is known; and every way to break one.

Notable: the schema decides what is tried, so a new key is attacked without a line here.
"""

from __future__ import annotations

import copy
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from eulerforge.api.settings import setting_info
from eulerforge.config.schema import RunConfig
from eulerforge.plugins import load_registry

Tree = dict[str, Any]
FORMATS = ("toml", "yml")
# Keys that exclude others of the base tree; they are tried where they stand in for them.
EXCLUDED = {"data.validation.fraction", "data.validation.path", "training.num_epochs", "injection.layer_indices"}
# Free text: any string is a value that only the model, the hub or the device can judge.
FREE_TEXT = {
    "model_name",
    "output_dir",
    "model.revision",
    "model.attn_implementation",
    "data.system_prompt",
}


@attrs.frozen(kw_only=True)
class Mutation:
    """One thing that is wrong with one key. ``twice`` writes the key a second time, at the end of its table."""

    kind: str
    tree: Tree
    key: str
    twice: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


def settings_of(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, attribute) of every key and section below a class; those of lists of tables as ``key.0.name``."""
    for attribute in attrs.fields(attrs.resolve_types(config_class)):
        key = prefix + attribute.name
        yield key, attribute
        item = item_of(attribute.type)
        if attrs.has(attribute.type):
            yield from settings_of(attribute.type, key + ".")
        elif item is not None and attrs.has(item):
            yield from settings_of(item, key + ".0.")


def schema() -> list[tuple[str, Any]]:
    """All settings of a preset whose strategy is dense_lora."""
    strategy = load_registry().strategy_config("dense_lora")
    core = [
        (key, attribute)
        for key, attribute in settings_of(RunConfig)
        if key != "strategy" and not key.startswith("injection.")
    ]
    return [*core, *settings_of(strategy, "injection.")]


def item_of(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def plain_kind(attribute: Any) -> tuple[Any, bool]:
    """(the type without None, whether None is allowed)."""
    kind = attribute.type
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        return options[0], True
    return kind, False


def is_section(attribute: Any) -> bool:
    return attrs.has(attribute.type)


def is_list_of_tables(attribute: Any) -> bool:
    item = item_of(attribute.type)
    return item is not None and attrs.has(item)


def valid_tree(rows: str) -> Tree:
    """Every key that may stand beside all others, with a value that is allowed."""
    tree: Tree = {}
    for key, attribute in schema():
        if is_section(attribute) or key in EXCLUDED or ".0." in key:
            continue
        put(tree, key, valid_value(key, attribute, rows))
    put(tree, "injection.strategy", "dense_lora")
    return tree


def valid_value(key: str, attribute: Any, rows: str) -> Any:
    """A value that is allowed for a key."""
    special: Tree = {
        "model_name": "no/matter",
        "data.path": [rows],
        "data.schema": {"prompt": "question"},
        "data.date": "2026-02-28",
        "training.phases": [{"step": 0, "trainable": ["lora"]}, {"step": 3, "trainable": ["lora", "attn_lora"]}],
        "training.betas": [0.9, 0.99],
        "training.max_train_steps": 10,
        "training.warmup_steps": 2,
        "training.save_steps": 10,
        "training.val_steps": 5,
        "injection.attn_lora.enabled": True,
        "injection.attn_lora.lora_r": 4,
    }
    if key in special:
        return special[key]
    kind, _ = plain_kind(attribute)
    info = setting_info(attribute)
    if info.choices:
        return info.choices[0]
    default = attribute.default
    if isinstance(default, (bool, int, float, str)):
        return default
    if isinstance(default, tuple):
        return list(default)
    if kind is int:
        return int(info.ge if info.ge is not None else 3)
    return 0.5 if kind is float else "text" if kind is str else []


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key; numbers are places in lists."""
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value


def without(tree: Tree, key: str) -> Tree:
    changed = copy.deepcopy(tree)
    *parents, last = key.split(".")
    node: Any = changed
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node.pop(last, None)
    return changed


def with_value(tree: Tree, key: str, value: Any) -> Tree:
    changed = copy.deepcopy(tree)
    put(changed, key, value)
    return changed


def renamed(tree: Tree, key: str, name: str) -> Tree:
    """The same tree with the last part of ``key`` spelt otherwise, at its place."""
    changed = copy.deepcopy(tree)
    *parents, last = key.split(".")
    node: Any = changed
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    items = [(name if entry == last else entry, value) for entry, value in node.items()]
    node.clear()
    node.update(items)
    return changed


def write(tree: Tree, form: str, twice: str = "") -> tuple[str, dict[str, int]]:
    """The tree as text, and the line of each key (of ``twice``, its second)."""
    lines: list[str] = []
    places: dict[str, int] = {}
    (_write_toml if form == "toml" else _write_yaml)(tree, "", lines, places, twice)
    return "\n".join(lines) + "\n", places


def _write_toml(tree: Tree, prefix: str, lines: list[str], places: dict[str, int], twice: str) -> None:
    tables = {name for name, value in tree.items() if isinstance(value, dict) and value and prefix + name not in INLINE}
    for name, value in tree.items():
        if name not in tables:
            for _ in range(2 if prefix + name == twice else 1):
                lines.append(f"{name} = {_inline(value, 'toml')}")
                places[prefix + name] = len(lines)
    for name in tree:
        if name in tables:
            lines += ["", f"[{prefix}{name}]"]
            places[prefix + name] = len(lines)
            _write_toml(tree[name], f"{prefix}{name}.", lines, places, twice)


def _write_yaml(tree: Tree, prefix: str, lines: list[str], places: dict[str, int], twice: str) -> None:
    indent = "  " * prefix.count(".")
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in INLINE:
            lines.append(f"{indent}{name}:")
            places[key] = len(lines)
            _write_yaml(value, key + ".", lines, places, twice)
        else:
            for _ in range(2 if key == twice else 1):
                lines.append(f"{indent}{name}: {_inline(value, 'yml')}")
                places[key] = len(lines)


INLINE = {"data.schema"}


def _inline(value: Any, form: str) -> str:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value) if form == "toml" else f".{value}".replace(".-", "-.")
    if isinstance(value, Mapping):
        middle = " = " if form == "toml" else ": "
        return "{" + ", ".join(f"{name}{middle}{_inline(entry, form)}" for name, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(entry, form) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def mutations(tree: Tree) -> Iterator[Mutation]:
    """Every single mutation that this page knows, of every key of the schema."""
    names = {key for key, _ in schema()}
    for key, attribute in schema():
        base = _room_for(tree, key)
        if ".0." not in key and key not in EXCLUDED:
            yield from _misspellings(base, key, names)
        if is_section(attribute):
            for wrong in (3, "text", [1], True):
                yield Mutation(kind="a scalar for a section", tree=with_value(base, key, wrong), key=key)
            continue
        if attribute.default is attrs.NOTHING:
            yield Mutation(kind="missing", tree=without(base, key), key=key)
        for kind, value in _wrong_values(key, attribute):
            yield Mutation(kind=kind, tree=with_value(base, key, value), key=key)
        if ".0." not in key and key not in EXCLUDED:
            yield Mutation(kind="twice", tree=base, key=key, twice=True)
    for key, value in {"data.validation.fraction": 0.5, "training.num_epochs": 1.0}.items():
        yield Mutation(kind="excluded by another", tree=with_value(tree, key, value), key=key)
    for value in ("dense_lroa", "", 3, ["dense_lora"]):
        yield Mutation(
            kind="no such value", tree=with_value(tree, "injection.strategy", value), key="injection.strategy"
        )


def _room_for(tree: Tree, key: str) -> Tree:
    rivals = {
        "data.validation.fraction": ("data.validation.size",),
        "data.validation.path": ("data.validation.size",),
        "training.num_epochs": ("training.max_train_steps",),
    }
    for rival in rivals.get(key, ()):
        tree = without(tree, rival)
    return tree


def _misspellings(tree: Tree, key: str, names: set[str]) -> Iterator[Mutation]:
    parent, _, last = key.rpartition(".")
    swapped = last[:-2] + last[-1] + last[-2]
    for slip in (last + "s", swapped, last.upper(), last.replace("_", "-")):
        wrong = f"{parent}.{slip}" if parent else slip
        if slip != last and wrong not in names:
            yield Mutation(kind="misspelt", tree=renamed(tree, key, slip), key=wrong)


def _wrong_values(key: str, attribute: Any) -> Iterator[tuple[str, Any]]:
    kind, optional = plain_kind(attribute)
    info = setting_info(attribute)
    if is_list_of_tables(attribute):
        for wrong in (3, "lora", [3], ["lora"], {"step": 0}):
            yield "wrong type", wrong
        yield "unknown key inside", [{"step": 0, "trainable": ["lora"], "stepp": 1}]
        return
    wrongs: dict[Any, tuple[Any, ...]] = {
        bool: ("yes", 1, [True], {"a": 1}),
        int: ("many", 1.5, True, [1], {"a": 1}),
        float: ("much", True, [0.5], {"a": 1}),
        str: (3, True, ["text"], {"a": "text"}),
    }
    item = item_of(kind)
    if item is not None:
        inner = 7 if item is str else "text"
        found: tuple[Any, ...] = (inner, [inner], {"a": 1}, [[inner]], True)
        if not info.single:
            found += ("text",)
    else:
        found = wrongs.get(kind, (3, "text", [1], {"prompt": 3}))
    for wrong in found:
        if not (isinstance(wrong, bool) and info.switch):  # such keys take true and false too
            yield "wrong type", wrong
    for bound, beyond in ((info.ge, -1), (info.gt, 0), (info.le, 1), (info.lt, 0)):
        if bound is not None:
            yield "out of range", (int(bound) + beyond if kind is int else float(bound) + beyond)
    if kind is float:
        yield "not finite", float("nan")
        yield "not finite", float("inf")
    if info.choices:
        yield "no choice", "zebra"
        yield "no choice", str(info.choices[0]) + "x"
        yield "no choice", ""
    if not optional:
        yield "null", None
    more: dict[str, tuple[Any, ...]] = {
        "backbone": ("qwen9",),
        "data.path": (["nowhere.jsonl"], ["pkg://no_such_package/rows.jsonl"], ["pkg://eulerforge/../rows.jsonl"]),
        "data.validation.path": (["nowhere.jsonl"],),
        "training.betas": ([0.9], [0.9, 1.0], [-0.1, 0.9], []),
        "training.phases.0.trainable": (["lroa"], []),
        "training.phases.0.step": (1,),
        "injection.lora_r": (0, -4),
        "injection.attn_lora.lora_r": (0,),
        "injection.attn_lora.keywords": ([],),
    }
    for wrong in more.get(key, ()):
        yield "no such value", wrong
