"""What the paper reports (arXiv 2508.06871), IQM and 95% interval.

TABLE is its Table 1, normalised scores after 400,000 timesteps, 30 seeds; TABLE_MT10 the success of MTSAC on MT10 after
20,000,000 environment steps, 10 seeds, under the names that rl/reporting/cells.py gives.
"""

from typing import NamedTuple


class Score(NamedTuple):
    iqm: float
    low: float
    high: float


_COLUMNS = [(agent, suite) for agent in ("mtppo", "moe", "moore") for suite in ("mt3", "mt5", "mt7")]
_TABLE = """
dense         .70 .60 .76  .65 .61 .71  .72 .69 .75  .74 .71 .76  .77 .70 .82  .80 .75 .84  .78 .71 .80  .84 .81 .85  .87 .84 .88
gmp           .77 .73 .80  .81 .75 .86  .76 .70 .80  .77 .74 .79  .84 .78 .86  .87 .83 .88  .80 .77 .81  .85 .80 .87  .88 .86 .89
set           .76 .74 .77  .80 .75 .84  .80 .77 .84  .76 .74 .78  .79 .72 .85  .82 .78 .85  .69 .60 .74  .78 .72 .83  .82 .79 .85
redo          .74 .68 .77  .83 .78 .84  .80 .76 .83  .77 .76 .80  .82 .81 .85  .85 .82 .88  .72 .68 .75  .82 .78 .84  .85 .84 .87
reset         .70 .64 .72  .80 .74 .84  .80 .76 .83  .64 .54 .73  .78 .73 .83  .84 .80 .87  .67 .62 .72  .75 .71 .79  .84 .80 .87
weight-decay  .74 .70 .78  .75 .66 .82  .74 .70 .77  .75 .71 .76  .78 .70 .85  .77 .71 .82  .75 .73 .76  .82 .76 .87  .87 .84 .88
layer-norm    .28 .20 .37  .33 .25 .40  .38 .33 .45  .44 .38 .46  .34 .29 .40  .39 .32 .43  .54 .49 .62  .60 .53 .65  .66 .61 .70
"""  # noqa: E501

TABLE = {}  # (agent, suite, treatment) -> Score
for _row in _TABLE.strip().splitlines():
    _treatment, *_values = _row.split()
    for _i, _column in enumerate(_COLUMNS):
        TABLE[(*_column, _treatment)] = Score(*map(float, _values[3 * _i : 3 * _i + 3]))

TABLE_MT10 = {
    "dense": Score(0.73, 0.67, 0.75),
    "gmp": Score(0.75, 0.73, 0.78),
    "gmp, actor only": Score(0.81, 0.77, 0.83),
}
