"""rl/treatments: what they make of an actor and a critic."""

import pytest
import torch

import sparsekern as sk
from rl.config import Config
from rl.learner import Learner

pytestmark = pytest.mark.usefixtures("one_thread")


def densities(learner):
    """Of each weight matrix, by the module's name: live / all weights."""
    modules = learner.network.named_modules()
    return {name: m.topology.density if hasattr(m, "topology") else 1.0 for name, m in modules if hasattr(m, "weight")}


def test_set_spreads_the_density_over_heads_by_erk_and_leaves_convolutions_dense():
    actor = densities(Learner(Config(suite="mt5", treatment="set"), "actor", 7))
    critic = densities(Learner(Config(suite="mt5", treatment="set"), "critic", 1))
    assert actor["heads.hidden"] == pytest.approx(0.0451, abs=1e-4)
    assert actor["heads.output"] == pytest.approx(0.772, abs=1e-3)
    assert critic["heads.hidden"] == pytest.approx(0.0491, abs=1e-4)
    assert critic["heads.output"] == 1
    assert {d for name, d in (actor | critic).items() if "encoder" in name} == {1.0}


def test_set_leaves_a_layer_dense_that_its_blocks_would_mostly_pad():
    for block_size, output in ((8, 8), (16, 1)):
        learner = Learner(Config(treatment="set", block_size=block_size), "actor", 7)
        heads = learner.network.heads
        assert (heads.hidden.block_size, heads.output.block_size) == (block_size, output)
        assert heads.hidden.density < 0.05 + 1e-3
        assert (heads.output.density == 1) == (block_size == 16)


def test_gmp_starts_as_the_dense_network_and_ends_at_its_density_over_all_weights():
    config = Config(treatment="gmp", timesteps=1000)
    pruned, dense = Learner(config, "actor", 7), Learner(Config(treatment="dense"), "actor", 7)
    observations, tasks = torch.randint(10, (20, 7, 7, 3), dtype=torch.uint8), torch.arange(20) % 3
    torch.testing.assert_close(pruned.network(observations, tasks), dense.network(observations, tasks))
    assert len([m for m in pruned.network.modules() if isinstance(m, sk.SparseConv2d)]) == 3

    for clock in (400, 799, 800):
        pruned.minimise(pruned.network(observations, tasks).square().mean())
        pruned.rewire(clock)
    weights = sum(m.topology.num_blocks for m in pruned.network.modules() if hasattr(m, "topology"))
    live = sum(m.topology.num_live for m in pruned.network.modules() if hasattr(m, "topology"))
    assert live == pytest.approx(0.05 * weights, abs=1)


@pytest.mark.parametrize(("networks", "treated"), [("both", "actor critic"), ("actor", "actor"), ("critic", "critic")])
def test_only_the_chosen_networks_are_treated(networks, treated):
    config = Config(treatment="set", networks=networks)
    learners = {"actor": Learner(config, "actor", 7), "critic": Learner(config, "critic", 1)}
    assert " ".join(name for name, learner in learners.items() if learner.rules) == treated
    for learner in learners.values():
        assert (learner.live_parameters() < learner.dense_parameters) == bool(learner.rules)


def test_actor_and_critic_grow_at_different_places():
    config = Config(treatment="set")
    masks = []
    for role in ("actor", "critic"):
        learner = Learner(config, role, 7)
        observations, tasks = torch.randint(10, (20, 7, 7, 3), dtype=torch.uint8), torch.arange(20) % 3
        learner.minimise(learner.network(observations, tasks).square().mean())
        learner.rewire(2000)
        masks.append(learner.network.heads.hidden.topology.mask())
    overlap = (masks[0] & masks[1]).sum() / masks[0].sum()
    assert overlap < 0.1  # of 4.5%: by chance
