"""What is judged in more than one study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metanudge.experiments.study import Claim

FACTOR, COPIES, TIME = 1.3, 3, 1.1


def peaks(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """By what they are of: the process and the tensors, or what a GPU has allocated."""
    if "live_bytes" in metrics:
        return {"resident": metrics["peak_bytes"], "tensors": metrics["live_bytes"]}
    return {"allocated": metrics["peak_bytes"]}


def memory_claim(metrics: Mapping[str, Any], x: str, place: str) -> Claim:
    """FO-B-MAML's peak against a training step's and three copies, however it was measured."""
    told, holds = [], True
    copy = metrics["parameter_bytes"]["fobmaml"][x]
    for word, table in peaks(metrics).items():
        lean, plain = (table[name][x] for name in ("fobmaml", "plain"))
        allowed = FACTOR * plain + COPIES * copy
        holds = holds and lean <= allowed
        copies = (lean - plain) / copy
        told.append(f"{word} {lean / 2**20:.1f} of {allowed / 2**20:.1f} MiB, a training step and {copies:.1f} copies")
    return Claim(
        f"At {place} FO-B-MAML needs little more memory than a training step",
        f"peak at most {FACTOR} times that of one plain training step plus {COPIES} copies of the adapted parameters "
        f"({copy / 2**20:.2f} MiB each)",
        "; ".join(told),
        holds,
    )


def time_claim(metrics: Mapping[str, Any], x: str, place: str) -> Claim:
    """Time of the estimate against as many gradients of an ordinary loop."""
    ratio, gradients = (metrics[name]["fobmaml"][x] for name in ("seconds_over_loop", "gradients"))
    return Claim(
        f"At {place} a FO-B-MAML estimate takes the time of its gradients",
        f"at most {TIME} times an ordinary loop of as many forward and backward passes ({gradients})",
        f"{ratio:.3f} times; {'one thread, ' if 'live_bytes' in metrics else ''}medians, taken in turns",
        ratio <= TIME,
    )
