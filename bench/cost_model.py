"""The chooser's model of a GPU beside what was measured; `python -m bench.cost_model` prints the table of a report.

Every product by the Triton kernels, and every GEMM of the vendor, as CUDA graphs replayed them.
"""

from pathlib import Path

import numpy as np
import pandas
from pandas import DataFrame

from bench import plot, results
from bench.case import KEYS, Case
from bench.plot import pyplot
from sparsekern.choose import cost

MARKERS = {"dds transposed": "o", "dds": "^", "sdd": "s"}
GEMMS = {"dds transposed": "forward", "dds": "input gradient", "sdd": "weight gradient"}


def path_for(results: Path) -> Path:
    return results.with_name(f"{results.stem}-model.png")


def compared(rows: DataFrame) -> DataFrame:
    """A row for each product of `Triton kernels` and `vendor's GEMM`: time_us, model_us, and share: model / time."""
    rows = rows[rows["name"].isin([*MARKERS, *GEMMS.values()])]
    products = rows[(rows.suite == "products") & (rows.backend == "triton") & (rows.clock == "graph")]
    dense = products.dropna(subset="partner_us")
    parts = [
        products.assign(path="Triton kernels"),
        dense.assign(path="vendor's GEMM", time_us=dense.partner_us),
        rows[rows.suite == "gemm"].assign(path="vendor's GEMM"),
    ]
    found = pandas.concat(parts, ignore_index=True).dropna(subset="time_us")
    found["product"] = found["name"].replace({name: product for product, name in GEMMS.items()})
    found["model_us"] = [model_us(row) for _, row in found.iterrows()]
    return found.assign(share=found.model_us / found.time_us)


def model_us(row) -> float:
    """What `sparsekern.choose.cost` says of one row."""
    own = Case(*(row[key] for key in KEYS[:6]), arithmetic=row.arithmetic)
    out, into, tokens, name = own.out_features, own.in_features, own.tokens, row["product"].split()[0]
    if row.path == "Triton kernels":
        product = cost.Product(name, own.block_size, own.kind, out, into, tokens, row.device_name)
        return 1e6 * cost.sparse_seconds(product, own.density)
    sizes = {"dds transposed": (tokens, out, into), "dds": (tokens, into, out), "sdd": (out, into, tokens)}
    return 1e6 * cost.gemm_seconds(own.kind, *sizes[row["product"]], row.device_name)


def lines(found: DataFrame) -> DataFrame:
    """By path, arithmetic and, for kernels, product and block size: cases, median and worst share, and whose it is."""
    found = found.assign(block=found.block_size.where(found.path == "Triton kernels", 0))
    found["kind"] = found.arithmetic.replace({"bfloat16": "16 bits", "float16": "16 bits"})
    found["product"] = found["product"].str.split().str[0]
    table = []
    for (path, kind, product, block), own in found.groupby(["path", "kind", "product", "block"]):
        worst = own.loc[own.share.map(np.log).abs().idxmax()]
        density = f", density {worst.density:g}" if path == "Triton kernels" else ""
        size = f"{worst.out_features} x {worst.in_features}, {worst.tokens} tokens{density}"
        table.append((path, kind, product, block or "", len(own), own.share.median(), worst.share, size))
    return DataFrame(
        table, columns=["path", "arithmetic", "product", "block", "cases", "median", "worst", "worst case"]
    )


def draw(rows: DataFrame, conditions: str, path: Path) -> None:
    found = compared(rows)
    if found.empty:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.8), layout="constrained")
    ours, dense = (found[found.path == name] for name in ("Triton kernels", "vendor's GEMM"))
    blocks = sorted(ours.block_size.unique())
    colors = pyplot.cm.viridis(np.linspace(0, 0.92, len(blocks)))
    for block_size, color in zip(blocks, colors, strict=True):
        own = ours[ours.block_size == block_size]
        scatter(axes[0], own, color, f"block {block_size}: median {own.share.median():.2f}, {len(own)} products")
    axes[0].set_title("Triton kernels, by block size")
    arithmetics = [name for name in ("bfloat16", "float16", "tf32", "float32") if name in set(dense.arithmetic)]
    for arithmetic, color in zip(arithmetics, ("tab:blue", "tab:orange", "tab:red"), strict=False):
        own = dense[dense.arithmetic == arithmetic]
        scatter(axes[1], own, color, f"{arithmetic}: median {own.share.median():.2f}, {len(own)} products")
    axes[1].set_title("The vendor's GEMM, by arithmetic")
    for axis, own in zip(axes, (ours, dense), strict=True):
        low, high = own[["time_us", "model_us"]].min().min() / 1.4, own[["time_us", "model_us"]].max().max() * 1.4
        axis.plot([low, high], [low, high], color="black", lw=1, label="model = measurement")
        axis.plot([low, high], [low / 2, high / 2], ":", color="gray", lw=1, label="model = half of it")
        for product, marker in MARKERS.items():
            axis.plot([], [], marker, ms=5, mfc="none", color="black", label=product)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axis.set(xlabel="measured, microseconds", ylabel="model, microseconds")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="upper left")
    figure.suptitle("The chooser's model against measurement; a median is of model / measured time")
    plot.save(figure, conditions, path)


def scatter(axis, rows: DataFrame, color, label: str) -> None:
    axis.plot([], [], "s", ms=7, color=color, label=label)
    for product, marker in MARKERS.items():
        own = rows[rows["product"] == product]
        axis.plot(own.time_us, own.model_us, marker, ms=4.5, mfc="none", mew=1.1, color=color)


if __name__ == "__main__":
    for path in sorted(results.FOLDER.glob("*.json")):
        if plot.of_gpu(rows := results.load(path)):
            print(lines(compared(rows)).to_string(index=False, float_format="{:.2f}".format))
