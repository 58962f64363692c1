"""The study of meta-optimizers: what its races count, and its quick form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import metanudge as mn
from metanudge.experiments.synthetic import meta_optimizers
from metanudge.experiments.synthetic.meta_optimizers_noise import minibatches, noisy_runs
from metanudge.experiments.synthetic.meta_optimizers_races import (
    METHODS,
    Candidate,
    MetaOptimizersSettings,
    race,
    setting,
    shape,
)


def test_meta_optimizers_study():
    shares: list[float] = []
    small = replace(
        MetaOptimizersSettings.quick(), lrs=(1.0, 10.0, 100.0), target=0.03, budget=150, noisy_lrs=(1.0, 10.0)
    )
    study = meta_optimizers.run(small, shares.append)
    iterations = study.metrics["iterations"]
    assert study.name == "meta_optimizers"
    assert list(iterations) == ["sgd", "clipped", "normalized", "normalized_momentum"]
    assert iterations["clipped"] < iterations["sgd"]
    assert iterations["normalized"] < iterations["sgd"]
    assert study.metrics["with_growth"]["iterations"]["sgd"] < iterations["sgd"]
    noisy = study.metrics["noisy"]["gradient_norm"]
    assert list(noisy) == list(iterations)
    assert noisy["clipped"] < noisy["sgd"]
    assert set(study.figures) == {"meta_optimizers", "meta_optimizers_noise"}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    json.dumps(study.metrics, allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_never_reaches_the_target_has_no_iterations(method):
    settings = replace(MetaOptimizersSettings.quick(), target=1e-9)
    problem, starts = setting(settings, settings.prox)
    found = race(problem, starts, method, False, settings, limit=3)
    assert found.iterations is None
    assert set(found.by_lr.values()) == {None}
    assert settings.target < found.norm < found.best[0].norms[0]


def test_race_counts_the_steps_of_the_library_optimizer():
    """The winner, stepped on its own, reaches the target after just as many steps."""
    settings = MetaOptimizersSettings.quick()
    problem, starts = setting(settings, settings.prox)
    found = race(problem, starts, "clipped", False, settings, limit=50)
    candidate = found.best[0].candidate
    theta = torch.nn.Parameter(starts[0].clone())
    optimizer = mn.optim.ClippedSGD([theta], candidate.lr, candidate.max_step)
    exact = problem.differentiated()
    for t in range(found.iterations + 1):
        theta.grad = exact.gradient(theta.detach())
        assert (theta.grad.norm() <= settings.target) == (t == found.iterations)
        optimizer.param_groups[0]["lr"] = candidate.lr * shape(candidate.schedule, t)
        optimizer.step()


def test_noisy_runs_are_the_library_optimizer_on_the_minibatches():
    """One candidate by hand, from the gradients of the tasks of each minibatch alone."""
    settings = replace(MetaOptimizersSettings.quick(), noisy_steps=8, noisy_lrs=(3.2,), repeats=2)
    found = noisy_runs(settings, settings.prox, "normalized_momentum")
    assert found.norms.shape == (2, 8)
    problem, starts = setting(settings, settings.prox)
    exact = problem.differentiated()
    for run, norms in enumerate(found.norms, start=1):
        theta = torch.nn.Parameter(starts[0].clone())
        optimizer = mn.optim.NormalizedSGD([theta], 3.2, momentum=0.9)
        for t, chosen in enumerate(minibatches(settings, 8, seed=run)):
            gradients = exact.gradients(theta.detach())
            assert float(gradients.mean(0).norm()) == pytest.approx(float(norms[t]), rel=1e-5)
            theta.grad = gradients[chosen].mean(0)
            optimizer.param_groups[0]["lr"] = 3.2 * (1 - t / 8)
            optimizer.step()


def test_a_noisy_run_that_diverges_loses():
    settings = replace(MetaOptimizersSettings.quick(), noisy_steps=12, noisy_lrs=(0.32, 1e4), repeats=1)
    found = noisy_runs(settings, 1.0, "sgd")
    assert found.candidate.lr == 0.32
    assert found.choice.scores[1e4] > 100 * found.choice.scores[0.32]


def test_schedules():
    assert [shape("linear_4", t) for t in (0, 1, 4, 5)] == [1.0, 0.75, 0.0, 0.0]
    assert [shape(name, 6) for name in ("constant", "root_2", "halving_3", "doubling_3")] == [1.0, 0.5, 0.25, 4.0]
    assert math.isfinite(shape("doubling_1", 10**6))
    assert Candidate(1.0, "constant").max_step is None
