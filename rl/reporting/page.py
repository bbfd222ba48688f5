"""The page: one HTML file with all figures and tables, that refers to nothing outside itself."""

import io
import re
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from rl.config import Config
from rl.reporting.cells import Cell, protocol_title
from rl.reporting.conclusions import IQM_RUNS, SEEDS
from rl.reporting.figures import INK, figures
from rl.reporting.runs import Run
from rl.reporting.tables import lines, tables

HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs beside the paper</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; }
figure, .wide { overflow-x: auto; margin: 1.5rem 0; }
svg { width: 100%; height: auto; min-width: 34rem; }
table { border-collapse: collapse; font-size: 0.85rem; }
caption { text-align: left; font-weight: bold; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.7rem 0.2rem 0; border-bottom: 1px solid #8886; }
</style>
</head>
<body>
<h1>Runs beside the paper</h1>
"""
READING = f"""<h2>What a reader may conclude</h2>
<ul>
<li>An interval says how far the number could move with other seeds of the same code on the same tasks. It says nothing
about other tasks, other hyper-parameters or the paper's code.</li>
<li>Fewer than {SEEDS} seeds support no statement about treatments, and no pair with such a cell is compared.</li>
<li>The IQM of fewer than {IQM_RUNS} runs is their mean, and is named so.</li>
<li>A pair of treatments is undecided while the interval of its probability of improvement holds one half. An undecided
pair is no evidence that the two are equal.</li>
<li>With several pairs, an interval of 95% misses now and then by chance alone; nothing is corrected for that.</li>
<li>Curves and metrics describe what happened. They explain no score.</li>
</ul>
"""


def write(found: dict[Config, list[Cell]], left_out: list[Run], file: Path) -> None:
    """Write the page of these cells, by protocol, whole at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writing = file.with_name(f"{file.name}.writing")
    writing.write_text("\n".join(page(found, left_out)), encoding="utf-8")
    writing.replace(file)


def page(found: dict[Config, list[Cell]], left_out: list[Run]) -> Iterator[str]:
    yield HEAD + READING
    for number, (protocol, cells) in enumerate(found.items(), 1):
        yield f"<h2>{escape(protocol_title(protocol))}</h2>\n<ul>"
        yield from (f"<li>{escape(line)}.</li>" for line in lines(protocol, cells))
        yield "</ul>"
        scores, *others = tables(protocol, cells)
        yield html(scores)
        for name, figure in figures(protocol, cells).items():
            yield f"<figure>{svg(figure, f'{number}-{name}')}</figure>"
        yield from map(html, others)
    yield "<h2>Runs</h2>"
    yield "<p>A command is made from a run's settings, in the options of the code that wrote this page.</p>"
    yield html(runs(run for cells in found.values() for cell in cells for run in cell.runs))
    if left_out:
        yield f"<p>Left out, since they are not finished: {', '.join(escape(run.command) for run in left_out)}</p>"
    yield "</body>\n</html>\n"


def runs(of_page: Iterable[Run]) -> Table:
    """Where every number comes from."""
    table = Table("seed", "commit", "command", title="command and commit of every run")
    for run in of_page:
        table.add_row(str(run.config.seed), run.commit, run.command)
    return table


def html(table: Table) -> str:
    """A table that rich would print, as HTML."""
    heads = "".join(f"<th>{escape(str(column.header))}</th>" for column in table.columns)
    cells = zip(*(column.cells for column in table.columns), strict=True)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    note = f"\n<p>{escape(table.caption)}.</p>" if table.caption else ""
    caption = f"<caption>{escape(table.title)}</caption>"
    inner = f"{caption}\n<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="wide"><table>{inner}</table></div>{note}'


def svg(figure: Figure, name: str) -> str:
    """A figure in the text colour of the page around it; names inside it are unique to `name`."""
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        about = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none of it
        figure.savefig(drawn, format="svg", transparent=True, metadata=about)
    text = drawn.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'<g id="[\w.]+_\d+">', "<g>", text)  # numbers that every figure has
