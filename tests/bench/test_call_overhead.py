"""What SparseLinear costs the host on a GPU, against nn.Linear."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BUSY = 1.6  # how much a busy machine may spoil a ratio


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(find_spec("sparsekern._cuda") is None, reason="sparsekern was installed without sparsekern._cuda")
def test_a_layer_costs_the_host_little_more_than_a_dense_one():
    root, environment = Path(__file__).parent.parent.parent, os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.call_overhead"]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name, budget in found["budget"].items():
        assert found[f"{name} / nn.Linear"] < budget * BUSY, found
    assert found["launches"] > 1000
