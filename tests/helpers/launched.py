"""Prepared launches against Triton's own, byte by byte: test_launches.py runs this file, with libcuda.c loaded.

Kernels are compiled for an H100 and loaded nowhere. Triton's launcher and ours both reach the stub of the driver.
"""

import ctypes
import gc
import itertools
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import __version__ as triton_version
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

import sparsekern as sk
from bench.call_overhead import Driver
from sparsekern import choose, products, quick, routes
from sparsekern.backends import cuda, triton
from sparsekern.backends.cuda import products as cuda_products
from sparsekern.backends.triton import launch, prepare, tiles

STREAM = 77
# Triton 3.6 leaves the bit that drivers up to 13.1 set wrongly in maps of small tensors.
SECOND_WORD = ~(1 << 21) if triton_version.startswith("3.6.") else ~0


class Record(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_uint64), ("grid", ctypes.c_uint64 * 3), ("block", ctypes.c_uint64 * 3),
        ("shared", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("num_attributes", ctypes.c_uint64),
        ("extended", ctypes.c_uint64), ("parameters", ctypes.c_uint64 * 32), ("maps", (ctypes.c_uint64 * 16) * 2),
    ]  # fmt: skip


stub = ctypes.CDLL("libcuda.so.1")
last = (Record * 8).in_dll(stub, "last")
num_launches = ctypes.c_int.in_dll(stub, "num_launches")
num_parameters = (ctypes.c_int * 256).in_dll(stub, "num_parameters")
results = (ctypes.c_int * 8).in_dll(stub, "results")
map_places = (ctypes.c_uint * 256).in_dll(stub, "map_places")
encoded = ((ctypes.c_uint64 * 16) * 8).in_dll(stub, "encoded")
num_encoded = ctypes.c_int.in_dll(stub, "num_encoded")
encode_results = (ctypes.c_int * 8).in_dll(stub, "encode_results")
driver_version = ctypes.c_int.in_dll(stub, "driver_version")
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
        kinds = []
        for kind in kernel.src.signature.values():
            if kind.startswith("tensordesc"):
                kinds += ["map", "i32", "i32", "i64", "i64"]
            elif kind != "constexpr":
                kinds.append(kind)
        found[kernel.function] = [*kinds, "*scratch", "*profile"]
        num_parameters[kernel.function] = len(kinds) + 2
        map_places[kernel.function] = sum(1 << n for n, kind in enumerate(kinds) if kind == "map")
        return prepare.prepare(kernel, *others)

    monkeypatch.setattr(launch, "prepare", note)
    monkeypatch.setattr(launch, "_prepared", {})
    return found


@pytest.fixture(autouse=True)
def same_memory(monkeypatch):
    """What a launcher allocates lies at the same address every time."""
    held, new_empty, contiguous = {}, torch.Tensor.new_empty, torch.Tensor.contiguous

    def kept(self, *sizes, **options):
        made = new_empty(self, *sizes, **options)
        return held.setdefault((made.shape, made.dtype), made).detach() if made.dim() > 1 else made

    monkeypatch.setattr(torch.Tensor, "new_empty", kept)

    def kept_contiguous(self):
        # of weights only, which tf32 transposes: gradients of other shapes may lie where an earlier one lay
        made = contiguous(self)
        return held.setdefault((self.data_ptr(), self.stride()), made) if self.dim() == 3 else made

    monkeypatch.setattr(torch.Tensor, "contiguous", kept_contiguous)


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
        maps = [[first, second & SECOND_WORD, *rest] for first, second, *rest in r.maps]
        found.append(
            fields | {"grid": [*r.grid], "block": [*r.block], "parameters": values, "maps": maps, "triton": r.extended}
        )
    return found


def problem(dtype, groups=1, ragged=False, tokens=48):
    topology = sk.Topology.random((groups * 256, groups * 128), 0.5, 32, groups)
    side = 1 if ragged else groups
    x, dy = (torch.zeros(tokens, side * n, dtype=dtype) for n in (128, 256))
    weight, bias = torch.zeros(topology.num_slots, 32, 32, dtype=dtype), torch.zeros(groups * 256, dtype=dtype)
    offsets = torch.tensor([0] * groups + [tokens], dtype=torch.int32) if ragged else None
    return topology.layout, x, dy, weight, bias, offsets


