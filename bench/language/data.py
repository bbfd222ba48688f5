"""The text: the Python standard library's own source, as bytes, split into training and held-out files by hash."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT_OF = 20  # one file in so many is held out


@dataclass(frozen=True)
class Text:
    train: Tensor
    held_out: Tensor
    digest: str
    """Of all bytes in order: the text depends on the version of Python."""


def is_held_out(content: bytes) -> bool:
    """By the hash of the content, so that a copy of a file is never on the other side."""
    return hashlib.sha256(content).digest()[0] % HELD_OUT_OF == 0


def read(folder: Path | None = None) -> Text:
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    sides, digest = {False: [], True: []}, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.relative_to(folder).parts):
            continue
        content = path.read_bytes()
        digest.update(content)
        sides[is_held_out(content)].append(content)
    train, held_out = (
        torch.from_numpy(np.frombuffer(b"".join(sides[side]), np.uint8).copy()) for side in (False, True)
    )
    return Text(train, held_out, digest.hexdigest())


def batch(text: Tensor, sequences: int, context: int, seed: int) -> Tensor:
    """[sequences, context + 1] bytes from random places; the same seed gives the same places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (sequences, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()
