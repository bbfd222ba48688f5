"""Topologies that SET left in a real run: `python -m bench.trained RUN...` takes them from run folders of rl/run.py.

bench/trained.npz holds the hidden layer of the actor's heads, a matrix for each of the five tasks of MT5, as it was
after `python rl/run.py --suite mt5 --timesteps 400000 --block-size 1` (and 16) on one machine; `origin` names the runs.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from rl import checkpoint
from rl.config import ENVIRONMENT, Config
from sparsekern import Topology

FILE = Path(__file__).with_suffix(".npz")
BLOCK_SIZES = (1, 16)  # of the saved runs
LAYER = "heads.hidden.topology"


def load(block_size: int) -> Topology:
    with np.load(FILE) as saved:
        rows, cols, geometry = (saved[f"{name}{block_size}"] for name in ("block_rows", "block_cols", "geometry"))
    out_features, in_features, _, groups, _ = geometry.tolist()
    shape = out_features, in_features
    return Topology(torch.from_numpy(rows), torch.from_numpy(cols), shape, block_size, groups)


def save(runs: list[Path]) -> None:
    arrays, origin = {}, []
    for folder in runs:
        config, state = Config.load(folder), checkpoint.load(folder)
        names = {"block_rows": "block_rows", "block_cols": "block_cols", "_extra_state": "geometry"}
        for name, saved in names.items():
            arrays[f"{saved}{config.block_size}"] = state["actor"]["network"][f"{LAYER}.{name}"].numpy()
        commit = (folder / ENVIRONMENT).read_text().partition("commit: ")[2].split()[0]
        origin.append(f"{config.experiment}, seed {config.seed}, {state['clock']} timesteps, at {commit}")
    unfinished = FILE.with_suffix(".unfinished.npz")
    np.savez_compressed(unfinished, origin=origin, **arrays)
    unfinished.replace(FILE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    save(parser.parse_args().runs)
