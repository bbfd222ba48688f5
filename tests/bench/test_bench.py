import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulation import Launches

from bench import compare, contenders, cost_model, limits, measure, plot, report, results
from bench.case import KEYS, Case
from bench.clock import CLOCKS
from bench.problem import PRODUCTS, Problem
from sparsekern.backends import cuda

ROOT = Path(__file__).parent.parent.parent
ON_A_GPU_ONLY = {"captured", "gemm", "rivals"}


def test_the_readme_shows_the_committed_results():
    text = report.README.read_text()
    assert report.written(text, report.committed()) == text, "run python -m bench.report"


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_the_tables_of_a_device_show_its_committed_results(path):
    rows = report.committed()[path]
    assert path.with_suffix(".md").read_text() == report.page(path, rows), "run python -m bench.report"
    assert path.with_suffix(".png").exists()
    assert cost_model.path_for(path).exists() == plot.of_gpu(rows)


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_a_page_has_the_tables_of_every_suite_that_was_measured_and_every_picture_beside_it(path):
    rows, page = report.committed()[path], path.with_suffix(".md").read_text()
    device = "cuda" if plot.of_gpu(rows) else "cpu"
    sections = {title: own for title, own in report.SECTIONS.items() if device in own.devices.split()}
    shown = {suite for title, own in sections.items() if f"\n## {title}\n" in page for suite in own.suites}
    assert set(rows.suite) - {"paths"} <= shown  # from which come constants of the chooser, and no table
    pictures = {each.name for each in path.parent.glob(f"{path.stem}*.png")}
    assert set(re.findall(r"!\[.*?\]\((.*?)\)", page)) == pictures


@pytest.mark.parametrize("missing", ["plot", "table"])
def test_a_readme_without_one_of_the_markers_is_an_error(missing):
    text = report.README.read_text().replace(f"<!-- bench:{missing} -->", "")
    with pytest.raises(ValueError, match=f"bench.report: README.md must have one <!-- bench:{missing} -->, it has 0"):
        report.written(text, report.committed())


def test_the_choosers_model_is_within_a_factor_of_two_of_all_that_an_h200_measured_and_mostly_within_a_quarter():
    found = cost_model.compared(results.load(results.FOLDER / "nvidia-h200.json"))
    kernels = found[found.path == "Triton kernels"]
    assert len(kernels) == 3 * 65 and len(found) > len(kernels)
    assert found.share.between(0.5, 1.3).all()  # constants and products are from two runs of the card
    medians = kernels.groupby(["product", "block_size"]).share.median()
    # an sdd of 16384 tokens misses L2 at blocks of 16 and 32, which the model does not know
    assert medians.between(0.75, 1.1).drop(("sdd", 32)).all() and medians["sdd", 32] > 0.6
    assert kernels.share.median() == pytest.approx(0.9, abs=0.03), "`reach` of sparsekern/devices/default.json"


@pytest.mark.parametrize("path", report.committed(), ids=lambda path: path.stem)
def test_committed_results_keep_the_one_schema(path):
    rows = report.committed()[path]
    assert not rows.duplicated(list(results.KEY)).any()
    environment = ["device_name", "commit", "torch", "sparsekern", "python", "date", "vendor"]
    assert rows[[*KEYS, "suite", "name", "backend", *environment]].notna().all(axis=None)
    assert results.path_for(rows.iloc[0]) == path
    ratios = rows.dropna(subset=["time_us", "partner_us", "ratio"])
    off = ratios.ratio / (ratios.partner_us / ratios.time_us) - 1
    assert off.abs().median() < 0.02, "ratio is partner / ours"


