"""Measure this GPU for the launch table and the chooser: `python -m bench.tune`.

It writes sparsekern/devices/<device>.json, anew after every entry, and never half of it: the constants of the model;
then, bfloat16 before float32, the densities where dense becomes faster, the fastest tiles, and these densities again
with such tiles. The fields are explained in sparsekern/devices/README.md.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch

from bench.gpu import clock, contenders, limits
from bench.gpu.clock import REHEARSAL
from bench.gpu.problem import BOUND, DTYPE, Case, Problem
from sparsekern import cost, devices
from sparsekern.backends.triton import launch
from sparsekern.backends.triton.launch import Tile

NAME = "rehearsal on a CPU" if REHEARSAL else torch.cuda.get_device_name()
CASE = Case(64, 64, 32, 0.5, 16, "half") if REHEARSAL else Case(4096, 4096, 16384, 0.1, 64, "half")
FEW_TOKENS = 16 if REHEARSAL else 256
BREAK_EVEN_TOKENS = (32,) if REHEARSAL else (16384, 4096, 1024)
DENSITIES = (0.25, 0.75) if REHEARSAL else (0.1, 0.5)
PROCESSES = 8  # that compile at once
MOST_SHARED = 220_000  # bytes of a program's buffers, of the 232 448 that there are on Hopper
MOST_SUMS = 128  # float32 sums that a thread keeps in registers

SHAPES = [(4, 3), (4, 4), (8, 3)]  # warps, stages


problem_of = lru_cache(maxsize=2)(Problem)  # the same for both products and both paths


def candidates(product: str, block_size: int, arithmetic: str) -> list[Tile]:
    """The table's tiles first, then whatever fits a multiprocessor."""
    table = list(launch.TILES[product, block_size, arithmetic])
    if REHEARSAL:
        return table[:1]
    element = DTYPE[arithmetic].itemsize
    tiles = [Tile(m, k, *shape) for m in (64, 128, 256) for k in (32, 64) for shape in SHAPES]
    tiles = [
        tile
        for tile in tiles
        if element * tile.stages * tile.k * (tile.m + block_size) <= MOST_SHARED
        and 16 <= tile.m * block_size / (32 * tile.warps) <= MOST_SUMS
        and tile.m >= block_size
    ]
    return table + [tile for tile in tiles if tile not in table]


def compile_tile(case: Case, product: str, tile: Tile) -> None:
    """In a process of its own, to fill Triton's cache; a tile that does not compile shows again where it is timed."""
    try:
        launched(Problem(case), product, tile)
    except Exception:  # noqa: BLE001
        pass


def launched(problem: Problem, product: str, tile: Tile):
    """The results of a product with this tile."""
    case = problem.case
    launch.TILES[product, case.block_size, case.arithmetic] = (tile,)
    calls = contenders.kernels(problem)
    names = ("dds", "dds_back") if product == "dds" else ("sdd",)
    return {name: calls[name](*problem.sets[0]) for name in names}


def microseconds(problem: Problem, product: str, build=contenders.kernels) -> float:
    """Of a product; of dds in both orientations together."""
    calls = build(problem)
    names = ("dds", "dds_back") if product == "dds" else ("sdd",)
    every = [
        clock.replayed(lambda call=calls[name]: call(*problem.next_set()), len(problem.sets)).median for name in names
    ]
    return sum(every)


def fastest(case: Case, product: str) -> Tile | None:
    """The tile that takes the least time and is right."""
    problem, times = Problem(case), {}
    for tile in candidates(product, case.block_size, case.arithmetic):
        try:
            errors = [problem.error(name, result) for name, result in launched(problem, product, tile).items()]
            if all(error < BOUND[case.arithmetic] for error in errors):
                times[tile] = microseconds(problem, product)
        except Exception as error:
            print(f"  {product} {case.block_size} {case.arithmetic} {tuple(tile)}: {contenders.reason(error)}")
    return min(times, key=times.get, default=None)


