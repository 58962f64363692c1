"""The study of memory: what is measured is what is there, claims follow the numbers, and a tiny form runs."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import Pipe, get_context
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import metanudge as mn
from metanudge.experiments.memory import EXPERIMENT, channels, gpu, lora, places, steps, transformer
from metanudge.experiments.memory.candidates import CANDIDATES, ON_A_GPU, SECOND_ORDER, Inner
from metanudge.experiments.memory.claims import graphs_claims, memory_claim, time_claim
from metanudge.experiments.memory.measuring import Job, Measuring, live, resident_peak, seconds
from metanudge.experiments.memory.processes import RETURNING, end_with_parent, forked, nursery, tell
from metanudge.experiments.runner import reproduce

MIB = 2**20
FAST = Measuring(workers=1, repeats=1, budget=0.0, judged_budget=0.0)


def allocate(job: Job) -> tuple[int, int]:
    """Two blocks of ``job.steps`` MiB after each other, and one half as large beside the second; or an end."""
    if job.x == "killed":
        os._exit(9)

    def act() -> None:
        first = torch.ones(job.steps * MIB // 4)
        del first
        second = torch.ones(job.steps * MIB // 4)
        third = torch.ones(job.steps * MIB // 8)
        del second, third

    torch.ones(1000).sum()  # torch sets itself up
    return os.getpid(), resident_peak(act)[1]


def small(steps_: int = 1) -> Inner:
    return steps.network(4, 2, 16, 0)


def test_the_peak_of_a_process_is_what_it_holds_at_once_and_not_what_others_held():
    kept = os.environ.get("OMP_NUM_THREADS")
    jobs = [Job("plain", x, small, size) for x, size in (("large", 40), ("small", 10), ("killed", 7))]
    with nursery(1, ()) as nurses:
        (first, large), (second, less) = (nurses.submit(forked, allocate, RETURNING, job).result() for job in jobs[:2])
        with pytest.raises(mn.MetanudgeError, match=r"plain at killed with 7 inner steps .* ended with code 9"):
            nurses.submit(forked, allocate, RETURNING, jobs[2]).result()
    assert len({first, second, os.getpid()}) == 3
    assert large == pytest.approx(60 * MIB, abs=2 * MIB)
    assert less == pytest.approx(15 * MIB, abs=2 * MIB)
    assert os.environ.get("OMP_NUM_THREADS") == kept


def orphaned() -> None:
    os.getppid = lambda: 1
    end_with_parent()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes of their parent's end")
@pytest.mark.parametrize(("function", "code"), [(end_with_parent, 0), (orphaned, 1)])
def test_a_process_whose_parent_has_gone_already_ends(function, code):
    child = get_context("fork").Process(target=function)
    child.start()
    child.join(60)
    assert child.exitcode == code


def test_an_error_ends_what_is_being_measured():
    def stopped(nurses) -> None:
        nurses.submit(os.getpid).result()  # from here on there is a nurse
        measured.append(nurses.submit(time.sleep, 300))
        raise KeyboardInterrupt

    measured = []
    with pytest.raises(KeyboardInterrupt), nursery(1, ()) as nurses:
        stopped(nurses)
    assert isinstance(measured[0].exception(), BrokenProcessPool)


def test_an_error_of_a_measurement_is_told():
    def fail(job: Job) -> None:
        raise ValueError(f"no such {job.x}")

    receive, send = Pipe(duplex=False)
    tell(send, fail, {}, Job("plain", "thing", small, 1))
    assert receive.recv() == (None, "ValueError: no such thing")


def test_tensor_bytes_of_a_training_step():
    """One layer, n examples: the prediction, its error and gradient twice, and the parameters' gradient."""

    def linear() -> Inner:
        model = torch.nn.Linear(1, 1, bias=False)
        return Inner(model, lambda model, batch: model(batch.inputs).sum(), mn.tasks.sinusoid(1, shots=1000))

    peak, parameters = live(Job("plain", "x", linear, 1))
    assert parameters == 4
    assert 4000 <= peak <= 4000 + 100  # the prediction; the gradient of a sum is one number, expanded


def test_gradients_are_counted_and_timed():
    took = seconds(Job("fobmaml", "x", small, 3), FAST)
    assert took.gradients == 3 + 2 + 4 * 3
    assert took.estimate > 0
    assert took.over_loop > 0
    assert seconds(Job("plain", "x", small, 3), FAST).gradients == 1


