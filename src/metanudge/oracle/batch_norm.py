r"""Which statistics BatchNorm layers normalise by, written once for both executions.

A layer maps x to (x - m) / sqrt(v + eps) w + b. Of a support batch, m and v are its own mean and variance; of a query
batch they are, by policy,

- "transductive": the query batch's own, so a prediction depends on the other queries;
- "support": those of the support batch at the same parameters φ, m(φ) and v(φ), which gradients flow through;
- "frozen": the layer's running statistics, for support batches too.

Running statistics are never updated: they would mix the tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metanudge.errors import LossError, SettingsError
from metanudge.random_state import forked
from metanudge.types import Batch, LossFunction, Role

Policy = Literal["transductive", "support", "frozen"]
POLICIES: tuple[Policy, ...] = ("transductive", "support", "frozen")
Statistics = tuple[Tensor, Tensor]


class BatchNorm:
    """A policy for the BatchNorm layers of a model, while it is lent out.

    Args:
        policy: One of ``POLICIES``; None for a model without such layers.
        model: Looked through for them at every use.

    Raises:
        SettingsError: An unknown policy, layers without a policy, or without what it needs.
    """

    def __init__(self, policy: Policy | None, model: nn.Module) -> None:
        if policy is not None and policy not in POLICIES:
            raise SettingsError(f"batch_norm must be one of {', '.join(POLICIES)} or None, got {policy!r}")
        self.policy, self.model = policy, model
        self._seen: dict[_BatchNorm, list[Statistics]] | None = None
        self._given: dict[_BatchNorm, Iterator[Statistics]] | None = None
        self.layers()

    def layers(self) -> list[_BatchNorm]:
        """The model's BatchNorm layers.

        Raises:
            SettingsError: The policy does not fit them.
        """
        found = {name: module for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)}
        for name, layer in found.items():
            if self.policy is None:
                raise SettingsError(
                    f"{name or 'the model'} is a BatchNorm layer, and what normalises query batches must be said: "
                    'batch_norm="transductive" (the query batch itself), "support" (the statistics of the support set) '
                    'or "frozen" (the running statistics the model came with). GroupNorm and LayerNorm need nothing'
                )
            if self.policy == "frozen" and layer.running_mean is None:
                raise SettingsError(
                    f'batch_norm="frozen" needs running statistics, and {name or "the model"} has none; give '
                    '"transductive" or "support"'
                )
        return list(found.values())

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the layers follow the policy; whoever lends the model out puts back their modes."""
        layers = self.layers()
        for layer in layers:
            layer.training = self.policy != "frozen"
        if self.policy == "transductive":
            with _untracked(layers):
                yield
            return
        if self.policy != "support":
            yield
            return
        before = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                # a compiled model calls it between its graphs: it passes tensors from one batch to another
                layer.__dict__["forward"] = torch.compiler.disable(partial(self._normalised, layer))  # type: ignore[no-untyped-call]
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.__dict__["forward"] = forward

    def evaluate(
        self, role: Role, function: LossFunction, support_loss: LossFunction, at: Callable[[Role, LossFunction], Tensor]
    ) -> Tensor:
        """``at(role, function)``; before a query batch, if need be, a pass over the support set that is looked at."""
        if self.policy != "support":
            return at(role, function)
        try:
            self._seen = {}
            if role is Role.SUPPORT:
                return at(role, function)
            at(Role.SUPPORT, support_loss)
            self._given = {layer: iter(statistics) for layer, statistics in self._seen.items()}
            return at(role, function)
        finally:
            self._seen = self._given = None

    def settle(self, adapted: nn.Module, support_loss: LossFunction, support: Batch) -> None:
        """Let an adapted copy of the model follow the policy by itself, in train and in eval mode alike."""
        layers = BatchNorm(self.policy, adapted).layers()
        if self.policy == "support" and layers:
            for layer, statistics in zip(layers, self._measured(adapted, support_loss, support), strict=True):
                if statistics is None:
                    continue
                layer.track_running_stats = True
                for name, buffer in zip(("running_mean", "running_var"), statistics, strict=True):
                    layer.register_buffer(name, buffer.detach())
        for layer in layers:
            if self.policy == "transductive":
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            else:
                layer.__dict__["train"] = partial(_stay, layer)
                layer.eval()

    def _measured(self, adapted: nn.Module, support_loss: LossFunction, support: Batch) -> list[Statistics | None]:
        """Of the support set, by the last call of every layer; None of those that the loss does not call."""
        shared = {id(parameter): parameter for parameter in adapted.parameters()}
        probe = BatchNorm(self.policy, copy.deepcopy(adapted, memo=dict(shared)))  # with buffers of its own to write to
        device = next(adapted.parameters()).device
        with probe.lent(), torch.enable_grad(), forked(device):  # for a loss that takes derivatives itself
            probe._seen = {}
            support_loss(probe.model, support)
        calls = [probe._seen.get(layer) for layer in probe.layers()]
        return [None if of_layer is None else of_layer[-1] for of_layer in calls]

    def _normalised(self, layer: _BatchNorm, inputs: Tensor) -> Tensor:
        """What a layer does under "support"."""
        shape = (1, -1, *(1 for _ in inputs.shape[2:]))
        if self._given is not None:
            statistics = next(self._given.get(layer, iter(())), None)
            if statistics is None:
                raise LossError(
                    'batch_norm="support": a BatchNorm layer was called more often for the query than for the support '
                    "set; let losses and metrics call the model equally often"
                )
            mean, variance = statistics
        elif self._seen is not None:
            if inputs.numel() == inputs.shape[1]:
                raise LossError(f"BatchNorm needs more than one value a channel, got inputs {tuple(inputs.shape)}")
            axes = [axis for axis in range(inputs.ndim) if axis != 1]
            mean, variance = inputs.mean(axes), inputs.var(axes, correction=0)
            self._seen.setdefault(layer, []).append((mean, variance))
        else:
            raise LossError(
                'batch_norm="support" cannot go with activation checkpointing inside the model, which calls BatchNorm '
                "layers again in the backward pass; leave checkpointing out, or give another policy"
            )
        scaled = (inputs - mean.view(shape)) * (variance.view(shape) + layer.eps).rsqrt()
        if layer.weight is not None:
            scaled = scaled * layer.weight.view(shape)
        return scaled if layer.bias is None else scaled + layer.bias.view(shape)


def _stay(layer: _BatchNorm, mode: bool = True) -> nn.Module:  # noqa: ARG001
    """In the place of ``layer.train``; a learner that the module is given to sets ``training`` itself."""
    return type(layer).train(layer, False)


@contextmanager
def _untracked(layers: list[_BatchNorm]) -> Iterator[None]:
    """Leave running statistics alone.

    What is written there would be undone; and with momentum=None a layer takes float() of its count, not for vmap.
    """
    before = [layer.track_running_stats for layer in layers]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracks in zip(layers, before, strict=True):
            layer.track_running_stats = tracks
