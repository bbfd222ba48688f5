"""rl/algorithms, sac, replay and train_sac: the update against its definition, the replay, runs that end and resume."""

import copy
import math
import os
import shutil
import signal
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from brief import brief_mt10
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern as sk
from rl import checkpoint, run
from rl.agents.mtsac import MTSACActor, MTSACCritics
from rl.algorithms import train_sac, trainer_mt10
from rl.algorithms.gaussian import Squash, log_probs_of_draws
from rl.algorithms.learner import sizes
from rl.algorithms.replay import Batch, Recent, Replay
from rl.algorithms.sac import SAC, STATS
from rl.algorithms.timestep import Timestep
from rl.config import Config, ReDoConfig, ResetConfig, SACConfig, SETConfig
from rl.evaluators import Evaluators
from rl.metrics import fisher_trace, network_metrics

TASKS, FEATURES, ACTIONS, BATCH = 3, 7, 2, 5
RATE = 0.01  # of gradient descent


def config(treatment="dense", sac=None, **settings):
    sac = sac or SACConfig(batch=BATCH, warmup=1, capacity=40, device="cpu")
    return Config(suite="mt10", agent="mtsac", treatment=treatment, sac=sac, **settings)


def filled(timesteps=30, capacity=40, ended=None):
    """A replay of random transitions; ended: the share of them after which nothing follows."""
    replay = Replay(capacity, TASKS, FEATURES, ACTIONS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(timesteps):
        observations, following = torch.randn(2, TASKS, FEATURES, generator=generator)
        actions = torch.rand(TASKS, ACTIONS, generator=generator) * 2 - 1
        rewards, draw = torch.rand(2, TASKS, generator=generator)
        replay.add(observations, actions, rewards, following, (draw < (ended or 0)).float())
    return replay


def agent(config, replay=None):
    return SAC(config, replay or filled(), TASKS, FEATURES, ACTIONS, "cpu")


class Plain:
    """A network as matrices and vectors, which are leaves of autograd, and a loop over rows."""

    def __init__(self, network):
        self.towers = network.encoder.experts
        layers = {i: network.encoder[i] for i in (0, 2, 4)} | {"heads": network.heads.output}
        self.parameters, self.live = {}, {}
        for name, layer in layers.items():
            groups = getattr(layer, "groups", 1)
            weight = layer.to_dense() if isinstance(layer, sk.SparseLinear) else layer.weight.detach()
            matrices = weight.view(groups, weight.shape[0] // groups, groups, -1)
            live = layer.topology.mask() if isinstance(layer, sk.SparseLinear) else torch.ones(groups, 1, 1, dtype=bool)
            biases = layer.bias.detach().view(groups, -1)
            for group in range(groups):
                self.parameters[name, group, "weight"] = matrices[group, :, group].clone().requires_grad_()
                self.parameters[name, group, "bias"] = biases[group].clone().requires_grad_()
                self.live[name, group] = live[group]

    def __call__(self, x, tasks, tower=0):
        outputs, p = [], self.parameters
        for row, task in zip(x, tasks, strict=True):
            for i in (0, 2, 4):
                group = tower if (i, tower, "weight") in p else 0
                row = p[i, group, "weight"] @ row + p[i, group, "bias"]
                if i == 0:  # of both critics, one after the other
                    row = row.chunk(self.towers)[tower]
                row = torch.relu(row)
            head = "heads", tower * TASKS + int(task)
            outputs.append(p[*head, "weight"] @ row + p[*head, "bias"])
        return torch.stack(outputs)

    def check_step(self, after, loss):
        """After one step of gradient descent on this loss, the network is what `after` holds."""
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        for (key, was), gradient in zip(self.parameters.items(), gradients, strict=True):
            if key[2] == "weight":
                gradient = gradient * self.live[key[:2]]
            step, atol = was - after.parameters[key], 1e-3 * gradient.abs().max().item() * RATE + 1e-7
            torch.testing.assert_close(step, RATE * gradient, rtol=1e-3, atol=atol)


def plain_policy(network, observations, tasks, noise):
    mean, log_std = network(observations, tasks).chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    squash = torch.distributions.TanhTransform(cache_size=1)  # remembers what it squashed: no atanh of a rounded 1
    policy = torch.distributions.TransformedDistribution(normal, squash)
    actions = squash(normal.mean + normal.stddev * noise)
    return actions, policy.log_prob(actions).sum(1)


def plain_values(network, observations, actions, tasks):
    x = torch.cat((observations, actions), dim=1)
    return torch.cat([network(x, tasks, critic) for critic in (0, 1)], dim=1)


@pytest.mark.parametrize("treatment", ["dense", "set"])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_an_update_takes_the_gradients_of_the_plain_losses(treatment, clip):
    settings = SACConfig(batch=BATCH, clip=clip, max_gradient_norm=1e9, tau=0.25)
    sac = agent(config(treatment, settings, density=0.3), filled(ended=0.3))
    with torch.no_grad():
        sac.log_temperatures.copy_(torch.tensor([-0.5, 0.3, 1.0]))
        for network in (sac.actor.network, sac.critic.network, sac.critic.target):  # heads begin next to zero
            network.heads.output.weight.mul_(100)
            network.heads.output.bias.normal_()
    for learner in (sac.actor, sac.critic):
        learner.optimizer = torch.optim.SGD(learner.network.parameters(), lr=RATE)
    sac.temperature_optimizer = torch.optim.SGD([sac.log_temperatures], lr=1.0)
    generator = torch.Generator().manual_seed(1)
    timesteps, noise = sac.draw(generator)
    actor, critic, target = map(Plain, (sac.actor.network, sac.critic.network, sac.critic.target))
    target_before = copy.deepcopy(sac.critic.target)
    log_temperatures = sac.log_temperatures.detach().clone().requires_grad_()
    stats = dict(zip(STATS, sac.step(timesteps, noise, generator).tolist(), strict=True))

    tasks, noise = torch.arange(TASKS).repeat(BATCH), noise.transpose(1, 2).flatten(1, 2)
    batch = Batch(*(part.flatten(0, 1) for part in sac.replay.batch(timesteps)))
    temperatures = log_temperatures.detach().exp()[tasks]
    bound = (lambda x: x) if clip is None else (lambda x: x.clamp(-clip, clip))
    with torch.no_grad():
        actions, log_probs = plain_policy(actor, batch.next_observations, tasks, noise[0])
        least = plain_values(target, batch.next_observations, actions, tasks).min(1).values
        follows = torch.where(batch.ended == 1, 0.0, 0.99 * (least - temperatures * log_probs))
        targets = bound(batch.rewards + follows)
    assert 0 < batch.ended.sum() < len(tasks)
    values = bound(plain_values(critic, batch.observations, batch.actions, tasks))
    value_loss = (values - targets[:, None]).square().mean()
    after = Plain(sac.critic.network)
    critic.check_step(after, value_loss)
    networks = (sac.critic.target, target_before, sac.critic.network)
    for own, was, now in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(own, 0.75 * was + 0.25 * now)

    actions, log_probs = plain_policy(actor, batch.observations, tasks, noise[1])
    least = plain_values(after, batch.observations, actions, tasks).min(1).values
    policy_loss = (temperatures * log_probs - least).mean()
    actor.check_step(Plain(sac.actor.network), policy_loss)

    # the entropy of a task is below its target (+2 nats here) while log_probs + target_entropy > 0
    for task in range(TASKS):
        gradient = -(log_probs[tasks == task] - ACTIONS).sum() / len(tasks)
        moved = log_temperatures[task] - sac.log_temperatures[task]
        torch.testing.assert_close(moved, gradient, rtol=1e-3, atol=1e-5)
    assert stats["loss/value"] == pytest.approx(value_loss.item(), rel=1e-3)
    assert stats["loss/policy"] == pytest.approx(policy_loss.item(), rel=1e-3)


def update_plainly(sac, adams, generator):
    """What sac.update does, task by task, with PyTorch's own functions; returns the STATS."""
    timesteps = torch.randint(len(sac.replay), (TASKS, BATCH), generator=generator)
    noise = torch.randn(2, TASKS * BATCH, ACTIONS, generator=generator)
    tasks = torch.arange(TASKS).repeat_interleave(BATCH)
    seen, taken, rewards, following, ended = sac.replay.storage[timesteps.flatten(), tasks].split(
        sac.replay.widths, dim=1
    )
    (actor, critic), target = (learner.network for learner in (sac.actor, sac.critic)), sac.critic.target
    temperatures = sac.log_temperatures.detach().exp()[tasks]

    def step(adam, network, loss):
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        adam.step()

    with torch.no_grad():
        actions, log_probs = plain_policy(actor, following, tasks, noise[0])
        values = target(torch.cat((following, actions), dim=1), tasks).amin(1) - temperatures * log_probs
        targets = (rewards + 0.99 * (1 - ended) * values.unsqueeze(1)).clamp(-0.4, 0.4)
    values = critic(torch.cat((seen, taken), dim=1), tasks).clamp(-0.4, 0.4)
    value_loss = (values - targets).square().mean()
    step(adams[0], critic, value_loss)
    actions, log_probs = plain_policy(actor, seen, tasks, noise[1])
    least = critic(torch.cat((seen, actions), dim=1), tasks).amin(1)
    policy_loss = (temperatures * log_probs - least).mean()
    step(adams[1], actor, policy_loss)
    adams[2].zero_grad()
    (-(sac.log_temperatures[tasks] * (log_probs.detach() - ACTIONS)).mean()).backward()
    adams[2].step()
    with torch.no_grad():
        for own, online in zip(target.parameters(), critic.parameters(), strict=True):
            own.lerp_(online, 0.25)
    return torch.stack((policy_loss, value_loss, temperatures.mean(), -log_probs.mean(), least.mean())).detach()


@pytest.mark.parametrize("treatment", ["dense", "set"])
def test_updates_equal_to_rounding_those_that_save_no_kernels(treatment):
    settings = SACConfig(batch=BATCH, clip=0.4, max_gradient_norm=0.5, tau=0.25, learning_rate=1e-3)
    own, plain = (agent(config(treatment, settings, density=0.3), filled(ended=0.3)) for _ in range(2))
    parameters = [
        [*sac.critic.network.parameters(), *sac.actor.network.parameters(), sac.log_temperatures]
        for sac in (own, plain)
    ]
    groups = plain.critic.network.parameters(), plain.actor.network.parameters(), [plain.log_temperatures]
    adams = [torch.optim.Adam(group, lr=1e-3, eps=1e-5, foreach=False) for group in groups]
    before = [p.detach().clone() for p in parameters[0]]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(5):
        torch.testing.assert_close(own.update(generators[0]), update_plainly(plain, adams, generators[1]))
    for was, *now in zip(before, *parameters, strict=True):
        moved = (now[0] - was).abs().max().item()
        assert moved > 1e-3
        torch.testing.assert_close(*now, rtol=1e-4, atol=1e-3 * moved)
    targets = (sac.critic.target.parameters() for sac in (own, plain))
    for one, other in zip(*targets, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Kernels(TorchDispatchMode):
    """Counts what is dispatched and computes: neither views nor bare memory."""

    BARE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")
        if not function.is_view and name[0] != "profiler" and name[2].partition(".")[0] not in self.BARE:
            self.counts[function.name()] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("treatment", ["dense", "set"])
def test_an_update_dispatches_at_most_150_kernels(treatment):
    sac = agent(config(treatment, density=0.05, block_size=16))
    sac.update(torch.Generator().manual_seed(0))  # makes what is made once
    with Kernels() as kernels:
        sac.update(torch.Generator().manual_seed(0))
    assert kernels.counts["aten::_fused_adam_"] == 3 and kernels.counts["sparsekern::dds"] > 10
    assert kernels.counts.total() <= 150, kernels.counts


def test_gradients_of_both_critics_together_are_scaled_down_to_the_norm():
    sac = agent(config(sac=SACConfig(batch=BATCH, max_gradient_norm=1e-3)))
    sac.critic.optimizer = torch.optim.SGD(sac.critic.network.parameters(), lr=1.0)
    before = torch.nn.utils.parameters_to_vector(sac.critic.network.parameters()).detach()
    sac.update(torch.Generator().manual_seed(0))
    after = torch.nn.utils.parameters_to_vector(sac.critic.network.parameters())
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_target_critics_equal_the_online_ones_after_tau_1_and_follow_a_rewire():
    settings = SACConfig(batch=BATCH, tau=1.0)
    sac = agent(config("set", settings, density=0.2, set=SETConfig(update_every=10)))
    before = sac.critic.network.encoder[2].topology.mask().clone()
    generator = torch.Generator().manual_seed(0)
    for clock in (5, 10):
        sac.update(generator)
        sac.rewire(clock)
        states = (network.state_dict() for network in (sac.critic.network, sac.critic.target))
        for (name, online), target in zip(next(states).items(), next(states).values(), strict=True):
            assert torch.equal(online, target), name
    assert not torch.equal(sac.critic.network.encoder[2].topology.mask(), before)


def test_target_critics_shrink_with_the_online_ones_under_gmp():
    sac = agent(config("gmp", density=0.1, timesteps=100))
    generator = torch.Generator().manual_seed(0)
    for clock in range(5, 101, 5):
        sac.update(generator)
        sac.rewire(clock)
    for online, target in zip(sac.critic.network.modules(), sac.critic.target.modules(), strict=True):
        if isinstance(online, sk.SparseLinear):
            assert torch.equal(online.topology.mask(), target.topology.mask())
            assert target.weight.shape == online.weight.shape
    live, dense = sac.critic.live_parameters(), sac.critic.dense_parameters
    biases = sum(m.bias.numel() for m in sac.critic.network.modules() if getattr(m, "bias", None) is not None)
    assert live - biases == pytest.approx(0.1 * (dense - biases), rel=0.01)
    assert sac.critic.nbytes() < 0.4 * sac.critic.dense_nbytes()


@pytest.mark.parametrize("networks", ["actor", "critic"])
def test_only_the_chosen_network_is_pruned(networks):
    sac = agent(config("gmp", networks=networks, timesteps=100))
    assert bool(sac.actor.rules) == (networks == "actor") and bool(sac.critic.rules) == (networks == "critic")


@pytest.mark.parametrize("treatment", ["redo", "reset", "layer-norm", "pcgrad", "gmp+pcgrad", "weight-decay"])
def test_every_treatment_can_be_trained(treatment):
    sac = agent(config(treatment, timesteps=300_000))
    generator = torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in sac.critic.network.parameters()]
    for clock in (50_000, 100_000, 150_000):
        stats = sac.update(generator)
        sac.rewire(clock)
        assert stats.isfinite().all()
    assert not any(torch.equal(a, b) for a, b in zip(before, sac.critic.network.parameters(), strict=True))


def test_pcgrad_without_conflict_takes_the_mean_gradient_of_shared_weights():
    """One task alone cannot conflict."""
    stepped = []
    for treatment in ("dense", "pcgrad"):
        sac = SAC(config(treatment), one_task := Replay(9, 1, FEATURES, ACTIONS), 1, FEATURES, ACTIONS, "cpu")
        for number in range(9):
            one_task.add(*(torch.full((1, size), number / 9) for size in (FEATURES, ACTIONS, 1, FEATURES, 1)))
        sac.update(torch.Generator().manual_seed(0))
        stepped.append(torch.nn.utils.parameters_to_vector(sac.actor.network.parameters()))
    torch.testing.assert_close(*stepped)


def test_pcgrad_reports_the_losses_of_all_tasks():
    reported = []
    for treatment in ("dense", "pcgrad"):
        sac = agent(config(treatment))
        sac.critic.optimizer = torch.optim.SGD(sac.critic.network.parameters(), lr=0)  # both judge alike
        reported.append(sac.update(torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*reported)


def test_redo_draws_as_the_first_weights_were_drawn():
    sac = agent(config("redo", redo=ReDoConfig(every=10, tau=1e9)))  # all neurons start anew
    layers = [network.encoder[4] for network in (sac.actor.network, sac.critic.network)]
    before = [layer.weight.detach().clone() for layer in layers]
    sac.rewire(10)
    for layer, first in zip(layers, before, strict=True):
        assert (layer.weight != first).all()
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / 400), rel=0.01)


def test_reset_gives_the_target_critics_the_new_heads():
    sac = agent(config("reset", reset=ResetConfig(every=10)))
    for _ in range(3):
        sac.update(torch.Generator().manual_seed(0))
    sac.rewire(10)
    online, target = sac.critic.network, sac.critic.target
    assert torch.equal(online.heads.output.weight, target.heads.output.weight)
    assert not target.heads.output.bias.any() and not torch.equal(online.encoder[4].weight, target.encoder[4].weight)


def test_lottery_ticket_is_the_pruned_actor_and_critics_of_an_agent(tmp_path):
    gmp = config("gmp", density=0.1, timesteps=100)
    winner = agent(gmp)
    winner.update(torch.Generator().manual_seed(0))
    winner.rewire(80)
    gmp.save(tmp_path)
    checkpoint.save(tmp_path, {"clock": 100, "agent": winner.state_dict()})
    ticket = agent(replace(gmp, treatment="lottery", ticket=tmp_path))
    for role in ("actor", "critic"):
        first = agent(replace(gmp, treatment="dense")).__dict__[role].network
        for name, layer in getattr(ticket, role).network.named_modules():
            if isinstance(layer, sk.SparseLinear):
                kept = layer.topology.mask()
                assert torch.equal(kept, getattr(winner, role).network.get_submodule(name).topology.mask())
                begun = first.get_submodule(name)
                dense = begun.to_dense() if isinstance(begun, sk.SparseLinear) else begun.weight
                assert torch.equal(layer.to_dense(), torch.where(layer.to_dense() != 0, dense, 0)), name
    assert ticket.critic.live_parameters() == winner.critic.live_parameters()
    ticket.update(torch.Generator().manual_seed(0))


def test_a_checkpoint_of_another_device_keeps_this_ones_options_of_adam():
    sac = agent(config())
    sac.update(torch.Generator().manual_seed(0))
    state = copy.deepcopy(sac.state_dict())
    optimizers = [sac.actor.optimizer, sac.critic.optimizer, sac.temperature_optimizer]
    for saved in (state["actor"]["optimizer"], state["critic"]["optimizer"], state["temperature_optimizer"]):
        saved["param_groups"][0]["capturable"] = True  # as on a GPU
    sac.load_state_dict(state)
    assert not any(optimizer.param_groups[0]["capturable"] for optimizer in optimizers)
    assert all(optimizer.state for optimizer in optimizers)


@pytest.mark.parametrize("treatment", ["dense", "set", "layer-norm", "redo"])
def test_networks_are_looked_at_where_they_live(treatment):
    """What is made without saying where would be made on the meta device here, as on the CPU beside a GPU."""
    sac = agent(config(treatment, redo=ReDoConfig(every=10)))
    tasks = torch.arange(20) % TASKS
    with torch.device("meta"):
        for network, features in ((sac.actor.network, FEATURES), (sac.critic.network, FEATURES + ACTIONS)):
            network_metrics("network", network, torch.ones(20, features, device="cpu"), tasks)
        sample = torch.ones(20, FEATURES, device="cpu"), tasks
        fisher_trace(sac.actor.network, *sample, lambda outputs, generator: outputs.sum(1), None)


def test_networks_have_the_papers_numbers_of_parameters_and_first_values():
    actor, critics = MTSACActor(10, 49, 4, 1), MTSACCritics(10, 53, 1)
    assert sum(p.numel() for p in actor.parameters()) == 372_880
    assert sum(p.numel() for p in critics.parameters()) == 692_820
    for network, bound in ((actor, 1e-3), (critics, 3e-3)):
        head = network.heads.output
        assert 0.9 * bound < head.weight.abs().max() <= bound and not head.bias.any()
        for layer in (network.encoder[i] for i in (0, 2, 4)):
            fan_in = layer.in_features // getattr(layer, "groups", 1)
            assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan_in), rel=0.01)
            assert not layer.bias.any()


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_batch_of_all_tasks_gives_what_task_ids_give(block_size):
    order = torch.randperm(40)
    tasks = torch.arange(10).repeat(4)[order]
    for network, features in ((MTSACActor(10, 49, 4, block_size), 49), (MTSACCritics(10, 53, block_size), 53)):
        x = torch.randn(4, 10, features)
        of_all = network(x)
        if isinstance(network, MTSACCritics):
            of_all = of_all.transpose(1, 2)  # [4, 10, 2]
        torch.testing.assert_close(of_all.flatten(0, 1)[order], network(x.flatten(0, 1)[order], tasks))


