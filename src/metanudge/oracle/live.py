"""Losses of one task, by the live module and ``.backward()`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain

import torch
from torch import Tensor, nn

from metanudge import tree
from metanudge.batching import examples
from metanudge.bundles import Bundles
from metanudge.losses import HessianProduct, InnerGradients
from metanudge.minibatches import as_minibatches
from metanudge.oracle.averages import Look, Seen, Weighing, settled, together, weighing_of
from metanudge.oracle.common import Tally, require_gradient, round_off, times
from metanudge.oracle.known import gradients_aside
from metanudge.oracle.live_forward import Draw, LiveForward
from metanudge.oracle.module import LiveModule
from metanudge.sharding import whole
from metanudge.together import operands, product
from metanudge.tree import accumulator
from metanudge.types import Batch, LossFunction, Params, Role, Weights

FEW, NUMBERS = 4, 2**16
"""Leaves, the smallest, and numbers of each whose gradients tell whether a loss is a mean."""


@dataclass(eq=False)
class LiveLosses(InnerGradients):
    """One task on the live module; ``.backward()`` only. No lane axes.

    Attributes:
        forward: Evaluates the losses.
        shared_names: Trainable parameters that are not adapted.
        microbatch: Most examples in a forward pass; None for all.
        tally: Counter.
        passed: f̂(θ), once it was seen, by a gradient there as a rule, so that no forward pass more is spent on it.
        apart: Leaves whose gradients are not added up in ``.grad``: of light bundles, by one operation each, and those
            of less than float32, in float32; and all where passes are recorded. (Adding up in ``.grad`` takes no room.)
    """

    forward: LiveForward
    shared_names: tuple[str, ...]
    microbatch: int | None
    tally: Tally
    live: LiveModule = field(init=False)
    shared: Params = field(init=False)
    passed: Tensor | None = field(init=False, default=None)
    apart: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.live = self.forward.live
        self.shared = {name: self.live.parameters[name].detach() for name in self.shared_names}
        bundles = self.live.bundles
        if self.forward.recordings is not None:
            self.apart = {*bundles, *self.shared}
            return
        narrow = {key for key in (*bundles, *self.shared) if accumulator(kind := self.live.held(key)[0].dtype) != kind}
        light = {key for key in bundles if bundles.light and not bundles.alone(key)}
        self.apart = narrow | light

    @property
    def sampled(self) -> bool:  # noqa: D102
        return as_minibatches(self.forward.task.support) is not None

    def gradient(self, weights: Weights, phi: Mapping[str, Tensor], step: int) -> Params:  # noqa: D102
        drawn = {Draw(role, step, minibatch=step): weight for role, weight in weights.items()}
        return self._differentiate(drawn, phi, tuple(phi))[1]

    def value_and_gradient(  # noqa: D102
        self, role: Role, phi: Params, step: int, minibatch: int = 0
    ) -> tuple[Tensor, Params]:
        return self._value_and(tuple(phi), Draw(role, step, minibatch), phi)

    def value_and_all_gradients(  # noqa: D102
        self, role: Role, phi: Params, step: int, minibatch: int = 0
    ) -> tuple[Tensor, Params]:
        return self._value_and((*phi, *self.shared_names), Draw(role, step, minibatch), phi)

    def value(self, function: LossFunction, role: Role, phi: Params) -> Tensor:  # noqa: D102
        self.live.load(phi)
        return self.forward.value(function, role, None)

    def loss(self, role: Role, phi: Params) -> Tensor:  # noqa: D102
        if role is Role.SUPPORT and self.passed is not None and self._is_theta(phi):
            return self.passed
        self.live.load(phi)
        loss = self.forward.value(self.forward.losses[role], role, self.microbatch)
        if role is Role.SUPPORT and self._is_theta(phi):
            self.passed = loss
        return loss

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
        self.live.load(start)
        return self.live.bundles

    def anew(self, start: Params) -> Bundles:  # noqa: D102
        return self.live.bundles.anew(start)

    def by_parameter(self, make: Callable[[Mapping[str, Tensor]], Params], like: Params) -> Params:  # noqa: D102
        bundles, named = self.live.bundles, self.live.bundles.by_name(like)
        return bundles.joined(make({name: named[name] for name in bundles.named}))

    def count(self, gradients: int) -> None:  # noqa: D102
        self.tally.gradients += gradients

    def _value_and(self, wanted: tuple[str, ...], draw: Draw, phi: Params) -> tuple[Tensor, Params]:
        """A loss, and its gradient in what is ``wanted``."""
        losses, gradient = self._differentiate({draw: 1.0}, phi, wanted)
        return self.live.over_ranks(losses[draw]), gradient

    def _differentiate(
        self, weights: Mapping[Draw, float | Tensor], phi: Mapping[str, Tensor], wanted: tuple[str, ...]
    ) -> tuple[dict[Draw, Tensor], Params]:
        """One ``.backward()`` a piece of a loss, so that its activations alone are alive; ``.grad`` adds them up."""
        self.live.load(phi)
        at_theta = self.live.bundles.holds(self.live.values)
        parameters = [parameter for key in wanted for parameter in self.live.held(key)]
        self.live.watch(parameters)
        losses: dict[Draw, Tensor] = {}
        sums: Params = {}
        batches: dict[Draw, Batch] = {}
        if self.microbatch is not None:
            batches = {draw: self.forward.batch(draw) for draw in weights}
            for draw, batch in batches.items():
                self._look(draw, batch, wanted, self.microbatch)
        for draw, weight in weights.items():
            for batch, share in self.forward.in_pieces(draw, self.microbatch, batches.get(draw)):
                recording = self.forward.recorded(draw, batch, parameters)
                if recording is not None:
                    value = share * recording.repeat(batch, weight * share)
                else:
                    value = self._backward(draw, batch, weight, share)
                    _part(parameters)
                losses[draw] = losses[draw] + value if draw in losses else value
                self._add_up(wanted, sums)
        require_gradient(chain(sums.values(), (parameter.grad for parameter in parameters)))
        self.tally.gradients += len(losses)
        begun = losses.get(Draw(Role.SUPPORT))
        if self.passed is None and begun is not None and (at_theta or self.live.untouched()):
            self.passed = self.live.over_ranks(begun)
        return losses, {key: sums[key] if key in sums else self._taken(key) for key in wanted}

    def _backward(self, draw: Draw, batch: Batch, weight: float | Tensor, share: float) -> Tensor:
        """A piece's share in a loss; the gradient of that, weighted, is added to ``.grad``."""
        with torch.enable_grad():
            loss = self.forward.loss(draw, batch)
            with gradients_aside(self.forward.known.strangers[draw.role]):
                times(weight, times(share, loss)).backward()  # type: ignore[no-untyped-call]
        return share * loss.detach()  # a copy: the next evaluation may use the loss's memory again

    def _look(self, draw: Draw, batch: Batch, wanted: tuple[str, ...], microbatch: int) -> None:
        """See what a loss is a mean over that is taken in pieces: the examples, or those targets that count.

        Refuse one that adds its examples up, and warn of one that is no mean. A piece of one example tells nothing of
        that: there it is looked at, at two examples at once, where targets that do not count have to be weighed.

        Raises:
            LossError: It is a sum.
        """
        role, random, known = draw.role, self.forward.random, self.forward.known
        if examples(batch) <= microbatch:
            return
        counts, left = self.forward.counts(draw, batch), known.looks[role]
        decides = len(set(counts)) > 1 and role not in self.forward.weighing and role not in known.weighing
        if not decides and (microbatch < 2 or not left):
            return
        pairs = together(counts, microbatch)
        if not decides and not pairs[0].tells:
            return

        few = sorted(wanted, key=lambda key: sum(leaf.numel() for leaf in self.live.held(key)))[:FEW]

        def look(one: Batch) -> Look:
            with torch.enable_grad():
                loss = self.forward.loss(draw, one)
                if self.live.sharded:  # of gradients a rank sees parts, and ranks that share examples have to agree
                    return Look(float(self.live.over_ranks(loss.detach())), torch.zeros(1, device="cpu"))
                with gradients_aside(self.forward.known.strangers[role]):
                    loss.backward()  # type: ignore[no-untyped-call]
            gradient = torch.cat([self._taken(key).flatten()[:NUMBERS].to(torch.float32) for key in few])
            for parameter in self.live.parameters.values():
                parameter.grad = None
            return Look(float(loss.detach()), gradient)

        self.forward.enter(draw)
        before = random.state()
        seen = [Seen(one, *map(look, one.batches(batch))) for one in pairs]
        is_random = random.state() != before
        self.live.renew()  # what a forward pass without a backward pass leaves
        if decides and not all(one.finite for one in seen):
            self.forward.weighing[role] = Weighing.EXAMPLES  # so that what is not finite is seen in what it gives
            return
        if decides:
            weighing, sure = (Weighing.COUNTS, False) if is_random else weighing_of(seen)
            self.forward.weighing[role] = weighing
            if sure:
                known.weighing[role] = weighing
        unit = round_off([self.live.held(key)[0] for key in few])
        weighing = self.forward.weighing.get(role) or known.weighing.get(role, Weighing.COUNTS)
        done = [settled(role, one, weighing, is_random, unit) for one in seen if one.examples.tells or decides]
        if left and pairs[0].tells:
            known.looks[role] = 0 if done[0] else left - 1

    def _is_theta(self, phi: Mapping[str, Tensor]) -> bool:
        return phi is not self.live.bundles and all(phi[key] is leaf for key, leaf in self.live.values.items())

    def _add_up(self, wanted: tuple[str, ...], sums: Params) -> None:
        """Add up the gradients of leaves ``apart``; to those left in ``.grad`` the next ``.backward()`` adds."""
        found = {
            key: self._taken(key)
            for key in wanted
            if key in self.apart and any(parameter.grad is not None for parameter in self.live.held(key))
        }
        for names, part in tree.emptied(found):
            tree.accumulate(sums, names, part)

    def _taken(self, key: str) -> Tensor:
        """The gradient ``.backward()`` left; the module forgets it, so that the next one cannot write into it."""
        parts = []
        for parameter in self.live.held(key):
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                gradient = torch.zeros_like(parameter, dtype=accumulator(parameter.dtype))
            parts.append(gradient.to_dense() if gradient.is_sparse else gradient)
        return self.live.bundles.join(key, parts)


def _part(parameters: Sequence[nn.Parameter]) -> None:
    """Give every parameter a gradient of its own, to keep, and to add to.

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
