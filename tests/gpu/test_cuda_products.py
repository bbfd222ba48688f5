"""The products of csrc/cuda: blocks of 16 and 8 against float64, by emulation on a CPU.

On a GPU (marker gpu) the same cases run on the device itself.
"""

import random
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from emulation import Launches, constant
from oracle import random_topology
from torch import Tensor

import sparsekern as sk
from sparsekern import choose, devices
from sparsekern.backends import cuda
from sparsekern.backends.cuda import products
from sparsekern.layout import Layout

RANDOM_CASES = 80
# float32 sums in another order than float64's, then the rounding of the output
BOUND = {dtype: oracle.BOUND[dtype] for dtype in products.NAMES}


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


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

    def bias_of_tokens(self) -> np.ndarray:
        """What y has of it, as [tokens, outputs] or broadcast to that."""
        if self.bias is None:
            return np.zeros(1)
        bias = self.bias.double().numpy()
        if self.ends is None:
            return bias
        return np.repeat(bias.reshape(self.topology.groups, -1), np.diff(self.ends), axis=0)

    def check(self, name: str, actual: Tensor, truth) -> None:
        """`truth` of float64 arrays; of their absolute values it is what an error is a share of."""
        arrays = [t.double().numpy() for t in (self.x, self.dy)]
        arrays += [oracle.dense_weight(self.weight, self.topology), self.bias_of_tokens()]
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


def on(device: str, case: Case) -> tuple[Layout, Tensor | None]:
    """Layout and token offsets there."""
    layout = case.topology.layout
    layout = layout._replace(**{name: getattr(layout, name).to(device) for name in layout._fields[:3]})
    return layout, None if case.ends is None else case.offsets.to(device)


def check_dds(case: Case, device: str = "cpu") -> None:
    """Forward and gradient of x."""
    layout, offsets = on(device, case)
    weight = case.weight.to(device)
    bias = None if case.bias is None else case.bias.to(device)
    y = products.dds(case.x.to(device), weight, layout, bias, True, offsets)
    case.check("x Wᵀ", y, lambda x, _, w, bias: oracle.dds(x, w, True, case.ends) + bias)
    dx = products.dds(case.dy.to(device), weight, layout, None, False, offsets)
    case.check("dy W", dx, lambda _, dy, w, bias: oracle.dds(dy, w, False, case.ends))


@contextmanager
def as_if_of(number: int, monkeypatch: pytest.MonkeyPatch):
    """A GPU of some number of multiprocessors, so that programs have one tile of tokens or many."""
    with monkeypatch.context() as patch:
        patch.setattr(products, "_num_sms", lambda device: random.Random(number).choice([1, 2, 5, 132]))
        yield


def check_sdd(case: Case, device: str = "cpu") -> None:
    topology, groups = case.topology, case.topology.groups
    layout, offsets = on(device, case)
    grad = products.sdd(case.dy.to(device), case.x.to(device), layout, offsets)
    assert (grad[layout.block_rows < 0] == 0).all(), "dead slots must be zero"
    case.check("sdd", grad, lambda x, dy, *_: oracle.gather_blocks(oracle.outer(dy, x, groups, case.ends), topology))


