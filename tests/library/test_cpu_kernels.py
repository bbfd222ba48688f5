"""The C++ kernels against the reference in float64 on the same rounded inputs, every block size and instruction set.

Errors are measured element by element against the sum of the products' magnitudes, so a single wrong index shows.
torch.empty is filled with NaN throughout, so an element that was not written shows too.
"""

import pytest
import torch

from sparsekern.backends import cpu, reference
from sparsekern.topology import Topology

if cpu.unavailable():
    pytest.skip(cpu.unavailable(), allow_module_level=True)

_C = pytest.importorskip("sparsekern._C", reason="sparsekern was installed without its C++ module")

BLOCKS = [1, 2, 4, 8, 16, 32, 64, 128]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # about 3 x output rounding


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=_C.supported_instruction_sets(), autouse=True)
def isa(request):
    best = cpu.instruction_set()
    _C.set_instruction_set(request.param)
    assert cpu.instruction_set() == request.param
    yield
    _C.set_instruction_set(best)


def random_topology(block, rows=7, cols=5, groups=1, density=0.4, dead=True):
    """Slots in random order, some dead; the first block row and the last block column of each group are empty."""
    if block == 1:
        rows, cols = 9 * rows, 9 * cols
    mask = torch.rand(groups, rows, cols) < density
    mask[:, 0] = False
    mask[:, :, -1] = False
    mask[0, 1, 0] = True
    g, r, c = mask.nonzero().unbind(1)
    order = torch.randperm(len(g))
    block_rows, block_cols = (g * rows + r)[order], (g * cols + c)[order]
    if dead:
        block_rows[1::4], block_cols[1::4] = -1, -1
    return Topology(block_rows, block_cols, (groups * rows * block, groups * cols * block), block, groups)


def random_weight(topology, dtype):
    weight = torch.randn(topology.num_slots, topology.block_size, topology.block_size).to(dtype)
    return weight.masked_fill((topology.block_rows < 0)[:, None, None], 0)


