"""What only a device can show: tensor cores, streams, captured graphs, and that nothing synchronises."""

import numpy as np
import oracle
import pytest
import torch
from oracle import random_topology
from torch import nn

import sparsekern as sk
from rl.algorithms.gaussian import log_probs_of_draws
from rl.algorithms.replay import Replay
from rl.algorithms.sac import SAC
from rl.algorithms.timestep import Timestep
from rl.algorithms.trainer import plasticity_metrics
from rl.config import Config, ReDoConfig, ResetConfig, SACConfig, SETConfig
from sparsekern import choose
from sparsekern.backends import dense, reference, triton

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        triton.unavailable() is not None or not torch.cuda.is_available(),
        reason=f"no GPU for Triton: {triton.unavailable() or 'its interpreter is on'}",
    ),
]

# (dtype, float32 matmul precision, bound): tf32 rounds float32 operands to 11 bits.
ARITHMETIC = [
    (torch.bfloat16, "highest", oracle.BOUND[torch.bfloat16]),
    (torch.float16, "highest", oracle.BOUND[torch.float16]),
    (torch.float32, "highest", 3e-6),  # a device adds in another order than NumPy
    (torch.float32, "high", 2e-3),
]


@pytest.fixture(params=ARITHMETIC, ids=lambda a: f"{str(a[0]).removeprefix('torch.')}-{a[1]}")
def arithmetic(request):
    """(dtype, bound) under a float32 matmul precision."""
    dtype, precision, bound = request.param
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    yield dtype, bound
    torch.set_float32_matmul_precision(before)


def products(topology, x, dy, weight, bias, offsets=None):
    """y, dx, dW and db of one layer."""
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = sk.dds(x, weight, topology, bias, transpose=True, token_offsets=offsets)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def expected(topology, x, dy, dense, ends):
    """The same of float64 arrays, but for db."""
    dw = oracle.outer(dy, x, topology.groups, ends)
    return oracle.dds(x, dense, True, ends), oracle.dds(dy, dense, False, ends), oracle.gather_blocks(dw, topology)


