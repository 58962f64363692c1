"""The study of the certificate: its problems against closed forms, what is counted, and its quick form."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metanudge as mn
from metanudge.estimators.certificate import Parts
from metanudge.experiments.solves import certificate as study
from metanudge.experiments.solves.random_problems import (
    RandomProblem,
    Recording,
    flat_problems,
    gentle_problem,
    gentle_problems,
    huber,
    pieces,
    softplus,
    steep_problems,
)

SMALL = study.CertificateSettings(problems=4, breaking=6)


def test_the_loss_of_pieces_is_its_formula():
    model = mn.tasks.logistic_model(1)
    with torch.no_grad():
        model.weight.fill_(2.0)
    batch = mn.Batch(torch.tensor([[1.5]]).double(), torch.tensor([[4.0, 5.0, 0.5, 3.0, 1.0]]).double())
    for bend, z in ((F.relu, 6.0), (huber, 5.5), (softplus, math.log1p(math.exp(6.0)))):
        assert float(pieces(bend)(model, batch).detach()) == pytest.approx(4 / 2 * 9 + 5 * 3 + 0.5 * z, rel=1e-12)
    assert float(huber(torch.tensor(0.5))) == 0.125


@pytest.mark.parametrize(("weight", "steepness"), [(0.02, 300.0), (0.05, 100.0)])
def test_the_gentle_piece_has_its_meta_gradient(weight: float, steepness: float):
    """At w₂ = 1 - weight / 2 the piece has the curvature weight steepness / 4."""
    problem = gentle_problem(100.0, weight, steepness, 1 - weight / 2, 0.3, 20)
    expected = torch.tensor([0, 1 / (1 + weight * steepness / 4)], dtype=torch.float64)
    torch.testing.assert_close(problem.exact, expected, rtol=1e-12, atol=1e-12)


def test_the_gentle_piece_breaks_the_bound():
    """What docs/theory.md says of it."""
    error, size, bound = next(gentle_problems(1, seed=0)).measure(mn.FOBMAML())
    assert (round(error / size, 2), round(bound, 2)) == (0.55, 0.15)


def implicit(problem: RandomProblem) -> Tensor:
    """λ (H + λ)⁻¹ ∇f where the gradient of E vanishes, by the formulas of the pieces and damped Newton steps."""
    (x,), (z,) = problem.tasks.support.inputs, problem.tasks.query.inputs
    _, _, _, k, _ = problem.tasks.support.targets[0].unbind(-1)
    _, b, c, other, _ = problem.tasks.query.targets[0].unbind(-1)
    theta = next(problem.model.parameters()).detach().flatten()

    def slope(phi: Tensor) -> Tensor:
        return x.mT @ (k * torch.sigmoid(k * (x @ phi))) / len(x) + problem.prox * (phi - theta)

    def system(phi: Tensor) -> Tensor:
        p = torch.sigmoid(k * (x @ phi))
        curvature = x.mT @ ((k**2 * p * (1 - p))[:, None] * x) / len(x)
        return curvature + problem.prox * torch.eye(len(theta), dtype=theta.dtype)

    phi = theta.clone()
    for _ in range(300):
        move, size = torch.linalg.solve(system(phi), slope(phi)), 1.0
        while size > 1e-4 and slope(phi - size * move).norm() > slope(phi).norm():
            size /= 2
        phi = phi - size * move
        if move.norm() < 1e-13:
            break
    assert slope(phi).norm() < 1e-9
    query = z.mT @ (b + c * other * torch.sigmoid(other * (z @ phi))) / len(z)
    return problem.prox * torch.linalg.solve(system(phi), query)


@pytest.mark.parametrize("steep_query", [False, True])
def test_the_exact_meta_gradient_of_steep_problems_is_implicit(steep_query: bool):
    for problem in steep_problems(4, seed=3, steep_query=steep_query):
        torch.testing.assert_close(problem.exact, implicit(problem), rtol=1e-7, atol=1e-9)


def test_the_bound_of_its_parts():
    parts = Parts(*(torch.tensor(value) for value in (1.0, 2.0, 0.5, 0.5, 0.1)))
    assert float(parts.bound()) == pytest.approx(2 + 0.5 + 0.1)
    assert float(parts.bound(1.0)) == pytest.approx(1 + 0.25 * 2 + 0.1)
    assert float(study.VARIANTS["seen_alone"](parts)) == pytest.approx(1.1)


def test_a_recording_estimates_the_same():
    problem, recording = next(gentle_problems(1, seed=0)), Recording()
    found = problem.measure(recording)
    assert found == problem.measure(mn.FOBMAML())
    (parts,) = recording.parts
    assert float(parts.bound()) / found[1] == pytest.approx(found[2], rel=1e-12)


def test_seeds_decide_the_problems():
    for draw in (flat_problems, gentle_problems, steep_problems):
        first, again, other = ([p.tasks.support.targets for p in draw(3, seed)] for seed in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[2], other[2])


def test_what_has_no_reference_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise mn.NonFiniteError("no solution")

    monkeypatch.setattr("metanudge.diagnostics.ExactMetaObjective.solutions", fail)
    found = study.run(SMALL, lambda share: None)
    for name, family in study.FAMILIES.items():
        number = SMALL.problems if family.claim else SMALL.breaking
        assert found.metrics[name]["left_out"] == {"without_a_reference": number, "diverged": 0, "idle": 0}
        assert found.metrics[name]["measured"] == 0


def test_the_study():
    shares: list[float] = []
    found = study.run(SMALL, shares.append)
    assert set(found.metrics) == set(study.FAMILIES)
    for name, family in study.FAMILIES.items():
        of = found.metrics[name]
        number = SMALL.problems if family.claim else SMALL.breaking
        assert of["measured"] + sum(of["left_out"].values()) == number
        errors, bounds = of["problems"]["error"], of["problems"]["bound"]
        assert len(errors) == len(bounds) == of["measured"]
        assert sum(error > bound for error, bound in zip(errors, bounds, strict=True)) == of["violations"]
        assert set(of["variants"]) == set(study.VARIANTS)
    assert len(found.claims) == 6
    assert all(claim.holds for claim in found.claims if "80 %" not in claim.expected)
    assert found.metrics["gentle"]["violations"] >= 1
    assert set(found.figures) == {"certificate", "certificate_breaks"}
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_claims_can_fail():
    """The words follow the numbers; that relative to the truth is claimed of the first family alone."""
    good = {"measured": 9, "violations": 0, "violations_relative_to_the_truth": 0, "within_a_factor_10": 0.9}
    metrics = {name: dict(good) for name in study.FAMILIES}
    assert [claim.holds for claim in study.claims(metrics)] == [True] * 6
    for name in metrics:
        changed = copy.deepcopy(metrics)
        changed[name] |= {"violations_relative_to_the_truth": 1, "within_a_factor_10": 0.79}
        assert [claim.holds for claim in study.claims(changed)] == [name != "moderate"] * 2 + [True] * 4
        changed[name] |= {"violations": 1}
        failed = sum(not claim.holds for claim in study.claims(changed))
        assert failed == (0 if study.FAMILIES[name].claim is None else 2 if name == "moderate" else 1)


def test_factors_by_which_bounds_are_exceeded():
    judged = study._judged([(1.0, 2.0), (0.1, 5.0), (3.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
    assert judged["violations"] == 2
    assert judged["within_a_factor_10"] == 2 / 5
    assert judged["exceeded_by"] == {"median": math.inf, "worst": math.inf}
    assert study._judged([])["exceeded_by"] is None
