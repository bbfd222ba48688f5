"""rl/treatments: what they make of an actor and a critic."""

import pytest
import torch

import sparsekern as sk
from rl.buffer import PlasticityBuffer
from rl.config import Config
from rl.learner import Learner

pytestmark = pytest.mark.usefixtures("one_thread")


def learner(config, role, out_features, buffer=None):
    return Learner(config, role, out_features, buffer or PlasticityBuffer())


def batch(num_tasks=3, samples=20):
    return torch.randint(10, (samples, 7, 7, 3), dtype=torch.uint8), torch.arange(samples) % num_tasks


def train_once(learner, num_tasks=3):
    """Take one step, on outputs that should be zero."""
    observations, tasks = batch(num_tasks)

    def loss(rows):
        return learner.network(observations[rows], tasks[rows]).square().mean()

    learner.minimise(loss, torch.arange(len(tasks)), tasks, torch.Generator().manual_seed(0))


def densities(learner):
    """Of each weight matrix, by the module's name: live / all weights."""
    modules = learner.network.named_modules()
    return {name: m.topology.density if hasattr(m, "topology") else 1.0 for name, m in modules if hasattr(m, "weight")}


def test_set_spreads_the_density_over_heads_by_erk_and_leaves_convolutions_dense():
    actor = densities(learner(Config(suite="mt5", treatment="set"), "actor", 7))
    critic = densities(learner(Config(suite="mt5", treatment="set"), "critic", 1))
    assert actor["heads.hidden"] == pytest.approx(0.0451, abs=1e-4)
    assert actor["heads.output"] == pytest.approx(0.772, abs=1e-3)
    assert critic["heads.hidden"] == pytest.approx(0.0491, abs=1e-4)
    assert critic["heads.output"] == 1
    assert {d for name, d in (actor | critic).items() if "encoder" in name} == {1.0}


def test_set_leaves_a_layer_dense_that_its_blocks_would_mostly_pad():
    for block_size, output in ((8, 8), (16, 1)):
        heads = learner(Config(treatment="set", block_size=block_size), "actor", 7).network.heads
        assert (heads.hidden.block_size, heads.output.block_size) == (block_size, output)
        assert heads.hidden.density < 0.05 + 1e-3
        assert (heads.output.density == 1) == (block_size == 16)


def test_gmp_starts_as_the_dense_network_and_ends_at_its_density_over_all_weights():
    config = Config(treatment="gmp", timesteps=1000)
    pruned, dense = learner(config, "actor", 7), learner(Config(treatment="dense"), "actor", 7)
    observations, tasks = batch()
    torch.testing.assert_close(pruned.network(observations, tasks), dense.network(observations, tasks))
    assert len([m for m in pruned.network.modules() if isinstance(m, sk.SparseConv2d)]) == 3

    for clock in (400, 799, 800):
        train_once(pruned)
        pruned.rewire(clock)
    weights = sum(m.topology.num_blocks for m in pruned.network.modules() if hasattr(m, "topology"))
    live = sum(m.topology.num_live for m in pruned.network.modules() if hasattr(m, "topology"))
    assert live == pytest.approx(0.05 * weights, abs=1)


@pytest.mark.parametrize(("networks", "treated"), [("both", "actor critic"), ("actor", "actor"), ("critic", "critic")])
def test_only_the_chosen_networks_are_treated(networks, treated):
    config = Config(treatment="set", networks=networks)
    learners = {"actor": learner(config, "actor", 7), "critic": learner(config, "critic", 1)}
    assert " ".join(name for name, made in learners.items() if made.rules) == treated
    for made in learners.values():
        assert (made.live_parameters() < made.dense_parameters) == bool(made.rules)


def test_actor_and_critic_grow_at_different_places():
    config = Config(treatment="set")
    masks = []
    for role in ("actor", "critic"):
        treated = learner(config, role, 7)
        train_once(treated)
        treated.rewire(2000)
        masks.append(treated.network.heads.hidden.topology.mask())
    overlap = (masks[0] & masks[1]).sum() / masks[0].sum()
    assert overlap < 0.1  # of 4.5%: by chance
