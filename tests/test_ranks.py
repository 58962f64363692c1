"""Many processes that share the tasks of a meta-step find what one process finds."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset

import metanudge as mn
from metanudge.cli import main
from metanudge.files import load_state
from metanudge.ranks import ALONE, Ranks, joined
from metanudge.sharding import whole
from processes import example, group, spawned

DOUBLE = torch.float64
ENDLESS = mn.tasks.episodes(mn.tasks.sinusoid, shots=4, queries=4, dtype=DOUBLE)
PART = {0: slice(0, 3), 1: slice(3, 5)}
"""Of five tasks."""
STEPS: dict[str, dict[str, Any]] = {
    "vectorized": {},
    "chunks": {"chunk_size": 2},
    "in_place": {"execution": "in_place", "solver": mn.Nesterov(5)},
    "shared_body": {"adapt_only": "3", "estimator": mn.FOBMAML(nudge="full", nu=0.1)},
    "maml": {"estimator": mn.MAML(), "solver": mn.GradientDescent(3, lr=0.01)},
    "dropout": {"execution": "in_place", "solver": mn.Nesterov(5)},
}


def network(name: str = "") -> nn.Module:
    torch.manual_seed(1)
    between = nn.Dropout(0.3) if name == "dropout" else nn.Identity()
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), between, nn.Linear(8, 1)).to(DOUBLE)


def odd_network(rank: int) -> nn.Module:
    """Another one on every rank."""
    model = network()
    with torch.no_grad():
        model[0].weight += rank
    return model


def five() -> mn.Tasks:
    return mn.tasks.sinusoid(5, shots=4, queries=4, dtype=DOUBLE)


def cut(tasks: mn.Tasks, part: slice) -> mn.Tasks:
    return mn.Tasks(*(mn.Batch(*(leaf[part] for leaf in batch)) for batch in tasks))


def stepped(name: str, tasks: mn.Tasks | list[mn.Tasks], group: Any = None) -> tuple[tuple[float, ...], Tensor]:
    """What a step reports, and leaves in ``.grad``."""
    model = network(name)
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, process_group=group, **STEPS.get(name, {}))
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        step = learner.backward(tasks)
    gradient = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
    return step[:-1], gradient, step.query_losses


class Broken(Dataset):
    """Tasks of which some, by index, hold a NaN."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __getitem__(self, index: int) -> mn.Tasks:
        task = ENDLESS[index]
        if index in self.broken:
            task.support.inputs[0] = math.nan
        return task


def told(act: Any) -> str:
    """The error that ``act`` raises, or what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            act()
        except mn.MetanudgeError as error:
            return f"{type(error).__name__}: {error}"
    return " ".join(str(warning.message) for warning in caught if warning.category is mn.NonFiniteWarning)


class Anew(Dataset):
    """Tasks that are others at every look."""

    def __getitem__(self, index: int) -> mn.Tasks:
        return mn.Tasks(*(mn.Batch(torch.randn(4, 1, dtype=DOUBLE), torch.randn(4, 1, dtype=DOUBLE)) for _ in "sq"))


def starved(rank: int, group: Any) -> None:
    """Unsolved problems, and the first rank loses all of its own."""
    learner = mn.MetaLearner(network(), mn.metrics.squared_error, prox=0.01, solver=mn.Nesterov(2), process_group=group)
    step = learner.backward([Broken(0, 1)[2 * rank + place] for place in range(2)])
    assert step.dropped_tasks == 2
    assert step.residual > 0.3


def trained(
    steps: int,
    group: Any = None,
    out: Path | None = None,
    tasks: Any = ENDLESS,
    model: nn.Module | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A training of two meta-steps of five tasks each between validations."""
    model = network() if model is None else model
    learner = mn.MetaLearner(model, mn.metrics.squared_error, prox=2.0, process_group=group)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    settings = {"tasks_per_step": 5, "validation": cut(five(), slice(0, 5)), "every": 2, "progress": False} | more
    fitted = mn.fit(learner, optimizer, tasks, steps=steps, out=out, **settings)
    return {
        "history": [tuple(record._replace(seconds=0.0)) for record in fitted.history],
        "values": fitted.validation.values,
        "parameters": torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]),
        "best": fitted.best,
        "files": sorted(path.name for path in out.iterdir()) if out else [],
    }


