"""How far an estimate is from the exact meta-gradient, on the user's own model and tasks, and what would mend it."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metanudge import advice
from metanudge.batching import as_stacks, groups, single
from metanudge.diagnostics.memory import LiveBytes
from metanudge.errors import LossError, NonFiniteError, NonFiniteWarning, SettingsError, UnsolvedWarning
from metanudge.estimators import ESTIMATORS, FOBMAML, IMAML
from metanudge.estimators.base import Estimator
from metanudge.learner import MetaLearner
from metanudge.solvers import Nesterov, Solver
from metanudge.types import MetaStep, Role, Tasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOOD = 0.1
"""Relative error that counts as good."""


class CheckRow(NamedTuple):
    """One setting, against the exact meta-gradient of the same inner problem.

    Attributes:
        group: What is varied: "yours", "steps", "nu", "prox" or "estimator".
        label: The setting.
        steps: Inner steps K.
        prox: λ.
        cosine: Between the estimate and the exact meta-gradient; NaN where there is no estimate.
        relative_error: ||g - ∇F|| / ||∇F||.
        error_bound: What ``MetaStep.error_bound`` said.
        residual: Relative inner residual.
        gradients: Gradient evaluations a task.
        peak_bytes: Most tensor bytes alive at a time.
        seconds: Of one call.
        note: Why there is no estimate, or "".
    """

    group: str
    label: str
    steps: int
    prox: float
    cosine: float
    relative_error: float
    error_bound: float
    residual: float
    gradients: float
    peak_bytes: int
    seconds: float
    note: str = ""


class Recommendation(NamedTuple):
    """The cheapest setting found whose relative error is below 10 %.

    Attributes:
        steps: Inner steps.
        prox: λ.
        relative_error: What was measured with it.
        gradients: Gradient evaluations a task.
    """

    steps: int
    prox: float
    relative_error: float
    gradients: float


class Check(NamedTuple):
    """What ``check`` found.

    Attributes:
        rows: All measurements, those of the learner as it is first.
        reference: How the exact meta-gradient was had.
        reference_residual: Relative residual of the reference's own solve.
        kinked: Whether the support loss has kinks (ReLU, max-pooling) near the adapted parameters.
        recommendation: None where the learner is good as it is, or nothing was found.
        verdict: In words.
    """

    rows: list[CheckRow]
    reference: str
    reference_residual: float
    kinked: bool
    recommendation: Recommendation | None
    verdict: str

    @property
    def good(self) -> bool:
        """Whether the learner as it is has a relative error below 10 %."""
        return self.rows[0].relative_error < GOOD

    def __str__(self) -> str:
        """A table and the verdict."""
        head = f"{'':10} {'setting':34} {'cosine':>7} {'error':>8} {'bound':>8} {'residual':>9} {'gradients':>9}"
        lines = [f"{head} {'memory':>9} {'time':>8}"]
        for row in self.rows:
            measured = (
                f"{row.cosine:7.3f} {_percent(row.relative_error):>8} {_percent(row.error_bound):>8} "
                f"{row.residual:9.1e} {row.gradients:9.0f} {row.peak_bytes / 2**20:6.1f} MB {1e3 * row.seconds:5.0f} ms"
            )
            lines.append(f"{row.group:10} {row.label:34} {row.note or measured}")
        return "\n".join([*lines, "", self.verdict])

    def figure(self) -> Figure:
        """Relative error against gradient evaluations; needs matplotlib."""
        from matplotlib.figure import Figure

        made = Figure(figsize=(6.0, 4.0), layout="constrained")
        axis = made.subplots()
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = [row for row in self.rows if row.group == group and not row.note]
            marker = "*" if group == "yours" else "o"
            size = 14 if group == "yours" else 5
            axis.plot(
                [row.gradients for row in rows],
                [row.relative_error for row in rows],
                marker,
                markersize=size,
                label=group,
                zorder=3 if group == "yours" else 2,
            )
            if group == "estimator":
                for row in rows:
                    axis.annotate(row.label, (row.gradients, row.relative_error), fontsize=7)
        axis.axhline(GOOD, color="#999999", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", yscale="log", xlabel="gradient evaluations a task", ylabel="relative error")
        axis.legend(frameon=False)
        return made


def check(
    learner: MetaLearner,
    tasks: Tasks | Iterable[Tasks],
    *,
    max_tasks: int = 4,
    reference_steps: int = 400,
    compare: Sequence[str] = tuple(ESTIMATORS),
) -> Check:
    r"""Measure how far ``learner.backward`` is from the exact meta-gradient, and find settings that are near.

    .. math::
        \frac{\|g - \nabla F\|}{\|\nabla F\|}, \qquad
        \nabla F = \frac1T \sum_i \lambda (H_i + \lambda)^{-1} \nabla f_i(\phi_i(\theta))

    The exact one is had from a solve of ``reference_steps`` steps and conjugate gradients on exact Hessian products,
    on a float64 copy of model and tasks where they allow it; where the loss can not be differentiated twice, from a
    fourth-order stencil of converged solves. Steps, ν, prox (each prox with a reference of its own) and the other
    estimators are then varied. The model is copied and stays as it is, as does the random state. Dropout makes every
    step's problem another one and the comparison void: call ``model.eval()`` first.

    Args:
        learner: As you train it.
        tasks: A stack, a list of single tasks, or a loader of which the first item is taken.
        max_tasks: Tasks to use, the first ones.
        reference_steps: Steps of the reference's solve.
        compare: Names in ``mn.ESTIMATORS`` to compare with.

    Raises:
        TasksError: Tasks that do not fit.
        SettingsError: A model that can not be copied; names of no estimator.
        NonFiniteError: The exact meta-gradient is not finite.

    Cost: some thirty calls of ``backward`` on ``max_tasks`` tasks, four of them with ``reference_steps``.

    Example:
        >>> import torch, metanudge as mn
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0)
        >>> found = mn.check(learner, mn.tasks.sinusoid(2), reference_steps=60, compare=["fomaml"])
        >>> found.rows[0].group, found.kinked
        ('yours', False)
    """
    for name in compare:
        if name not in ESTIMATORS:
            raise SettingsError(f"compare names estimators, {', '.join(ESTIMATORS)}, but {name!r} is none of them")
    bench = _Bench(learner, _first(learner, tasks, max_tasks), reference_steps)
    solver, prox, steps = learner.solver, learner.prox, learner.solver.steps
    rows = [bench.row("yours", str(_short(learner.estimator)), solver, prox, learner.estimator)]
    for factor in (0.5, 2, 4):
        other = _with_steps(solver, max(1, round(factor * steps)))
        if other is not None and other.steps != steps:
            rows.append(bench.row("steps", f"steps={other.steps}", other, prox, learner.estimator))
    if isinstance(learner.estimator, FOBMAML):
        for factor in (0.01, 0.1, 10):
            nu = factor * bench.last_nu
            rows.append(bench.row("nu", f"nu={nu:.2g}", solver, prox, dataclasses.replace(learner.estimator, nu=nu)))
    rows += [
        bench.row("prox", f"prox={weight:g}", solver, weight, learner.estimator)
        for weight in (0.1 * prox, 10 * prox)
        if weight
    ]
    rows += [
        bench.row("estimator", name, solver, prox, ESTIMATORS[name]())
        for name in compare
        if not isinstance(learner.estimator, ESTIMATORS[name])
    ]
    kinked = bench.kinked()
    proxes = (prox, 3 * prox, 10 * prox) if kinked else tuple(factor * prox for factor in (1, 3, 10, 30, 100, 300))
    recommendation = None if rows[0].relative_error < GOOD else _recommend(bench, learner, proxes)
    reference = bench.references[prox]
    return Check(
        rows,
        reference.how,
        reference.residual,
        kinked,
        recommendation,
        _verdict(rows, learner, recommendation, kinked, max(proxes), reference),
    )


class _Reference(NamedTuple):
    gradient: Tensor
    residual: float
    how: str


class _Bench:
    """Copies of model and tasks, and the measurements on them."""

    def __init__(self, learner: MetaLearner, tasks: list[Tasks], steps: int) -> None:
        self.learner, self.tasks, self.steps = learner, tasks, steps
        self.references: dict[float, _Reference] = {}
        self.last_nu = 1.0
        try:
            self.model = copy.deepcopy(learner.model)
        except Exception as error:
            raise SettingsError(
                f"check works on a copy of the model, and {type(learner.model).__name__} can not be copied: {error}"
            ) from error
        self.model.zero_grad(set_to_none=True)
        self.double = self._in_double()

    def _in_double(self) -> tuple[nn.Module, list[Tasks]] | None:
        """Model and tasks in float64, if the loss takes them."""
        model = copy.deepcopy(self.model).double()
        tasks = tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, self.tasks)
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self.learner.losses[Role.SUPPORT](model, tasks[0].support)
        except Exception:  # whatever it is, float64 is not for this model
            return None
        return model, tasks

    def make(self, model: nn.Module, solver: Solver, prox: float, estimator: Estimator, **settings: Any) -> MetaLearner:
        """The user's learner with something changed."""
        old = self.learner
        return MetaLearner(
            model,
            old.losses[Role.SUPPORT],
            query_loss=old.losses[Role.QUERY],
            prox=prox,
            solver=solver,
            estimator=estimator,
            adapt_only=old.adapt_only,
            **({"execution": old.execution.name} | settings),
        )

    def reference(self, prox: float) -> _Reference:
        """∇F at this λ."""
        if prox not in self.references:
            self.references[prox] = self._exact(prox)
        return self.references[prox]

    def _exact(self, prox: float) -> _Reference:
        model, tasks = self.double or (self.model, self.tasks)
        solver = Nesterov(self.steps)
        kind = "float64" if self.double else str(next(model.parameters()).dtype).removeprefix("torch.")
        ways: list[tuple[str, Estimator, dict[str, str]]] = [
            (
                "conjugate gradients on exact Hessian products",
                IMAML(cg_steps=300, tol=1e-8),
                {"execution": "vectorized"},
            ),
            ("a fourth-order stencil", FOBMAML("fourth_order", nudge="linear"), {}),
        ]
        failure: Exception | None = None
        for how, estimator, settings in ways:
            try:
                learner = self.make(model, solver, prox, estimator, **settings)
                gradient, step = _measured(learner, tasks)
            except (LossError, SettingsError, RuntimeError) as error:
                failure = error
                continue
            return _Reference(gradient, step.residual, f"{how}, {self.steps} steps, {kind}")
        raise SettingsError(f"no exact meta-gradient can be had: {failure}") from failure

    def row(self, group: str, label: str, solver: Solver, prox: float, estimator: Estimator) -> CheckRow:
        """Measure one setting."""
        nothing = float("nan")
        try:
            learner = self.make(self.model, solver, prox, estimator)
            exact = self.reference(prox).gradient
            with LiveBytes() as live:
                gradient, step = _measured(learner, self.tasks)
            begun = time.perf_counter()
            _measured(learner, self.tasks)
            seconds = time.perf_counter() - begun
        except (SettingsError, LossError, NonFiniteError) as error:
            note = str(error).split(";")[0].split(". ")[0]
            return CheckRow(
                group, label, solver.steps, prox, nothing, float("inf"), nothing, nothing, nothing, 0, nothing, note
            )
        if group == "yours":
            self.last_nu = step.nu or 1.0
        scale = exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)
        return CheckRow(
            group,
            label,
            solver.steps,
            prox,
            float(gradient @ exact / (gradient.norm().clamp_min(1e-300) * scale)),
            float((gradient - exact).norm() / scale),
            step.error_bound,
            step.residual,
            step.gradient_evaluations / len(self.tasks),
            live.peak,
            seconds,
        )

    def kinked(self) -> bool:
        """Whether second differences of the support gradient shrink with the displacement, not with its square.

        Along a few lines through the parameters: g(θ + h v) - 2 g(θ) + g(θ - h v) is O(h²) where the loss is three
        times differentiable, and O(1) or O(h) across kinks.
        """
        model, tasks = self.double or (self.model, self.tasks)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        start = {name: parameter.detach().clone() for name, parameter in named.items()}
        size = torch.stack([value.double().square().sum() for value in start.values()]).sum().sqrt()
        generator = torch.Generator().manual_seed(0)
        falls = []

        def gradient() -> Tensor:
            with _quiet(), torch.enable_grad():
                loss = self.learner.losses[Role.SUPPORT](model, task.support)
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
            return torch.cat([leaf.reshape(-1).double() for leaf in found])

        for task in tasks:  # noqa: B007, gradient() reads it
            drawn = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
            length = torch.stack([value.double().square().sum() for value in drawn.values()]).sum().sqrt()

            def at(distance: float, drawn: dict[str, Tensor] = drawn, length: Tensor = length) -> Tensor:
                with torch.no_grad():
                    for name, parameter in named.items():
                        step = (distance * (1 + float(size)) / float(length)) * drawn[name].to(parameter)
                        parameter.copy_(start[name] + step)
                return gradient()

            middle = at(0.0)
            bends = [float((at(h) - 2 * middle + at(-h)).norm()) for h in (0.02, 0.01, 0.005)]
            noise = 100 * torch.finfo(next(iter(start.values())).dtype).eps * float(middle.norm())
            if bends[-1] > noise:
                falls.append((bends[0] / bends[-1]) ** 0.5)
            at(0.0)
        return bool(falls) and sum(fall < 3 for fall in falls) >= len(falls) / 2


