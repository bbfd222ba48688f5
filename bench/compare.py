"""What became slower between two results of one device: `python -m bench.compare old.json new.json`.

Times are compared as ratios to the partner of the same run (dense, in most), so that a busier machine does not count.
"""

import argparse
import sys
from pathlib import Path

from pandas import DataFrame

from bench import results
from bench.report import case, markdown


def compare(old: DataFrame, new: DataFrame, threshold: float) -> DataFrame:
    """Records of both whose ratio to the partner fell by more than the threshold, the worst first."""
    both = old.merge(new, on=list(results.KEY), suffixes=("_old", "_new"))
    both["speed"] = both.ratio_new / both.ratio_old
    return both[both.speed < 1 - threshold].sort_values("speed")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="smallest loss of speed that counts (0.1: 10%%)")
    options = parser.parse_args(arguments)
    old, new = results.load(options.old), results.load(options.new)
    devices = set(old.device_name) | set(new.device_name)
    if len(devices) > 1:
        sys.exit(f"bench.compare: results are of different devices: {'; '.join(sorted(devices))}")
    slower = compare(old, new, options.threshold)
    shared = len(old.merge(new, on=list(results.KEY)))
    print(f"{len(slower)} of {shared} shared records are slower by more than {options.threshold:.0%}.")
    if len(slower):
        ratio = "{:.3g}x".format
        columns = {"suite": slower.suite, "measured": slower["name"]} | case(slower)
        columns |= {"old": slower.ratio_old.map(ratio), "new": slower.ratio_new.map(ratio)}
        print(markdown(columns | {"speed": slower.speed.map("{:.0%}".format)}))


if __name__ == "__main__":
    main()