def refusals(rank: int, group: Any, folder: Path) -> dict[str, str]:
    """What ranks are told."""

    def learner(model: nn.Module, **settings: Any) -> mn.MetaLearner:
        return mn.MetaLearner(model, mn.metrics.squared_error, process_group=group, **settings)

    def failing() -> None:
        model = network()

        def loss(model: nn.Module, batch: mn.Batch) -> Any:
            return 0.0 if rank else mn.metrics.squared_error(model, batch)

        try:
            mn.MetaLearner(model, loss, process_group=group).backward(cut(five(), PART[rank]))
        finally:
            assert all(parameter.grad is None for parameter in model.parameters())

    def elsewhere() -> None:
        model = network()
        (folder / f"place-{rank}").mkdir()
        os.chdir(folder / f"place-{rank}")  # where a name is another place on every rank
        if rank == 0:
            with pytest.warns(UserWarning, match="process_group"):
                trained(2, None, Path("own"))
        try:
            trained(4, group, Path("own"), model=model)
        finally:
            assert all(map(torch.equal, model.parameters(), network().parameters()))

    def warmed_later() -> None:
        later = learner(network())
        later.warm_start = mn.WarmStart()
        later.backward(five(), range(5))

    return {
        "odd": told(lambda: learner(odd_network(rank)).backward(five())),
        "sharded": told(lambda: learner(fully_shard(network())).backward(five())),  # over the same ranks
        "anew": told(lambda: trained(1, group, tasks=Anew())),
        "every": told(lambda: trained(2, group, every=1 + rank)),
        "seed": told(lambda: trained(2, group, seed=2**40 + rank)),
        "unsolved": told(lambda: starved(rank, group)),
        "none": told(lambda: stepped("vectorized", [] if rank else five(), group)),
        "loss": told(failing),
        "out": told(lambda: trained(2, group, folder / f"out-{rank}")),
        "warm": told(lambda: learner(network(), warm_start=mn.WarmStart())),
        "warmed later": told(warmed_later),
        "few": told(lambda: trained(1, group, tasks_per_step=1)),
        "elsewhere": told(elsewhere),
        "nan": told(lambda: stepped("vectorized", [Broken(0, 1)[3 * rank + i] for i in range(2)], group)),
        "all nan": told(lambda: stepped("vectorized", [Broken(0, 1, 3, 4)[3 * rank + i] for i in range(2)], group)),
    }


def drifting(rank: int) -> Any:
    """A metric that stays on the first rank, and on the other falls from call to call, as by round-off."""
    calls = [0]

    def metric(model: nn.Module, batch: mn.Batch) -> Tensor:
        calls[0] += 1
        return torch.ones(()) - 1e-6 * rank * calls[0]

    return metric


def worker(rank: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"example": example("many_processes", steps=5)}
    with group(folder) as everyone:
        return results | shared(rank, everyone, folder)


def shared(rank: int, group: Any, out: Path) -> dict[str, Any]:
    """What two ranks find, and are told."""
    results: dict[str, Any] = {name: stepped(name, cut(five(), PART[rank]), group) for name in STEPS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.NonFiniteWarning)
        results["dropped"] = stepped("dropped", [Broken(1, 4)[index] for index in range(5)[PART[rank]]], group)
    if rank == 0:
        with pytest.warns(UserWarning, match="process_group"):
            trained(2, None, out / "alone")
    distributed.barrier()
    results["whole"] = trained(5, group, out / "whole")
    trained(2, group, out / "killed")
    results["resumed"] = trained(5, group, out / "killed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(4, group, out / "alone")  # which one process began
    results["others"] = " ".join(str(warning.message) for warning in caught)
    learner = mn.load_pretrained(
        out / "whole" / "best", odd_network(rank), mn.metrics.squared_error, process_group=group
    )
    results["loaded"] = learner.backward(cut(five(), PART[rank]))
    results["few validation tasks"] = trained(2, group, validation=cut(five(), slice(0, 1)))["values"]
    early = {"patience": 2, "restore_best": True, "metric": drifting(rank), "better": "smaller"}
    results["early"] = trained(20, group, validation=cut(five(), slice(0, 1)), **early)
    results["refusals"] = refusals(rank, group, out)
    return results


def sharded_worker(rank: int, folder: Path) -> tuple[tuple[float, ...], Tensor]:
    """Two rows of two: the rows divide the tasks, the ranks of a row the examples and the model."""
    with group(folder):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "shards"))
        row, place = divmod(rank, 2)
        model = network().float()
        fully_shard(model[0], mesh=mesh["shards"])
        fully_shard(model, mesh=mesh["shards"])
        learner = mn.MetaLearner(model, mn.metrics.squared_error, process_group=mesh["tasks"].get_group())
        with pytest.raises(mn.SettingsError, match=r"torch\.distributed\.checkpoint"):
            mn.fit(learner, torch.optim.SGD(model.parameters(), lr=0.1), ENDLESS, steps=1, out=folder / "out")
        part = slice(2 * place, 2 * place + 2)
        tasks = mn.Tasks(*(mn.Batch(*(leaf[:, part].float() for leaf in batch)) for batch in cut(five(), PART[row])))
        return lean_step(model, tasks, mesh["tasks"].get_group())


