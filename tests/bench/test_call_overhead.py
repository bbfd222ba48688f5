"""What SparseLinear adds to the bare launch of a kernel, on the host."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BUSY = 4  # times as slow as the machine where the budget was set, or as busy as CI


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_forward_costs_little_more_than_its_launch():
    root, environment = Path(__file__).parent.parent.parent, os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.call_overhead"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["no gradient above the launch"] < 10 * BUSY, found
    assert found["gradient above the launch"] < 15 * BUSY, found
    assert found["dds"] < 10 * BUSY, found
