"""The JSON that the stages fill, one after another: the environment once, and a line per record."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch

import sparsekern
from bench.gpu.clock import REHEARSAL

PACKAGES = ("torch", "triton", "cupy-cuda13x", "torchao", "stanford-stk", "blksprs", "numpy")


def add(folder: Path, records: list[dict]) -> None:
    """Append records; a reader never sees half a file."""
    path = folder / "results.json"
    before = json.loads(path.read_text()) if path.exists() else {"environment": environment(), "records": []}
    lines = [json.dumps({k: _short(v) for k, v in r.items()}) for r in before["records"] + records]
    text = json.dumps({"environment": before["environment"]}, indent=1)[:-2] + ',\n "records": [\n'
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text + ",\n".join(lines) + "\n]}\n")
    unfinished.replace(path)


def environment() -> dict[str, str]:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    facts = {
        "device": "rehearsal on a CPU" if REHEARSAL else torch.cuda.get_device_name(),
        "sparsekern": sparsekern.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "gpu_state": _gpu_state(),
    }
    if not REHEARSAL:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"num_sms": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    return facts | {name: version for name in PACKAGES if (version := _version(name))}


def _gpu_state() -> str:
    """Driver, clocks now and at most, power limit."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value
