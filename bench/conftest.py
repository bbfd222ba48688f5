"""What every suite shares: which cases run, `timer` and `record`, and the results that a run leaves behind."""

from dataclasses import asdict
from pathlib import Path

import pandas
import pytest
import torch

from bench import limits, results
from bench.measure import Timer

WORK = {"time_us", "flop", "bytes"}
SECONDS = {"full": 0.4, "quick": 0.3, "smoke": 0.01}


def pytest_addoption(parser):
    group = parser.getgroup("sparsekern")
    group.addoption("--cases", choices=SECONDS, default="full", help="full (the README's), quick (2 minutes) or smoke")
    group.addoption("--results", type=Path, help="JSON to write; a full run writes bench/results/<device>.json")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True  # its table does not know of ratios
    config.records = []


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.CASES[metafunc.config.getoption("cases")], ids=str)


@pytest.fixture
def timer(benchmark, case, request):
    torch.manual_seed(0)
    torch.set_num_threads(case.threads)
    return Timer(benchmark, SECONDS[request.config.getoption("cases")])


@pytest.fixture
def record(case, request):
    """Call it with what was found, `record("step", time_us=..., flop=..., ...)`; it adds the share of the bound."""
    suite = request.module.__name__.rpartition("bench_")[2]

    def add(name: str, **found):
        share = limits.roofline(case, **{key: found[key] for key in WORK}) if found.keys() >= WORK else {}
        request.config.records.append({"suite": suite, "name": name, **asdict(case), **found, **share})

    return add


def pytest_sessionfinish(session):
    config = session.config
    if not config.records:
        return
    environment = results.environment()
    path = config.getoption("results")
    if path is None and config.getoption("cases") == "full":
        path = results.path_for(environment)
    if path is not None:
        results.save(path, config.records, environment)
    config.written = path


def pytest_terminal_summary(terminalreporter, config):
    if not config.records:
        return
    table = pandas.DataFrame(config.records).drop(columns=["flop", "bytes"], errors="ignore").round(2)
    for suite, rows in table.groupby("suite"):
        terminalreporter.section(suite)
        terminalreporter.write_line(rows.dropna(axis=1, how="all").drop(columns="suite").to_string(index=False))
    if config.written is not None:
        terminalreporter.write_line(f"written to {config.written}")
