"""The products of csrc/cuda: blocks of 16 and 8 against float64, by emulation on a CPU.

On a GPU (marker gpu) the same cases run on the device itself.
"""

import random
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
from emulation import NamedLaunches
from oracle import random_topology
from torch import Tensor

import sparsekern as sk
from sparsekern.backends import cuda
from sparsekern.backends.cuda import products

RANDOM_CASES = 80
# float32 sums in another order than float64's, then the rounding of the output
BOUND = {dtype: oracle.BOUND[dtype] for dtype in products.NAMES}


@pytest.fixture
def launches(monkeypatch):
    launches = NamedLaunches()
    monkeypatch.setattr(cuda, "launch", launches)
    return launches


@pytest.fixture(autouse=True)
def poisoned():
    """Whatever is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """One layer and its operands, 2-D and padded."""

    topology: sk.Topology
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    ends: list[int] | None
    """Token offsets of ragged groups."""

    @property
    def offsets(self) -> Tensor | None:
        return None if self.ends is None else torch.tensor(self.ends, dtype=self.offset_dtype)

    @property
    def offset_dtype(self) -> torch.dtype:
        return torch.int32 if len(self.ends) % 2 else torch.int64

    def check(self, name: str, actual: Tensor, truth) -> None:
        """`truth` of float64 arrays; of their absolute values it is what an error is a share of."""
        arrays = [t.double().numpy() for t in (self.x, self.dy)] + [oracle.dense_weight(self.weight, self.topology)]
        right, size = truth(*arrays), truth(*map(np.abs, arrays))
        if self.x.dtype == torch.float16:
            size = np.maximum(size, 2.0**-14)
        assert actual.dtype == self.x.dtype
        error = oracle.error(actual.cpu(), right, size)
        assert error < BOUND[self.x.dtype], f"{name}: error {error}"


def make(
    grid, block, dtype, tokens, groups=1, live=0.3, dead=0, ragged=False, bias=False, strided=False, seed=0
) -> Case:
    torch.manual_seed(seed)
    topology = random_topology(grid, block, groups, live, dead, seed=seed)
    beside = 1 if ragged else groups

    def operand(side):
        features = grid[side] * block * beside
        if not strided:
            return torch.randn(tokens, features).to(dtype)
        return torch.randn(tokens, features + 24).to(dtype)[:, 8 : features + 8]

    weight = torch.randn(topology.num_slots, block, block).to(dtype)
    weight[topology.block_rows < 0] = torch.nan  # nothing may read it
    cuts = sorted(random.Random(seed).choices(range(tokens + 1), k=groups - 1))
    biases = torch.randn(topology.shape[0]).to(dtype) if bias else None
    return Case(topology, operand(1), operand(0), weight, biases, [0, *cuts, tokens] if ragged else None)


def random_case(number: int) -> Case:
    draw = random.Random(number)
    groups = draw.choice([1, 1, 2, 4])
    return make(
        (draw.randint(1, 80 // groups), draw.randint(1, 80 // groups)),
        draw.choice([16, 8]),
        draw.choice([torch.bfloat16, torch.float16]),
        draw.choice([0, 1, 7, 16, 33, 64, 65, draw.randint(1, 200)]),
        groups,
        draw.choice([0.0, 0.02, 0.1, 0.3, 1.0]) if groups > 1 else draw.choice([0.02, 0.1, 0.3]),
        draw.choice([0, 0, 1, 30]),
        ragged=groups > 1 and draw.random() < 0.6,
        bias=draw.random() < 0.5,
        strided=draw.random() < 0.3,
        seed=number,
    )


def check_sdd(case: Case, device: str = "cpu") -> None:
    topology, groups = case.topology, case.topology.groups
    offsets = None if case.ends is None else case.offsets.to(device)
    layout = topology.layout._replace(
        **{n: getattr(topology.layout, n).to(device) for n in topology.layout._fields[:3]}
    )
    grad = products.sdd(case.dy.to(device), case.x.to(device), layout, offsets)
    assert (grad[layout.block_rows < 0] == 0).all(), "dead slots must be zero"
    case.check("sdd", grad, lambda x, dy, _: oracle.gather_blocks(oracle.outer(dy, x, groups, case.ends), topology))


@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_sdd_of_random_layers_matches_float64(launches, first):
    for number in range(first, first + 20):
        check_sdd(random_case(number))


@pytest.mark.parametrize("dtype", products.NAMES, ids=str)
@pytest.mark.parametrize("block", cuda.BLOCK_SIZES)
@pytest.mark.parametrize("ragged", [False, True])
def test_an_sdd_in_parts_of_the_tokens_is_their_sum(launches, monkeypatch, block, dtype, ragged):
    monkeypatch.setattr(products, "SPLIT_TOKENS", 16)  # so few tokens are not split otherwise
    monkeypatch.setattr(products, "PARTS_PER_OPERANDS", 1e9)
    check_sdd(make((6, 9), block, dtype, 150, groups=3, dead=4, ragged=ragged))
    assert any(name.startswith("sum_") for name in launches.names)


@pytest.mark.parametrize("shape", products.SDD_SHAPES)
@pytest.mark.parametrize("block", cuda.BLOCK_SIZES)
def test_an_sdd_with_more_blocks_than_its_warps_hold_streams_its_tokens_again(launches, monkeypatch, block, shape):
    monkeypatch.setattr(products, "SDD_SHAPES", (shape,))
    case = make((512 // block + 1, 256 // block + 1), block, torch.bfloat16, 40, live=0.9)
    assert case.topology.num_slots > 2 * products.SDD_UNITS[block]
    check_sdd(case)


def test_every_kernel_of_an_sdd_is_launched_for_the_density_it_is_meant_for(launches):
    for block in cuda.BLOCK_SIZES:
        for live in (0.03, 0.09, 0.3):
            case = make((64, 128), block, torch.float16, 5, live=live)
            check_sdd(case)
            case.x, case.dy = case.x.bfloat16(), case.dy.bfloat16()
            check_sdd(case)
    assert set(launches.names) == {name for name in cuda.KERNELS["sdd"] if not name.startswith("sum_")}


@pytest.mark.parametrize(
    ("tiles", "tokens", "features", "weights", "splits"),
    [(64, 16384, 8192, 1.7e6, 2), (256, 16384, 16384, 6.7e6, 1), (16, 16384, 4096, 4e5, 8), (64, 256, 8192, 1.7e6, 1)],
)
def test_an_sdd_is_split_so_that_every_multiprocessor_has_a_program(tiles, tokens, features, weights, splits):
    assert products.sdd_splits(tiles, tokens, 2 * features, weights, num_sms=132) == splits


needs_gpu = pytest.mark.skipif(bool(cuda.unavailable()), reason=f"backend 'cuda': {cuda.unavailable()}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_sdd_of_random_layers_matches_float64_on_a_gpu(first):
    for number in range(first, first + 20):
        check_sdd(random_case(number), "cuda")
