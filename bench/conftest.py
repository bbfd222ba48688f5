"""What every suite shares: which cases run, by which clock, `compare` and `record`, and the results that a run leaves.

`python -m pytest bench` measures the GPU where torch finds one, else the CPU.
"""

import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pandas
import pytest
import torch

import sparsekern as sk
from bench import clock, limits, results
from bench.case import SIZES
from bench.contenders import reason
from bench.measure import ROTATED_BYTES, Compare
from bench.problem import problem_of
from sparsekern.backends import triton

WORK = {"time_us", "flop", "bytes"}
# Of a comparison, about; a GPU has many cases and little noise.
SECONDS = {"cpu": {"full": 0.4, "quick": 0.3, "smoke": 0.01}, "cuda": {"full": 0.06, "quick": 0.06, "smoke": 0.01}}


def pytest_addoption(parser):
    group = parser.getgroup("sparsekern")
    group.addoption("--cases", choices=SIZES, default="full", help="full (all), quick (2 minutes) or smoke (tiny)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if clock.ON_GPU else "cpu")
    group.addoption("--results", type=Path, help="JSON to write; a full run writes bench/results/<device>.json")
    group.addoption("--seconds", type=float, help="no case is begun after these")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table does not know of ratios
    device, cases = config.getoption("device"), config.getoption("cases")
    rehearsal = device == "cuda" and not clock.ON_GPU
    if rehearsal and cases != "smoke":
        raise pytest.UsageError("bench: torch finds no GPU; --device cuda --cases smoke rehearses without one")
    if rehearsal and (missing := triton.unavailable()):
        raise pytest.UsageError(f"bench: a rehearsal without a GPU needs Triton and TRITON_INTERPRET=1, but {missing}")
    config.records, config.sizes, config.rehearsal = [], SIZES[cases], rehearsal
    config.environment = results.environment(device)
    full = results.path_for(config.environment) if cases == "full" else None
    config.written = config.getoption("results") or full
    config.stop = time.monotonic() + (config.getoption("seconds") or float("inf"))
    # in a rehearsal no chooser takes interpreted kernels
    config.forced = sk.use("triton") if rehearsal else nullcontext()
    config.forced.__enter__()
    config.add_cleanup(lambda: config.forced.__exit__(None, None, None))
    config.addinivalue_line("markers", "device(name): measured on this device only")
    config.addinivalue_line("markers", "clocks(*names): what times it on a GPU, where that is not the graph's alone")


def pytest_generate_tests(metafunc):
    """A module lists the cases of a CPU in CASES, those of a GPU in the function `gpu_cases` of their sizes."""
    if "case" not in metafunc.fixturenames:
        return
    device, module = metafunc.config.getoption("device"), metafunc.module
    only = metafunc.definition.get_closest_marker("device")
    if only and only.args[0] != device:
        cases = []
    elif device == "cpu":
        cases = getattr(module, "CASES", {}).get(metafunc.config.getoption("cases"), [])
    else:
        cases = getattr(module, "gpu_cases", lambda sizes: [])(metafunc.config.sizes)
    metafunc.parametrize("case", cases, ids=str, scope="module")
    if "own_clock" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("clocks")
        names = ["host"] if device == "cpu" else marker.args if marker else ["graph"]
        metafunc.parametrize("own_clock", [clock.CLOCKS[name] for name in names], ids=names)


def pytest_collection_modifyitems(config, items):
    """What is not measured on this device is not there; what pytest-benchmark times has its clock for a timer."""
    here = [item for item in items if getattr(item, "callspec", None) and "case" in item.callspec.params]
    here = [item for item in here if hasattr(item.callspec.params["case"], "tokens")]
    for item in here:
        if own := item.callspec.params.get("own_clock"):
            item.add_marker(pytest.mark.benchmark(timer=own.now))
    config.hook.pytest_deselected(items=[item for item in items if item not in set(here)])
    items[:] = here


def pytest_runtest_setup(item):
    if time.monotonic() > item.config.stop:
        pytest.skip("out of time")


@pytest.fixture
def compare(benchmark, own_clock, case, request):
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    torch.set_float32_matmul_precision("high" if case.arithmetic == "tf32" else "highest")
    device, cases = request.config.getoption("device"), request.config.getoption("cases")
    return Compare(benchmark, own_clock, SECONDS[device][cases], request.config.rehearsal)


@pytest.fixture
def problem(case, request):
    on_gpu = request.config.getoption("device") == "cuda"
    return problem_of(case, request.config.sizes.rotated_bytes if on_gpu else ROTATED_BYTES)


@pytest.fixture
def record(case, request):
    """Call it with what was found, `record("step", time_us=..., flop=..., ...)`; it adds the share of the bound."""

    def add(name: str, **found):
        if request.config.option.benchmark_disable:
            return
        share = limits.roofline(case, **{key: found[key] for key in WORK}) if found.keys() >= WORK else {}
        own = request.node.callspec.params.get("own_clock")
        _keep(request.config, request.node, {"clock": own.name if own else None, "name": name, **found, **share})

    return add


def _keep(config, item, found: dict) -> None:
    """Results are written after every record: who stops a run for its time keeps what it found."""
    suite = item.module.__name__.rpartition("bench_")[2]
    head = {"suite": suite, "name": found.pop("name"), "backend": "chosen", "clock": found.pop("clock")}
    row = head | asdict(item.callspec.params["case"]) | found
    config.records.append(row)
    if config.written is not None:
        results.save(config.written, [row], config.environment)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A case that fails leaves its reason."""
    report = yield
    if report.failed and call.when != "teardown" and not item.config.option.benchmark_disable:
        params = item.callspec.params
        own = params.get("own_clock")
        found = {"name": params.get("product", item.originalname.removeprefix("bench_"))}
        found |= {"clock": own.name if own else None, "backend": params.get("backend", "chosen")}
        _keep(item.config, item, found | {"reason": reason(call.excinfo.value)})
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.records:
        return
    table = pandas.DataFrame(config.records).drop(columns=["flop", "bytes"], errors="ignore").round(2)
    for suite, rows in table.groupby("suite"):
        terminalreporter.section(suite)
        terminalreporter.write_line(rows.dropna(axis=1, how="all").drop(columns="suite").to_string(index=False))
    if config.written is not None:
        terminalreporter.write_line(f"written to {config.written}")
