"""What an event of SET, RigL or GMP costs a layer, against one ordinary training step of the same layer."""

from dataclasses import replace

import pytest

import sparsekern as sk
from bench.case import SQUARE, THREADS, TINY, Case, Sizes, grid, wide_cases
from bench.training import Training, sparse_layer, sparse_training
from sparsekern.backends import cuda
from sparsekern.rewire.on_device import LayerTensors, ModelEvent, ModelTables, rewire_model
from sparsekern.rewire.optimizer_state import element_state

by_cuda = pytest.mark.skipif(bool(cuda.unavailable()), reason=f"backend 'cuda': {cuda.unavailable()}")

CASES = {
    "smoke": grid([TINY], [16], [0.5], [1, 16]),
    "quick": grid([SQUARE], [256], [0.1], [1, 16]),
    "full": [
        *grid([SQUARE], [256], [0.1], [1, 4, 16, 64]),
        *grid([SQUARE], [2048], [0.1], [1, 4, 16, 64], THREADS),
    ],
}


def gpu_cases(sizes: Sizes) -> list[Case]:
    return wide_cases(sizes)


@pytest.mark.clocks("graph", "host", "launch")
def bench_set(compare, record, case):
    ours = sparse_training(case)
    rule = sk.SET(ours.layer, ours.optimizer, update_every=1)
    ours.step()
    record("SET", partner="a training step", **compare(rule.step, ours.step))


@by_cuda
@pytest.mark.device("cuda")
@pytest.mark.clocks("host", "launch")
def bench_set_by_cuda(compare, record, case):
    """The same event by the kernels of csrc/cuda/rewire.cu."""
    ours = sparse_training(case)
    rule = sk.SET(ours.layer, ours.optimizer, update_every=1)
    ours.step()

    def event():
        with sk.use("cuda"):
            rule.step()

    record("SET by cuda", partner="a training step", **compare(event, ours.step))


@by_cuda
@pytest.mark.device("cuda")
@pytest.mark.clocks("host", "launch")
def bench_gmp_by_cuda(compare, record, case):
    """An event that marks a few blocks dead; no layer is compacted."""
    ours = sparse_training(case)
    rule = sk.GMP(ours.layer, ours.optimizer, case.density / 2, end_step=100_000, update_every=1, compact=False)
    ours.step()

    def event():
        with sk.use("cuda"):
            rule.step()

    record("GMP by cuda", partner="a training step", **compare(event, ours.step))


@by_cuda
@pytest.mark.device("cuda")
def bench_kernels_of_cuda(compare, record, case):
    """The kernels alone, in a graph: what a rule prepares for them on the host cannot be captured."""
    ours = sparse_training(case)
    ours.step()
    layer, topology = ours.layer, ours.layer.topology
    state = [(value, fresh) for _, _, value, fresh in element_state([ours.optimizer], layer.weight)]
    tensors = LayerTensors([topology.layout], topology.shape, layer.weight, [(layer.weight, 0.0), *state])
    tables, live = ModelTables([tensors]), topology.live_per_group()
    event = tables.event_table(ModelEvent([int(0.3 * blocks) for blocks in live], live, streams=[0]))
    record("SET by cuda", partner="a training step", **compare(lambda: rewire_model(tables, event), ours.step))


@pytest.mark.device("cpu")
def bench_rigl(compare, record, case):
    """RigL also scores dead blocks in the backward of its step, so steps with and without an event are compared."""
    ours = sparse_training(case)
    rule = sk.RigL(ours.layer, ours.optimizer, update_every=2)

    def step():
        ours.step()
        rule.step()

    found = compare(step, step)
    assert rule.events == rule.clock // 2
    plain = found["partner_us"]
    cost = found["time_us"] - plain
    record(
        "RigL", partner="a training step", time_us=cost, partner_us=plain, ratio=plain / cost, rounds=found["rounds"]
    )


@pytest.mark.device("cpu")
def bench_gmp(compare, record, case):
    """An event that drops half of the live blocks, so that the layer is compacted to the case's density."""
    ours = sparse_training(case)
    rules = []

    def half_way():
        twice = replace(case, density=2 * case.density)
        training = Training(sparse_layer(twice), twice)
        training.step()
        rules.append(sk.GMP(training.layer, training.optimizer, final_density=case.density, end_step=1))

    found = compare(lambda: rules[-1].step(), ours.step, before=half_way)
    assert all(rule.compactions == 1 for rule in rules)
    record("GMP, compacting", partner="a training step", **found)
