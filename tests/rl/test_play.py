"""rl/play.py and rl/evaluate.py: a run's agent, as its last checkpoint has it, is filmed and evaluated again."""

import os
import sys
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from rl import evaluate, play, run
from rl.algorithms import buffer, sac, train_ppo_mt10
from rl.config import Config, PPOConfig, SACConfig
from rl.envs.metaworld import MT10
from rl.run import trained

pytestmark = pytest.mark.usefixtures("small_sample")


@pytest.fixture
def small_sample(monkeypatch):
    """Metrics on a few observations: most of their time goes into a singular value decomposition."""
    monkeypatch.setattr(buffer, "BATCH", 64)


@pytest.fixture
def folder(tmp_path):
    """Of a finished run."""
    settings = Config(timesteps=200, evaluate_every=200, episodes=2, ppo=PPOConfig(rollout_steps=100, epochs=1))
    settings.save(tmp_path)
    run.train(settings, tmp_path, quiet=True)
    return tmp_path


def call(monkeypatch, module, *options):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])
    module.main()


def test_the_checkpoint_earns_what_the_runs_own_evaluation_says(folder):
    logged = pandas.read_csv(folder / "metrics.csv").groupby("name")["value"].last()
    with trained(folder) as trainer:
        assert trainer.clock == 200
        found = trainer.metrics(*trainer.play(trainer.policy()))
    assert {"score/mean", "success/MemoryS11", "return/LavaGapS7"} <= {*found}
    assert found == pytest.approx({name: logged[name] for name in found}, rel=1e-7)


def test_evaluate_prints_every_task_and_plays_as_many_episodes_as_asked(folder, monkeypatch, capsys):
    call(monkeypatch, evaluate, folder, "--episodes", "3", "--seed", "5")
    said = capsys.readouterr().out
    assert all(words in said for words in ("after 200 timesteps", "3 episodes", "LavaGapS7", "normalised", "mean"))


def test_the_agent_of_a_lottery_needs_its_ticket_no_more(tmp_path, monkeypatch, capsys):
    gmp = Config(treatment="gmp", density=0.2, timesteps=200, evaluate_every=100, episodes=1, ppo=PPOConfig(100, 1))
    lottery = replace(gmp, treatment="lottery", ticket=tmp_path / "gmp")
    for config in (gmp, lottery):
        folder = tmp_path / config.treatment
        folder.mkdir()
        config.save(folder)
        run.train(config, folder, quiet=True)
    with trained(tmp_path / "lottery") as trainer:
        learned = trainer.policy().state_dict()
    (tmp_path / "gmp").rename(tmp_path / "elsewhere")
    call(monkeypatch, evaluate, tmp_path / "lottery", "--seed", "5")
    assert "after 200 timesteps" in capsys.readouterr().out
    with trained(tmp_path / "lottery", seed=5) as trainer:
        found = trainer.policy().state_dict()
    assert all(torch.equal(found[name], learned[name]) for name in learned)


def test_intervals_of_known_draws():
    share = np.repeat([True, False], [10, 40])
    assert evaluate.interval_of_share(share) == pytest.approx((0.1124, 0.3304), abs=1e-4)  # Wilson's
    assert evaluate.interval_of_share(np.ones(25, bool)) == pytest.approx((0.8668, 1.0), abs=1e-4)
    assert evaluate.interval_of_mean(np.array([0.0, 1.0, 2.0])) == pytest.approx((1 - 1.96 / 3**0.5, 1 + 1.96 / 3**0.5))
    assert np.isnan(evaluate.interval_of_mean(np.array([1.0]))).all()


