import functools
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import BLOCK_SIZES, random_topology

import sparsekern as sk
from sparsekern import choose, devices
from sparsekern.backends import cpu, cuda, dense, reference

native = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


def chosen(layer, dtype=torch.float32, device="cpu", tokens=2048):
    return choose.backend_for("dds", torch.empty(tokens, 1, dtype=dtype, device=device), layer.topology.layout)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_kernels_answer_below_the_break_even_density_and_the_vendor_above(block_size, dtype):
    density = choose.break_even(block_size, dtype)
    below = sk.SparseLinear(1024, 1024, density=0.8 * density, block_size=block_size)
    assert chosen(below, dtype) is cpu
    if density < 0.9:
        above = sk.SparseLinear(1024, 1024, density=1.1 * density, block_size=block_size)
        assert chosen(above, dtype) not in (cpu, reference)


@native
def test_the_kernels_answer_few_tokens_at_any_density_as_copying_the_weight_would_cost_more():
    layer = sk.SparseLinear(256, 256, density=0.9, block_size=1)
    assert chosen(layer, tokens=4) is cpu
    assert chosen(layer, tokens=2048) is not cpu
    assert chosen(sk.SparseLinear(256, 256, density=1.0, block_size=1), tokens=4) is not cpu  # nothing to copy


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")])
def test_the_reference_answers_what_no_other_backend_takes(dtype, device):
    assert chosen(sk.SparseLinear(64, 64, density=0.1), dtype, device) is reference


@native
def test_dead_slots_do_not_count_as_live():
    topology = random_topology((10, 10), 1, live=0.1, dead=85)
    assert chosen(sk.SparseLinear(10, 10, topology=topology)) is cpu
    topology = random_topology((10, 10), 1, live=0.9, dead=5)
    assert chosen(sk.SparseLinear(10, 10, topology=topology)) is not cpu


def test_forcing_nests_and_ends_with_the_block_even_after_an_error():
    layer = sk.SparseLinear(64, 64, density=0.95, block_size=1)
    free = chosen(layer)
    with pytest.raises(KeyError), sk.use("reference"):
        with sk.use("reference"):
            pass
        assert chosen(layer) is reference
        raise KeyError
    assert chosen(layer) is free


def test_blocks_of_two_threads_that_end_in_any_order_leave_nothing_forced():
    first, second = sk.use("reference"), sk.use("dense")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert choose.forced() is choose.BACKENDS["dense"]
    second.__exit__(None, None, None)
    assert choose.forced() is None


@pytest.mark.parametrize(
    ("name", "expected"), [("reference", "reference"), ("abacus", "'abacus' is unknown; there are reference")]
)
def test_the_environment_variable_forces_a_backend_or_says_what_there_is(name, expected):
    program = "import torch, sparsekern as sk; from sparsekern import choose as c;"
    program += "print(c.backend_for('dds', torch.empty(1, 1), sk.Topology.random((8, 8), 0.1, 4).layout).__name__)"
    environment = os.environ | {"SPARSEKERN_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert expected in done.stdout + done.stderr and (done.returncode == 0) == (name == "reference")


def test_a_forced_backend_answers_a_convolution(monkeypatch):
    asked = []
    for name, module in (("reference", reference), ("dense", dense), ("cpu", cpu)):
        own = module.dds
        monkeypatch.setattr(module, "dds", lambda *args, own=own, name=name: asked.append(name) or own(*args))
    x = torch.randn(2, 4, 6, 6)
    for density in (0.3, 1.0):
        layer = sk.SparseConv2d(4, 8, 3, density=density, block_size=4)
        free = layer(x)
        for name in ("reference", "cpu", "dense"):
            if name == "cpu" and cpu.unavailable():
                continue
            asked.clear()
            with sk.use(name):
                torch.testing.assert_close(layer(x), free, rtol=1e-4, atol=1e-5)
            assert asked == ([] if name == "dense" else [name])  # the dense path of a convolution is F.conv2d


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capturing(monkeypatch) -> list[bool]:
    """Whether a CUDA graph is being captured, as torch says it."""
    answer = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answer[0])
    return answer