def test_fisher_takes_the_density_of_an_action_that_stays():
    outputs = torch.randn(6, 2 * ACTIONS, dtype=torch.float64).mul(0.3).requires_grad_()
    drawn = log_probs_of_draws(outputs, torch.Generator().manual_seed(0))
    noise = torch.randn(6, ACTIONS, generator=torch.Generator().manual_seed(0))
    mean, log_std = outputs.chunk(2, dim=1)
    actions = Squash.apply(outputs, noise)[0].detach()
    policy = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform()
    )
    expected = torch.autograd.grad(policy.log_prob(actions).sum(), outputs)
    torch.testing.assert_close(torch.autograd.grad(drawn.sum(), outputs), expected, rtol=1e-3, atol=1e-3)


def test_replay_draws_each_task_uniformly_from_the_latest():
    replay = Replay(10, TASKS, FEATURES, ACTIONS)
    for timestep in range(25):
        marks = timestep + 100 * torch.arange(TASKS).float()
        replay.add(
            marks[:, None].expand(-1, FEATURES), torch.zeros(TASKS, ACTIONS), marks, marks[:, None].expand(-1, 7), marks
        )
    timesteps = replay.draw(20_000, torch.Generator().manual_seed(0))
    batch = replay.batch(timesteps)
    for task, of_task in enumerate(batch.rewards.T):
        values, counts = of_task.unique(return_counts=True)
        assert values.tolist() == [100 * task + t for t in range(15, 25)]
        assert ((counts - 2000).square() / 2000).sum() < 27.9  # chi-squared, 9 degrees of freedom: 1 in 1000
    assert not torch.equal(timesteps[:, 0], timesteps[:, 1])
    for field in (batch.observations, batch.next_observations):
        assert torch.equal(field, batch.rewards.unsqueeze(2).expand_as(field))


