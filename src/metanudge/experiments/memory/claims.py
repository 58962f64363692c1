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


def lacking(metrics: Mapping[str, Any], x: str, *names: str) -> list[str]:
    """Which of the candidates had no room on a GPU."""
    return [name for name in names if x not in metrics["peak_bytes"].get(name, {})]


def memory_claim(metrics: Mapping[str, Any], x: str, place: str) -> Claim:
    """FO-B-MAML's peak against a training step's and three copies, however it was measured."""
    statement = f"At {place} FO-B-MAML needs little more memory than a training step"
    if lost := lacking(metrics, x, "plain", "fobmaml"):
        return Claim(statement, "room for both", f"no room for {' and '.join(lost)}", False)
    told, holds = [], True
    copy = metrics["parameter_bytes"]["fobmaml"][x]
    for word, table in peaks(metrics).items():
        lean, plain = (table[name][x] for name in ("fobmaml", "plain"))
        allowed = FACTOR * plain + COPIES * copy
        holds = holds and lean <= allowed
        copies = (lean - plain) / copy
        told.append(f"{word} {lean / 2**20:.1f} of {allowed / 2**20:.1f} MiB, a training step and {copies:.1f} copies")
    return Claim(
        statement,
        f"peak at most {FACTOR} times that of one plain training step plus {COPIES} copies of the adapted parameters "
        f"({copy / 2**20:.2f} MiB each)",
        "; ".join(told),
        holds,
    )


def time_claim(metrics: Mapping[str, Any], x: str, place: str) -> Claim:
    """Time of the estimate against as many gradients of an ordinary loop."""
    statement = f"At {place} a FO-B-MAML estimate takes the time of its gradients"
    if lacking(metrics, x, "fobmaml"):
        return Claim(statement, "room for it", "no room", False)
    ratio, gradients = (metrics[name]["fobmaml"][x] for name in ("seconds_over_loop", "gradients"))
    return Claim(
        statement,
        f"at most {TIME} times an ordinary loop of as many forward and backward passes ({gradients})",
        f"{ratio:.3f} times; {'one thread, ' if 'live_bytes' in metrics else ''}medians, taken in turns",
        ratio <= TIME,
    )


def graphs_claims(metrics: Mapping[str, Any], places: Mapping[str, str]) -> list[Claim]:
    """The same with CUDA graphs, wherever it was measured; none on a CPU. ``places`` are the words for every x."""
    ratios = metrics.get("seconds_over_loop", {}).get("fobmaml_graphs", {})
    lost = [place for x, place in places.items() if x in metrics.get("out_of_memory", {}).get("fobmaml_graphs", {})]
    if not ratios and not lost:
        return []
    told = ", ".join(f"{ratios[x]:.3f} at {place}" for x, place in places.items() if x in ratios)
    return [
        Claim(
            "With CUDA graphs a FO-B-MAML estimate takes the time of its gradients or less, everywhere",
            f"at most {TIME} times an ordinary loop of as many forward and backward passes",
            "; ".join([*([f"times {told}"] if told else []), *(f"no room at {place}" for place in lost)]),
            not lost and max(ratios.values()) <= TIME,
        )
    ]
