import subprocess
import sys
from pathlib import Path

from bench import report, results

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
        assert (rows.time_us.dropna() > 0).all() and {"device", "commit", "torch", "threads"} <= set(rows.columns)


def test_a_section_is_written_from_results_of_several_devices():
    rows = next(iter(report.committed().values()))
    text = "before\n<!-- bench:memory -->\nold\n<!-- /bench -->\nafter\n"
    path = results.FOLDER / "device.json"
    new = report.written(text, {path: rows, path.with_stem("other"): rows})
    assert new.startswith("before\n<!-- bench:memory -->\n| layer") and new.endswith("\n<!-- /bench -->\nafter\n")
    assert "old" not in new and new.count("| layer") == 2
