"""Every launch that is shipped compiles for a GPU that is not there, and the compiler made of it what it should."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
import aot  # noqa: E402


@pytest.mark.parametrize("arch", [90, 80])
def test_every_launch_compiles_without_spills_and_with_wide_copies(arch):
    """`python tests/helpers/aot.py` prints the table; a failure prints it here."""
    reports = aot.compile_all(arch)
    print(aot.print_table(reports))
    wrong = []
    for r in reports:
        name = f"{r.case} on sm_{arch}"
        tensor_cores = r.case.arithmetic != "ieee"
        if r.spills:
            wrong.append(f"{name} spills {r.spills} bytes")
        if r.shared > aot.SHARED_LIMIT[arch]:
            wrong.append(f"{name} needs {r.shared} bytes of shared memory")
        if r.case.product == "sum_splits":
            continue
        if r.case.tile.descriptors:
            if r.copies or r.tensor_copies < 2:
                wrong.append(f"{name} has {r.tensor_copies} copies by descriptors, and others {r.copies}")
        elif set(r.copies) != {16}:
            wrong.append(f"{name} copies {r.copies}, not 16 bytes at a time")
        if tensor_cores and (bool(r.wgmma), bool(r.mma)) != (arch == 90, arch == 80):
            wrong.append(f"{name} has wgmma {r.wgmma or 'nowhere'} and {r.mma} mma.sync")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize("full", [False, True], ids=["indexed", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [2, 8, 16, 128])
def test_a_dense_matrix_is_written_without_spills_in_accesses_as_wide_as_a_blocks_row(block_size, dtype, full, arch):
    report, accesses = aot.compile_fill(block_size, dtype, full, arch)
    assert not report.spills and report.registers <= 64 and report.programs_per_sm >= 8, report
    width = min(16, block_size * dtype.itemsize)
    name = {16: "v4.b32", 8: "v2.b32", 4: "b32"}[width]
    per_thread = 4096 * dtype.itemsize // 128 // width
    assert {n: c for n, c in accesses.items() if n.startswith("st")} == {f"st.global.{name}": per_thread}
    assert accesses[f"ld.global.{name}"] >= per_thread
