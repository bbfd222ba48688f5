"""The chooser's two paths on a CPU, for a training step: the C++ kernels, and the vendor's GEMM between copies.

`choose.BREAK_EVEN` comes from these ratios: the density at which both take equal time.
"""

import pytest

from bench.case import SQUARE, TINY, grid
from bench.training import sparse_training, work
from sparsekern import choose
from sparsekern.backends import cpu, dense

CASES = {
    "smoke": grid([TINY], [16], [0.5], [1, 16]),
    "quick": grid([SQUARE], [256], [0.4], [1, 16]),
    "full": grid([SQUARE], [256], [1, 0.8, 0.6, 0.4, 0.25], [1, 2, 4, 8, 16, 64]),
}
INSTRUCTION_SETS = [] if cpu.unavailable() else [name for name in cpu.supported_instruction_sets() if name != "plain"]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    own = cpu.instruction_set()
    cpu.set_instruction_set(request.param)
    yield request.param
    cpu.set_instruction_set(own)


def bench_step(compare, record, case, instruction_set, monkeypatch):
    ours = sparse_training(case)

    def step(path):
        monkeypatch.setattr(choose, "backend_for", lambda *_: path)
        monkeypatch.setattr(choose, "is_surely_for_cpu", lambda *_: path is cpu)
        ours.step()

    found = compare(lambda: step(cpu), lambda: step(dense))
    record(f"step {instruction_set}", backend="cpu", partner="dense path", **found, **work(ours.layer, case.tokens))
