"""bench/gpu.sh without a GPU: every stage runs, writes its results, and what cannot run is reported with its reason."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import results
from bench.contenders import OURS, RIVALS
from bench.problem import PRODUCTS

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "gpu.sh"
# Tells what it would watch.
SANITIZER = '#!/usr/bin/env bash\necho "sanitized by $2: $*"\n'


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_script_for_a_gpu_rehearses_without_one(tmp_path):
    out, tools = tmp_path / "out", tmp_path / "tools"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    environment = os.environ | {"SPARSEKERN_REHEARSE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "SPARSEKERN_SECONDS": "900"}
    run = subprocess.run(
        ["bash", SCRIPT, out], env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert "failed with status" not in run.stdout and "skipped, no time" not in run.stdout, run.stdout
    for tool in ("memcheck", "racecheck"):
        assert f"sanitized by {tool}: --tool {tool} --error-exitcode 9" in run.stdout
        for tests in (
            "tests/gpu/test_gpu.py -k products or norms",
            "tests/gpu/test_rewire_on_device.py::test_random",
            "tests/gpu/test_cuda_products.py::test_random",
        ):
            command = f"{sys.executable} -m pytest -q -x -m gpu -p no:cacheprovider {tests}"
            assert any(line.startswith(f"sanitized by {tool}") and command in line for line in run.stdout.splitlines())
    names = {path.name for path in out.iterdir()}
    assert names == {
        "results.json",
        "results.md",
        "results.png",
        "results-model.png",
        "rehearsal-on-a-cpu.json",
        "log.txt",
    }

    rows = results.load(out / "results.json")
    suites = "limits gemm products gradients layer rivals rewire captured memory overhead"
    assert set(rows.suite) == set(suites.split()) and {"torch", "commit", "device_name"} <= set(rows.columns)
    assert not rows.duplicated(list(results.KEY)).any()
    ours = rows[rows.suite.isin(["products", "gradients", "layer", "overhead"])]
    assert ours.reason.isna().all() and (ours.time_us > 0).all() and (ours.partner_us > 0).all()
    measured = rows[rows.suite == "products"]
    assert set(measured.backend) == set(OURS) and set(measured["name"]) == {*PRODUCTS, "three products"}
    assert set(rows[rows.suite == "rivals"].partner) == set(RIVALS)
    assert (rows[rows.suite == "captured"].error < 1e-2).all()
    assert set(rows[rows.suite == "rewire"].clock) == {"graph", "host", "launch"}
    if find_spec("stk") is None:
        assert "No module named 'stk'" in rows[rows.partner == "STK"].reason.iloc[0]

    table = json.loads((out / "rehearsal-on-a-cpu.json").read_text())
    assert table["tiles"] and table["break_even"] and set(table) > {"device", "source", "l2_bytes_per_s"}
    page = (out / "results.md").read_text()
    assert all(f"\n## {title}\n" in page for title in ("Products by path", "Other libraries", "Rewiring", "Memory"))
    assert "torchao was not measured" in page or find_spec("torchao")
