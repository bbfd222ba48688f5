"""PPO on MT10: Gaussian policy, linear baseline, rollouts and fits against their definitions, runs that resume."""

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import sparsekern as sk
from rl import checkpoint, run
from rl.agents import AGENTS
from rl.agents.encoder import StateEncoder
from rl.agents.neurons import activity, hidden_layers
from rl.algorithms import buffer, gaussian, train_ppo_mt10, trainer_mt10
from rl.algorithms.baseline import RIDGE, LinearBaseline
from rl.algorithms.buffer import PlasticityBuffer
from rl.algorithms.rollout import TASKS, MT10Rollout, collect_mt10, episode_sums
from rl.algorithms.train_ppo_mt10 import MT10, baseline_advantages, best, fit, make_learner
from rl.config import Config, GMPConfig, MT10PPOConfig, ReDoConfig, ResetConfig, SETConfig, identity
from rl.metrics import fisher_trace
from rl.reporting.runs import find
from rl.treatments.redo import matrices

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "rl"
WIDTH = 40
GOALS = torch.linspace(-0.5, 0.5, 40).view(10, 4).numpy()  # the actions that the ten tasks want


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Metrics on a few observations, and networks of a tenth of their width."""
    monkeypatch.setattr(buffer, "BATCH", 64)
    monkeypatch.setattr(StateEncoder, "neurons", (WIDTH, WIDTH, WIDTH))


class FakeEnvs:
    """As MT10's Workers: noisy observations, reward for being near a task's own action, episodes cut at `length`."""

    num_envs = 10

    def __init__(self, seed=0, num_workers=1, length=20):
        self.length, self.ending, self.closed = length, False, False

    def reset(self, *, seed):
        assert len(seed) == 10
        self.generators, self.now = [np.random.default_rng(s) for s in seed], np.zeros(10, int)
        return self.show(), {}

    def show(self):
        noise = np.stack([generator.normal(size=3) for generator in self.generators])
        return np.hstack([noise, np.zeros((10, 36)), np.eye(10)]).astype(np.float32)

    def step(self, actions, mask=None):
        assert actions.shape == (10, 4) and np.abs(actions).max() <= 1
        assert mask is None or self.ending
        self.now += 1
        error = np.square(actions - GOALS).sum(1)
        solved = error < 0.1
        truncated = self.now == self.length
        following, done = self.show(), truncated | (solved if self.ending else False)
        shown = np.where(done[:, None], self.show(), following)
        self.now[done] = 0
        infos = {"final_obs": following, "_final_obs": done, "success": np.float32(solved)}
        return shown, -error, np.zeros(10, bool), truncated, infos

    def call(self, name, value):
        assert name == "toggle_terminate_on_success"
        self.ending = value

    def close(self):
        self.closed = True


SHORT = Config(
    suite="mt10",
    treatment="dense",
    timesteps=100,
    evaluate_every=40,
    episodes=1,
    evaluators=0,
    ppo_mt10=MT10PPOConfig(rollout_steps=20, epochs=2, minibatches=4),
    gmp=GMPConfig(update_every=20),
    set=SETConfig(update_every=20),
    redo=ReDoConfig(every=20, tau=0.3),
    reset=ResetConfig(every=40),
)


def trained(folder, settings):
    """A run's metrics, but for times."""
    folder.mkdir(exist_ok=True)
    settings.save(folder)
    run.train(settings, folder, quiet=True)
    return measured(folder)


def measured(folder):
    table = pandas.read_csv(folder / "metrics.csv")
    return table[~table["name"].str.startswith("time/")].reset_index(drop=True)


def actor_of(agent, treatment="dense", observations=64, **settings):
    """A learner, and the 64 observations and tasks that its buffer holds."""
    seen = PlasticityBuffer((49,), torch.float32)
    seen.add(torch.randn(observations, 49), torch.arange(observations) % 10)
    config = replace(SHORT, agent=agent, treatment=treatment, **settings)
    return make_learner(config, seen), seen.observations, seen.tasks


