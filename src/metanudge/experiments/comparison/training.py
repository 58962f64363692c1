"""One meta-training, as a job for a pool of processes, and what a meta-step costs."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.compiler.config as compiler_config
from torch import Tensor, nn

import metanudge as mn
from metanudge.diagnostics.memory import LiveBytes
from metanudge.errors import SettingsError
from metanudge.estimators.base import Estimator
from metanudge.experiments.comparison.benchmark import BENCHMARKS, Inner

METHODS: dict[str, Estimator] = {
    **{name: kind() for name, kind in mn.ESTIMATORS.items()},
    "fobmaml_light": mn.FOBMAML(steps=8, certify=False),
}
"""Every estimator as it comes, and FO-B-MAML with a quarter of its nudged steps and no error bound."""


@dataclass(frozen=True)
class Job:
    """A meta-training by Adam, the meta-gradient clipped.

    Attributes:
        benchmark: A name in ``BENCHMARKS``.
        method: A name in ``METHODS``.
        inner: How tasks are adapted to.
        lr: Of Adam.
        seed: Of the network's start and of the training tasks.
        meta_steps: How many.
        tasks: A meta-step.
        every: Meta-steps between looks at the validation tasks, and at the first test tasks.
        validation_tasks: By which the parameters to keep are chosen, those of the best look.
        curve_tasks: Of the test tasks, at every look; 0 for none.
        test_tasks: Which judge what was kept; 0 for none.
        clip: Largest norm of a meta-gradient.
        compile: Whether to train compiled, where the estimator allows it: the same to round-off, and sooner.
    """

    benchmark: str
    method: str
    inner: Inner
    lr: float
    seed: int
    meta_steps: int
    tasks: int
    every: int
    validation_tasks: int
    curve_tasks: int
    test_tasks: int
    clip: float = 10.0
    compile: bool = False

    def learner(self, compile: bool = False) -> mn.MetaLearner:
        """At its start.

        Raises:
            SettingsError: The estimator cannot take the inner problem, or cannot be compiled.
        """
        benchmark = BENCHMARKS[self.benchmark]()
        return mn.MetaLearner(
            benchmark.network(self.seed),
            benchmark.loss,
            prox=self.inner.prox,
            sharpness_radius=self.inner.radius,
            solver=self.inner.solver,
            estimator=METHODS[self.method],
            execution="vectorized",
            compile=compile,
        )

    @property
    def possible(self) -> bool:
        """Whether the estimator can take the inner problem."""
        return self._makes(compile=False)

    @property
    def compilable(self) -> bool:
        """Whether it can be compiled as well."""
        return self._makes(compile=True)

    def _makes(self, compile: bool) -> bool:
        try:
            self.learner(compile)
        except SettingsError:
            return False
        return True


class Outcome(NamedTuple):
    """What a job found.

    Attributes:
        steps: Meta-steps at which it looked.
        validation: Mean over the validation tasks after adaptation.
        scores: The same over the curve's tasks.
        kept: At every look, which one so far was best on the validation tasks.
        values: Of every test task after every adaptation step, ``[T, K + 1]``, with the parameters that were kept.
        dropped: Training tasks left out, in all.
        failed: Meta-steps with no finite task, which were skipped.
        gradients: Gradient evaluations of a meta-step, mean.
        residual: Mean relative residual over the last tenth.
        parameters: That were kept.
    """

    steps: list[int]
    validation: list[float]
    scores: list[float]
    kept: list[int]
    values: Tensor
    dropped: int
    failed: int
    gradients: float
    residual: float
    parameters: dict[str, Tensor]

    @property
    def best_validation(self) -> float:
        """Of what was kept."""
        return self.validation[self.kept[-1]]

    @property
    def kept_scores(self) -> list[float]:
        """What the curve's tasks say of the parameters kept so far."""
        return [self.scores[place] for place in self.kept]


