"""An initialisation in a folder: its weights as safetensors, and how it was and is to be adapted as JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metanudge
from metanudge.errors import SettingsError
from metanudge.estimators import ESTIMATORS, Stencil
from metanudge.files import write
from metanudge.learner import MetaLearner
from metanudge.selection import uncompiled
from metanudge.settings import check_folder, nearest
from metanudge.solvers import SOLVERS
from metanudge.types import LossFunction, Role

WEIGHTS, SETTINGS = "model.safetensors", "metanudge.json"
SIZES = ("chunk_size", "microbatch")
SHAPES = 100
"""Of tasks that were seen, at most so many are written down: by these a stack is told from a task."""
HOW_IT_RUNS = {"execution", "compile", "cuda_graphs", *SIZES}
"""Settings that fit together as they are written down, or are given anew."""


def save_pretrained(learner: MetaLearner, folder: str | Path, protocol: Mapping[str, Any] | None = None) -> None:
    """Write the initialisation, and the settings it is to be adapted with, into ``folder``.

    ``model.safetensors`` holds parameters and buffers (tied ones once), ``metanudge.json`` prox, ``sharpness_radius``,
    solver, estimator, ``adapt_only``, ``batch_norm``, how it ran (``execution`` and sizes) and ``protocol``. What can
    not be written (a predicate as ``adapt_only``, a solver with a factory or of the user's own) is left out, and
    ``load_pretrained`` asks for it. Both are written beside their place and then moved into it.

    Args:
        learner: Its model is the initialisation.
        folder: Made if missing.
        protocol: Whatever a reader should know of data and training; JSON.

    Raises:
        SettingsError: A protocol that is no JSON; numbers that safetensors has no room for (complex128); a folder that
            cannot be written to.

    Example:
        >>> import tempfile, torch, metanudge as mn
        >>> learner = mn.MetaLearner(torch.nn.Linear(1, 1), mn.metrics.squared_error, prox=2.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     learner.save_pretrained(folder, {"tasks": "sinusoid"})
        ...     again = mn.load_pretrained(folder, torch.nn.Linear(1, 1), mn.metrics.squared_error)
        >>> again.prox, bool((again.model.weight == learner.model.weight).all())
        (2.0, True)
    """
    from safetensors.torch import save_model

    parts: dict[str, Callable[[], Any]] = {
        "solver": lambda: _described("solver", learner.solver, SOLVERS),
        "estimator": lambda: _described("estimator", learner.estimator, ESTIMATORS),
        "adapt_only": lambda: _listed(learner.adapt_only),
    }
    written, left_out = {}, []
    for name, part in parts.items():
        try:
            written[name] = part()
        except SettingsError:
            left_out.append(name)
    record = {
        "metanudge": metanudge.__version__,
        "prox": learner.prox,
        "sharpness_radius": learner.sharpness_radius,
        **written,
        "left_out": left_out,
        "batch_norm": learner.norm.policy,
        "execution": "auto" if learner.automatic else learner.execution.name,
        **{name: getattr(learner.execution, name, None) for name in SIZES},
        "query_loss": learner.losses[Role.QUERY] is not learner.losses[Role.SUPPORT],
        "seen": sorted(learner.seen)[:SHAPES],
    }
    try:
        text = json.dumps(record | {"protocol": dict(protocol or {})}, indent=1, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"the settings, or the protocol, cannot be written as JSON: {error}") from error
    check_can_be_saved(learner.model)
    folder = Path(folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{WEIGHTS}.part"
    save_model(learner.model, str(unfinished))
    unfinished.replace(folder / WEIGHTS)
    write(folder / SETTINGS, text.encode() + b"\n")


def check_can_be_saved(model: nn.Module) -> None:
    """Raise a SettingsError for what safetensors knows nothing of: other numbers, such as complex128, or no tensors."""
    from safetensors.torch import save

    held = model.state_dict()
    if odd := [name for name, value in held.items() if not isinstance(value, Tensor)]:
        raise SettingsError(f"{odd[0]} is no tensor, and safetensors holds nothing else; keep it in a buffer, or apart")
    first = {value.dtype: name for name, value in reversed(held.items())}
    for kind, name in first.items():
        try:
            save({name: torch.empty(0, dtype=kind, device="cpu")})
        except KeyError as error:
            raise SettingsError(
                f"{name} is {kind}, which safetensors cannot hold; keep its real and imaginary part, as "
                "torch.view_as_real gives them, or torch.complex64"
            ) from error


def load_pretrained(folder: str | Path, model: nn.Module, loss: LossFunction, **settings: Any) -> MetaLearner:
    """Make the learner that ``save_pretrained`` wrote down.

    Args:
        folder: With ``model.safetensors`` and ``metanudge.json``.
        model: Of the same architecture; its parameters and buffers are overwritten.
        loss: Of the learner; functions are not written down.
        **settings: Of ``MetaLearner``, instead of those written down: ``solver``, ``query_loss``, ...; any of
            ``execution``, ``compile``, ``cuda_graphs`` and sizes is instead of all of them.

    Raises:
        SettingsError: Nothing there, weights of another architecture, or what could not be written down (a query loss,
            a solver with a factory, a predicate) and is not given.
    """
    known = [name for name in inspect.signature(MetaLearner).parameters if name not in ("model", "loss")]
    for name in settings:
        if name not in known:
            raise SettingsError(f"a learner has no setting {name!r}; {nearest(name, known)}")
    folder = Path(folder)
    for name in (WEIGHTS, SETTINGS):
        if not (folder / name).is_file():
            # a training leaves them in best, or in seed-N/best
            inside = sorted([*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")])
            meant = f". Did you mean {inside[0].parent}?" if inside else ""
            raise SettingsError(f"there is no {folder / name}; learner.save_pretrained writes it{meant}")
    try:
        record = json.loads((folder / SETTINGS).read_text())
        left_out = record.get("left_out", [])
        given = {
            "prox": record["prox"],
            "sharpness_radius": record.get("sharpness_radius", 0.0),  # older versions had none
            "batch_norm": record.get("batch_norm"),
        }
        if not settings.keys() & HOW_IT_RUNS:
            given |= {name: record[name] for name in ("execution", *SIZES) if name in record}
        seen = {tuple(map(tuple, shapes)) for shapes in record.get("seen", [])}
        for name, make in READ.items():
            if name not in left_out:
                given[name] = make(record[name])
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{folder / SETTINGS} cannot be understood: {error!r}") from error
    for name in left_out:
        if name not in settings:
            raise SettingsError(f"the {name} of this learner could not be written down; give {name}= as it was")
    if record.get("query_loss") and "query_loss" not in settings:
        raise SettingsError("this learner had a query loss of its own; give query_loss=")
    learner = MetaLearner(model, loss, **(given | settings))
    learner.seen |= seen
    load_weights(model, folder)
    return learner


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of ``folder`` into ``model``, which is left alone where they do not fit.

    Raises:
        SettingsError: Weights of another architecture.
    """
    from safetensors.torch import load_file

    try:
        read = load_file(folder / WEIGHTS)
    except Exception as error:  # SafetensorError, which safetensors.torch does not name
        raise SettingsError(
            f"{folder / WEIGHTS} holds no weights that can be read ({error}); it has to be written again"
        ) from error
    own = model.state_dict()
    compiled = {uncompiled(name): name for name in own}
    stored = {name if name in own else compiled.get(uncompiled(name), name): value for name, value in read.items()}
    held = [_span(own[name]) for name in stored if name in own]
    missing = [
        name
        for name, value in own.items()
        if name not in stored and not any(a <= begin and end <= b for begin, end in (_span(value),) for a, b in held)
    ]
    odd = [name for name, value in stored.items() if name not in own or own[name].shape != value.shape]
    if odd:
        found = tuple(own[odd[0]].shape) if odd[0] in own else "nothing of that name"
        raise SettingsError(
            f"the weights are of another architecture: {odd[0]} has shape {tuple(stored[odd[0]].shape)}, the model "
            f"has {found}"
        )
    if missing:
        raise SettingsError(
            f"the weights are of another architecture: the model has {', '.join(missing)}, of which {folder / WEIGHTS} "
            "holds nothing"
        )
    model.load_state_dict(stored, strict=False)  # of tied ones, one is there


def _span(value: Tensor) -> tuple[int, int]:
    """Where in memory it is: of tied parameters at the same place."""
    return value.data_ptr(), value.data_ptr() + value.nbytes


def _listed(adapt_only: Any) -> str | list[str] | None:
    if not (adapt_only is None or isinstance(adapt_only, str | list | tuple)):
        raise SettingsError("adapt_only is a function, which cannot be written down; give names or patterns instead")
    return adapt_only if adapt_only is None or isinstance(adapt_only, str) else list(adapt_only)


def _described(kind: str, part: Any, registry: Mapping[str, type[Any]]) -> dict[str, Any]:
    name = next((name for name, known in registry.items() if type(part) is known), None)
    if name is None or not dataclasses.is_dataclass(part):
        raise SettingsError(f"{part!r} cannot be written down; it is none of the {kind}s {', '.join(registry)}")
    fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    for field, value in fields.items():
        if callable(value):
            raise SettingsError(f"{field} of {type(part).__name__} is a function, which cannot be written down")
        if isinstance(value, Stencil):
            fields[field] = dataclasses.asdict(value)
    return {"name": name, **fields}


def _made(record: dict[str, Any], registry: Mapping[str, type[Any]]) -> Any:
    fields = dict(record)
    kind = registry[fields.pop("name")]
    scheme = fields.get("scheme")
    if isinstance(scheme, dict):
        fields["scheme"] = Stencil(tuple(scheme["nodes"]), tuple(scheme["weights"]), scheme["order"])
    return kind(**fields)


READ: dict[str, Callable[[Any], Any]] = {
    "solver": lambda record: _made(record, SOLVERS),
    "estimator": lambda record: _made(record, ESTIMATORS),
    "adapt_only": lambda record: record,
}
"""How what is written of a setting, and may be left out, becomes the setting."""
