"""The Triton kernels in Triton's interpreter, against float64. `test_triton_kernels.py` runs this file.

It needs TRITON_INTERPRET=1 in the environment, as kernels are decorated for the interpreter or for a GPU. Operands and
outputs lie in guarded memory: an access out of bounds kills the process. Outputs are filled with NaN.
"""

import interpreter
import numpy as np
import oracle
import pytest
import torch
from oracle import BOUND, random_topology

import sparsekern as sk
from sparsekern.backends import dense as dense_path
from sparsekern.backends import reference, triton
from sparsekern.backends.triton import DTYPES, copies, launch, tiles

interpreter.repair()


@pytest.fixture(params=[16, 32, 64, 128], ids="b{}".format)
def block_size(request):
    return request.param


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch):
    """What a launcher allocates is guarded, and NaN."""
    new_empty = torch.Tensor.new_empty

    def guarded_empty(self, *shape, **options):
        return interpreter.guarded(new_empty(self, *shape, **options))

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_empty)


def array(tensor):
    return tensor.double().numpy()


def strided(tensor):
    """The same numbers in guarded memory, as columns of a wider tensor that holds NaN besides."""
    wide = interpreter.guarded(tensor.new_full((tensor.shape[0], tensor.shape[1] + 16), torch.nan))
    wide[:, 16:] = tensor
    return wide[:, 16:]