def _measured(learner: MetaLearner, tasks: list[Tasks]) -> tuple[Tensor, MetaStep]:
    """The meta-gradient as one float64 vector, with the same random state every time; ``.grad`` is cleared."""
    parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    with _quiet():
        step = learner.backward(tasks)
    leaves = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    gradient = torch.cat([leaf.detach().reshape(-1).double().cpu() for leaf in leaves])
    for parameter in parameters:
        parameter.grad = None
    return gradient, step


@contextmanager
def _quiet() -> Iterator[None]:
    """A random state of its own, and no warnings of what the table tells anyway."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", UnsolvedWarning)
        warnings.simplefilter("ignore", NonFiniteWarning)
        torch.manual_seed(0)
        yield


def _first(learner: MetaLearner, tasks: Tasks | Iterable[Tasks], number: int) -> list[Tasks]:
    """The first tasks, single."""
    group = next(iter(groups(tasks)), [])
    stacks, places = as_stacks(group, next(learner.model.parameters()).device)
    ordered = dict(zip(places, (task for stack in stacks for task in single(stack)), strict=True))
    return [ordered[place] for place in sorted(ordered)][:number]


def _with_steps(solver: Any, steps: int) -> Solver | None:
    """None for a solver that is no dataclass."""
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        return None
    return cast(Solver, dataclasses.replace(solver, steps=steps))


def _short(estimator: Any) -> str:
    """Without the settings that are the defaults."""
    if not dataclasses.is_dataclass(estimator):
        return type(estimator).__name__
    told = [
        f"{field.name}={getattr(estimator, field.name)!r}"
        for field in dataclasses.fields(estimator)
        if getattr(estimator, field.name) != field.default
    ]
    return f"{type(estimator).__name__}({', '.join(told)})"


def _recommend(bench: _Bench, learner: MetaLearner, proxes: Sequence[float]) -> Recommendation | None:
    """The fewest steps that do, at the smallest of ``proxes`` at which any do."""
    steps = learner.solver.steps
    for weight in proxes:
        if weight == 0:
            continue
        for factor in (1, 2, 4, 8, 16):
            solver = _with_steps(learner.solver, factor * steps)
            if solver is None or solver.steps > 128:
                break
            row = bench.row("", "", solver, weight, learner.estimator)
            if row.relative_error < 0.8 * GOOD:  # a margin, for other tasks than these
                return Recommendation(solver.steps, weight, row.relative_error, row.gradients)
    return None


def _verdict(
    rows: list[CheckRow],
    learner: MetaLearner,
    recommendation: Recommendation | None,
    kinked: bool,
    largest: float,
    reference: _Reference,
) -> str:
    mine, steps, prox = rows[0], learner.solver.steps, learner.prox
    said = []
    if mine.relative_error < GOOD:
        said.append(f"Good: the estimate is {_percent(mine.relative_error)} from the exact meta-gradient.")
    else:
        said.append(f"Bad: the estimate is {_percent(mine.relative_error)} from the exact meta-gradient.")
        if mine.residual > advice.DONE:
            said.append(f"The inner problem is {_percent(mine.residual)} from solved.")
    if recommendation is not None:
        changes = []
        if recommendation.steps != steps:
            changes.append(f"steps from {steps} to {recommendation.steps}")
        if recommendation.prox != prox:
            changes.append(f"prox from {prox:g} to {recommendation.prox:g}")
        said.append(
            f"Raise {' and '.join(changes)}: the error was then {_percent(recommendation.relative_error)}, for "
            f"{recommendation.gradients:.0f} gradients a task instead of {mine.gradients:.0f}."
        )
    elif mine.relative_error >= GOOD:
        said.append(f"No number of steps up to 128 and no prox up to {largest:g} brought it below 10 %.")
    if kinked:
        said.append(
            "The loss has kinks near these parameters (ReLU, max-pooling): exact second derivatives see one smooth "
            "piece, a finite displacement averages over many, so the two differ however many the steps, and training "
            "may well be better for the average (docs/theory.md). With a smooth activation (GELU, tanh) they agree."
        )
    if reference.residual > 1e-3:
        said.append(
            f"Beware: the reference itself is {_percent(reference.residual)} from solved; raise reference_steps, or "
            "prox, before trusting the errors."
        )
    return " ".join(said)


def _percent(value: float) -> str:
    if value != value:
        return "-"
    if value >= 9.995:
        return "inf" if value == float("inf") else f"{value:.0f}x" if value < 1e5 else f"{value:.0e}x"
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"
