"""Checkpoints: one file, always whole, readable with weights_only=True."""

from pathlib import Path

import torch


def path(folder: Path) -> Path:
    return folder / "checkpoints" / "last.pt"


def save(folder: Path, state: dict) -> None:
    """Replace the run's checkpoint; an interrupted write leaves the previous one as it was."""
    last = path(folder)
    last.parent.mkdir(exist_ok=True)
    writing = last.with_suffix(".writing")
    torch.save(state, writing)
    writing.replace(last)  # atomic: the name means the old file or the new one, never a part


def load(folder: Path) -> dict | None:
    """The run's last checkpoint, or None where it has none yet; tensors are read from the file when they are used."""
    if not path(folder).exists():
        return None
    return torch.load(path(folder), weights_only=True, map_location="cpu", mmap=True)
