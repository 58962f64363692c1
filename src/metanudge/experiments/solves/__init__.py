"""``metanudge reproduce solves``: inner solves that converge without tuning, and numbers that say whether they did."""

from metanudge.experiments.solves import sinusoid
from metanudge.experiments.study import Entry, Experiment

EXPERIMENT = Experiment(
    name="solves",
    title="Inner solves",
    studies={
        "sinusoid": Entry(sinusoid.SinusoidSettings, sinusoid.run),
    },
)