def operands(topology, tokens, dtype, ragged=False, ends=None):
    """x, dy, weight, bias, the guarded layout, and ragged groups' ends as a list and a tensor."""
    groups = topology.groups if ragged else 1
    x, dy = (strided(torch.randn(tokens, size // groups).to(dtype)) for size in reversed(topology.shape))
    b = topology.block_size
    weight, bias = torch.randn(topology.num_slots, b, b).to(dtype), torch.randn(topology.shape[0]).to(dtype)
    weight[topology.block_rows < 0] = torch.nan  # nobody may read a dead slot
    layout = topology.layout._replace(index=interpreter.guarded(topology.index))
    if ragged and ends is None:
        ends = [0, *torch.randint(0, tokens + 1, (topology.groups - 1,)).sort().values.tolist(), tokens]
    offsets = interpreter.guarded(torch.tensor(ends)) if ragged else None
    return x, dy, interpreter.guarded(weight), interpreter.guarded(bias), layout, ends, offsets


def check(topology, tokens, dtype, ragged=False, ends=None):
    """y = x Wᵀ + bias, dx = dy W and dW = dyᵀx on the live blocks."""
    x, dy, weight, bias, layout, ends, offsets = operands(topology, tokens, dtype, ragged, ends)
    dense = oracle.dense_weight(weight.nan_to_num(), topology)
    biases = array(bias).reshape(topology.groups, -1)
    if ragged:
        biases = np.concatenate([np.tile(own, (n, 1)) for own, n in zip(biases, np.diff(ends), strict=True)])
    else:
        biases = biases.reshape(1, -1)

    def expected(size):
        nx, ndy, nw = size(array(x)), size(array(dy)), size(dense)
        dw = oracle.outer(ndy, nx, topology.groups, ends)
        yield oracle.dds(nx, nw, True, ends) + size(biases)
        yield oracle.dds(nx, nw, True, ends)
        yield oracle.dds(ndy, nw, False, ends)
        yield oracle.gather_blocks(dw, topology)

    actual = (
        launch.dds(x, weight, layout, bias, True, offsets),
        launch.dds(x, weight, layout, None, True, offsets),
        launch.dds(dy, weight, layout, None, False, offsets),
        launch.sdd(dy, x, layout, offsets),
    )
    for result, truth, size in zip(actual, expected(lambda a: a), expected(np.abs), strict=True):
        assert result.dtype == dtype
        # below float16's smallest normal number its rounding error no longer shrinks
        size = np.maximum(size, 2**-14 if dtype == torch.float16 else 0)
        assert oracle.error(result, truth, size) < BOUND[dtype]
    assert not actual[-1][topology.block_rows < 0].any()


@pytest.mark.parametrize("kind", ["plain", "groups", "ragged"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_match_float64(block_size, dtype, tokens, kind):
    topology = random_topology((3, 4), block_size, 1 if kind == "plain" else 3, dead=2)
    check(topology, tokens, dtype, kind == "ragged")


@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
def test_every_tile_serves_more_tokens_than_it_holds(block_size, arithmetic, monkeypatch):
    monkeypatch.setattr(launch, "_arithmetic", lambda x: arithmetic)
    topology = random_topology((3, 3), block_size, live=0.6, dead=1)
    table = tiles.of(torch.device("cpu"))
    for tile in table["dds", block_size, arithmetic]:
        monkeypatch.setitem(table, ("dds", block_size, arithmetic), (tile,))
        check(topology, tile.m + 9, torch.float16 if arithmetic == "half" else torch.float32)


def test_rows_without_blocks_give_zeros_and_all_else_may_be_dead(block_size):
    for live, dead in ((0.0, 0), (0.0, 3), (1.0, 0)):
        check(random_topology((3, 4), block_size, live=live, dead=dead), 5, torch.float16)
    topology = sk.Topology(torch.tensor([2]), torch.tensor([1]), (4 * block_size, 3 * block_size), block_size)
    check(topology, 5, torch.bfloat16)


def test_rows_of_many_blocks_match_float64(block_size):
    check(random_topology((3, 40), block_size, live=0.7, dead=9), 70, torch.float16)
    check(random_topology((40, 3), block_size, live=0.7, dead=9), 70, torch.float16)


@pytest.mark.parametrize("ends", [[0, 0, 0, 0], [0, 300, 300, 300], [0, 0, 1, 300], [0, 128, 256, 300]], ids=str)
def test_ragged_groups_may_be_empty_or_hold_everything(block_size, ends):
    check(random_topology((2, 3), block_size, 3, live=0.6), ends[-1], torch.float16, True, ends)


def test_offsets_of_ragged_groups_may_be_int32(block_size):
    topology = random_topology((2, 3), block_size, 3)
    x, dy, weight, bias, layout, _, offsets = operands(topology, 19, torch.float16, ragged=True)
    assert torch.equal(
        launch.dds(x, weight, layout, bias, True, offsets.int()), launch.dds(x, weight, layout, bias, True, offsets)
    )
    assert torch.equal(launch.sdd(dy, x, layout, offsets.int()), launch.sdd(dy, x, layout, offsets))


@pytest.mark.parametrize("kind", ["plain", "groups", "ragged"])
def test_a_gradient_split_over_tokens_is_the_same_one(block_size, kind, monkeypatch):
    monkeypatch.setattr(launch, "SPLITS_PER_SM", 99)
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 40)
    topology = random_topology((2, 3), block_size, 1 if kind == "plain" else 2, dead=1)
    assert launch._splits(topology.layout, 1, 190, torch.empty(0), kind == "ragged") == 4
    for dtype in (torch.bfloat16, torch.float32):
        check(topology, 190, dtype, kind == "ragged")


def test_operands_beyond_l2_are_split_where_programs_take_several_waves(monkeypatch):
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 16)
    monkeypatch.setattr(launch, "_l2_bytes", lambda device: 8 * 1024)
    monkeypatch.setattr(launch, "PARTS_PER_OPERANDS", 99)
    for small, splits in ((16, 4), (32, 8), (64, 1)):
        topology = random_topology((3, 6), small, dead=1)
        assert launch._splits(topology.layout, 1, 140, torch.empty(0, dtype=torch.float16), False) == splits
        check(topology, 140, torch.float16)


DESCRIBED = [(*key[:2], tile) for key, own in tiles.DESCRIPTORS.items() for tile in own]


@pytest.fixture(params=DESCRIBED, ids=lambda p: f"{p[0]}-b{p[1]}-{'x'.join(map(str, p[2][:4]))}")
def described(request, monkeypatch):
    """(block size, tile) of a product that tensor descriptors load for; the launches without them are counted."""
    product, size, tile = request.param
    monkeypatch.setitem(tiles.of(torch.device("cpu")), (product, size, "half"), (tile,))
    launches = []
    kernel = launch.kernels.dds_kernel if product == "dds" else launch.kernels.sdd_kernel
    other = launch.kernels.dds_descriptors_kernel if product == "dds" else launch.kernels.sdd_descriptors_kernel
    for name, counted in (("pointers", kernel), ("descriptors", other)):

        def count(*args, name=name, run=counted.run, **options):
            launches.append(name)
            return run(*args, **options)

        monkeypatch.setattr(counted, "run", count)
    return size, tile, launches


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_descriptors_match_float64(described, dtype, groups):
    size, tile, launches = described
    for tokens in (1, max(tile.m, tile.k) + 9):
        check(random_topology((2, 3), size, groups, live=0.6, dead=2), tokens, dtype)
    assert set(launches) == {"descriptors"}


def test_descriptors_serve_rows_without_blocks_and_dead_stores(described):
    size, _, launches = described
    for live, dead in ((0.0, 3), (1.0, 0)):
        check(random_topology((3, 4), size, live=live, dead=dead), 5, torch.float16)
    assert set(launches) == {"descriptors"}


def test_descriptors_split_gradients_too(described, monkeypatch):
    monkeypatch.setattr(launch, "SPLITS_PER_SM", 99)
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 40)
    size, _, launches = described
    topology = random_topology((2, 3), size, dead=1)
    assert launch._splits(topology.layout, 1, 190, torch.empty(0), False) == 4
    check(topology, 190, torch.bfloat16)
    assert set(launches) == {"descriptors"}


def test_ragged_groups_and_unaligned_rows_need_no_descriptors(described):
    size, tile, launches = described
    check(random_topology((2, 3), size, 3, live=0.6), 70, torch.float16, ragged=True)
    topology = random_topology((2, 3), size)
    x, dy, weight, bias, layout, _, _ = operands(topology, 40, torch.float16)
    for extra, begin in ((1, 0), (16, 1)):  # rows at no multiples of 16 bytes; rows at them, but the first
        other_x, other_dy = (
            torch.zeros(40, side.shape[1] + extra, dtype=x.dtype)[:, begin : begin + side.shape[1]].copy_(side)
            for side in (x, dy)
        )
        y = launch.dds(other_x, weight, layout, bias, True)
        grad = launch.sdd(other_dy, other_x, layout)
        torch.testing.assert_close(y, launch.dds(x.float(), weight.float(), layout, bias.float(), True).half())
        torch.testing.assert_close(grad, launch.sdd(dy.float(), x.float(), layout).half())
    assert set(launches) == {"pointers"}


def test_more_block_rows_are_found_than_are_read_at_once():
    topology = random_topology((1040, 1), 16, live=0.3, dead=5)
    x, dy, _, _, layout, _, _ = operands(topology, 2, torch.float32)
    dense = oracle.outer(array(dy), array(x), 1)
    np.testing.assert_allclose(launch.sdd(dy, x, layout), oracle.gather_blocks(dense, topology), rtol=1e-5, atol=1e-6)


def test_groups_may_be_many():
    check(random_topology((1, 2), 16, groups=21, live=0.5), 30, torch.float16, ragged=True)


def test_a_full_store_is_served_too(block_size):
    topology = sk.Topology.random((3 * block_size, 2 * block_size), 1.0, block_size)
    assert topology.full
    check(topology, 11, torch.float32)


def test_infinities_pass_through_live_blocks_only(block_size):
    topology = sk.Topology(torch.tensor([0, 2]), torch.tensor([1, 0]), (3 * block_size, 2 * block_size), block_size)
    x, dy = torch.ones(4, 2 * block_size), torch.ones(4, 3 * block_size)
    x[1, -1] = torch.nan
    y = launch.dds(x, torch.ones(2, block_size, block_size), topology.layout, None, True)
    assert y.isfinite().logical_not().nonzero().tolist() == [[1, j] for j in range(block_size)]
    dw = launch.sdd(dy, x, topology.layout)
    assert dw.isfinite().logical_not().nonzero().tolist() == [[0, i, block_size - 1] for i in range(block_size)]


def test_offsets_beyond_two_to_the_31_elements_do_not_overflow():
    block_size, far = 128, 2**31 // 128**2  # the last slot begins at element 2**31
    rows = torch.full((far + 1,), -1)
    rows[[0, far]] = torch.tensor([0, 1])
    topology = sk.Topology(rows, rows, (2 * block_size, 2 * block_size), block_size)
    try:
        weight = interpreter.unbacked((far + 1, block_size, block_size), torch.float16)
        wide = interpreter.unbacked((3, 2**30 + 2 * block_size), torch.float16)
    except OSError as error:
        pytest.skip(f"this system does not reserve gigabytes that are never touched: {error}")
    x = wide[:, 2**30 :].copy_(torch.randn(3, 2 * block_size))  # the last row begins beyond element 2**31
    weight[[0, far]] = torch.randn(2, block_size, block_size).half()
    near = sk.Topology(torch.tensor([0, 1]), torch.tensor([0, 1]), topology.shape, block_size)
    for transpose in (True, False):
        y = launch.dds(x, weight, topology.layout, None, transpose)
        assert torch.equal(y, launch.dds(x.clone(), weight[[0, far]].clone(), near.layout, None, transpose))
    assert torch.equal(launch.sdd(x, x, near.layout), launch.sdd(x.clone(), x.clone(), near.layout))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("small", [1, 2, 4, 8, 16, 32, 64, 128])
def test_copies_between_blocks_and_dense_matrices_are_exact(small, groups):
    for live, dead in ((0.4, 2), (1.0, 0), (0.0, 1)):
        grid = (3, 5) if small < 64 else (1, 3)
        topology = random_topology(grid, small, groups, live=live, dead=dead)
        weight = torch.randn(topology.num_slots, small, small).to(torch.bfloat16)
        weight[topology.block_rows < 0] = torch.nan  # nobody may read a dead slot
        layout = topology.layout._replace(index=interpreter.guarded(topology.index))
        dense = triton.densify(interpreter.guarded(weight), layout)
        weight[topology.block_rows < 0] = 0
        assert torch.equal(dense, reference.densify(weight, topology.layout))
        assert torch.equal(copies.gather(interpreter.guarded(dense), topology.layout), weight)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("small", [1, 2, 16, 128])
def test_copies_of_a_full_store_need_no_coordinates_and_clear_its_dead_slots(small, groups):
    topology = sk.Topology.random((groups * 7 * small, groups * 6 * small), 1.0, small, groups)
    for dead in (0, 5):
        topology.mark_dead(torch.arange(topology.num_slots) < dead)
        layout = topology.layout._replace(index=interpreter.guarded(topology.index))
        assert layout.full and not len(layout.block_rows)
        noise = torch.randn(groups, 7 * small, 6 * small)
        blocks = copies.gather(interpreter.guarded(noise), layout)
        assert torch.equal(blocks, reference.gather(noise.clone(), topology.layout)) and not blocks[:dead].any()
        assert torch.equal(triton.densify(interpreter.guarded(blocks), layout), reference.densify(blocks, layout))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_a_dense_matrix_of_many_tiles_is_exact(dtype):
    for small, grid in ((2, (3, 1100)), (4, (2, 300)), (16, (3, 37)), (64, (2, 5)), (128, (2, 3))):
        topology = random_topology(grid, small, 2, live=0.3, dead=3)
        weight = torch.randn(topology.num_slots, small, small).to(dtype)
        weight[topology.block_rows < 0] = 0
        dense = triton.densify(interpreter.guarded(weight), topology.layout)
        assert torch.equal(dense, reference.densify(weight, topology.layout))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_full_store_of_blocks_becomes_a_dense_matrix_without_an_index(block_size, groups):
    topology = sk.Topology.random((groups * 3 * block_size, groups * 5 * block_size), 1.0, block_size, groups)
    assert topology.full and not topology.layout.index.numel()
    weight = torch.randn(topology.num_slots, block_size, block_size)
    dense = triton.densify(interpreter.guarded(weight), topology.layout)
    assert torch.equal(dense, reference.densify(weight, topology.layout))


@pytest.mark.parametrize("small", [2, 8, 16, 32])
def test_the_dense_path_multiplies_by_what_one_pass_has_written(small, monkeypatch):
    """Both ways round, and after a rewire."""
    monkeypatch.setattr(dense_path, "_copies", lambda x: triton)
    topology = random_topology((3, 4), small, groups=2, live=0.5, dead=1)
    for seed in range(2):
        weight = torch.randn(topology.num_slots, small, small)
        weight[topology.block_rows < 0] = 0
        for transpose in (True, False):
            x = torch.randn(5, topology.shape[1] if transpose else topology.shape[0])
            ours = dense_path.dds(x, weight, topology.layout, None, transpose)
            theirs = reference.dds(x, weight, topology.layout, None, transpose)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        oracle.rewire_at_random(topology, seed)


@pytest.mark.parametrize("kind", ["plain", "groups", "ragged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_norms_are_added_where_armed_only(block_size, dtype, kind):
    topology = random_topology((3, 5), block_size, 1 if kind == "plain" else 2)
    x, dy, _, _, layout, ends, offsets = operands(topology, 37, dtype, kind == "ragged")
    groups, rows, cols = topology.mask().shape
    norms = interpreter.guarded(torch.rand(groups, rows, cols))
    norms[0, 0] = -1  # nothing scored yet
    before = norms.clone()
    launch.add_block_norms(dy, x, layout, norms, torch.tensor(False), offsets)
    assert torch.equal(norms, before)
    launch.add_block_norms(dy, x, layout, norms, torch.tensor(True), offsets)
    dense = oracle.outer(array(dy), array(x), topology.groups, ends)
    blocks = dense.reshape(groups, rows, block_size, cols, block_size)
    np.testing.assert_allclose(norms - before.clamp(min=0), (blocks**2).sum((2, 4)), rtol=1e-4)


def test_a_layer_trains_and_rewires_as_on_the_reference(block_size):
    topology = random_topology((3, 3), block_size, live=0.5, padding=(3, 5), dead=1)
    layer = sk.SparseLinear(topology.shape[1], topology.shape[0], topology=topology)
    for seed in range(2):
        x = torch.randn(2, 5, topology.shape[1], requires_grad=True)
        results = []
        for backend in ("triton", "reference"):
            with sk.use(backend):
                y = layer(x)
                gradients = torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))
                results.append((y.detach(), *gradients))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        oracle.rewire_at_random(layer.topology, seed)
        with torch.no_grad():
            layer.weight.mul_(layer.lanes())


def test_the_walk_of_an_index_is_where_the_layout_has_it(block_size):
    layout = random_topology((3, 4), block_size, 2, dead=1).layout
    for by_rows, names in ((True, "row"), (False, "col")):
        views = [getattr(layout, f"{names}_{part}") for part in ("pairs", "offsets", "order")]
        pairs, offsets, order = launch._walk(layout, by_rows)
        assert [v.storage_offset() for v in views] == [2 * pairs, offsets, order]


def test_what_the_kernels_do_not_take_is_refused():
    layer = sk.SparseLinear(64, 64, density=0.5, block_size=8)
    with sk.use("triton"), pytest.raises(RuntimeError, match="'triton' takes .* blocks of 16.*, got .*blocks of 8"):
        layer(torch.randn(2, 64))