def test_a_film_shows_the_same_episodes_for_the_same_seed(folder, monkeypatch, capsys):
    films = []
    for seed in (0, 0, 1):
        video = folder / f"{len(films)}.gif"
        call(monkeypatch, play, folder, "--task", "LavaGapS7", "--video", video, "--episodes", "1", "--seed", seed)
        assert "episode 0: " in capsys.readouterr().out
        with Image.open(video) as film:
            assert film.size == (224, 224) and film.n_frames > 1  # 7 cells of 32 pixels; and the agent moves
        films.append(video.read_bytes())
    assert films[0] == films[1] != films[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "{}/a.gif"], "task must be one of LavaGapS7, RedBlueDoors-6x6, MemoryS11, got None"),
        (["--video", "{}/a.gif", "--task", "Empty"], "got Empty"),
        (["--video", "{}/film", "--task", "LavaGapS7"], "ends in .gif or .mp4, got .*film"),
        (["--video", "{}/none/a.gif", "--task", "LavaGapS7"], "folder that exists"),
        (["--video", "{}/a.gif", "--task", "LavaGapS7", "--episodes", "0"], "episodes must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_filmed_is_a_sentence(folder, monkeypatch, options, message):
    with pytest.raises(SystemExit, match=f"rl/play.py: .*{message}"):
        call(monkeypatch, play, folder, *(option.format(folder) for option in options))


def test_an_mp4_without_its_library_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(SystemExit, match=r"needs imageio: pip install 'sparsekern\[video\]', or write a .gif"):
        call(monkeypatch, play, folder, "--task", "LavaGapS7", "--video", folder / "a.mp4")


def test_an_mp4_is_written(tmp_path):
    pytest.importorskip("imageio_ffmpeg", reason="needs the extra video")
    import imageio

    frames = [np.full((192, 192, 3), 10 * i, np.uint8) for i in range(12)]
    play.write(tmp_path / "a.mp4", frames, fps=6)
    with imageio.get_reader(tmp_path / "a.mp4") as reader:
        brightness = [frame.mean() for frame in reader]
    assert len(brightness) == 12 and brightness == pytest.approx([10 * i for i in range(12)], abs=4)


@pytest.mark.parametrize("module", [play, evaluate])
def test_a_run_without_a_checkpoint_is_a_sentence(tmp_path, monkeypatch, module):
    Config().save(tmp_path)
    options = ["--task", "LavaGapS7", "--video", tmp_path / "a.gif"] if module is play else []
    with pytest.raises(SystemExit, match="has no checkpoint; a run has one from its first evaluation on"):
        call(monkeypatch, module, tmp_path, *options)


@pytest.mark.parametrize("agent", ["mtppo", "mtsac"])
def test_on_mt10_an_action_for_one_task_is_that_of_an_evaluation(tmp_path, agent):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    settings = Config(
        suite="mt10",
        agent=agent,
        treatment="dense",
        evaluators=0,
        sac=SACConfig(warmup=1, capacity=40, device="cpu"),
    )
    trainer = run.trainer_of(settings)(settings, tmp_path, quiet=True)
    try:
        observations = np.random.default_rng(0).normal(size=(10, 49)).astype(np.float32)
        actions = []
        trainer.envs.close()
        for task in (0, 7):
            actions.append(trainer.act(observations[task], task, np.random.default_rng(0)))
        best = sac.best if agent == "mtsac" else train_ppo_mt10.best
        expected = best(trainer.learners["actor"].network, observations)
    finally:
        trainer.close()
    np.testing.assert_allclose(actions, expected[[0, 7]], rtol=1e-5, atol=1e-6)


def test_mt10_is_filmed_upright(monkeypatch):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    if "DISPLAY" not in os.environ:
        monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))
    env = MT10[4](seed=0)
    env.reset(seed=0)
    try:
        with play.filming(env, mt10=True) as picture:
            frame = picture().astype(int)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert frame.shape == (play.MT10_SIZE, play.MT10_SIZE, 3)
    red, green, blue = np.moveaxis(frame, -1, 0)
    brown = (red > green + 15) & (green > blue + 8) & (red < 2 * green)  # the table's wood
    arm = (red > 80) & (red > 2.5 * green) & (red > 2.5 * blue)
    rows = np.arange(len(frame))[:, None]
    assert (rows * arm).sum() / arm.sum() < (rows * brown).sum() / brown.sum()  # the arm stands on the table
