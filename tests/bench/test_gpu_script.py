"""bench/gpu.sh without a GPU: every stage runs, writes its results, and what cannot run is reported with its reason."""

import json
import os
import re
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


MODELS, RULES = "tests/gpu/test_rewire_on_device.py", "tests/gpu/test_rules_on_device.py"
STAGES = [
    "install", "environment", "warming 64", "warming 128", "warming 32", "warming 16", "tests of products",
    "tests of rewiring", "tests of CUDA products", "tune", "limits", "gradients", "products", "rivals", "training",
    "RL update", "GEMM", "memcheck", "racecheck", "report",
]  # fmt: skip
# Stands in for `timeout -k 5 LIMIT COMMAND...`: runs nothing, but fails where a test wants it to.
TIMEOUT = '#!/usr/bin/env bash\ncase "$*" in *bench_rivals*) exit 124 ;; *bench_gemm*) exit 3 ;; esac\n'


def ends(said: str) -> list[tuple[str, str, int, int]]:
    """Of each stage, as it says at its end: name, result, seconds and limit."""
    lines = re.findall(r"^== ([^:\n]+): (.+), (\d+) of (\d+) s$", said, re.MULTILINE)
    return [(name, result, int(took), int(limit)) for name, result, took, limit in lines]


def put_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def test_the_limits_of_all_stages_are_within_the_time_there_is(tmp_path):
    for name, script in {"timeout": TIMEOUT, "compute-sanitizer": SANITIZER}.items():
        put_tool(tmp_path / "tools", name, script)
    environment = {"PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "PYTHON": "python"}
    command = ["bash", SCRIPT, tmp_path / "out"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    found = ends(run.stdout)
    warming = [stage for stage in found if stage[0].startswith("warming")]  # all at once
    assert sorted(name for name, *_ in found) == sorted(STAGES)
    assert [name for name, *_ in found if "warming" not in name] == [name for name in STAGES if "warming" not in name]
    limits = {name: limit for name, _, _, limit in found}
    rest = [limit for name, limit in limits.items() if "check" not in name and "warming" not in name]
    assert len({limit for *_, limit in warming}) == 1
    total = sum(rest) + limits["warming 64"]
    assert 500 < total <= 570 - 2 * 5, "the sanitizers get what is left of 570 seconds"
    results = {name: result for name, result, *_ in found}
    assert results.pop("rivals") == "out of time" and results.pop("GEMM") == "failed with status 3"
    assert set(results.values()) == {"ok"}


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_script_for_a_gpu_rehearses_without_one(tmp_path):
    out, tools = tmp_path / "out", tmp_path / "tools"
    put_tool(tools, "compute-sanitizer", SANITIZER)
    environment = os.environ | {"SPARSEKERN_REHEARSE": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "SPARSEKERN_SECONDS": "900"}
    run = subprocess.run(
        ["bash", SCRIPT, out], env=environment, capture_output=True, text=True, timeout=900, cwd=tmp_path
    )
    assert {result for _, result, *_ in ends(run.stdout)} == {"ok"}, run.stdout
    assert not re.search("^== .*: skipped", run.stdout, re.MULTILINE), run.stdout
    for tool, last in (
        ("memcheck", "tests/gpu/test_gpu.py -k by_torch or float64 or products or norms"),
        ("racecheck", RULES),
    ):
        (said,) = [line for line in run.stdout.splitlines() if line.startswith(f"sanitized by {tool}")]
        assert f"--tool {tool} --error-exitcode 9" in said and said.endswith(last)
        assert f"{sys.executable} -m pytest -q -x -m gpu -p no:cacheprovider {MODELS}::test_random_models" in said
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
