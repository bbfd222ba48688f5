"""Compile csrc/cuda for GPUs that are not there: `python tests/helpers/nvcc.py` prints what each kernel takes."""

import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from sparsekern.table import table  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90a")
SHARED_BYTES = {"sm_80": 167_936, "sm_90a": 233_472}  # of a multiprocessor
SHARED_RESERVED = 1024  # bytes that every resident block costs on top
REGISTERS = 65_536  # of a multiprocessor


class Kernel(NamedTuple):
    """What ptxas says of a kernel, and the launch bounds it was given."""

    name: str
    architecture: str
    registers: int
    shared: int  # bytes, static
    stack: int  # bytes
    spilled: int  # bytes stored and loaded
    threads: int
    blocks: int  # that a multiprocessor is to hold

    @property
    def fits(self) -> bool:
        """Whether a multiprocessor holds as many blocks as the launch bounds say."""
        registers = -(-self.registers // 8) * 8 * self.threads * self.blocks
        shared = (self.shared + SHARED_RESERVED) * self.blocks
        return registers <= REGISTERS and shared <= SHARED_BYTES[self.architecture]


def sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compile_to(source: Path, kind: str, architecture: str) -> tuple[str, bytes]:
    """What nvcc says, and what it makes (kind: cubin or ptx)."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernel")
        arguments = ["-std=c++17", "-O3", f"-arch={architecture}", f"-{kind}", str(source), "-o", str(target)]
        done = subprocess.run(["nvcc", "-Xptxas=-v", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc for {architecture}: {done.stderr}")
        return done.stderr, target.read_bytes()


@functools.cache
def ptx(source: Path, architecture: str) -> dict[str, str]:
    """The instructions of every kernel before they become those of a machine, by name."""
    _, text = compile_to(source, "ptx", architecture.replace("sm", "compute"))
    return {re.match(r"\w+", entry)[0]: entry for entry in text.decode().split(".entry ")[1:]}


def kernels(source: Path, architecture: str) -> list[Kernel]:
    """Compile a file to PTX and to machine code, and read what comes of it."""
    bounds = {}
    for name, entry in ptx(source, architecture).items():
        head = entry.partition("{")[0]
        bounds[name] = [int(re.search(rf"\.{word} (\d+)", head)[1]) for word in ("maxntid", "minnctapersm")]
    said, _ = compile_to(source, "cubin", architecture)
    found = []
    for part in said.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack frame, (\d+) .* (\d+) bytes", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found.append(
            Kernel(name, architecture, registers, int(shared[1]) if shared else 0, stack, stores + loads, *bounds[name])
        )
    return sorted(found)


if __name__ == "__main__":
    rows = [
        (*kernel, "yes" if kernel.fits else "NO")
        for source in sources()
        for architecture in ARCHITECTURES
        for kernel in kernels(source, architecture)
    ]
    print(table((*Kernel._fields, "fits"), [tuple(map(str, row)) for row in rows]))