def test_forcing_cuda_rewires_by_its_kernels_and_forces_its_products(monkeypatch, capturing):
    monkeypatch.setattr(cuda, "unavailable", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU that nobody measured")
    layer = sk.SparseLinear(64, 64, density=0.1, block_size=4)
    free = choose.backend_for("densify", torch.empty(1, 64), layer.topology.layout)
    assert not choose.rewires_by_cuda(GPU)
    with sk.use("cuda"):
        assert choose.rewires_by_cuda(GPU) and not choose.rewires_by_cuda(CPU)
        assert choose.backend_for("densify", torch.empty(1, 64), layer.topology.layout) is free
        with pytest.raises(
            RuntimeError, match="'cuda' takes bfloat16 and float16 on an NVIDIA GPU in blocks of 8 and 16, "
        ):
            choose.backend_for("sdd", torch.empty(1, 64), layer.topology.layout)
        assert choose.forced() is cuda
        with sk.use("reference"):
            assert choose.forced() is reference and not choose.rewires_by_cuda(GPU)
        capturing[0] = True
        assert not choose.rewires_by_cuda(GPU)
        capturing[0] = False
    assert not choose.rewires_by_cuda(GPU)


def test_kernels_rewire_unforced_only_on_the_very_device_whose_table_says_so(monkeypatch, capturing, tmp_path):
    (tmp_path / "default.json").write_text((devices.FOLDER / "default.json").read_text())
    (tmp_path / "fast-gpu.json").write_text('{"device": "Fast GPU", "rewire_by_cuda": true}')
    (tmp_path / "slow-gpu.json").write_text('{"device": "Slow GPU"}')
    monkeypatch.setattr(devices, "FOLDER", tmp_path)
    devices.known.cache_clear()
    answers = {}
    for missing in (None, "sparsekern was built without rewire.fatbin"):
        monkeypatch.setattr(cuda, "unavailable", lambda device, missing=missing: missing)
        for name in ("Fast GPU", "Slow GPU", "New GPU"):
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
            answers[name, missing is None] = choose.rewires_by_cuda(GPU)
    devices.known.cache_clear()
    assert [key for key, answer in answers.items() if answer] == [("Fast GPU", True)]


class Driver:
    """A libcuda of CUDA 12.4, which loads modules or says why not."""

    status = 0

    def __init__(self):
        self.loads, self.waits = 0, []

    def cuModuleLoadData(self, module, image):
        self.loads += 1
        return self.status

    def cuModuleGetFunction(self, function, module, name):
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"unsupported toolchain"

    def cuDriverGetVersion(self, version):
        version._obj.value = 12040


@pytest.fixture
def driver(monkeypatch, capturing, tmp_path):
    """All that the kernels of csrc/cuda ask for, but a GPU; what they wait for is in `waits`."""
    driver = Driver()
    for name in cuda.KERNELS:
        (tmp_path / f"{name}.fatbin").touch()
    monkeypatch.setattr(cuda, "FATBIN", tmp_path)
    monkeypatch.setattr(cuda, "_cuda", object())
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    for cached in ("_unloadable", "_module", "_function"):  # what real kernels have there stays
        monkeypatch.setattr(cuda, cached, functools.cache(getattr(cuda, cached).__wrapped__))
    answers = {"is_available": True, "get_device_capability": (9, 0), "get_device_name": "Fast GPU"}
    answers |= {"current_device": 0, "device": nullcontext()}
    answers["current_stream"] = SimpleNamespace(synchronize=lambda: driver.waits.append("stream"))
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, answer=answer: answer)
    monkeypatch.setattr(devices, "known", lambda name: {"rewire_by_cuda": True})
    return driver


def test_events_of_rewiring_look_for_the_kernels_files_once(monkeypatch, driver):
    looked, exists = [], Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looked.append(path.name) or exists(path))
    assert [choose.rewires_by_cuda(GPU) for _ in range(3)] == 3 * [True]
    with sk.use("reference"):
        assert not choose.rewires_by_cuda(GPU)
    assert looked == [f"{name}.fatbin" for name in cuda.KERNELS] and driver.loads == len(cuda.KERNELS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what may change is asked again
    assert not choose.rewires_by_cuda(GPU)


def test_kernels_that_the_driver_cannot_load_are_not_chosen_and_say_why_where_they_are_forced(driver):
    driver.status = 222
    assert [choose.rewires_by_cuda(GPU) for _ in range(3)] == 3 * [False]
    assert driver.loads == 1
    problem = (
        r"the driver, which is for CUDA 12.4, does not load dds.fatbin, error 222 \(unsupported toolchain\); install"
    )
    assert re.search(problem, cuda.unavailable(GPU))
    with pytest.raises(RuntimeError, match=f"backend 'cuda': {problem} .* nvcc of that version"):
        cuda._function("dds", "dds_pack_8", 0, 0)


def test_a_file_that_cannot_be_loaded_now_may_be_later(driver, capturing):
    driver.status, capturing[0] = 900, True  # some drivers load nothing in a capture
    with pytest.raises(RuntimeError, match="backend 'cuda', dds.fatbin: error 900"):
        cuda.unavailable(GPU)
    driver.status, capturing[0] = 0, False
    assert cuda.unavailable(GPU) is None


def test_a_kernel_that_is_first_used_in_a_capture_does_not_wait_for_the_stream(driver, capturing):
    capturing[0] = True
    cuda._function("dds", "dds_pack_8", 0, 0)
    assert not driver.waits
    capturing[0] = False
    cuda._function("dds", "dds_pack_16", 0, 0)
    assert driver.waits == ["stream"]


def test_without_a_device_the_driver_is_not_asked_as_that_would_make_a_context(driver):
    assert cuda.unavailable() is None and not driver.loads and not driver.waits


@pytest.mark.skipif(cuda.unavailable() is None, reason="the kernels of backend 'cuda' can run here")
def test_forcing_cuda_where_it_cannot_run_says_what_is_missing():
    with pytest.raises(RuntimeError, match="backend 'cuda' was asked for, but .*(nvcc|GPU|compute capability)"):
        with sk.use("cuda"):
            pass
