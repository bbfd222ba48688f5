"""Hundreds of bad calls: no crash, no wrong result, every refusal a sentence."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_no_bad_call_crashes_or_passes_without_a_sentence():
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "bad_calls.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=None)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["calls"] >= 300
    assert not found["faults"], "\n".join(f"{name}: {fault}" for name, fault in found["faults"])