def test_log_density_and_entropy_are_those_of_independent_normals():
    outputs, actions = 3 * torch.randn(30, 8, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    outputs[0, 4], outputs[1, 5] = -25.0, 7.0  # beyond what standard deviations may be
    actions[0] = outputs[0, :4]
    outputs.requires_grad_()
    normal = torch.distributions.Normal(outputs[:, :4], outputs[:, 4:].clamp(-20, 2).exp())
    for ours, plain in (
        (gaussian.log_probs(outputs, actions), normal.log_prob(actions).sum(1)),
        (gaussian.entropies(outputs), normal.entropy().sum(1)),
    ):
        torch.testing.assert_close(ours, plain)
        torch.testing.assert_close(
            *(torch.autograd.grad(of.sum(), outputs, retain_graph=True)[0] for of in (ours, plain))
        )


def test_baseline_finds_the_values_that_are_linear_in_its_features():
    steps, tasks = 400, 3
    observations, elapsed = torch.randn(steps, tasks, 5), (torch.arange(steps) % 150)[:, None].expand(-1, tasks)
    observations[:, :, 4] = 1.0  # as a task's one-hot
    observations[7, 1, 2] = 1e6  # clamped to 10
    o, t = observations.double().clamp(-10, 10), elapsed[..., None].double() / 100
    features = torch.cat((o, o**2, t, t**2, t**3, torch.ones_like(t)), dim=2)
    targets = (features * torch.randn(tasks, 14).double()).sum(2)
    baseline, which = LinearBaseline(observations, elapsed, targets.float()), torch.arange(tasks)
    torch.testing.assert_close(baseline(observations, elapsed, which), targets.float(), rtol=1e-5, atol=1e-5)
    shuffled = which.flip(0)  # rows of any tasks, in any order
    torch.testing.assert_close(
        baseline(observations[9].flip(0), elapsed[9], shuffled), targets[9].float().flip(0), rtol=1e-5, atol=1e-5
    )


def test_baseline_is_the_ridge_regression_of_each_task():
    observations, elapsed, targets = torch.randn(60, 2, 3), torch.arange(60)[:, None].expand(-1, 2), torch.randn(60, 2)
    values = LinearBaseline(observations, elapsed, targets)(observations, elapsed, torch.arange(2))
    for task in range(2):
        o, t = observations[:, task].double().numpy(), elapsed[:, task : 1 + task].numpy() / 100
        x = np.hstack([o, o**2, t, t**2, t**3, np.ones_like(t)])
        padded = np.vstack([x, math.sqrt(RIDGE) * np.eye(10)])
        weights, *_ = np.linalg.lstsq(padded, np.append(targets[:, task].double().numpy(), np.zeros(10)))
        np.testing.assert_allclose(values[:, task], x @ weights, rtol=1e-4, atol=1e-4)


def rollout_of(rewards, observations, following, elapsed, terminated, cut):
    """Of one task's [T] tensors, ten times the same."""
    tasks = [x.unsqueeze(1).expand(-1, 10, *x.shape[1:]) for x in (observations, rewards, terminated, cut, following)]
    seen, rewards, terminated, cut, following = tasks
    elapsed = elapsed.unsqueeze(1).expand(-1, 10)
    return MT10Rollout(
        observations=seen,
        actions=None,
        log_probs=None,
        rewards=rewards,
        terminated=terminated,
        cut=cut,
        next_observations=following,
        elapsed=elapsed,
        episode_returns=[],
        solved=[],
        seconds=0.0,
        seconds_acting=0.0,
    )


def test_a_time_out_bootstraps_with_the_baseline_s_value_of_the_final_observation():
    generator = torch.Generator().manual_seed(0)
    steps, length = 200, 20
    observations, following = torch.randn(2, steps, 3, generator=generator)
    rewards, elapsed = torch.rand(steps, generator=generator), torch.arange(steps) % length
    last = elapsed == length - 1
    terminated, cut = last & (torch.arange(steps) < 100), last & (torch.arange(steps) >= 100)
    rollout = rollout_of(rewards, observations, following, elapsed, terminated, cut)
    ppo = MT10PPOConfig(gamma=0.9, gae_lambda=0.8)
    advantages, metrics = baseline_advantages(rollout, ppo)

    returns, episode = torch.zeros(steps), 0.0
    for t in reversed(range(steps)):
        episode = rewards[t] + (0 if last[t] else 0.9 * episode)
        returns[t] = episode
    baseline = LinearBaseline(observations[:, None], elapsed[:, None], returns[:, None])
    task = torch.tensor([0])
    values = baseline(observations[:, None], elapsed[:, None], task)[:, 0]
    expected, later = torch.zeros(steps), 0.0
    for t in reversed(range(steps)):
        following_value = 0.0 if last[t] else values[t + 1]
        if cut[t]:
            following_value = baseline(following[t : t + 1], torch.tensor([length]), task)[0]
        later = rewards[t] + 0.9 * following_value - values[t] + (0 if last[t] else 0.9 * 0.8 * later)
        expected[t] = later
    for of_task in advantages.T:
        torch.testing.assert_close(of_task, expected, rtol=1e-4, atol=1e-4)
    assert metrics["loss/value"] == pytest.approx((values - returns).square().mean().item(), rel=1e-3)
    explained = 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item()
    assert metrics["ppo/explained_variance"] == pytest.approx(explained, rel=1e-3)


def test_rollout_says_what_happened():
    actor = actor_of("moe")[0].network
    torch.nn.init.normal_(actor.heads.output.bias, std=0.5)
    envs, rollout = FakeEnvs(), collect_mt10(FakeEnvs(), actor, steps=50, seed=3, clock=40)
    assert torch.equal(rollout.elapsed[:, 0], torch.arange(50) % 20)
    assert rollout.cut.nonzero()[:, 0].unique().tolist() == [19, 39, 49] and not rollout.terminated.any()
    outputs = actor(rollout.observations.flatten(0, 1), TASKS.repeat(50))
    drawn = rollout.actions.flatten(0, 1)
    torch.testing.assert_close(gaussian.log_probs(outputs, drawn), rollout.log_probs.flatten(), rtol=1e-3, atol=1e-4)
    noise = (drawn - outputs[:, :4]) / outputs[:, 4:].exp()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    # the environments got the actions within their box, and showed this
    seeds = np.random.default_rng((3, 8, 40)).integers(2**31, size=10)
    shown, _ = envs.reset(seed=seeds)
    assert rollout.actions.abs().max() > 1
    for t in range(50):
        assert np.array_equal(rollout.observations[t], shown)
        shown, rewards, _, truncated, infos = envs.step(rollout.actions[t].numpy().clip(-1, 1))
        assert np.array_equal(rollout.next_observations[t], infos["final_obs"])
        assert np.array_equal(rollout.rewards[t], np.float32(rewards))
    ended = np.broadcast_to(np.arange(50)[:, None] % 20 == 19, (50, 10))
    assert rollout.episode_returns == episode_sums(rollout.rewards.numpy(), ended)
    for task in range(10):
        solved = -rollout.rewards[:, task].numpy() < 0.1
        assert rollout.solved[task] == [solved[:20].any(), solved[20:40].any()]


@pytest.mark.parametrize("agent", AGENTS)
def test_a_step_descends_the_surrogate_loss_of_plain_autograd(agent):
    """The step of a fit that has one, its gradient scaled down to the norm."""
    ppo = MT10PPOConfig(epochs=1, minibatches=1, max_gradient_norm=0.01)
    actor, *_ = actor_of(agent, ppo_mt10=ppo)
    plain = copy.deepcopy(actor.network)
    rollout = collect_mt10(FakeEnvs(), actor.network, steps=30, seed=0, clock=0)
    rollout = replace(
        rollout, log_probs=rollout.log_probs + 0.3 * torch.randn(30, 10)
    )  # so that some ratios are clipped
    actor.optimizer = torch.optim.SGD(actor.network.parameters(), lr=1.0)
    stats = fit(actor, rollout, ppo, seed=0, clock=0)

    advantages, _ = baseline_advantages(rollout, ppo)
    loss, clipped = 0.0, 0
    outputs = plain(rollout.observations.flatten(0, 1), TASKS.repeat(30)).view(30, 10, 8)
    for task in range(10):
        of_task = advantages[:, task]
        of_task = (of_task - of_task.mean()) / of_task.std(correction=0)
        for t in range(30):
            mean, log_std = outputs[t, task].chunk(2)
            normal = torch.distributions.Normal(mean, log_std.exp())
            ratio = (normal.log_prob(rollout.actions[t, task]).sum() - rollout.log_probs[t, task]).exp()
            inside = ratio.clamp(0.8, 1.2)
            clipped += bool(ratio != inside)
            gain = torch.min(ratio * of_task[t], inside * of_task[t])
            loss = loss - (gain + 5e-3 * normal.entropy().sum()) / 300
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
    assert norm > 0.01 and 0 < clipped < 300
    for own, before in zip(actor.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(before - own, before.grad, rtol=1e-2, atol=1e-6)
    assert stats["loss/policy"] == pytest.approx(loss.item(), rel=1e-3, abs=1e-5)
    assert stats["ppo/clip_fraction"] == pytest.approx(clipped / 300, rel=1e-3)


def test_a_fit_takes_epochs_of_minibatches_of_all_tasks():
    actor, *_ = actor_of("mtppo")
    taken, minimise = [], actor.minimise
    actor.minimise = lambda loss, rows, tasks, generator: (taken.append(rows), minimise(loss, rows, tasks, generator))
    fit(actor, collect_mt10(FakeEnvs(), actor.network, 33, seed=0, clock=0), SHORT.ppo_mt10, seed=0, clock=0)
    assert [len(rows) for rows in taken] == [83, 83, 83, 81] * 2
    for epoch in (taken[:4], taken[4:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(330))
    assert not torch.equal(taken[0], taken[4]) and len(set((taken[0] % 10).tolist())) == 10


def test_networks_have_the_expected_numbers_of_parameters_and_first_values(monkeypatch):
    monkeypatch.setattr(StateEncoder, "neurons", (400, 400, 400))
    shared, heads = 49 * 400 + 400 + 2 * (400 * 400 + 400), 10 * (400 * 8 + 8)
    expected = {"mtppo": shared + heads, "moe": 4 * shared + 10 * 4 + heads, "moore": 4 * shared + 10 * 4 + heads}
    for agent, parameters in expected.items():
        actor, observations, tasks = actor_of(agent)
        assert actor.live_parameters() == actor.dense_parameters == parameters
        mean, log_std = gaussian.gaussian(actor.network(observations, tasks))
        assert mean.abs().max() < 0.2 and log_std.abs().max() < 0.2  # next to the standard normal


@pytest.mark.parametrize("block_size", [1, 16])
def test_grouped_experts_equal_separate_encoders(block_size):
    together, x = StateEncoder(3, in_features=49, block_size=block_size), torch.randn(6, 49)
    features = together(x)
    for expert in range(3):
        alone = StateEncoder(in_features=49)
        with torch.no_grad():
            for i in (0, 2, 4):
                weight = together[i].to_dense() if isinstance(together[i], sk.SparseLinear) else together[i].weight
                rows = slice(WIDTH * expert, WIDTH * (expert + 1))
                alone[i].weight.copy_(weight[rows] if i == 0 else weight[rows, rows])
                alone[i].bias.copy_(together[i].bias[rows])
        torch.testing.assert_close(features[:, expert], alone(x)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("agent", AGENTS)
def test_evaluation_acts_by_the_mean_within_the_box(agent):
    actor, observations, _ = actor_of(agent)
    torch.nn.init.normal_(actor.network.heads.output.bias)
    mean = actor.network(observations[:10], TASKS).detach()[:, :4]
    assert mean.abs().max() > 1
    np.testing.assert_allclose(best(actor.network, observations[:10].numpy()), mean.clamp(-1, 1), rtol=1e-5)


TREATMENTS = ["dense", "set", "gmp", "redo", "reset", "layer-norm", "pcgrad", "gmp+pcgrad", "weight-decay"]


@pytest.mark.parametrize(
    ("agent", "treatment"),
    [("mtppo", treatment) for treatment in TREATMENTS]
    + [("moe", treatment) for treatment in ("gmp", "redo", "layer-norm", "pcgrad")]
    + [("moore", treatment) for treatment in ("set", "redo", "layer-norm", "gmp+pcgrad")],
)
def test_every_agent_trains_with_every_treatment_repeats_and_resumes(tmp_path, monkeypatch, agent, treatment):
    monkeypatch.setattr(trainer_mt10, "make_mt10", FakeEnvs)
    settings = replace(SHORT, agent=agent, treatment=treatment, density=0.2, block_size=4 if agent == "moe" else 1)
    straight = trained(tmp_path / "straight", settings)
    assert straight["step"].unique().tolist() == [20, 40, 60, 80, 100]
    assert np.isfinite(straight["value"]).all()
    names = {"success/mean", "score/push", "return/window-close", "rollout/reach", "rollout_success/reach"}
    names |= {"dormant/actor", "rank/actor", "fisher/actor", "loss/policy", "loss/value", "ppo/explained_variance"}
    names |= {"rank/actor_experts"} if agent != "mtppo" else set()
    assert names <= {*straight["name"]} and not straight["name"].str.contains("critic").any()
    last = straight.groupby("name")["value"].last()
    if "gmp" in treatment or treatment == "set":
        assert last["sparse/density"] < 0.3 and last["sparse/bytes"] < 0.5 * last["sparse/dense_bytes"]

    fits, fit = [], train_ppo_mt10.fit

    def die_in_the_fourth(*arguments):
        fits.append(arguments)
        if len(fits) == 4:
            raise KeyboardInterrupt
        return fit(*arguments)

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_ppo_mt10, "fit", die_in_the_fourth)
        trained(killed, settings)
    pandas.testing.assert_frame_equal(measured(killed), straight[straight["step"] <= 60])
    assert checkpoint.load(killed)["clock"] == 40
    pandas.testing.assert_frame_equal(trained(killed, settings), straight)


@pytest.mark.parametrize("agent", AGENTS)
def test_agents_learn_what_each_task_rewards(tmp_path, monkeypatch, agent):
    monkeypatch.setattr(trainer_mt10, "make_mt10", FakeEnvs)
    ppo = MT10PPOConfig(rollout_steps=100, epochs=10, minibatches=8, learning_rate=3e-3, gamma=0.0)
    table = trained(tmp_path, replace(SHORT, agent=agent, timesteps=1200, evaluate_every=1200, ppo_mt10=ppo))
    table = table.groupby("name")["value"]
    early, late = (sum(of[f"rollout/{task.name}"] for task in MT10) / 200 for of in (table.first(), table.last()))
    assert early < -2 and late > 0.6 * early, (early, late)


def test_a_lottery_ticket_is_the_pruned_actor(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_mt10, "make_mt10", FakeEnvs)
    pruned = replace(SHORT, treatment="gmp", density=0.2)
    trained(tmp_path, pruned)
    winner, *_ = actor_of("mtppo", "gmp", density=0.2)
    winner.load_state_dict(checkpoint.load(tmp_path)["actor"])
    ticket, *_ = actor_of("mtppo", "lottery", density=0.2, ticket=tmp_path)
    assert ticket.live_parameters() == winner.live_parameters() < 0.25 * ticket.dense_parameters


@pytest.mark.parametrize("agent", ["mtppo", "moe"])
def test_redo_recycles_neurons_of_grouped_experts_and_leaves_outputs_as_they_are(agent):
    actor, observations, tasks = actor_of(agent, "redo", redo=ReDoConfig(every=10, tau=0.0))
    network, adam = actor.network, actor.optimizer
    with torch.no_grad():
        network.heads.output.weight.normal_()
        network.encoder[0].bias[-2:] = -1e4  # off whatever is seen; of the last expert
        network.encoder[2].bias[-3:] = -1e4
    for p in network.parameters():
        adam.state[p] = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    dormant = {n.layer.name: n.dormant(0.0) for n in activity(network, observations, tasks)}
    assert dormant["encoder1"][-1, -2:].all() and dormant["encoder2"][-1, -3:].all()
    outputs = network(observations, tasks)
    actor.rewire(10)
    torch.testing.assert_close(network(observations, tasks), outputs)
    first, second, _ = hidden_layers(network)
    for layer in (first, second):
        recycled, groups = dormant[layer.name], layer.groups
        assert not layer.incoming.bias.view(groups, -1)[recycled].any()
        fresh = matrices(layer.incoming, groups)[recycled]
        assert fresh.unique().numel() == fresh.numel()
        moments = adam.state[layer.incoming.weight]["exp_avg"].view(groups, layer.neurons, -1)
        assert torch.equal(~moments.any(2), recycled)
        if layer is second:  # of the first layer's, recycled neurons of the second have read fresh weights
            assert torch.equal(~matrices(layer.outgoing, groups).any(1), recycled)


@pytest.mark.parametrize(
    ("agent", "treatment", "block_size"),
    [("mtppo", "dense", 1), ("moe", "dense", 1), ("moore", "set", 16), ("moe", "layer-norm", 1)],
)
def test_fisher_trace_is_the_mean_squared_norm_of_each_samples_gradient(agent, treatment, block_size):
    actor, observations, tasks = actor_of(agent, treatment, 12, block_size=block_size, density=0.3)
    network = actor.network
    fast = fisher_trace(network, observations, tasks, gaussian.log_probs_of_draws, torch.Generator().manual_seed(3))
    with torch.no_grad():
        mean, log_std = network(observations, tasks).chunk(2, dim=1)
    actions = mean + log_std.exp() * torch.randn(12, 4, generator=torch.Generator().manual_seed(3))
    total = 0.0
    for i in range(12):
        network.zero_grad()
        gaussian.log_probs(network(observations[i : i + 1], tasks[i : i + 1]), actions[i]).backward()
        total += sum(p.grad.square().sum().item() for p in network.parameters())
    assert fast == pytest.approx(total / 12, rel=1e-3) and fast > 0


def test_there_is_no_critic_network_to_treat():
    with pytest.raises(ValueError, match="agent moe has no critic network on mt10, got networks critic"):
        Config(suite="mt10", agent="moe", treatment="gmp", networks="critic")
    assert Config(suite="mt10", agent="mtsac", treatment="gmp", networks="critic").networks == "critic"
    both, actor = (Config(suite="mt10", agent="moe", treatment="gmp", networks=of) for of in ("both", "actor"))
    assert identity(both) == identity(actor)


def test_settings_survive_and_runs_from_before_these_settings_are_what_they_were(tmp_path):
    SHORT.save(tmp_path)
    assert Config.load(tmp_path) == SHORT
    runs = [run for run in find([RESULTS]) if run.config.suite != "mt10"]
    assert runs
    for stored_run in runs:
        stored = json.loads((stored_run.folder / "config.json").read_text())
        assert asdict(stored_run.config)["ppo"] == stored["ppo"]
        plain = Config(
            **{name: stored[name] for name in ("suite", "agent", "treatment", "density", "block_size", "seed")},
            timesteps=stored["timesteps"],
            set=SETConfig(**{"initial": "fan-in", **stored["set"]}),
        )
        assert identity(stored_run.config) == identity(plain)


def test_a_run_on_meta_world_resumes_to_the_same_metrics_on_any_number_of_workers(tmp_path, monkeypatch):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")

    def a_few_steps(envs, act, episodes, seed, clock):  # evaluation itself is tested with the environments
        shown, _ = envs.reset(seed=range(10))
        for _ in range(3):
            shown, rewards, _, _, infos = envs.step(act(shown))
        return rewards[:, None], infos["success"][:, None]

    monkeypatch.setattr(trainer_mt10, "evaluate_mt10", a_few_steps)
    ppo = MT10PPOConfig(rollout_steps=40, epochs=1, minibatches=4)
    short = replace(SHORT, agent="moore", treatment="set", timesteps=120, evaluate_every=60, ppo_mt10=ppo)
    straight = trained(tmp_path / "straight", replace(short, workers=2))
    made, make_mt10 = [], trainer_mt10.make_mt10
    monkeypatch.setattr(trainer_mt10, "make_mt10", lambda *arguments: made.append(make_mt10(*arguments)) or made[-1])
    fit = train_ppo_mt10.fit

    def die_in_the_third(actor, rollout, ppo, seed, clock):
        if clock == 80:
            raise KeyboardInterrupt
        return fit(actor, rollout, ppo, seed, clock)

    killed = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_ppo_mt10, "fit", die_in_the_third)
        trained(killed, short)
    assert checkpoint.load(killed)["clock"] == 80
    assert not any(worker.process.is_alive() for worker in made[0]._workers)
    pandas.testing.assert_frame_equal(trained(killed, short), straight)
    assert {f"return/{task.name}" for task in MT10} <= {*straight["name"]}