@pytest.mark.parametrize("added", [3, 40, 45])  # a part, all, and some of it overwritten
def test_a_checkpoint_holds_the_filled_part_of_a_replay_and_restores_it_bit_for_bit(tmp_path, added):
    replay, resumed = filled(added), Replay(40, TASKS, FEATURES, ACTIONS)
    checkpoint.save(tmp_path, {"replay": replay.state_dict()})
    of_transitions = min(added, 40) * replay.storage[0].nbytes
    assert of_transitions <= checkpoint.path(tmp_path).stat().st_size < of_transitions + 3000
    resumed.load_state_dict(checkpoint.load(tmp_path)["replay"])
    assert resumed.added == added and torch.equal(resumed.storage[: len(resumed)], replay.storage[: len(replay)])
    draws = [of.draw(BATCH, torch.Generator().manual_seed(0)) for of in (replay, resumed)]
    assert all(map(torch.equal, replay.batch(draws[0]), resumed.batch(draws[1])))


def test_a_replay_reads_checkpoints_that_hold_its_whole_storage():
    replay, resumed = filled(3), Replay(40, TASKS, FEATURES, ACTIONS)
    resumed.load_state_dict({"storage": replay.storage[:-1], "added": 3})
    assert len(resumed) == 3 and torch.equal(resumed.storage[:3], replay.storage[:3])


