"""python -m bench.language.report: the curves as a figure, and equal steps beside equal seconds as a table."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas
import tyro
from pandas import DataFrame

from bench.language.train import parse

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {1: "tab:blue", 4: "tab:green", 16: "tab:orange", 32: "tab:red"}
STYLES = {"dense": "-", "dense-narrow": "--", "set": "-", "rigl": "--", "gmp": "-.", "static": ":"}


def read(folder: Path) -> DataFrame:
    curves = []
    for path in sorted(folder.glob("*-seed*.csv")):
        arm, seed = path.stem.rsplit("-seed", 1)
        curves.append(pandas.read_csv(path).assign(arm=arm, seed=int(seed)))
    if not curves:
        raise FileNotFoundError(f"bench.language.report: no curve of an arm (ARM-seedN.csv) in {folder}")
    return pandas.concat(curves, ignore_index=True)


def table(rows: DataFrame) -> str:
    """At the steps and at the seconds that every run reached, interpolated on its curve; mean ± deviation of seeds."""
    runs = rows.groupby(["arm", "seed"])
    steps, seconds = (runs[column].max().min() for column in ("step", "seconds"))
    lines = [f"| arm | seeds | bits per byte at {steps} steps | at {seconds:.0f} s | MB |", "|---|---|---|---|---|"]
    for arm, curves in rows.groupby("arm"):
        by_seed = [curve for _, curve in curves.groupby("seed")]
        at_steps, at_seconds = (
            _spread([np.interp(limit, curve[column], curve.bits_per_byte) for curve in by_seed])
            for column, limit in (("step", steps), ("seconds", seconds))
        )
        size = max(curve.bytes.iloc[-1] for curve in by_seed) / 1e6
        lines.append(f"| {arm} | {len(by_seed)} | {at_steps} | {at_seconds} | {size:.1f} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def draw(rows: DataFrame, path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    columns = {"step": "steps", "seconds": "seconds of training", "flops": "FLOPs"}
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for (name, _), curve in rows.groupby(["arm", "seed"]):
            arm = parse(name)
            colour = "black" if arm.rule.startswith("dense") else COLOURS[arm.block_size]
            first = curve.seed.iloc[0] == rows[rows.arm == name].seed.min()
            axis.plot(curve[column], curve.bits_per_byte, STYLES[arm.rule], color=colour, label=name if first else None)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out bits per byte")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(results: Path = Path("bench/results/language")) -> None:
    rows = read(results)
    draw(rows, results / "language.png")
    (results / "language.md").write_text(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
