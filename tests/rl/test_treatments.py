"""rl/treatments: what they make of an actor and a critic."""

import copy
import typing
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsekern as sk
from rl import checkpoint
from rl.agents import AGENTS
from rl.agents.neurons import activity, hidden_layers
from rl.algorithms import train_ppo
from rl.algorithms.buffer import PlasticityBuffer
from rl.config import Config, ReDoConfig, SETConfig
from rl.envs import SUITES
from rl.treatments import TREATMENTS
from rl.treatments.lottery import require_ticket
from rl.treatments.pcgrad import project
from rl.treatments.redo import matrices, recycle


def learner(config, role, out_features, buffer=None):
    return train_ppo.make_learner(config, role, out_features, buffer or PlasticityBuffer())


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


def test_set_keeps_the_dense_network_s_first_weights_or_draws_them_for_the_sparse_fan_in():
    dense = learner(Config(treatment="dense"), "actor", 7).network.heads.hidden
    masked = learner(Config(treatment="set"), "actor", 7).network.heads.hidden
    survivors = torch.where(masked.to_dense() == 0, 0, dense.to_dense())
    torch.testing.assert_close(masked.to_dense(), survivors, rtol=0, atol=0)
    torch.testing.assert_close(masked.bias, dense.bias, rtol=0, atol=0)
    drawn = learner(Config(treatment="set", set=SETConfig(initial="fan-in")), "actor", 7).network.heads.hidden
    assert drawn.weight.std() > 4 * masked.weight.std()  # a neuron reads about a twentieth of its 1024 inputs


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


def test_command_line_knows_every_suite_agent_and_treatment():
    fields = typing.get_type_hints(Config)
    for name, known in (("suite", SUITES), ("agent", (*AGENTS, "mtsac")), ("treatment", TREATMENTS)):
        assert typing.get_args(fields[name]) == tuple(known)


@pytest.mark.parametrize("density", [0.2, 0.01])
@pytest.mark.parametrize("agent", AGENTS)
def test_gmp_follows_its_schedule_at_every_event(agent, density):
    config = Config(agent=agent, treatment="gmp", density=density, timesteps=400_000)
    actor = learner(config, "actor", 7)
    sparse = [m for m in actor.network.modules() if hasattr(m, "topology")]
    weights = sum(m.topology.num_blocks for m in sparse)
    for clock in range(2000, 400_000, 14_000):
        train_once(actor)
        actor.rewire(clock)
        progress = min(max((clock - 20_000) / 300_000, 0), 1)
        expected = density + (1 - density) * (1 - progress) ** 3
        assert sum(m.topology.num_live for m in sparse) == pytest.approx(expected * weights, abs=1)
    assert actor.live_parameters() < (density + 0.01) * actor.dense_parameters


@pytest.mark.parametrize("agent", AGENTS)
def test_redo_leaves_outputs_unchanged_and_clears_exactly_the_moments_of_what_it_recycles(agent):
    buffer = PlasticityBuffer()
    buffer.add(*batch(3, 300))
    config = Config(agent=agent, treatment="redo", suite="mt3", redo=ReDoConfig(every=10, tau=0.0))
    actor = learner(config, "actor", 7, buffer)
    network, adam = actor.network, actor.optimizer
    with torch.no_grad():  # neurons that are off whatever is seen
        network.encoder[0].bias[-2:] = -1e4
        network.encoder[2].bias[-3:] = -1e4
        network.heads.hidden.weight.view(3, 128, 1024)[1, 5] = 0
        network.heads.hidden.bias[128 + 5] = 0
    for p in network.parameters():
        adam.state[p] = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
    dormant = {n.layer.name: n.dormant(0.0) for n in activity(network, buffer.observations, buffer.tasks)}
    assert dormant["encoder1"][-1, -2:].all() and dormant["encoder2"][-1, -3:].all() and dormant["head"][1, 5]
    before, outputs = copy.deepcopy(network.state_dict()), network(buffer.observations, buffer.tasks)

    actor.rewire(9)
    assert torch.equal(network.encoder[0].bias, before["encoder.0.bias"])
    actor.rewire(12)
    torch.testing.assert_close(network(buffer.observations, buffer.tasks), outputs)
    first, second, _, head = hidden_layers(network)
    cleared = {p: torch.zeros_like(p, dtype=torch.bool) for p in network.parameters()}
    for layer in (first, second, head):
        incoming, outgoing = layer.incoming, layer.outgoing
        for group, neuron in dormant[layer.name].nonzero().tolist():
            into = matrices(incoming, layer.groups)[group, neuron]
            assert into.abs().max() <= len(into) ** -0.5 and into.unique().numel() == len(into)
            cleared[incoming.bias].view(layer.groups, -1)[group, neuron] = True
            cleared[incoming.weight].view(layer.groups, layer.neurons, -1)[group, neuron] = True
            taps = 1 if layer is head else 4
            out = cleared[outgoing.weight].view(layer.groups, -1, layer.neurons, taps)
            out[group, :, neuron] = True
            # a recycled neuron of the next layer has read fresh weights of this one
            readers = ~dormant["encoder2"][group] if layer is first else slice(None)
            assert not matrices(outgoing, layer.groups).view_as(out)[group, readers, neuron].any()
    for p, mask in cleared.items():
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(adam.state[p][name] == 0, mask)
    assert any(mask.any() for mask in cleared.values())
    for name, p in network.named_parameters():  # and nothing else was written
        assert torch.equal(p[~cleared[p]], before[name][~cleared[p]])