def train(job: Job) -> Outcome:
    """Meta-train, keep the parameters that are best on the validation tasks, and judge those."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    benchmark, learner = BENCHMARKS[job.benchmark](), job.learner(job.compile and job.compilable)
    optimizer = torch.optim.Adam(learner.model.parameters(), job.lr)
    validation, curve = benchmark.validation(job.validation_tasks), benchmark.test(max(job.curve_tasks, 1))
    steps, validated, scores, kept, residuals = list[int](), list[float](), list[float](), list[int](), list[float]()
    parameters: dict[str, Tensor] = {}
    dropped = failed = gradients = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        warnings.simplefilter("ignore", mn.NonFiniteWarning)
        for index in range(job.meta_steps):
            try:
                step = meta_step(learner, optimizer, benchmark.train(job.seed, job.tasks * index, job.tasks), job.clip)
                dropped, gradients = dropped + step.dropped_tasks, gradients + step.gradient_evaluations
                residuals.append(step.residual)
            except mn.NonFiniteError:
                failed += 1
            if (index + 1) % job.every == 0 or index + 1 == job.meta_steps:
                steps.append(index + 1)
                validated.append(learner.evaluate(validation, benchmark.metric).mean)
                if job.curve_tasks:
                    scores.append(learner.evaluate(curve, benchmark.metric).mean)
                best = max(range(len(validated)), key=lambda place: benchmark.rank(validated[place]))
                kept.append(best)
                if best == len(validated) - 1:
                    parameters = {name: leaf.detach().clone() for name, leaf in learner.model.named_parameters()}
        learner.model.load_state_dict(parameters, strict=False)
        values = torch.empty(0, 1)
        if job.test_tasks:
            values = learner.evaluate(benchmark.test(job.test_tasks), benchmark.metric).values
    last = residuals[-max(job.meta_steps // 10, 1) :]
    done = max(job.meta_steps - failed, 1)
    residual = statistics.fmean(last) if last else float("nan")
    return Outcome(steps, validated, scores, kept, values, dropped, failed, gradients / done, residual, parameters)


def meta_step(
    learner: mn.MetaLearner, optimizer: torch.optim.Optimizer, tasks: mn.Tasks | list[mn.Tasks], clip: float
) -> mn.MetaStep:
    """One meta-step."""
    optimizer.zero_grad()
    step = learner.backward(tasks)
    nn.utils.clip_grad_norm_(learner.model.parameters(), clip)
    optimizer.step()
    return step


class Compiled(NamedTuple):
    """What a meta-step costs with ``compile=True``.

    Attributes:
        seconds: Processor time, median; one thread.
        building: Seconds of the first meta-step, in which all is compiled, nothing being kept from before.
    """

    seconds: float
    building: float


class Cost(NamedTuple):
    """Of one meta-step.

    Attributes:
        seconds: Processor time, median; one thread.
        peak_bytes: Of live tensors beyond the model and the tasks.
        compiled: The same compiled; None where the estimator does not allow it.
    """

    seconds: float
    peak_bytes: int
    compiled: Compiled | None = None


def costs(jobs: Sequence[Job], repeats: int, compiling: bool) -> list[Cost]:
    """What a meta-step of every job costs, measured turn by turn, so that a busy machine favours none.

    Args:
        jobs: What the meta-steps are of.
        repeats: Timed steps of each.
        compiling: Whether to time them compiled as well.
    """
    torch.set_num_threads(1)
    plain = [_Run(job) for job in jobs]
    compiled = {place: _Run(job, compile=True) for place, job in enumerate(jobs) if compiling and job.compilable}
    with warnings.catch_warnings(), compiler_config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        warnings.simplefilter("ignore", mn.NonFiniteWarning)
        peaks = [run.peak_bytes() for run in plain]
        if compiled:
            torch.compile(torch.neg)(torch.zeros(1))  # loads the compiler, for which the first should not pay
        building = {place: run.wall_seconds() for place, run in compiled.items()}
        for _ in range(repeats):
            for run in (*plain, *compiled.values()):
                run.advance()
    found = []
    for place, (run, peak) in enumerate(zip(plain, peaks, strict=True)):
        built = Compiled(compiled[place].median, building[place]) if place in compiled else None
        found.append(Cost(run.median, peak, built))
    return found


class _Run:
    """The meta-steps of a job, one at a time; the first is for warming up, or compiling."""

    def __init__(self, job: Job, compile: bool = False) -> None:
        self.job, self.learner = job, job.learner(compile)
        self.optimizer = torch.optim.Adam(self.learner.model.parameters(), job.lr)
        self.turn, self.seconds = 0, list[float]()

    @property
    def median(self) -> float:
        """Of the timed steps, processor time."""
        return statistics.median(self.seconds)

    def advance(self) -> None:
        """A timed step."""
        tasks = self._tasks()
        start = time.process_time()
        meta_step(self.learner, self.optimizer, tasks, self.job.clip)
        self.seconds.append(time.process_time() - start)

    def peak_bytes(self) -> int:
        """Of a step that is not timed."""
        tasks = self._tasks()
        with LiveBytes() as live:
            meta_step(self.learner, self.optimizer, tasks, self.job.clip)
        peak: int = live.peak
        return peak

    def wall_seconds(self) -> float:
        """Of a step that is not timed otherwise: compilers are other processes."""
        tasks = self._tasks()
        start = time.perf_counter()
        meta_step(self.learner, self.optimizer, tasks, self.job.clip)
        return time.perf_counter() - start

    def _tasks(self) -> mn.Tasks | list[mn.Tasks]:
        self.turn += 1
        return BENCHMARKS[self.job.benchmark]().train(self.job.seed, self.job.tasks * (self.turn - 1), self.job.tasks)
