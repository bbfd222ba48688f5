"""Write all tables and plots from the committed results: `python -m bench.report`, or of one other file:
`python -m bench.report OUTDIR/results.json`.

Each JSON gets its plot and its tables (.png, .md) beside it; the docstring of the function that writes a table stands
above it. Without an argument README.md gets one plot and one table, too, between `<!-- bench:plot -->` or
`<!-- bench:table -->` and `<!-- /bench -->`.
"""

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas
from pandas import DataFrame, Series

from bench import cost_model, plot, results
from bench.case import HEADLINES, KEYS

README = Path(__file__).parent.parent / "README.md"
TOGETHER = results.FOLDER / "speed-up.png"


def headlines(rows: DataFrame) -> str:
    """The promised cases of a CPU: forward, and forward + backward + Adam, against `nn.Linear`."""
    keys = [key for key in KEYS if key not in ("threads", "arithmetic")]
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


def bfloat16(rows: DataFrame) -> str:
    """The same in bfloat16, weights, activations and Adam's state. The C++ kernels compute in float32; `nn.Linear` uses
    the CPU's bfloat16 instructions where there are any. No bound is known."""
    return headlines(rows)


def gradients(rows: DataFrame) -> str:
    """`SparseLinear`'s forward and both gradients, as they come, against `nn.Linear`'s: replayed as a CUDA graph, and
    eager, where the host may be what takes the time."""
    keys = ["arithmetic", "out_features", "tokens", "block_size", "density"]
    rows = rows.sort_values(keys, ascending=[True, True, False, False, False])
    graph, eager = rows[rows.clock == "graph"], rows[rows.clock == "host"]
    both = graph.merge(eager[[*KEYS, "time_us", "partner_us", "ratio"]], "left", on=KEYS, suffixes=("", "_eager"))
    return markdown(
        case(both)
        | {"us": us(both.time_us), "dense us": us(both.partner_us), "faster": faster(both)}
        | {"eager us": us(both.time_us_eager), "dense eager us": us(both.partner_us_eager)}
        | {"eager faster": [number(v, "{:.2g}x") for v in both.ratio_eager]}
    )


def products(rows: DataFrame) -> str:
    """The products alone, one thread: `dds transposed` is y = x Wᵀ, `dds` is dx = dy W, `sdd` is dW = dyᵀx on the live
    blocks. GFLOP/s count live weights only."""
    rows = rows[rows.tokens.eq(2048) & rows.density.isin([0.5, 0.1, 0.02]) & rows.block_size.isin([1, 4, 16, 64])]
    rows = rows[rows.threads == 1].sort_values(["name", "block_size", "density"], ascending=[True, True, False])
    return markdown(
        {"product": rows["name"], "layer": shape(rows), "tokens": rows.tokens, "block": rows.block_size}
        | {"density": rows.density, "ms": ms(rows.time_us), "dense ms": ms(rows.partner_us), "faster": faster(rows)}
        | {"GFLOP/s": (rows.flop / rows.time_us / 1e3).map("{:.0f}".format)}
        | bound(rows)
    )


def paths(rows: DataFrame) -> str:
    """Times of our Triton kernels alone and of the vendor's GEMM, and how much faster than that are the kernels, what
    the chooser took, and the dense path, which copies the blocks into a dense matrix."""
    rows = rows[rows.clock == "graph"].dropna(subset="ratio")
    wide = rows.pivot_table(index=[*KEYS, "name"], columns="backend", values="ratio")
    paths = {name: key for name, key in PATHS.items() if key != "cuda" or key in wide}  # only where its kernels ran
    wide = wide.reindex(columns=list(paths.values())).reset_index()
    own = rows[rows.backend == "triton"][[*KEYS, "name", "device_name", "time_us", "partner_us", "flop"]]
    wide = wide.merge(own, on=[*KEYS, "name"])
    keys = ["arithmetic", "out_features", "tokens", "block_size", "density", "name"]
    wide = wide.sort_values(keys, ascending=[True, True, False, False, False, True])
    return markdown(
        {"product": wide["name"]}
        | case(wide)
        | {"kernels us": us(wide.time_us), "dense us": us(wide.partner_us)}
        | {f"{name} faster": [number(v, "{:.2f}x") for v in wide[key]] for name, key in paths.items()}
        | {"TFLOP/s": (wide.flop / wide.time_us / 1e6).map("{:.0f}".format)}
    )


