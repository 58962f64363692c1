"""The comparison of all estimators: its grid, its readings of curves, its costs, and its quick form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import metanudge as mn
from metanudge.experiments.comparison.benchmark import BENCHMARKS, Inner
from metanudge.experiments.comparison.claims import (
    at_equal_seconds,
    at_equal_steps,
    in_time,
    stays_solved,
    time_to_reach,
)
from metanudge.experiments.comparison.figures import COLOURS, LABELS
from metanudge.experiments.comparison.study import ComparisonSettings, Method, compare, metrics_of, score_at, seconds_to
from metanudge.experiments.comparison.training import METHODS, Compiled, Cost, Job, Outcome, costs, train
from metanudge.experiments.runner import reproduce
from metanudge.experiments.sinusoid import EXPERIMENT

TINY = ComparisonSettings(
    meta_steps=2,
    tasks=2,
    seeds=2,
    tuning_steps=1,
    validation_tasks=3,
    test_tasks=4,
    curve_tasks=3,
    points=2,
    repeats=1,
    compiled=False,
    workers=1,
)


def job(method: str = "fobmaml", place: int = -1) -> Job:
    inner = BENCHMARKS["sinusoid_tanh"]().inners[place]
    return Job("sinusoid_tanh", method, inner, 1e-3, 0, 3, 2, 1, validation_tasks=3, curve_tasks=3, test_tasks=4)


def method(name: str, scores: list[list[float]], seconds: float) -> Method:
    """A method whose seeds' curves are ``scores`` and whose final tasks agree with the last point."""
    outcomes = [
        Outcome(
            [10, 20, 30],
            curve,
            curve,
            [0, 1, 2],
            torch.full((4, 2), curve[-1], dtype=torch.float64),
            0,
            0,
            5.0,
            0.1,
            {},
        )
        for curve in scores
    ]
    best = replace(job(name), meta_steps=30)
    return Method(best, [], outcomes, Cost(seconds, 100))


def test_every_estimator_is_compared_and_has_a_colour():
    assert set(mn.ESTIMATORS) < set(METHODS)
    assert set(METHODS) == set(COLOURS) == set(LABELS)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_every_method_takes_the_points_of_every_grid_that_it_can(name):
    inners = BENCHMARKS[name]().inners
    for kind in METHODS:
        possible = [replace(job(kind), benchmark=name, inner=inner).possible for inner in inners]
        rests_on_prox = kind in ("fobmaml", "fobmaml_light", "imaml", "tangent")
        expected = [
            (inner.prox > 0 or not rests_on_prox) and (inner.radius == 0 or kind != "reptile") for inner in inners
        ]
        assert possible == expected, kind


def test_training_validation_and_test_tasks_differ():
    for make in BENCHMARKS.values():
        benchmark = make()
        first = [next(iter(tasks)) for tasks in (benchmark.train(0, 0, 1), benchmark.validation(1), benchmark.test(1))]
        inputs = [task.inputs if isinstance(task, mn.Batch) else task.support.inputs for task in first]
        for a in range(3):
            for b in range(a):
                assert not torch.equal(inputs[a], inputs[b])


def test_curves_are_read_at_their_points():
    one = method("maml", [[4.0, 2.0, 1.0], [2.0, 2.0, 0.0]], 0.5)  # mean 3, 2, .5 at 5, 10, 15 seconds
    assert score_at(one.seconds, one.scores, 7.5) == pytest.approx(3.0)  # what was kept by then, not what was to come
    assert score_at(one.seconds, one.scores, 10) == pytest.approx(2.0)
    assert score_at(one.seconds, one.scores, 15) == score_at(one.seconds, one.scores, 100) == pytest.approx(0.5)
    assert math.isnan(score_at(one.seconds, one.scores, 1))
    assert seconds_to(one.seconds, one.scores, 2.0, higher=False) == pytest.approx(10.0)
    assert seconds_to(one.seconds, one.scores, 0.1, higher=False) == math.inf
    assert seconds_to(one.seconds, one.scores, 2.5, higher=True) == pytest.approx(5.0)


def test_compiled_seconds_count_compiling():
    plain = method("maml", [[3.0, 2.0, 1.0]], 0.5)
    assert plain.compiled_seconds == plain.seconds == [5.0, 10.0, 15.0]
    compiled = plain._replace(cost=Cost(0.5, 100, Compiled(seconds=0.25, building=4.0)))
    assert compiled.seconds == plain.seconds
    assert compiled.compiled_seconds == [6.5, 9.0, 11.5]


def test_claims_can_fail_and_hold():
    better = method("fobmaml", [[3.0, 1.0, 0.4]], 1.0)
    worse = method("maml", [[4.0, 2.0, 0.5]], 0.5)
    found = {"fobmaml": better, "fobmaml_light": better, "maml": worse, "fomaml": worse, "reptile": worse}
    assert at_equal_steps(found, "sinusoid_tanh", 0.0).holds
    # in MAML's 15 seconds, ours has looked once
    assert not at_equal_seconds(found, "sinusoid_tanh", "fobmaml", "plain").holds
    assert not time_to_reach(found, "sinusoid_tanh", "fobmaml", "plain").holds
    faster = better._replace(cost=Cost(1.0, 100, Compiled(seconds=0.25, building=4.0)))
    for ours in ("fobmaml", "fobmaml_light"):
        for claim in (at_equal_seconds, time_to_reach):
            judged = in_time(claim, found | {ours: faster}, "sinusoid_tanh")
            assert [one.holds for one in judged] == [False, False, ours == "fobmaml", ours == "fobmaml_light"]
    turned = found | {"fobmaml": worse, "maml": better}
    assert not at_equal_steps(turned, "sinusoid_tanh", 0.0).holds
    assert at_equal_steps(turned, "sinusoid_tanh", 0.11).holds


