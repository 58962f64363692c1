"""``metanudge reproduce sinusoid``: every estimator on Finn's sinusoids, 10 shots, smooth and kinked network.

Protocol: network 1-40-40-1, 25 tasks a meta-step, Adam with the meta-gradient clipped at 10. Every estimator is tuned
on the same grid (inner solver, proximal weight, step size of Adam) by the validation error of shorter runs, and then
trained from three seeds. Of every training those parameters are kept that are best on the validation tasks, among
twenty looks; the error is that of 1,000 tasks never seen.
"""

from __future__ import annotations

from metanudge.experiments.comparison.claims import at_equal_seconds, at_equal_steps, in_time
from metanudge.experiments.comparison.figures import adaptation, curves, functions
from metanudge.experiments.comparison.study import ComparisonSettings, compare, metrics_of
from metanudge.experiments.study import Advance, Entry, Experiment, Study

SUMMARY = (
    "Every estimator on the same {network} network, tasks and meta-steps, each with the inner solver, proximal weight "
    "and step size of Adam that the shared grid's validation tasks chose for it, and of every training the parameters "
    "that they were best with, among {looks} looks. (An inner problem without proximal term is not for estimators that "
    "rest on one; they have so many points less.) Seconds are processor time of one thread, the median of meta-steps "
    "of all estimators taken turn by turn, times their number, without the looks; with compile=True too, where an "
    "estimator takes first derivatives only, and then with the time that compiling takes. What each chose, the whole "
    "grid and every curve are in metrics.json."
)


def run(name: str, network: str, key: str, settings: ComparisonSettings, advance: Advance) -> Study:
    """Compare on one network."""
    found = compare(name, settings, advance)
    figures = {
        f"{name}_curves": (
            curves(name, found),
            "Mean over seeds of the error on the first test tasks; thin: without keeping the best.",
        ),
        f"{name}_adaptation": (adaptation(name, found), "Test error after every adaptation step, meta-training done."),
        f"{name}_functions": (
            functions(found),
            "Networks adapted to the ten points of two test tasks, and before (grey).",
        ),
    }
    claims = [at_equal_steps(found, name, 0.0), *in_time(at_equal_seconds, found, name)]
    summary = SUMMARY.format(network=network, looks=settings.points)
    return Study(key, f"Sinusoids, {network} network", summary, claims, metrics_of(found), figures)


EXPERIMENT = Experiment(
    name="sinusoid",
    title="Every estimator on the sinusoid",
    studies={
        "results": Entry(ComparisonSettings, lambda given, tell: run("sinusoid_tanh", "tanh", "results", given, tell)),
        "relu": Entry(
            ComparisonSettings, lambda given, tell: run("sinusoid_relu", "ReLU", "relu", given, tell), extra=True
        ),
    },
)