def test_the_readmes_table_has_five_rows_of_cpu_and_gpu_and_no_other_marker_is_touched():
    markers = ("<!-- bench:plot -->\n", "<!-- bench:table -->\n", "<!-- bench:other -->\nkept\n")
    text = "".join(marker + "<!-- /bench -->\n" for marker in markers)
    new = report.written(text, report.committed())
    lines = [line for line in new.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 5 and "kept" in new
    for name in ("device", "dtype", "layer", "block", "density", "ours us", "dense us", "faster"):
        assert f"| {name} |" in lines[0]
    assert sum("NVIDIA" in line for line in lines) == 3 and "| bfloat16 | 4096 x 4096 | 16384 |" in new


def test_every_suite_measures_a_small_case_and_a_second_run_replaces_it(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "-q", "bench", "--cases", "smoke", "--results", str(path)]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True)
        rows = results.load(path)
        suites = {file.stem.removeprefix("bench_") for file in (ROOT / "bench").glob("bench_*.py")}
        assert set(rows.suite) == suites - ON_A_GPU_ONLY
        assert not rows.duplicated(list(results.KEY)).any()
        assert (
            (rows.time_us.dropna() > 0).all()
            and rows.get("roofline", rows.time_us[:0]).dropna().between(0, 1).all()  # none without a C compiler
            and {"device_name", "commit", "torch", "threads"} <= set(rows.columns)
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cases", "quick"], "torch finds no GPU; --device cuda --cases smoke rehearses without one"),
        (["--cases", "smoke"], "a rehearsal without a GPU needs Triton and TRITON_INTERPRET=1, but "),
    ],
)
def test_a_gpu_that_is_asked_for_and_not_there_is_a_sentence(options, told):
    command = [sys.executable, "-m", "pytest", "-q", "bench/bench_gemm.py", "--device", "cuda", *options]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 4 and told in run.stderr, run.stderr


