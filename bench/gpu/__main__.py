"""python -m bench.gpu STAGE --out OUTDIR [--block B] [--only CONTENDER] [--seconds S]: one stage of bench/gpu.sh.

Results are appended to OUTDIR/results.json after every case; after S seconds no new case is begun.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import sparsekern as sk
from bench.gpu import contenders, limits, products, results, training
from bench.gpu.clock import REHEARSAL


def warm(arguments) -> Iterator[list[dict]]:
    """Compile our kernels for the main cases: four processes at once, where a clock would wait."""
    for case in products.main_cases(arguments.blocks):
        problem = products.Problem(case)
        for build in (contenders.kernels, contenders.densified):
            for call in build(problem).values():
                call(*problem.sets[0])
        yield []


def main_stage(arguments) -> Iterator[list[dict]]:
    for i, case in enumerate(products.main_cases(arguments.blocks)):
        names = dict(contenders.OURS)
        if case.density != 0.1 and not REHEARSAL:
            del names["masked"]  # it does not depend on the density
        yield list(products.measure(case, names, eager=i % 5 == 0))


def baselines(arguments) -> Iterator[list[dict]]:
    for case in products.baseline_cases():
        yield list(products.measure(case, {arguments.only: contenders.OTHERS[arguments.only]}))


def float32(arguments) -> Iterator[list[dict]]:
    for case in products.float32_cases():
        yield list(products.measure(case, contenders.OURS, eager=False))


def sizes(arguments) -> Iterator[list[dict]]:
    for case in products.size_cases():
        yield list(products.measure(case, contenders.OURS, eager=False))


STAGES = {
    "limits": lambda arguments: ([row] for row in limits.records()),
    "warm": warm,
    "main": main_stage,
    "baselines": baselines,
    "training": lambda arguments: ([row] for row in training.records()),
    "float32": float32,
    "sizes": sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "report"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--block", type=int, dest="blocks", nargs="*", default=products.BLOCK_SIZES)
    parser.add_argument("--only", choices=contenders.OTHERS)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "report":
        from bench.gpu import report  # the only one that needs pandas and matplotlib

        report.write(arguments.out)
        return
    stop, count = time.monotonic() + arguments.seconds, 0
    # in a rehearsal no chooser takes interpreted kernels
    with sk.use("triton") if REHEARSAL else nullcontext():
        for rows in STAGES[arguments.stage](arguments):
            if rows:
                results.add(arguments.out, rows)
            count += 1
            if time.monotonic() > stop:
                print(f"{arguments.stage}: out of time after {count} cases", flush=True)
                return
    print(f"{arguments.stage}: {count} cases", flush=True)


if __name__ == "__main__":
    main()
