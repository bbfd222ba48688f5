"""python -m bench.language: train arms, one after the other. The same command again goes on where it stopped."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas
import torch
import tyro

from bench.language import data
from bench.language.model import Shape
from bench.language.train import Settings, parse, train


@dataclass
class Command:
    arms: tuple[str, ...] = ("dense", "set-d0.1-b16-erk")
    """dense, dense-narrow, or rule-dDENSITY-bBLOCK-DISTRIBUTION[-balanced][-dropFRACTION][-rewiresCOUNT]."""
    seeds: tuple[int, ...] = (0,)
    steps: int = 600
    """Of the equal-steps run. The equal-time run has as many as fit into the time of so many dense steps."""
    sequences: int = 2
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Of several, an arm takes the one that is best on held-out text after a short run with its first seed."""
    trial_steps: int = 150
    """Length of that short run, a whole schedule of its own."""
    threads: int = 1
    device: str = "cpu"
    runs: Path = Path("runs/language")
    results: Path = Path("bench/results/language")
    """Curves are written to its folders equal-steps and equal-time."""


def main(command: Command) -> None:
    for name in command.arms:
        parse(name)
    torch.set_num_threads(command.threads)
    text, shape = data.read(), Shape()
    if command.device == "cuda":
        shape = replace(shape, layers=12, width=1024, heads=16)
    for name in command.arms:
        settings = Settings(command.steps, command.sequences, device=command.device)
        settings = replace(settings, learning_rate=chosen_rate(name, text, shape, settings, command))
        for seed in command.seeds:
            curve = trained("equal-steps", name, seed, text, shape, settings, command)
            if name != "dense":
                steps = round(settings.steps * settings.steps / pandas.read_csv(curve).dense_steps.iloc[-1])
                trained("equal-time", name, seed, text, shape, replace(settings, steps=steps), command)


def trained(
    kind: str, name: str, seed: int, text: data.Text, shape: Shape, settings: Settings, command: Command
) -> Path:
    return train(name, seed, text, shape, settings, command.runs / kind, command.results / kind)


def chosen_rate(name: str, text: data.Text, shape: Shape, settings: Settings, command: Command) -> float:
    if len(command.learning_rates) == 1:
        return command.learning_rates[0]
    bits = {}
    for rate in command.learning_rates:
        trial = replace(settings, steps=command.trial_steps, learning_rate=rate)
        folder = command.runs / f"rate{rate:g}"
        curve = train(name, command.seeds[0], text, shape, trial, folder, folder)
        last = float(pandas.read_csv(curve).bits_per_byte.iloc[-1])
        bits[rate] = math.inf if math.isnan(last) else last  # a run that diverged is no choice
    print(f"{name}: held-out bits per byte after {command.trial_steps} steps by learning rate: {bits}")
    return min(bits, key=bits.get)


if __name__ == "__main__":
    main(tyro.cli(Command))
