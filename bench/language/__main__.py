"""python -m bench.language: train arms, one after the other. The same command again goes on where it stopped."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from bench.language import data
from bench.language.model import Shape
from bench.language.train import Settings, parse, train


@dataclass
class Command:
    arms: tuple[str, ...] = ("dense", "set-d0.1-b16-erk")
    """dense, dense-narrow, or rule-dDENSITY-bBLOCK-DISTRIBUTION."""
    seeds: tuple[int, ...] = (0,)
    steps: int = 300
    sequences: int = 8
    learning_rate: float = 1e-3
    threads: int = 1
    device: str = "cpu"
    runs: Path = Path("runs/language")
    results: Path = Path("bench/results/language")


def main(command: Command) -> None:
    for name in command.arms:
        parse(name)
    torch.set_num_threads(command.threads)
    text, shape = data.read(), Shape()
    if command.device == "cuda":
        shape = replace(shape, layers=12, width=1024, heads=16)
    settings = Settings(command.steps, command.sequences, command.learning_rate, device=command.device)
    for seed in command.seeds:
        for name in command.arms:
            train(name, seed, text, shape, settings, command.runs, command.results)


if __name__ == "__main__":
    main(tyro.cli(Command))
