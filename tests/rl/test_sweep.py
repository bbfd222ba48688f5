"""rl/sweep.py: which runs a grid has, and that finished and interrupted ones are recognised."""

import os
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import killed
import pytest

from rl import checkpoint, run, sweep
from rl.algorithms import train_ppo
from rl.config import Config, PPOConfig, identity
from rl.reporting.runs import find
from rl.run import new_folder
from rl.sweep import Sweep, run_all

CHECKOUT = Path(__file__).resolve().parents[2]


def test_grid_counts_options_of_sparse_treatments_for_these_only():
    grid = Sweep(treatments=("dense", "redo", "set"), densities=(0.05, 0.2), block_sizes=(1, 16), seeds=(4, 7)).cells()
    assert [cell.seed for cell in grid] == 6 * [4] + 6 * [7]
    assert [cell.experiment for cell in grid[:6]] == [
        "mt5-mtppo-dense",
        "mt5-mtppo-redo",
        *(f"mt5-mtppo-set-density{density}-block{block}" for density in (0.05, 0.2) for block in (1, 16)),
    ]
    assert len(Sweep(treatments=("dense", "redo"), networks=("actor", "critic"), seeds=(0,)).cells()) == 3


def test_any_option_of_a_run_can_be_varied_and_is_in_the_name_of_its_runs():
    grid = Sweep(treatments=("dense", "set"), seeds=(0,), vary=("set.drop-fraction=0.1,0.3", "ppo.epochs=2")).cells()
    assert [(cell.experiment, cell.set.drop_fraction, cell.ppo.epochs) for cell in grid] == [
        ("mt5-mtppo-dense-epochs2", 0.1, 2),  # whose drop fraction means nothing, so it counts once
        ("mt5-mtppo-set-density0.05-block1-drop-fraction0.1-epochs2", 0.1, 2),
        ("mt5-mtppo-set-density0.05-block1-epochs2", 0.3, 2),  # the default
    ]
    assert grid[0].timesteps == 400_000


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("set.drop-fraction", "takes OPTION=VALUE,VALUE.*got 'set.drop-fraction'"),
        ("--set.drop-fraction=0.1", "takes OPTION=VALUE,VALUE.*got '--set"),
        ("block-size=1,16", "takes options that a sweep has no other place for, got 'block-size=1,16'"),
    ],
)
def test_what_cannot_be_varied_is_a_sentence(monkeypatch, vary, message):
    monkeypatch.setattr(sys, "argv", ["sweep.py", f"--vary={vary}"])
    with pytest.raises(SystemExit, match=f"rl/sweep.py: --vary {message}"):
        sweep.main()


def test_a_length_of_zero_is_refused_and_not_taken_for_the_papers():
    with pytest.raises(ValueError, match="timesteps must be at least 1, got 0"):
        Sweep(timesteps=0).cells()


def test_a_sweep_of_mt10_has_the_papers_length_and_its_workers():
    (cell,) = Sweep(suites=("mt10",), agents=("mtsac",), treatments=("dense",), seeds=(0,), workers=3).cells()
    assert (cell.timesteps, cell.workers) == (2_000_000, 3)
    with pytest.raises(ValueError, match="--workers are of mt10's runs; --parallel is the number of runs, got 2"):
        Sweep(workers=2).cells()


@contextmanager
def in_this_process(address, parallel):
    """As sweep.launching."""

    def launch(job):
        launched = Future()
        launched.set_result(sweep.train(job))
        return launched

    yield launch