PATHS = {"kernels": "triton", "cuda": "cuda", "chosen": "chosen", "dense path": "dense path"}


def chooser(rows: DataFrame) -> str:
    """The time that the chooser's model (`sparsekern/choose/cost.py`) gives with the rates of this device, over the
    time measured: median, and the share furthest from 1."""
    found = cost_model.lines(cost_model.compared(rows))
    if found.empty:
        return ""
    shares = {name: found[name].map("{:.2f}".format) for name in ("median", "worst")}
    return markdown(found.to_dict("series") | shares)


def limits(rows: DataFrame) -> str:
    """What the shares of the bound are relative to, and what dense GEMMs reach."""
    rows = rows.sort_values(["threads", "gflops"], ascending=[True, False])
    keys = [key for key in ("gflops", "gbytes", "time_us") if key in rows]
    known = rows.dropna(subset=keys, how="all")
    columns = {"measured": known["name"]} | ({"threads": known.threads} if known.threads.nunique() > 1 else {})
    units = {"GFLOP/s": "gflops", "GB/s": "gbytes"}
    columns |= {name: [number(v, "{:,.0f}") for v in known[key]] for name, key in units.items()}
    if (alone := known.time_us.where(known.gflops.isna())).notna().any():
        columns |= {"us": [number(v, "{:.3g}") for v in alone]}
    failed = rows.drop(known.index).drop_duplicates("name")
    return markdown(columns | bound(known)) + reasons(failed, "name")


def gemm(rows: DataFrame) -> str:
    """The vendor's GEMM, as the chooser's model meets it."""
    rows = rows.sort_values(["arithmetic", "name", "out_features", "tokens"])
    return markdown(
        {"GEMM of the": rows["name"], "layer": shape(rows), "tokens": rows.tokens, "arithmetic": rows.arithmetic}
        | {"us": us(rows.time_us), "TFLOP/s": (rows.flop / rows.time_us / 1e6).map("{:.0f}".format)}
    )


def blocks(rows: DataFrame) -> str:
    """Speed-up of a training step over dense by block size and density, one thread."""
    rows = rows[(rows["name"] == "step") & (rows.threads == 1) & (rows.out_features == 1024)]
    return by_density(rows, {"tokens": "tokens", "block_size": "block"})


def steps_by_density(rows: DataFrame) -> str:
    """Speed-up of forward and both gradients over dense by block size and density, in 16 bits, as a CUDA graph."""
    return by_density(plot.steps(rows), {"tokens": "tokens", "block_size": "block"})


def gmp(rows: DataFrame) -> str:
    """A step against dense while `sk.GMP` goes from density 1 to 0.05, in the state that the rule leaves the layer
    in."""
    return by_density(rows, {"tokens": "tokens", "block_size": "block", "threads": "threads"})


def by_density(rows: DataFrame, names: dict[str, str]) -> str:
    """Ratios, a column for each density; before them the columns in `names`, under these names."""
    table = rows.pivot_table(index=list(names), columns="density", values="ratio")
    if table.empty:
        return ""
    columns = dict(zip(names.values(), zip(*table.index, strict=True), strict=True))
    for density in sorted(table.columns, reverse=True):
        columns[f"density {density:g}"] = [number(v, "{:.2f}x") for v in table[density]]
    return markdown(columns)


def torch_sparse(rows: DataFrame) -> str:
    """torch's own sparse matrices, by the fastest call that works, with the copies that row-major activations need."""
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
    """A layer's step against other ways to train it sparsely, on the same topology: mask x dense, which simulates it in
    a dense layer as is usual in papers, and SparseLab from PyPI."""
    rows = rows.sort_values(["partner", "out_features", "tokens", "density"], ascending=[False, False, False, False])
    timed = rows.dropna(subset="ratio")
    table = markdown(
        {"partner": timed.partner}
        | case(timed)
        | {"partner ms": ms(timed.partner_us), "ours ms": ms(timed.time_us), "faster": faster(timed)}
    )
    return table + reasons(rows[rows.ratio.isna()].drop_duplicates("partner"), "partner")


