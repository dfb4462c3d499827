"""Plots and tables of ``results/growth.json``: SVG files for docs/explanation/growth/, tables on standard output.

The same figures give the same bytes: no date, fixed ids. Colours are readable on white and on black.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "results" / "growth.json"
PLOTS = HERE.parent / "docs" / "explanation" / "growth"
LABELS = {
    "length": "tokens of a row",
    "batch": "rows of a step",
    "micro_batch": "tokens of a micro-batch",
    "vocabulary": "vocabulary",
    "rank": "LoRA rank",
    "layers": "layers",
    "rows": "rows of the file",
}
BLUE, ORANGE, GREY = "#3a86d1", "#d9812b", "#808080"
STYLE = {
    "svg.hashsalt": "growth",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "axes.grid": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.marker": "o",
    "lines.markersize": 4,
    "legend.frameon": False,
}


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def of_axis(report: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    return [cell for cell in report["cells"] if cell["axis"] == axis]


def table(report: dict[str, Any], axis: str) -> Iterator[str]:
    """The axis as lines of Markdown."""
    if axis == "rows":
        yield "| rows | first start, CPU s | cached start, CPU s | peak MiB | own memory, MiB | pages of files, MiB |"
        yield "|---|---|---|---|---|---|"
        for cell in of_axis(report, axis):
            first = cell["first"]
            sizes = " | ".join(mib(first[name]) for name in ("peak_rss", "anonymous", "of_files"))
            yield f"| {cell['value']:,} | {first['cpu_s']:.1f} | {cell['cached']['cpu_s']:.1f} | {sizes} |"
        return
    yield f"| {LABELS[axis]} | tokens of a step | CPU s of a step | tokens / CPU s | loaded MiB | peak MiB |"
    yield "|---|---|---|---|---|---|"
    for cell in of_axis(report, axis):
        speed = f"{cell['cpu_s_per_step']:.2f} | {cell['tokens_per_cpu_s']:,.0f}"
        sizes = f"{mib(cell['loaded_rss'])} | {mib(cell['peak_rss'])}"
        yield f"| {cell['value']:,} | {cell['tokens_per_step']:,} | {speed} | {sizes} |"


def lines(cells: list[dict[str, Any]], axis: str) -> tuple[tuple[str, dict[str, list[float]]], ...]:
    """(title, {legend: values}) of the left and the right half."""
    if axis == "rows":
        left = {f"{start} start": [cell[start]["cpu_s"] for cell in cells] for start in ("first", "cached")}
        kinds = {"peak": "peak_rss", "own memory": "anonymous", "pages of files": "of_files"}
        right = {name: [cell["first"][kind] / 2**20 for cell in cells] for name, kind in kinds.items()}
        return ("CPU seconds to the first step", left), ("MiB", right)
    speed = {"tokens per CPU second": [cell["tokens_per_cpu_s"] for cell in cells]}
    kinds = {"peak": "peak_rss", "after loading": "loaded_rss"}
    return ("tokens per CPU second", speed), (
        "MiB",
        {name: [cell[kind] / 2**20 for cell in cells] for name, kind in kinds.items()},
    )


def draw(report: dict[str, Any], axis: str, folder: Path) -> Path:
    """Two plots in one file: speed, or start-up, on the left, memory on the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    cells = of_axis(report, axis)
    values = [cell["value"] for cell in cells]
    with matplotlib.rc_context(STYLE):
        figure, halves = pyplot.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
        for half, (title, series) in zip(halves, lines(cells, axis), strict=True):
            for (name, numbers), colour in zip(series.items(), (BLUE, ORANGE, GREY), strict=False):
                half.plot(values, numbers, color=colour, label=name)
            half.set_xscale("log")
            half.set_xticks(values, [short(value) for value in values])
            half.minorticks_off()
            half.set_xlabel(LABELS[axis])
            half.set_title(title, fontsize=9)
            half.set_ylim(bottom=0)
            half.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))
            if len(series) > 1:
                half.legend()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{axis}.svg"
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    # matplotlib leaves spaces at line ends
    text = "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text(text + "\n", encoding="utf-8")
    return path


def short(value: int) -> str:
    """8192 as 8k, 1000000 as 1M."""
    for size, letter in ((10**6, "M"), (1024, "k"), (1000, "k")):
        if value >= size and value % size == 0:
            return f"{value // size}{letter}"
    return str(value)


def main() -> None:
    report = json.loads(FIGURES.read_text(encoding="utf-8"))
    for axis in LABELS:
        path = draw(report, axis, PLOTS)
        print(f"\n{path.name}\n")
        print("\n".join(table(report, axis)))


if __name__ == "__main__":
    main()