def test_redo_zeroes_what_every_head_reads_of_a_recycled_channel():
    actor = learner(Config(treatment="redo"), "actor", 7)
    train_once(actor)
    last = hidden_layers(actor.network)[2]
    dormant = torch.zeros(1, 64, dtype=torch.bool)
    dormant[0, 10] = True
    recycle(last, dormant, actor.optimizer, torch.Generator().manual_seed(0))
    read = matrices(actor.network.heads.hidden, 3).view(3, 128, 64, 16)
    assert not read[:, :, 10].any() and read[:, :, :10].all() and read[:, :, 11:].all()


def test_reset_redraws_the_last_layers_twice_and_forgets_their_moments():
    actor = learner(Config(treatment="reset"), "actor", 7)
    changed = []
    for clock in range(50_000, 400_001, 50_000):
        train_once(actor)
        before = copy.deepcopy(actor.network.state_dict())
        actor.rewire(clock)
        after = actor.network.state_dict()
        names = {n for n, p in actor.network.named_parameters() if not torch.equal(before[n], after[n])}
        if names:
            assert names == {"heads.output.weight", "heads.output.bias"}
            changed.append(clock)
            state = actor.optimizer.state
            for p in actor.network.parameters():
                own = any(p is q for q in actor.network.heads.output.parameters())
                assert state[p]["exp_avg"].any() != own and state[p]["exp_avg_sq"].any() != own
    assert changed == [100_000, 200_000]


def test_weight_decay_is_adams_and_only_where_it_is_asked_for():
    for treatment in TREATMENTS:
        if treatment != "lottery":
            (group,) = learner(Config(treatment=treatment), "actor", 7).optimizer.param_groups
            assert group["weight_decay"] == (1e-6 if "weight-decay" in treatment else 0)


@pytest.mark.parametrize("agent", AGENTS)
def test_layer_norm_normalises_each_experts_and_each_heads_layer_by_itself(agent):
    network = learner(Config(agent=agent, treatment="layer-norm"), "actor", 7).network
    observations, tasks = batch()
    experts, channels = network.encoder[-1].unflattened_size[0], 32
    x = observations.permute(0, 3, 1, 2).float()
    shown = network.encoder[2](network.encoder[1](network.encoder[0](x)))
    raw = network.encoder[2].layer(network.encoder[1](network.encoder[0](x)))
    for ours, plain in zip(shown.chunk(experts, 1), raw.chunk(experts, 1), strict=True):
        torch.testing.assert_close(ours, nn.functional.layer_norm(plain, (channels, 5, 5)))
    with torch.no_grad():
        network.heads.hidden.norm.bias[1] = 7.0
    features = torch.randn(20, 1024)
    hidden = network.heads.hidden(features, group=tasks)
    plain = nn.functional.layer_norm(network.heads.hidden.layer(features, group=tasks), (128,))
    torch.testing.assert_close(hidden, plain + 7.0 * (tasks == 1).unsqueeze(1))