def rivals(rows: DataFrame) -> str:
    """Other libraries and mask x dense: each product as the chooser takes it against theirs, replayed as CUDA graphs.
    What a library prepares once for a topology is not timed."""
    rows = rows.assign(product=rows["name"].str.partition(":")[0])
    rows = rows.sort_values(["partner", "arithmetic", "density", "block_size", "product"])
    timed = rows[rows.partner_us.notna() & (rows.clock == "graph")]
    table = markdown(
        {"rival": timed.partner, "product": timed["product"]}
        | case(timed)
        | {"rival us": us(timed.partner_us), "ours us": us(timed.time_us)}
        | {"faster": faster(timed).where(timed.ratio.notna(), "")}
    )
    failed = rows.dropna(subset="reason").drop_duplicates(["partner", "reason"]) if "reason" in rows else rows[:0]
    missing = [name for name in RIVAL_NAMES if name not in set(rows.partner)]
    not_reached = f"\n\nNot measured yet: {', '.join(missing)}." if missing else ""
    return table + reasons(failed, "partner") + not_reached


def models(rows: DataFrame) -> str:
    """Whole models with sparse MLPs (density 0.1, one thread): a training step against the same model dense, against
    mask x dense, and against a narrower dense model that does as many multiplications. The transformers are two blocks
    of GPT-2 small (sequences of 512) and of ViT-B (197 patches). Their attention stays dense: it is a third of the
    multiplications and more of the time. MB are of weights, gradients, Adam's state, indices and masks after a step."""
    rows = rows.sort_values(["model", "tokens", "block_size", "partner"])
    megabytes = "{:.1f}".format
    return markdown(
        {"model": rows.model, "tokens": rows.tokens, "block": rows.block_size, "against": rows.partner}
        | {"step ms": ms(rows.time_us), "its step ms": ms(rows.partner_us), "faster": faster(rows)}
        | {"tokens/s": (1e6 * rows.tokens / rows.time_us).map("{:,.0f}".format)}
        | {"MB": (rows.ours_bytes / 1e6).map(megabytes), "its MB": (rows.partner_bytes / 1e6).map(megabytes)}
    )


def rl(rows: DataFrame) -> str:
    """The update step of reinforcement learning (forward, backward, Adam; one minibatch, one thread): `SET` at density
    0.05 against dense. MTPPO, MoE and MOORE are the actors of MT3 as `rl` builds them; SAC is the MT10 network, an
    actor and two critics. Each is also measured with all hidden layers three and eight times as wide. Convolutions stay
    dense; they take most of the time of the first three."""
    rows = rows.sort_values(["network", "width", "block_size"])
    return markdown(
        {"network": rows.network.str.upper().replace("MOE", "MoE"), "width": rows.width.astype(int)}
        | {"minibatch": rows.tokens}
        | {"widest layer": shape(rows), "block": rows.block_size, "update ms": ms(rows.time_us)}
        | {"dense update ms": ms(rows.partner_us), "faster": faster(rows)}
    )


def sac(rows: DataFrame) -> str:
    """The whole update of MTSAC on MT10 (two critics, actor, temperatures, targets; 128 transitions a task): `SET` at
    density 0.05 against dense. On a GPU a whole timestep, without the environments: it acts and adds to the replay as
    well."""
    rows = rows.sort_values(["threads", "block_size"])
    return markdown(
        {
            "timed": rows["name"],
            "threads": rows.threads,
            "block": rows.block_size,
            "live / dense": rows.live.map("{:.3f}".format),
        }
        | {"ms": ms(rows.time_us), "dense ms": ms(rows.partner_us), "faster": faster(rows)}
    )


def topology(rows: DataFrame) -> str:
    """Steps on topologies that are not random against random ones of as many blocks: as many blocks in every row, and
    what 200 rewires of SET left in the actor's heads (five matrices, 128 x 1024) after a run on MT5 of the paper's
    length (`bench/trained.py`)."""
    rows = rows.sort_values(["name", "threads", "tokens", "block_size"])
    times = "{:.2g} x mean".format
    return markdown(
        {"topology": rows["name"]}
        | case(rows)
        | {"fullest row": rows.fullest_row.map(times), "fullest column": rows.fullest_column.map(times)}
        | {"step ms": ms(rows.time_us), "random's step ms": ms(rows.partner_us), "faster than random": faster(rows)}
    )


