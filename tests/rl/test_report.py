"""rl/report.py and rl/reporting: the statistics by hand, and that only comparable finished runs are compared."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro

from rl.config import Config, GMPConfig, PPOConfig, ReDoConfig, ResetConfig, SETConfig, identity
from rl.envs import SUITES
from rl.reporting import paper
from rl.reporting.cells import by_protocol, protocol_title, reference
from rl.reporting.conclusions import conclusions, verdict
from rl.reporting.curves import SCALES
from rl.reporting.figures import draw, figures
from rl.reporting.page import write as write_page
from rl.reporting.runs import find
from rl.reporting.statistics import band, improvement, interval, iqm, profile
from rl.reporting.tables import show, single_task, with_interval

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
    assert [picture.name for picture in pictures] == [
        "1-mt5-scores.png",
        "1-mt5-mtppo-tasks.png",
        "1-mt5-mtppo.png",
    ]
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
    line, few = conclusions(cells)
    assert line == (
        "mt5 mtppo: set - dense = +0.100 (10 and 10 seeds). A run of set scores higher than one of dense with "
        "probability 1.00 [1.00, 1.00], task by task 1.00 [1.00, 1.00]. Paper +0.15: the paper's order appears"
    )
    assert few == "Fewer than 10 seeds, and so no statement about treatments: mt5 mtppo gmp (9)"


def test_nothing_is_compared_with_a_dense_network_of_nine_seeds(tmp_path):
    cells = cells_of(tmp_path, {"dense": 9, "set": 10}, dense=0.6, set=0.7)
    (few,) = conclusions(cells)
    assert "order" not in few and "mt5 mtppo dense (9)" in few and "set" not in few
    assert "mt5-mtppo-improvement" not in figures(Config(timesteps=400_000), cells)


def test_paper_without_a_difference_has_no_order(tmp_path):
    for treatment, score in (("dense", 0.5), ("reset", 0.6)):
        for seed in range(10):
            config = Config(treatment=treatment, timesteps=400_000, seed=seed)
            write(tmp_path / f"{treatment}{seed}", config, score)
    (cells,) = by_protocol(find([tmp_path])).values()
    (line,) = conclusions(cells)
    assert line.startswith("mt3 mtppo: reset - dense = +0.100 (10 and 10 seeds)")
    assert line.endswith("Paper +0.00: the paper sees no difference")


def test_a_pair_is_undecided_while_its_interval_holds_one_half():
    assert verdict(0.5, 0.9, 0.16) == verdict(0.2, 0.8, 0) == "undecided, since the interval holds one half"
    assert verdict(0.51, 0.9, 0.16) == verdict(0.1, 0.4, -0.01) == "the paper's order appears"
    assert verdict(0.51, 0.9, -0.01) == verdict(0.1, 0.4, 0.16) == "the opposite of the paper's order appears"


def test_probability_of_improvement_counts_pairs_of_runs_and_half_of_ties():
    low, high = np.array([[0.1, 0.2], [0.2, 0.3]]), np.array([[0.4, 0.5], [0.5, 0.6], [0.6, 0.7]])
    assert improvement(high, low) == (1, 1, 1) and improvement(low, high) == (0, 0, 0)
    assert improvement(low, low)[0] == 0.5
    assert improvement(np.array([[2.0], [0.0]]), np.array([[1.0], [0.0]]))[0] == 2.5 / 4
    scores = np.random.default_rng(0).normal(size=(2, 200, 1))
    chance, lowest, highest = improvement(scores[0] + 1, scores[1])
    assert lowest < 0.76 < highest and lowest < chance < highest  # of normal scores one deviation apart: 0.760
    assert highest - lowest == pytest.approx(0.095, abs=0.02)


def test_a_profile_is_the_share_of_scores_above_each_level():
    scores = np.array([[0.2, 0.9], [0.2, 0.5]])
    share, (low, high) = profile(scores, np.array([0, 0.2, 0.6, 0.9]))
    assert share.tolist() == [1, 0.5, 0.25, 0]
    assert low.tolist() == [1, 0.5, 0, 0] and high.tolist() == [1, 0.5, 0.5, 0]  # each task's runs are redrawn


def test_a_band_redraws_whole_runs():
    low, high = band(np.array([[0.0, 1, 3], [0, 2, 3]]))
    assert low.tolist() == [0, 1, 3] and high.tolist() == [0, 2, 3]


def test_the_iqm_of_fewer_than_four_numbers_is_named_a_mean():
    assert with_interval(np.array([[0.25], [0.5], [0.75]])) == "mean 0.500 [0.250, 0.750]"
    assert with_interval(np.array([[0.0], [0.5], [0.5], [0.5]])).startswith("IQM 0.500 [")
    assert with_interval(np.array([[0.0, 0.5, 0.5, 0.5]])) == "IQM 0.500"


def axes_of(figure):
    return {axis.get_title(): axis for axis in figure.axes}


def test_a_share_of_dormant_neurons_is_drawn_on_a_scale_that_makes_no_cliff_of_a_thousandth(tmp_path):
    config = Config(suite="mt5", treatment="dense", timesteps=400_000)
    write(tmp_path / "run", config, 0.5)
    file = tmp_path / "run" / "metrics.csv"
    file.write_text(file.read_text().replace("dormant/actor,1", "dormant/actor,0.001"))
    ((protocol, cells),) = by_protocol(find([tmp_path])).items()
    drawn = figures(protocol, cells)
    metrics, tasks = axes_of(drawn["mt5-mtppo"]), axes_of(drawn["mt5-mtppo-tasks"])
    assert metrics["dormant neurons, actor"].get_ylim() == SCALES["dormant"]
    assert metrics["dormant neurons, critic"].get_ylim()[1] > 1  # of which all are dormant
    assert [*tasks] == [task.name for task in SUITES["mt5"]]
    for axis in tasks.values():
        (line,) = axis.get_lines()
        assert line.get_ydata().tolist() == [0, 0.5]


def test_a_band_lies_within_its_panel(tmp_path):
    cells = cells_of(tmp_path, {"dense": 2}, dense=0.5)
    file = cells[0].runs[0].folder / "metrics.csv"
    file.write_text(file.read_text().replace("dormant/actor,1", "dormant/actor,0.2"))
    axis = axes_of(figures(Config(timesteps=400_000), cells)["mt5-mtppo"])["dormant neurons, actor"]
    (line,), (shade,) = axis.get_lines(), axis.collections
    assert line.get_ydata().tolist() == [0.6, 0.6]
    assert shade.get_paths()[0].vertices[:, 1].max() == 1 < axis.get_ylim()[1]


def marks(figure):
    """Positions of the points of a figure's only axes, by what the legend calls them."""
    found = {}
    for line in figure.axes[0].get_lines():
        found.setdefault(line.get_label(), []).extend(line.get_xdata())
    return found


