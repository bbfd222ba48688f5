"""rl/report.py and rl/reporting: the statistics by hand, and that only comparable finished runs are compared."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl.config import Config, GMPConfig, PPOConfig, ReDoConfig, ResetConfig, SETConfig
from rl.envs import SUITES
from rl.reporting import paper
from rl.reporting.cells import by_protocol, protocol_title, reference
from rl.reporting.iqm import interval, iqm
from rl.reporting.plots import DORMANT, draw
from rl.reporting.runs import find, identity
from rl.reporting.tables import orderings, show, single_task, with_interval

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "rl"
LOGGED = ("time/steps_per_second", "time/update_ms", "time/acting_ms", "time/rewire_ms")
LOGGED += ("time/evaluate_ms", "time/metrics_ms")
LOGGED += ("dormant/actor", "dormant/critic", "rank/actor", "rank/critic", "fisher/actor", "sparse/density")


def write(folder, config, score, steps=(10_000, 400_000)):
    """A run folder with these evaluations; every task ends with this score."""
    folder.mkdir(parents=True)
    config.save(folder)
    (folder / "environment.txt").write_text("command: secret\ncommit: abc\nsparsekern 0.1 at /somewhere/else\n")
    rows = ["step,name,value", "2000,loss/value,1.0"]
    for step in steps:
        names = ["mean", *(task.name for task in SUITES[config.suite])]
        rows += [f"{step},score/{name},{score if step == steps[-1] else 0}" for name in names]
        rows += [f"{step},success/mean,{score}", *(f"{step},{name},1" for name in LOGGED)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def test_iqm_cuts_off_a_quarter_at_each_end():
    assert iqm(np.array([9.0, 1, 2, 3, -50])) == 2  # of five, one is cut off at each end
    assert iqm(np.array([[0.0, 1, 2, 99], [4, 4, 4, 4]])).tolist() == [1.5, 4]
    assert iqm(np.array([1.0, 2])) == 1.5
    assert iqm(np.arange(30.0)) == np.arange(7, 23).mean()


def test_interval_redraws_runs_within_each_task():
    fixed = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])  # runs agree on each task: nothing to be unsure of
    assert interval(fixed) == (0.5, 0.5)
    low, high = interval(np.array([[0.0], [1.0]]))
    assert (low, high) == (0, 1)
    scores = np.random.default_rng(1).normal(size=(400, 1))
    low, high = interval(scores)
    assert low < iqm(scores.flatten()) < high and high - low == pytest.approx(2 * 1.96 * 1.2 / 20, rel=0.25)


def test_paper_has_seven_treatments_of_three_agents_on_three_suites():
    assert len(paper.TABLE) == 63
    assert paper.TABLE["mtppo", "mt5", "dense"] == (0.65, 0.61, 0.71)
    assert paper.TABLE["moore", "mt7", "layer-norm"] == (0.66, 0.61, 0.70)
    assert paper.TABLE["moe", "mt3", "reset"] == (0.64, 0.54, 0.73)
    assert all(score.low <= score.iqm <= score.high for score in paper.TABLE.values())


def test_report_compares_finished_runs_of_one_protocol_only(tmp_path, capsys):
    full = Config(suite="mt5", treatment="dense", timesteps=400_000)
    for seed, score in enumerate((0.6, 0.8)):
        write(tmp_path / f"dense{seed}", replace(full, seed=seed, threads=seed + 1), score)
        write(tmp_path / f"set{seed}", replace(full, treatment="set", seed=seed), score + 0.1)
    write(tmp_path / "again", full, 0.6)
    write(tmp_path / "block", replace(full, treatment="set", block_size=16), 0.9)
    write(tmp_path / "short", replace(full, timesteps=40_000), 0.2, steps=(10_000, 40_000))
    write(tmp_path / "other", replace(full, ppo=PPOConfig(epochs=4)), 0.3)
    write(tmp_path / "unfinished", replace(full, seed=2), 0.3, steps=(10_000, 20_000))

    runs = find([tmp_path])
    assert [run.folder.name for run in runs if not run.finished] == ["unfinished"]
    tables = by_protocol(run for run in runs if run.finished)
    described = {protocol_title(protocol): cells for protocol, cells in tables.items()}
    names = {title: [(cell.name, cell.seeds) for cell in cells] for title, cells in described.items()}
    same, short, other = sorted(names, key=lambda title: (title.startswith("40,"), "epochs" in title))
    assert names[same] == [("dense", [0, 1]), ("set", [0, 1]), ("set, block 16", [0])]
    assert names[short] == names[other] == [("dense", [0])]
    assert same == "400,000 timesteps, the paper's protocol"

    cells = described[same]
    dense, sets, blocks = cells
    assert reference(dense) == paper.TABLE["mtppo", "mt5", "dense"] and reference(blocks) is None
    np.testing.assert_allclose(sets.scores, [[0.7] * 5, [0.9] * 5])

    for protocol, of_table in tables.items():
        show(protocol, of_table)
    printed = capsys.readouterr().out
    assert "0.700 [0.600, 0.800]" in printed and "0.65 [0.61, 0.71]" in printed and "0, 1" in printed
    assert printed.count("0.65 [0.61, 0.71]") == 1  # beside the paper's protocol only
    assert "40,000 timesteps; not the paper's protocol" in printed
    pictures = draw(next(iter(tables)), cells, tmp_path / "plots", number=1)
    assert [picture.name for picture in pictures] == ["1-mt5-mtppo.png", "1-mt5-mtppo-tasks.png"]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


def cells_of(tmp_path, seeds, **scores):
    """Cells of MT5 by treatment, of so many seeds each, all with one score."""
    for treatment, score in scores.items():
        for seed in range(seeds[treatment]):
            config = Config(suite="mt5", treatment=treatment, timesteps=400_000, seed=seed)
            write(tmp_path / f"{treatment}{seed}", config, score)
    (cells,) = by_protocol(find([tmp_path])).values()
    return cells


def test_the_papers_order_is_looked_for_in_cells_of_ten_seeds(tmp_path):
    cells = cells_of(tmp_path, {"dense": 10, "set": 10, "gmp": 9}, dense=0.6, set=0.7, gmp=0.9)
    line, few = orderings(cells)
    assert line == (
        "mt5 mtppo: set - dense = +0.100, paper +0.15: the paper's order appears (10 and 10 seeds, intervals are apart)"
    )
    assert few == "Fewer than 10 seeds, and so no statement about treatments: mt5 mtppo gmp (9)"


def test_nothing_is_compared_with_a_dense_network_of_nine_seeds(tmp_path):
    (few,) = orderings(cells_of(tmp_path, {"dense": 9, "set": 10}, dense=0.6, set=0.7))
    assert "order" not in few and "mt5 mtppo dense (9)" in few and "set" not in few


def test_paper_without_a_difference_has_no_order(tmp_path):
    for treatment, score in (("dense", 0.5), ("reset", 0.6)):
        for seed in range(10):
            config = Config(treatment=treatment, timesteps=400_000, seed=seed)
            write(tmp_path / f"{treatment}{seed}", config, score)
    (cells,) = by_protocol(find([tmp_path])).values()
    (line,) = orderings(cells)
    assert line.startswith(
        "mt3 mtppo: reset - dense = +0.100, paper +0.00: the paper sees no difference (10 and 10 seeds"
    )


def test_the_iqm_of_fewer_than_four_numbers_is_named_a_mean():
    assert with_interval(np.array([[0.25], [0.5], [0.75]])) == "mean 0.500 [0.250, 0.750]"
    assert with_interval(np.array([[0.0], [0.5], [0.5], [0.5]])).startswith("IQM 0.500 [")
    assert with_interval(np.array([[0.0, 0.5, 0.5, 0.5]])) == "IQM 0.500"


def axes_of(figures, protocol, cells, folder):
    """The axes of the two figures that are drawn, by title."""
    from matplotlib import pyplot

    figures.setattr(pyplot, "close", lambda figure: None)
    before = set(pyplot.get_fignums())
    draw(protocol, cells, folder, number=1)
    figures.undo()
    drawn = [pyplot.figure(number) for number in pyplot.get_fignums() if number not in before]
    found = [{axis.get_title(): axis for axis in figure.axes} for figure in drawn]
    pyplot.close("all")
    return found


def test_a_share_of_dormant_neurons_is_drawn_on_a_scale_that_makes_no_cliff_of_a_thousandth(tmp_path, monkeypatch):
    config = Config(suite="mt5", treatment="dense", timesteps=400_000)
    write(tmp_path / "run", config, 0.5)
    file = tmp_path / "run" / "metrics.csv"
    file.write_text(file.read_text().replace("dormant/actor,1", "dormant/actor,0.001"))
    ((protocol, cells),) = by_protocol(find([tmp_path])).items()
    metrics, tasks = axes_of(monkeypatch, protocol, cells, tmp_path / "plots")
    assert metrics["dormant neurons, actor"].get_ylim() == (0, DORMANT)
    assert metrics["dormant neurons, critic"].get_ylim()[1] > 1  # of which all are dormant
    assert [*tasks] == [task.name for task in SUITES["mt5"]]
    for axis in tasks.values():
        (line,) = axis.get_lines()
        assert line.get_ydata().tolist() == [0, 0.5]


def test_success_is_not_repeated_as_a_score_on_mt10(tmp_path, monkeypatch, capsys):
    config = Config(suite="mt10", agent="mtsac", treatment="dense", timesteps=2_000_000)
    write(tmp_path / "run", config, 0.5, steps=(20_000, 2_000_000))
    ((protocol, cells),) = by_protocol(find([tmp_path])).items()
    show(protocol, cells)
    printed = capsys.readouterr().out
    assert "success after 2,000,000 timesteps" in printed and "score" not in printed
    metrics, _ = axes_of(monkeypatch, protocol, cells, tmp_path / "plots")
    assert "success" in metrics and "normalised score" not in metrics


def test_runs_of_gmp_on_mt10_prune_as_the_paper_does_and_committed_ones_as_they_did(tmp_path):
    assert Config(suite="mt10", agent="mtsac", treatment="gmp").gmp.update_every == 5000
    assert Config(treatment="gmp").gmp.update_every == 500
    committed = [run for run in find([RESULTS]) if run.config.suite == "mt10" and run.config.treatment == "gmp"]
    assert committed and {run.config.gmp.update_every for run in committed} == {500}
    for run in committed:
        assert run.folder.parent.name == run.config.experiment  # a run of today has another folder
    dense = RESULTS / "mt10-mtsac-dense-warmup500-evaluate-every10000-episodes25"
    ((cells),) = by_protocol(find([dense, *(run.folder for run in committed)])).values()
    assert [cell.name for cell in cells] == ["dense", "gmp, actor only, every 500", "gmp, every 500"]
    assert [reference(cell) for cell in cells] == [None] * 3


def test_run_costs_rollouts_updates_rewires_and_evaluations(tmp_path):
    write(tmp_path / "run", Config(treatment="set", timesteps=400_000), 0.5)
    ((cell,),) = by_protocol(find([tmp_path])).values()
    # logged are 1 environment step per second, and 1 ms for all else
    seconds = 200 * (2000 * 3 + 0.001 + 0.001) + 2 * (0.001 + 0.001)
    assert cell.core_minutes == pytest.approx(seconds / 60, rel=1e-9)


def test_options_of_other_treatments_do_not_tell_runs_apart(tmp_path):
    plain = Config(treatment="dense")
    odd = {"set": SETConfig(0.1), "gmp": GMPConfig(0.2), "redo": ReDoConfig(7), "reset": ResetConfig(7)}
    assert identity(replace(plain, weight_decay=0.1, density=0.5, networks="actor", **odd)) == identity(plain)
    for treatment in ("set", "gmp+weight-decay", "redo", "reset"):
        own = {treatment.split("+")[0]: odd[treatment.split("+")[0]]}
        assert identity(replace(plain, treatment=treatment, **own)) != identity(replace(plain, treatment=treatment))
    decayed = replace(plain, treatment="gmp+weight-decay")
    assert identity(replace(decayed, weight_decay=0.1)) != identity(decayed)


def test_single_task_line_needs_all_tasks_of_the_suite(tmp_path):
    for i, task in enumerate(SUITES["mt3"]):
        (cells,) = by_protocol(find([tmp_path])).values() if i else ([],)
        assert single_task(cells) == {}
        for seed in range(2 + i):
            config = Config(suite=task.name, treatment="dense", timesteps=400_000, seed=seed)
            write(tmp_path / f"{task.name}{seed}", config, 0.1 * i)
    (cells,) = by_protocol(find([tmp_path])).values()
    np.testing.assert_allclose(single_task(cells)["mt3"], [[0, 0.1, 0.2], [0, 0.1, 0.2]])


def test_published_run_is_small_says_the_same_and_names_no_path(tmp_path):
    config = Config(suite="mt5", treatment="set", timesteps=400_000, runs=tmp_path / "runs")
    write(tmp_path / "runs" / "a", config, 0.5)
    (run,) = find([tmp_path / "runs"])
    run.publish(tmp_path / "results")
    (published,) = find([tmp_path / "results"])
    assert published.folder == tmp_path / "results/mt5-mtppo-set-density0.05-block1/0-400000"
    assert published.finished and published.evaluated.iloc[-1]["score/mean"] == 0.5
    text = "".join(file.read_text() for file in published.folder.iterdir())
    assert str(tmp_path) not in text and "secret" not in text and "somewhere" not in text and "commit: abc" in text
    assert "loss/value" not in text  # of a timestep without evaluation


@pytest.mark.parametrize(("suite", "agent"), [("mt3", "mtppo"), ("mt10", "mtppo"), ("mt10", "mtsac")])
def test_a_run_that_is_evaluated_only_at_its_end_has_never_been_rewired(tmp_path, capsys, suite, agent):
    config = Config(suite=suite, agent=agent, treatment="dense", timesteps=500)
    write(tmp_path / "run", config, 0.5, steps=(500,))
    file = tmp_path / "run" / "metrics.csv"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(row for row in rows if "rewire_ms" not in row))
    ((protocol, cells),) = by_protocol(find([tmp_path])).items()
    show(protocol, cells)
    assert "0.500" in capsys.readouterr().out
