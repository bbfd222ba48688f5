"""OUTDIR/results.md and the plots from OUTDIR/results.json; whatever stages are missing are left out."""

import json
from pathlib import Path

import pandas
from pandas import DataFrame

SHAPE = ["out_features", "in_features", "tokens", "arithmetic", "density", "block_size"]
STEPS = ("step", "layer step")


def write(folder: Path) -> None:
    content = json.loads((folder / "results.json").read_text())
    rows = DataFrame(content["records"])
    parts = ["# GPU results", "", *(f"* {name}: {value}" for name, value in content["environment"].items())]
    for title, make in SECTIONS.items():
        try:
            table = make(rows)
        except (KeyError, ValueError) as missing:  # a stage that did not come to run
            table = f"(nothing measured: {missing})"
        parts += ["", f"## {title}", "", table]
    (folder / "results.md").write_text("\n".join(parts) + "\n")
    from bench.gpu import plot

    plot.draw(compared(rows), folder)


def compared(rows: DataFrame) -> DataFrame:
    """Products with their time against dense in the same case, `ratio`, and the share of the roofline bound reached."""
    rows = rows[(rows.suite == "products") & rows["product"].notna()].copy()
    rows = rows.drop_duplicates([*SHAPE, "product", "contender"], keep="last")
    dense = rows[rows.contender.isin(["dense", "nn.Linear"])].dropna(subset="graph_us")
    dense = dense[[*SHAPE, "product", "graph_us"]].rename(columns={"graph_us": "dense_us"})
    dense = dense.drop_duplicates([*SHAPE, "product"], keep="last")
    rows = rows.merge(dense, on=[*SHAPE, "product"], how="left")
    rows["ratio"] = rows.dense_us / rows.graph_us
    rows["share"] = rows.bound_us / rows.graph_us if "bound_us" in rows else float("nan")
    rows["tflops"] = rows.flop / rows.graph_us / 1e6 if "flop" in rows else float("nan")
    return rows


def steps(rows: DataFrame) -> str:
    """Speed-up over dense of the step of SparseLinear, of our kernels alone and of what the chooser takes."""
    rows = compared(rows)
    rows = rows[rows["product"].isin(STEPS) & ~rows.contender.isin(["dense", "nn.Linear"])]
    wide = rows.pivot_table(index=SHAPE, columns=["product", "contender"], values="ratio", sort=False)
    wide.columns = [f"{contender} {product}" for product, contender in wide.columns]
    return markdown(wide.reset_index())


def products(rows: DataFrame) -> str:
    rows = compared(rows)
    rows = rows[rows.contender == "kernels"]
    columns = ["product", "graph_us", "dense_us", "ratio", "tflops", "share", "error"]
    return markdown(rows[[*SHAPE, *(c for c in columns if c in rows)]])


def others(rows: DataFrame) -> str:
    """Every library's time, and how much faster our kernels are on the same inputs."""
    rows = compared(rows)
    own = rows[rows.contender == "kernels"][[*SHAPE, "product", "graph_us"]].rename(columns={"graph_us": "kernels_us"})
    rows = rows[~rows.contender.isin(["kernels", "chosen", "densified", "dense", "SparseLinear", "nn.Linear"])]
    rows = rows.merge(own, on=[*SHAPE, "product"], how="left").dropna(subset="graph_us")
    rows["ours faster"] = rows.graph_us / rows.kernels_us
    return markdown(rows[[*SHAPE, "contender", "product", "graph_us", "kernels_us", "ours faster"]])


def failures(rows: DataFrame) -> str:
    rows = rows.dropna(subset="reason")
    names = rows.contender.fillna(rows.suite) if "contender" in rows else rows.suite
    product = rows["product"].fillna("all") if "product" in rows else "all"
    rows = DataFrame({"what": names, "product": product, "block": rows.block_size, "reason": rows.reason})
    return markdown(rows.drop_duplicates())


def suite(*names: str):
    def table(rows: DataFrame) -> str:
        rows = rows[rows.suite.isin(names)].dropna(axis=1, how="all")
        if rows.empty:
            raise ValueError(" and ".join(names))
        return markdown(rows)

    return table


SECTIONS = {
    "Steps: speed-up over dense": steps,
    "Limits": suite("limits"),
    "Rewiring, captured steps": suite("rewire", "captured step"),
    "Memory": suite("memory"),
    "Call overhead": suite("overhead"),
    "Other libraries": others,
    "What failed, and why": failures,
    "Products": products,
    "The vendor's GEMM": suite("gemm"),
}


def markdown(rows: DataFrame) -> str:
    lines = [rows.columns, ["---"] * len(rows.columns), *rows.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _text(cell) -> str:
    if isinstance(cell, float):
        return "" if pandas.isna(cell) else f"{cell:.3g}" if cell < 1000 else f"{cell:.0f}"
    return str(cell)
