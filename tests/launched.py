"""Prepared launches against Triton's own, byte by byte: test_launches.py runs this file, with tests/libcuda.c loaded.

Kernels are compiled for an H100 and loaded nowhere. Triton's launcher and ours both reach the stub of the driver.
"""

import ctypes
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

import sparsekern as sk
from bench.call_overhead import Driver
from sparsekern.backends.triton import launch, prepare

STREAM = 77


class Record(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64), ("grid", ctypes.c_uint64 * 3), ("block", ctypes.c_uint64 * 3),
        ("shared", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("num_attributes", ctypes.c_uint64),
        ("extended", ctypes.c_uint64), ("parameters", ctypes.c_uint64 * 32),
    ]  # fmt: skip


stub = ctypes.CDLL("libcuda.so.1")
last = (Record * 8).in_dll(stub, "last")
num_launches = ctypes.c_int.in_dll(stub, "num_launches")
num_parameters = (ctypes.c_int * 256).in_dll(stub, "num_parameters")
results = (ctypes.c_int * 8).in_dll(stub, "results")
entered_contexts = ctypes.c_int.in_dll(stub, "entered_contexts")


class RealLauncher(Driver):
    """Triton's own launcher, in front of a driver that loads nothing."""

    launcher_cls = CudaLauncher
    functions = itertools.count(1)

    def __init__(self):
        self.utils = SimpleNamespace(**vars(CudaUtils()) | vars(Driver.utils))
        self.utils.load_binary = lambda *_: (1, next(self.functions), 32, 0, 1024)

    def get_current_stream(self, device):
        return STREAM


@pytest.fixture(scope="module", autouse=True)
def active_driver():
    driver.set_active(RealLauncher())


@pytest.fixture
def compiled(monkeypatch):
    """What Triton has compiled, by function; the stub is told how many parameters each has."""
    found = {}

    def note(kernel, *others):
        kinds = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
        found[kernel.function] = [*kinds, "*scratch", "*profile"]
        num_parameters[kernel.function] = len(kinds) + 2
        return prepare.prepare(kernel, *others)

    monkeypatch.setattr(launch, "prepare", note)
    monkeypatch.setattr(launch, "_prepared", {})
    return found


@pytest.fixture(autouse=True)
def same_memory(monkeypatch):
    """What a launcher allocates lies at the same address every time."""
    held, new_empty, contiguous = {}, torch.Tensor.new_empty, torch.Tensor.contiguous

    def kept(self, *sizes, **options):
        key = sizes, self.dtype, *options.items()
        return held.setdefault(key, new_empty(self, *sizes, **options))

    monkeypatch.setattr(torch.Tensor, "new_empty", kept)
    monkeypatch.setattr(
        torch.Tensor, "contiguous", lambda t: held.setdefault((t.data_ptr(), t.stride()), contiguous(t))
    )


def records(call, compiled) -> list[dict]:
    """What a call launches."""
    before = num_launches.value
    call()
    found = []
    for n in range(before, num_launches.value):
        r = last[n % 8]
        kinds = compiled.get(r.function, [])
        values = [r.parameters[p] & (2**32 - 1 if kind == "i32" else 2**64 - 1) for p, kind in enumerate(kinds)]
        fields = {name: getattr(r, name) for name in ("function", "shared", "stream", "num_attributes")}
        found.append(fields | {"grid": [*r.grid], "block": [*r.block], "parameters": values, "triton": r.extended})
    return found


def problem(dtype, groups=1, ragged=False, tokens=48):
    topology = sk.Topology.random((groups * 256, groups * 128), 0.5, 32, groups)
    side = 1 if ragged else groups
    x, dy = (torch.zeros(tokens, side * n, dtype=dtype) for n in (128, 256))
    weight, bias = torch.zeros(topology.num_slots, 32, 32, dtype=dtype), torch.zeros(groups * 256, dtype=dtype)
    offsets = torch.tensor([0] * groups + [tokens], dtype=torch.int32) if ragged else None
    return topology.layout, x, dy, weight, bias, offsets


def products(dtype, **shape):
    layout, x, dy, weight, bias, offsets = problem(dtype, **shape)
    return {
        "forward": lambda: launch.dds(x, weight, layout, bias, True, offsets),
        "without bias": lambda: launch.dds(x, weight, layout, None, True, offsets),
        "backward": lambda: launch.dds(dy, weight, layout, None, False, offsets),
        "gradient": lambda: launch.sdd(dy, x, layout, offsets),
    }


