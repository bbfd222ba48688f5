"""The kernels of csrc/cuda compile for every architecture we ship, and fit the processors they are meant for."""

import re
import shutil

import pytest
import torch
from nvcc import ARCHITECTURES, ROOT, SHARED_BYTES, SHARED_RESERVED, kernels, ptx, sources

from sparsekern.backends import cuda
from sparsekern.backends.cuda import products

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


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "source", [ROOT / "csrc" / "cuda" / f"{name}.cu" for name in cuda.OPERATIONS], ids=lambda path: path.stem
)
def test_every_product_multiplies_by_tensor_cores_and_copies_while_it_does(source, architecture):
    copies = {"sm_80": "cp.async.cg.shared.global", "sm_90a": "cp.async.bulk.shared"}[architecture]
    for name, instructions in ptx(source, architecture).items():
        if "_sum_" in name or "_pack_" in name:
            continue
        type_of_elements = "bf16" if "_bf16" in name else "f16"
        wanted = f"mma.sync.aligned.m16n8k16.row.col.f32.{type_of_elements}.{type_of_elements}.f32"
        assert wanted in instructions and "ldmatrix.sync" in instructions and copies in instructions, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_stages_or_more_of_a_product_fit_in_shared_memory(monkeypatch, architecture):
    most = SHARED_BYTES[architecture] - SHARED_RESERVED
    monkeypatch.setattr(cuda, "shared_bytes", lambda device: most)
    shapes = [(shape.stage_bytes, products.SDD_BARRIER_BYTES) for shape in products.SDD_SHAPES]
    for b in cuda.BLOCK_SIZES:
        shapes += [
            (shape.stage_bytes, products.DDS_BARRIER_BYTES + shape.ring_bytes) for shape in products.DDS_SHAPES[b]
        ]
    for stage_bytes, beside in shapes:
        stages = products._stages(stage_bytes, torch.device("cuda"), beside)
        assert stages >= 2 and stages * stage_bytes + beside <= most


def test_every_source_is_known_to_the_backend():
    assert {source.stem for source in sources()} == set(cuda.KERNELS)


def test_the_architectures_that_a_report_names_are_those_that_are_compiled():
    flags = re.findall(r",code=\[?([\w,]+)", (ROOT / "setup.py").read_text())
    assert sorted(",".join(flags).split(",")) == sorted(cuda.ARCHITECTURES)