def test_replay_refuses_a_checkpoint_of_another_size():
    with pytest.raises(ValueError, match=r"\[40, 3, 18\], got \[20, 3, 18\]"):
        filled().load_state_dict(filled(10, capacity=20).state_dict())


def test_recent_transitions_are_the_plasticity_buffer(monkeypatch):
    monkeypatch.setattr("rl.algorithms.replay.CAPACITY", 4 * TASKS)
    replay = filled(45)  # of which 40 are kept, and 4 are recent
    sample, tasks = Recent(replay, with_actions=True).sample(torch.Generator().manual_seed(0))
    rows = [replay.storage[i % 40, task, : FEATURES + ACTIONS] for i in range(41, 45) for task in range(TASKS)]
    assert sorted(map(tuple, sample.tolist())) == sorted(map(tuple, torch.stack(rows).tolist()))
    assert tasks.bincount().tolist() == [4] * TASKS
    assert Recent(replay, with_actions=False).sample(torch.Generator())[0].shape == (4 * TASKS, FEATURES)


class FakeEnvs:
    """Ten environments whose episodes are cut at the fourth step, and of which the first ends at the second."""

    def __init__(self):
        self.now, self.stepping = 0, False

    def step_async(self, actions):
        assert actions.shape == (10, 4) and np.abs(actions).max() <= 1
        self.stepping = True

    def step_wait(self):
        assert self.stepping
        self.stepping, self.now = False, self.now + 1
        terminated, truncated = np.zeros(10, bool), np.full(10, self.now % 4 == 0)
        terminated[0] = self.now == 2
        following = np.full((10, 49), self.now, np.float32)
        shown = np.where((terminated | truncated)[:, None], np.float32(-self.now), following)
        success = np.zeros(10, np.float32)
        return shown, np.full(10, 0.5), terminated, truncated, {"final_obs": following, "success": success}


