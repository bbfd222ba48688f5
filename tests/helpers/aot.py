"""Compile what the Triton launchers launch for GPUs that are not there: `python tests/helpers/aot.py` prints it.

The launchers themselves are called, on CPU tensors, with kernels that only note their arguments. Triton's wheel brings
ptxas, cuobjdump and nvdisasm, so neither a GPU nor a driver is needed.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

import sparsekern as sk
from sparsekern.backends.triton import fill, launch, tiles
from sparsekern.table import table

SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes that one program may use
SHARED_RESERVED = 1024  # bytes that every resident program costs on top
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPES |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}


class Case(NamedTuple):
    """A call of a launcher."""

    product: str  # dds (x Wᵀ), dds_back (x W), sdd, sum_splits (its second pass), norms
    block_size: int
    arithmetic: str  # half, tf32, ieee
    tile: tiles.Tile
    dtype: torch.dtype
    ragged: bool = False

    def __str__(self) -> str:
        words = (self.product, str(self.block_size), self.arithmetic, "x".join(map(str, self.tile[:2])))
        words += ("descriptors",) * self.tile.descriptors
        return "-".join(words + ("ragged",) * self.ragged + (TYPES[self.dtype],) * (self.dtype == torch.float16))


class Report(NamedTuple):
    """What the compiler made of a case for one architecture."""

    case: Case
    arch: int
    registers: int  # per thread
    spills: int  # bytes of stack per thread
    shared: int  # bytes per program
    wgmma: str  # shapes of Hopper's tensor-core instructions, such as m64n64k16
    mma: int  # older tensor-core instructions
    copies: dict[int, int]  # asynchronous copies to shared memory, by bytes
    tensor_copies: int  # of whole tiles, by tensor descriptors

    @property
    def programs_per_sm(self) -> int:
        """How many fit on a multiprocessor by registers, shared memory and threads."""
        by_registers = 65_536 // (-(-self.registers // 8) * 8 * 32 * self.case.tile.warps)
        by_shared = (SHARED_LIMIT[self.arch] + SHARED_RESERVED) // (self.shared + SHARED_RESERVED)
        return min(by_registers, by_shared, 2048 // (32 * self.case.tile.warps))


def cases(arch: int) -> Iterator[Case]:
    """Every tile of the table, dds in both orientations; ragged and float16 for one block size."""
    if arch >= 90:
        for (table_name, block_size, arithmetic), own in tiles.DESCRIPTORS.items():
            names = ("dds", "dds_back") if table_name == "dds" else (table_name,)
            for name, tile, dtype in product(names, own, (torch.bfloat16, torch.float16)):
                yield Case(name, block_size, arithmetic, tile, dtype)
    for (table_name, block_size, arithmetic), own in tiles.DEFAULT.items():
        dtype = torch.bfloat16 if arithmetic == "half" else torch.float32
        names = {"dds": ("dds", "dds_back"), "sdd": ("sdd", "sum_splits")}.get(table_name, (table_name,))
        for name, tile in product(names, own):
            if name == "sum_splits" and (block_size, arithmetic) != (16, "half"):
                continue
            yield Case(name, block_size, arithmetic, tile, dtype)
            if (block_size, arithmetic) == (64, "half"):
                yield Case(name, block_size, arithmetic, tile, dtype, ragged=True)
            if (block_size, arithmetic) == (32, "half"):
                yield Case(name, block_size, arithmetic, tile, torch.float16)


def compile_case(case: Case, arch: int) -> Report:
    """Compile the kernel that a launcher would launch."""
    return _report(case, arch, compile_launch(*_launched(case), arch))


def compile_fill(block_size: int, dtype: torch.dtype, full: bool, arch: int):
    """(Report, instructions that move data to and from device memory, as (name, count)) of the dense path's copy."""
    launches, kernel = [], fill.fill_kernel
    topology = sk.Topology.random((1024, 2048), 1.0 if full else 0.25, block_size)
    try:
        fill.fill_kernel = _Recorder(kernel, launches)
        fill.densify(torch.empty(topology.num_slots, block_size, block_size, dtype=dtype), topology.layout)
    finally:
        fill.fill_kernel = kernel
    compiled = compile_launch(*launches[-1], arch)
    case = Case("densify", block_size, "half", tiles.Tile(0, 0, warps=4, stages=3), dtype)
    return _report(case, arch, compiled), Counter(re.findall(r"(?:ld|st)\.global\S*", compiled.asm["ptx"]))


