"""Hundreds of bad calls: no crash, no wrong result, every refusal a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import sparsekern


def test_no_bad_call_crashes_or_passes_without_a_sentence():
    # the package under test, and the table
    roots = Path(sparsekern.__file__).parents[1], Path(__file__).parents[1] / "helpers"
    run = subprocess.run(
        [sys.executable, "-m", "bad_calls"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found["calls"] >= 3000
    assert not found["faults"], "\n".join(f"{name}: {fault}" for name, fault in found["faults"].items())