@pytest.mark.parametrize("time_out_ends", [True, False])
def test_a_time_out_bootstraps_unless_it_is_stored_as_an_end_and_a_termination_never(time_out_ends):
    settings = config(sac=SACConfig(batch=BATCH, warmup=3, time_out_ends=time_out_ends))
    replay = Replay(20, 10, 49, 4)
    sac = SAC(settings, replay, 10, 49, 4, "cpu")
    observations, metrics = train_sac.episode(
        settings, FakeEnvs(), Timestep(sac), np.zeros((10, 49), np.float32), clock=0, steps=6
    )
    stored = replay.batch(torch.arange(6).unsqueeze(1).expand(6, 10))
    assert stored.ended[:, 0].tolist() == [0, 1, 0, time_out_ends, 0, 0]
    assert stored.ended[:, 1].tolist() == [0, 0, 0, time_out_ends, 0, 0]
    assert stored.next_observations[:, 1, 0].tolist() == [1, 2, 3, 4, 5, 6]  # not the next episode's
    assert stored.observations[:, 1, 0].tolist() == [0, 1, 2, 3, -4, 5]
    assert observations[0, 0] == 6 and metrics["rollout/reach"] == 3
    assert metrics["loss/value"] > 0  # learned at timesteps 3, 4 and 5


