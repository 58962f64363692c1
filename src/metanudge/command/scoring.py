"""What ``metanudge evaluate`` does: all seeds of a training on test tasks, after every adaptation step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from metanudge.accumulation import summarize
from metanudge.command.config import Config, Training, read_config
from metanudge.command.runs import CONFIG, check_settings, device_of, first, learner_of, seeds_of, tasks_of, trained
from metanudge.errors import SettingsError
from metanudge.files import load_state, write
from metanudge.metrics import metric_name
from metanudge.pretrained import load_weights
from metanudge.settings import check_steps
from metanudge.tasks.episodes import collate
from metanudge.training.checkpoint import BEST, LAST, how_far, waited
from metanudge.training.order import moved
from metanudge.types import Evaluation, Tasks

RESULT = "evaluation.json"
FEW_TASKS, FEW_SEEDS, LABEL_PERMUTATIONS = 600, 3, 4
Weights = Literal["best", "last"]


def evaluate(
    target: Path,
    number: int | None,
    permutations: int | None,
    weights: Weights,
    console: Console,
    *,
    partial: bool = False,
) -> dict[str, Any]:
    """Adapt every seed's model to the same test tasks; print a table and write OUT/evaluation.json (see ``file_name``).

    Args:
        target: A folder that ``train`` left, or its settings file.
        number: Test tasks; None for what the settings say, 600 if nothing.
        permutations: Of the class labels; None for what the settings say.
        weights: Those that were best on the validation tasks (the last ones, where there were none), or the last.
        console: To print to.
        partial: Take what there is, where seeds are missing or not at their last step; where some are, the file's name
            says so.

    Returns:
        What was written.

    Raises:
        SettingsError: Nothing there to evaluate; a settings file that is not the training's; seeds missing or
            unfinished, unless ``partial``; best weights that are gone.
    """
    config = read_config(target / CONFIG, target) if target.is_dir() else read_config(target)
    if (config.out / CONFIG).is_file():
        check_settings(
            config,
            config.out / CONFIG,
            f"evaluate that training (metanudge evaluate {config.out}), or train with these into another folder",
            free=("device",),
        )
    for name, value in (("tasks", number), ("permutations", permutations)):
        if value is not None:
            check_steps(value, name)
    folders = _folders(config.out)
    asked = seeds_of(config.out) or config.whole.seeds
    lacking = _lacking(config.training, asked, folders)
    if lacking and not partial:
        named = "" if set(asked) == set(config.whole.seeds) else f" --seeds {' '.join(map(str, asked))}"
        raise SettingsError(
            f"the training in {config.out} is not complete: {lacking}. Go on with metanudge train "
            f"{config.out / CONFIG} --out {config.out}{named}, or evaluate what there is with --partial"
        )
    gone = [folder / BEST for folder in folders.values() if not (folder / BEST).is_dir()]
    if weights == "best" and gone and config.validation.tasks > 0:
        raise SettingsError(
            f"there is no {gone[0]}, where train left the weights that validation tasks prefer; evaluate the last ones "
            "with --weights last"
        )
    tasks = first(tasks_of(config, "test"), number or config.testing.tasks)
    asked_permutations = permutations is not None
    arbitrary = getattr(tasks.dataset, "arbitrary_labels", False) and _labelled(tasks[0])
    permutations = permutations or config.testing.permutations or (LABEL_PERMUTATIONS if arbitrary else 1)
    found: dict[int, Evaluation] = {}
    for seed, folder in folders.items():
        with console.status(f"seed {seed}: adapting to {len(tasks)} tasks"):
            found[seed] = _evaluated(config, folder, tasks, permutations, weights)
    whole = summarize(torch.stack([one.values for one in found.values()]).mean(0), metric_name(config.metric))
    means = torch.tensor([one.mean for one in found.values()], dtype=torch.float64, device="cpu")
    record = {
        "metric": whole.metric,
        "tasks": len(tasks),
        "permutations": permutations,
        "weights": weights,
        **_numbers(whole),
        "std_over_seeds": float(means.std()) if len(means) > 1 else math.nan,
        "seeds": {str(seed): _numbers(one) | {"scores": one.values[:, -1].tolist()} for seed, one in found.items()},
    }
    asked_for = number, permutations if asked_permutations else None, weights
    path = config.out / file_name(config, *asked_for, partial=bool(lacking))
    write(path, json.dumps(_json(record), indent=1).encode() + b"\n")
    _show(record, whole, found, console)
    if number is not None and len(tasks) < number:
        console.print(
            f"{number} test tasks were asked for, and there are {len(tasks)}.", style="yellow", highlight=False
        )
    if lacking:
        console.print(f"Not complete: {lacking}.", style="yellow", highlight=False, soft_wrap=True)
    console.print(f"Written to [bold]{path}[/bold]", highlight=False)
    return record


def file_name(
    config: Config, number: int | None, permutations: int | None, weights: Weights, *, partial: bool = False
) -> str:
    """The file of an evaluation: what sets it apart from that of the settings is in its name; so it replaces no other.

    ``partial`` says that seeds were missing or unfinished.
    """
    name = RESULT.removesuffix(".json")
    if number not in (None, config.testing.tasks):
        name += f"-{number}-tasks"
    if permutations not in (None, config.testing.permutations):
        name += f"-{permutations}-permutations"
    return f"{name}{'-last' if weights == 'last' else ''}{'-partial' if partial else ''}.json"


def _folders(out: Path) -> dict[int, Path]:
    """The trainings in ``out``, by seed."""
    found = {seed: out / f"seed-{seed}" for seed in trained(out)}
    if not found:
        raise SettingsError(f"there is no training in {out}: no seed-N/{LAST}; metanudge train makes them")
    return found


def _lacking(training: Training, asked: Sequence[int], folders: dict[int, Path]) -> str:
    """Which seeds that were asked for are missing, and which are not where the settings end; empty for none."""
    told = [f"seed {seed} is missing" for seed in asked if seed not in folders]
    for seed, folder in folders.items():
        done, best_step = how_far(folder / LAST)
        if done < training.steps and not waited(done, best_step, training.patience):
            told.append(f"seed {seed} is at step {done} of {training.steps}")
        elif done > training.steps:
            told.append(f"seed {seed} is at step {done}, beyond the {training.steps} of the settings")
    return ", ".join(told)


def _evaluated(config: Config, folder: Path, tasks: Subset[Tasks], permutations: int, weights: Weights) -> Evaluation:
    """One training on the tasks, without dropout."""
    torch.manual_seed(0)
    learner = learner_of(config)
    if weights == "best" and (folder / BEST).is_dir():
        load_weights(learner.model, folder / BEST)
    else:
        try:
            learner.model.load_state_dict(load_state(folder / LAST)["model"])
        except (KeyError, RuntimeError) as error:
            raise SettingsError(f"{folder / LAST} is of another model: {error}") from error
    learner.model.eval()
    size, device = config.training.tasks_per_step, device_of(config)
    loader: Any = DataLoader(tasks, batch_size=size, collate_fn=collate)
    return learner.evaluate((moved(batch, device) for batch in loader), config.metric, permutations=permutations)


def _labelled(task: Tasks) -> bool:
    """Whether targets are class labels."""
    targets = task.query.targets
    return isinstance(targets, torch.Tensor) and targets.ndim == 1 and targets.dtype == torch.int64


def _numbers(found: Evaluation) -> dict[str, Any]:
    curves = {"curve": found.curve.tolist(), "curve_ci95": found.curve_ci95.tolist()}
    return {"mean": found.mean, "ci95": found.ci95, **curves}


def _json(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _json(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_json(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show(record: dict[str, Any], whole: Evaluation, found: dict[int, Evaluation], console: Console) -> None:
    table = Table(title=record["metric"])
    for name in ("step", *(f"seed {seed}" for seed in found), "mean"):
        table.add_column(name, no_wrap=True)
    last = len(whole.curve) - 1
    for step in _steps(last):
        cells = [f"{one.curve[step]:.4g} ± {one.curve_ci95[step]:.2g}" for one in found.values()]
        table.add_row(str(step), *cells, f"{whole.curve[step]:.4g} ± {whole.curve_ci95[step]:.2g}")
    console.print(table)
    told = f"{record['metric']} {whole.mean:.4g} ± {whole.ci95:.2g} (95 % interval over {record['tasks']} tasks)"
    if len(found) > 1:
        told += f", standard deviation over {len(found)} seeds {record['std_over_seeds']:.2g}"
    if record["permutations"] > 1:
        told += f", mean over {record['permutations']} label permutations of every task"
    console.print(told, highlight=False, soft_wrap=True)
    for what, number, enough in (("tasks", record["tasks"], FEW_TASKS), ("seeds", len(found), FEW_SEEDS)):
        if number < enough:
            few = f"Only {number} {what if number > 1 else what.removesuffix('s')}; report at least {enough}."
            console.print(few, style="yellow", highlight=False)


def _steps(last: int) -> list[int]:
    """All steps of a short adaptation, some of a long one."""
    if last <= 20:
        return list(range(last + 1))
    return sorted({round(last ** (place / 12)) for place in range(13)} | {0, last})
