"""rl/envs/metaworld and its evaluation: MT10 as Meta-World has it, with seeds that repeat."""

import sys
from functools import partial

import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from rl.envs.metaworld import ACTIONS, MT10, OBSERVATIONS, STEPS, make_mt10, require_metaworld
from rl.episodes import evaluate_mt10, mt10_metrics
from rl.seeds import Stream, numpy_generator

SEED = 3


def test_a_missing_package_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(
        RuntimeError, match=r"needs Meta-World, but metaworld is missing: pip install 'sparsekern\[meta"
    ):
        make_mt10(SEED, num_workers=1)


@pytest.fixture(scope="module")
def envs():
    try:
        require_metaworld()
    except RuntimeError as error:
        pytest.skip(str(error))
    envs = make_mt10(SEED, num_workers=2)
    yield envs
    envs.close()


@pytest.fixture(scope="module")
def here(envs):
    """The environments of `envs` once more, in this process."""
    seeds = numpy_generator(SEED, Stream.GOALS).integers(2**31, size=len(MT10)).tolist()
    makers = [partial(task, seed) for task, seed in zip(MT10, seeds, strict=True)]
    here = SyncVectorEnv(makers, autoreset_mode="SameStep")
    yield here
    here.close()


@pytest.fixture(scope="module")
def scripted(envs):
    """Meta-World's own policies, which solve their tasks within about 100 steps; for observations [10, 49]."""
    from metaworld.policies import ENV_POLICY_MAP

    policies = [ENV_POLICY_MAP[f"{name}-v3"]() for name in envs.names]

    def act(observations):
        actions = [policy.get_action(row[:39]) for policy, row in zip(policies, observations, strict=True)]
        return np.clip(actions, -1, 1).astype(np.float32)

    return act


def test_tasks_are_meta_world_s_in_its_order(envs):
    from metaworld.env_dict import MT10_V3

    assert [f"{name}-v3" for name in envs.names] == list(MT10_V3)
    assert list(envs.get_attr("task_name")) == [maker.__name__ for maker in MT10_V3.values()]
    assert set(envs.get_attr("reward_function_version")) == {"v2"}
    assert [len(goals) for goals in envs.get_attr("tasks")] == [50] * 10


def test_observations_show_the_goal_and_the_task(envs, here):
    observations, _ = envs.reset(seed=0)
    assert observations in envs.observation_space
    assert envs.single_observation_space == here.single_observation_space == OBSERVATIONS
    assert envs.single_action_space == here.single_action_space == ACTIONS
    np.testing.assert_array_equal(observations[:, 39:], np.eye(10))
    assert (observations[:, 36:39] != 0).any(1).all()


@pytest.mark.filterwarnings("ignore:Constant")
def test_episodes_are_truncated_after_500_steps_and_success_does_not_end_them(envs, scripted):
    current, _ = envs.reset(seed=0)
    drawer = envs.names.index("drawer-close")
    successes = 0
    for step in range(1, STEPS + 1):
        current, _, terminated, truncated, infos = envs.step(scripted(current), mask=np.arange(10) == drawer)
        successes += infos["success"][drawer]
        assert not terminated.any()
        assert truncated[drawer] == infos["_final_obs"][drawer] == (step == STEPS)
    assert successes > 300


def test_seeds_repeat_everything(envs, here):
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 10, 4)).astype(np.float32)

    def play(envs, seeds):
        played = [envs.reset(seed=seeds)[0]]
        for step in actions:
            observations, rewards, *_ = envs.step(step)
            played += [observations, rewards]
        return [*played, envs.reset()[0]]  # and the next goals

    first = play(envs, range(10))
    for again in (play(envs, range(10)), play(here, list(range(10)))):  # after other episodes, and in another process
        for ours, theirs in zip(first, again, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    moved = [goals(first[0]) != goals(other) for other in (first[-1], envs.reset(seed=range(10, 20))[0])]
    assert np.any(moved, axis=(0, 2)).all()  # every task has more than one goal


@pytest.mark.parametrize("played", [0, 30])
def test_an_episode_draws_from_its_environments_stream_only_when_it_begins(here, played):
    """So evaluators may begin with any episode of a stream."""
    here.reset(seed=list(range(10)))
    generator = np.random.default_rng(played)
    for _ in range(played):
        here.step(generator.uniform(-1, 1, (10, 4)).astype(np.float32))
    following, _ = here.reset()
    here.reset(seed=list(range(10)))
    np.testing.assert_array_equal(here.reset()[0], following)


def test_every_environment_has_its_own_stream_and_every_run_its_own_goals(envs):
    envs.reset(seed=[7] * 10)
    assert len({generator.integers(2**62) for generator in envs.get_attr("np_random")}) == 1
    envs.reset(seed=0)
    assert len({generator.integers(2**62) for generator in envs.get_attr("np_random")}) == 10
    one, other = (MT10[0](seed).get_wrapper_attr("tasks") for seed in (SEED, SEED + 1))
    assert not {task.data for task in one} & {task.data for task in other}


@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("name", ["push", "pick-place"])
def test_contacts_looked_at_at_once_are_meta_world_s(here, scripted, name):
    index = [task.name for task in MT10].index(name)
    env, raw = here.envs[index], here.envs[index].unwrapped
    observation, _ = env.reset(seed=0)
    target, answers = raw._get_id_main_object(), []
    for _ in range(90):
        observation, *_ = env.step(scripted([observation] * 10)[index])
        answers.append(raw.touching_object(target))
        assert answers[-1] == type(raw).touching_object(raw, target)
    assert 0 < sum(answers) < 90


@pytest.mark.filterwarnings("ignore:Constant")
def test_evaluation_is_meta_world_s(envs, here, scripted):
    from metaworld.evaluation import evaluation

    episodes, clock = 2, 40

    def act(observations):
        actions = scripted(observations)
        actions[0] = 0  # reach is never solved
        return actions

    returns, solved = evaluate_mt10(envs, act, episodes, SEED, clock)
    assert not any(envs.get_attr("terminate_on_success"))

    seeds = numpy_generator(SEED, Stream.EVALUATION, clock).integers(2**31, size=10).tolist()
    for env, seed in zip(here.envs, seeds, strict=True):
        env.unwrapped.seed(seed)  # Meta-World's evaluation resets without a seed
    mean_success, mean_return, success, episode_returns = evaluation(Agent(act), here, episodes)
    metrics = mt10_metrics(envs.names, returns, solved)
    assert metrics["success/mean"] == pytest.approx(mean_success) and 0 < mean_success < 1
    assert np.mean(returns) == pytest.approx(mean_return, rel=1e-6)
    for name, of_task in zip(envs.names, returns, strict=True):
        assert metrics[f"success/{name}"] == success[f"{name}-v3"]
        np.testing.assert_allclose(of_task, episode_returns[f"{name}-v3"], rtol=1e-6)  # theirs are float32 sums
        assert metrics[f"return/{name}"] == pytest.approx(of_task.mean())
    assert metrics["success/reach"] == 0 and metrics["success/drawer-close"] == 1


class Agent:
    """What Meta-World's evaluation asks for."""

    def __init__(self, act):
        self.eval_action = act

    def reset(self, env_mask):
        pass


def goals(observations: np.ndarray) -> np.ndarray:
    return observations[:, 36:39]
