import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compare, limits, report, results
from bench.case import Case

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_committed_results():
    text = report.README.read_text()
    assert report.written(text, report.committed()) == text, "run python -m bench.report"


def test_every_suite_measures_a_small_case_and_a_second_run_replaces_it(tmp_path):
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "-q", "bench", "--cases", "smoke", "--results", str(path)]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True)
        rows = results.load(path)
        assert set(rows.suite) == {file.stem.removeprefix("bench_") for file in (ROOT / "bench").glob("bench_*.py")}
        assert not rows.duplicated(list(results.KEY)).any()
        assert (
            (rows.time_us.dropna() > 0).all()
            and rows.get("roofline", rows.time_us[:0]).dropna().between(0, 1).all()  # none without a C compiler
            and {"device", "commit", "torch", "threads"} <= set(rows.columns)
        )


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
    assert limits.roofline(replace(case, dtype="bfloat16"), time_us=2e6, flop=flop, bytes=bytes) == {}


def test_a_section_is_written_from_results_of_several_devices():
    rows = next(iter(report.committed().values()))
    text = "before\n<!-- bench:memory -->\nold\n<!-- /bench -->\nafter\n"
    path = results.FOLDER / "device.json"
    new = report.written(text, {path: rows, path.with_stem("other"): rows})
    assert new.startswith("before\n<!-- bench:memory -->\n| layer") and new.endswith("\n<!-- /bench -->\nafter\n")
    assert "old" not in new and new.count("| layer") == 2


def test_compare_shows_what_became_slower_by_more_than_the_threshold(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    ratios = {"slow": (4.0, 3.0), "steady": (4.0, 3.8), "fast": (4.0, 8.0)}
    shape = {"out_features": 64, "in_features": 64, "tokens": 8, "density": 0.1, "block_size": 16}
    shape |= {"threads": 1, "dtype": "float32"}
    for path, column in ((old, 0), (new, 1)):
        records = [{"suite": "layer", "name": name, **shape, "ratio": pair[column]} for name, pair in ratios.items()]
        results.save(path, records, {"device": "a machine", "commit": path.stem})
    compare.main([str(old), str(new)])
    told = capsys.readouterr().out
    assert "1 of 3" in told and "| slow |" in told and "75%" in told and "steady" not in told and "fast" not in told
    compare.main([str(old), str(new), "--threshold", "0.04"])
    assert "2 of 3" in capsys.readouterr().out


def test_compare_refuses_results_of_two_devices(tmp_path):
    record = {"suite": "layer", "name": "step", "ratio": 1.0}
    for name in ("one", "two"):
        results.save(tmp_path / f"{name}.json", [record], {"device": name})
    with pytest.raises(SystemExit, match="different devices: one; two"):
        compare.main([str(tmp_path / "one.json"), str(tmp_path / "two.json")])
