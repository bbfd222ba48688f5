"""rl/agents: sizes, experts in groups, mixtures."""

import pytest
import torch
from torch import nn

from rl.agents import AGENTS
from rl.agents.encoder import ImageEncoder
from rl.agents.moore import orthonormalise


def observations(samples):
    return torch.randint(10, (samples, 7, 7, 3), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("agent", "num_tasks", "actor", "critic"),
    [("mtppo", 5, 671_059, 667_189), ("moe", 3, 417_403, None), ("moore", 5, 692_162, None), ("moe", 7, 966_925, None)],
)
def test_networks_have_the_papers_numbers_of_parameters(agent, num_tasks, actor, critic):
    for out_features, expected in ((7, actor), (1, critic)):
        if expected:
            made = AGENTS[agent](num_tasks, out_features, 1)
            assert sum(p.numel() for p in made.parameters()) == expected


def test_grouped_experts_and_their_gradients_equal_separate_convolutions():
    together, x = ImageEncoder(experts=3), observations(4)
    features = together(x)
    features.square().sum().backward()
    for expert, of_expert in enumerate(features.unbind(1)):
        alone = ImageEncoder()
        for own, grouped in zip(alone.parameters(), together.parameters(), strict=True):
            own.data = grouped.detach().chunk(3)[expert].clone()
        y = alone(x)
        torch.testing.assert_close(y[:, 0], of_expert)
        y.square().sum().backward()
        for own, grouped in zip(alone.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(own.grad, grouped.grad.chunk(3)[expert], rtol=1e-4, atol=1e-2)


def test_moore_mixes_orthonormal_experts_that_span_the_encoders():
    made = AGENTS["moore"](7, 7, 1)
    x = observations(5)
    experts, raw = made.experts(x), made.encoder(x)
    torch.testing.assert_close(experts @ experts.mT, torch.eye(4).expand(5, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(experts[:, 0], nn.functional.normalize(raw[:, 0], dim=-1))
    inside = raw @ experts.mT @ experts  # projected onto their span: themselves
    torch.testing.assert_close(inside, raw, rtol=1e-3, atol=1e-3)


def test_orthonormalising_survives_an_expert_that_is_zero():
    vectors = torch.randn(3, 3, 8, requires_grad=True)
    basis = orthonormalise(vectors * torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1))
    basis.sum().backward()
    assert basis.isfinite().all() and vectors.grad.isfinite().all()
    expected = torch.diag(torch.tensor([1.0, 0.0, 1.0])).expand(3, 3, 3)
    torch.testing.assert_close(basis @ basis.mT, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("agent", ["moe", "moore"])
def test_mixture_is_tanh_of_the_tasks_weighted_sum_before_its_head(agent):
    made, x, task = AGENTS[agent](5, 7, 1), observations(6), torch.tensor([4, 0, 2, 2, 1, 3])
    weights = made.task_encoder.weight[:, task]  # [experts, N]
    assert weights.min() < 0
    mixed = sum(w[:, None] * expert for w, expert in zip(weights, made.experts(x).unbind(1), strict=True))
    torch.testing.assert_close(made(x, task), made.heads(torch.tanh(mixed), task))
