"""The kernels of csrc/cuda compile for every architecture we ship, and fit the processors they are meant for."""

import re
import shutil

import pytest
from nvcc import ARCHITECTURES, ROOT, kernels, sources

from sparsekern.backends import cuda

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, the CUDA compiler, is not on the PATH")


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sources(), ids=lambda path: path.stem)
def test_no_kernel_spills_and_each_fits_its_launch_bounds(source, architecture):
    found = kernels(source, architecture)
    expected = {f"{source.stem}_{kernel}" for kernel in cuda.KERNELS[source.stem]}
    assert {kernel.name for kernel in found} == expected
    for kernel in found:
        assert kernel.spilled == kernel.stack == 0 and kernel.fits, kernel


def test_every_source_is_known_to_the_backend():
    assert {source.stem for source in sources()} == set(cuda.KERNELS)


def test_the_architectures_that_a_report_names_are_those_that_are_compiled():
    flags = re.findall(r",code=\[?([\w,]+)", (ROOT / "setup.py").read_text())
    assert sorted(",".join(flags).split(",")) == sorted(cuda.ARCHITECTURES)
