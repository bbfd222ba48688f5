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


class NamedLaunches:
    """Takes the place of `cuda.launch`: runs kernels of an emulation by their names, and remembers these."""

    def __init__(self):
        self.names = []
        self.shared = {}  # dynamic bytes of the last launch of each

    def __call__(self, file, kernel, blocks, threads, addresses, device, shared=0):
        assert blocks > 0 and threads % 32 == 0 and shared <= SHARED_BYTES
        assert kernel in cuda.KERNELS[file], f"{kernel} is not in the table of kernels"
        self.names.append(kernel)
        self.shared[kernel] = shared
        words = (ctypes.c_uint64 * len(addresses))(*addresses)
        name = f"{file}_{kernel}".encode()
        status = library(f"{file}.cpp").launch(name, blocks, threads, shared, words, len(words))
        assert status == 0, f"{file}_{kernel} does not take {len(words)} arguments"


class Launches:
    """Takes the place of `cuda.prepare`: runs the kernels of the emulation, and remembers their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: bool = True):
        pytest.importorskip("sparsekern._cuda", reason="sparsekern was installed without sparsekern._cuda")
        self.names = []
        self.library = library("rewire.cpp") if run else None
        monkeypatch.setattr(cuda, "prepare", self.prepare)
        monkeypatch.setattr(cuda, "current", lambda device: nullcontext(0))

    def prepare(self, file, kernel, blocks, threads, tensors, device):
        assert blocks > 0 and threads == 512, "an empty grid is an error on a GPU"
        number = cuda.KERNELS[file].index(kernel)

        def launch(*, tokens, stream, **arguments):
            assert list(arguments) == list(tensors), "a prepared launch takes them in this order"
            self.names.append(kernel)
            if self.library is not None:
                addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments.values())
                self.library.launch(number, blocks, *addresses)
            return True

        return launch
