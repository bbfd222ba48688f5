"""What is known of a GPU: one readable JSON per device, written by `python -m bench.tune`. README.md has the fields."""

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent


def path_for(name: str) -> Path:
    """File of the device that torch calls by this name, such as "NVIDIA H100 80GB HBM3"."""
    return FOLDER / f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in name.lower()).split())}.json"


@functools.cache
def known(name: str) -> dict:
    """The model of default.json, with whatever was measured on this device in its place."""
    own = path_for(name)
    return json.loads((FOLDER / "default.json").read_text()) | (json.loads(own.read_text()) if own.exists() else {})