def compare(call, compiled, launches=1):
    """The first launch is Triton's and the second ours; both reach the driver with the same bytes."""
    call()  # tells the stub what parameters there are
    launch._prepared.clear()
    theirs, ours = records(call, compiled), records(call, compiled)
    assert len(theirs) == len(ours) == launches
    assert [r.pop("triton") for r in theirs] == launches * [1]
    assert [r.pop("triton") for r in ours] == launches * [0]
    assert ours == theirs
    assert all(r["parameters"] and r["stream"] == STREAM for r in ours)


@pytest.mark.parametrize("product", ["forward", "without bias", "backward", "gradient"])
@pytest.mark.parametrize("kind", [{}, {"groups": 3}, {"groups": 3, "ragged": True}], ids=["plain", "groups", "ragged"])
def test_a_prepared_launch_is_tritons_own(compiled, product, kind):
    compare(products(torch.bfloat16, **kind)[product], compiled)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("product", ["forward", "backward", "gradient"])
def test_a_prepared_launch_of_float32_is_tritons_own(compiled, product, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(products(torch.float32)[product], compiled)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_split_gradient_and_its_sum_are_prepared(compiled, monkeypatch):
    monkeypatch.setattr(launch, "SPLITS_PER_SM", 99)
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 16)
    compare(products(torch.bfloat16, tokens=64)["gradient"], compiled, launches=2)


def test_the_number_of_tokens_and_the_stride_are_those_of_the_call(compiled):
    layout, _, _, weight, bias, _ = problem(torch.bfloat16)
    for tokens, width in ((48, 128), (200, 128), (1, 512), (700, 256)):
        x = torch.zeros(tokens, width, dtype=torch.bfloat16)[:, :128]
        launch.dds(x, weight, layout, bias, True)
        (ours,) = records(lambda x=x: launch.dds(x, weight, layout, bias, True), compiled)
        assert not ours["triton"]
        assert ours["parameters"][0] == x.data_ptr() and tokens in ours["parameters"] and width in ours["parameters"]
        launch._prepared.clear()
        (theirs,) = records(lambda x=x: launch.dds(x, weight, layout, bias, True), compiled)
        assert theirs | {"triton": 0} == ours


def test_layouts_of_one_geometry_share_a_launch(compiled):
    first, second = products(torch.bfloat16), products(torch.bfloat16)
    first["forward"]()
    (ours,) = records(second["forward"], compiled)
    assert not ours["triton"] and len(launch._prepared) == 1


def test_what_was_compiled_for_multiples_of_16_is_launched_for_nothing_else(compiled):
    layout, x, _, weight, bias, _ = problem(torch.bfloat16)
    launch.dds(x, weight, layout, bias, True)
    odd_address = torch.zeros(48 * 128 + 1, dtype=torch.bfloat16)[1:].view(48, 128)
    odd_stride = torch.zeros(48, 129, dtype=torch.bfloat16)[:, :128]
    for other in (odd_address, odd_stride):
        (theirs,) = records(lambda other=other: launch.dds(other, weight, layout, bias, True), compiled)
        assert theirs["triton"] and len(launch._prepared) == 1


def test_no_tokens_are_no_launch(compiled):
    calls = products(torch.bfloat16)
    layout, x, dy, weight, bias, _ = problem(torch.bfloat16)
    calls["forward"]()
    assert records(lambda: launch.dds(x[:0], weight, layout, bias, True), compiled) == []


def test_another_current_device_is_tritons_business(compiled, monkeypatch):
    call = products(torch.bfloat16)["forward"]
    call()
    monkeypatch.setattr(launch, "current_device", lambda: 3)
    assert records(call, compiled)[0]["triton"]


def test_without_the_native_module_triton_launches(compiled, monkeypatch):
    monkeypatch.setattr(prepare, "_cuda", None)
    for call in products(torch.bfloat16).values():
        assert [r["triton"] for _ in range(2) for r in records(call, compiled)] == [1, 1]
    assert launch._prepared == {}


def test_the_drivers_error_names_the_kernel(compiled):
    call = products(torch.bfloat16)["gradient"]
    call()
    results[num_launches.value % 8] = 700
    with pytest.raises(RuntimeError, match="sdd_kernel was not launched: the error's own words"):
        call()
    assert not records(call, compiled)[0]["triton"]


def test_a_thread_without_a_context_enters_the_devices(compiled):
    call = products(torch.bfloat16)["forward"]
    call()
    entered = entered_contexts.value
    results[num_launches.value % 8] = 201
    found = []
    thread = threading.Thread(target=lambda: found.extend(records(call, compiled)))
    thread.start()
    thread.join()
    assert [r["triton"] for r in found] == [0, 0]  # refused, and launched
    assert entered_contexts.value == entered + 1