def calls(dtype, **shape):
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
    compare(calls(torch.bfloat16, **kind)[product], compiled)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("product", ["forward", "backward", "gradient"])
def test_a_prepared_launch_of_float32_is_tritons_own(compiled, product, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        compare(calls(torch.float32)[product], compiled)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_split_gradient_and_its_sum_are_prepared(compiled, monkeypatch):
    monkeypatch.setattr(launch, "SPLITS_PER_SM", 99)
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 16)
    compare(calls(torch.bfloat16, tokens=64)["gradient"], compiled, launches=2)


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


# Tensor descriptors: what ours encodes and passes is what Triton's launcher encodes and passes.


@pytest.fixture
def descriptors(monkeypatch):
    """Every product takes the first tile with descriptors that is listed for it."""
    for key, listed in tiles.DESCRIPTORS.items():
        monkeypatch.setitem(tiles.of(torch.device("cpu")), key, listed[:1])


def described(b, tokens=300):
    """Calls of all three products, with rows that lie further apart than they are long; [tensor, rows of its box]."""
    topology = sk.Topology.random((256, 128), 0.5, b)
    layout, slots = topology.layout, topology.num_slots
    x, dy = (torch.zeros(tokens, n + 8, dtype=torch.bfloat16)[:, :n] for n in (128, 256))
    weight, bias = torch.zeros(slots, b, b, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.bfloat16)
    return {
        "forward": (lambda x=x, weight=weight: launch.dds(x, weight, layout, bias, True), x, weight),
        "backward": (lambda dy=dy: launch.dds(dy, weight, layout, None, False), dy, weight),
        "gradient": (lambda: launch.sdd(dy, x, layout), dy, x),
    }


def encodings(call) -> list[list[int]]:
    """What a call encodes."""
    before = num_encoded.value
    call()
    return [[*encoded[n % 8]] for n in range(before, num_encoded.value)]


CASES = [(key, product, n) for key, listed in tiles.DESCRIPTORS.items() for n in range(len(listed))
         for product in (["forward", "backward"] if key[0] == "dds" else ["gradient"])]  # fmt: skip


@pytest.mark.parametrize("version", [13010, 13020])
@pytest.mark.parametrize(("key", "product", "n"), CASES, ids=lambda value: str(value))
def test_a_prepared_launch_encodes_and_passes_what_tritons_does(compiled, monkeypatch, key, product, n, version):
    monkeypatch.setitem(tiles.of(torch.device("cpu")), key, tiles.DESCRIPTORS[key][n : n + 1])
    monkeypatch.setattr(driver_version, "value", version)
    for tokens in (300, 3000):  # x of 300 tokens is small
        call, *_ = described(key[1], tokens)[product]
        call()  # tells the stub what parameters there are
        launch._prepared.clear()
        theirs, ours = [], []
        encoded_there = encodings(lambda call=call, theirs=theirs: theirs.extend(records(call, compiled)))
        encoded_here = encodings(lambda call=call, ours=ours: ours.extend(records(call, compiled)))
        assert len(encoded_there) == 2 and encoded_here == encoded_there
        assert all(r.pop("triton") for r in theirs) and not any(r.pop("triton") for r in ours)
        assert all(words[2] for words in ours[0]["maps"])
        assert ours == theirs