def tuned_tiles(product: str, block_size: int, arithmetic: str, pool) -> tuple[Tile, ...]:
    """The fastest tile for many tokens and, for dds, a smaller one for few; they stay in force in this process."""
    key = product, block_size, arithmetic
    before = launch.TILES[key]
    case = replace(CASE, block_size=block_size, arithmetic=arithmetic)
    if pool is not None:
        list(pool.map(compile_tile, *zip(*((case, product, t) for t in candidates(*key)), strict=True)))
    many = fastest(case, product)
    launch.TILES[key] = before
    few = fastest(replace(case, tokens=FEW_TOKENS), product) if product == "dds" else None
    launch.TILES[key] = before if many is None else (many, few) if few and few.m < many.m else (many,)
    return launch.TILES[key]


def break_even(product: str, block_size: int, arithmetic: str, tokens: int) -> dict:
    """Where the two paths cross, as both take time linear in the density."""
    case = replace(CASE, block_size=block_size, arithmetic=arithmetic, tokens=tokens)
    problems = [problem_of(replace(case, density=density)) for density in DENSITIES]
    gaps = [
        microseconds(problem, product, contenders.densified) - microseconds(problem, product) for problem in problems
    ]
    slope = (gaps[0] - gaps[1]) / (DENSITIES[1] - DENSITIES[0])
    density = min(1.0, max(0.0, DENSITIES[0] + gaps[0] / slope)) if slope > 0 else float(gaps[0] > 0)
    row = {"product": product, "block_size": block_size, "arithmetic": arithmetic}
    row |= {"out_features": case.out_features, "in_features": case.in_features, "tokens": tokens}
    return row | {"density": round(density, 3)}


def write(folder: Path, facts: dict) -> None:
    """A line for every tile list and break-even; a reader never sees half a file."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items() if name != "break_even"]
    rows = ",\n  ".join(json.dumps(row) for row in facts["break_even"])
    path = folder / devices.path_for(NAME).name
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("{\n" + ",\n".join(lines) + f',\n "break_even": [\n  {rows}\n ]\n}}\n')
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="no new entry is begun after these")
    parser.add_argument("--folder", type=Path, default=devices.FOLDER, help="where the device's file is written")
    arguments = parser.parse_args()
    stop = time.monotonic() + arguments.seconds
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    facts = {"device": NAME, "source": f"measured {date.today().isoformat()}, {versions}"} | limits.constants()
    if not REHEARSAL:
        facts["num_sms"] = torch.cuda.get_device_properties(0).multi_processor_count
    facts |= {"tiles": {}, "break_even": []}
    write(arguments.folder, facts)

    block_sizes = (16,) if REHEARSAL else (64, 128, 32, 16)
    keys = [(p, b, a) for a in limits.ARITHMETICS for b in block_sizes for p in cost.PRODUCTS]
    context = multiprocessing.get_context("spawn")
    pool = None if REHEARSAL else ProcessPoolExecutor(PROCESSES, mp_context=context)
    for arithmetic in limits.ARITHMETICS:
        own = [key for key in keys if key[2] == arithmetic]
        plan = [(key, tokens) for tokens in BREAK_EVEN_TOKENS for key in own]
        for key, tokens in [*plan, *((key, None) for key in own), *plan]:
            if time.monotonic() > stop:
                break
            if tokens is None:
                facts["tiles"][" ".join(map(str, key))] = [list(tile) for tile in tuned_tiles(*key, pool)]
            else:
                row = break_even(*key, tokens)
                older = [r for r in facts["break_even"] if r | {"density": row["density"]} != row]
                facts["break_even"] = [*older, row]
            write(arguments.folder, facts)
    if pool is not None:
        pool.shutdown(cancel_futures=True)
    print(
        f"{len(facts['tiles'])} tile lists and {len(facts['break_even'])} break-evens of {len(keys)} kinds of product"
    )


if __name__ == "__main__":
    main()
