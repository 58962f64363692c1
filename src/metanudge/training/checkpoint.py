"""What a training is at a moment, written down and taken up again."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from metanudge.errors import SettingsError
from metanudge.files import load_state, save_state
from metanudge.learner import MetaLearner
from metanudge.training.logs import Record
from metanudge.types import Role
from metanudge.warned import warn

LAST, BEST = "last.pt", "best"
ROUNDED = ("execution", "compile", "cuda_graphs", "chunk_size", "microbatch", "processes")
"""Settings that change a step by round-off alone, and with dropout in train mode by other draws: a training that ran
out of memory may go on with others."""
FEW = 1000
"""Numbers of a tensor that tell one model from another."""
NUMBERS = ("best", "best_step", "evaluations", "skipped", "in_a_row", "seconds")


class Run:
    """A training: its parts and how far it is.

    Attributes:
        protocol: Settings that a checkpoint must share with the training that goes on from it.
        settings: Of learner, optimizer and ``fit``, likewise; of functions their names.
        code: Of the losses, in words: a digest of their source.
        begun: What the model was when the training began, as ``told_apart`` tells it; "" where nothing is kept.
        kept: The same of the model at its best.
        history: A record a meta-step.
        best: Best mean of the metric; NaN before the first validation.
        best_step: Meta-step it was taken at.
        evaluations: Gradient evaluations in all.
        skipped: Meta-steps without one finite task.
        in_a_row: Of those, the last ones without another between.
        seconds: Time spent.
    """

    def __init__(
        self,
        learner: MetaLearner,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler | None,
        protocol: dict[str, int],
        more: dict[str, Any],
    ) -> None:
        self.learner, self.optimizer, self.scheduler, self.protocol = learner, optimizer, scheduler, protocol
        self.settings = settings_of(learner, optimizer) | settings_of_scheduler(scheduler) | more
        support, query = (learner.losses[role] for role in Role)
        losses = {"loss": support} | ({} if query is support else {"query loss": query})
        self.code = {f"the {kind}, {qualified_name(loss)},": code_of(loss) for kind, loss in losses.items()}
        self.begun = self.kept = ""
        self.history: list[Record] = []
        self.best, self.best_step = math.nan, 0
        self.evaluations = self.skipped = self.in_a_row = 0
        self.seconds = 0.0

    def save(self, path: Path) -> None:
        """Write everything."""
        warm, scheduler = self.learner.warm_start, self.scheduler
        save_state(
            path,
            {
                "protocol": self.protocol,
                "settings": self.settings,
                "code": self.code,
                "begun": self.begun,
                "kept": self.kept,
                "model": self.learner.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "warm_start": None if warm is None else warm.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "history": [tuple(record) for record in self.history],
                "numbers": {name: getattr(self, name) for name in NUMBERS},
            },
        )

    def load(self, path: Path, steps: int) -> None:
        """Go back to what was written, to take ``steps`` in all; nothing is changed where it does not fit."""
        state = load_state(path)
        parts = {"scheduler": self.scheduler, "warm_start": self.learner.warm_start}
        try:
            if state["protocol"] != self.protocol:
                odd = [name for name, value in self.protocol.items() if state["protocol"].get(name) != value]
                before, now = ({name: one.get(name) for name in odd} for one in (state["protocol"], self.protocol))
                raise SettingsError(
                    f"{path} is of a training with {before}, this one has {now}; give the same, another folder, or "
                    "resume=False"
                )
            settings = state.get("settings", {})  # of older versions there are none, or not all
            settings = settings and {"sharpness_radius": 0.0} | settings
            check_settings(path, settings, self.settings)
            check_done(path, len(state["history"]), steps, "resume=False")
            for name, part in parts.items():
                if (state[name] is None) != (part is None):
                    there = "without" if state[name] is None else "with"
                    raise SettingsError(f"{path} is of a training {there} a {name}; give the same, or another folder")
            own = self.learner.model.state_dict()
            if {name: value.shape for name, value in own.items()} != {
                name: value.shape for name, value in state["model"].items()
            }:
                raise SettingsError(f"{path} is of a training of another model; give another folder, or resume=False")
            tell_rounded(path, settings, self.settings)
            tell_rewritten(path, state.get("code", {}), self.code)
            # what older versions did not write down cannot differ
            begun, kept = state.get("begun", self.begun), state.get("kept", self.begun)
            if self.begun not in (begun, kept, told_apart(state["model"])):
                tell_replaced(path, len(state["history"]))
            self.begun, self.kept = begun, kept
            before = self.optimizer.state_dict()
            self.optimizer.load_state_dict(state["optimizer"])
            try:  # what may refuse comes before what does not
                if self.learner.warm_start is not None:
                    self.learner.warm_start.load_state_dict(state["warm_start"])
            except SettingsError:
                self.optimizer.load_state_dict(before)
                raise
            self.learner.model.load_state_dict(state["model"])
            if self.scheduler is not None:
                self.scheduler.load_state_dict(state["scheduler"])
            self.history = [Record(*values) for values in state["history"]]
            for name in NUMBERS:
                setattr(self, name, state["numbers"][name])
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"{path} is no checkpoint of this training: {error}") from error
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def settings_of(learner: MetaLearner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a step depends on, to the last bit, as far as it can be written down; of functions their names."""
    adapt_only, execution = learner.adapt_only, learner.execution
    found: dict[str, Any] = {
        "prox": learner.prox,
        "sharpness_radius": learner.sharpness_radius,
        "solver": _described(learner.solver),
        "estimator": _described(learner.estimator),
        "batch_norm": learner.norm.policy,
        "loss": qualified_name(learner.losses[Role.SUPPORT]),
        "query_loss": qualified_name(learner.losses[Role.QUERY]),
        "execution": execution.name,
        "compile": learner.compile,
        "cuda_graphs": learner.cuda_graphs,
        "optimizer": type(optimizer).__name__,
    }
    for size in ("chunk_size", "microbatch"):
        if hasattr(execution, size):
            found[size] = getattr(execution, size)
    if callable(adapt_only):
        found["adapt_only"] = qualified_name(adapt_only)
    else:
        found["adapt_only"] = [adapt_only] if isinstance(adapt_only, str) else adapt_only and list(adapt_only)
    for name, value in getattr(optimizer, "defaults", {}).items():
        if name != "lr" and (number := _numbers(value)) is not None:
            found[f"optimizer's {name}"] = number
    # a scheduler moves "lr" and leaves the first one in "initial_lr"
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups if "lr" in group]
    return found | {"optimizer's lr": rates[0] if len(set(rates)) == 1 else rates}


