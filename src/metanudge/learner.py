"""MetaLearner: the only orchestrator. Tasks in, meta-gradients out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from metanudge import advice, settings
from metanudge.accumulation import FiniteMean, summarize
from metanudge.adaptation import adapted_copy, check_adapted, check_copyable, curves, losses_of
from metanudge.batching import as_stacks, in_order
from metanudge.choosing import Running, check_hooks, check_needs, check_recordable, choose_execution
from metanudge.deposit import Given, Told, add_to_grad, verdict
from metanudge.energy import InnerProblem
from metanudge.errors import NonFiniteWarning, SettingsError, TasksError, UnmappableError
from metanudge.estimators import ESTIMATORS, FOBMAML, Estimator
from metanudge.estimators.base import check_estimate, told_to_go_first_order
from metanudge.exclusive import exclusive
from metanudge.execution import Execution, Lent, Use
from metanudge.fallback import falls_back
from metanudge.metrics import metric_name
from metanudge.oracle import BatchNorm, Policy, Tally, device_of
from metanudge.permutations import permuted
from metanudge.probe import Probe
from metanudge.ranks import Ranks
from metanudge.selection import AdaptOnly, Selection, listed, select_parameters
from metanudge.shapes import Shapes, alone, checked_shapes
from metanudge.sharding import is_sharded
from metanudge.solvers import SOLVERS, Nesterov, Solver
from metanudge.solvers.loop import solve
from metanudge.sources import groups
from metanudge.types import Batch, Evaluation, LossFunction, MetaStep, Need, Role, Tasks
from metanudge.warm_start import WarmStart
from metanudge.warned import warn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which some builds of torch lack


class MetaLearner:
    r"""Learns an initialisation from which a few examples suffice.

    .. math::
        F(\theta) = \frac{1}{T} \sum_i f_i(\phi_i(\theta)), \qquad
        \phi_i(\theta) = \arg\min_\phi \hat f_i(\phi) + \tfrac{\lambda}{2} \|\phi - \theta\|^2

    with support losses f̂ and query losses f. The model is used in the mode (train or eval) it is in; ``adapt`` and
    ``evaluate`` warn, once, of dropout in train mode. What forward passes write into buffers is undone.

    Args:
        model: Any ``nn.Module``; its parameters are θ.
        loss: ``loss(model, batch) -> scalar``, for one task's batch.
        prox: Proximal weight λ >= 0; most estimators need it positive.
        solver: How the inner problem is solved; None for ``Nesterov(steps=16)``.
        estimator: How the meta-gradient is formed; None for ``FOBMAML()``.
        execution: "vectorized" (all tasks at once under vmap), "in_place" (the live module, ``.backward()`` only), or
            "auto". That is in place if the solver is a torch optimizer; if the model is compiled or sharded, or has
            recurrent layers, backward hooks on modules, or embeddings with ``sparse=True`` or ``max_norm``; if more
            than ten million parameters, or any in float16, are adapted; or if ``microbatch`` or ``cuda_graphs`` is
            given. Otherwise it is vectorised, until vmap fails on the model, a loss or ``mn.Minibatches``: then the
            learner warns, and goes on in place.
        adapt_only: Parameters the inner problem adapts: names of parameters or modules (``"head"``), patterns
            (``"*.bias"``), or a predicate ``(name, parameter) -> bool``; None for all. Other trainable parameters are
            shared by all tasks and get their own meta-gradient (from FOMAML only ∂f/∂w); frozen ones cost nothing.
        chunk_size: Tasks at once, to save memory; None for all. (In place it is one at a time.)
        microbatch: Examples of a task in one forward pass of the in-place execution; gradients are added up over the
            pieces, so losses have to be means over the examples, or over those targets that are not -100 or NaN; which
            of the two, a look at a few examples tells (under dropout the latter is taken for granted, with FSDP2 the
            former). None for all at once. (``evaluate`` scores a query set whole, without a backward pass.)
        query_loss: The loss that judges adapted models, in the form of ``loss``; None for ``loss`` itself.
        sharpness_radius: How far uphill of an adapted model the query gradient is taken, relative to the distance
            ||φ - θ|| of the adaptation. Above 0, say .1 to .3, meta-steps descend f(φ + ξ), ξ being the worst step of
            that length to first order (SAM), held fixed. This keeps networks from sharpening until the solver's steps
            no longer solve their inner problems: for ReLU networks and long trainings. It costs one gradient a task,
            and at most one copy of the adapted parameters.
        warm_start: Begin inner solves of ``backward`` at the tasks' last solutions; ``mn.WarmStart()``.
        batch_norm: What BatchNorm layers normalise by; required if the model has any. "transductive": every batch by
            its own statistics, so query predictions depend on each other; "support": support batches by their own,
            query batches by those of the support set; "frozen": running statistics, which are never updated.
        compile: Let TorchInductor, the compiler of ``torch.compile``, build the gradients of ``backward`` in the
            vectorised execution, and the steps of Nesterov and GradientDescent around them: some five programs, seconds
            each, for every new form of stack (number of tasks, shapes, modes) in every process. Not for estimators
            that differentiate twice, nor for models that draw random numbers or write to their inputs.
            What Python decides in the loss is frozen at the first step; parameters, buffers, numbers that modules hold
            and tensors changed in place are not.
        cuda_graphs: Record the forward and backward passes of the in-place execution as CUDA graphs, which a GPU
            repeats without waiting for Python: for models whose passes are many short kernels, between which the GPU is
            idle. Within one call, the first batch of each loss and shape runs normally, the second is recorded, and
            later ones replay the recording. So Python code in the loss runs only those two times: a CPU generator of
            its own would repeat one draw. Taking numbers out of tensors, and drawing from the CPU's default
            generators, are refused. Passes that keep the GPU busy anyway, that do not fit into its memory, or that are
            of a ninth loss and shape, always run normally. Memory: the activations of one pass are kept between calls,
            and during a call one gradient for every loss and shape. Not with FSDP2 or batch_norm="support".
        process_group: Processes that share the tasks of a meta-step, with the same model on each
            (``torch.distributed.group.WORLD``, after ``init_process_group``): ``backward`` takes this rank's tasks, one
            or more, leaves the mean over those of all ranks in ``.grad`` on each, and reports on all. All ranks have to
            call it; where one fails, the others raise a MetanudgeError. ``adapt`` and ``evaluate`` run independently on
            each rank.

    Attributes:
        prox, solver, estimator, adapt_only, sharpness_radius, warm_start: May be set at any time.
        execution: How it runs; ``learner.execution.name``.
        seen: Shapes of the tasks it has seen, by which a stack that is given as one task is refused.

    Raises:
        SettingsError: Settings that cannot work, alone or together, with the reason and the cure.

    Warns:
        UserWarning: A torch optimizer is to step parameters in bfloat16 or float16; a sharpness radius of 1 or more;
            (when used) execution="auto" goes in place.

    Example:
        >>> import torch, metanudge as mn
        >>> model = torch.nn.Linear(2, 1)
        >>> def loss(model, batch):
        ...     return (model(batch.inputs) - batch.targets).square().mean()
        >>> learner = mn.MetaLearner(model, loss, prox=1.0)
        >>> examples = mn.Batch(torch.randn(4, 5, 2), torch.randn(4, 5, 1))
        >>> step = learner.backward(mn.Tasks(support=examples, query=examples))
        >>> model.weight.grad.shape, step.dropped_tasks
        (torch.Size([1, 2]), 0)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        *,
        prox: float = 1.0,
        solver: Solver | None = None,
        estimator: Estimator | None = None,
        execution: Literal["auto", "vectorized", "in_place"] = "auto",
        adapt_only: AdaptOnly | None = None,
        chunk_size: int | None = None,
        microbatch: int | None = None,
        query_loss: LossFunction | None = None,
        sharpness_radius: float = 0.0,
        warm_start: WarmStart | None = None,
        batch_norm: Policy | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        settings.check_model(model)
        settings.check_losses(loss=loss, query_loss=query_loss)
        settings.check_not_negative(prox=prox, sharpness_radius=sharpness_radius)
        settings.check_sizes(chunk_size=chunk_size, microbatch=microbatch)
        settings.check_flag(compile=compile, cuda_graphs=cuda_graphs)
        self.model = model
        self.losses = {Role.SUPPORT: loss, Role.QUERY: loss if query_loss is None else query_loss}
        self.prox, self.sharpness_radius, self.compile = float(prox), float(sharpness_radius), compile
        self.cuda_graphs = cuda_graphs
        self.solver: Solver = Nesterov(steps=16) if solver is None else solver
        self.estimator: Estimator = FOBMAML() if estimator is None else estimator
        self.warm_start, self.adapt_only = warm_start, adapt_only
        self.ranks = Ranks.of(process_group, model)
        self._check_settings()
        selection = select_parameters(model, self.adapt_only)
        self.norm = BatchNorm(batch_norm, model)
        self.execution: Execution = choose_execution(
            Running(execution, chunk_size, microbatch, compile, cuda_graphs),
            model,
            self.losses,
            self.norm,
            selection,
            self.solver,
            self.estimator,
        )
        self.automatic = execution == "auto"
        self._selection()
        self._ranks_compared = False
        self.seen: set[Shapes] = set()
        self._told = Told()  # from here on, what is set is checked

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would be set in vain: others than prox, solver, estimator and the like, and slips of the pen."""
        if "_told" in vars(self):  # once it is made
            own = hasattr(self, name) or type(self) is not MetaLearner  # of which subclasses may have any
            settings.check_may_be_set(name, value, own)
            if name in ("prox", "sharpness_radius"):
                settings.check_not_negative(**{name: value})
        if name == "sharpness_radius" and value >= 1:
            warn(advice.far(value), UserWarning)
        super().__setattr__(name, listed(value) if name == "adapt_only" else value)

    def _check_settings(self) -> None:
        """Refuse what cannot be settings: attributes may have been set since the learner was made."""
        settings.check_not_negative(prox=self.prox, sharpness_radius=self.sharpness_radius)
        settings.check_parts(self.solver, SOLVERS, self.estimator, ESTIMATORS, self.warm_start)
        if self.warm_start is not None and is_sharded(self.model):
            raise SettingsError("a warm start keeps whole solutions, of which FSDP2 gives a rank parts; leave it out")
        if self.warm_start is not None and self.ranks.group is not None:
            raise SettingsError(
                "warm_start keeps the solutions of tasks in one process, and process_group may give a task to another "
                "one each time; leave one of them out"
            )

    def _selection(self) -> Selection:
        """Select parameters of the model as it is now, and refuse what cannot work with them."""
        self._check_settings()
        if self.cuda_graphs:  # the model may have been moved
            check_recordable(self.model, self.norm)
        if self.execution.name == "vectorized":
            check_hooks(self.model, UnmappableError if self.automatic else SettingsError)
        selection = select_parameters(self.model, self.adapt_only)
        self.check_can_run(selection, self.execution)
        return selection

    def check_can_run(self, selection: Selection, execution: Execution) -> None:
        """Refuse an estimator or a solver that needs what settings, or an execution, do not have."""
        missing = {
            Need.PROXIMAL_TERM: self.prox == 0,
            Need.DIFFERENTIABLE_SOLVER: not self.solver.differentiable,
            Need.NO_SHARED_PARAMETERS: bool(selection.shared),
            Need.START_AT_THETA: self.warm_start is not None,
            Need.QUERY_LOSS_AS_IT_IS: self.sharpness_radius > 0,
        }
        lacks = execution.lacks | {need for need, lacking in missing.items() if lacking}
        check_needs(lacks, self.estimator, self.solver)

    def __repr__(self) -> str:
        """Settings on one line."""
        more = settings.shown(
            sharpness_radius=self.sharpness_radius or None,
            adapt_only=self.adapt_only,
            batch_norm=self.norm.policy,
            warm_start=self.warm_start,
            compile=self.compile or None,
            cuda_graphs=self.cuda_graphs or None,
            processes=self.ranks.size if self.ranks.size > 1 else None,
        )
        return (
            f"MetaLearner({type(self.model).__name__}, prox={self.prox:g}, solver={self.solver}, "
            f"estimator={self.estimator}, execution={self.execution.name!r}{more})"
        )

    @exclusive
    @falls_back
    def backward(self, tasks: Tasks | Sequence[Tasks], indices: Sequence[int] | None = None) -> MetaStep:
        """Add the meta-gradient of F to ``.grad``, as ``loss.backward()`` would.

        Tasks whose solve diverges, or whose loss or meta-gradient is not finite, are left out of the mean, with one
        warning. On any error the model and its gradients are as they were.

        Args:
            tasks: A stack of tasks, or a list of single ones of any sizes (equal ones are stacked, and sizes taken one
                after the other: ``mn.tasks.pad`` makes them one).
            indices: With a warm start: which task of the finite set each one is, a whole number a task.

        Returns:
            What was done, as numbers.

        Raises:
            TasksError: Tasks that are empty, mismatched, or on another device than the model.
            LossError: A loss that is not a scalar or does not depend on the adapted parameters.
            NonFiniteError: No task was finite.
            SettingsError: A warm start without ``indices``, or the other way round; one that cannot hold a solution;
                ranks whose models differ.
            MetanudgeError: Another rank failed.

        Warns:
            UserWarning: There are several processes, and no ``process_group``; at the first call.
            NonFiniteWarning: Tasks were left out; once.
            UnsolvedWarning: The residual is above 0.3 or the error bound above 300, in a running mean over about ten
                steps (the first step can warn by itself), or most meta-gradients are longer than their query gradients;
                once, for estimators that rest on the solution; vectorised, with steps that were tried. Of HFMAML where
                they are, in the mean, twice as long.

        Cost: that of the estimator, times the number of tasks. Vectorised, before UnsolvedWarning, unless it is
            ignored, up to 20 solves, once.
        """
        ranks, tally, mean = self.ranks, Tally(), FiniteMean()
        probes: list[Probe] = []
        if not self._ranks_compared:
            ranks.check_model()
            self._ranks_compared = True
        with ranks.together():
            stacks, places = as_stacks(tasks, device_of(self.model))
            self.seen |= checked_shapes(self.model, stacks, self.seen)
            order = in_order(indices, places, self.warm_start is not None)
            selection = self._selection()
        counts = ranks.counts(len(places))
        first = sum(counts[: ranks.rank])
        use = Use(selection, stacks, self.prox, tally, first, repeated=True, radius=self.sharpness_radius)
        with torch.no_grad(), self.execution.lend(use) as lent:
            with ranks.together():
                left = iter(order)
                solved = [self._add(mean, probes, lent, one, list(islice(left, one.tasks))) for one in lent.problems]
            lost = mean.total - mean.kept
            gradients = sum(ranks.counts(tally.gradients))  # without those of advice
            mean.over(ranks, sum(counts), lent.named)
            numbers = verdict(mean, lost, probes, Given(stacks, places), self, self._told)
        named = lent.named
        losses = torch.cat([probe.query_loss.where(probe.kept, math.nan) for probe in probes])
        del lent, probes  # and with them what the estimates were made of
        if self.warm_start is not None:  # which may refuse: nothing has been changed yet
            self.warm_start.put(order, torch.cat([rows for rows in solved if rows is not None]))
        norm = add_to_grad(self.model, mean, named)
        of_tasks = (loss for _, loss in sorted(zip(places, losses.tolist(), strict=True)))
        return MetaStep(*numbers, norm, mean.total - mean.kept, gradients, tuple(of_tasks))

    def _add(
        self, mean: FiniteMean, probes: list[Probe], lent: Lent, problem: InnerProblem, known: list[int]
    ) -> Tensor | None:
        """Estimate, add to the mean, and give the solutions that a warm start keeps, NaN where there is none."""
        if self.warm_start is not None:
            rows = lent.rows(problem.initial)
            problem = replace(problem, start=lent.lanes(self.warm_start.get(known, rows)))
        with told_to_go_first_order(self.estimator):
            estimate = self.estimator(problem, self.solver)
        check_estimate(self.estimator, estimate, problem)
        kept = mean.add(problem, estimate, lent.summed)
        tried = replace(problem, start=None) if self.execution.tries else None
        solved = estimate.support_loss.isfinite() & ~estimate.diverged
        query_loss, residual, begun, solved = (
            of_lanes.reshape(-1) for of_lanes in (estimate.query_loss, estimate.residual, estimate.begun, solved)
        )
        probes.append(Probe(query_loss, residual, kept, begun, solved, tried, problem.sampled))
        if self.warm_start is None:
            return None
        diverged = estimate.diverged.reshape(-1, 1)
        return lent.rows(estimate.solution).masked_fill(diverged, math.nan).cpu()

    @exclusive
    @falls_back
    def adapt(self, support: Batch, *, share_frozen: bool = True) -> nn.Module:
        """Adapt to one task: a new module of the same class; this learner's model is untouched.

        Args:
            support: The examples of one task, without a task axis; or ``mn.Minibatches`` of them. A stack looks like
                a task whose examples have an axis more: it is told apart by the tasks that ``backward`` and
                ``evaluate`` have seen.
            share_frozen: Whether frozen parameters (``requires_grad=False``) lie in the memory of the model's, so that
                a large base is there once. False copies them: for what writes into them, such as merging LoRA adapters.
                (Of a subclass of Parameter, as in a quantised base, the very object is shared.)

        Returns:
            A deep copy of the model with the adapted parameters φ(θ).

        Raises:
            TasksError: An empty support set, one on another device than the model, or a stack of them.
            SettingsError: A model that cannot be copied: sharded by FSDP2, one that ``copy.deepcopy`` does not take,
                or whose copy would go on calling the original.
            LossError: A loss that is not a scalar or does not depend on the adapted parameters.
            NonFiniteError: The solve ended in non-finite parameters, or where the support loss is not finite.

        Warns:
            UserWarning: The solve ended at a far larger support loss than it began with.

        Cost: K gradients, what the solver measures (Nesterov: 6), and two forward passes. Example:
            >>> import torch, metanudge as mn
            >>> model = torch.nn.Linear(1, 1)
            >>> learner = mn.MetaLearner(model, lambda m, b: (m(b.inputs) - b.targets).square().mean(), prox=0.01)
            >>> x = torch.linspace(-1, 1, 8).unsqueeze(1)
            >>> adapted = learner.adapt(mn.Batch(x, 3 * x))
            >>> bool((adapted.weight - 3).abs() < 0.2)
            True
        """
        settings.check_flag(share_frozen=share_frozen)
        check_copyable(self.model)
        self._told.of_dropout(self.model, "adapt")
        stacks = alone(support, device_of(self.model), self.seen)
        with torch.no_grad(), self.execution.lend(Use(self._selection(), stacks, self.prox, Tally())) as lent:
            problem = next(lent.problems)
            solution = solve(self.solver, problem.energy(), problem.initial)
            named = {name: leaf.clone() for name, leaf in lent.named(lent.summed(solution.params)).items()}
            before, after = losses_of(problem, solution.params)
        finite = all(bool(leaf.isfinite().all()) for leaf in named.values())
        check_adapted(before, after, finite, stacks, self.solver, self.prox)
        return adapted_copy(self.model, named, self.norm, self.losses[Role.SUPPORT], support, share_frozen)

    def evaluate(
        self, tasks: Tasks | Iterable[Tasks], metric: LossFunction | None = None, *, permutations: int = 1
    ) -> Evaluation:
        """Adapt to every task's support set and measure on its query set, after every adaptation step.

        Args:
            tasks: A stack of tasks, a list or a finite dataset of single ones, or an iterable of stacks: a
                loader with ``collate_fn=mn.tasks.collate``.
            metric: ``metric(model, batch) -> scalar``, e.g. ``mn.metrics.accuracy``; None for the query loss.
            permutations: A task's score is the mean over so many permutations of its class labels, support and query
                alike, the first being none: how a classifier's outputs are named should not count. They depend on the
                task's place alone.

        Returns:
            Mean and 95 % confidence interval over tasks, at the end and per step. A solver that stopped early keeps
            its last value.

        Raises:
            TasksError: No tasks, or mismatched ones; permutations of targets that are no class indices ``[n]``.
            SettingsError: A metric that is no function.
            LossError: A loss or metric that is not a scalar.

        Warns:
            NonFiniteWarning: Tasks whose score is not finite, which make the mean so; once.

        Cost: K gradients, what the solver measures (Nesterov: 6), and K + 1 forward passes, a task and permutation.
        """
        found = self._scores(tasks, metric, permutations)
        if (lost := (~found.values[:, -1].isfinite()).nonzero().flatten().tolist()) and not self._told.scores:
            self._told.scores = True
            warn(advice.no_score(lost, len(found.values), found.metric), NonFiniteWarning)
        return found

    def _scores(
        self, tasks: Tasks | Iterable[Tasks], metric: LossFunction | None = None, permutations: int = 1
    ) -> Evaluation:
        """``evaluate`` without a word about scores that are not finite."""
        settings.check_steps(permutations, "permutations")
        function = self.losses[Role.QUERY] if metric is None else metric
        settings.check_function(
            "metric", function, "metric(model, batch) -> scalar tensor, such as mn.metrics.accuracy"
        )
        self._told.of_dropout(self.model, "evaluate")
        values: list[Tensor] = []
        for group in groups(tasks):
            first = sum(map(len, values))
            found = [self._curves(named, function) for named in permuted(group, permutations, first)]
            values.append(torch.stack(found).mean(0))
        if not values:
            raise TasksError("there are no tasks to evaluate; the iterable was empty")
        return summarize(torch.cat(values), metric_name(metric))

    def save_pretrained(self, folder: str | Path, protocol: Mapping[str, Any] | None = None) -> None:
        """Write the initialisation as safetensors, with its settings; ``mn.load_pretrained`` reads it.

        It asks for what cannot be written down: functions, and parts of your own.

        Args:
            folder: Made if missing.
            protocol: Whatever a reader should know of data and training; JSON.

        Raises:
            SettingsError: A protocol that is no JSON, or a folder that cannot be written to.
        """
        from metanudge.pretrained import save_pretrained  # which knows learners

        save_pretrained(self, folder, protocol)

    @exclusive
    @falls_back
    def _curves(self, tasks: Tasks | Sequence[Tasks], function: LossFunction) -> Tensor:
        """The metric after every step, ``[T, K + 1]``, in the order of the tasks."""
        stacks, places = as_stacks(tasks, device_of(self.model))
        self.seen |= checked_shapes(self.model, stacks, self.seen)
        with torch.no_grad(), self.execution.lend(Use(self._selection(), stacks, self.prox, Tally())) as lent:
            found = [curves(problem, self.solver, function) for problem in lent.problems]
        return torch.cat(found)[torch.tensor(places, device="cpu").argsort()]