def test_a_baseline_that_is_not_installed_is_reported_with_its_reason(tmp_path):
    (tmp_path / "sparselab.py").write_text("raise ImportError('there is no SparseLab here')")
    path = tmp_path / "results.json"
    suites = ["bench/bench_masked.py", "bench/bench_sparselab.py"]
    command = [sys.executable, "-m", "pytest", "-q", *suites, "--cases", "smoke", "--results", str(path)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert "SparseLab was not measured: there is no SparseLab here." in report.others(results.load(path))


@pytest.mark.parametrize(("flop", "bytes", "share"), [(4e9, 1e9, 0.5), (1e9, 4e9, 0.25)])
def test_the_roofline_bound_is_the_slower_of_arithmetic_and_memory(monkeypatch, flop, bytes, share):
    monkeypatch.setattr(limits, "flops_of_a_core", lambda: 2e9)
    monkeypatch.setattr(limits, "bytes_per_second", lambda threads: 8e9)
    case = Case(64, 64, 8, 0.1, 16, threads=2)
    assert limits.roofline(case, time_us=2e6, flop=flop, bytes=bytes) == {"roofline": share}
    assert limits.roofline(replace(case, arithmetic="bfloat16"), time_us=2e6, flop=flop, bytes=bytes) == {}


def test_a_section_is_written_from_results_of_several_devices():
    rows = next(iter(report.committed().values()))
    text = "<!-- bench:plot -->\n<!-- /bench -->\nbefore\n<!-- bench:table -->\nold\n<!-- /bench -->\nafter\n"
    path = results.FOLDER / "device.json"
    new = report.written(text, {path: rows, path.with_stem("other"): rows})
    assert "before\n<!-- bench:table -->\n| device" in new and new.endswith("\n<!-- /bench -->\nafter\n")
    assert "old" not in new and new.count("| 0.05 |") == 2


class Benchmark:
    """What Compare needs of pytest-benchmark's fixture."""

    disabled = False

    def __init__(self, now):
        self.now, self.stats = now, self
        self.data = []

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            start = self.now()
            target()
            self.data.append(self.now() - start)


def test_a_comparison_takes_turns_and_reports_one_call_of_several(monkeypatch):
    seconds, order = [0.0], []

    def call(name, takes):
        seconds[0] += takes
        order.append(name)

    own = CLOCKS["host"]
    monkeypatch.setattr(own, "now", lambda: seconds[0])
    benchmark = Benchmark(own.now)
    benchmark.stats = type("Stats", (), {"stats": benchmark})
    compare = measure.Compare(benchmark, own, seconds=1e-9)
    found = compare(lambda: call("ours", 2e-6), lambda: call("partner", 6e-6), calls=3)
    assert order[:6] == 3 * ["partner"] + 3 * ["ours"] and order.count("ours") == order.count("partner")
    assert found["time_us"] == pytest.approx(2) and found["partner_us"] == pytest.approx(6)
    assert found["ratio"] == pytest.approx(3) == found["ratio_q1"] and found["rounds"] == 5


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_contender_that_loses_one_block_is_not_timed(product):
    problem = Problem(Case(256, 256, 64, 0.5, 16, 1))

    def wrong(p):
        calls = contenders.dense(p)
        lost = p.dense.clone()
        row, col = (int(index[0]) * 16 for index in (p.layer.topology.block_rows, p.layer.topology.block_cols))
        lost[row : row + 16, col : col + 16] = 0
        calls["dds transposed"], calls["dds"] = (lambda x, dy: x @ lost.t()), (lambda x, dy: dy @ lost)
        dw = calls["sdd"]
        calls["sdd"] = lambda x, dy: dw(x, dy) * (lost != 0)
        return calls

    assert callable(contenders.right(problem, contenders.dense, product))
    with pytest.raises(ValueError, match=f"{product} is wrong: relative error"):
        contenders.right(problem, wrong, product)


@pytest.mark.parametrize("block", cuda.BLOCK_SIZES)
def test_the_kernels_of_cuda_are_a_contender_whose_products_are_right(monkeypatch, block):
    Launches(monkeypatch)  # by emulation on a CPU
    problem = Problem(Case(128, 192, 40, 0.3, block, 1, arithmetic="bfloat16"))
    contenders.right(problem, contenders.by_cuda, contenders.STEP)(*problem.next_set())


def test_a_contender_that_computes_with_rounded_weights_is_right_in_its_own_arithmetic_only():
    rounded = lambda p: {"dds": lambda x, dy: (dy.bfloat16() @ p.dense.bfloat16()).to(dy.dtype)}  # noqa: E731
    assert contenders.right(Problem(Case(64, 64, 8, 0.5, 16, 1, arithmetic="bfloat16")), rounded, "dds")
    with pytest.raises(ValueError, match="bound 1e-05"):
        contenders.right(Problem(Case(64, 64, 8, 0.5, 16, 1)), rounded, "dds")


def test_a_case_knows_its_dtype_and_the_choosers_word_for_its_arithmetic():
    case = Case(64, 64, 8, 0.5, 16, 1)
    words = {"float32": "ieee", "tf32": "tf32", "bfloat16": "half", "float16": "half"}
    assert {name: replace(case, arithmetic=name).kind for name in words} == words
    assert replace(case, arithmetic="tf32").dtype == torch.float32
    assert replace(case, arithmetic="bfloat16").dtype == torch.bfloat16


def test_compare_shows_what_became_slower_by_more_than_the_threshold(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    ratios = {"slow": (4.0, 3.0), "steady": (4.0, 3.8), "fast": (4.0, 8.0)}
    shape = {"out_features": 64, "in_features": 64, "tokens": 8, "density": 0.1, "block_size": 16}
    shape |= {"threads": 1, "device": "cpu", "arithmetic": "float32", "backend": "chosen", "clock": "host"}
    for path, column in ((old, 0), (new, 1)):
        records = [{"suite": "layer", "name": name, **shape, "ratio": pair[column]} for name, pair in ratios.items()]
        results.save(path, records, {"device_name": "a machine", "commit": path.stem})
    compare.main([str(old), str(new)])
    told = capsys.readouterr().out
    assert "1 of 3" in told and "| slow |" in told and "75%" in told and "steady" not in told and "fast" not in told
    compare.main([str(old), str(new), "--threshold", "0.04"])
    assert "2 of 3" in capsys.readouterr().out


def test_compare_refuses_results_of_two_devices(tmp_path):
    record = {"suite": "layer", "name": "step", "backend": "chosen", "clock": "host", "ratio": 1.0}
    for name in ("one", "two"):
        results.save(tmp_path / f"{name}.json", [record], {"device_name": name})
    with pytest.raises(SystemExit, match="different devices: one; two"):
        compare.main([str(tmp_path / "one.json"), str(tmp_path / "two.json")])
