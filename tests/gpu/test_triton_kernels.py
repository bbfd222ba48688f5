"""The Triton kernels without a GPU: interpreted.py in processes of its own, as an access out of bounds kills one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "helpers" / "interpreted.py"

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("group", ["b16", "b32", "b64", "b128", "not (b16 or b32 or b64 or b128)"])
def test_kernels_match_float64_in_the_interpreter(group):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", FILE, "-k", group]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    what = f"exit status {run.returncode} (negative: killed by that signal)"
    assert run.returncode == 0, f"{what}\n{run.stdout[-8000:]}\n{run.stderr[:3000]}"