def operands(topology, mode, tokens, dtype):
    """(dy, x, token_offsets); ragged groups have unequal numbers of tokens and, with three groups, an empty one."""
    groups = topology.groups if mode == "ragged" else 1
    out_features, in_features = (size // groups for size in topology.shape)
    offsets = None
    if mode == "ragged":
        offsets = torch.tensor([0, tokens // 4, tokens // 4, tokens], dtype=torch.int32)
    return torch.randn(tokens, out_features).to(dtype), torch.randn(tokens, in_features).to(dtype), offsets


def assert_close(result, truth, magnitude, dtype):
    assert result.dtype == dtype and result.shape == truth.shape
    assert not result.isnan().any()
    error = (result.double() - truth).abs() / magnitude.clamp(min=1e-30)
    assert error.numel() == 0 or error.max() < BOUND[dtype]


def check(topology, dy, x, offsets, dtype, bias=None):
    """All three products of a training step."""
    layout, weight = topology.layout, random_weight(topology, dtype)
    w64, x64, dy64 = weight.double(), x.double(), dy.double()
    b64 = None if bias is None else bias.double()

    y = cpu.dds(x, weight, layout, bias, True, offsets)
    truth = reference.dds(x64, w64, layout, b64, True, offsets)
    assert_close(
        y, truth, reference.dds(x64.abs(), w64.abs(), layout, None if bias is None else b64.abs(), True, offsets), dtype
    )

    dx = cpu.dds(dy, weight, layout, token_offsets=offsets)
    truth = reference.dds(dy64, w64, layout, token_offsets=offsets)
    assert_close(dx, truth, reference.dds(dy64.abs(), w64.abs(), layout, token_offsets=offsets), dtype)

    dw = cpu.sdd(dy, x, layout, offsets)
    truth = reference.sdd(dy64, x64, layout, offsets)
    assert_close(dw, truth, reference.sdd(dy64.abs(), x64.abs(), layout, offsets), dtype)
    assert (dw[topology.block_rows < 0] == 0).all()


@pytest.mark.parametrize("mode", ["plain", "groups", "ragged"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_products_match_float64(block, dtype, mode):
    torch.manual_seed(block)
    topology = random_topology(block, groups=1 if mode == "plain" else 3)
    bias = torch.randn(topology.shape[0]).to(dtype)
    check(topology, *operands(topology, mode, 139, dtype), dtype, bias)


@pytest.mark.parametrize("tokens", [0, 1, 7, 1100])
@pytest.mark.parametrize("mode", ["plain", "ragged"])
@pytest.mark.parametrize("block", [1, 2, 4, 16])
def test_any_number_of_tokens(block, mode, tokens):
    torch.manual_seed(tokens)
    topology = random_topology(block, groups=1 if mode == "plain" else 3)
    check(topology, *operands(topology, mode, tokens, torch.float32), torch.float32)


@pytest.mark.parametrize("counts", [(0, 0, 5), (5, 0, 0), (0, 300, 0), (3, 0, 400), (0, 2, 400), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("block", [1, 4])
def test_any_groups_may_be_without_tokens(block, full, counts):
    torch.manual_seed(0)
    full_topology = Topology.random((3 * 16 * block, 3 * 20 * block), 1.0, block, 3)
    topology = full_topology if full else random_topology(block, groups=3)
    out_features, in_features = (size // 3 for size in topology.shape)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    dy, x = torch.randn(sum(counts), out_features), torch.randn(sum(counts), in_features)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        check(topology, dy, x, offsets, torch.float32, torch.randn(topology.shape[0]))


@pytest.mark.parametrize("block", BLOCKS)
def test_one_live_block(block):
    topology = Topology(torch.tensor([2]), torch.tensor([1]), (3 * block, 4 * block), block)
    check(topology, *operands(topology, "plain", 20, torch.float32), torch.float32)


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_full_store(block, groups, dead):
    topology = Topology.random((groups * 3 * block, groups * 4 * block), 1.0, block, groups)
    if dead:
        topology.block_rows[::3] = -1
        topology.block_cols[::3] = -1
    assert topology.layout.full
    check(topology, *operands(topology, "plain", 70, torch.float32), torch.float32)


@pytest.mark.parametrize("block", [1, 8])
def test_no_live_block_at_all(block):
    topology = Topology(torch.tensor([-1, -1]), torch.tensor([-1, -1]), (3 * block, 4 * block), block)
    check(topology, *operands(topology, "plain", 20, torch.float32), torch.float32, torch.randn(3 * block))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("block", [1, 4, 32])
def test_rows_of_any_stride(block, dtype):
    topology = random_topology(block)
    dy, x, _ = operands(topology, "plain", 45, dtype)
    wide_dy, wide_x = torch.randn(45, dy.shape[1] + 3).to(dtype), torch.randn(45, x.shape[1] + 5).to(dtype)
    check(topology, wide_dy[:, 2:-1], wide_x[:, 1:-4], None, dtype)
    row = torch.randn(1, x.shape[1]).to(dtype).expand(45, -1)  # every token the same memory
    check(topology, dy, row, None, dtype)


@pytest.mark.parametrize("block", [1, 16])
def test_a_matrix_wider_than_the_caches(block):
    topology = Topology.random((96, 16384), 0.02, block)
    check(topology, *operands(topology, "plain", 150, torch.float32), torch.float32)


@pytest.mark.parametrize("mode", ["plain", "groups", "ragged"])
@pytest.mark.parametrize("block", BLOCKS)
def test_results_do_not_depend_on_the_number_of_threads(block, mode):
    topology = random_topology(block, groups=1 if mode == "plain" else 3)
    weight = random_weight(topology, torch.float32)
    dy, x, offsets = operands(topology, mode, 700, torch.float32)
    offsets = None if offsets is None else offsets.long()
    results = []
    for number in (1, 2, 3, 4):
        torch.set_num_threads(number)
        results.append(
            (
                cpu.dds(x, weight, topology.layout, None, True, offsets),
                cpu.dds(dy, weight, topology.layout, None, False, offsets),
                cpu.sdd(dy, x, topology.layout, offsets),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_lost_token_or_a_wrong_index_is_noticed():
    topology = random_topology(16, dead=False)
    dy, x, _ = operands(topology, "plain", 300, torch.bfloat16)
    moved = Topology(topology.block_rows, (topology.block_cols + 1) % 5, topology.shape, 16)
    truth = reference.sdd(dy.double(), x.double(), topology.layout)
    magnitude = reference.sdd(dy.double().abs(), x.double().abs(), topology.layout)
    for wrong in (cpu.sdd(dy[:-8], x[:-8], topology.layout), cpu.sdd(dy, x, moved.layout)):
        with pytest.raises(AssertionError):
            assert_close(wrong, truth, magnitude, torch.bfloat16)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_densify_and_gather_move_blocks_exactly(block, groups, dtype):
    topology = random_topology(block, groups=groups)
    weight = random_weight(topology, dtype)
    dense = cpu.densify(weight, topology.layout)
    assert torch.equal(dense, reference.densify(weight, topology.layout))
    assert torch.equal(cpu.gather(dense, topology.layout), weight)
    noise = torch.randn(dense.shape).to(dtype)
    assert torch.equal(cpu.gather(noise, topology.layout), reference.gather(noise, topology.layout))
    full = Topology.random((3 * block * groups, 2 * block * groups), 1.0, block, groups)
    weight = random_weight(full, dtype)
    assert torch.equal(cpu.densify(weight, full.layout), reference.densify(weight, full.layout))
    assert torch.equal(cpu.gather(cpu.densify(weight, full.layout), full.layout), weight)
    full.block_rows[::3] = full.block_cols[::3] = -1
    weight[::3] = 0
    assert torch.equal(cpu.gather(cpu.densify(weight, full.layout), full.layout), weight)
    noise = torch.randn(reference.densify(weight, full.layout).shape).to(dtype)
    assert torch.equal(cpu.gather(noise, full.layout), reference.gather(noise.clone(), full.layout))


def test_bfloat16_rounds_as_torch_does():
    topology = Topology(torch.arange(16), torch.arange(16), (16, 16), 1)
    x = torch.cat((torch.randn(999, 16), torch.tensor([float("inf"), float("nan")])[:, None].expand(-1, 16))).bfloat16()
    weight = torch.randn(16, 1, 1).bfloat16()
    y = cpu.dds(x, weight, topology.layout, transpose=True)
    assert torch.equal(y.nan_to_num(7), (x.float() * weight.float().view(16)).bfloat16().nan_to_num(7))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no instruction set 'mmx'"):
        _C.set_instruction_set("mmx")
