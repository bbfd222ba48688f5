"""Weights & Biases as a second home of what a run writes to TensorBoard (the extra `wandb`)."""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl.config import Config


@contextmanager
def mirrored(config: Config, folder: Path) -> Iterator[None]:
    """Inside, TensorBoard's scalars go to Weights & Biases too, if the settings say so; a resumed run goes on there."""
    if not config.wandb:
        yield
        return
    import wandb

    name = f"{config.experiment}/{folder.name}"
    with wandb.init(
        project="sparsekern",
        name=name,
        id=hashlib.sha256(name.encode()).hexdigest()[:16],
        resume="allow",
        group=config.experiment,
        dir=folder,
        config=dataclasses.asdict(config),
        sync_tensorboard=True,
    ):
        yield
