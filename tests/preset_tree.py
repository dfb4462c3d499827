"""The full tree of a preset and its one-letter misspellings, for the tests of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

SKIPPED = {"schema"}  # its keys are the user's own


def full_tree() -> dict[str, Any]:
    """Every key of the schema with its default, as a preset would write it."""
    import attrs

    from eulerforge.api import InjectionConfig
    from eulerforge.config.schema import RunConfig
    from eulerforge.config.structure import as_tree

    tree = as_tree(RunConfig(model_name="m", output_dir="out", injection=InjectionConfig()))
    tree.pop("strategy")
    optional = {"training.num_epochs": 1.0, "data.max_rows": 5, "checkpoint.keep_last": 2, "model.revision": "main"}
    for key, value in optional.items():
        section, name = key.split(".")
        tree[section][name] = value
    tree["data"].pop("schema", None)
    tree["injection"] = {"strategy": "dense_lora", **tree["injection"], "lora_r": 8, "attn_lora": {"enabled": True}}
    assert len(attrs.fields(RunConfig)) == len(tree) + 1
    return tree


def walk(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, tables included."""
    for name, value in tree.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from walk(value, (*prefix, name))


def misspellings(word: str, taken: set[str]) -> list[str]:
    """One letter dropped, doubled, changed, two swapped; none of them a real key."""
    middle = len(word) // 2
    variants = [
        word[:middle] + word[middle + 1 :],
        word[:middle] + word[middle] + word[middle:],
        word[:middle] + "q" + word[middle + 1 :],
        word[: middle - 1] + word[middle] + word[middle - 1] + word[middle + 1 :],
    ]
    return [variant for variant in dict.fromkeys(variants) if variant not in taken | {word, ""}]