@pytest.fixture
def run_folder(tmp_path):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")

    def make(name, settings):
        folder = tmp_path / name
        folder.mkdir()
        settings.save(folder)
        return folder

    return make


SHORT = config(
    "set",
    SACConfig(batch=BATCH, warmup=20, capacity=60, device="cpu"),
    timesteps=80,
    evaluate_every=40,
    episodes=1,
    workers=2,
    evaluators=0,
    density=0.2,
    set=SETConfig(update_every=40),
)


def measured(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line for line in lines if ",time/" not in line]


def test_a_resumed_run_equals_a_straight_one_on_any_number_of_workers(run_folder, monkeypatch):
    monkeypatch.setattr(train_sac, "STEPS", 40)  # shorter than an episode: evaluations begin new ones
    straight, killed = run_folder("straight", SHORT), run_folder("killed", SHORT)
    run.train(SHORT, straight, quiet=True)
    episode, episodes = train_sac.episode, []

    def die_in_the_second(*arguments):
        episodes.append(episode(*arguments))
        if len(episodes) == 2:
            raise KeyboardInterrupt
        return episodes[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_sac, "episode", die_in_the_second)
        run.train(SHORT, killed, quiet=True)
    run.train(replace(SHORT, workers=1), killed, quiet=True)
    assert measured(killed) == measured(straight)
    assert any("success/mean" in line for line in measured(straight)) and len(measured(straight)) > 60