def compile_launch(kernel, args: dict, options: dict, arch: int):
    """What Triton makes of a launch with these arguments."""
    constants = {k: v for k, v in args.items() if v is None or kernel.params[kernel.arg_names.index(k)].is_constexpr}
    signature = {k: "constexpr" if k in constants else _type(v) for k, v in args.items()}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, value) in enumerate(args.items())
        if name not in constants and (isinstance(value, Tensor) or _specialised(kernel.params[i], value))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_all(arch: int, workers: int = 2) -> list[Report]:
    every = list(cases(arch))
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_case, every, len(every) * [arch]))


def print_table(reports: list[Report]) -> str:
    head = ("sm", "launch", "warps", "stages", "registers", "spills", "shared", "per SM", "wgmma", "mma.sync", "copies")
    rows = []
    for r in reports:
        copies = " ".join(f"{count}x{size}B" for size, count in sorted(r.copies.items(), reverse=True))
        copies += f"{r.tensor_copies} tiles" if r.tensor_copies else ""
        numbers = (*r.case.tile[2:4], r.registers, r.spills, r.shared, r.programs_per_sm, r.wgmma or "-", r.mma)
        rows.append(tuple(map(str, (r.arch, r.case, *numbers, copies))))
    return table(head, rows)


class _Recorder:
    """Stands in for a kernel: notes what it is launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def note(*args, **named):
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
            self.launches.append((self.kernel, {name: values[name] for name in self.kernel.arg_names}, options))

        return note


def _launched(case: Case):
    """(kernel, its arguments, options) of the launch that matters; sizes are multiples of 16 where they mostly are."""
    launches, before = [], (launch.kernels, launch.tiles, launch.SPLITS_PER_SM)
    kernels, precision = launch.kernels, torch.get_float32_matmul_precision()
    recorders = {name: _Recorder(getattr(kernels, name), launches) for name in dir(kernels) if name.endswith("_kernel")}
    name = {"dds_back": "dds", "sum_splits": "sdd"}.get(case.product, case.product)
    groups = 3 if case.ragged else 1
    features = 8 * 128
    topology = sk.Topology.random((groups * features, groups * features), 0.25, case.block_size, groups)
    x = torch.empty(4096, features, dtype=case.dtype)
    weight = torch.empty(topology.num_slots, case.block_size, case.block_size, dtype=x.dtype)
    offsets = torch.zeros(groups + 1, dtype=torch.int64) if case.ragged else None
    bias = torch.empty(groups * features, dtype=x.dtype)
    try:
        torch.set_float32_matmul_precision("highest" if case.arithmetic == "ieee" else "high")
        launch.tiles = SimpleNamespace(of=lambda device: {(name, case.block_size, case.arithmetic): (case.tile,)})
        launch.SPLITS_PER_SM = 1024 if case.product == "sum_splits" else 1
        launch.kernels = type("kernels", (), recorders)
        if case.product == "dds":
            launch.dds(x, weight, topology.layout, bias, True, offsets)
        elif case.product == "dds_back":
            launch.dds(x, weight, topology.layout, None, False, offsets)
        elif name == "sdd":
            launch.sdd(x, x, topology.layout, offsets)
        else:
            rows, cols = (n // groups for n in topology.grid)
            norms = torch.empty(groups, rows, cols)
            launch.add_block_norms(x, x, topology.layout, norms, torch.tensor(True), offsets)
    finally:
        torch.set_float32_matmul_precision(precision)
        launch.kernels, launch.tiles, launch.SPLITS_PER_SM = before
    return launches[-1]


def _type(value: Tensor | TensorDescriptor | int) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def _specialised(parameter, value: TensorDescriptor | int) -> bool:
    return isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize


def _report(case, arch, compiled) -> Report:
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shapes = sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+)", ptx)))
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^\]]*\],\s*(0x[0-9a-fA-F]+|\d+)", ptx)
    sizes = [int(size, 0) for size in sizes]
    copies = {size: sizes.count(size) for size in set(sizes)}
    mma = len(re.findall(r"(?<!w)\bmma\.sync", ptx))
    tensor_copies = len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx))
    shared = compiled.metadata.shared
    return Report(case, arch, registers, stack, shared, " ".join(shapes), mma, copies, tensor_copies)


if __name__ == "__main__":
    for arch in map(int, sys.argv[1:] or (90, 80)):
        print(print_table(compile_all(arch)))
