"""The CUDA kernels of csrc/cuda compiled for a CPU (tests/helpers/emulated), in place of the launches of a GPU."""

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from sparsekern.backends import cuda

ROOT = Path(__file__).parent.parent.parent
SHARED_BYTES = 232448  # that a program may have on Hopper, static ones included


@functools.cache
def library(source: str) -> ctypes.CDLL:
    """tests/helpers/emulated/<source>, compiled; the test is skipped where that cannot be."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler is here, and the emulated kernels need one")
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip(f"the emulation switches threads on Linux x86-64 only, and this is {platform.platform()}")
    target = Path(tempfile.mkdtemp()) / "emulated.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas"]
    subprocess.run([*command, str(Path(__file__).parent / "emulated" / source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def constant(source: str, expression: str) -> int:
    """What an expression is in csrc/cuda/<source>.cu, of those that tests/helpers/emulated/<source>.cpp lists."""
    ask = library(f"{source}.cpp").constant
    ask.restype = ctypes.c_int64
    found = ask(expression.encode())
    assert found >= 0, f"tests/helpers/emulated/{source}.cpp does not list {expression}"
    return found


class Launches:
    """Takes the place of `cuda.prepare`: runs the kernels of an emulation by their names, and remembers these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: bool = True):
        pytest.importorskip("sparsekern._cuda", reason="sparsekern was installed without sparsekern._cuda")
        self.names, self.run = [], run
        self.shared = {}  # dynamic bytes of the last launch of each
        monkeypatch.setattr(cuda, "prepare", self.prepare)
        monkeypatch.setattr(cuda, "current", lambda device: nullcontext(0))

    def prepare(self, file, kernel, blocks, threads, parameters, device, shared=0):
        assert blocks > 0, "an empty grid is an error on a GPU"
        assert threads % 32 == 0 and shared <= SHARED_BYTES
        assert kernel in cuda.KERNELS[file], f"{kernel} is not in the table of kernels"
        sources = [cuda.source(parameter) for parameter in parameters]

        def launch(*, tokens, stream, **tensors):
            assert list(tensors) == [value for kind, value in sources if kind == "address"], "in this order"
            self.names.append(kernel)
            self.shared[kernel] = shared
            if not self.run:
                return True
            read = {
                "number": lambda number: number,
                "tokens": lambda _: tokens,
                "stride": lambda tensor: tensors[tensor].stride(0),
                "address": lambda tensor: 0 if tensors[tensor] is None else tensors[tensor].data_ptr(),
            }
            words = (ctypes.c_uint64 * len(sources))(*(read[kind](value) for kind, value in sources))
            name = f"{file}_{kernel}".encode()
            status = library(f"{file}.cpp").launch(name, blocks, threads, shared, words, len(words))
            assert status == 0, f"{file}_{kernel} does not take {len(words)} arguments"
            return True

        return launch