def memory(rows: DataFrame) -> str:
    """Bytes of weight, gradient, Adam's state and index, as torch's allocator counts them, and the peak of a training
    step of that many tokens with the layer, its output and the gradient of its input. On a CPU Linux counts the peak,
    as the allocator does not see the kernels' scratch memory. Making a layer may take more for a moment."""
    rows = rows.sort_values(["density", "block_size"], ascending=[False, True])
    columns = {"layer": shape(rows), "density": rows.density, "block": rows.block_size}
    columns |= {"bytes": rows.ours_bytes.map("{:,.0f}".format), "nn.Linear's": rows.dense_bytes.map("{:,.0f}".format)}
    columns |= {"of dense": (rows.ours_bytes / rows.dense_bytes).map("{:.1%}".format)}
    if "index_per_weight" in rows and rows.index_per_weight.notna().any():
        columns |= {"index, bytes a weight": [number(v, "{:.2g}") for v in rows.index_per_weight]}
    return markdown(columns | peaks(rows))


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
    """A rewire against one training step of the same layer, and its share of a run with an event every 100 steps.
    RigL's includes scoring the dead blocks in the backward of its step; GMP's drops half of the live blocks and
    compacts the layer. On a GPU `graph` is the device's time, `host` what an eager call takes, `launch` the host's part
    of it."""
    rows = rows.sort_values(["name", "threads", "tokens", "block_size"], ascending=[False, True, True, True])
    columns = {"rule": rows["name"], "layer": shape(rows), "block": rows.block_size, "density": rows.density}
    columns |= {"tokens": rows.tokens, "threads": rows.threads}
    if rows.clock.nunique() > 1:
        columns |= {"clock": rows.clock}
    columns |= {"event ms": ms(rows.time_us)}
    if rows.ratio.notna().any():
        steps = 1 / rows.ratio
        columns |= {"step ms": ms(rows.partner_us), "event in steps": [number(v, "{:.2g}") for v in steps]}
        columns |= {"share of a run": [number(v, "{:.2%}") for v in steps / (100 + steps)]}
    return markdown(columns)


def captured(rows: DataFrame) -> str:
    """A captured step, replayed after a rewire: its error, relative to the reference on the new topology."""
    return markdown(case(rows) | {"captured": rows["name"], "error": [number(v, "{:.2g}") for v in rows.error]})


def overhead(rows: DataFrame) -> str:
    """What a call costs the host where there is next to nothing to compute."""
    form = "{:.0f}".format
    return markdown(
        {"call": rows["name"], "layer": shape(rows), "tokens": rows.tokens, "block": rows.block_size}
        | {"SparseLinear us": rows.time_us.map(form), "nn.Linear us": rows.partner_us.map(form)}
    )


def dense_is_faster(rows: DataFrame) -> str:
    """Every measured case in which dense won, of what a user gets."""
    rows = rows[(rows.backend == "chosen") & (rows.clock != "launch") & (rows["name"] != "bare product")]
    lost = rows[rows.ratio < 1].sort_values(["ratio", "suite", "name"])
    return markdown(
        {"suite": lost.suite, "measured": lost["name"], "clock": lost.clock}
        | case(lost)
        | {"speed of dense": faster(lost)}
    )


def failures(rows: DataFrame) -> str:
    """What failed, and why."""
    rows = rows.assign(what=rows.suite + ", " + rows["name"]).drop_duplicates(["what", "reason"])
    return reasons(rows, "what").strip()


EVERY_SUITE = ("forward", "layer", "gradients", "bfloat16", "products", "gmp", "models", "rl", "sac", "overhead")


class Section(NamedTuple):
    suites: tuple[str, ...]  # whose results it shows
    devices: str
    write: Callable[[DataFrame], str]  # its table; the docstring stands above
    picture: tuple[str, Callable[[Path], Path]] | None = None  # what it shows, and where it lies beside a results file


SECTIONS = {
    "A layer": Section(("forward", "layer"), "cpu", headlines),
    "A layer by block size and density": Section(("layer",), "cpu", blocks),
    "A layer by density": Section(("gradients",), "cuda", steps_by_density),
    "A layer in bfloat16": Section(("bfloat16",), "cpu", bfloat16),
    "When dense is faster": Section(EVERY_SUITE, "cpu cuda", dense_is_faster),
    "What this device allows": Section(("limits",), "cpu cuda", limits),
    "Products": Section(("products",), "cpu", products),
    "A layer, forward and both gradients": Section(("gradients",), "cuda", gradients),
    "Memory": Section(("memory",), "cpu cuda", memory),
    "Rewiring": Section(("rewire",), "cpu cuda", rewire),
    "Captured steps": Section(("captured",), "cuda", captured),
    "Whole models": Section(("models",), "cpu", models),
    "Updates of reinforcement learning": Section(("rl",), "cpu", rl),
    "MTSAC": Section(("sac",), "cpu cuda", sac),
    "Topologies": Section(("topology",), "cpu", topology),
    "Gradual pruning": Section(("gmp",), "cpu", gmp),
    "Other ways to train a sparse layer": Section(("masked", "sparselab"), "cpu", others),
    "torch's sparse matrices": Section(("torch_sparse",), "cpu", torch_sparse),
    "Other libraries": Section(("rivals",), "cuda", rivals),
    "Products by path": Section(("products",), "cuda", paths),
    "The vendor's GEMM": Section(("gemm",), "cuda", gemm),
    "The chooser's model": Section(
        ("products", "gemm"), "cuda", chooser, ("Model against measurement", cost_model.path_for)
    ),
    "Host time of a call": Section(("overhead",), "cpu cuda", overhead),
}
RIVAL_NAMES = (
    "mask x dense", "STK", "torch BSR", "torch BSR, tuned", "2:4", "torchao", "torch CSR", "CuPy CSR", "blksprs"
)  # fmt: skip
SHOW_THEIR_REASONS = ("rivals", "torch_sparse", "masked", "sparselab", "limits")


