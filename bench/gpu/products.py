"""dds, sdd and whole steps of all contenders: checked against float64, then timed in eager mode and as graphs."""

from collections.abc import Iterator
from dataclasses import asdict

import torch

from bench.gpu import clock, contenders
from bench.gpu.clock import REHEARSAL
from bench.gpu.problem import BOUND, PRODUCTS, Case, Problem
from sparsekern import cost

BLOCK_SIZES = (16,) if REHEARSAL else (64, 128, 32, 16)
DENSITIES = (0.5,) if REHEARSAL else (0.1, 0.2, 0.05, 0.5, 0.02)
TOKENS = (32,) if REHEARSAL else (16384, 4096, 256)
WIDTH = 64 if REHEARSAL else 4096


def main_cases(block_sizes=BLOCK_SIZES, arithmetic: str = "half") -> list[Case]:
    """The promised ones first."""
    return [
        Case(WIDTH, WIDTH, tokens, density, b, arithmetic)
        for tokens in TOKENS
        for density in DENSITIES
        for b in block_sizes
    ]


def float32_cases() -> list[Case]:
    arithmetics = ("ieee",) if REHEARSAL else ("tf32", "ieee")  # the interpreter has no reduced precision
    densities = DENSITIES[:1] if REHEARSAL else (0.1, 0.2)
    return [Case(WIDTH, WIDTH, TOKENS[0] // 4, d, b, a) for a in arithmetics for d in densities for b in BLOCK_SIZES]


def size_cases() -> list[Case]:
    sizes = (96,) if REHEARSAL else (1024, 8192)
    tokens = (32,) if REHEARSAL else (4096, 256)
    return [Case(n, n, t, 0.1, b, "half") for n in sizes for t in tokens for b in BLOCK_SIZES]


def baseline_cases() -> list[Case]:
    densities = (0.5,) if REHEARSAL else (0.1, 0.5)
    arithmetics = ("half",) if REHEARSAL else ("half", "tf32")
    tokens = TOKENS[0] if REHEARSAL else 16384
    order = sorted(BLOCK_SIZES, reverse=True)
    return [Case(WIDTH, WIDTH, tokens, d, b, a) for a in arithmetics for d in densities for b in order]


def measure(case: Case, names: dict, eager: bool = True) -> Iterator[dict]:
    """A record for each contender and product."""
    problem = Problem(case)
    for name, build in names.items():
        problem.checked = set()
        try:
            calls = build(problem)
        except Exception as error:
            yield {"suite": "products", "contender": name, **asdict(case), "reason": contenders.reason(error)}
            continue
        if set(calls) == set(PRODUCTS):
            calls = calls | {"step": contenders.step(calls)}
        for product, call in calls.items():
            yield _record(problem, name, product, call, eager)
    if "kernels" in names:
        yield from _layer_step(problem)


def _record(problem: Problem, name: str, product: str, call, eager: bool) -> dict:
    case = problem.case
    row = {"suite": "products", "contender": name, "product": product, **asdict(case)}
    try:
        if product in PRODUCTS and product not in problem.checked:
            row["error"] = problem.error(product, call(*problem.sets[0]))
            if not row["error"] < BOUND[case.arithmetic]:
                return row | {"reason": f"wrong: relative error {row['error']:.2g}, bound {BOUND[case.arithmetic]}"}
        rotated = lambda: call(*problem.next_set())  # noqa: E731
        if eager:
            times = clock.eager(rotated)
            row |= {"eager_us": times.median, "eager_q1": times.q1, "eager_q3": times.q3}
        row |= _bound(case, product)
        times = clock.replayed(rotated, len(problem.sets))
        return row | {"graph_us": times.median, "graph_q1": times.q1, "graph_q3": times.q3}
    except Exception as error:
        return row | {"reason": contenders.reason(error)}


def _layer_step(problem: Problem) -> Iterator[dict]:
    """Forward and both gradients through autograd, of SparseLinear as it comes and of nn.Linear."""
    dense = torch.nn.Parameter(problem.dense)
    for name, forward, weight in (
        ("SparseLinear", problem.layer, problem.layer.weight),
        ("nn.Linear", lambda x: torch.nn.functional.linear(x, dense), dense),
    ):

        def step(forward=forward, weight=weight):
            x, dy = problem.next_set()
            x = x.detach().requires_grad_()
            return torch.autograd.grad(forward(x), (x, weight), dy)

        yield _record(problem, name, "layer step", lambda x, dy, step=step: step(), True)


def _bound(case: Case, product: str) -> dict:
    """Useful work, and the roofline bound with what is known of the device."""
    products = 1 if product in PRODUCTS else 3
    flop = 2 * products * case.tokens * case.density * case.out_features * case.in_features
    shape = (case.block_size, case.arithmetic, case.out_features, case.in_features, case.tokens, case.density)
    device = "" if REHEARSAL else torch.cuda.get_device_name()
    one = {name: cost.sparse_seconds(name, *shape, device) * 1e6 for name in cost.PRODUCTS}
    bound = {"dds": one["dds"], "dds_back": one["dds"], "sdd": one["sdd"]}.get(product, 2 * one["dds"] + one["sdd"])
    return {"flop": flop, "bound_us": bound}