@pytest.fixture
def brief(monkeypatch, tmp_path):
    """Runs on environments of brief episodes; gives what trains one of them in a folder of this name."""
    for room in ("rl.envs.metaworld", "rl.evaluators"):
        monkeypatch.setattr(f"{room}.makers", lambda seed: brief_mt10())
    monkeypatch.setattr("rl.envs.metaworld.require_metaworld", lambda: None)
    monkeypatch.setattr(train_sac, "STEPS", 10)

    def train(name, **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run.train(replace(BRIEF, **changes), folder, quiet=True)
        return measured(folder)

    return train


BRIEF = replace(SHORT, timesteps=90, evaluate_every=30, episodes=3, workers=1, set=SETConfig(update_every=30))


def test_a_run_evaluated_in_other_processes_equals_one_that_waits_also_after_an_interrupted_evaluation(
    brief, tmp_path, monkeypatch
):
    serial, play, episode, clocks = brief("serial", evaluators=0), Evaluators.play, train_sac.episode, []
    assert sum(",success/mean," in line for line in serial) == 3
    overlapping = threading.Event()

    def wait_for_the_learner(self, policy, seed, clock):
        if clock == 30:
            assert overlapping.wait(timeout=60)
        return play(self, policy, seed, clock)

    def count(*arguments):
        clocks.append(arguments[4])
        if clocks[-1] == 50:  # the row of 30 waits for its evaluation, and later ones wait for it
            assert measured(tmp_path / "overlapped")[-1].startswith("20,")
            overlapping.set()
        return episode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluators, "play", wait_for_the_learner)
        patch.setattr(train_sac, "episode", count)
        assert brief("overlapped", evaluators=2) == serial
    assert clocks == list(range(0, 90, 10))

    interrupted, close = threading.Event(), Evaluators.close

    def play_until_closed(self, policy, seed, clock):
        return play(self, policy, seed, clock) if clock < 60 else interrupted.wait(timeout=60)

    def close_and_tell(self):
        interrupted.set()
        close(self)

    def die_at_80(*arguments):
        if arguments[4] == 80:
            raise KeyboardInterrupt
        return episode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Evaluators, "play", play_until_closed)
        patch.setattr(Evaluators, "close", close_and_tell)
        patch.setattr(train_sac, "episode", die_at_80)
        brief("interrupted", evaluators=1)
    assert checkpoint.load(tmp_path / "interrupted")["clock"] == 60
    written = measured(tmp_path / "interrupted")
    assert written == serial[: len(written)] and written[-1].startswith("50,")
    shutil.copytree(tmp_path / "interrupted", tmp_path / "interrupted too")
    assert brief("interrupted", evaluators=1) == serial
    assert brief("interrupted too", evaluators=0) == serial


