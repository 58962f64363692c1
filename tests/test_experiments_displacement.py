"""The study of the default nudge: a short form of it, and that its claims can fail."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from metanudge.experiments.solves import displacement as study


@pytest.fixture(scope="module")
def short() -> Any:
    settings = replace(
        study.DisplacementSettings.quick(), networks=("transformer_gelu", "sinusoid_tanh"), steps=4, training_steps=2
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study, "FACTORS", (0.3, 1.0))
        return study.run(settings, lambda share: None)


def test_every_curve_is_there(short: Any) -> None:
    assert set(short.metrics) == {"transformer_gelu", "sinusoid_tanh"}
    for found in short.metrics.values():
        assert 0 <= found["reference"]["residual"] < 1
        for precision in study.PRECISIONS:
            assert found[precision]["fomaml"] > 0
            for nudge in study.NUDGES:
                record = found[precision][nudge]
                assert set(record["by_factor"]) == {"0.3", "1"}
                assert record["nu"] > 0
                assert record["default"] > 0
    assert len(short.figures["displacement"][0].axes) == 2


def test_precisions_differ_and_the_model_is_left_alone() -> None:
    settings = replace(study.DisplacementSettings.quick(), tasks=2)
    given = study.problem("transformer_gelu", settings)
    before = copy.deepcopy(given.model.state_dict())
    narrow, wide = (study.estimate(given, 2, study.mn.FOMAML(), kind)[0] for kind in study.PRECISIONS.values())
    assert narrow.dtype == wide.dtype == torch.float64
    assert 1e-4 < float((narrow - wide).norm() / wide.norm()) < 0.1
    assert all(torch.equal(value, before[name]) for name, value in given.model.state_dict().items())


def record(default: float, least: float, fomaml: float) -> dict[str, Any]:
    nudge = {"default": default, "nu": 1.0, "by_factor": {"0.3": least, "1": default}}
    return {"fomaml": fomaml, "linear": nudge, "full": nudge}


def judged(smooth: dict[str, Any], residual: float = 0.0) -> list[bool]:
    found = {"reference": {"residual": residual}, "float32": smooth, "bfloat16": record(0.1, 0.1, 1.0)}
    return [claim.holds for claim in study._claims({"sinusoid_tanh": found})]


def test_claims_can_fail() -> None:
    assert judged(record(0.1, 0.09, 1.0)) == [True, True]
    assert judged(record(0.1, 0.05, 1.0)) == [False, True]
    assert judged(record(0.1, 0.1, 0.1)) == [True, False]
    assert judged(record(0.1, 0.1, 1.0), residual=0.1) == [False, True]
    assert judged(record(math.inf, 0.1, 1.0)) == [False, False]
