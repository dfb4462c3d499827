"""Our data preparation beside bare ``encode_batch`` on the same texts: rows and tokens per second, and their ratio.

In one process, in turns. Bare: a list of texts that are rendered already, encoded in chunks, the ids never looked at.
Ours: a file of JSON lines to arrays in memory, that is reading, checking, rendering, tokenizing, masking, no cache.
The tokenizer is SmolLM2's, from the package of the quickstart; texts as in its rows, each question numbered so that no
two rows are equal.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from rows import QUESTIONS
from transformers import AutoTokenizer

from eulerforge.config.location import resolve_location
from eulerforge.config.presets import find_preset
from eulerforge.config.schema import DataConfig
from eulerforge.data.files import find_files
from eulerforge.data.prepared import build_dataset
from eulerforge.data.read import BadRows, read_rows
from eulerforge.data.render import Renderer
from eulerforge.data.rows import ChatRow, RowParser
from eulerforge.models.source import resolve_source

CHUNK = 1024
KINDS = {
    "short, chat template": ("auto", 200),
    "long, chat template": ("auto", 2000),
    "long, plain text": ("none", 2000),
}
"""data.template, and the characters of an answer."""


def write_rows(path: Path, count: int, longest: int) -> None:
    """Rows of the quickstart's questions, answers cut at ``longest`` characters or repeated up to them."""
    faq = [json.loads(line) for line in resolve_location(QUESTIONS).read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = faq[number % len(faq)]
            answer = " ".join([row["output"]] * (1 + longest // max(1, len(row["output"]))))[:longest].strip()
            file.write(json.dumps({"prompt": f"{row['instruction']} ({number})", "response": answer}) + "\n")


def rendered(config: DataConfig, tokenizer: Any) -> list[str]:
    """The texts that the file's rows are trained as."""
    row_parser, bad = RowParser({}), BadRows()
    rows = [row_parser.parse(source, bad) for source in read_rows(find_files(config.path)[0], bad)]
    shown = Renderer(config, tokenizer).render_all([row for row in rows if isinstance(row, ChatRow)], bad)
    return [one.text for one in shown if one is not None]


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    preset = find_preset("quickstart").path.read_text(encoding="utf-8")
    model_name = next(line.split('"')[1] for line in preset.splitlines() if line.startswith("model_name"))
    tokenizer = AutoTokenizer.from_pretrained(resolve_source(model_name).folder)
    backend = tokenizer.backend_tokenizer
    gc.freeze()  # as the command does: what was imported is out of the collector's sight
    print(
        f"{date.today()}; {os.cpu_count()} cores, {platform.machine()}; Python {platform.python_version()}, tokenizers"
        f" {metadata.version('tokenizers')}, transformers {metadata.version('transformers')};"
        f" load {os.getloadavg()[0]:.1f}"
    )
    print("| rows | tokens a row | bare rows/s | ours rows/s | bare tokens/s | wall, ours / bare | CPU, ours / bare |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, (template, longest) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            write_rows(path, args.rows, longest)
            config = DataConfig(path=(str(path),), template=template, max_length=1 << 20, cache=False)
            texts = rendered(config, tokenizer)

            def bare(texts: list[str] = texts) -> None:
                for start in range(0, len(texts), CHUNK):
                    backend.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)

            def ours(config: DataConfig = config) -> None:
                build_dataset(config, tokenizer)

            tokens = build_dataset(config, tokenizer).train.token_count
            bare()
            times = [(measured(bare), measured(ours)) for _ in range(args.rounds)]
            walls, cpus = ([(one[part], other[part]) for one, other in times] for part in (0, 1))
            alone, whole = (statistics.median(side) for side in zip(*walls, strict=True))
            ratios = [sorted(other / one for one, other in pairs) for pairs in (walls, cpus)]
            shown = [f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in ratios]
            print(
                f"| {kind} | {tokens / args.rows:.0f} | {args.rows / alone:,.0f} | {args.rows / whole:,.0f}"
                f" | {tokens / alone:,.0f} | {shown[0]} | {shown[1]} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
