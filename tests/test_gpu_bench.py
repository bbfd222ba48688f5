"""bench/gpu.sh without a GPU: every stage runs, writes its results, and what cannot run is reported with its reason."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.sh"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_script_for_a_gpu_rehearses_without_one(tmp_path):
    environment = os.environ | {"SPARSEKERN_REHEARSE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        ["bash", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path
    )
    assert "failed with status" not in run.stdout and "skipped, no time" not in run.stdout, run.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"results.json", "results.md", "speedup.png", "rehearsal-on-a-cpu.json", "log.txt"}

    content = json.loads((tmp_path / "results.json").read_text())
    rows = content["records"]
    suites = {"limits", "gemm", "products", "rewire", "captured step", "memory", "overhead"}
    assert {row["suite"] for row in rows} == suites and "torch" in content["environment"]
    ours = [row for row in rows if row.get("contender") in ("kernels", "chosen", "densified", "dense", "masked")]
    assert ours and not [row for row in ours if "reason" in row]
    assert all(row["graph_us"] > 0 for row in ours)
    assert all(row["right"] for row in rows if row["suite"] == "captured step")
    assert any("stk" in row.get("reason", "") for row in rows if row.get("contender") == "stk")

    table = json.loads((tmp_path / "rehearsal-on-a-cpu.json").read_text())
    assert table["tiles"] and table["break_even"] and set(table) > {"device", "source", "l2_bytes_per_s"}
    page = (tmp_path / "results.md").read_text()
    assert "## What failed, and why" in page and "nothing measured" not in page
