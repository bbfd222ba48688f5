"""The chooser's products on a GPU against other libraries', and against mask x dense."""

import pytest
import torch

from bench import clock, contenders
from bench.case import Case, Sizes, float32_cases, main_cases
from bench.contenders import RIVALS, STEP
from bench.problem import PRODUCTS


def gpu_cases(sizes: Sizes) -> list[Case]:
    """All rivals of a case follow each other in one process, so that they share its data and its true products."""
    many = [case for case in main_cases(sizes) if case.tokens == sizes.tokens[0]]
    return [case for case in [*many, *float32_cases(sizes)[: len(sizes.block_sizes)]] if case.density in (0.1, 0.5)]


@torch.no_grad()
@pytest.mark.parametrize("product", (*PRODUCTS, STEP))
@pytest.mark.parametrize("rival", RIVALS)
def bench_rival(compare, record, problem, rival, product):
    ours = contenders.right(problem, contenders.chosen, product)
    try:
        if product not in contenders.built(problem, RIVALS[rival]):
            pytest.skip(f"{rival} has no {product}")
        theirs = contenders.right(problem, RIVALS[rival], product)
        found = compare(*(lambda f=f: f(*problem.next_set()) for f in (ours, theirs)), calls=problem.calls)
    except Exception as error:
        record(f"{product}: {rival}", partner=rival, reason=contenders.reason(error))
        survived(rival)
        pytest.skip(f"{rival}: {error}")
    record(f"{product}: {rival}", partner=rival, **found)


def survived(rival: str) -> None:
    """End the process where an illegal access of a rival has taken the device from it."""
    try:
        clock.synchronize()
    except RuntimeError as error:
        pytest.exit(f"after {rival} the device answers no more: {error}", returncode=3)