@pytest.mark.parametrize("kind", ["plain", "groups", "ragged"])
@pytest.mark.parametrize("block_size", triton.BLOCK_SIZES)
def test_products_match_float64(arithmetic, block_size, kind):
    dtype, bound = arithmetic
    topology = random_topology((5, 7), block_size, 1 if kind == "plain" else 3, dead=2)
    groups = topology.groups if kind == "ragged" else 1
    for tokens in (1, 7, 300):
        ends = [0, 0, tokens // 3, tokens] if kind == "ragged" else None
        x, dy = (torch.randn(tokens, size // groups, dtype=dtype) for size in reversed(topology.shape))
        weight = torch.randn(topology.num_slots, block_size, block_size).to(dtype)
        weight[topology.block_rows < 0] = 0
        arrays = [t.double().numpy() for t in (x, dy)] + [oracle.dense_weight(weight, topology)]
        bias = torch.zeros(topology.shape[0], dtype=dtype, device=DEVICE)
        offsets = None if ends is None else torch.tensor(ends, device=DEVICE)
        topology.to(DEVICE)
        with sk.use("triton"):
            y, dx, dw, _ = products(topology, x.to(DEVICE), dy.to(DEVICE), weight.to(DEVICE), bias, offsets)
        topology.to("cpu")
        truth, sizes = (expected(topology, *map(size, arrays), ends) for size in (lambda a: a, np.abs))
        for name, actual, right, size in zip(("y", "dx", "dw"), (y, dx, dw), truth, sizes, strict=True):
            size = np.maximum(size, 2**-14 if dtype == torch.float16 else 0)
            assert oracle.error(actual.cpu(), right, size) < bound, (name, tokens)


@pytest.mark.parametrize("block_size", triton.BLOCK_SIZES)
def test_products_of_a_wide_layer_match_float64(arithmetic, block_size):
    dtype, bound = arithmetic
    topology = sk.Topology.random((2048, 1536), 0.1, block_size).to(DEVICE)
    x, dy = (torch.randn(5000, size, device=DEVICE).to(dtype) for size in (1536, 2048))
    weight = torch.randn(topology.num_slots, block_size, block_size, device=DEVICE).to(dtype)
    bias = torch.randn(2048, device=DEVICE).to(dtype)
    with sk.use("triton"):
        ours = products(topology, x, dy, weight, bias)
    exact = [t.detach().double() for t in (x, dy, weight, bias)]
    with sk.use("reference"):
        truth, sizes = products(topology, *exact), products(topology, *(t.detach().abs() for t in exact))
    for actual, right, size in zip(ours[:3], truth[:3], sizes[:3], strict=True):
        assert ((actual.double() - right).abs() / size.clamp(min=1e-30)).max() < bound


@pytest.mark.parametrize("block_size", triton.BLOCK_SIZES)
def test_block_norms_match_the_reference(arithmetic, block_size):
    dtype, _ = arithmetic
    topology = random_topology((5, 7), block_size, dead=2).to(DEVICE)
    x, dy = (torch.randn(300, size, device=DEVICE).to(dtype) for size in reversed(topology.shape))
    norms, armed = torch.full((1, 5, 7), -1.0, device=DEVICE), torch.tensor(False, device=DEVICE)
    triton.add_block_norms(dy, x, topology.layout, norms, armed)
    assert (norms == -1).all()
    triton.add_block_norms(dy, x, topology.layout, norms, armed.fill_(True))
    exact = reference.block_norms(dy.double(), x.double(), topology.layout, slice(0, 5))
    torch.testing.assert_close(norms, exact, rtol=2e-3, atol=0)


def network(block_size, groups=1):
    torch.manual_seed(0)
    make = lambda i, o: sk.SparseLinear(i, o, density=0.2, block_size=block_size, groups=groups)  # noqa: E731
    return nn.Sequential(make(groups * 256, groups * 512), nn.ReLU(), make(groups * 512, groups * 128)).to(DEVICE)


def test_the_kernels_are_what_the_chooser_takes_here():
    layer = network(16)[0]
    assert choose.backend_for("dds", torch.empty(1, 256, device=DEVICE), layer.topology.layout) is triton
    assert choose.backend_for("dds", torch.empty(1, 256, device=DEVICE).double(), layer.topology.layout) is dense


@pytest.mark.parametrize("name", ["SET", "RigL"])
def test_a_training_step_with_its_rewire_does_not_synchronise(name):
    model = network(32)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rule = getattr(sk, name)(model, optimizer, drop_fraction=0.3, update_every=2)
    x = torch.randn(128, 256, device=DEVICE)
    before = model[0].topology.block_cols.clone()

    def step():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return rule.step()

    for _ in range(3):  # kernels are compiled and loaded
        step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        fired = [step() for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any(fired)
    assert not torch.equal(before, model[0].topology.block_cols)


def test_a_ragged_step_does_not_synchronise():
    layer = sk.SparseLinear(3 * 64, 3 * 96, density=0.5, block_size=16, groups=3).to(DEVICE)
    x, ids = torch.randn(50, 64, device=DEVICE), torch.randint(0, 3, (50,), device=DEVICE)
    for mode in ("default", "error"):  # the first compiles
        try:
            torch.cuda.set_sync_debug_mode(mode)
            layer(x, group=ids).square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def rewire_in_place(layer, seed):
    topology = layer.topology
    twin = sk.Topology(topology.block_rows.cpu(), topology.block_cols.cpu(), topology.shape, topology.block_size)
    oracle.rewire_at_random(twin, seed)
    topology.block_rows.copy_(twin.block_rows)
    topology.block_cols.copy_(twin.block_cols)
    topology.rebuild()


@pytest.mark.parametrize("block_size", triton.BLOCK_SIZES)
def test_a_captured_step_replayed_after_a_rewire_computes_with_the_new_topology(block_size):
    model = network(block_size)
    x, dy = torch.randn(200, 256, device=DEVICE), torch.randn(200, 128, device=DEVICE)

    def step():
        y = model(x)
        y.backward(dy)
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and lets gradients exist
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        y = step()
    for seed in range(3):
        for layer in (model[0], model[2]):
            rewire_in_place(layer, seed)
        model.zero_grad(set_to_none=False)
        graph.replay()
        replayed = [y.clone(), *(p.grad.clone() for p in model.parameters())]
        model.zero_grad(set_to_none=False)
        eager = [step().detach(), *(p.grad for p in model.parameters())]
        for ours, theirs in zip(replayed, eager, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_compile_takes_a_whole_model_and_follows_rewires(dtype):
    model = network(64)
    rule = sk.SET(model, torch.optim.SGD(model.parameters(), 0.1), update_every=1)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(130, 256, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for _ in range(3):
            results = []
            for forward in (compiled, model):
                model.zero_grad()
                y = forward(x)
                y.float().square().mean().backward()
                results.append([y.detach(), *(p.grad for p in model.parameters())])
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)
            rule.step()


@pytest.mark.parametrize("treatment", ["dense", "set", "gmp"])
def test_a_captured_timestep_equals_an_eager_one_through_rewires_and_compactions(treatment):
    """The agents of rl in blocks of 16: replay and actions as one graph, the update of all networks as another."""
    config = Config(
        suite="mt10",
        agent="mtsac",
        treatment=treatment,
        block_size=16,
        density=0.1,
        timesteps=100,
        sac=SACConfig(batch=8, device=DEVICE),
        set=SETConfig(update_every=10),
    )
    draw = np.random.default_rng(0)
    agents = [SAC(config, Replay(50, 10, 49, 4, DEVICE), 10, 49, 4, DEVICE) for _ in range(2)]
    agents[1].captured = False
    timesteps = [Timestep(agent) for agent in agents]
    first = [torch.as_tensor(draw.random((10, size))) for size in (49, 4, 1, 49, 1)]
    for agent in agents:
        agent.replay.add(*first)
    for clock in range(10, 101, 10):
        shown, following = draw.random((2, 5, 10, 49), np.float32)
        noise, rewards = torch.randn(5, 10, 4), draw.random((5, 10))
        found = []
        for agent, timestep in zip(agents, timesteps, strict=True):
            timestep.begin(torch.Generator().manual_seed(clock))
            actions = []
            for i in range(5):
                actions.append(torch.tensor(timestep.start(shown[i], noise[i])))
                timestep.finish()
                timestep.arrive(rewards[i], following[i], np.zeros(10))
            timestep.end()
            filled = agent.replay.storage[: len(agent.replay)]
            found.append([torch.stack(actions), timestep.stats.clone(), filled.clone()])
            agent.rewire(clock)
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert all(graph._graph is not None for graph in timesteps[0]._graphs) and timesteps[1]._graphs is None
    assert len(agents[0].replay) == 50  # and it was overwritten once


@pytest.mark.parametrize("treatment", ["dense", "redo", "reset", "layer-norm", "pcgrad"])
def test_a_sac_agent_is_treated_and_looked_at_on_the_gpu(treatment):
    config = Config(
        suite="mt10",
        agent="mtsac",
        treatment=treatment,
        sac=SACConfig(batch=8, device=DEVICE),
        redo=ReDoConfig(every=10, tau=0.5),
        reset=ResetConfig(every=10),
    )
    replay = Replay(50, 10, 49, 4, DEVICE)
    for _ in range(50):
        replay.add(*(torch.rand(10, size, device=DEVICE) for size in (49, 4, 1, 49, 1)))
    agent = SAC(config, replay, 10, 49, 4, DEVICE)
    for clock in (5, 10, 15):
        agent.rewire(clock)
        assert agent.update(torch.Generator().manual_seed(clock)).isfinite().all()
    metrics = plasticity_metrics({"actor": agent.actor, "critic": agent.critic}, log_probs_of_draws, seed=0, clock=15)
    assert metrics["rank/critic"] >= 1 and metrics["fisher/actor"] > 0
