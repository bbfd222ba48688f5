"""python -m sparsekern: the environment, for "does it work here?" and for bug reports."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import sparsekern
from sparsekern.backends import cpu, cuda
from sparsekern.choose import BACKENDS
from sparsekern.table import table


def report() -> str:
    """Versions, devices, threads and instruction set; per backend "ready" or why not; warnings."""
    here = Path(sparsekern.__file__).resolve().parent
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    kernels = "none" if cpu.unavailable() else cpu.instruction_set()
    # only for a device the driver is asked whether it loads the kernels
    on = {"cuda": [torch.device("cuda", torch.cuda.current_device())]} if torch.cuda.is_available() else {}
    facts = [
        ("sparsekern", f"{sparsekern.__version__} at {here}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        ("triton", _version("triton")),
        ("cupy", _version("cupy", "cupy-cuda13x", "cupy-cuda12x")),
        ("devices", ", ".join(["cpu", *devices])),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical cores"),
        ("instructions", f"{kernels} in sparsekern, {torch.backends.cpu.get_cpu_capability()} in torch"),
        ("cuda kernels", cuda.built() or "none were built"),
        *((f"backend {name}", module.unavailable(*on.get(name, ())) or "ready") for name, module in BACKENDS.items()),
    ]
    if "SPARSEKERN_BACKEND" in os.environ:
        facts.append(("forced backend", f"{os.environ['SPARSEKERN_BACKEND']} (SPARSEKERN_BACKEND)"))
    return "\n".join((table(("what", "here"), facts), *_shadowed(here)))


def _version(*distributions: str) -> str:
    """Version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _shadowed(here: Path) -> list[str]:
    """A warning for every installed sparsekern that is not the one imported, as in a checkout's folder."""
    installed = {
        Path(distribution.locate_file("sparsekern")).resolve()
        for distribution in importlib.metadata.distributions(name="sparsekern")
    }
    return [
        f"warning: {here} shadows the package installed at {other}, whose native modules are not used; "
        "run from another folder, or install the checkout with pip install -e ."
        for other in sorted(installed - {here})
        if other.is_dir()
    ]


if __name__ == "__main__":
    print(report())
