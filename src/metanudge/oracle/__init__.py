"""Seam 1: where loss gradients come from. Two answers to losses.py; nothing above them differs.

``StackedLosses``: a functional call of the model under ``torch.func.vmap``, for all tasks and all nodes at once.
``LiveLosses``: the module as it is and ``loss.backward()``, for one task.
"""

from metanudge.oracle.batch_norm import BatchNorm, Policy
from metanudge.oracle.call import Call
from metanudge.oracle.common import Tally, device_of
from metanudge.oracle.compiled import Programs
from metanudge.oracle.cuda_graphs import CudaGraphs
from metanudge.oracle.live import LiveLosses
from metanudge.oracle.live_forward import LiveForward
from metanudge.oracle.module import LiveModule
from metanudge.oracle.recorded import Recorder, Recordings
from metanudge.oracle.stacked import StackedLosses
from metanudge.oracle.stacked_forward import StackedForward

__all__ = [
    "BatchNorm",
    "Call",
    "CudaGraphs",
    "LiveForward",
    "LiveLosses",
    "LiveModule",
    "Policy",
    "Programs",
    "Recorder",
    "Recordings",
    "StackedForward",
    "StackedLosses",
    "Tally",
    "device_of",
]
