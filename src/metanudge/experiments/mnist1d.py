"""``metanudge reproduce mnist1d``: every estimator on MNIST-1D, 5 shots, on the three convolutions of its paper.

Two protocols (``mn.tasks.mnist1d``): 5-way with permuted labels, and 3-way with classes that training never saw. Every
estimator is tuned on the same grid (inner solver, proximal weight, step size of Adam) by the validation accuracy of
runs of the same length, and then trained from three seeds. Of every training those parameters are kept that are best on
the validation tasks, among ten looks; the accuracy is that of 1,000 test tasks. Run where they are asked for
(``--only gelu``) are the first protocol with GELU in the place of ReLU, the same network, smooth; and ``sharpness``, on
which the sharpness radius is chosen as well, by the four that lead.
"""

from __future__ import annotations

from metanudge.experiments.comparison.claims import at_equal_steps, in_time, stays_solved, time_to_reach
from metanudge.experiments.comparison.figures import adaptation, curves
from metanudge.experiments.comparison.study import ComparisonSettings, MNIST1DSettings, compare, metrics_of
from metanudge.experiments.study import Advance, Entry, Experiment, Study

SUMMARY = (
    "Every estimator on the same network, tasks and meta-steps, each with the inner solver, proximal weight and step "
    "size of Adam that the shared grid's validation tasks chose for it, and of every training the parameters that they "
    "were best with, among {looks} looks. (An inner problem without proximal term is not for estimators that rest on "
    "one; they have so many points less.) Seconds are processor time of one thread, the median of meta-steps of all "
    "estimators taken turn by turn, times their number, without the looks; with compile=True too, where an estimator "
    "takes first derivatives only, and then with the time that compiling takes. What each chose, the whole grid and "
    "every curve are in metrics.json."
)


FLAT = (
    "\n\nThe query gradient may be taken uphill of every adapted model, at .1 or .3 of its way from the initialisation "
    "(sharpness_radius): 0, .1 and .3 are on the grid, with one inner problem (16 steps of Nesterov, prox 1) and two "
    "step sizes of Adam."
)


def run(name: str, key: str, title: str, settings: ComparisonSettings, advance: Advance) -> Study:
    """Compare under one protocol."""
    found = compare(name, settings, advance)
    flat = any(trial.job.inner.radius for one in found.values() for trial in one.trials)
    figures = {
        f"{name}_curves": (
            curves(name, found),
            "Mean over seeds of the accuracy on the first test tasks; thin: without keeping the best.",
        ),
        f"{name}_adaptation": (adaptation(name, found), "Accuracy after every adaptation step, meta-training done."),
    }
    claims = [at_equal_steps(found, name, 0.005), *in_time(time_to_reach, found, name)]
    if flat:
        claims += [at_equal_steps(found, name, 0.005, "hfmaml"), stays_solved(found, name)]
    summary = SUMMARY.format(looks=settings.points) + (FLAT if flat else "")
    return Study(key, title, summary, claims, metrics_of(found), figures)


EXPERIMENT = Experiment(
    name="mnist1d",
    title="Every estimator on MNIST-1D",
    studies={
        "results": Entry(
            MNIST1DSettings,
            lambda given, tell: run("permuted_labels", "results", "5-way 5-shot, permuted labels", given, tell),
        ),
        "new_classes": Entry(
            MNIST1DSettings,
            lambda given, tell: run("new_classes", "new_classes", "3-way 5-shot, new classes", given, tell),
        ),
        "gelu": Entry(
            MNIST1DSettings,
            lambda given, tell: run("permuted_labels_gelu", "gelu", "5-way 5-shot, permuted labels, GELU", given, tell),
            extra=True,
        ),
        "sharpness": Entry(
            MNIST1DSettings,
            lambda given, tell: run(
                "permuted_labels_flat", "sharpness", "5-way 5-shot, permuted labels, sharpness radius", given, tell
            ),
            extra=True,
        ),
    },
)
