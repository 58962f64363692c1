"""Losses of one task, by the live module and ``.backward()`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain

import torch
from torch import Tensor, nn

from metanudge import tree
from metanudge.batching import examples, ordinary, pieces
from metanudge.bundles import Bundles
from metanudge.checks import check_device, leaves
from metanudge.losses import HessianProduct, InnerGradients
from metanudge.minibatches import as_minibatches
from metanudge.oracle.averages import Look, settled
from metanudge.oracle.batch_norm import BatchNorm
from metanudge.oracle.common import Tally, require_gradient, require_graph, round_off, scalar_loss, times
from metanudge.oracle.known import Known, gradients_aside, strangers
from metanudge.oracle.module import LiveModule
from metanudge.oracle.notes import noted
from metanudge.random_state import RandomState
from metanudge.sharding import whole
from metanudge.together import operands, product
from metanudge.tree import accumulator
from metanudge.types import Batch, LossFunction, Params, Role, Tasks, Weights

FEW, NUMBERS = 4, 2**16
"""Leaves, the smallest, and numbers of each whose gradients tell whether a loss is a mean."""


@dataclass(eq=False)
class LiveLosses(InnerGradients):
    """One task on the live module; ``.backward()`` only. No lane axes.

    Attributes:
        live: The module, lent out.
        losses: The user's support and query loss.
        shared_names: Trainable parameters that are not adapted.
        task: The task, without a task axis.
        microbatch: Most examples in a forward pass; None for all.
        index: Its index in the whole step, for the random state.
        random: Seeds.
        tally: Counter.
        norm: What BatchNorm layers normalise by.
        known: What was seen of the losses before.
        passed: f̂(θ), once it was seen, by a gradient there as a rule, so that no forward pass more is spent on it.
        held: Where a solve begins, which the module is known to hold until something is evaluated; else None.
        apart: Leaves whose gradients are not added up in ``.grad``: of light bundles, by one operation each, and those
            of less than float32, in float32. (Adding up in ``.grad`` takes no room.)
    """

    live: LiveModule
    losses: Mapping[Role, LossFunction]
    shared_names: tuple[str, ...]
    task: Tasks
    microbatch: int | None
    index: int
    random: RandomState
    tally: Tally
    norm: BatchNorm
    known: Known
    shared: Params = field(init=False)
    passed: Tensor | None = field(init=False, default=None)
    held: Params | None = field(init=False, default=None)
    apart: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.shared = {name: self.live.parameters[name].detach() for name in self.shared_names}
        bundles = self.live.bundles
        narrow = {key for key in (*bundles, *self.shared) if accumulator(kind := self.live.held(key)[0].dtype) != kind}
        light = {key for key in bundles if bundles.light and not bundles.alone(key)}
        self.apart = narrow | light

    @property
    def sampled(self) -> bool:  # noqa: D102
        return as_minibatches(self.task.support) is not None

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:  # noqa: D102
        return self._differentiate(weights, phi, tuple(phi), step, minibatch=step)[1]

    def value_and_gradient(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:  # noqa: D102
        return self._value_and(tuple(phi), role, phi, step)

    def value_and_all_gradients(self, role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:  # noqa: D102
        return self._value_and((*phi, *self.shared_names), role, phi, step)

    def value(self, function: LossFunction, role: Role, phi: Params) -> Tensor:  # noqa: D102
        return self._value(function, role, phi, None)

    def loss(self, role: Role, phi: Params) -> Tensor:  # noqa: D102
        if role is not Role.SUPPORT or not self._is_theta(phi):
            return self._value(self.losses[role], role, phi, self.microbatch)
        if self.passed is None:
            self.passed = self._value(self.losses[role], role, phi, self.microbatch)
        return self.passed

    def hessian_product(self, phi: Params, step: int) -> HessianProduct:  # noqa: D102
        raise NotImplementedError("the live module is never differentiated twice")

    def unrolled(self, shared: Params) -> LiveLosses:  # noqa: D102
        raise NotImplementedError("the live module is never differentiated twice")

    def spread(self, params: Params) -> Params:  # noqa: D102
        return params

    def plus(self, gradient: Tensor, more: Tensor, alpha: float) -> Tensor:  # noqa: D102
        return gradient.add_(more, alpha=alpha)  # nobody else has it, as _part and _taken see to

    def operands(self, first: Params, *rest: Params) -> Iterator[list[Tensor]]:  # noqa: D102
        return (given for _, given in operands(first, *rest))

    def share(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return product(a.to(accumulator(a.dtype)), b, square=a is b)

    def added(self, shares: Sequence[Tensor]) -> Tensor:  # noqa: D102
        plain = [share for share in shares if not hasattr(share, "full_tensor")]
        sharded = [share for share in shares if hasattr(share, "full_tensor")]
        if sharded:
            plain.append(whole(reduce(torch.add, sharded)))  # over the ranks once
        return torch.stack(plain).sum()

    def stencil_sums(  # noqa: D102
        self,
        nodes: tuple[float, ...],
        rows: tuple[tuple[float, ...], ...],
        term: Callable[[Tensor], tuple[Params, ...]],
    ) -> list[tuple[Params, ...]]:
        like = next(iter(self.live.values.values()))
        totals: list[tuple[Params, ...]] = []
        for node, *weights in zip(nodes, *rows, strict=True):
            terms = term(torch.full((), node, dtype=like.dtype, device=like.device))  # a copy would wait for a GPU
            totals = totals or [tuple({} for _ in terms) for _ in rows]
            for place, one in enumerate(terms):
                for names, part in tree.emptied(one):
                    for weight, sums in zip(weights, totals, strict=True):
                        tree.accumulate(sums[place], names, part, weight)
        return totals

    def steppable(self, start: Params) -> Bundles:  # noqa: D102
        self._load(start)
        self.held = start
        return self.live.bundles

    def anew(self, start: Params) -> Bundles:  # noqa: D102
        return self.live.bundles.anew(start)

    def by_parameter(self, make: Callable[[Mapping[str, Tensor]], Params], like: Params) -> Params:  # noqa: D102
        bundles, named = self.live.bundles, self.live.bundles.by_name(like)
        return bundles.joined(make({name: named[name] for name in bundles.named}))

    def count(self, gradients: int) -> None:  # noqa: D102
        self.tally.gradients += gradients

    def _value_and(self, wanted: tuple[str, ...], role: Role, phi: Params, step: int) -> tuple[Tensor, Params]:
        """A loss, and its gradient in what is ``wanted``."""
        losses, gradient = self._differentiate({role: 1.0}, phi, wanted, step)
        return self.live.over_ranks(losses[role]), gradient

    def _differentiate(
        self, weights: Weights, phi: Mapping[str, Tensor], wanted: tuple[str, ...], step: int, minibatch: int = 0
    ) -> tuple[dict[Role, Tensor], Params]:
        """One ``.backward()`` a piece of a loss, so that its activations alone are alive; ``.grad`` adds them up."""
        self._load(phi)
        parameters = [parameter for key in wanted for parameter in self.live.held(key)]
        alone = [self.live.held(key)[0] for key in wanted if self.live.bundles.alone(key)]
        self.live.watch(parameters)
        losses: dict[Role, Tensor] = {}
        sums: Params = {}
        for role in weights:
            self._check_mean(role, wanted, step, minibatch)
        for role, weight in weights.items():
            for batch, share in self._pieces(role, step, minibatch, self.microbatch):
                with torch.enable_grad():
                    loss = self._loss(role, batch, step, minibatch)
                    if losses:
                        _part(parameters)
                    with self.known.undisturbed(role):
                        times(weight, times(share, loss)).backward()  # type: ignore[no-untyped-call]
                value = share * loss.detach()  # a copy: the next evaluation may use the loss's memory again
                del loss  # and with it its graph, before the next one is built
                losses[role] = losses[role] + value if role in losses else value
                self._add_up(wanted, sums)
        require_gradient(chain(sums.values(), (parameter.grad for parameter in parameters)))
        _part(alone)  # bundles are copies
        self.tally.gradients += len(losses)
        first = step == minibatch == 0 and Role.SUPPORT in losses and self.passed is None
        if first and (self._is_theta(phi) or self.live.untouched()):  # the latter compares all of them
            self.passed = self.live.over_ranks(losses[Role.SUPPORT])
        return losses, {key: sums[key] if key in sums else self._taken(key) for key in wanted}

    def _value(self, function: LossFunction, role: Role, phi: Params, microbatch: int | None) -> Tensor:
        self._load(phi)

        def parts(graph: bool) -> list[Tensor]:
            with torch.set_grad_enabled(graph):
                return [
                    share * self._evaluate(function, role, batch, 0, 0).detach()
                    for batch, share in self._pieces(role, 0, 0, microbatch)
                ]

        differentiates = any(one is function for one in self.known.differentiating)
        try:
            found = parts(differentiates)
        except RuntimeError as error:
            if differentiates or "does not require grad" not in str(error):
                raise
            self.live.load({})  # what a forward pass without a backward pass leaves
            found = parts(True)
            self.known.differentiating.append(function)
        return self.live.over_ranks(torch.stack(found).sum())

    def _loss(self, role: Role, batch: Batch, step: int, minibatch: int) -> Tensor:
        """A loss with its graph; looked at, the first time.

        What it adds to ``.grad`` itself, by a ``.backward()`` of its own, as for adversarial examples, is thrown away.
        """
        new = role not in self.known.strangers
        if not (new or role in self.known.backward):
            loss = self._evaluate(self.losses[role], role, batch, step, minibatch)
            require_graph(loss)
            return loss
        with gradients_aside(self.live.parameters.values()) as written:
            loss = self._evaluate(self.losses[role], role, batch, step, minibatch)
            require_graph(loss)
            if new:
                loss = self._looked_at(loss, role, batch, step, minibatch)
        if written:
            self.known.backward.add(role)
        return loss

    def _looked_at(self, loss: Tensor, role: Role, batch: Batch, step: int, minibatch: int) -> Tensor:
        """The loss, once it is known which tensors outside the model it depends on; evaluated again, if on any."""
        if self.live.sharded:  # FSDP2 puts others in the place of the model's own
            self.known.meet(role, [])
            return loss
        own = [*self.live.parameters.values(), *leaves(batch)]
        own += [leaf for part in self.task if as_minibatches(part) is None for leaf in leaves(part)]

        def again() -> dict[Role, Tensor]:
            nonlocal loss
            self._batch(role, step, minibatch)  # and so the same random state
            loss = self._evaluate(self.losses[role], role, batch, step, minibatch)
            return {role: loss}

        self.known.meet(role, strangers({role: loss}, own, again)[role])
        return loss

    def _check_mean(self, role: Role, wanted: tuple[str, ...], step: int, minibatch: int) -> None:
        """Refuse a loss that adds its examples up where pieces are averaged, and warn of one that is no mean.

        Raises:
            LossError: It is a sum.
        """
        left = self.known.looks[role]
        if self.microbatch is None or self.microbatch < 2 or not left:
            return
        batch = self._batch(role, step, minibatch)
        if examples(batch) <= self.microbatch:
            return

        few = sorted(wanted, key=lambda key: sum(leaf.numel() for leaf in self.live.held(key)))[:FEW]

        def look(one: Batch) -> Look:
            with torch.enable_grad():
                loss = self._loss(role, one, step, minibatch)
                if self.live.sharded:  # of gradients a rank sees parts, and ranks that share examples have to agree
                    return Look(float(self.live.over_ranks(loss.detach())), torch.zeros(1, device="cpu"))
                with self.known.undisturbed(role):
                    loss.backward()  # type: ignore[no-untyped-call]
            gradient = torch.cat([self._taken(key).flatten()[:NUMBERS].to(torch.float32) for key in few])
            for parameter in self.live.parameters.values():
                parameter.grad = None
            return Look(float(loss.detach()), gradient)

        before = self.random.state()
        unit = round_off([self.live.held(key)[0] for key in few])
        done = settled(role, look, batch, self.microbatch, unit, lambda: self.random.state() != before)
        self.known.looks[role] = 0 if done else left - 1
        self.live.load({})  # what a forward pass without a backward pass leaves

    def _load(self, phi: Mapping[str, Tensor]) -> None:
        known, self.held = self.held is phi, None
        self.live.load({} if known else phi)  # what was made of the parameters before is out of date all the same

    def _is_theta(self, phi: Mapping[str, Tensor]) -> bool:
        return phi is not self.live.bundles and all(phi[key] is leaf for key, leaf in self.live.values.items())

    def _pieces(self, role: Role, step: int, minibatch: int, microbatch: int | None) -> Iterator[tuple[Batch, float]]:
        """The batch of an evaluation in pieces, and its random state."""
        yield from pieces(self._batch(role, step, minibatch), microbatch)

    def _batch(self, role: Role, step: int, minibatch: int) -> Batch:
        """The batch of an evaluation, and its random state."""
        self.random.enter(self.index, role, step)
        batch, source = self.task[role.value], as_minibatches(self.task[role.value])
        if source is not None:
            batch = ordinary(source[minibatch])  # whatever it draws, it draws for every solve
            check_device(leaves(batch), self.random.device)
            self.random.enter(self.index, role, step)
        return batch

    def _evaluate(self, function: LossFunction, role: Role, batch: Batch, step: int, minibatch: int) -> Tensor:
        """A loss or metric of a batch, and of the support set before it where BatchNorm layers look at that."""

        def at(read: Role, function: LossFunction) -> Tensor:
            self.live.reset_buffers(copies=read is not role)
            if read is role:
                return called(batch, read, function)
            with self.random.aside():
                return called(self._batch(read, step, minibatch), read, function)

        def called(given: Batch, read: Role, function: LossFunction) -> Tensor:
            with noted(self.live.model, read, given):
                return scalar_loss(function, self.live.model, given)

        return self.norm.evaluate(role, function, self.losses[Role.SUPPORT], at)

    def _add_up(self, wanted: tuple[str, ...], sums: Params) -> None:
        """Add up the gradients of leaves ``apart``; to those left in ``.grad`` the next ``.backward()`` adds."""
        for key in wanted:
            if key in self.apart and any(parameter.grad is not None for parameter in self.live.held(key)):
                leaf = self._taken(key)
                leaf = leaf.to(accumulator(leaf.dtype))
                sums[key] = sums[key].add_(leaf) if key in sums else leaf

    def _taken(self, key: str) -> Tensor:
        """The gradient ``.backward()`` left; the module forgets it, so that the next one can not write into it."""
        parts = []
        for parameter in self.live.held(key):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                gradient = torch.zeros_like(parameter, dtype=accumulator(parameter.dtype))
            parts.append(gradient.to_dense() if gradient.is_sparse else gradient)
        return self.live.bundles.join(key, parts)


def _part(parameters: Sequence[nn.Parameter]) -> None:
    """Give every parameter a gradient of its own, to which can be added.

    Of two views that are added, autograd makes gradients in one memory, and what the next ``.backward()`` adds to one
    it then adds to both. (Sharded ones are parts that FSDP2 has cut itself.)
    """
    places: set[int] = set()
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.is_sparse or hasattr(gradient, "full_tensor"):
            continue
        place = gradient.untyped_storage().data_ptr()
        if place in places:
            parameter.grad = gradient.clone()
        places.add(place)