@pytest.mark.parametrize("name", sorted(set(CANDIDATES) - ON_A_GPU))
def test_candidates_take_the_same_steps(name):
    """Of the same inner problem, wherever they run: the losses they report are those after the same solve."""
    inner = small()
    before = [leaf.clone() for leaf in inner.model.parameters()]
    CANDIDATES[name].prepare(inner, 4)()
    moved = not all(torch.equal(a, b) for a, b in zip(before, inner.model.parameters(), strict=True))
    assert moved == (name == "plain")
    assert all(leaf.grad is not None for leaf in inner.model.parameters())


@contextmanager
def this_process(workers, preload):
    """In the place of the nursery."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


TINY = {  # made where they are used: those of lora ask for their packages
    "steps": partial(
        steps.StepsSettings, steps=(1, 4), limits={"maml": 1}, compared=1, width=4, depth=2, examples=16, measuring=FAST
    ),
    "channels": partial(
        channels.ChannelsSettings, channels=(2, 3), blocks=1, size=4, shots=1, inner_steps=1, measuring=FAST
    ),
    "transformer": partial(
        transformer.TransformerSettings,
        depths=(1,),
        lengths=(4, 8),
        width=8,
        heads=2,
        sequences=2,
        vocabulary=5,
        inner_steps=1,
        measuring=FAST,
    ),
    "lora": partial(
        lora.LoraSettings,
        widths=(8,),
        layers=1,
        heads=2,
        rank=2,
        sequences=2,
        length=8,
        vocabulary=16,
        inner_steps=1,
        measuring=FAST,
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_studies(name, monkeypatch):
    if name == "lora":
        pytest.importorskip("peft")
    monkeypatch.setattr("metanudge.experiments.memory.measuring.nursery", this_process)
    monkeypatch.setattr("metanudge.experiments.memory.measuring.forked", lambda function, allocator, job: function(job))
    chosen = set(CANDIDATES) - ON_A_GPU if name == "steps" else {"plain", "fobmaml", "maml"}
    if name != "steps":
        monkeypatch.setattr(f"metanudge.experiments.memory.{name}.EVERYWHERE", tuple(chosen))
    shares: list[float] = []
    study = EXPERIMENT.studies[name].run(TINY[name](), shares.append)
    assert study.name == name
    assert set(study.figures) == {name}
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    quantities = {"baseline_bytes", "peak_bytes", "live_bytes", "parameter_bytes"}
    quantities |= {"seconds", "seconds_over_loop", "gradients"}
    assert quantities == set(study.metrics)
    for quantity in quantities:
        assert set(study.metrics[quantity]) == chosen
    if name == "steps":
        assert set(study.metrics["live_bytes"]["maml"]) == {"1"}  # its limit
        assert set(study.metrics["live_bytes"]["fomaml"]) == {"1", "4"}
    assert len(study.claims) == {"steps": 3, "channels": 2, "transformer": 4, "lora": 2}[name]
    quick = EXPERIMENT.studies[name].settings.quick()
    assert quick != EXPERIMENT.studies[name].settings()
    assert quick.seed == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", TINY)
def test_studies_of_a_gpu_are_refused_without_one(name, tmp_path):
    """And are not among those that run unless they are named."""
    entry = EXPERIMENT.studies[f"{name}_gpu"]
    assert entry.extra
    with pytest.raises(mn.SettingsError, match="need a GPU, and torch sees none"):
        reproduce(EXPERIMENT, tmp_path / "memory", quick=True, seed=0, only=(f"{name}_gpu",), console=Console())


def on_gpu(monkeypatch, name, **settings):
    """A study for a GPU, with what it asks of one answered by the CPU."""
    monkeypatch.setattr(gpu, "GPU", "cpu")
    monkeypatch.setattr(places, "check_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name_, value in {"memory_allocated": 5, "max_memory_allocated": 12, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name_, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU of a test")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**30))
    module = {"steps": steps, "transformer": transformer}[name]
    return module.run(module.OnGpu(measuring=FAST, **settings), lambda share: None)


def test_a_study_of_a_gpu(monkeypatch):
    """What it makes of the numbers, and what it says where there is no room."""
    prepare = CANDIDATES["maml"].prepare

    def full(inner, steps):
        if steps > 1:
            raise torch.OutOfMemoryError("no room")
        return prepare(inner, steps)

    monkeypatch.setitem(CANDIDATES, "maml", CANDIDATES["maml"]._replace(prepare=full))
    graphs = CANDIDATES["fobmaml_graphs"]._replace(prepare=CANDIDATES["fobmaml"].prepare)
    monkeypatch.setitem(CANDIDATES, "fobmaml_graphs", graphs)
    settings = {"steps": (1, 4), "limits": {}, "compared": 4, "width": 4, "depth": 2, "examples": 16}
    study = on_gpu(monkeypatch, "steps", **settings)
    assert study.name == "steps_gpu"
    assert set(study.figures) == {"steps_gpu"}
    assert study.metrics["peak_bytes"]["fobmaml"] == {"1": 7, "4": 7}
    assert study.metrics["out_of_memory"] == {"maml": {"4": 2**30}}
    assert "On one GPU of a test" in study.summary
    assert "In its 1 GiB there was no room for MAML (unrolled) at 4." in study.summary
    assert [claim.holds for claim in study.claims[:2]] == [True, True]
    assert study.claims[1].measured == f"more than the {2**30 / 7:.1f} times that there is room for"
    assert "allocated +0.000 MiB" in study.claims[0].measured
    assert "With CUDA graphs" in study.claims[3].statement


def test_the_claim_of_cuda_graphs_is_of_every_place():
    places = {"8": "eight", "9": "nine"}
    assert not graphs_claims({"seconds_over_loop": {"fobmaml": {"8": 1.0}}}, places)
    for ratios, lost, holds in (({"8": 0.5, "9": 1.1}, {}, True), ({"8": 0.5, "9": 1.11}, {}, False)):
        found = {"seconds_over_loop": {"fobmaml_graphs": ratios}, "out_of_memory": lost}
        assert [claim.holds for claim in graphs_claims(found, places)] == [holds]
    found = {"seconds_over_loop": {"fobmaml_graphs": {"8": 0.5}}, "out_of_memory": {"fobmaml_graphs": {"9": MIB}}}
    (claim,) = graphs_claims(found, places)
    assert not claim.holds
    assert claim.measured == "times 0.500 at eight; no room at nine"


def test_where_nothing_has_room_no_claim_holds():
    empty = {"peak_bytes": {}, "out_of_memory": {name: {"1": MIB, "20": MIB} for name in ("plain", "fobmaml", "maml")}}
    found = [*steps.claims(empty, steps.StepsSettings(steps=(1, 20))), memory_claim(empty, "1", "here")]
    assert not any(claim.holds for claim in found)
    assert all("no room" in claim.measured for claim in found)


def test_only_what_is_adapted_is_counted_as_a_copy():
    pytest.importorskip("peft")
    inner = lora.adapters(TINY["lora"](), False, 8)
    assert inner.parameter_bytes == 4 * 2 * (2 * 8 + 8 * 2)  # float32; query and value; A and B


def test_a_missing_package_is_told_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    out = tmp_path / "memory"
    with pytest.raises(mn.SettingsError, match=r"needs peft, .*metanudge\[peft\].*--only steps channels transformer"):
        reproduce(EXPERIMENT, out, quick=True, seed=0, only=(), console=Console())
    assert not out.exists()


def test_attention_of_second_order_estimators_gives_the_same_loss():
    """The candidates that differentiate twice are measured on the same problem."""
    settings = TINY["transformer"]()
    losses = [
        inner.loss(inner.model, inner.support)
        for inner in (transformer.network(settings, name in SECOND_ORDER, 1, 8) for name in ("fobmaml", "maml"))
    ]
    torch.testing.assert_close(*losses)


def test_claims_follow_the_numbers():
    def table(lean: float) -> dict[str, dict[str, float]]:
        return {"fobmaml": {"8": lean}, "plain": {"8": 100.0}}

    def metrics(lean: float, ratio: float) -> dict[str, object]:
        found = {"peak_bytes": table(100.0), "live_bytes": table(lean), "parameter_bytes": {"fobmaml": {"8": 2.0}}}
        return found | {"seconds_over_loop": {"fobmaml": {"8": ratio}}, "gradients": {"fobmaml": {"8": 7}}}

    for lean, ratio, holds in ((136.0, 1.1, True), (136.1, 1.11, False)):  # 1.3 * 100 + 3 * 2
        assert memory_claim(metrics(lean, ratio), "8", "here").holds is holds
        assert time_claim(metrics(lean, ratio), "8", "here").holds is holds


def test_claims_of_the_study_of_steps_follow_the_numbers():
    settings = steps.StepsSettings(steps=(1, 20, 1000))

    def holds(last: float, maml: float) -> list[bool]:
        table = {"fobmaml": {"1": 100.0 * MIB, "20": 100.0 * MIB, "1000": last * MIB}, "maml": {"20": maml * MIB}}
        ratios = {"seconds_over_loop": {"fobmaml": {"20": 1.0}}, "gradients": {"fobmaml": {"20": 102}}}
        found = steps.claims({"peak_bytes": table, "live_bytes": table} | ratios, settings)
        return [claim.holds for claim in found]

    assert holds(101.0, 1000.0) == [True, True, True]
    assert holds(101.01, 1000.0) == [False, True, True]
    assert holds(98.9, 999.0) == [False, False, True]