def test_sweep_resumes_interrupted_runs_and_does_not_repeat_finished_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "launching", in_this_process)
    monkeypatch.setattr(run, "environment", lambda: "")  # it takes seconds
    trained, train = [], run.train

    def count(config, folder, quiet):
        state = checkpoint.load(folder)
        trained.append((config.seed, state["clock"] if state else 0))
        train(config, folder, quiet)

    monkeypatch.setattr(sweep, "train_one", count)
    ppo = PPOConfig(rollout_steps=100, epochs=1)
    base = Config(treatment="dense", timesteps=200, evaluate_every=100, episodes=1, ppo=ppo, runs=tmp_path / "runs")
    cells = [replace(base, seed=seed) for seed in range(3)]
    options = Sweep(runs=tmp_path / "runs", results=tmp_path / "results")

    broken, rollouts = new_folder(cells[1]), []

    def die(*args, **kwargs):
        if rollouts:
            raise RuntimeError("out of memory, say")
        rollouts.append(collect(*args, **kwargs))
        return rollouts[0]

    collect = train_ppo.collect_minigrid
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "collect_minigrid", die)
        assert run_all([cells[1]], options) == 1  # the sweep survives
    assert checkpoint.load(broken)["clock"] == 100

    begun = new_folder(cells[0])
    os.utime(begun / "config.json", (time.time() - 3600,) * 2)
    states = [sweep.state(sweep.furthest(options).get(identity(cell))) for cell in cells]
    assert states[0][:3] == ("begun", "0", "") and states[0][3].startswith("1:00:")
    assert states[1][:2] == ("failed", "100") and 0 <= float(states[1][2]) <= 1
    assert states[1][3] == "RuntimeError: out of memory, say"
    assert states[2] == ("to do", "", "", "")

    assert run_all(cells[:2], options) == 0
    assert not (broken / sweep.FAILURE).exists()
    assert trained == [(1, 0), (0, 0), (1, 100)]
    for made in find([tmp_path / "runs"]):
        assert made.finished
        made.folder.rename(tmp_path / f"elsewhere{made.config.seed}")  # only the published results are left
    assert sweep.state(sweep.furthest(options)[identity(cells[1])])[:2] == ("done", "200")
    assert run_all(cells, options) == 0
    assert trained[3:] == [(2, 0)]
    assert [made.config.seed for made in find([tmp_path / "results"]) if made.finished] == [0, 1, 2]


@pytest.mark.parametrize("address", [None, "local"])
def test_killed_process_fails_its_own_run_only(tmp_path, monkeypatch, capsys, address):
    if address:
        pytest.importorskip("ray", reason="Ray, of the extra `cluster`, is not installed")
        monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the token of its own cluster
        monkeypatch.setattr(sweep, "CHECKOUT", Path(killed.__file__).parent)  # its processes must find what follows
    monkeypatch.setattr(sweep, "train", killed.killed_of_seed_1)
    cells = Sweep(seeds=(1, 2), treatments=("dense",), runs=tmp_path / "runs").cells()
    options = Sweep(parallel=1, address=address, runs=tmp_path / "runs", results=tmp_path / "results")
    assert run_all(cells, options) == 1
    assert [made.config.seed for made in find([tmp_path / "results"])] == [2]
    assert "mt5-mtppo-dense, seed 1 failed" in capsys.readouterr().err
    sweep.show(cells, options)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "mt5-mtppo-dense" in line]
    assert [(row[3], " ".join(row[5:7])) for row in rows] == [("1", "to do"), ("2", "done │")]


@pytest.fixture
def two_machines(tmp_path, monkeypatch):
    """Address of a Ray cluster of two nodes with one core each, on this machine."""
    pytest.importorskip("ray", reason="Ray, of the extra `cluster`, is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a Cluster makes no token for itself
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_a_sweep_uses_both_machines_of_a_cluster(tmp_path, monkeypatch, two_machines):
    monkeypatch.setattr(sweep, "CHECKOUT", Path(killed.__file__).parent)  # its processes must find what follows
    monkeypatch.setattr(sweep, "train", killed.met_by_both_seeds)
    cells = Sweep(seeds=(1, 2), treatments=("dense",), runs=tmp_path / "runs").cells()
    options = Sweep(address=two_machines, runs=tmp_path / "runs", results=tmp_path / "results")
    assert run_all(cells, options) == 0
    nodes = {(made.folder / "node.txt").read_text() for made in find([tmp_path / "runs"])}
    assert len(nodes) == 2
    assert [made.config.seed for made in find([tmp_path / "results"]) if made.finished] == [1, 2]


def test_run_folders_mean_the_same_to_a_process_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {cell.runs for cell in Sweep(runs=Path("here")).cells()} == {tmp_path / "here"}


def test_address_without_ray_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r"--address needs Ray: pip install 'sparsekern\[cluster\]'"):
        sweep.launching("auto", parallel=2).__enter__()