def test_the_launchers_count_with_the_numbers_of_the_kernels():
    dds = {name: getattr(products, name) for name in ("NUM_WARPS", "THREADS", "MOST_STAGES", "PACK_THREADS", "CHUNK")}
    dds["TOKENS"] = products.TILE_TOKENS
    for b, shapes in products.DDS_SHAPES.items():
        dds |= {f"Units<{b}>::BYTES": shapes[0].unit_bytes}
        dds |= {f"Units<{b}>::GROUP * Units<{b}>::RING": products.RING_UNITS[b]}
        dds |= {f"DdsShape<{b}, BFLOAT16, {shape.rows}>::STAGE": shape.stage_bytes for shape in shapes}
    sdd = {name: getattr(products, name) for name in ("NUM_WARPS", "THREADS", "MOST_STAGES", "SUM_THREADS")}
    shapes = {f"SddShape<{b}, BFLOAT16, {', '.join(map(str, shape))}>": (b, shape) for b in cuda.BLOCK_SIZES
              for shape in products.SDD_SHAPES}  # fmt: skip
    sdd |= {f"{name}::STAGE": shape.stage_bytes for name, (_, shape) in shapes.items()}
    sdd |= {f"{name}::MOST": products.SDD_UNITS[b] // products.NUM_WARPS for name, (b, _) in shapes.items()}
    for source, ours in (("dds", dds), ("sdd", sdd)):
        assert ours == {expression: constant(source, expression) for expression in ours}
    assert constant("dds", "sizeof(DdsShared)") <= products.DDS_BARRIER_BYTES
    assert all(constant("sdd", f"sizeof(SddShared<{name}>)") <= products.SDD_BARRIER_BYTES for name in shapes)


@pytest.mark.parametrize("first", range(0, RANDOM_CASES, 20))
def test_dds_of_random_layers_matches_float64(launches, monkeypatch, first):
    for number in range(first, first + 20):
        with as_if_of(number, monkeypatch):
            check_dds(random_case(number))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("block", cuda.BLOCK_SIZES)
def test_the_programs_of_a_dds_go_on_to_tokens_that_the_first_of_them_do_not_reach(
    launches, monkeypatch, block, ragged
):
    monkeypatch.setattr(products, "_num_sms", lambda device: 2)
    check_dds(make((48, 40), block, torch.bfloat16, 600, groups=2, live=0.1, dead=5, ragged=ragged, bias=True))


def test_a_dds_of_a_layer_without_live_blocks_is_its_bias(launches):
    case = make((5, 7), 16, torch.float16, 70, live=0, bias=True)
    y = products.dds(case.x, case.weight, case.topology.layout, case.bias, True)
    assert torch.equal(y, case.bias.expand(70, -1))


def test_a_dds_takes_groups_of_as_many_features_as_it_says(launches, monkeypatch):
    monkeypatch.setattr(products, "_num_sms", lambda device: 1)
    check_dds(make((1, cuda.MOST_FEATURES // 8), 8, torch.bfloat16, 3, live=0.02))
    assert launches.shared["pack_8"] + constant("dds", "sizeof(PackShared)") <= cuda.NEEDED_SHARED


def test_a_kernel_may_have_the_most_shared_memory_that_a_launch_of_it_wanted(monkeypatch):
    """As two layers of different widths have different lists."""
    allowed = []
    driver = SimpleNamespace(
        cuModuleGetFunction=lambda *_: 0, cuFuncSetAttribute=lambda _function, _attribute, n: allowed.append(n)
    )
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_module", lambda *_: None)
    monkeypatch.setattr(cuda, "_bind_context", lambda: None)
    for shared in (100_000, 60_000, 100_000, 120_000):
        cuda._function("dds", "a kernel of this test", 0, shared)
        assert allowed[-1] >= shared


def test_operands_that_the_kernels_do_not_take_are_refused_by_a_sentence_with_both_values(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Small GPU")
    layout, allowed = make((2, 2), 16, torch.bfloat16, 1).topology.layout, [cuda.NEEDED_SHARED]
    monkeypatch.setattr(cuda, "shared_bytes", lambda device: allowed[0])
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    assert cuda.refusal(x, layout) is None
    assert cuda.refusal(x, layout._replace(num_rows=4097)) == "groups of at most 65536 features, got 65552"
    assert cuda.refusal(x, layout._replace(num_rows=4098, groups=2)) is None
    assert cuda.refusal(x, layout._replace(block_size=32)).endswith("got torch.bfloat16 on cuda:0 in blocks of 32")
    allowed[0] = 101376
    assert cuda.refusal(x, layout).endswith("163840 bytes of shared memory, and Small GPU allows 101376")


def test_a_dds_gives_the_same_bits_however_its_tokens_are_dealt_out(launches, monkeypatch):
    case = make((40, 40), 16, torch.bfloat16, 300)
    results = []
    for num_sms in (1, 7, 132):
        monkeypatch.setattr(products, "_num_sms", lambda device, num_sms=num_sms: num_sms)
        results.append(products.dds(case.x, case.weight, case.topology.layout, None, True))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_every_kernel_of_a_dds_is_launched_for_the_tokens_it_is_meant_for(launches, monkeypatch):
    monkeypatch.setattr(products, "_num_sms", lambda device: 4)
    for block in cuda.BLOCK_SIZES:
        for tokens in (10, 1000):
            case = make((528 // block, 2), block, torch.float16, tokens)
            check_dds(case)
            case.x, case.dy, case.weight = (t.bfloat16() for t in (case.x, case.dy, case.weight))
            check_dds(case)
    assert set(launches.names) == set(cuda.KERNELS["dds"])


@pytest.mark.parametrize(
    ("tokens", "ragged", "name", "programs"),
    [(16384, False, "many", 16), (256, False, "few", 4), (1, False, "few", 1), (16384, True, "many", 17)],
)
def test_a_dds_is_dealt_out_so_that_every_multiprocessor_has_a_program(tokens, ragged, name, programs):
    plan = products.dds_plan(16, 256, 256, 1, 6554, tokens, ragged, 132)  # 4096 x 4096 at density 0.1
    assert (plan.shape.name, plan.programs) == (name, programs)


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
def test_random_layers_match_float64_on_a_gpu(monkeypatch, first):
    for number in range(first, first + 20):
        check_sdd(random_case(number), "cuda")
        check_dds(random_case(number), "cuda")
        with as_if_of(number, monkeypatch):
            check_dds(random_case(number), "cuda")


def check_layer(out: int, into: int, tokens: int, block_size: int, density: float, dtype, device: str) -> dict:
    """A layer forward and backward against float64 on the same device; returns who makes its products."""
    torch.manual_seed(0)
    layer = sk.SparseLinear(into, out, bias=False, density=density, block_size=block_size, dtype=dtype, device=device)
    x = torch.randn(tokens, into, dtype=dtype, device=device, requires_grad=True)
    dy = torch.randn(tokens, out, dtype=dtype, device=device)
    y = layer(x)
    dx, dw = torch.autograd.grad(y, [x, layer.weight], dy)
    topology = layer.topology
    places = topology.block_rows.long(), topology.block_cols.long()

    def truth(x, dy, weight):
        blocks = torch.zeros(*topology.grid, block_size, block_size, dtype=torch.float64, device=device)
        blocks[places] = weight
        dense = blocks.transpose(1, 2).reshape(out, into)
        grad = (dy.T @ x).reshape(topology.grid[0], block_size, -1, block_size).transpose(1, 2)
        return x @ dense.T, dy @ dense, grad[places]

    operands = [t.detach().double() for t in (x, dy, layer.weight)]
    for actual, right, size in zip((y, dx, dw), truth(*operands), truth(*(t.abs() for t in operands)), strict=True):
        assert ((actual.double() - right).abs() <= BOUND[dtype] * size).all()
    return {name: choose.backend_for(name, given, topology.layout) for name, given in (("dds", x), ("sdd", dy))}


def test_a_layer_is_checked_against_float64_on_a_cpu_too():
    check_layer(64, 96, 32, 16, 0.3, torch.bfloat16, "cpu")


@pytest.mark.gpu
@needs_gpu
def test_a_layer_makes_these_products_unforced_where_the_devices_table_says_so():
    rows = [row for row in devices.known(torch.cuda.get_device_name())["cuda"] if row["from"] <= row["to"]]
    if not rows:
        pytest.skip(f"the table of {torch.cuda.get_device_name()} has no products of cuda")
    for row in rows:
        shape = row["out_features"], row["in_features"], row["tokens"], row["block_size"]
        makers = check_layer(*shape, (row["from"] + row["to"]) / 2, torch.bfloat16, "cuda")
        assert makers[row["product"]] is cuda
