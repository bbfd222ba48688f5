"""rl/metrics.py and rl/agents/neurons.py: dormancy, rank and Fisher trace against brute force, sample by sample."""

import copy
import math

import pytest
import torch
from torch import nn

import sparsekern as sk
from rl.agents import AGENTS
from rl.agents.neurons import activity
from rl.algorithms.buffer import CAPACITY, PlasticityBuffer
from rl.config import Config
from rl.metrics import categorical, effective_rank, fisher_trace, network_metrics
from rl.treatments import TREATMENTS
from rl.treatments.context import Context

TASKS = 3  # and two experts


def network(agent, treatment="dense", block_size=1):
    """An agent's actor in blocks of this size, treated and, by gmp, pruned to half of its weights."""
    config = Config(agent=agent, treatment=treatment, density=0.5, block_size=block_size, timesteps=1000)
    made = AGENTS[agent](TASKS, 7, block_size)
    context = Context(config, "actor", made, seed=0, buffer=PlasticityBuffer())
    for part in TREATMENTS[treatment]:
        part.prepare(context)
        if treatment == "gmp":
            context.optimizer = torch.optim.Adam(made.parameters())
            part.make_rule(context).step(clock=1000)
    return made


def batch(samples):
    return torch.randint(10, (samples, 7, 7, 3), dtype=torch.uint8), torch.randint(TASKS, (samples,))


@pytest.mark.parametrize(
    ("agent", "treatment", "block_size"),
    [("mtppo", "dense", 1), ("mtppo", "set", 1), ("mtppo", "gmp", 4), ("moe", "gmp", 1), ("moore", "gmp", 4)]
    + [("moore", "layer-norm", 1), ("mtppo", "layer-norm", 1), ("moore", "set", 16)],
)
def test_fisher_trace_is_the_mean_squared_norm_of_each_samples_gradient(agent, treatment, block_size):
    actor = network(agent, treatment, block_size)
    observations, tasks = batch(12)
    fast = fisher_trace(actor, observations, tasks, categorical, torch.Generator().manual_seed(3))

    with torch.no_grad():
        logits = actor(observations, tasks)
    actions = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    total = 0.0
    for i in range(12):
        actor.zero_grad()
        actor(observations[i : i + 1], tasks[i : i + 1]).log_softmax(-1)[0, actions[i]].backward()
        total += sum(p.grad.square().sum().item() for p in actor.parameters())
    assert fast == pytest.approx(total / 12, rel=1e-4)
    assert fast > 0


def test_effective_rank_counts_the_singular_values_that_make_up_99_percent():
    u, v = (torch.linalg.qr(torch.randn(20, 6)).Q for _ in range(2))
    features = u @ torch.diag(torch.tensor([50.0, 30.0, 19.5, 0.3, 0.1, 0.1])) @ v.T
    assert effective_rank(features) == 3
    assert effective_rank(features, delta=0.25) == 2
    assert effective_rank(torch.ones(5, 4)) == 1


@pytest.mark.parametrize("agent", AGENTS)
def test_dormancy_of_every_layer_matches_activations_computed_by_hand(agent):
    made = network(agent)
    with torch.no_grad():  # some dead neurons: of the second expert's, or the only encoder's, convolutions and of heads
        for conv, dead in ((made.encoder[0], slice(-3, None)), (made.encoder[2], slice(-5, -2))):
            conv.bias += 10 * conv.in_channels**2
            conv.bias[dead] = -1e5
        made.heads.hidden.weight.view(TASKS, 128, 1024)[1, :2] = 0
        made.heads.hidden.bias[128:130] = 0
    observations, tasks = batch(200)
    measured = {neurons.layer.name: neurons for neurons in activity(made, observations, tasks)}
    assert measured["encoder1"].dormant(0.001).nonzero()[:, 1].tolist() == [13, 14, 15]
    assert measured["encoder2"].dormant(0.001).nonzero()[:, 1].tolist() == [27, 28, 29]
    assert measured["head"].dormant(0.001).nonzero().tolist() == [[1, 0], [1, 1]]
    neurons = sum(m.counted.numel() for m in measured.values())
    assert network_metrics("actor", made, observations, tasks)["dormant/actor"] == pytest.approx(8 / neurons)

    with torch.no_grad():
        x = observations.permute(0, 3, 1, 2).float()
        x = made.encoder[1](made.encoder[0](x)).unflatten(1, (-1, 16))
        shown = made.encoder(observations)  # of experts, before they are mixed
    last = x[:, -1].abs().mean(dim=(0, 2, 3))
    torch.testing.assert_close(measured["encoder1"].score[-1], last / last.mean())
    if agent == "mtppo":
        shown = shown.tanh()
    last = shown[:, -1].reshape(200, 64, 16).abs().mean(dim=(0, 2))
    torch.testing.assert_close(measured["encoder3"].score[-1], last / last.mean())
    if agent == "mtppo":
        own = nn.functional.linear(
            shown[tasks == 2, 0],
            made.heads.hidden.weight.detach().view(TASKS, 128, 1024)[2],
            made.heads.hidden.bias.detach()[256:],
        )
        last = own.tanh().abs().mean(0)
        torch.testing.assert_close(measured["head"].score[2], last / last.mean())


