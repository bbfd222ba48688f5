"""Speed-up of a training step against density, a panel per number of tokens, a line per block size."""

from pathlib import Path

import matplotlib
from pandas import DataFrame

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def draw(rows: DataFrame, folder: Path) -> None:
    """`rows` as `report.compared` makes them; what the kernels reach solid, what the chooser takes dotted."""
    rows = rows[(rows["product"] == "step") & (rows.arithmetic == "half")]
    rows = rows[rows.out_features == rows.out_features.mode().max()].dropna(subset="ratio")
    if rows.empty:
        return
    counts = sorted(rows.tokens.unique(), reverse=True)
    figure, axes = pyplot.subplots(1, len(counts), figsize=(5 * len(counts), 4.6), squeeze=False, layout="constrained")
    for axis, tokens in zip(axes[0], counts, strict=True):
        for i, (block_size, line) in enumerate(rows[rows.tokens == tokens].groupby("block_size")):
            for contender, style in (("kernels", "o-"), ("chosen", "x:")):
                own = line[line.contender == contender].sort_values("density")
                label = f"{block_size}" if contender == "kernels" else None
                axis.plot(own.density, own.ratio, style, color=f"C{i}", ms=4, lw=1.4, label=label)
        axis.axhline(1, color="black", lw=1)
        axis.set(xscale="log", yscale="log", title=f"{tokens} tokens", xlabel="density (live blocks / all blocks)")
        axis.grid(alpha=0.25, which="both")
        axis.invert_xaxis()
    axes[0][0].set_ylabel("speed-up over the vendor's GEMM")
    axes[0][0].legend(title="block size")
    size = int(rows.out_features.iloc[0])
    figure.suptitle(f"Three products of a training step, {size} x {size}, graph replay; dotted: what the chooser takes")
    figure.savefig(folder / "speedup.png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
