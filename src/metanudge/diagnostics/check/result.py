"""What a check found: its rows, its table, its figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOOD = 0.1
"""Relative error that counts as good."""

SAFE = 0.08
"""Relative error up to which a setting is recommended: good, with a margin for other tasks than these."""


FAR = 4
"""Times a reference's uncertainty above which an error is one whatever the reference: the uncertainty is an estimate
itself, which was seen too small by a factor of 1.6 on networks."""

HARDLY_BEGUN = 0.5, 10.0
"""Residual of an inner solve, and relative error of its estimate, above which it is bad whatever the reference: what
is more than half unsolved, and another size by far, needs no third digit of the truth."""


class CheckRow(NamedTuple):
    """One setting, against the exact meta-gradient of the same inner problem.

    Attributes:
        group: What is varied: "yours", "steps", "nu", "prox", "estimator"; "search" where a recommendation was sought.
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
        nu: The nudge where it is varied, None where it is the learner's own.
        dropped: Tasks that have an exact meta-gradient and here no estimate; the others are compared.
        trusted: Whether the reference at this λ converged.
        uncertainty: Relative error that this reference itself may have; infinite where its solve is not done, and then
            the cosine and the error mean nothing.
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
    nu: float | str | None = None
    dropped: int = 0
    trusted: bool = True
    uncertainty: float = float("nan")
    note: str = ""

    @property
    def good(self) -> bool | None:
        """Whether the error is below 10 %; None where the reference is too uncertain to tell."""
        if self.trusted:
            return self.relative_error < GOOD
        if self.note:
            return False
        if self.residual > HARDLY_BEGUN[0] and self.relative_error > HARDLY_BEGUN[1]:
            return False
        if self.relative_error + self.uncertainty < GOOD:
            return True
        far = self.relative_error > FAR * self.uncertainty and self.relative_error - self.uncertainty >= GOOD
        return False if far else None


class Recommendation(NamedTuple):
    """Of the rows that have the learner's estimator and an error below 8 %, the one with the fewest gradients.

    Those at the learner's own prox come first, then those at the nearest: another prox is another objective.

    Attributes:
        steps: Inner steps.
        prox: λ; where it is not the learner's, nothing that was tried at that did.
        relative_error: What was measured with it.
        gradients: Gradient evaluations a task.
        nu: The nudge to set, None to leave it as it is.
    """

    steps: int
    prox: float
    relative_error: float
    gradients: float
    nu: float | str | None = None


class Check(NamedTuple):
    """What ``check`` found.

    Attributes:
        rows: All measurements, those of the learner as it is first.
        reference: How the exact meta-gradient was had.
        reference_residual: Relative residual of the reference's own solve.
        reference_error: Relative error that the reference itself may have, as far as it shows.
        trusted: Whether the reference converged: residual up to 0.001, error up to 1 %. Else there is a verdict only
            where the learner's error tells whatever the reference's is.
        kinked: Whether the support loss has kinks (ReLU, max-pooling) near the adapted parameters.
        recommendation: None where the learner is good as it is, nothing was found, or kinks keep the reference from
            converging.
        verdict: In words.
    """

    rows: list[CheckRow]
    reference: str
    reference_residual: float
    reference_error: float
    trusted: bool
    kinked: bool
    recommendation: Recommendation | None
    verdict: str

    @property
    def good(self) -> bool:
        """Whether the learner as it is has a relative error below 10 %, as far as can be told."""
        return bool(self.rows[0].good)

    def __str__(self) -> str:
        """A table and the verdict."""
        head = f"{'':10} {'setting':34} {'cosine':>7} {'error':>8} {'bound':>8} {'residual':>9} {'gradients':>9}"
        lines = [f"{head} {'memory':>9} {'time':>8}"]
        for row in self.rows:
            error = percent(row.relative_error) + ("" if row.trusted else " ?")
            measured = (
                f"{row.cosine:7.3f} {error:>8} {percent(row.error_bound):>8} {row.residual:9.1e} {row.gradients:9.0f} "
                f"{row.peak_bytes / 2**20:6.1f} MB {1e3 * row.seconds:5.0f} ms"
            )
            lost = f"  {row.dropped} diverged" if row.dropped else ""
            lines.append(f"{row.group:10} {row.label:34} {row.note or measured}{lost}")
        if not all(row.trusted for row in self.rows):
            lines.append("? the reference did not converge there")
        return "\n".join([*lines, "", self.verdict])

    def figure(self) -> Figure:
        """Relative error against gradient evaluations; needs matplotlib."""
        from matplotlib.figure import Figure

        made = Figure(figsize=(6.0, 4.0), layout="constrained")
        axis = made.subplots()
        for group in dict.fromkeys(row.group for row in self.rows):
            rows = [row for row in self.rows if row.group == group and row.trusted and not row.note]
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


def percent(value: float) -> str:
    """Two digits, as a factor where it is large."""
    if value != value:
        return "-"
    if value >= 9.995:
        return "inf" if value == float("inf") else f"{value:.0f}x" if value < 1e5 else ">1e5x"
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:.0f} %"