def test_a_run_has_products_of_its_own_precision_whatever_ran_before_it(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer_mt10, "make_mt10", lambda *arguments: None)
    for precision in ("high", "highest"):
        train_sac.SACTrainer(replace(SHORT, sac=replace(SHORT.sac, matmul_precision=precision)), tmp_path)
        assert torch.get_float32_matmul_precision() == precision


def test_a_worker_that_dies_ends_the_run_with_its_tasks_and_leaves_no_process(run_folder, monkeypatch):
    made, make_mt10 = [], trainer_mt10.make_mt10
    monkeypatch.setattr(trainer_mt10, "make_mt10", lambda *arguments: made.append(make_mt10(*arguments)) or made[-1])
    step = SAC.step

    def kill(self, *arguments):
        os.kill(made[0]._workers[1].process.pid, signal.SIGKILL)
        return step(self, *arguments)

    monkeypatch.setattr(SAC, "step", kill)
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        run.train(SHORT, run_folder("run", SHORT), quiet=True)
    assert not any(worker.process.is_alive() for worker in made[0]._workers)


@pytest.mark.parametrize("treatment", ["dense", "gmp", "redo"])
def test_a_network_of_full_density_takes_the_bytes_of_a_dense_one(treatment):
    trained = agent(config(treatment, timesteps=20_000))
    trained.update(torch.Generator().manual_seed(0))
    reported = sizes(trained.actor, trained.critic)
    assert reported["sparse/density"] == 1
    assert reported["sparse/bytes"] <= 1.01 * reported["sparse/dense_bytes"]
