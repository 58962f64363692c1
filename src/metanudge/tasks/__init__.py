"""Families of tasks. A task is a pure function of (seed, index), so that resuming and sharing work are exact."""

from metanudge.tasks.episodes import Episodes, collate, episodes
from metanudge.tasks.few_shot import few_shot
from metanudge.tasks.harmonic import harmonic
from metanudge.tasks.image_folders import ImageFolders, image_folders
from metanudge.tasks.linear import linear, linear_meta_gradient, linear_solutions
from metanudge.tasks.logistic import logistic, logistic_loss, logistic_model
from metanudge.tasks.mnist1d import mnist1d
from metanudge.tasks.padding import pad
from metanudge.tasks.sinusoid import sinusoid

__all__ = [
    "Episodes",
    "ImageFolders",
    "collate",
    "episodes",
    "few_shot",
    "harmonic",
    "image_folders",
    "linear",
    "linear_meta_gradient",
    "linear_solutions",
    "logistic",
    "logistic_loss",
    "logistic_model",
    "mnist1d",
    "pad",
    "sinusoid",
]
