"""The study of meta-optimizers: what its races count, and its quick form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import metanudge as mn
from metanudge.experiments.synthetic import meta_optimizers
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
    small = replace(MetaOptimizersSettings.quick(), lrs=(1.0, 10.0, 100.0), target=0.03, budget=150)
    study = meta_optimizers.run(small, shares.append)
    iterations = study.metrics["iterations"]
    assert study.name == "meta_optimizers"
    assert list(iterations) == ["sgd", "clipped", "normalized", "normalized_momentum"]
    assert iterations["clipped"] < iterations["sgd"]
    assert iterations["normalized"] < iterations["sgd"]
    assert study.metrics["with_growth"]["iterations"]["sgd"] < iterations["sgd"]
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


def test_schedules():
    assert [shape(name, 6) for name in ("constant", "root_2", "halving_3", "doubling_3")] == [1.0, 0.5, 0.25, 4.0]
    assert math.isfinite(shape("doubling_1", 10**6))
    assert Candidate(1.0, "constant").max_step is None
