"""What is known of a GPU: one readable JSON per device, written by `python -m bench.tune`. README.md has the fields."""

import functools
import json
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def path_for(name: str) -> Path:
    """File of the device that torch calls by this name, such as "NVIDIA H100 80GB HBM3"."""
    return FOLDER / f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in name.lower()).split())}.json"


@functools.cache
def nearest(name: str, compute_capability: tuple[int, int]) -> str:
    """The device whose file stands for this one: itself, else a measured one of the same compute capability, if any.

    Break-evens are ratios and tiles fit a multiprocessor, so they carry over to a card that differs in its memory or in
    its number of multiprocessors, better than the model of default.json does.
    """
    if path_for(name).exists():
        return name
    measured = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    same = (facts["device"] for facts in measured if facts.get("compute_capability") == list(compute_capability))
    return next(same, name)


def name_of(device: torch.device | None = None) -> str:
    """The name, for `known`, of a GPU of this machine; that of another where it was not measured itself."""
    return nearest(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


@functools.cache
def known(name: str) -> dict:
    """The model of default.json, with whatever was measured on this device in its place."""
    own = path_for(name)
    return json.loads((FOLDER / "default.json").read_text()) | (json.loads(own.read_text()) if own.exists() else {})