def test_figures_of_scores_show_the_runs_and_the_paper_and_call_the_mean_of_three_so(tmp_path):
    cells = cells_of(tmp_path, {"dense": 10, "set": 10, "gmp": 3}, dense=0.6, set=0.7, gmp=0.9)
    drawn = figures(Config(timesteps=400_000), cells)
    scores = marks(drawn["mt5-scores"])
    np.testing.assert_allclose(scores["IQM of runs, 95% interval"], [0.6, 0.7])
    np.testing.assert_allclose(scores["mean of fewer than four runs"], [0.9])
    assert scores["paper, 30 seeds, 95% interval"] == [0.65, 0.81, 0.80]
    assert marks(drawn["mt5-mtppo-improvement"])["of runs' means over tasks"] == [1]
    profiles = {line.get_label(): line for line in drawn["mt5-mtppo-profiles"].axes[0].get_lines()}
    assert [*profiles] == ["dense (10 seeds)", "set (10 seeds)"]  # three runs have no distribution
    assert profiles["dense (10 seeds)"].get_ydata().tolist() == [1.0] * 60 + [0.0] * 41


class Page(HTMLParser):
    """Reads a page: text, identities, what it refers to, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.text, self.references, self.names, self.open, self.tags = "", [], [], [], []
        self.feed(text)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attributes:
            self.references += [value] * (name in ("src", "href", "xlink:href", "data"))
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
            self.names += [value] * (name == "id")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_is_one_file_with_every_runs_command_and_commit_and_no_reference_outside(tmp_path):
    cells_of(tmp_path / "runs", {"dense": 10, "set": 10, "gmp": 3}, dense=0.6, set=0.7, gmp=0.9)
    write(tmp_path / "runs" / "unfinished", Config(seed=77, treatment="redo"), 0.5, steps=(10_000,))
    for run in find([tmp_path / "runs"]):
        file = run.folder / "environment.txt"
        file.write_text(file.read_text().replace("abc", f"commit-of-{run.folder.name}"))
    command = [sys.executable, "rl/report.py", tmp_path / "runs", "--html", tmp_path / "new" / "report.html"]
    subprocess.run(command, cwd=RESULTS.parents[2], check=True, capture_output=True)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]
    text = (tmp_path / "new" / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.tags.count("svg") == 5 and "@import" not in text
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.names)
    assert len(page.names) == len(set(page.names))
    for run in find([tmp_path / "runs"]):
        assert run.command in page.text
        assert run.commit in page.text or not run.finished
    for sentence in ("the paper's order appears", "mean 0.900", "Fewer than 10 seeds", "--seed 77"):
        assert sentence in page.text
    assert page.text.count("the paper's order appears") == 1  # gmp has three seeds


@pytest.mark.parametrize("run", find([RESULTS]), ids=lambda run: f"{run.folder.parent.name}-{run.config.seed}")
def test_the_command_of_a_committed_run_makes_the_same_run(run):
    options = run.command.removeprefix("python rl/run.py ").split()
    assert identity(tyro.cli(Config, args=options)) == identity(run.config)


def test_a_command_says_no_and_none(tmp_path):
    config = Config(suite="mt10", agent="mtsac", treatment="dense")
    config = replace(config, sac=replace(config.sac, clip=None, time_out_ends=False))
    write(tmp_path / "run", config, 0.5)
    (run,) = find([tmp_path])
    assert run.command == (
        "python rl/run.py --suite mt10 --agent mtsac --treatment dense --seed 0 --timesteps 100000 "
        "--sac.clip None --sac.no-time-out-ends"
    )
    assert identity(tyro.cli(Config, args=run.command.split()[2:])) == identity(config)


def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    file = tmp_path / "report.html"
    file.write_text("old")
    with pytest.raises(IndexError):
        write_page({Config(): []}, [], file)
    assert file.read_text() == "old"


def test_a_folder_without_a_finished_run_makes_no_page(tmp_path):
    command = [sys.executable, "rl/report.py", tmp_path, "--html", tmp_path / "report.html"]
    done = subprocess.run(command, cwd=RESULTS.parents[2], capture_output=True, text=True)
    assert done.returncode == 1 and f"no finished run in {tmp_path}" in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_success_is_not_repeated_as_a_score_on_mt10(tmp_path, capsys):
    config = Config(suite="mt10", agent="mtsac", treatment="dense", timesteps=2_000_000)
    write(tmp_path / "run", config, 0.5, steps=(20_000, 2_000_000))
    ((protocol, cells),) = by_protocol(find([tmp_path])).items()
    show(protocol, cells)
    printed = capsys.readouterr().out
    assert "success after 2,000,000 timesteps" in printed and "score" not in printed
    metrics = axes_of(figures(protocol, cells)["mt10-mtsac"])
    assert "success" in metrics and "normalised score" not in metrics


def test_runs_of_gmp_on_mt10_prune_as_the_paper_does_and_committed_ones_as_they_did(tmp_path):
    assert Config(suite="mt10", agent="mtsac", treatment="gmp").gmp.update_every == 5000
    assert Config(treatment="gmp").gmp.update_every == 500
    committed = [run for run in find([RESULTS]) if run.config.suite == "mt10" and run.config.treatment == "gmp"]
    every = {20_000: 500, 50_000: 5000}  # by length: the shorter ones are older than the default
    assert {run.config.timesteps for run in committed} == {*every}
    for run in committed:
        assert run.config.gmp.update_every == every[run.config.timesteps]
        assert run.folder.parent.name == run.config.experiment  # a run of today has another folder
    committed = [run for run in committed if run.config.timesteps == 20_000]
    dense = RESULTS / "mt10-mtsac-dense-warmup500-evaluate-every10000-episodes25" / "0-20000"  # as long as those
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
    ticket = replace(plain, treatment="lottery", ticket=tmp_path)
    assert identity(replace(ticket, gmp=odd["gmp"])) != identity(ticket)  # it is the ticket's
    every = replace(ticket, gmp=GMPConfig(update_every=7))
    assert every.experiment == "mt3-mtppo-lottery-density0.05-block1-every7"
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


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"suite": "mt3", "speed": 9}', '{"suite": "mt4"', '{"density": 7}'])
def test_settings_that_cannot_be_read_cost_their_own_run_only(tmp_path, text):
    write(tmp_path / "good", Config(timesteps=400_000), 0.5)
    (tmp_path / "good" / "environment.txt").unlink()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(text)
    with pytest.warns(UserWarning, match="left out: .*bad/config.json does not hold a run's settings"):
        (run,) = find([tmp_path])
    assert run.folder.name == "good" and run.commit == "unknown"


def test_core_minutes_count_threads(tmp_path):
    for threads in (1, 2):
        write(tmp_path / str(threads) / "run", Config(timesteps=400_000, threads=threads), 0.5)
    one, two = (by_protocol(find([tmp_path / str(threads)])).values() for threads in (1, 2))
    ((one,),), ((two,),) = one, two
    assert two.core_minutes == 2 * one.core_minutes


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