def test_neurons_without_live_weights_are_left_out_of_count_and_comparison():
    made = sk.sparsify(network("moe"), density=1.0, block_size=1, modules=(nn.Conv2d, nn.Linear))
    mask = torch.ones(32, 12, dtype=torch.bool)
    mask[5:9] = False
    made.encoder[0] = sk.SparseConv2d.from_conv2d(made.encoder[0].to_conv2d(), 1.0, 1, keep=mask.view(32, 3, 2, 2))
    observations, tasks = batch(50)
    first = activity(made, observations, tasks)[0]
    assert (~first.counted).nonzero().tolist() == [[0, i] for i in range(5, 9)]
    assert first.score[0][first.counted[0]].mean().item() == pytest.approx(1, rel=1e-5)


def test_tasks_that_were_not_seen_do_not_count():
    made = network("mtppo")
    observations, _ = batch(50)
    head = activity(made, observations, torch.full((50,), 1))[-1]
    assert head.counted.sum(1).tolist() == [0, 128, 0]
    assert not head.dormant(10.0)[0].any()


def test_mixtures_report_the_mean_rank_of_their_experts():
    made, (observations, tasks) = network("moore"), batch(40)
    metrics = network_metrics("critic", made, observations, tasks)
    with torch.no_grad():
        ranks = [effective_rank(expert) for expert in made.encoder(observations).unbind(1)]
    assert metrics["rank/critic_experts"] == sum(ranks) / 2
    assert 1 <= metrics["rank/critic"] <= 40
    assert "rank/actor_experts" not in network_metrics("actor", network("mtppo"), observations, tasks)


def test_metrics_leave_the_network_and_its_gradients_as_they_were():
    made, (observations, tasks) = network("moe"), batch(10)
    before = copy.deepcopy(made.state_dict())
    hooks = [list(module._forward_hooks) for module in made.modules()]
    network_metrics("actor", made, observations, tasks)
    fisher_trace(made, observations, tasks, categorical, torch.Generator().manual_seed(0))
    assert all(p.grad is None for p in made.parameters())
    assert [list(module._forward_hooks) for module in made.modules()] == hooks
    after = made.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if isinstance(before[name], torch.Tensor))
    assert math.isfinite(fisher_trace(made, observations, tasks, categorical, torch.Generator().manual_seed(0)))


def test_buffer_keeps_the_latest_observations_and_samples_without_repetition():
    buffer, rows = PlasticityBuffer(), CAPACITY // 2 + 10
    for value in range(3):
        buffer.add(
            torch.full((rows, 1, 1, 1), value, dtype=torch.uint8).expand(-1, 7, 7, 3), torch.full((rows,), value)
        )
    assert buffer.tasks.bincount().tolist() == [0, CAPACITY - rows, rows]
    assert torch.equal(buffer.observations[:, 0, 0, 0].long(), buffer.tasks)
    again = PlasticityBuffer()
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.tasks, buffer.tasks)
    small = PlasticityBuffer()
    small.add(torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(-1, 7, 7, 3), torch.arange(30))
    assert sorted(small.sample(torch.Generator())[1].tolist()) == list(range(30))
