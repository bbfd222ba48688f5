"""The registered operators with layouts that do not fit, of every kind of layer and by every backend."""

import torch

import sparsekern as sk
from sparsekern.topology import COORDINATES

from . import LAYERS, layer, refused

OPERATORS = ("dds", "dds transposed", "sdd", "score_growth")


def call(name: str, kind: str, change, backend: str | None):
    """The operator with a changed layout, and operands that fit the layer."""
    m = layer(kind)
    t = m.topology
    layout = t.layout
    spelled = layout._replace(**dict(zip(COORDINATES, layout.coordinates(), strict=True)))
    changed = change(spelled)
    # a full store has no coordinates, so whoever passes some passes those of all slots
    layout = (spelled if changed.keys() & set(COORDINATES) else layout)._replace(**changed)
    rows, cols = (n * t.block_size for n in t.grid)
    dy, x, weight = torch.randn(5, rows), torch.randn(5, cols), m.weight.detach()
    per_group = (t.groups, t.grid[0] // t.groups, t.grid[1] // t.groups)
    scores = torch.full((t.groups, 9), -1) if t.block_size == 1 else torch.full(per_group, -1.0)
    arguments = {
        "dds": (x, weight, None, None, *layout, True),
        "dds transposed": (dy, weight, None, None, *layout, False),
        "sdd": (dy, x, None, *layout),
        "score_growth": (dy, x, None, *layout, torch.tensor(True), scores),
    }[name]
    operator = getattr(torch.ops.sparsekern, name.split()[0])
    if backend is None:
        return operator(*arguments)
    with sk.use(backend):
        return operator(*arguments)


CHANGES = {
    "rows outside": (lambda l: {"block_rows": l.block_rows + 30000}, "outside"),
    "rows negative": (lambda l: {"block_rows": -3 - l.block_rows}, "outside"),
    "cols outside": (lambda l: {"block_cols": l.block_cols + 30000}, "outside"),
    "one block twice": (
        lambda l: {"block_rows": l.block_rows * 0, "block_cols": l.block_cols * 0},
        "two slots|row-major",
    ),
    "rows of float32": (lambda l: {"block_rows": l.block_rows.float()}, "integers, got torch.float32"),
    "rows of bool": (lambda l: {"block_rows": l.block_rows > 0}, "integers, got torch.bool"),
    "cols complex": (lambda l: {"block_cols": l.block_cols * 1j}, "integers, got torch.complex"),
    "rows shorter": (lambda l: {"block_rows": l.block_rows[:-1]}, "one length"),
    "rows of two axes": (lambda l: {"block_rows": l.block_rows[None], "block_cols": l.block_cols[None]}, "one length"),
    "no slots": (
        lambda l: {"block_rows": l.block_rows[:0], "block_cols": l.block_cols[:0]},
        "index|weight must be|row-major|slots",
    ),
    "rows on meta": (lambda l: {"block_rows": l.block_rows.to("meta")}, "one device"),
    "index on meta": (lambda l: {"index": l.index.to("meta")}, "device"),
    "index longer": (lambda l: {"index": torch.zeros(len(l.index) + 2).int()}, "index"),
    "index of int64": (lambda l: {"index": l.index.long()}, "index"),
    "index of float32": (lambda l: {"index": l.index.float()}, "index"),
    "index of two axes": (lambda l: {"index": l.index[None].clone()}, "index"),
    "num_rows of more": (lambda l: {"num_rows": 100 * l.num_rows}, "num_rows|must be|index|row-major"),
    "num_rows of fewer": (lambda l: {"num_rows": l.groups}, "num_rows|must be|index|outside|row-major"),
    "num_rows negative": (lambda l: {"num_rows": -l.num_rows}, "must be|num_rows|outside"),
    "num_rows zero": (lambda l: {"num_rows": 0}, "must be|num_rows|outside"),
    "num_cols of more": (lambda l: {"num_cols": 100 * l.num_cols}, "must be|num_cols|index|row-major"),
    "num_cols zero": (lambda l: {"num_cols": 0}, "must be|num_cols|outside"),
    "num_cols of 2**40": (lambda l: {"num_cols": 2**40}, "must be|num_cols|index|row-major"),
    "groups zero": (lambda l: {"groups": 0}, "groups"),
    "groups negative": (lambda l: {"groups": -1}, "groups"),
    "groups of 7": (lambda l: {"groups": 7}, "groups=7"),
    "block_size zero": (lambda l: {"block_size": 0}, "block_size|must be"),
    "block_size negative": (lambda l: {"block_size": -8}, "block_size|must be"),
    "block_size doubled": (lambda l: {"block_size": 2 * l.block_size}, "must be"),
    "block_size of 256": (lambda l: {"block_size": 256}, "block_size|must be"),
    "not full that is, or full that is not": (lambda l: {"full": not l.full}, "full|index"),
}
for kind in LAYERS:
    for operator in OPERATORS:
        for what, (change, sentence) in CHANGES.items():
            if kind == "full" and what == "no slots":  # as it should be
                continue
            refused(
                f"{operator}, {kind}: layout with {what}",
                lambda n=operator, k=kind, c=change: call(n, k, c, None),
                sentence,
            )
    for what in ("rows outside", "num_rows of more", "num_cols of more", "groups zero", "block_size doubled"):
        change, sentence = CHANGES[what]
        for backend in ("reference", "dense"):
            for operator in OPERATORS:
                refused(
                    f"{operator} by {backend}, {kind}: layout with {what}",
                    lambda n=operator, k=kind, c=change, b=backend: call(n, k, c, b),
                    sentence,
                )