def page(path: Path, rows: DataFrame) -> str:
    """All tables of one device, those without a record left out."""
    parts = [f"# {rows.device_name.iloc[-1]}", f"{conditions(rows)}.", f"![Speed-up]({plot.path_for(path).name})"]
    device = "cuda" if plot.of_gpu(rows) else "cpu"
    for title, section in SECTIONS.items():
        shown = rows[rows.suite.isin(section.suites)]
        if device in section.devices.split() and len(shown) and (text := section.write(shown)):
            parts += [f"## {title}", inspect.getdoc(section.write)]
            if section.picture is not None:
                name, path_for = section.picture
                parts.append(f"![{name}]({path_for(path).name})")
            parts.append(text)
    failed = rows[~rows.suite.isin(SHOW_THEIR_REASONS)]
    failed = failed.dropna(subset="reason") if "reason" in failed else failed[:0]
    if len(failed):
        parts += ["## Failures", inspect.getdoc(failures), failures(failed)]
    return "\n\n".join(parts) + "\n"


# The README's table: on which device, suite and name, case, and what was timed.
FIVE = (
    ("cpu", "layer", "step", (1024, 1024, 2048, 0.1, 16, 1), "step with Adam, one thread"),
    ("cpu", "layer", "step", (1024, 1024, 2048, 0.05, 1, 1), "step with Adam, one thread"),
    ("cuda", "gradients", "forward + backward", (4096, 4096, 16384, 0.1, 64, 1), "forward + backward, CUDA graph"),
    ("cuda", "gradients", "forward + backward", (4096, 4096, 16384, 0.1, 32, 1), "forward + backward, CUDA graph"),
    ("cuda", "gradients", "forward + backward", (4096, 4096, 16384, 0.1, 16, 1), "forward + backward, CUDA graph"),
)


def table(measured: dict[Path, DataFrame]) -> str:
    every, timed, found = pandas.concat(measured.values(), ignore_index=True), [], []
    for device, suite, name, key, text in FIVE:
        clock, arithmetic = ("graph", "bfloat16") if device == "cuda" else ("host", "float32")
        wanted = dict(zip(KEYS, (*key, device, arithmetic), strict=True)) | {
            "suite": suite,
            "name": name,
            "clock": clock,
        }
        own = every[(every[list(wanted)] == pandas.Series(wanted)).all(axis=1)]
        found.append(own)
        timed += [text] * len(own)
    rows = pandas.concat(found)
    return markdown(
        {"device": rows.device_name, "dtype": rows.arithmetic, "layer": shape(rows), "tokens": rows.tokens}
        | {"block": rows.block_size, "density": rows.density, "timed": timed}
        | {"ours us": us(rows.time_us), "dense us": us(rows.partner_us)}
        | {"faster": rows.ratio.map("**{:.2g}x**".format)}
    )


def picture(measured: dict[Path, DataFrame]) -> str:
    """The plot, and under it the conditions of each device with a link to all its tables."""
    lines = [f"![Speed-up against density]({TOGETHER.relative_to(README.parent)})", ""]
    for path, rows in measured.items():
        link = path.with_suffix(".md").relative_to(README.parent)
        lines.append(f"* {conditions(plot.steps(rows))}. [All tables]({link}).")
    return "\n".join(lines)


