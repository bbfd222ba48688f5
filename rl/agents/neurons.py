"""The hidden neurons of an agent: how active each is, and between which weights it stands.

A neuron of a convolution is a channel, at all positions together. Each expert's and each task head's share of a layer
counts as a layer of its own: a "group".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Hidden(NamedTuple):
    """One layer of hidden neurons."""

    name: str
    incoming: nn.Module  # the layer that computes them
    activation: nn.Module  # its output is what they show
    outgoing: nn.Module | None  # the layer that reads them; None where they share their readers, in a mixture's output
    groups: int  # experts, or tasks where it belongs to heads
    neurons: int  # of each group
    of_head: bool  # a head's neurons see their own task's observations only
    gain: float  # first incoming weights were uniform within gain / sqrt(fan_in)


def hidden_layers(network: nn.Module) -> list[Hidden]:
    """All layers of hidden neurons of an agent's network."""
    encoder, heads = network.encoder, network.heads
    computing = [encoder[0], encoder[2], encoder[4]]
    mixed = hasattr(network, "task_encoder")
    shown = [encoder[1], encoder[3], encoder if mixed else network.activation]
    first_of_heads = heads.output if heads.hidden is None else heads.hidden
    read_by = [*computing[1:], None if mixed else first_of_heads]
    layers = [
        Hidden(f"encoder{i}", *layer, encoder.experts, neurons, False, encoder.gain)
        for i, (*layer, neurons) in enumerate(zip(computing, shown, read_by, encoder.neurons, strict=True), 1)
    ]
    if heads.hidden is not None:
        tasks = heads.output.groups
        size = heads.output.in_features // tasks
        layers.append(Hidden("head", heads.hidden, heads.activation, heads.output, tasks, size, True, 1))
    return layers


@contextmanager
def watching(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple, dict, Tensor]]]:
    """Inside, every call of one of these modules is noted, the last one counts: module -> (args, kwargs, output)."""
    calls = {}

    def note(module, args, kwargs, output):
        calls[module] = (args, kwargs, output)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class Activity(NamedTuple):
    """How active the neurons of a layer were."""

    layer: Hidden
    score: Tensor  # float [groups, neurons]: E|h_i| / mean_k E|h_k|
    counted: Tensor  # bool [groups, neurons]: False without live incoming weights, or without observations

    def dormant(self, tau: float) -> Tensor:
        """Bool [groups, neurons]: the neurons whose score is at most tau."""
        return self.counted & (self.score <= tau)


@torch.no_grad()
def activity(network: nn.Module, observations: Tensor, tasks: Tensor) -> list[Activity]:
    """Measure all hidden neurons on these observations.

    Neurons all of whose incoming weights are pruned are neither counted nor part of the mean that others are compared
    with.
    """
    layers = hidden_layers(network)
    with watching(*(layer.activation for layer in layers)) as calls:
        network(observations, tasks)
    measured = []
    for layer in layers:
        size = calls[layer.activation][2].abs()
        if layer.of_head:
            totals = size.new_zeros(layer.groups, layer.neurons).index_add_(0, tasks, size)
            seen = tasks.bincount(minlength=layer.groups).unsqueeze(1)
            mean = totals / seen.clamp(min=1)
        else:
            mean = size.reshape(len(size), layer.groups, layer.neurons, -1).mean(dim=(0, 3))
            seen = len(size)
        counted = alive(layer.incoming, *mean.shape) & (seen > 0)
        typical = (mean * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        measured.append(Activity(layer, mean / (typical + 1e-9), counted))
    return measured


def alive(incoming: nn.Module, groups: int, neurons: int) -> Tensor:
    """Bool [groups, neurons]: has the neuron live incoming weights?"""
    if not hasattr(incoming, "topology"):  # dense
        return torch.ones(groups, neurons, dtype=torch.bool, device=next(incoming.parameters()).device)
    rows = incoming.topology.mask().any(dim=2)  # of blocks, in the layer's own groups
    rows = rows.repeat_interleave(incoming.block_size, dim=1)
    return rows[:, : groups * neurons // len(rows)].reshape(groups, neurons)