def test_with_a_sharpness_radius_more_is_claimed_and_reptile_has_no_part():
    better, worse = (method(name, [[0.3, 0.5, end]], 1.0) for name, end in (("fobmaml", 0.8), ("hfmaml", 0.7)))
    found = {"fobmaml": better, "fobmaml_light": better, "hfmaml": worse, "maml": worse, "fomaml": worse}
    claim = at_equal_steps(found, "permuted_labels_flat", 0.005, "hfmaml")
    assert claim.holds
    assert "HF-MAML 70" in claim.measured
    assert not at_equal_steps(
        found | {"fobmaml": worse, "hfmaml": better}, "permuted_labels_flat", 0.005, "hfmaml"
    ).holds
    assert stays_solved(found, "permuted_labels_flat").holds
    rough = better._replace(outcomes=[one._replace(residual=0.4) for one in better.outcomes])
    assert not stays_solved(found | {"fobmaml_light": rough}, "permuted_labels_flat").holds


def test_a_method_that_can_take_no_point_of_a_grid_is_left_out(monkeypatch):
    inners = (Inner(mn.GradientDescent(2, lr=0.01), 2.0, radius=0.3),)
    flat = BENCHMARKS["sinusoid_tanh"]()._replace(inners=inners, lrs=(1e-3,))
    monkeypatch.setitem(BENCHMARKS, "sinusoid_tanh", lambda: flat)
    for name in set(METHODS) - {"fomaml", "reptile"}:
        monkeypatch.delitem(METHODS, name)
    found = compare("sinusoid_tanh", TINY, lambda share: None)
    assert set(found) == {"fomaml"}
    assert "sharpness_radius 0.3" in metrics_of(found)["fomaml"]["settings"]["inner"]


def test_metrics_have_the_promised_names():
    found = metrics_of({"maml": method("maml", [[4.0, 2.0, 1.0], [2.0, 2.0, 0.0]], 0.5)})["maml"]
    assert found["mean"] == 0.5
    assert found["seeds"] == [1.0, 0.0]
    assert found["seconds"] == 15.0
    assert found["gradient_evaluations"] == 150.0
    assert found["peak_bytes"] == 100
    assert found["ci95"] == pytest.approx(1.96 * (8 * 0.25 / 7) ** 0.5 / 8**0.5)


def test_training_is_the_same_again_and_scores_are_of_its_parameters():
    first, second = train(job()), train(job())
    assert torch.equal(first.values, second.values)
    assert first.steps == [1, 2, 3]
    learner = job().learner()
    learner.model.load_state_dict(first.parameters)
    again = learner.evaluate(BENCHMARKS["sinusoid_tanh"]().test(4)).values
    assert torch.allclose(again, first.values, atol=0, rtol=0)


def test_the_parameters_that_are_best_on_the_validation_tasks_are_kept(monkeypatch):
    """Steps of the wrong sign make a network worse and worse: what is kept is from the first look."""
    right = mn.MetaLearner.backward

    def wrong(self, tasks):
        step = right(self, tasks)
        for parameter in self.model.parameters():
            parameter.grad.neg_()
        return step

    monkeypatch.setattr(mn.MetaLearner, "backward", wrong)
    found = train(replace(job(), meta_steps=4, lr=0.02, tasks=20, validation_tasks=50))
    assert found.validation == sorted(found.validation)
    assert found.kept == [0, 0, 0, 0]
    assert found.kept_scores == [found.scores[0]] * 4
    assert found.best_validation == found.validation[0]
    learner = job().learner()
    learner.model.load_state_dict(found.parameters)
    assert learner.evaluate(BENCHMARKS["sinusoid_tanh"]().validation(50)).mean == found.validation[0]
    assert torch.equal(learner.evaluate(BENCHMARKS["sinusoid_tanh"]().test(4)).values, found.values)


def test_a_training_that_improves_keeps_its_end():
    found = train(replace(job(), meta_steps=6, lr=0.01, tasks=20, validation_tasks=50, every=3))
    assert found.validation[1] < found.validation[0]
    assert found.kept == [0, 1]
    assert found.kept_scores == found.scores


@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's own use of it
def test_costs_see_what_backpropagation_through_the_solve_keeps():
    ours, maml = costs([job("fobmaml_light"), job("maml")], repeats=1, compiling=True)
    assert maml.peak_bytes > 2 * ours.peak_bytes
    assert min(ours.seconds, maml.seconds) > 0
    assert maml.compiled is None
    assert ours.compiled is not None
    assert 0 < ours.compiled.seconds < ours.compiled.building


def test_a_tiny_comparison_ends_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ComparisonSettings, "quick", classmethod(lambda cls: TINY))
    whole = BENCHMARKS["sinusoid_tanh"]()
    ends = whole._replace(inners=(whole.inners[0], whole.inners[-1]))  # without a proximal term, and with one
    monkeypatch.setitem(BENCHMARKS, "sinusoid_tanh", lambda: ends)
    reproduce(EXPERIMENT, tmp_path, True, 0, ("results",), Console(quiet=True))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in mn.ESTIMATORS:
        assert {"mean", "ci95", "seconds", "gradient_evaluations", "peak_bytes"} <= set(metrics["results"][name])
        tried = metrics["results"][name]["grid"]
        best = min(tried, key=lambda trial: trial["validation"])
        assert {"inner": best["inner"], "lr": best["lr"]} == metrics["results"][name]["settings"]
    assert (tmp_path / "sinusoid_tanh_functions.png").exists()