@pytest.mark.parametrize("product", ["forward", "backward", "gradient"])
def test_a_tensor_map_describes_whole_tensors_in_boxes_of_128_bytes(compiled, descriptors, product):
    call, *tensors = described(64)[product]
    box_rows = {"forward": (128, 64), "backward": (128, 64), "gradient": (64, 64)}[product]
    launch._prepared.clear()
    call()
    launched = num_launches.value
    # the launch that Triton made was kept, but none of its tensor maps
    for words, tensor, rows in zip(encodings(call), tensors, box_rows, strict=True):
        width, bfloat16, interleave, swizzle_128, promotion_128, zeros = tensor.shape[-1], 9, 0, 3, 2, 0
        sizes = [width, tensor.numel() // width, tensor.stride(-2) * 2]
        assert words[:8] == [bfloat16, 2, tensor.data_ptr(), *sizes, 64, rows]
        assert words[8:14] == [1, 1, interleave, swizzle_128, promotion_128, zeros]
    assert not last[launched % 8].extended


def elsewhere(tensor):
    """A copy whose map does not want the place of the tensor's own, as one in 64 does (csrc/cuda/tensor_map.cpp)."""
    place, copies = (lambda t: (t.data_ptr() * 0x9E3779B97F4A7C15 % 2**64 >> 32) % 64), [tensor]
    while place(copies[-1]) == place(tensor):
        copies.append(tensor.clone())  # all are held, so that each has an address of its own
    return copies[-1]


def test_a_tensor_map_is_kept_for_its_address_and_shape(compiled, descriptors):
    forward, x, weight = described(64)["forward"]
    forward()
    assert [words[2] for words in encodings(forward)] == [x.data_ptr(), weight.data_ptr()]
    assert encodings(forward) == []
    moved, heavier = elsewhere(x), elsewhere(weight)
    assert [words[2] for words in encodings(lambda: forward(x=moved))] == [moved.data_ptr()]
    assert [words[2] for words in encodings(lambda: forward(weight=heavier))] == [heavier.data_ptr()]
    (fewer,) = encodings(lambda: forward(x=moved[:270]))
    assert fewer[2] == moved.data_ptr() and fewer[4] == 270
    wide = torch.zeros(300 * 256, dtype=x.dtype)
    for width in (136, 144, 136):
        (other,) = encodings(lambda width=width: forward(x=wide.as_strided((300, 128), (width, 1))))
        assert other[5] == 2 * width
    (ours,) = records(lambda: forward(x=wide.as_strided((300, 128), (136, 1))), compiled)
    assert not ours["triton"] and ours["maps"][0][2] == wide.data_ptr() and ours["maps"][0][5] == 272


def test_layers_that_share_a_launch_keep_their_tensor_maps_side_by_side(compiled, descriptors):
    forward, x, weight = described(64)["forward"]
    layers = [weight.clone() for _ in range(8)]

    def model():
        for layer in layers:
            forward(weight=layer)

    model()
    model()
    # two addresses may want one place, and then take turns
    assert len(encodings(model)) < len(layers)
    taken = [r["maps"][1][2] for r in records(model, compiled)]
    assert taken == [layer.data_ptr() for layer in layers]


def test_what_no_tensor_map_takes_goes_by_the_plain_kernel(compiled, descriptors):
    forward, x, weight = described(64)["forward"]
    forward()
    (ours,) = records(forward, compiled)
    memory = torch.zeros(300 * 256, dtype=x.dtype)
    odd_stride = memory.as_strided((300, 128), (132, 1))  # 264 bytes
    odd_address = memory[4:].as_strided((300, 128), (136, 1))  # 8 bytes
    same_row = memory.as_strided((300, 128), (0, 1))
    for other in (odd_stride, odd_address, same_row):
        assert encodings(lambda other=other: forward(x=other)) == []
        (plain,) = records(lambda other=other: forward(x=other), compiled)
        assert plain["function"] != ours["function"] and compiled[ours["function"]][0] == "map"
    kept = next(made for key, made in launch._prepared.items() if key[1].descriptors)
    call = {"tokens": 300, "stream": STREAM, "weight": weight, "bias": None, "y": memory.view(300, 256)}
    call |= {"index": torch.zeros(99, dtype=torch.int32)}
    for other in (odd_stride, odd_address, same_row):
        order = ("tokens", "stream", "x", "weight", "bias", "y", "index")
        given = call | {"x": other}
        assert not kept(**{name: given[name] for name in order})


def test_without_the_native_module_triton_encodes_at_every_call(compiled, descriptors, monkeypatch):
    monkeypatch.setattr(prepare, "_cuda", None)
    for call, *_ in described(64).values():
        call()
        for _ in range(2):
            found = []
            assert len(encodings(lambda call=call, found=found: found.extend(records(call, compiled)))) == 2
            assert [r["triton"] for r in found] == [1]
    assert launch._prepared == {}


def test_a_split_gradient_by_descriptors_is_prepared(compiled, descriptors, monkeypatch):
    monkeypatch.setattr(launch, "SPLITS_PER_SM", 99)
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 16)
    compare(described(64)["gradient"][0], compiled, launches=2)


