"""``metanudge reproduce solves``: inner solves that converge without tuning, and numbers that say whether they did."""

from metanudge.experiments.solves import certificate, convergence, displacement, guards, quality, sinusoid
from metanudge.experiments.study import Entry, Experiment

EXPERIMENT = Experiment(
    name="solves",
    title="Inner solves",
    studies={
        "convergence": Entry(convergence.ConvergenceSettings, convergence.convergence),
        "quality": Entry(quality.QualitySettings, quality.run),
        "displacement": Entry(displacement.DisplacementSettings, displacement.run),
        "certificate": Entry(certificate.CertificateSettings, certificate.run),
        "guards": Entry(guards.GuardsSettings, guards.run),
        "sinusoid": Entry(sinusoid.SinusoidSettings, sinusoid.run),
    },
)
