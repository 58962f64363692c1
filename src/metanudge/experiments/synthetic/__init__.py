"""``metanudge reproduce synthetic``: the paper's synthetic claims as numbers and figures.

Claims (theory: docs/theory.md): (a, i) FO-B-MAML reaches a stationary point of the MAML objective, FOMAML and Reptile
do not: *stationarity*. (f, g, h) The meta-gradient is the derivative of the solution of a perturbed problem, its
finite differences have bias O(delta^(1/2)), O(delta^(2/3)) and so on: *bias*. (b) The objective's smoothness grows with
the meta-gradient: *smoothness*. (c, j) So normalised and clipped steps beat plain ones: *meta_optimizers*, and the
stochastic part of *stationarity*.
"""

from metanudge.experiments.study import Entry, Experiment
from metanudge.experiments.synthetic import bias, meta_optimizers, smoothness, stationarity
from metanudge.experiments.synthetic.meta_optimizers_races import MetaOptimizersSettings
from metanudge.experiments.synthetic.smoothness_measurements import SmoothnessSettings

EXPERIMENT = Experiment(
    name="synthetic",
    title="The synthetic study",
    studies={
        "bias": Entry(bias.BiasSettings, bias.run),
        "stationarity": Entry(stationarity.StationaritySettings, stationarity.run),
        "smoothness": Entry(SmoothnessSettings, smoothness.run),
        "meta_optimizers": Entry(MetaOptimizersSettings, meta_optimizers.run),
    },
)