def test_a_ray_that_lacks_a_module_is_not_said_to_be_missing(monkeypatch, tmp_path):
    (tmp_path / "ray.py").write_text("import a_module_that_ray_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_ray_needs"):
        sweep.launching("auto", parallel=2).__enter__()


def test_a_lottery_draws_its_tickets_first_and_lacks_only_those_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "launching", in_this_process)
    monkeypatch.setattr(run, "environment", lambda: "")  # it takes seconds
    ran = []

    def train(config, folder, quiet):
        ran.append((config.treatment, config.seed))
        if ran[-1] == ("gmp", 1):
            raise RuntimeError("out of memory, say")
        run.train(config, folder, quiet)

    monkeypatch.setattr(sweep, "train_one", train)
    short = "--timesteps 200 --vary ppo.rollout-steps=100 ppo.epochs=1 evaluate-every=200 episodes=1 gmp.end=0.5"

    def sweep_of(runs, treatments, seeds):
        options = f"--treatments {treatments} --seeds {seeds} --suites MultiRoom-N2-S4 --runs {tmp_path / runs} "
        options += f"--results {tmp_path / 'results'} {short}"
        monkeypatch.setattr(sys, "argv", ["sweep.py", *options.split()])
        with pytest.raises(SystemExit) as ended:
            sweep.main()
        return ended.value.code

    assert sweep_of("published", "gmp", "0") == 0
    (committed,) = tmp_path.glob("results/*gmp*/*/metrics.csv")
    committed.write_text(committed.read_text().replace("0.", "0.0"))  # whose other commit gave other numbers
    text = committed.read_text()

    said = sweep_of("runs", "lottery", "0 1")  # the committed run has no checkpoint that one could draw from
    assert said == "2 runs failed; the same command tries them again"
    assert ran == [("gmp", 0), ("gmp", 0), ("gmp", 1), ("lottery", 0)]
    shown = capsys.readouterr()
    assert "of seed 1 in" in shown.err
    states = [[cell.strip() for cell in line.split("│")[2:4]] for line in shown.out.splitlines() if "│ Multi" in line]
    assert states[-4:-2] == [["0", "done"], ["1", "failed"]]  # of gmp, before those of lottery
    assert committed.read_text() == text
    assert [made.config.gmp.end for made in find([tmp_path / "runs"])] == [0.5] * 3

    del ran[:]
    assert sweep_of("runs", "gmp lottery", "0") == 0 and ran == []  # all is there


def test_a_run_before_its_first_evaluation_has_a_state(tmp_path):
    folder = new_folder(Config(runs=tmp_path))
    (made,) = find([tmp_path])
    assert sweep.state(made)[:3] == ("begun", "0", "")
    (folder / "metrics.csv").write_text("step,name,value\n2000,loss/value,0.5\n")
    (made,) = find([tmp_path])
    assert sweep.state(made)[:3] == ("begun", "2,000", "")


def test_suites_that_do_not_fit_the_agents_are_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--suites", "mt5", "mt10", "--agents", "mtsac"])
    with pytest.raises(SystemExit, match="rl/sweep.py: agent mtsac belongs to suite mt10, got mt5"):
        sweep.main()


def test_command_trains_in_processes_of_its_own(tmp_path):
    command = "rl/sweep.py --suites MultiRoom-N2-S4 --treatments dense set --seeds 3 --timesteps 100 --parallel 2"
    command += f" --runs {tmp_path}/runs --results {tmp_path}/results"
    done = subprocess.run([sys.executable, *command.split()], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 runs: 0 finished, 2 to do" in done.stdout and done.stdout.count("│ done") == 2
    assert sorted(made.config.treatment for made in find([tmp_path / "results"]) if made.finished) == ["dense", "set"]
