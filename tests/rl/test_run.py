"""rl/run.py: the command line, seeds, checkpoints and resuming."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch

from rl import checkpoint, envs, run
from rl.agents import AGENTS
from rl.algorithms import buffer, train_ppo
from rl.config import Config, PPOConfig, ReDoConfig, ResetConfig, identity
from rl.envs.minigrid import Task
from rl.reporting.runs import find
from rl.run import new_folder

CHECKOUT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("small_sample")


@pytest.fixture
def small_sample(monkeypatch):
    """Metrics on a few observations: most of their time goes into a singular value decomposition."""
    monkeypatch.setattr(buffer, "BATCH", 64)


def short(runs, **changes):
    """A run of five fits and three evaluations."""
    ppo = PPOConfig(rollout_steps=100, epochs=2)
    settings = {"timesteps": 500, "evaluate_every": 200, "episodes": 1, "threads": 1}
    return replace(Config(runs=runs, ppo=ppo, **settings), **changes)


def metrics(folder):
    """What the run logged, but for times."""
    table = pandas.read_csv(folder / "metrics.csv")
    return table[~table["name"].str.startswith("time/")].reset_index(drop=True)


@pytest.mark.parametrize(
    ("agent", "treatment"),
    [
        ("mtppo", "dense"),
        ("mtppo", "set"),
        ("mtppo", "reset"),
        ("mtppo", "layer-norm"),
        ("mtppo", "gmp+weight-decay"),
        ("moe", "gmp+pcgrad"),
        ("moore", "redo"),
    ],
)
def test_same_seed_repeats_and_a_killed_run_resumes_to_the_same_metrics(tmp_path, monkeypatch, agent, treatment):
    often = {"redo": ReDoConfig(every=100, tau=0.2), "reset": ResetConfig(every=300)}
    settings = short(tmp_path, agent=agent, treatment=treatment, **often)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir(), killed.mkdir()
    run.train(settings, straight)
    expected = metrics(straight)
    names = {"score/mean", "success/MemoryS11", "return/LavaGapS7", "loss/policy"}
    names |= {"dormant/critic", "rank/actor", "fisher/actor"}
    assert names <= {*expected["name"]}
    assert sorted(expected["step"].unique()) == [100, 200, 300, 400, 500]

    fits, fit = [], train_ppo.fit

    def die_in_the_fourth_fit(*args):
        fits.append(args)
        if len(fits) == 4:
            raise KeyboardInterrupt
        return fit(*args)

    monkeypatch.setattr(train_ppo, "fit", die_in_the_fourth_fit)
    with pytest.raises(KeyboardInterrupt):
        run.train(settings, killed)
    pandas.testing.assert_frame_equal(metrics(killed), expected[expected["step"] <= 300])  # repeats so far
    assert checkpoint.load(killed)["clock"] == 200  # and goes on from before what it has logged
    run.train(settings, killed)
    pandas.testing.assert_frame_equal(metrics(killed), expected)


@pytest.mark.parametrize("agent", AGENTS)
def test_agents_learn_empty_rooms(tmp_path, monkeypatch, agent):
    rooms = (Task("Empty-5x5", 5, 100), Task("Empty-Random-5x5", 5, 100), Task("Empty-6x6", 7, 144))
    monkeypatch.setitem(envs.SUITES, "mt3", rooms)
    ppo = PPOConfig(rollout_steps=500, minibatch=64)
    settings = {"timesteps": 3500, "evaluate_every": 3500, "episodes": 10, "ppo": ppo}
    run.train(Config(agent=agent, treatment="dense", **settings), tmp_path, quiet=True)
    table = metrics(tmp_path).groupby("name")["value"]
    early = sum(table.first()[f"rollout/{task.name}"] for task in rooms) / 3
    assert early < 0.6 < 0.8 < table.last()["score/mean"]


def test_another_seed_gives_another_run(tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        run.train(short(tmp_path, treatment="dense", timesteps=100, seed=seed), tmp_path / str(seed))
    assert not metrics(tmp_path / "0").equals(metrics(tmp_path / "1"))


def test_interrupted_checkpoint_write_leaves_the_previous_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, {"clock": 1, "weights": torch.arange(3)})

    def die_halfway(state, path):
        Path(path).write_bytes(b"half a")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die_halfway)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"clock": 2, "weights": torch.arange(4)})
    assert checkpoint.load(tmp_path)["clock"] == 1


def test_folder_is_a_run_only_when_it_has_all_that_a_run_needs(tmp_path, monkeypatch):
    def die():
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "environment", die)
    with pytest.raises(KeyboardInterrupt):
        new_folder(short(tmp_path))
    assert find([tmp_path]) == []


def test_settings_survive_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "environment", lambda: "")  # it takes seconds
    settings = short(tmp_path, treatment="lottery", density=0.2, networks="actor", ticket=tmp_path)
    folder = new_folder(settings)
    assert Config.load(folder) == settings
    deviations = "rollout-steps100-epochs2-evaluate-every200-episodes1"
    assert folder.parent == tmp_path / f"mt3-mtppo-lottery-density0.2-block1-actor-{deviations}"
    with pytest.raises(ValueError, match="no run folder"):
        Config.load(tmp_path)


def command_line(*options, script=("rl/run.py",)):
    return subprocess.run([sys.executable, *script, *options], cwd=CHECKOUT, capture_output=True, text=True)


def test_command_line_prints_the_folder_first_and_the_tables_last(tmp_path):
    options = f"--suite mt3 --treatment set --block-size 4 --timesteps 300 --episodes 1 --runs {tmp_path}".split()
    done = command_line(*options)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[0])
    assert folder.parents[1] == tmp_path
    for name in ("config.json", "environment.txt", "metrics.csv", "tb", "checkpoints/last.pt"):
        assert (folder / name).exists()
    line = r"300 of 300 timesteps: score 0\.\d+, success 0\.\d+, density 0\.\d+, steps/s [\d,]+"
    assert re.fullmatch(line, done.stdout.splitlines()[1])  # no terminal, no bar: a line an evaluation
    for words in ("RedBlueDoors-6x6", "normalised", "live parameters", "bytes: weights", "steps per second"):
        assert words in done.stdout


def test_a_run_is_mirrored_to_wandb_from_before_its_first_event_and_goes_on_there(tmp_path, monkeypatch):
    told = []

    @contextmanager
    def init(**options):
        told.append((options["id"], options["resume"], options["sync_tensorboard"], options["config"]["seed"]))
        assert not (options["dir"] / "tb").exists() or len(told) > 1  # wandb watches the writers that are made later
        yield
        told.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    settings = short(tmp_path, timesteps=100, wandb=True, seed=7)
    folder = new_folder(settings)
    run.train(settings, folder, quiet=True)
    run.train(settings, folder, quiet=True)  # resumed, with nothing left to do
    assert told == [told[0], "finished", told[0], "finished"]
    assert told[0][1:] == ("allow", True, 7)
    assert identity(settings) == identity(replace(settings, wandb=False))


def test_wandb_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="--wandb needs the package wandb: pip install wandb"):
        run.require(short(tmp_path, wandb=True))


def test_mt10_without_metaworld_is_a_sentence_and_no_run(tmp_path):
    (tmp_path / "metaworld.py").write_text("raise ModuleNotFoundError('none', name='metaworld')")
    options = ["rl/run.py", "--suite", "mt10", "--runs", str(tmp_path / "runs")]
    path = os.pathsep.join([str(tmp_path), str(CHECKOUT)])
    done = subprocess.run(
        [sys.executable, *options], cwd=CHECKOUT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("rl/run.py: suite mt10 needs Meta-World, but metaworld is missing: pip install")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_sentence_and_no_run(tmp_path, monkeypatch):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    options = ["--suite", "mt10", "--agent", "mtsac", "--sac.device", "cuda", "--runs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["rl/run.py", *options])
    with pytest.raises(SystemExit, match="--sac.device cuda needs an NVIDIA GPU, but torch .* sees none"):
        run.main()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("suite", "evaluate_every", "episodes", "prune_every"), [("mt3", 10_000, 25, 500), ("mt10", 20_000, 50, 5000)]
)
def test_command_line_evaluates_as_the_paper_does_on_each_suite(
    tmp_path, monkeypatch, suite, evaluate_every, episodes, prune_every
):
    if suite == "mt10":
        pytest.importorskip("metaworld", reason="needs the extra metaworld")
    monkeypatch.setattr(run, "environment", lambda: "")  # it takes seconds
    monkeypatch.setattr(sys, "argv", ["rl/run.py", "--suite", suite, "--runs", str(tmp_path)])
    _, config = run.chosen_run()
    assert (config.suite, config.evaluate_every, config.episodes) == (suite, evaluate_every, episodes)
    assert config.gmp.update_every == prune_every


def test_a_run_that_lost_its_checkpoint_keeps_its_metrics(tmp_path, monkeypatch):
    folder = new_folder(short(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "fit", lambda *args: sys.exit("before any evaluation"))
        with pytest.raises(SystemExit):
            run.train(Config.load(folder), folder, quiet=True)
    run.require_checkpoint(folder, Config.load(folder))  # which begins anew, and loses nothing
    run.train(Config.load(folder), folder, quiet=True)
    written = (folder / "metrics.csv").read_bytes()

    checkpoint.path(folder).rename(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "argv", ["run.py", "--resume", str(folder)])
    with pytest.raises(SystemExit, match="the run was evaluated, but has no checkpoint"):
        run.main()
    assert (folder / "metrics.csv").read_bytes() == written

    (tmp_path / "elsewhere").rename(checkpoint.path(folder))
    (folder / "metrics.csv").write_bytes(written[:100])
    with pytest.raises(ValueError, match=f"must have the {len(written)} bytes of the run's checkpoint, got 100"):
        run.train(Config.load(folder), folder, quiet=True)
    assert (folder / "metrics.csv").read_bytes() == written[:100]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--suite", "mt9"], ["mt9", "mt3", "mt5", "mt7"]),
        (["--treatment", "sett"], ["sett", "dense", "gmp", "set"]),
        (["--block-size", "3"], ["'3'", "16", "128"]),
        (["--block-sise", "4"], ["--block-size"]),
        (["--density", "5"], ["density", "(0, 1]", "5"]),
        (["--timesteps", "0"], ["timesteps", "at least 1", "0"]),
        (["--suite", "mt10", "--workers", "11"], ["workers", "1..10", "11"]),
        (["--suite", "mt10", "--agent", "mtsac", "--sac.warmup", "0"], ["sac.warmup", "at least 1", "0"]),
        (["--ppo.rollout-steps", "0"], ["ppo.rollout_steps", "at least 1", "0"]),
        (["--treatment", "redo", "--redo.every", "0"], ["redo.every", "at least 1", "0"]),
        (["--set.drop-fraction", "1.5"], ["set.drop_fraction", "[0, 1]", "1.5"]),
        (["--treatment", "gmp", "--gmp.start", "0.9"], ["gmp.start", "at most gmp.end", "0.9 and 0.8"]),
        (["--runs", __file__], ["Not a directory", "test_run.py"]),
        (["--treatment", "lottery", "--ticket", "runs/none"], ["runs/none", "no run folder"]),
        (["--resume", "runs/none", "--seed", "3"], ["--resume", "no other option"]),
        (["--resume", "runs/none"], ["runs/none", "no run folder"]),
    ],
)
def test_wrong_command_line_says_what_is_allowed(options, words):
    done = command_line(*options, script=("-m", "rl.run"))
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert all(word in said for word in words), said
    assert "Traceback" not in said