def test_a_tensor_map_that_the_driver_refuses_is_named(compiled, descriptors):
    forward, x, _ = described(64)["forward"]
    forward()
    encode_results[num_encoded.value % 8] = 1
    match = "dds_descriptors_kernel, x: no tensor map of 300 rows of 128 elements, 136 apart: the error's own words"
    with pytest.raises(RuntimeError, match=match):
        forward()
    (ours,) = records(forward, compiled)  # what was refused is not kept
    assert not ours["triton"] and ours["maps"][0][2] == x.data_ptr()


def test_a_thread_without_a_context_enters_the_devices_to_encode(compiled, descriptors):
    forward, x, _ = described(64)["forward"]
    forward()
    entered = entered_contexts.value
    encode_results[num_encoded.value % 8] = 201
    (ours,) = records(forward, compiled)
    assert entered_contexts.value == entered + 1 and ours["maps"][0][2] == x.data_ptr()


def test_layouts_of_one_geometry_share_a_launch(compiled):
    first, second = calls(torch.bfloat16), calls(torch.bfloat16)
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
    layout, x, _, weight, bias, _ = problem(torch.bfloat16)
    launch.dds(x, weight, layout, bias, True)
    assert records(lambda: launch.dds(x[:0], weight, layout, bias, True), compiled) == []


def test_another_current_device_is_tritons_business(compiled, monkeypatch):
    call = calls(torch.bfloat16)["forward"]
    call()
    monkeypatch.setattr(launch, "current_device", lambda: 3)
    assert records(call, compiled)[0]["triton"]


def test_without_the_native_module_triton_launches(compiled, monkeypatch):
    monkeypatch.setattr(prepare, "_cuda", None)
    for call in calls(torch.bfloat16).values():
        assert [r["triton"] for _ in range(2) for r in records(call, compiled)] == [1, 1]
    assert launch._prepared == {}


def test_a_kernel_stays_loaded_as_long_as_its_launch(compiled, monkeypatch):
    kernels, note = [], launch.prepare

    def remember(kernel, *others):
        kernels.append(weakref.ref(kernel))
        return note(kernel, *others)

    monkeypatch.setattr(launch, "prepare", remember)
    call = calls(torch.bfloat16)["gradient"]
    call()
    launch.kernels.sdd_kernel.device_caches.clear()  # Triton has forgotten it
    gc.collect()
    assert kernels[0]() is not None and not records(call, compiled)[0]["triton"]
    launch._prepared.clear()
    gc.collect()
    assert kernels[0]() is None


def test_the_drivers_error_names_the_kernel(compiled):
    call = calls(torch.bfloat16)["gradient"]
    call()
    results[num_launches.value % 8] = 700
    with pytest.raises(RuntimeError, match="sdd_kernel was not launched: the error's own words"):
        call()
    assert not records(call, compiled)[0]["triton"]


def test_a_thread_without_a_context_enters_the_devices(compiled):
    call = calls(torch.bfloat16)["forward"]
    call()
    entered = entered_contexts.value
    results[num_launches.value % 8] = 201
    found = []
    thread = threading.Thread(target=lambda: found.extend(records(call, compiled)))
    thread.start()
    thread.join()
    assert [r["triton"] for r in found] == [0, 0]  # refused, and launched
    assert entered_contexts.value == entered + 1


# Kernels of csrc/cuda, whose parameters are of 8 bytes each and of any value.


