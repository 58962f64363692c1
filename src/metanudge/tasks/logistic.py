r"""Heterogeneous logistic regression: the smallest problem on which every first-order bias shows.

.. math::
    x = s_i Q_i \Lambda_i z, \quad z \sim N(0, I), \qquad
    P(y = 1) = (1 - 2 p) \, \sigma(\langle w + v_i, x \rangle) + p

Task i has its own rotation Q_i, spectrum Λ_i, overall scale s_i and weights w + v_i; a share p of the labels is wrong.
So the Hessians differ from task to task, and the query gradients at the adapted points do not vanish: the two things
without which FOMAML and Reptile would look unbiased.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metanudge.errors import SettingsError
from metanudge.settings import check_positive, check_steps
from metanudge.tasks.heterogeneous import Family, draw_scores
from metanudge.types import Batch, Tasks


def logistic(
    number: int,
    *,
    features: int = 20,
    shots: int = 40,
    queries: int = 40,
    common: float = 1.0,
    difference: float = 1.0,
    scales: float = 2.0,
    anisotropy: float = 2.0,
    flips: float = 0.1,
    seed: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tasks:
    """Draw a stack of binary classification tasks; task i is a pure function of (seed, i).

    Args:
        number: Tasks T, with indices first .. first + T - 1.
        features: Dimension d of the inputs ``[T, n, d]``; targets 0 and 1 are ``[T, n]``.
        shots: Support examples of a task.
        queries: Query examples of a task.
        common: Norm of the weights w that all tasks share.
        difference: Root mean square norm of a task's own weights v.
        scales: Overall scales of the tasks lie in [1 / scales, scales], uniform in the logarithm.
        anisotropy: Within a task, scales of its principal directions lie in [1 / anisotropy, anisotropy], likewise.
        flips: Share p of wrong labels, below 1/2.
        seed: Of the family.
        first: Index of the first task.
        dtype: Of inputs and targets.

    Raises:
        SettingsError: A value out of its range.

    Example:
        >>> import torch, metanudge as mn
        >>> from metanudge.tasks.logistic import logistic, logistic_loss, logistic_model
        >>> tasks = logistic(3, features=5, shots=8, queries=6)
        >>> tasks.support.inputs.shape, tasks.query.targets.shape
        (torch.Size([3, 8, 5]), torch.Size([3, 6]))
        >>> again = logistic(1, features=5, shots=8, queries=6, first=2)
        >>> torch.equal(again.query.inputs[0], tasks.query.inputs[2])
        True
        >>> mn.MetaLearner(logistic_model(5), logistic_loss).backward(tasks).dropped_tasks
        0
    """
    for name, size in (("number", number), ("features", features), ("shots", shots), ("queries", queries)):
        check_steps(size, name)
    check_positive(scales=scales, anisotropy=anisotropy)
    if not 0 <= flips < 0.5:
        raise SettingsError(f"flips is a share of labels below 1/2, got {flips!r}")
    family = Family(features, shots + queries, common, difference, scales, anisotropy, seed)

    def draw(index: int) -> tuple[Tensor, Tensor]:
        inputs, scores, generator = draw_scores(family, index)
        chance = (1 - 2 * flips) * torch.sigmoid(scores) + flips
        return inputs, torch.rand(len(scores), generator=generator, dtype=torch.float64, device="cpu") < chance

    drawn = [draw(index) for index in range(first, first + number)]
    x, y = (torch.stack(same).to(dtype) for same in zip(*drawn, strict=True))
    return Tasks(Batch(x[:, :shots], y[:, :shots]), Batch(x[:, shots:], y[:, shots:]))


def logistic_model(features: int, bias: bool = False, dtype: torch.dtype = torch.float64) -> nn.Linear:
    """Make a linear model with parameters zero; nothing is drawn from a random generator."""
    model = nn.Linear(features, 1, bias=bias, dtype=dtype, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def logistic_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean binary cross entropy of the logits ``model(inputs)``, ``[n, 1]``, for targets 0 and 1, ``[n]``."""
    return F.binary_cross_entropy_with_logits(model(batch.inputs).squeeze(-1), batch.targets)
