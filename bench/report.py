"""Write the README's tables and the plots from the committed results: `python -m bench.report`.

A table stands between `<!-- bench:name -->` and `<!-- /bench -->`; `SECTIONS` says which function fills which.
"""

import re
from pathlib import Path

import pandas
from pandas import DataFrame, Series

from bench import plot, results
from bench.case import HEADLINES, KEYS

README = Path(__file__).parent.parent / "README.md"


def headlines(rows: DataFrame) -> str:
    """The promised cases: forward, and forward + backward + Adam."""
    keys = [key for key in KEYS if key not in ("threads", "dtype")]
    shown = {tuple(vars(case)[key] for key in keys) for case in HEADLINES}
    rows = rows[[key in shown for key in rows[keys].itertuples(index=False, name=None)]]
    forward, step = rows[rows["name"] == "forward"], rows[rows["name"] == "step"]
    both = forward.merge(step, on=KEYS, suffixes=("_forward", "_step"))
    both = both.sort_values(["threads", "out_features", "tokens", "density"], ascending=[True, False, False, False])
    columns = case(both)
    for name in ("forward", "step"):
        columns |= {f"{name} ms": ms(both[f"time_us_{name}"]), f"dense {name} ms": ms(both[f"partner_us_{name}"])}
        columns |= {f"{name} faster": faster(both, f"_{name}")}
    return markdown(columns | bound(both, "step of bound", "_step"))


def products(rows: DataFrame) -> str:
    """Each product, with the rate at which it works on live weights."""
    rows = rows[rows.tokens.eq(2048) & rows.density.isin([0.5, 0.1, 0.02]) & rows.block_size.isin([1, 4, 16, 64])]
    rows = rows[rows.threads == 1].sort_values(["name", "block_size", "density"], ascending=[True, True, False])
    return markdown(
        {"product": rows["name"], "layer": shape(rows), "tokens": rows.tokens, "block": rows.block_size}
        | {"density": rows.density, "ms": ms(rows.time_us), "dense ms": ms(rows.partner_us), "faster": faster(rows)}
        | {"GFLOP/s": (rows.flop / rows.time_us / 1e3).map("{:.0f}".format)}
        | bound(rows)
    )


def limits(rows: DataFrame) -> str:
    """What the shares of the roofline bound are relative to, and what dense GEMMs reach of it."""
    rows = rows.sort_values(["threads", "gflops"], ascending=[True, False])
    known = rows.dropna(subset=["gflops", "gbytes"], how="all")
    table = markdown(
        {"measured": known["name"], "threads": known.threads}
        | {name: [number(v, "{:.0f}") for v in known[key]] for name, key in (("GFLOP/s", "gflops"), ("GB/s", "gbytes"))}
        | bound(known)
    )
    failed = rows.drop(known.index).drop_duplicates("name")
    return "\n".join([table, *(f"\n* {r['name']} was not measured: {r.reason}." for _, r in failed.iterrows())])


def blocks(rows: DataFrame) -> str:
    """Speed-up of a training step by block size and density, one thread."""
    rows = rows[(rows["name"] == "step") & (rows.threads == 1) & (rows.out_features == 1024)]
    return by_density(rows, {"tokens": "tokens", "block_size": "block"})


def gmp(rows: DataFrame) -> str:
    """Speed of a step against dense, on the way from density 1 to 0.05."""
    return by_density(rows, {"tokens": "tokens", "block_size": "block", "threads": "threads"})


def by_density(rows: DataFrame, names: dict[str, str]) -> str:
    """Ratios, a column for each density; before them the columns in `names`, under these names."""
    table = rows.pivot_table(index=list(names), columns="density", values="ratio")
    columns = dict(zip(names.values(), zip(*table.index, strict=True), strict=True))
    for density in sorted(table.columns, reverse=True):
        columns[f"density {density:g}"] = table[density].map("{:.2f}x".format)
    return markdown(columns)


def torch_sparse(rows: DataFrame) -> str:
    """The fastest call of each format, and why others cannot be used."""
    rows = rows.join(rows["name"].str.extract(r"(?P<product>.*): (?P<format>\w+) (?P<call>.*)"))
    timed = rows.dropna(subset="partner_us")
    best = timed.loc[timed.groupby([*KEYS, "product", "format"], sort=False).partner_us.idxmin()]
    best = best.sort_values(["threads", "out_features", "tokens", "density", "product", "format"])
    table = markdown(
        case(best)
        | {"product": best["product"], "torch": best.format, "fastest call": best.call.map("`{}`".format)}
        | {"torch ms": ms(best.partner_us), "ours ms": ms(best.time_us), "faster": faster(best)}
    )
    failed = rows.dropna(subset="reason").drop_duplicates(["format", "call"])
    return table + "\n\n" + "\n".join(f"* {r.format}, `{r.call}` fails: {r.reason}." for r in failed.itertuples())