@pytest.fixture
def own_kernels(monkeypatch):
    """Kernels of csrc/cuda by their functions, as `records` takes them; the stub is told of their parameters."""
    found = {}

    def loaded(file, kernel, device, shared):
        function = 1 + len(found)
        found[function] = counts[kernel] * ["i64"]
        num_parameters[function], map_places[function] = counts[kernel], 0
        return 0, function

    counts = {"dds_pack_16": 13, "dds_16_bf16_few": 17, "sdd_16_bf16_512x256": 15, "sdd_sum_bf16": 4, "dds_a_test": 3}
    monkeypatch.setattr(cuda, "_loaded", loaded)
    monkeypatch.setattr(cuda, "current", lambda device: nullcontext(STREAM))
    cuda.prepare.cache_clear()
    yield found
    cuda.prepare.cache_clear()


def ragged_operands():
    """At addresses and with strides for which Triton compiles other variants."""
    layout = sk.Topology.random((256, 128), 0.5, 16, 2).layout
    x, dy = (torch.zeros(600, n + 8, dtype=torch.bfloat16)[:, :n] for n in (64, 128))
    weight, bias = torch.zeros(layout.num_slots, 16, 16, dtype=x.dtype), torch.zeros(257, dtype=x.dtype)[1:]
    return layout, x, dy, weight, bias, torch.tensor([9, 0, 200, 600])[1:]


def test_a_dds_of_csrc_cuda_passes_what_its_kernels_take(own_kernels):
    layout, x, _, weight, bias, offsets = ragged_operands()
    made = []
    pack, multiply = records(
        lambda: made.append(cuda_products.dds(x, weight, layout, bias, True, offsets)), own_kernels
    )
    plan = cuda_products.dds_plan(16, 16, 8, 2, layout.num_slots, 600, True, 132)
    parts, streams = 2 * 132 // plan.tiles, pack["parameters"][2:6]
    assert pack["parameters"] == [
        *(weight.data_ptr(), layout.index.data_ptr()), *streams, layout.num_slots, 16, 8, 2, 1, 1, parts
    ]  # fmt: skip
    assert (pack["grid"], pack["block"]) == ([plan.tiles * parts, 1, 1], [256, 1, 1])
    assert pack["shared"] == plan.pack_bytes
    stages = multiply["parameters"][-1]
    assert multiply["parameters"] == [
        *(x.data_ptr(), bias.data_ptr(), made[0].data_ptr()), *streams, offsets.data_ptr(), 8, 72, 256 // 2, 600,
        16, 8, 2, plan.tiles_of_group, stages,
    ]  # fmt: skip
    assert (multiply["grid"], multiply["block"]) == ([plan.tiles * plan.programs, 1, 1], [384, 1, 1])
    assert multiply["shared"] == stages * plan.shape.stage_bytes + plan.shape.ring_bytes
    assert pack["stream"] == multiply["stream"] == STREAM
    sizes = [end - start for start, end in itertools.pairwise(streams)]
    assert all(size > 0 and size % 128 == 0 for size in sizes) and streams[0] % 16 == 0


