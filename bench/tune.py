"""Measure this GPU for the launch table and the chooser: `python -m bench.tune`.

It writes sparsekern/devices/<device>.json, anew after every entry, and never half of it: the constants of the model;
then, bfloat16 before float32, the densities where dense becomes faster, the fastest tiles, and these densities again
with such tiles; and after bfloat16 the densities between which the kernels of csrc/cuda are the fastest. It goes on
where a run of the same commit and versions stopped. The fields are explained in sparsekern/devices/README.md.
"""

import argparse
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import lru_cache, partial
from pathlib import Path

import torch

from bench import case as cases
from bench import contenders, limits, results
from bench.case import Case, on_gpu
from bench.clock import ON_GPU
from bench.contenders import reason
from bench.measure import microseconds
from bench.problem import Problem
from sparsekern import devices
from sparsekern.backends import cuda, triton
from sparsekern.backends.triton import tiles
from sparsekern.backends.triton.tiles import Tile
from sparsekern.choose import cost

SIZES = cases.SIZES["full" if ON_GPU else "smoke"]
NAME = torch.cuda.get_device_name() if ON_GPU else "rehearsal on a CPU"
TABLE = tiles.of(torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu"))
CAPABILITY = torch.cuda.get_device_capability() if ON_GPU else (0, 0)
ARITHMETICS = limits.arithmetics(SIZES)
DENSITIES = (0.1, 0.5) if ON_GPU else (0.25, 0.75)  # between which both paths take time linear in the density
FEW_TOKENS = SIZES.tokens[-1]
BREAK_EVEN_TOKENS = (*SIZES.tokens[:2], 1024) if ON_GPU else SIZES.tokens
# Of layers that the kernels of csrc/cuda multiply, and how dense they are.
CUDA_WIDTHS, CUDA_TOKENS, CUDA_DENSITIES = (4096, 2048, 1024), (16384, 4096, 1024, 256), (0.02, 0.05, 0.1, 0.2)
PROCESSES = 8  # that compile at once
MOST_SHARED = 220_000  # bytes of a program's buffers, of the 232 448 that there are on Hopper
MOST_SUMS = 128  # float32 sums that a thread keeps in registers

SHAPES = [(4, 3), (4, 4), (8, 3)]  # warps, stages
NAMES = {"dds": ("dds transposed", "dds"), "sdd": ("sdd",)}  # dds in both orientations together

ROWS = ("cuda", "break_even")  # fields of a table that are lists of rows

Key = tuple[str, int, str]


def case_of(block_size: int, kind: str, tokens: int = SIZES.tokens[0], density: float = SIZES.densities[0]) -> Case:
    return on_gpu(SIZES.width, tokens, density, block_size, ARITHMETICS[kind])


@lru_cache(maxsize=2)
def problem_of(case: Case) -> Problem:
    """The same for both products and both paths."""
    return Problem(case, SIZES.rotated_bytes)


def candidates(product: str, block_size: int, arithmetic: str) -> list[Tile]:
    """The table's tiles first, those with tensor descriptors from Hopper on, then whatever fits a multiprocessor."""
    table = list(TABLE[product, block_size, arithmetic])
    if not ON_GPU:
        return table[:1]
    if CAPABILITY >= (9, 0):
        described = tiles.DESCRIPTORS.get((product, block_size, arithmetic), ())
        table += [tile for tile in described if tile not in table]
    element = cost.ELEMENT[arithmetic]
    shapes = (Tile(m, k, *shape) for m in (64, 128, 256) for k in (32, 64) for shape in SHAPES)
    return table + [
        tile
        for tile in shapes
        if tile not in table
        and element * tile.stages * tile.k * (tile.m + block_size) <= MOST_SHARED
        and 16 <= tile.m * block_size / (32 * tile.warps) <= MOST_SUMS
        and (product == "dds" or tile.m >= block_size)
    ]


def compile_tile(case: Case, product: str, tile: Tile) -> None:
    """In a process of its own, to fill Triton's cache; a tile that does not compile shows again where it is timed."""
    try:
        launched(problem_of(case), product, tile)
    except Exception:  # noqa: BLE001
        pass


def launched(problem: Problem, product: str, tile: Tile):
    """The results of a product with this tile."""
    case = problem.case
    TABLE[product, case.block_size, case.kind] = (tile,)
    calls = contenders.kernels(problem)
    return {name: calls[name](*problem.first) for name in NAMES[product]}


def times(problem: Problem, product: str, build=contenders.kernels) -> float:
    """Of a product; of dds in both orientations together."""
    calls = build(problem)
    return sum(
        microseconds(lambda call=calls[name]: call(*problem.next_set()), problem.calls) for name in NAMES[product]
    )


def fastest(case: Case, product: str) -> Tile | None:
    """The tile that takes the least time and is right."""
    problem, found = problem_of(case), {}
    for tile in candidates(product, case.block_size, case.kind):
        try:
            for name, result in launched(problem, product, tile).items():
                problem.check(name, result)
            found[tile] = times(problem, product)
        except Exception as error:
            print(f"  {product} {case.block_size} {case.arithmetic} {tuple(tile)}: {reason(error)}")
    return min(found, key=found.get, default=None)


def tuned_tiles(product: str, block_size: int, arithmetic: str, pool) -> tuple[Tile, ...]:
    """The fastest tile for many tokens and, for dds, a smaller one for few; they stay in force in this process."""
    key = product, block_size, arithmetic
    before = TABLE[key]
    case = case_of(block_size, arithmetic)
    if pool is not None:
        list(pool.map(compile_tile, *zip(*((case, product, t) for t in candidates(*key)), strict=True)))
    many = fastest(case, product)
    TABLE[key] = before
    few = fastest(replace(case, tokens=FEW_TOKENS), product) if product == "dds" else None
    TABLE[key] = before if many is None else (many, few) if few and few.m < many.m else (many,)
    return TABLE[key]


def break_even(product: str, block_size: int, arithmetic: str, tokens: int) -> dict:
    """Where the two paths cross, as both take time linear in the density."""
    case = case_of(block_size, arithmetic, tokens)
    problems = [problem_of(replace(case, density=density)) for density in DENSITIES]
    gaps = [times(problem, product, contenders.densified) - times(problem, product) for problem in problems]
    slope = (gaps[0] - gaps[1]) / (DENSITIES[1] - DENSITIES[0])
    density = min(1.0, max(0.0, DENSITIES[0] + gaps[0] / slope)) if slope > 0 else float(gaps[0] > 0)
    row = {"product": product, "block_size": block_size, "arithmetic": arithmetic}
    row |= {"out_features": case.out_features, "in_features": case.in_features, "tokens": tokens}
    return row | {"density": round(density, 3)}


def fastest_by_cuda(product: str, block_size: int, width: int, tokens: int) -> dict:
    """Between which of CUDA_DENSITIES the kernels of csrc/cuda are right and take less time than every other path."""
    gains, by_triton = [], block_size in triton.BLOCK_SIZES
    for density in CUDA_DENSITIES:
        problem = problem_of(on_gpu(width, tokens, density, block_size, SIZES.half))
        others = [contenders.densified, *([contenders.kernels] if by_triton else [])]
        try:
            for name in NAMES[product]:
                contenders.right(problem, contenders.by_cuda, name)
            ours = times(problem, product, contenders.by_cuda)
            gains.append(min(times(problem, product, other) for other in others) / ours)
        except Exception as error:
            print(f"  {product} {block_size} by cuda, {width} x {width}, {tokens} tokens: {reason(error)}")
            gains = [0.0]  # nowhere: what fails at one density is not to be chosen at another
            break
    low, high = winning(CUDA_DENSITIES, gains)
    if low == CUDA_DENSITIES[0] and not by_triton:
        low = 0.0  # the vendor's GEMM gains nothing from fewer blocks
    row = {"product": product, "block_size": block_size, "arithmetic": "half", "out_features": width}
    return row | {"in_features": width, "tokens": tokens, "from": round(low, 3), "to": round(high, 3)}


def winning(densities: tuple[float, ...], gains: list[float]) -> tuple[float, float]:
    """Where gains are above 1, around the greatest of them and between the densities; (1, 0) where none is."""
    first = last = max(range(len(gains)), key=gains.__getitem__)
    if gains[first] <= 1:
        return 1.0, 0.0
    while first and gains[first - 1] > 1:
        first -= 1
    while last + 1 < len(gains) and gains[last + 1] > 1:
        last += 1

    def crossing(inside: int, outside: int) -> float:
        share = math.log(gains[inside]) / (math.log(gains[inside]) - math.log(gains[outside]))
        return densities[inside] + share * (densities[outside] - densities[inside])

    low = crossing(first, first - 1) if first else densities[0]
    return low, crossing(last, last + 1) if last + 1 < len(gains) else densities[-1]


def write(folder: Path, facts: dict) -> None:
    """A line for every tile list and break-even; a reader never sees half a file."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items() if name not in ROWS]
    for name in ROWS:
        rows = ",\n  ".join(json.dumps(row) for row in facts[name])
        lines.append(f" {json.dumps(name)}: [\n  {rows}\n ]" if rows else f" {json.dumps(name)}: []")
    path = folder / devices.path_for(NAME).name
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    unfinished.replace(path)


def started(folder: Path) -> dict:
    """What a run of the same commit and versions has found so far, or the constants."""
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"at {results.commit()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    path = folder / devices.path_for(NAME).name
    before = json.loads(path.read_text()) if path.exists() else {"source": ""}
    if before["source"].endswith(versions):
        return before
    facts = {"device": NAME, "source": f"measured {date.today().isoformat()} {versions}"} | limits.constants(SIZES)
    if ON_GPU:
        facts["num_sms"] = torch.cuda.get_device_properties(0).multi_processor_count
        facts["compute_capability"] = list(torch.cuda.get_device_capability())
    if "rewire_by_cuda" in before:  # which somebody has decided
        facts["rewire_by_cuda"] = before["rewire_by_cuda"]
    kept = before.get("cuda", []) if cuda.unavailable() else []  # this run could not measure them again
    return facts | {"tiles": {}, "cuda": kept, "break_even": []}


Step = Callable[[dict], None]  # adds what it measures to the facts, if it is not there yet


def plan(pool) -> Iterator[Step]:
    """The most important first."""
    for kind in ARITHMETICS:
        keys = [(product, block_size, kind) for block_size in SIZES.block_sizes for product in cost.PRODUCTS]
        yield from (partial(add_break_even, key, tokens, False) for tokens in BREAK_EVEN_TOKENS for key in keys)
        yield from (partial(add_tiles, key, pool) for key in keys)
        yield from (partial(add_break_even, key, tokens, True) for tokens in BREAK_EVEN_TOKENS for key in keys)
        if kind == "half" and not cuda.unavailable():
            yield from cuda_plan()


def cuda_plan() -> Iterator[Step]:
    shapes = [(width, tokens) for width in CUDA_WIDTHS for tokens in CUDA_TOKENS]
    for shape in shapes:
        for block_size in cuda.BLOCK_SIZES:
            if cuda.refuses(torch.device("cuda", 0), SIZES.half, block_size, shape[0]):
                continue  # a GPU with too little shared memory
            yield from (partial(add_fastest_by_cuda, product, block_size, *shape) for product in cost.PRODUCTS)


def add_tiles(key: Key, pool, facts: dict) -> None:
    entry = " ".join(map(str, key))
    if entry not in facts["tiles"]:
        facts["tiles"][entry] = [list(tile) for tile in tuned_tiles(*key, pool)]


def add_break_even(key: Key, tokens: int, tuned: bool, facts: dict) -> None:
    """With such tiles, or with newer ones."""
    older = [row for row in facts["break_even"] if same(row, key, tokens)]
    if not any(row["tuned"] >= tuned for row in older):
        row = break_even(*key, tokens) | {"tuned": tuned}
        facts["break_even"] = [*(r for r in facts["break_even"] if r not in older), row]


def add_fastest_by_cuda(product: str, block_size: int, width: int, tokens: int, facts: dict) -> None:
    key = product, block_size, "half"
    if not any(same(row, key, tokens) and row["out_features"] == width for row in facts["cuda"]):
        facts["cuda"].append(fastest_by_cuda(product, block_size, width, tokens))


def same(row: dict, key: Key, tokens: int) -> bool:
    return (row["product"], row["block_size"], row["arithmetic"], row["tokens"]) == (*key, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600, help="no new entry is begun after these")
    parser.add_argument("--folder", type=Path, default=devices.FOLDER, help="where the device's file is written")
    arguments = parser.parse_args()
    stop = time.monotonic() + arguments.seconds
    facts = started(arguments.folder)
    for entry in facts["tiles"]:
        product, block_size, kind = entry.split()
        TABLE[product, int(block_size), kind] = tuple(Tile(*tile) for tile in facts["tiles"][entry])
    write(arguments.folder, facts)

    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(PROCESSES, mp_context=context) if ON_GPU else None
    for step in plan(pool):
        if time.monotonic() > stop:
            break
        step(facts)
        write(arguments.folder, facts)
    if pool is not None:
        pool.shutdown(cancel_futures=True)
    print(
        f"{len(facts['tiles'])} tile lists, {len(facts['break_even'])} break-evens, {len(facts['cuda'])} rows of cuda"
    )


if __name__ == "__main__":
    main()
