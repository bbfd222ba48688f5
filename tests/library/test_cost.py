"""The chooser's model of a GPU, and the dense path: what it decides, without a GPU."""

import itertools
import json

import pytest
import torch
from oracle import random_topology

import sparsekern as sk
from sparsekern import choose, devices
from sparsekern.backends import cuda, dense, reference, triton
from sparsekern.backends.contract import OPERATIONS
from sparsekern.choose import cost

GPU = "a GPU that nobody measured"
DEFAULT = (devices.FOLDER / "default.json").read_text()


class OnGpu:
    """What the chooser looks at of a tensor."""

    def __init__(self, *shape, dtype=torch.bfloat16):
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, for the chooser."""
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(choose, "_device_name", lambda device: GPU)
    monkeypatch.setattr(choose, "_has_own_table", lambda device: True)
    choose._fastest_on_gpu.cache_clear()
    cost.break_even.cache_clear()
    yield
    choose._fastest_on_gpu.cache_clear()
    cost.break_even.cache_clear()


def layout(density, block_size, size=4096, **options):
    return sk.Topology.random((size, size), density, block_size, **options).layout


@pytest.mark.parametrize("arithmetic", ["half", "tf32", "ieee"])
@pytest.mark.parametrize("product", cost.PRODUCTS)
def test_larger_blocks_break_even_at_higher_densities_when_there_are_many_tokens(product, arithmetic):
    limits = [cost.break_even(cost.Product(product, b, arithmetic, 4096, 4096, 16384, GPU)) for b in (16, 32, 64, 128)]
    # blocks of 64 and 128 keep the tensor cores equally busy
    assert all(larger > 0.97 * smaller for smaller, larger in itertools.pairwise(limits))
    assert 0.03 < limits[0] and limits[-1] < 0.9


def test_the_model_knows_the_dense_times_that_an_h200_took():
    for tokens, microseconds in ((256, 16.6), (4096, 190.7), (16384, 693.2)):
        modelled = cost.gemm_seconds("half", tokens, 4096, 4096, "NVIDIA H200")
        assert modelled * 1e6 == pytest.approx(microseconds, rel=0.1)


def test_the_largest_gemm_takes_as_long_as_was_measured():
    for kind in ("half", "tf32", "ieee"):
        flop_rate = 2 * 8192**3 / cost.gemm_seconds(kind, 8192, 8192, 8192, "NVIDIA H200")
        assert flop_rate == pytest.approx(devices.known("NVIDIA H200")["gemm_flops"][kind], rel=1e-6)


def test_a_dense_matrix_is_predicted_to_be_written_once_and_the_blocks_to_be_read_once():
    product = cost.Product("dds", 16, "half", 4096, 4096, 256, "NVIDIA H200")
    gemm = cost.gemm_seconds("half", 256, 4096, 4096, "NVIDIA H200")
    copies = [cost.dense_seconds(product, density) - gemm for density in (0.0, 1.0)]
    assert copies[1] - copies[0] == pytest.approx(2 * 4096**2 / devices.known("NVIDIA H200")["hbm_bytes_per_s"])
    assert copies[1] < 36e-6, "clearing first and scattering afterwards took 36 us at density 0.5"


def test_live_neighbours_share_a_request_to_l2():
    """Blocks of 16 in 16 bits are 32 bytes wide: alone they take the time of 64, side by side their own."""
    assert cost._fetched(32, 0.001) == pytest.approx(64, rel=1e-3)
    assert cost._fetched(32, 1.0) == 32
    assert cost._fetched(64, 0.5) == 64 and cost._fetched(256, 0.5) == 256


def test_on_a_gpu_sparse_layers_take_the_kernels_and_dense_ones_the_vendor(gpu):
    x = OnGpu(16384, 4096)
    assert choose.backend_for("dds", x, layout(0.02, 64)) is triton
    assert choose.backend_for("dds", x, layout(0.9, 64)) is dense
    assert choose.backend_for("dds", x, layout(1.0, 64)) is dense
    assert choose.backend_for("dds", OnGpu(0, 4096), layout(0.02, 64)) is triton


def test_on_a_gpu_small_blocks_and_other_dtypes_take_the_vendor_at_any_density(gpu):
    assert choose.backend_for("dds", OnGpu(16384, 4096), layout(0.02, 8)) is dense
    assert choose.backend_for("dds", OnGpu(16384, 4096, dtype=torch.float64), layout(0.02, 64)) is dense


def test_on_a_gpu_slots_count_whether_live_or_dead(gpu):
    topology = sk.Topology.random((4096, 4096), 0.9, 64)
    topology.block_rows[10:], topology.block_cols[10:] = -1, -1
    assert choose.backend_for("dds", OnGpu(16384, 4096), topology.layout) is dense


def test_on_a_gpu_every_operation_is_chosen_by_itself_and_none_falls_to_the_reference(gpu):
    x = OnGpu(16384, 4096)
    for block_size, ragged in itertools.product((1, 8, 16, 128), (None, torch.zeros(3))):
        for operation in OPERATIONS:
            chosen = choose.backend_for(operation, x, layout(0.02, block_size, 1024, groups=2), ragged)
            kernel = block_size >= 16 and operation in triton.OPERATIONS
            by_density = kernel and ragged is None and operation in cost.PRODUCTS
            expected = (triton, dense) if by_density else (triton,) if kernel else (dense,)
            assert chosen in expected, (operation, block_size, ragged)


def test_a_measured_break_even_takes_the_models_place_and_moves_with_the_shape(monkeypatch, tmp_path):
    sizes = (4096, 4096, 16384)
    before = cost.break_even(cost.Product("dds", 32, "half", *sizes, "Measured GPU"))
    twice = cost.break_even(cost.Product("dds", 32, "half", 4096, 4096, 256, "Measured GPU"))
    row = dict(zip(("out_features", "in_features", "tokens"), sizes, strict=True))
    row |= {"product": "dds", "block_size": 32, "arithmetic": "half", "density": before / 2}
    (tmp_path / "measured-gpu.json").write_text(json.dumps({"break_even": [row]}))
    (tmp_path / "default.json").write_text((devices.FOLDER / "default.json").read_text())
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    devices.known.cache_clear()
    cost.break_even.cache_clear()
    try:
        assert cost.break_even(cost.Product("dds", 32, "half", *sizes, "Measured GPU")) == before / 2
        assert cost.break_even(cost.Product("dds", 32, "half", 4096, 4096, 256, "Measured GPU")) == pytest.approx(
            twice / 2
        )
        assert cost.break_even(cost.Product("sdd", 32, "half", *sizes, "Measured GPU")) > 0
    finally:
        devices.known.cache_clear()
        cost.break_even.cache_clear()


@pytest.fixture
def other_devices(monkeypatch, tmp_path):
    """A folder of device files of its own, to be written by `name, facts`."""
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    (tmp_path / "default.json").write_text(DEFAULT)
    for cached in (devices.known, devices.nearest, cost.break_even):
        cached.cache_clear()
    yield lambda name, facts: devices.path_for(name).write_text(json.dumps({"device": name} | facts))
    monkeypatch.undo()
    for cached in (devices.known, devices.nearest, cost.break_even):
        cached.cache_clear()


def test_a_gpu_without_a_file_takes_the_measured_device_of_its_compute_capability(other_devices):
    other_devices("NVIDIA H200", {"compute_capability": [9, 0]})
    other_devices("NVIDIA B200", {"compute_capability": [10, 0]})
    other_devices("NVIDIA GH200", {"compute_capability": [9, 0]})
    assert devices.nearest("NVIDIA H100 80GB HBM3", (9, 0)) in ("NVIDIA H200", "NVIDIA GH200")
    assert devices.nearest("NVIDIA GB300", (10, 0)) == "NVIDIA B200"
    assert devices.nearest("NVIDIA GH200", (9, 0)) == "NVIDIA GH200"
    assert devices.nearest("NVIDIA A100-SXM4-40GB", (8, 0)) == "NVIDIA A100-SXM4-40GB"


def test_an_h100_breaks_even_where_the_measured_hopper_card_does_and_not_where_the_model_says(gpu, monkeypatch):
    """By the files that are committed."""
    monkeypatch.setattr(choose, "_device_name", devices.name_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    key = 64, "half", 4096, 4096, 16384
    model, measured = (cost.break_even(cost.Product("sdd", *key, name)) for name in (GPU, "NVIDIA H200"))
    assert abs(measured - model) > 0.02
    between, faster = layout((measured + model) / 2, 64), triton if model < measured else dense
    assert choose.backend_for("sdd", OnGpu(16384, 4096), between) is faster


def test_cuda_is_chosen_where_it_was_measured_to_be_the_fastest_and_nowhere_else(gpu, monkeypatch):
    row = {"product": "dds", "block_size": 16, "arithmetic": "half", "out_features": 4096, "in_features": 4096}
    rows = [row | {"tokens": 16384, "from": 0.03, "to": 0.15}, row | {"tokens": 256, "from": 1.0, "to": 0.0}]
    default = devices.known(GPU)
    monkeypatch.setattr(devices, "known", lambda name: default | {"cuda": rows})
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "shared_bytes", lambda device: 232448)
    own = [True]
    monkeypatch.setattr(choose, "_has_own_table", lambda device: own[0])
    choose._fastest_on_gpu.cache_clear()

    def chosen(density, tokens=16384, operation="dds", block_size=16, width=4096, dtype=torch.bfloat16, **more):
        x = OnGpu(tokens, width, dtype=dtype)
        return choose.backend_for(operation, x, layout(density, block_size, width), **more)

    assert [chosen(density) is cuda for density in (0.02, 0.04, 0.1, 0.16)] == [False, True, True, False]
    assert chosen(0.1, 8192) is cuda and chosen(0.1, width=2048) is cuda  # the nearest row counts
    assert chosen(0.1, 256) is not cuda and chosen(0.1, operation="sdd") is not cuda
    assert chosen(0.1, 2048) is not cuda  # too far from any row
    both = [*rows, rows[0] | {"tokens": 4096, "from": 0.05, "to": 0.07}]
    monkeypatch.setattr(devices, "known", lambda name: default | {"cuda": both})
    choose._fastest_on_gpu.cache_clear()
    assert chosen(0.06, 8192) is cuda and chosen(0.1, 8192) is not cuda  # rows that are equally near must agree
    assert chosen(0.1, block_size=32) is not cuda and chosen(0.1, dtype=torch.float32) is not cuda
    assert chosen(0.1, token_offsets=torch.tensor([0, 16384])) is not cuda
    choose._fastest_on_gpu.cache_clear()
    own[0] = False  # the table is that of a device like it
    assert chosen(0.1) is not cuda
    own[0] = True
    choose._fastest_on_gpu.cache_clear()
    monkeypatch.setattr(cuda, "unavailable", lambda device: "it was not built.")
    assert chosen(0.1) is not cuda
    choose._fastest_on_gpu.cache_clear()


@pytest.mark.parametrize("path", sorted(devices.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_field_of_a_device_is_documented(path):
    page = (devices.FOLDER / "README.md").read_text()
    assert all(f"`{field}`" in page for field in json.loads(path.read_text()))


@pytest.mark.parametrize("block_size", [1, 8, 16])
def test_the_vendors_path_for_ragged_groups_needs_no_host(block_size, monkeypatch):
    """On a GPU; here the device is only named "cuda", and the copies are the reference's."""
    topology = random_topology((2, 3), block_size, groups=3, dead=1)
    x, dy = torch.randn(9, 3 * block_size), torch.randn(9, 2 * block_size)
    weight, bias = torch.randn(topology.num_slots, block_size, block_size), torch.randn(6 * block_size)
    weight[topology.block_rows < 0] = 0
    offsets = torch.tensor([0, 2, 2, 9])
    monkeypatch.setattr(dense, "_copies", lambda x: reference)
    monkeypatch.setattr(dense, "_host_knows", lambda x, token_offsets: False)
    monkeypatch.setattr(reference, "_spans", None)
    found = [dense.dds(x, weight, topology.layout, bias, True, offsets)]
    found += [dense.dds(dy, weight, topology.layout, None, False, offsets)]
    found += [dense.sdd(dy, x, topology.layout, offsets)]
    norms = [torch.full((3, 2, 3), -1.0) for _ in range(2)]
    dense.add_block_norms(dy, x, topology.layout, norms[0], torch.tensor(True), offsets)
    monkeypatch.undo()
    reference.add_block_norms(dy, x, topology.layout, norms[1], torch.tensor(True), offsets)
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(found[0], reference.dds(x, weight, topology.layout, bias, True, offsets))
    torch.testing.assert_close(found[1], reference.dds(dy, weight, topology.layout, None, False, offsets))
    torch.testing.assert_close(found[2], reference.sdd(dy, x, topology.layout, offsets))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU")
@pytest.mark.parametrize("block_size", [1, 8, 16, 128])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_vendors_path_is_right_on_a_gpu_and_does_not_synchronise(block_size, ragged):
    topology = random_topology((2, 3), block_size, groups=3, dead=1).to("cuda")
    beside = 1 if ragged else 3
    x, dy = (torch.randn(9, beside * n * block_size, device="cuda", dtype=torch.float64) for n in (3, 2))
    weight = torch.randn(topology.num_slots, block_size, block_size, device="cuda", dtype=torch.float64)
    weight[topology.block_rows < 0] = 0
    offsets = torch.tensor([0, 2, 2, 9], device="cuda") if ragged else None
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = dense.dds(x, weight, topology.layout, None, True, offsets)
        dw = dense.sdd(dy, x, topology.layout, offsets)
        norms = dense.block_norms(dy, x, topology.layout, slice(0, 2), offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(y, reference.dds(x, weight, topology.layout, None, True, offsets))
    torch.testing.assert_close(dw, reference.sdd(dy, x, topology.layout, offsets))
    torch.testing.assert_close(norms, reference.block_norms(dy, x, topology.layout, slice(0, 2), offsets))