def others(rows: DataFrame) -> str:
    """Other ways to train a sparse layer, and why one could not be measured."""
    rows = rows.sort_values(["partner", "out_features", "tokens", "density"], ascending=[False, False, False, False])
    timed = rows.dropna(subset="ratio")
    table = markdown(
        {"partner": timed.partner}
        | case(timed)
        | {"partner ms": ms(timed.partner_us), "ours ms": ms(timed.time_us), "faster": faster(timed)}
    )
    failed = rows[rows.ratio.isna()].drop_duplicates("partner")
    return "\n".join([table, *(f"\n* {r.partner} was not measured: {r.reason}." for r in failed.itertuples())])


def models(rows: DataFrame) -> str:
    """Whole training steps, and bytes of weights, gradients, Adam's state, indices and masks."""
    rows = rows.sort_values(["model", "tokens", "block_size", "partner"])
    megabytes = "{:.1f}".format
    return markdown(
        {"model": rows.model, "tokens": rows.tokens, "block": rows.block_size, "against": rows.partner}
        | {"step ms": ms(rows.time_us), "its step ms": ms(rows.partner_us), "faster": faster(rows)}
        | {"tokens/s": (1e6 * rows.tokens / rows.time_us).map("{:,.0f}".format)}
        | {"MB": (rows.ours_bytes / 1e6).map(megabytes), "its MB": (rows.partner_bytes / 1e6).map(megabytes)}
    )


def rl(rows: DataFrame) -> str:
    rows = rows.sort_values(["network", "width", "block_size"])
    return markdown(
        {"network": rows.network.str.upper().replace("MOE", "MoE"), "width": rows.width, "minibatch": rows.tokens}
        | {"widest layer": shape(rows), "block": rows.block_size, "update ms": ms(rows.time_us)}
        | {"dense update ms": ms(rows.partner_us), "faster": faster(rows)}
    )


def sac(rows: DataFrame) -> str:
    rows = rows.sort_values(["threads", "block_size"])
    return markdown(
        {"threads": rows.threads, "block": rows.block_size, "live / dense": rows.live.map("{:.3f}".format)}
        | {"update ms": ms(rows.time_us), "dense update ms": ms(rows.partner_us), "faster": faster(rows)}
    )


def topology(rows: DataFrame) -> str:
    rows = rows.sort_values(["name", "threads", "tokens", "block_size"])
    times = "{:.2g} x mean".format
    return markdown(
        {"topology": rows["name"]}
        | case(rows)
        | {"fullest row": rows.fullest_row.map(times), "fullest column": rows.fullest_column.map(times)}
        | {"step ms": ms(rows.time_us), "random's step ms": ms(rows.partner_us), "faster than random": faster(rows)}
    )


def memory(rows: DataFrame) -> str:
    rows = rows.sort_values(["density", "block_size"], ascending=[False, True])
    return markdown(
        {"layer": shape(rows), "density": rows.density, "block": rows.block_size}
        | {"bytes": rows.ours_bytes.map("{:,.0f}".format), "nn.Linear's": rows.dense_bytes.map("{:,.0f}".format)}
        | {"of dense": (rows.ours_bytes / rows.dense_bytes).map("{:.1%}".format)}
        | {"index, bytes a weight": rows.index_per_weight.map("{:.2g}".format)}
        | peaks(rows)
    )


def peaks(rows: DataFrame) -> dict[str, Series]:
    """Columns, where peaks were measured."""
    if "ours_peak_bytes" not in rows:
        return {}
    return {
        "tokens": rows.tokens,
        "peak MB": [number(v / 1e6, "{:.1f}") for v in rows.ours_peak_bytes],
        "nn.Linear's peak MB": [number(v / 1e6, "{:.1f}") for v in rows.dense_peak_bytes],
    }


def rewire(rows: DataFrame) -> str:
    """Cost of an event in training steps of the same layer, and its share of a run with an event every 100 steps."""
    rows = rows.sort_values(["name", "threads", "tokens", "block_size"], ascending=[False, True, True, True])
    steps = 1 / rows.ratio
    return markdown(
        {"rule": rows["name"], "block": rows.block_size, "density": rows.density, "tokens": rows.tokens}
        | {"threads": rows.threads, "event ms": ms(rows.time_us), "step ms": ms(rows.partner_us)}
        | {"event in steps": steps.map("{:.2g}".format), "share of a run": (steps / (100 + steps)).map("{:.2%}".format)}
    )