def settings_of_scheduler(scheduler: LRScheduler | None, name: str = "scheduler") -> dict[str, Any]:
    """Its type, and the numbers it was made with, as far as it keeps them under their names; none for no scheduler."""
    if scheduler is None:
        return {}
    found: dict[str, Any] = {name: type(scheduler).__name__}
    for argument in inspect.signature(type(scheduler)).parameters:
        if argument == "last_epoch":  # where it begins; the attribute says how far it is
            continue
        value = getattr(scheduler, argument, getattr(scheduler, f"_{argument}", None))
        if isinstance(value, Counter):
            value = sorted(value.elements())
        if argument == "schedulers" and isinstance(value, list | tuple):
            for place, part in enumerate(value):
                found |= settings_of_scheduler(part, f"{name} {place}")
        elif (number := _numbers(value)) is not None:
            found[f"{name}'s {argument}"] = number
    return found


def qualified_name(function: Any) -> str:
    """Of a function, as it is known in its file; of a partial call, that of its function; else of the object's type."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def code_of(function: Any) -> str:
    """A digest of a function's source as Python reads it, without texts on itself; "" where there is none to be had."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        read = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, ValueError, SyntaxError):  # of an interpreter, of C, or a lambda within a call
        return ""
    for node in ast.walk(read):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(read).encode()).hexdigest()[:12]


def _described(part: Any) -> str:
    """A solver or estimator without its functions, whose names and addresses say nothing."""
    name = type(part).__name__
    if dataclasses.is_dataclass(part):
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items() if not callable(value))})"
    return name if " at 0x" in repr(part) else repr(part)


def _numbers(value: Any) -> float | list[float] | None:
    """A number or several; None for anything else, flags included."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, tuple | list) and all(isinstance(one, int | float) for one in value):
        return [float(one) for one in value]
    return None


def check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise a SettingsError where a setting that decides what is computed is known of both and not the same."""
    for name, value in before.items():
        if name not in ROUNDED and name in now and now[name] != value:
            raise SettingsError(
                f"{path} is of a training with {name} = {value}, this one has {now[name]}; give the same, another "
                "folder, or resume=False to begin anew"
            )


def tell_rounded(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Warn of settings known of both that are not the same, where it is of those that ``ROUNDED`` names."""
    if found := [
        f"{name} = {now[name]} where it had {before[name]}"
        for name in ROUNDED
        if name in before and name in now and now[name] != before[name]
    ]:
        warn(
            f"the training of {path} goes on with {', '.join(found)}: the same mathematics, but not bit for bit what "
            "it would have been, and with dropout in train mode other draws",
            UserWarning,
        )


def tell_rewritten(path: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Warn of functions known of both that are not written alike."""
    for name, digest in now.items():
        if digest and before.get(name, "") not in ("", digest):
            warn(
                f"{name} was written differently when the training of {path} took its last step, which it goes on from "
                "as it is: what was done is of the former one. Begin anew with resume=False, or in another folder",
                UserWarning,
            )


def tell_replaced(path: Path, done: int) -> None:
    """Warn of a model that did not begin as that of the training it is to go on with."""
    warn(
        f"{path} is of a training that began with other parameters than this model has: they are replaced by those "
        f"after its {done} steps. Another training, with another seed say, needs a folder of its own, or resume=False",
        UserWarning,
    )


def told_apart(state: dict[str, Any]) -> str:
    """A digest of a model: of the first numbers of each tensor, as large ones would take long."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            some = value.detach().flatten()[:FEW].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def check_done(path: Path, done: int, steps: int, anew: str) -> None:
    """Raise a SettingsError where a training is further than it is asked to go."""
    if done > steps:
        raise SettingsError(
            f"{path} is of a training that has done {done} steps, more than the {steps} asked for; ask for {done} or "
            f"more, give another folder, or begin anew with {anew}"
        )


def waited(done: int, best_step: int, patience: int | None) -> bool:
    """Whether, after ``done`` meta-steps, the best validation is ``patience`` steps ago; never where that is None."""
    return patience is not None and 0 < best_step <= done - patience


def how_far(path: Path) -> tuple[int, int]:
    """Meta-steps of the checkpoint at ``path``, and the one with the best validation.

    Raises:
        SettingsError: No checkpoint of a training.
    """
    try:
        state = load_state(path)
        return len(state["history"]), int(state["numbers"]["best_step"])
    except (KeyError, TypeError) as error:
        raise SettingsError(f"{path} is no checkpoint of a training: {error!r}") from error
