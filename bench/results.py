"""The committed results: one readable JSON per device, a line per record, each with its environment.

A record says what was measured (`suite`, `name`), of which of our paths (`backend`: "chosen" is what a user gets), by
which `clock`, on which case, against which `partner`; README.md lists the fields.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import cpuinfo
import pandas
import torch

import sparsekern
from bench.case import KEYS
from bench.clock import ON_GPU
from sparsekern import devices
from sparsekern.backends import cpu

FOLDER = Path(__file__).parent / "results"
# What makes two records the same measurement, so that the newer one replaces the older.
KEY = ("suite", "name", "backend", "clock", *KEYS)
PACKAGES = ("triton", "cupy-cuda13x", "torchao", "stanford-stk", "blksprs")


def environment(device: str) -> dict:
    """All that a figure depends on, of the CPU or the GPU of this machine."""
    own = _cpu() if device == "cpu" else _gpu()
    return own | {
        "torch": torch.__version__,
        "sparsekern": sparsekern.__version__,
        "python": platform.python_version(),
        "commit": commit() + ("+" if _git("status", "--porcelain", ":!bench/results", ":!sparsekern/devices") else ""),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    return _git("rev-parse", "--short", "HEAD") or "unknown"


def _cpu() -> dict:
    mkl = re.search(r"Math Kernel Library Version (\S+?)-", torch.__config__.show())
    info = cpuinfo.get_cpu_info()
    return {
        "device_name": f"{info['brand_raw']} family {info.get('family')} model {info.get('model')}, "
        f"{os.cpu_count()} cores",
        "instruction_set": "none" if cpu.unavailable() else cpu.instruction_set(),
        "vendor": f"MKL {mkl[1]}" if mkl else "no MKL",
    }


def _gpu() -> dict:
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    if not ON_GPU:
        return {"device_name": "rehearsal on a CPU", "vendor": "no cuBLAS", "tiles": "untuned"} | packages
    name, properties = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0)
    tiles = "tuned" if devices.path_for(name).exists() else "untuned"
    return {
        "device_name": name,
        "vendor": f"cuBLAS of CUDA {torch.version.cuda}",
        "num_sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "gpu_state": _gpu_state(),
        "tiles": tiles,
    } | packages


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


def path_for(environment: dict) -> Path:
    words = "".join(c if c.isalnum() else " " for c in environment["device_name"].lower()).split()
    return FOLDER / f"{'-'.join(words)}.json"


def load(path: Path) -> pandas.DataFrame:
    """One row per record, the columns of its environment included."""
    content = json.loads(path.read_text())
    return pandas.DataFrame([content["environments"][r["environment"]] | r for r in content["records"]])


def save(path: Path, records: list[dict], environment: dict) -> None:
    """Add records to a file, in place of older ones of the same measurement; a reader never sees half a file."""
    rows = []
    if path.exists():
        content = json.loads(path.read_text())
        new = {_key(r) for r in records}
        rows = [(content["environments"][r.pop("environment")], r) for r in content["records"] if _key(r) not in new]
    rows += [(environment, {name: _short(value) for name, value in r.items()}) for r in records]
    rows.sort(key=lambda row: [str(v).rjust(20) for v in _key(row[1])])
    environments = [e for i, (e, _) in enumerate(rows) if e not in [f for f, _ in rows[:i]]]
    lines = [json.dumps(r | {"environment": environments.index(e)}) for e, r in rows]
    text = f'{{"environments": {json.dumps(environments, indent=1)},\n"records": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, cwd=FOLDER.parent.parent).stdout.strip()


def _key(record: dict) -> tuple:
    return tuple(record.get(name) for name in KEY)


def _short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value