def case(rows: DataFrame) -> dict[str, Series]:
    """Threads count on a CPU only; the arithmetic is told where it is not float32."""
    columns = {"layer": shape(rows), "tokens": rows.tokens, "density": rows.density, "block": rows.block_size}
    if "cpu" in set(rows.device):
        columns |= {"threads": rows.threads}
    return columns | ({"arithmetic": rows.arithmetic} if rows.arithmetic.nunique() > 1 else {})


def shape(rows: DataFrame) -> Series:
    return rows.out_features.astype(str) + " x " + rows.in_features.astype(str)


def ms(microseconds: Series) -> Series:
    return (microseconds / 1000).map(lambda t: number(t, "{:.3g}" if t < 1000 else "{:,.0f}"))


def us(microseconds: Series) -> Series:
    return microseconds.map(lambda t: number(t, "{:.3g}" if t < 1000 else "{:,.0f}"))


def faster(rows: DataFrame, suffix: str = "") -> Series:
    """Median and, where ours and the partner were timed in turn, quartiles of the ratios."""
    names = [f"{name}{suffix}" for name in ("ratio", "ratio_q1", "ratio_q3")]
    texts = []
    for ratio, *quartiles in rows.reindex(columns=names).values:
        spread = " ({:.2g}-{:.2g})".format(*quartiles) if pandas.notna(quartiles).all() else ""
        texts.append(f"**{ratio:.2g}x**{spread}")
    return Series(texts, rows.index, dtype=object)


def bound(rows: DataFrame, name: str = "of bound", suffix: str = "") -> dict[str, list[str]]:
    """A column with shares of the roofline bound, where they were measured."""
    key = f"roofline{suffix}"
    return {name: [number(v, "{:.0%}") for v in rows[key]]} if key in rows and rows[key].notna().any() else {}


def reasons(failed: DataFrame, key: str) -> str:
    """Lines for what could not be measured."""
    lines = [f"* {row[key]} was not measured: {row.reason}." for _, row in failed.iterrows()]
    return "\n\n" + "\n".join(lines) if lines else ""


def number(value: float, form: str) -> str:
    """Nothing for what was not measured."""
    return "" if pandas.isna(value) else form.format(value)


def markdown(columns: dict[str, Series]) -> str:
    lines = [columns, ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in line)} |" for line in lines)


def conditions(rows: DataFrame) -> str:
    """All that a number depends on and a table does not say."""
    own = rows.iloc[-1]
    versions = f"torch {own.torch}, sparsekern {own.sparsekern}"
    commits, arithmetics = (", ".join(sorted(set(rows[key]))) for key in ("commit", "arithmetic"))
    if plot.of_gpu(rows):
        kernels = f"Triton {own.triton}, tiles {' and '.join(sorted(set(rows.tiles)))}"
    else:
        kernels = f"{own.instruction_set} kernels"
    return (
        f"{own.device_name}; {kernels}; dense by {own.vendor}; {versions} at {commits}; {arithmetics}; {max(rows.date)}"
    )


def written(text: str, measured: dict[Path, DataFrame]) -> str:
    """The README with its plot and its table filled in, where it has the markers.

    Raises:
        ValueError: it lacks a marker, or has it twice.
    """
    fills = {"plot": picture, "table": table}
    for name in fills:
        if (count := text.count(marker := f"<!-- bench:{name} -->")) != 1:
            raise ValueError(f"bench.report: README.md must have one {marker}, it has {count}")

    def fill(match: re.Match) -> str:
        return f"<!-- bench:{match[1]} -->\n{fills[match[1]](measured)}\n<!-- /bench -->"

    return re.sub(r"<!-- bench:(plot|table) -->\n.*?<!-- /bench -->", fill, text, flags=re.S)


def committed() -> dict[Path, DataFrame]:
    return {path: results.load(path) for path in sorted(results.FOLDER.glob("*.json"))}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="a JSON; default: all that are committed, and README.md")
    own = parser.parse_args(arguments).results
    found = committed() if own is None else {own: results.load(own)}
    for path, rows in found.items():
        steps = plot.steps(rows)
        plot.draw(rows, conditions(steps if len(steps) else rows), plot.path_for(path))
        if plot.of_gpu(rows):
            cost_model.draw(rows, conditions(rows), cost_model.path_for(path))
        path.with_suffix(".md").write_text(page(path, rows))
    if own is not None:
        return
    plot.draw_together({rows.device_name.iloc[-1]: rows for rows in found.values()}, TOGETHER)
    README.write_text(written(README.read_text(), found))


if __name__ == "__main__":
    main()
