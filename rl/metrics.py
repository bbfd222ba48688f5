"""Plasticity metrics: dormant neurons, effective rank and the Fisher trace, on a sample of the plasticity buffer.

dormant/<network>          share of hidden neurons with E|h_i| <= .001 mean_k E|h_k| in their layer; ...@0.025, ...@0.1
rank/<network>             effective rank of the features that all heads share, at most 1024
                           (a pair of critics: the mean of both)
rank/<network>_experts     the same of each expert's output before mixing, averaged over experts
fisher/actor               E |grad log pi(a|s)|^2 over states s and actions a ~ pi, of live weights and biases
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsekern as sk
from rl.agents.neurons import activity, watching
from rl.treatments.layer_norm import LayerNorm

TAUS = (0.001, 0.025, 0.1)
DELTA = 0.01


# Draws an action for each row of an actor's outputs [N, ...]; returns their log-probabilities [N], with gradients.
LogProbs = Callable[[Tensor, torch.Generator], Tensor]


def network_metrics(name: str, network: nn.Module, observations: Tensor, tasks: Tensor) -> dict[str, float]:
    """Dormancy and rank of one network, on [N, 7, 7, 3] observations of these tasks [N]."""
    measured = activity(network, observations, tasks)
    neurons = sum(int(layer.counted.sum()) for layer in measured)
    metrics = {}
    for tau in TAUS:
        suffix = "" if tau == TAUS[0] else f"@{tau}"
        metrics[f"dormant/{name}{suffix}"] = sum(int(layer.dormant(tau).sum()) for layer in measured) / neurons
    with torch.no_grad(), watching(network.encoder, network.activation) as calls:
        network(observations, tasks)
    shared = calls[network.activation][2]
    towers = shared.unbind(1) if shared.dim() == 3 else (shared,)
    metrics[f"rank/{name}"] = sum(map(effective_rank, towers)) / len(towers)
    experts = calls[network.encoder][2].unbind(1)
    if len(experts) > len(towers):
        metrics[f"rank/{name}_experts"] = sum(map(effective_rank, experts)) / len(experts)
    return metrics


def effective_rank(features: Tensor, delta: float = DELTA) -> int:
    """srank of [N, D] features: the fewest singular values that make up 1 - delta of the sum of all."""
    shares = torch.linalg.svdvals(features).cumsum(0)
    return int((shares < (1 - delta) * shares[-1]).sum()) + 1


def categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The LogProbs of a choice between actions."""
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(1, torch.multinomial(log_probs.detach().exp(), 1, generator=generator)).squeeze(1)


def fisher_trace(
    actor: nn.Module, observations: Tensor, tasks: Tensor, log_probs: LogProbs, generator: torch.Generator
) -> float:
    """E |grad log pi(a|s)|^2, per sample, with one action drawn per state.

    No sample's gradient reaches into another's, so one backward pass gives all dlogpi/dy of a layer's outputs y; with
    its inputs they make up the gradient of its weights, per sample.
    """
    layers = [module for module in actor.modules() if module._parameters]
    with torch.enable_grad(), watching(*layers) as calls:
        log_prob = log_probs(actor(observations, tasks), generator).sum()
    outputs = [calls[layer][2] for layer in layers]
    gradients = torch.autograd.grad(log_prob, outputs)
    total = 0.0
    for layer, dy in zip(layers, gradients, strict=True):
        (x,), options, _ = calls[layer]
        total += squared_norms(layer, x.detach(), dy, **options).item()
    return total / len(observations)


def squared_norms(layer: nn.Module, x: Tensor, dy: Tensor, group: Tensor | None = None) -> Tensor:
    """|gradient of weight and bias|^2, summed over samples: each sample has its row of the input x and of dL/dy."""
    if isinstance(layer, sk.SparseLinear):
        # (dy_r x_c)^2 over live weights (r, c) and samples: a product of squares, on the live blocks
        offsets = None
        if group is not None:
            group, order = torch.sort(group, stable=True)
            starts = torch.arange(layer.groups + 1, device=group.device)
            offsets, x, dy = torch.searchsorted(group, starts), x[order], dy[order]
        weight = sk.sdd(dy.square(), x.square(), layer.topology, token_offsets=offsets).sum()
    elif isinstance(layer, LayerNorm):
        weight = (dy * layer.normalised(x).view_as(dy)).square().sum()
    elif isinstance(layer, nn.Linear):
        weight = (dy.square().sum(1) * x.square().sum(1)).sum()
    elif isinstance(layer, (nn.Conv2d, sk.SparseConv2d)):
        samples, groups = len(x), layer.groups
        taps = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        taps = taps.view(samples, groups, -1, taps.shape[-1])  # [N, groups, taps, positions]
        of_weights = dy.reshape(samples, groups, -1, taps.shape[-1]) @ taps.mT
        weight = (of_weights.square().sum(0) * live(layer)).sum()
        dy = dy.sum(dim=(2, 3))
    else:
        raise ValueError(f"fisher_trace: no formula for the parameters of {type(layer).__name__}")
    return weight if layer.bias is None else weight + dy.square().sum()


def live(conv: nn.Module) -> Tensor:
    """Bool, broadcastable to [groups, out, taps]: the weights that are live."""
    if isinstance(conv, nn.Conv2d):
        return torch.ones(1, 1, 1, dtype=torch.bool)
    out, into = (size // conv.groups for size in conv.topology.shape)
    blocks = conv.topology.mask()
    for side in (1, 2):
        blocks = blocks.repeat_interleave(conv.block_size, dim=side)
    return blocks[:, :out, :into]
