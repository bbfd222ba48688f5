"""python -m bench.language.report: what blocks cost as a figure, the curves as another, and a table.

Equal steps are read from one run. Equal time has a run of its own, whose schedule ends when the time of dense is over.
"""

from pathlib import Path

import matplotlib
import pandas
import tyro
from pandas import DataFrame

from bench.language.train import Arm, parse

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

KINDS = {"equal-steps": "equal steps", "equal-time": "equal time"}
COLOURS = {"set": "tab:blue", "rigl": "tab:orange", "gmp": "tab:green", "static": "tab:red"}
BLOCK_COLOURS = {1: "tab:blue", 4: "tab:green", 16: "tab:orange", 32: "tab:red"}


def read(folder: Path) -> DataFrame:
    """All curves; those of dense, which has both by one run, once for each kind."""
    curves = []
    for path in sorted(folder.glob("equal-*/*-seed*.csv")):
        arm, seed = path.stem.rsplit("-seed", 1)
        curve = pandas.read_csv(path).assign(arm=arm, seed=int(seed), kind=path.parent.name)
        curves += [curve.assign(kind=kind) for kind in KINDS] if arm == "dense" else [curve]
    if not curves:
        raise FileNotFoundError(f"bench.language.report: no curve of an arm (equal-*/ARM-seedN.csv) in {folder}")
    return pandas.concat(curves, ignore_index=True)


def ends(rows: DataFrame) -> DataFrame:
    """The last row of every run, with the arm taken apart."""
    last = rows.sort_values("step").groupby(["kind", "arm", "seed"]).tail(1)
    arms = DataFrame([vars(parse(arm)) for arm in last.arm], index=last.index)
    return last.drop(columns="density").join(arms)


def table(rows: DataFrame) -> str:
    """Mean of the seeds, and their standard deviation where there are several."""
    last = ends(rows).set_index("kind")
    steps, time = (last.loc[[kind]] for kind in KINDS)
    lines = [
        f"| arm | seeds | learning rate | bits per byte at {steps.step.max()} steps | at the time of dense | its steps "
        "| its time / dense | time of a step / dense | FLOPs / dense | MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    dense = steps[steps.arm == "dense"].mean(numeric_only=True)
    for arm, runs in steps.groupby("arm"):
        other = time[time.arm == arm]
        time_share = other.dense_steps.mean() / dense.dense_steps
        lines.append(
            f"| {arm} | {len(runs)} | {runs.learning_rate.iloc[0]:g} | {spread(runs.bits_per_byte)} "
            f"| {spread(other.bits_per_byte)} | {other.step.mean():.0f} | {time_share:.2f} "
            f"| {(runs.dense_steps / runs.step).mean():.2f} | {runs.flops.mean() / dense.flops:.2f} "
            f"| {runs.bytes.max() / 1e6:.1f} |"
        )
    return "\n".join(lines) + "\n"


def spread(values: pandas.Series) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def draw_blocks(rows: DataFrame, path: Path) -> None:
    """Bits per byte at the end against the block size: lines of the first seed, which all arms have, and others."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True, layout="constrained")
    last = ends(rows)
    first = last.seed.min()
    for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
        runs = last[last.kind == kind]
        for name, style in (("dense", "-"), ("dense-narrow", "--")):
            own = runs[runs.arm == name].set_index("seed").bits_per_byte
            if first in own:
                label = name if name == "dense" else "dense, narrower: FLOPs of density 0.1"
                axis.axhline(own[first], color="black", linestyle=style, label=label)
                axis.axhspan(own.min(), own.max(), color="black", alpha=0.15, linewidth=0)
        usual = (runs["drop"] == Arm.drop) & (runs.rewires == Arm.rewires)  # the table has the others
        sparse = runs[usual & ~runs.rule.str.startswith("dense")]
        for (rule, density, distribution, balanced), arms in sparse.groupby(
            ["rule", "density", "distribution", "balanced"]
        ):
            style = {
                "color": COLOURS[rule],
                "linestyle": "-" if density == 0.1 else ":",
                "marker": "D" if balanced else "o" if distribution == "erk" else "s",
                "markerfacecolor": COLOURS[rule] if density == 0.1 else "white",
            }
            line = arms[arms.seed == first].sort_values("block_size")
            label = f"{rule}, density {density:g}, {distribution}{', balanced rows' if balanced else ''}"
            axis.plot(line.block_size, line.bits_per_byte, markersize=6, label=label, **style)
            others = arms[arms.seed != first]
            axis.plot(others.block_size, others.bits_per_byte, markersize=3, **style | {"linestyle": ""})
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 4, 16, 32], ["1", "4", "16", "32"])
        axis.set_xlabel("block size")
        axis.set_title(f"{title} (lines: seed {first}; small points, bands: all)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out bits per byte")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_curves(rows: DataFrame, path: Path) -> None:
    """Of the dense models and of SET at density 0.1: against steps, time and FLOPs, the first seed."""
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.5), sharey=True, layout="constrained")
    columns = {
        "step": ("equal-steps", "steps"),
        "dense_steps": ("equal-time", "time, in steps of dense"),
        "flops": ("equal-time", "FLOPs"),
    }
    for axis, (column, (kind, label)) in zip(axes, columns.items(), strict=True):
        for (name, seed), curve in rows[rows.kind == kind].groupby(["arm", "seed"]):
            arm = parse(name)
            if seed != rows[rows.arm == name].seed.min() or not (
                arm.rule.startswith("dense") or name == f"set-d0.1-b{arm.block_size}-erk"
            ):
                continue
            colour = "black" if arm.rule.startswith("dense") else BLOCK_COLOURS[arm.block_size]
            style = "--" if arm.rule == "dense-narrow" else "-"
            axis.plot(curve[column], curve.bits_per_byte, style, color=colour, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out bits per byte")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(results: Path = Path("bench/results/language")) -> None:
    rows = read(results)
    draw_blocks(rows, results / "blocks.png")
    draw_curves(rows, results / "curves.png")
    (results / "language.md").write_text(table(rows))


if __name__ == "__main__":
    tyro.cli(main)