def lean_step(model: nn.Module, tasks: mn.Tasks, group: Any = None) -> tuple[tuple[float, ...], Tensor]:
    learner = mn.MetaLearner(
        model,
        mn.metrics.squared_error,
        prox=2.0,
        solver=mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.05), steps=3),
        estimator=mn.FOBMAML(nudge="full", nu=0.3, start="initialization", certify=False),
        execution="in_place",
        process_group=group,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        step = learner.backward(tasks)
    return step[:-1], torch.cat([whole(parameter.grad).reshape(-1) for parameter in model.parameters()])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawned(worker, 2, tmp_path_factory.mktemp("ranks"))


def test_rows_of_ranks_that_share_a_model(tmp_path: Path) -> None:
    one = lean_step(network().float(), mn.Tasks(*(mn.Batch(*(leaf.float() for leaf in batch)) for batch in five())))
    for found in spawned(sharded_worker, 4, tmp_path):
        assert float((found[1] - one[1]).norm() / one[1].norm()) < 1e-6
        assert found[0] == pytest.approx(one[0], rel=1e-5, nan_ok=True)


def same(found: tuple[tuple[float, ...], Tensor], one: tuple[tuple[float, ...], Tensor], rtol: float) -> None:
    torch.testing.assert_close(found[1], one[1], rtol=rtol, atol=rtol * float(one[1].norm()))
    assert found[0] == pytest.approx(one[0], rel=max(rtol, 1e-7), nan_ok=True)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_find_what_one_finds(name: str, ranks: list[dict[str, Any]]) -> None:
    one = stepped(name, five())
    for rank in ranks:
        same(rank[name], one, 1e-9)  # the finite difference divides round-off by its width
    assert torch.equal(ranks[0][name][1], ranks[1][name][1])
    assert ranks[0][name][0] == pytest.approx(ranks[1][name][0], rel=0, nan_ok=True)
    if name != "dropout":  # which draws by the order of a task's stack
        assert [*ranks[0][name][2], *ranks[1][name][2]] == pytest.approx(one[2], rel=1e-7)


@pytest.mark.filterwarnings("ignore::metanudge.errors.NonFiniteWarning")
def test_the_mean_is_over_the_tasks_that_were_kept(ranks: list[dict[str, Any]]) -> None:
    """Two of three on one rank and one of two on the other: each of the three counts a third."""
    one = stepped("dropped", [Broken(1, 4)[index] for index in range(5)])
    assert one[0][mn.MetaStep._fields.index("dropped_tasks")] == 2
    for rank in ranks:
        same(rank["dropped"], one, 1e-9)


def test_a_training_is_that_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    one = trained(5, out=tmp_path / "one")
    for found in (rank["whole"] for rank in ranks):
        torch.testing.assert_close(found["parameters"], one["parameters"], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found["values"], one["values"], rtol=1e-6, atol=1e-8)
        for now, then in zip(found["history"], one["history"], strict=True):
            assert now == pytest.approx(then, rel=1e-6, nan_ok=True)
        assert found["best"] == pytest.approx(one["best"], rel=1e-6)
    assert ranks[0]["whole"]["files"] == one["files"] == ["best", "last.pt", "log.csv", "log.jsonl"]


def test_a_training_of_many_goes_on_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert torch.equal(rank["resumed"]["parameters"], rank["whole"]["parameters"])
        assert [str(record) for record in rank["resumed"]["history"]] == [
            str(record) for record in rank["whole"]["history"]
        ]
    assert torch.equal(ranks[0]["whole"]["parameters"], ranks[1]["whole"]["parameters"])


def test_what_many_may_go_on_with(ranks: list[dict[str, Any]]) -> None:
    """A training of one process, with a warning; weights that each loads into a model of its own."""
    for rank in ranks:
        assert "goes on with processes = 2 where it had 1" in rank["others"]
        assert rank["loaded"].dropped_tasks == 0


def test_fewer_validation_tasks_than_ranks(ranks: list[dict[str, Any]]) -> None:
    one = trained(2, validation=cut(five(), slice(0, 1)))["values"]
    for rank in ranks:
        torch.testing.assert_close(rank["few validation tasks"], one, rtol=1e-6, atol=1e-8)