def overhead(rows: DataFrame) -> str:
    us = "{:.0f}".format
    return markdown(
        {"call": rows["name"], "block": rows.block_size, "SparseLinear us": rows.time_us.map(us)}
        | {"nn.Linear us": rows.partner_us.map(us)}
    )


def dense_is_faster(rows: DataFrame) -> str:
    """Every measured case that lost against dense."""
    lost = rows[rows.ratio < 1].sort_values("ratio")
    return markdown({"suite": lost.suite, "measured": lost["name"]} | case(lost) | {"speed of dense": faster(lost)})


# Table of the README -> (suites it shows, what writes it)
SECTIONS = {
    "headlines": (["forward", "layer"], headlines),
    "bfloat16": (["bfloat16"], headlines),
    "blocks": (["layer"], blocks),
    "limits": (["limits"], limits),
    "products": (["products"], products),
    "torch_sparse": (["torch_sparse"], torch_sparse),
    "others": (["masked", "sparselab"], others),
    "models": (["models"], models),
    "rl": (["rl"], rl),
    "sac": (["sac"], sac),
    "topology": (["topology"], topology),
    "gmp": (["gmp"], gmp),
    "memory": (["memory"], memory),
    "rewire": (["rewire"], rewire),
    "overhead": (["overhead"], overhead),
    "dense_is_faster": (
        ["layer", "forward", "bfloat16", "products", "gmp", "models", "rl", "overhead"],
        dense_is_faster,
    ),
}


def case(rows: DataFrame) -> dict[str, Series]:
    return {
        "layer": shape(rows),
        "tokens": rows.tokens,
        "density": rows.density,
        "block": rows.block_size,
        "threads": rows.threads,
    }


def shape(rows: DataFrame) -> Series:
    return rows.out_features.astype(str) + " x " + rows.in_features.astype(str)


def ms(microseconds: Series) -> Series:
    return (microseconds / 1000).map(lambda t: f"{t:.3g}" if t < 1000 else f"{t:,.0f}")


def faster(rows: DataFrame, suffix: str = "") -> Series:
    """Median and quartiles of the ratios."""
    columns = rows[[f"ratio{suffix}", f"ratio_q1{suffix}", f"ratio_q3{suffix}"]]
    return Series(["**{:.2g}x** ({:.2g}-{:.2g})".format(*row) for row in columns.values], rows.index)


def bound(rows: DataFrame, name: str = "of bound", suffix: str = "") -> dict[str, list[str]]:
    """A column with shares of the roofline bound, where they were measured."""
    key = f"roofline{suffix}"
    return {name: [number(v, "{:.0%}") for v in rows[key]]} if key in rows and rows[key].notna().any() else {}


def number(value: float, form: str) -> str:
    """Nothing for what was not measured."""
    return "" if pandas.isna(value) else form.format(value)


def markdown(columns: dict[str, Series]) -> str:
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in line)} |" for line in lines)


def conditions(rows: DataFrame) -> str:
    """All that a number depends on and a table does not say."""
    own = rows.iloc[-1]
    commits, dtypes = (", ".join(sorted(set(rows[key]))) for key in ("commit", "dtype"))
    return (
        f"{own.device}; {own.instruction_set} kernels; dense by {own.vendor}; torch {own.torch}, "
        f"sparsekern {own.sparsekern} at {commits}; {dtypes}; {max(rows.date)}"
    )


def section(name: str, path: Path, rows: DataFrame) -> str:
    if name == "plot":
        return f"![Speed-up against density]({plot.path_for(path).relative_to(README.parent)})"
    if name == "conditions":
        return f"* `{path.name}`: {conditions(rows)}."
    suites, write = SECTIONS[name]
    shown = rows[rows.suite.isin(suites)]
    return write(shown) if len(shown) else f"`{path.stem}` was not measured."


def written(text: str, measured: dict[Path, DataFrame]) -> str:
    """The README with its sections filled in, for one device after the other."""

    def fill(match: re.Match) -> str:
        parts = (section(match[1], path, rows) for path, rows in measured.items())
        return f"<!-- bench:{match[1]} -->\n" + "\n\n".join(parts) + "\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(\w+) -->\n.*?<!-- /bench -->", fill, text, flags=re.S)


def committed() -> dict[Path, DataFrame]:
    return {path: results.load(path) for path in sorted(results.FOLDER.glob("*.json"))}


if __name__ == "__main__":
    found = committed()
    for path, rows in found.items():
        plot.draw(rows, conditions(rows[rows.suite == "layer"]), plot.path_for(path))
    README.write_text(written(README.read_text(), found))
