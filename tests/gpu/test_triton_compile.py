"""Every launch that is shipped compiles for a GPU that is not there, and the compiler made of it what it should."""

import pytest

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