def test_an_sdd_of_csrc_cuda_passes_what_its_kernels_take(own_kernels, monkeypatch):
    monkeypatch.setattr(cuda_products, "SPLIT_TOKENS", 200)
    monkeypatch.setattr(cuda_products, "PARTS_PER_OPERANDS", 1e9)
    layout, x, dy, _, _, offsets = ragged_operands()
    made = []
    multiply, total = records(lambda: made.append(cuda_products.sdd(dy, x, layout, offsets)), own_kernels)
    slots, (parts, stages) = layout.num_slots, (multiply["parameters"][n] for n in (2, -1))
    assert multiply["parameters"] == [
        *(dy.data_ptr(), x.data_ptr(), parts, layout.index.data_ptr(), offsets.data_ptr()), 8, 136, 72, 600,
        slots, 16, 8, 2, 3, stages,
    ]  # fmt: skip
    assert (multiply["grid"], multiply["block"]) == ([2 * 3, 1, 1], [384, 1, 1])
    assert multiply["shared"] == stages * cuda_products.SDD_SHAPES[-1].stage_bytes
    assert total["parameters"] == [parts, made[0].data_ptr(), slots * 64, 3]
    assert (total["grid"], total["block"], total["shared"]) == ([-(-slots * 64 // 256), 1, 1], [256, 1, 1], 0)
    assert multiply["stream"] == total["stream"] == STREAM


def test_a_kernel_of_csrc_cuda_takes_numbers_of_64_bits_and_is_prepared_once(own_kernels):
    x = torch.zeros(3, 5)
    for _ in range(2):
        launch_of = cuda.prepare("dds", "a_test", 7, 96, ("x", 2**40 + 1, "num_tokens"), x.device, 11)
        (record,) = records(lambda launch_of=launch_of: launch_of(tokens=2**33, stream=STREAM, x=x), own_kernels)
        assert record["parameters"] == [x.data_ptr(), 2**40 + 1, 2**33]
    assert len(own_kernels) == 1
    results[num_launches.value % 8] = 700
    match = r"dds_a_test was not launched: the error's own words \(7 x 1 programs of 96 threads and 11 dynamic bytes\)"
    with pytest.raises(RuntimeError, match=match):
        launch_of(tokens=1, stream=STREAM, x=x)


# The short way (sparsekern.quick): the same launches as by the long way, for whole layers.


@pytest.fixture
def on_gpu(compiled, monkeypatch):
    """The chooser believes that CPU tensors are a GPU's."""
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(choose, "_device_name", lambda device: "a GPU without a file")
    monkeypatch.setattr(
        choose,
        "backend_for",
        lambda operation, x, layout, offsets=None: choose._on_gpu(operation, x, layout, offsets is not None),
    )
    monkeypatch.setattr(choose, "is_surely_for_cpu", lambda x, layout: False)
    quick.forget()
    yield compiled
    quick.forget()


def layer_and_x(tokens=(48,), dtype=torch.bfloat16, **options):
    layer = sk.SparseLinear(128, 256, density=0.5, block_size=32, dtype=dtype, **options)
    return layer, torch.randn(*tokens, 128, dtype=dtype)


def step(layer, x, dy=None):
    """Forward and backward; the gradients of x and of all parameters."""
    y = layer(x)
    dy = torch.ones_like(y) if dy is None else dy
    leaves = (x, *layer.parameters()) if x.requires_grad else tuple(layer.parameters())
    return y, torch.autograd.grad(y, leaves, dy)


def both_ways(call, compiled) -> tuple[list[dict], list[dict]]:
    """What a call launches by the long way, all of it by Triton, and by the short way, none of it by Triton."""
    call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick, "is_open", lambda: False)
        launch._prepared.clear()
        long = records(call, compiled)
        call()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_long_way", None)  # whoever calls it now fails
        short = records(call, compiled)
    assert [r.pop("triton") for r in long] == len(long) * [1]
    assert [r.pop("triton") for r in short] == len(short) * [0]
    return long, short


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_short_way_launches_what_the_long_way_does(on_gpu, groups, bias, dtype):
    layer, x = layer_and_x(groups=groups, bias=bias, dtype=dtype)
    with torch.no_grad():
        long, short = both_ways(lambda: layer(x), on_gpu)
    assert len(long) == 1 and long == short
    dy = torch.ones(48, 256, dtype=dtype)
    long, short = both_ways(lambda: step(layer, x.requires_grad_(), dy), on_gpu)
    assert len(long) == 3 and long == short


def test_the_short_way_splits_gradients_too(on_gpu, monkeypatch):
    monkeypatch.setattr(launch, "SPLITS_PER_SM", 99)
    monkeypatch.setattr(launch, "SPLIT_TOKENS", 16)
    layer, x = layer_and_x((64,))
    long, short = both_ways(lambda: step(layer, x), on_gpu)
    names = [[r["function"] for r in way] for way in (long, short)]
    assert names[0] == names[1] and len(names[0]) == 3  # forward, the gradient's parts, their sum


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_the_short_way_goes_by_descriptors(on_gpu, descriptors, monkeypatch, block_size):
    layer = sk.SparseLinear(256, 512, density=0.5, block_size=block_size, dtype=torch.bfloat16)
    x, dy = torch.randn(300, 256).bfloat16().requires_grad_(), torch.ones(300, 512).bfloat16()
    long, short = both_ways(lambda: step(layer, x, dy), on_gpu)
    assert len(long) == 3 and long == short
    by_descriptors = [on_gpu[record["function"]][0] == "map" for record in short]
    assert by_descriptors == [True, True, ("sdd", block_size, "half") in tiles.DESCRIPTORS]
    assert encodings(lambda: step(layer, x, dy)) == []
    # only a kernel with descriptors reads block rows, and it was compiled for their dtype
    layout = layer.topology.layout
    wider = layout._replace(block_rows=layout.block_rows.int())
    assert quick.learnt["sdd"](dy=dy, x=x, layout=layout) is not None
    assert (quick.learnt["sdd"](dy=dy, x=x, layout=wider) is None) == by_descriptors[2]
    step(layer, torch.zeros(300, 264).bfloat16()[:, :256], dy)
    with torch.no_grad():
        assert is_short(lambda: layer(torch.zeros(300, 264).bfloat16()[:, :256]), monkeypatch)
        odd = torch.zeros(300, 260).bfloat16()[:, :256]  # rows of 520 bytes
        assert not is_short(lambda: layer(odd), monkeypatch)
        (plain,) = records(lambda: layer(odd), on_gpu)
    assert plain["triton"] and plain["function"] != short[0]["function"]


def test_the_short_way_gives_results_their_shape_dtype_and_gradients(on_gpu):
    for tokens in ((48,), (3, 16), (2, 3, 8)):
        layer, x = layer_and_x(tokens)
        x.requires_grad_()
        for _ in range(3):
            y, gradients = step(layer, x)
            assert y.shape == (*tokens, 256) and y.dtype == torch.bfloat16 and y.requires_grad
            assert [g.shape for g in gradients] == [x.shape, *(p.shape for p in layer.parameters())]
        with torch.no_grad():
            assert not layer(x).requires_grad
        assert not layer.requires_grad_(False)(x.detach()).requires_grad


def test_a_second_derivative_goes_by_the_short_way_too(on_gpu):
    layer, x = layer_and_x()
    x.requires_grad_()
    for _ in range(3):
        (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        (dw,) = torch.autograd.grad(dx.sum(), layer.weight)
        assert dx.requires_grad and dw.shape == layer.weight.shape


def test_a_backward_of_the_short_way_refuses_a_topology_that_changed(on_gpu):
    layer, x = layer_and_x()
    step(layer, x)
    y = layer(x)
    layer.topology.block_rows.add_(0)
    with pytest.raises(RuntimeError, match="the topology was rewired, pruned or loaded after the forward"):
        y.sum().backward()
    y = layer(x)  # the index follows
    y.sum().backward()


def test_the_short_way_takes_the_weight_that_a_layer_has_now(on_gpu):
    layer, x = layer_and_x()
    step(layer, x)
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    (record,) = records(lambda: layer(x), on_gpu)
    assert not record["triton"] and layer.weight.data_ptr() in record["parameters"]


def is_short(call, monkeypatch) -> bool:
    """Whether a call needs nothing of the long way."""
    with monkeypatch.context() as patch:
        patch.setattr(products, "_check", lambda *_: (_ for _ in ()).throw(AssertionError("the long way")))
        try:
            call()
        except AssertionError as error:
            assert str(error) == "the long way"
            return False
    return True


@torch.no_grad()
def test_what_the_short_way_does_not_know_goes_the_long_way(on_gpu, monkeypatch):
    layer, x = layer_and_x()
    layer(x)
    assert is_short(lambda: layer(x), monkeypatch)
    assert is_short(lambda: layer(x[:33]), monkeypatch)  # of as many bits
    assert not is_short(lambda: layer(x[:16]), monkeypatch)
    layer(x[:16])
    assert is_short(lambda: layer(x[:17]), monkeypatch)
    assert not is_short(lambda: layer(x[:0]), monkeypatch)
    assert not is_short(lambda: layer(torch.randn(128, 48, dtype=x.dtype).t()), monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_short(lambda: layer(x), monkeypatch)
    with sk.use("reference"):
        assert not is_short(lambda: layer(x), monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not is_short(lambda: layer(x), monkeypatch)
    twin = sk.SparseLinear(128, 256, density=0.5, block_size=32, dtype=x.dtype)
    assert is_short(lambda: twin(x), monkeypatch)  # of the same geometry
    denser = sk.SparseLinear(128, 256, density=0.75, block_size=32, dtype=x.dtype)
    assert not is_short(lambda: denser(x), monkeypatch)


def test_the_short_way_leaves_sentences_to_the_long_way(on_gpu):
    layer, x = layer_and_x()
    layer(x)
    with pytest.raises(ValueError, match=r"wants 128 features in the last axis, got \(48, 64\)"):
        layer(x[:, :64])
    with pytest.raises(ValueError, match="operands must have one dtype, got torch.float32 and torch.bfloat16"):
        layer(x.float())
    with pytest.raises(ValueError, match="wants 256 biases, got"):
        sk.dds(x, layer.weight, layer.topology, layer.bias[:5], True)
    with pytest.raises(ValueError, match="bias belongs to x Wᵀ"):
        sk.dds(torch.randn(48, 256, dtype=x.dtype), layer.weight, layer.topology, layer.bias)


@torch.no_grad()
def test_a_padded_layer_never_takes_the_short_way_of_a_whole_one(on_gpu):
    whole, x = layer_and_x(bias=False)
    whole(x)
    padded = sk.SparseLinear(128, 250, density=0.5, block_size=32, dtype=x.dtype, bias=False)
    assert padded.topology.grid == whole.topology.grid
    for _ in range(3):
        assert padded(x).shape == (48, 250)


@torch.no_grad()
def test_strided_weights_are_made_contiguous(on_gpu):
    layer, x = layer_and_x()
    layer(x)
    wide = torch.randn(layer.topology.num_slots, 32, 64, dtype=x.dtype)
    (record,) = records(lambda: sk.dds(x, wide[:, :, ::2], layer.topology, None, True), on_gpu)
    assert wide.data_ptr() not in record["parameters"]


@torch.no_grad()
def test_the_short_way_follows_slots_that_change(on_gpu, monkeypatch):
    layer, x = layer_and_x()
    layer(x)
    topology, half = layer.topology, layer.topology.num_slots // 2
    topology.replace(topology.block_rows[:half].clone(), topology.block_cols[:half].clone())
    layer.weight.set_(layer.weight[:half].clone())
    assert not is_short(lambda: layer(x), monkeypatch)
    layer(x)
    assert is_short(lambda: layer(x), monkeypatch)
    (record,) = records(lambda: layer(x), on_gpu)
    assert {topology.index.data_ptr(), layer.weight.data_ptr()} <= {*record["parameters"]}


def test_another_precision_is_another_product(on_gpu, monkeypatch):
    before = torch.get_float32_matmul_precision()
    layer, x = layer_and_x(dtype=torch.float32)
    try:
        functions = set()
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            with torch.no_grad():
                layer(x)
                functions |= {r["function"] for r in records(lambda: layer(x), on_gpu)}
        assert len(functions) == 2
    finally:
        torch.set_float32_matmul_precision(before)


def test_growth_scores_watch_the_short_way(on_gpu):
    layer, x = layer_and_x()
    seen = []

    class Growth:
        def watch(self, y, x, token_offsets, layout):
            seen.append((y.shape, x.shape))
            return y

    layer.growth = Growth()
    for _ in range(2):
        layer(x)
    layer(x.view(3, 16, 128))
    assert seen == 3 * [((48, 256), (48, 128))]