def test_ranks_end_early_together_and_with_the_same_weights(ranks: list[dict[str, Any]]) -> None:
    assert [len(rank["early"]["history"]) for rank in ranks] == [4, 4]
    assert torch.equal(ranks[0]["early"]["parameters"], ranks[1]["early"]["parameters"])


def test_what_ranks_are_told(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["refusals"]
        assert "SettingsError: the ranks of process_group hold different parameters" in found["odd"]
        assert 'mesh["tasks"].get_group()' in found["sharded"]
        assert "SettingsError: the tasks are drawn anew at every look" in found["anew"]
        assert re.search(r"do not agree on every; here every = [12]$", found["every"])
        assert "do not agree on seed" in found["seed"]
        for when in ("warm", "warmed later"):
            assert "SettingsError: warm_start keeps" in found[when]
        assert "SettingsError: 2 ranks share the tasks of a meta-step, and there are 1" in found["few"]
        assert "do not agree on out; here out =" in found["out"]
        assert "do not agree on the digest of own/last.pt, which all have to see" in found["elsewhere"]
        assert "NonFiniteError: none of the 4 tasks" in found["all nan"]
    first, second = (rank["refusals"]["nan"] for rank in ranks)
    assert "2 of 2 tasks" in first
    assert "2 of 2 tasks" in ranks[0]["refusals"]["unsolved"]
    assert ranks[1]["refusals"]["unsolved"] == ""
    assert second == ""  # whose tasks are whole
    for name, own in (("none", "TasksError: the list of tasks is empty"), ("loss", "LossError: the loss")):
        assert own in ranks[1]["refusals"][name]
        assert "MetanudgeError: rank 1 failed in this step" in ranks[0]["refusals"][name]


def test_the_example_trains(ranks: list[dict[str, Any]]) -> None:
    before, after = ranks[0]["example"]
    assert after < before
    assert ranks[1]["example"] == ranks[0]["example"]


def test_a_group_by_name_is_refused() -> None:
    with pytest.raises(mn.SettingsError, match=r"torch.distributed.ProcessGroup.*group.WORLD"):
        mn.MetaLearner(network(), mn.metrics.squared_error, process_group="world")  # type: ignore[arg-type]


@pytest.mark.parametrize(("number", "size"), [(5, 2), (7, 3), (3, 3), (2, 3), (25, 8)])
def test_the_parts_make_the_whole(number: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "size", size)
    found: list[int] = []
    sizes = []
    for rank in range(size):
        monkeypatch.setattr(Ranks, "rank", rank)
        part = ALONE.part(number)
        found += part
        sizes.append(len(part))
    assert found == list(range(number))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "there are 0 here for at least 2"), ("cuda:0", 'give "cuda"')], ids=["few", "one"]
)
def test_devices_that_processes_can_not_share(device: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metanudge.ranks.processes", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(mn.SettingsError, match=words), joined(device):
        pass
    assert not distributed.is_initialized()


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_ranks_of_a_command_reach_its_devices(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts on the CPU, and sums on the model's device."""
    asked = []
    monkeypatch.setattr("metanudge.ranks.processes", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend=None: asked.append(backend))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with joined(device):
        pass
    assert asked == [backend]


def test_processes_that_do_not_know_of_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metanudge.ranks.processes", lambda: 4)
    with pytest.warns(UserWarning, match=r"are 4 processes.*process_group=torch\.distributed\.group\.WORLD") as caught:
        trained(2)
    assert len(caught) == 1


SETTINGS = """
seeds = [0, 1]
[tasks]
name = "sinusoid"
shots = 4
queries = 4
[model]
name = "mlp"
inputs = 1
outputs = 1
hidden = [6]
[learner]
loss = "squared_error"
[solver]
name = "nesterov"
steps = 3
[training]
steps = 4
tasks_per_step = 3
every = 2
[validation]
tasks = 5
"""


def test_the_command_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.toml"
    config.write_text(f'dtype = "float64"\n{SETTINGS}')
    given = {name: ["train", str(config), "--out", str(tmp_path / name), "--quiet"] for name in ("one", "two")}
    assert main(given["one"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "metanudge", *given["two"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = [capsys.readouterr().out, done.stdout]
    assert said[0].count("seed 0: 4 steps") == said[1].count("seed 0: 4 steps") == 1  # one of the two speaks
    for seed in (0, 1):
        one, two = (load_state(tmp_path / name / f"seed-{seed}" / "last.pt")["model"] for name in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-9)
    assert main(["evaluate", str(tmp_path / "two"), "--tasks", "5"]) == 0