def test_pcgrad_removes_conflict_and_leaves_agreement_alone():
    generator = torch.Generator().manual_seed(0)
    conflicting = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    torch.testing.assert_close(project(conflicting, generator), torch.tensor([[0.5, 0.5], [0.0, 1.0]]))
    for _ in range(20):
        pair = torch.randn(2, 6)
        projected = project(pair, generator)
        assert (projected @ pair.T).fill_diagonal_(0).min() > -1e-5
        if pair[0] @ pair[1] >= 0:
            assert torch.equal(projected, pair)


@pytest.mark.parametrize("treatment", ["pcgrad", "gmp+pcgrad"])
def test_pcgrad_averages_shared_gradients_and_gives_every_head_its_own(treatment):
    ours, plain = (learner(Config(treatment=t), "actor", 7) for t in (treatment, "dense"))
    observations, tasks = batch()

    def loss(rows, of=plain):
        return of.network(observations[rows], tasks[rows]).square().mean()

    generator = torch.Generator().manual_seed(5)
    ours.minimise(lambda rows: loss(rows, ours), torch.arange(20), tasks, generator)
    gradients = []
    for task in range(3):
        plain.optimizer.zero_grad()
        loss((tasks == task).nonzero().squeeze(1)).backward()
        gradients.append([p.grad.flatten() for p in plain.network.parameters()])
    encoder = [torch.cat(of_task[:6]) for of_task in gradients]
    expected = project(torch.stack(encoder), torch.Generator().manual_seed(5)).mean(0)
    got = [p.grad.flatten() for p in ours.network.parameters()]
    torch.testing.assert_close(torch.cat(got[:6]), expected)
    for i in range(6, len(got)):
        torch.testing.assert_close(got[i], sum(of_task[i] for of_task in gradients))


def test_lottery_ticket_is_the_pruned_networks_weights_at_their_first_values(tmp_path):
    gmp = Config(treatment="gmp", timesteps=1000, seed=3)
    dense = learner(replace(gmp, treatment="dense"), "actor", 7).network
    winners = {role: learner(gmp, role, out) for role, out in (("actor", 7), ("critic", 1))}
    for winner in winners.values():
        train_once(winner)
        winner.rewire(800)
    gmp.save(tmp_path)
    config = replace(gmp, treatment="lottery", ticket=tmp_path)
    checkpoint.save(tmp_path, {"clock": 500} | {role: w.state_dict() for role, w in winners.items()})
    with pytest.raises(ValueError, match="finished run"):
        require_ticket(config)
    checkpoint.save(tmp_path, {"clock": 1000} | {role: w.state_dict() for role, w in winners.items()})
    with pytest.raises(ValueError, match="same seed, got 3 and 4"):
        require_ticket(replace(config, seed=4))
    with pytest.raises(ValueError, match=r"same density, got 0\.05 and 0\.2"):
        require_ticket(replace(config, density=0.2))
    with pytest.raises(ValueError, match=r"same gmp, got GMPConfig\(.*end=0\.8.* and GMPConfig\(.*end=0\.5"):
        require_ticket(replace(config, gmp=replace(config.gmp, end=0.5)))
    require_ticket(config)
    ticket = learner(config, "actor", 7)
    assert ticket.live_parameters() == winners["actor"].live_parameters()
    for name, layer in ticket.network.named_modules():
        if hasattr(layer, "topology"):
            winner, first = winners["actor"].network.get_submodule(name), dense.get_submodule(name)
            assert torch.equal(layer.topology.mask(), winner.topology.mask())
            linear = isinstance(layer, sk.SparseLinear)
            values = layer.to_dense() if linear else layer.to_conv2d().weight
            expected = first.to_dense() if linear else first.weight
            kept = values != 0
            assert kept.sum() == layer.topology.num_live
            assert torch.equal(values[kept], expected[kept])
            assert torch.equal(layer.bias, first.bias)
    assert learner(config, "critic", 1).live_parameters() == winners["critic"].live_parameters()


def test_ticket_belongs_to_the_lottery(tmp_path):
    for settings in ({"treatment": "lottery"}, {"treatment": "gmp", "ticket": tmp_path}):
        with pytest.raises(ValueError, match="ticket belongs to treatment lottery"):
            Config(**settings)
