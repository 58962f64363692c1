"""On a GPU: what a CPU finds, and kernels that a CPU does not have. Skipped where there is none."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metanudge as mn
import test_large_models
from metanudge.cli import main
from metanudge.experiments.memory import EXPERIMENT
from metanudge.experiments.memory.measuring import Measuring
from problems import DTYPE, ESTIMATORS, PROBLEMS, SOLVERS, Problem, distance, flat_gradient, normal, squared_error
from test_executions import BOTH, STACKABLE, coarse
from test_large_models_memory import narrow_error

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),  # attention under vmap
]

GPU = "cuda"
PROX = 2.0
EXECUTIONS = ("vectorized", "in_place")
LEAN = mn.FOBMAML(nudge="full", nu=0.05, start="initialization", certify=False)
EXAMPLES = Path(__file__).parent.parent / "examples"


def on(device: str, tasks: mn.Tasks, dtype: torch.dtype | None = None) -> mn.Tasks:
    return mn.Tasks(*(mn.Batch(*(leaf.to(device, dtype) for leaf in batch)) for batch in tasks))


def estimated(made: Problem, device: str, **settings: object) -> tuple[Tensor, mn.MetaStep]:
    model = made.make().to(device)
    step = mn.MetaLearner(model, made.loss, prox=made.prox, **settings).backward(on(device, made.tasks))
    assert all(parameter.grad.device == parameter.device for parameter in model.parameters())
    return flat_gradient(model).cpu(), step


def assert_as_on_a_cpu(made: Problem, **settings: object) -> None:
    (here, said_here), (there, said_there) = (estimated(made, device, **settings) for device in ("cpu", GPU))
    assert distance(there, here) < 1e-10
    assert said_there.gradient_evaluations == said_here.gradient_evaluations
    for field in ("query_loss", "support_loss", "residual", "nu", "gradient_norm"):
        assert getattr(said_there, field) == pytest.approx(getattr(said_here, field), rel=1e-8), field


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_in_stacks(name: str) -> None:
    assert_as_on_a_cpu(PROBLEMS["mlp"](), estimator=coarse(ESTIMATORS[name]), execution="vectorized")


@pytest.mark.parametrize("name", BOTH)
def test_every_estimator_in_place(name: str) -> None:
    assert_as_on_a_cpu(PROBLEMS["mlp"](), estimator=coarse(ESTIMATORS[name]), execution="in_place")


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver(name: str, execution: str) -> None:
    if execution == "vectorized" and name not in STACKABLE:
        pytest.skip("a torch optimizer steps the live module")
    settings = {"solver": SOLVERS[name], "estimator": coarse(mn.FOBMAML()), "execution": execution}
    assert_as_on_a_cpu(PROBLEMS["logistic"](), **settings)


OPTIMIZERS: dict[str, Callable] = {
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, fused=True),
    "adamw_capturable": lambda p: torch.optim.AdamW(p, lr=0.03, eps=1e-3, capturable=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_a_gpu(name: str) -> None:
    """Against the plain loop of the same optimizer on a CPU."""
    plain = {"sgd_foreach": {"momentum": 0.9}, "sgd_fused": {}}.get(name)

    def factory(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        if plain is None:
            return torch.optim.AdamW(p, lr=0.03, eps=1e-3, foreach=False)
        return torch.optim.SGD(p, lr=0.1, foreach=False, **plain)

    made = PROBLEMS["mlp"]()
    here, _ = estimated(made, "cpu", estimator=LEAN, solver=mn.TorchOptimizer(factory, 4))
    there, _ = estimated(made, GPU, estimator=LEAN, solver=mn.TorchOptimizer(OPTIMIZERS[name], 4))
    assert distance(there, here) < (1e-4 if name == "adamw_capturable" else 1e-10)  # its step counts are float32


@pytest.mark.parametrize("name", test_large_models.ROWS)
def test_the_rows_of_large_models(name: str) -> None:
    """In float32, whose kernels a GPU has: against the formulas in float64 on a CPU."""
    row, settings = test_large_models.ROWS[name], {"solver": test_large_models.sgd(), "estimator": LEAN}
    model, plain = test_large_models.both(row)
    there = test_large_models.gradient(
        model.float().to(GPU), on(GPU, test_large_models.tasks(), torch.float32), **settings
    )
    here = test_large_models.gradient(plain, **settings)
    assert distance(there.cpu().double(), here) < 2e-3


@pytest.mark.parametrize("policy", ["support", "transductive"])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_batch_norm(execution: str, policy: str) -> None:
    found = []
    for device in ("cpu", GPU):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(device, DTYPE)
        settings = {"batch_norm": policy, "estimator": LEAN, "solver": mn.GradientDescent(4, lr=0.1)}
        mn.MetaLearner(model, squared_error, prox=PROX, execution=execution, **settings).backward(on(device, small()))
        found.append(flat_gradient(model).cpu())
    assert distance(found[1], found[0]) < 1e-9


def small(seed: int = 2) -> mn.Tasks:
    g = torch.Generator().manual_seed(seed)

    def batch() -> mn.Batch:
        x = normal(g, 2, 6, 4)
        return mn.Batch(x, x.sum(-1, keepdim=True).sin() + 0.1 * normal(g, 2, 6, 1))

    return mn.Tasks(batch(), batch())


def dropout() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).to(GPU, DTYPE)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_dropout_is_matched(execution: str) -> None:
    """The masks of a step are those of every solve; and the generator of the GPU is left as it was."""
    found = []
    for nu in (1e-4, 1e-3):
        model, estimator = dropout(), mn.FOBMAML(nudge="full", nu=nu)
        learner = mn.MetaLearner(
            model, squared_error, prox=PROX, solver=mn.GradientDescent(4, lr=0.1), estimator=estimator,
            execution=execution,
        )  # fmt: skip
        torch.manual_seed(3)
        before = torch.cuda.get_rng_state()
        learner.backward(on(GPU, small()))
        assert torch.equal(torch.cuda.get_rng_state(), before)
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-5


def test_a_failure_leaves_everything_as_it_was() -> None:
    model = dropout()
    before, random = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state()
    calls = []

    def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
        calls.append(None)
        if len(calls) > 3:
            raise RuntimeError("out of luck")
        return squared_error(model, batch)

    learner = mn.MetaLearner(model, loss, prox=PROX, execution="in_place")
    with pytest.raises(RuntimeError, match="out of luck"):
        learner.backward(on(GPU, small()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_tasks_on_another_device_are_refused() -> None:
    with pytest.raises(mn.TasksError, match="the model is on cuda:0 but a tensor of the tasks on cpu"):
        mn.MetaLearner(dropout(), squared_error).backward(small())


@pytest.mark.parametrize("estimator", [LEAN, mn.FOBMAML()], ids=["lean", "default"])
@pytest.mark.parametrize(("dtype", "around"), [(torch.bfloat16, None), (torch.float32, True)], ids=["all", "autocast"])
def test_bfloat16(dtype: torch.dtype, around: bool | None, estimator: object) -> None:
    assert narrow_error(dtype, estimator, around, GPU) < 0.06


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_steps() -> None:
    """By Triton."""
    made, settings = PROBLEMS["mlp"](), {"estimator": coarse(mn.FOBMAML()), "execution": "vectorized"}
    built, said = estimated(made, GPU, compile=True, **settings)
    eager, expected = estimated(made, GPU, **settings)
    assert distance(built, eager) < 1e-9
    assert said.gradient_evaluations == expected.gradient_evaluations


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(GPU, DTYPE)
    found = []
    for given in (model, torch.compile(model)):
        model.zero_grad()
        solver = mn.TorchOptimizer(OPTIMIZERS["sgd_foreach"], 4)
        learner = mn.MetaLearner(given, squared_error, prox=PROX, solver=solver, estimator=LEAN)
        learner.backward(on(GPU, small()))
        found.append(flat_gradient(model))
    assert distance(*found) < 1e-9


# Kernels without second derivatives.


class Attention(nn.Module):
    """Self-attention by whichever kernel is allowed, in the precision the kernel takes."""

    def __init__(self, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).to(self.precision).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.to(x.dtype).transpose(-3, -2).flatten(-2).mean(-2))


def sequences() -> mn.Tasks:
    g = torch.Generator().manual_seed(4)

    def batch() -> mn.Batch:
        x = normal(g, 2, 8, 32, 16)
        return mn.Batch(x, x.mean((-2, -1)).unsqueeze(-1))

    return on(GPU, mn.Tasks(batch(), batch()), torch.float32)


def gradient(model: nn.Module, tasks: mn.Tasks, **settings: object) -> Tensor:
    model.zero_grad()
    torch.manual_seed(3)
    given = {"prox": PROX, "solver": mn.GradientDescent(20, lr=0.1), "estimator": LEAN, "execution": "in_place"}
    mn.MetaLearner(model, squared_error, **(given | settings)).backward(tasks)
    return flat_gradient(model)


def attention(precision: torch.dtype, data: mn.Tasks) -> tuple[Attention, Tensor]:
    """A model in that precision, and its meta-gradient by plain operations in float32."""
    torch.manual_seed(5)
    model, plain = Attention(precision).to(GPU), Attention(torch.float32).to(GPU)
    plain.load_state_dict(model.state_dict())
    with sdpa_kernel(SDPBackend.MATH):
        return model, gradient(plain, data)


def twice(loss: Tensor, model: nn.Module) -> None:
    """Differentiate a function of the gradient, as MAML does."""
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    torch.autograd.grad(sum(slope.square().sum() for slope in slopes), parameters)


@pytest.mark.parametrize(
    ("backend", "precision", "near"),
    [
        (SDPBackend.FLASH_ATTENTION, torch.bfloat16, 0.05),
        (SDPBackend.EFFICIENT_ATTENTION, torch.float32, 1e-3),
        (SDPBackend.CUDNN_ATTENTION, torch.bfloat16, 0.05),
    ],
    ids=["flash", "efficient", "cudnn"],
)
def test_attention_kernels(backend: SDPBackend, precision: torch.dtype, near: float) -> None:
    data = sequences()
    model, exact = attention(precision, data)
    with sdpa_kernel(backend):
        assert distance(gradient(model, data), exact) < near
        with pytest.raises(mn.LossError, match="Use FOBMAML"):
            gradient(model, data, estimator=mn.MAML(), execution="vectorized")
        single = mn.Batch(*(leaf[0] for leaf in data.support))
        with pytest.raises(RuntimeError, match=r"derivative|not implemented"):
            twice(squared_error(model, single), model)


@pytest.mark.parametrize(("precision", "near"), [(torch.bfloat16, 0.05), (torch.float32, 1e-3)], ids=str)
def test_attention_in_stacks(precision: torch.dtype, near: float) -> None:
    """With what torch chooses of what runs there; and what it may choose elsewhere is as it was."""
    data = sequences()
    model, exact = attention(precision, data)
    assert distance(gradient(model, data, execution="vectorized"), exact) < near
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


class Recurrent(nn.Module):
    """The last state of a recurrent layer, by cuDNN."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.out = kind(16, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_cudnn(kind: type[nn.RNNBase]) -> None:
    data, model = sequences(), Recurrent(kind).to(GPU)
    found = gradient(model, data)
    with torch.backends.cudnn.flags(enabled=False):
        assert distance(found, gradient(model, data)) < 1e-2
    single = mn.Batch(*(leaf[0] for leaf in data.support))
    with pytest.raises(RuntimeError, match=r"CuDNN|cudnn|not implemented"):
        twice(squared_error(model, single), model)
    with pytest.raises(mn.LossError, match="Use FOBMAML"):
        gradient(model, data, estimator=mn.MAML(), execution="vectorized")


# Memory.


def test_memory_does_not_depend_on_the_steps() -> None:
    """That of an ordinary training step and three copies of the parameters, whatever the steps."""
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))).to(GPU)
    copy_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    x = torch.randn(1, 4, 512, device=GPU)
    tasks = mn.Tasks(mn.Batch(x, x), mn.Batch(x, x))

    def peak(act: Callable[[], object]) -> int:
        act()
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        return torch.cuda.max_memory_allocated() - before

    def estimate(steps: int) -> Callable[[], object]:
        solver = mn.TorchOptimizer(lambda p: torch.optim.SGD(p, lr=1e-3, foreach=False), steps)
        return lambda: mn.MetaLearner(model, squared_error, prox=PROX, solver=solver, estimator=LEAN).backward(tasks)

    plain = peak(lambda: squared_error(model, mn.Batch(x[0], x[0])).backward())
    few, many = peak(estimate(2)), peak(estimate(40))
    assert many <= few * 1.01
    assert many <= plain + 3.3 * copy_bytes


# Training.


def trained(steps: list[int], out: Path | None = None) -> tuple[Tensor, list[float]]:
    """With dropout, and tasks from a CPU; interrupted after each of ``steps``."""
    for upto in steps:
        model = dropout()
        learner = mn.MetaLearner(model, squared_error, prox=PROX, solver=mn.Nesterov(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        data = [mn.Tasks(*(mn.Batch(*(leaf[0] for leaf in batch)) for batch in small(seed))) for seed in range(8)]
        settings = {"tasks_per_step": 2, "validation": data[:2], "every": 2, "progress": False, "seed": 0}
        torch.manual_seed(99 if upto == steps[-1] and len(steps) > 1 else 7)  # which resuming forgets
        torch.cuda.manual_seed(5)
        fitted = mn.fit(learner, optimizer, data, steps=upto, out=out, resume=out is not None, **settings)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    return vector, [record.query_loss for record in fitted.history]


def test_a_training_that_is_resumed_is_the_same(tmp_path: Path) -> None:
    whole, history = trained([6], tmp_path / "whole")
    parts, again = trained([4, 6], tmp_path / "parts")
    assert history == again
    assert torch.equal(whole, parts)


def test_the_command(tmp_path: Path) -> None:
    text = (EXAMPLES / "sinusoid.toml").read_text().replace("[0, 1, 2]", '[0]\ndevice = "cuda"')
    text = text.replace("steps = 1000", "steps = 4").replace("every = 100", "every = 2")
    config = tmp_path / "sinusoid.toml"
    config.write_text(text)
    out = tmp_path / "run"
    main(["train", str(config), "--out", str(out)])
    main(["evaluate", str(out), "--tasks", "20"])
    (written,) = out.glob("evaluation*.json")
    assert json.loads(written.read_text())


def test_weights_that_were_saved_on_a_gpu_are_loaded_on_a_cpu(tmp_path: Path) -> None:
    learner = mn.MetaLearner(dropout(), squared_error, prox=PROX)
    learner.save_pretrained(tmp_path)
    loaded = mn.load_pretrained(tmp_path, nn.Sequential(*dropout()).cpu(), squared_error)
    values = [parameter.detach().cpu() for parameter in learner.model.parameters()]
    assert all(torch.equal(*pair) for pair in zip(values, loaded.model.parameters(), strict=True))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_adapt_and_evaluate(execution: str) -> None:
    ends = []
    for device in ("cpu", GPU):
        model = dropout().eval().to(device)
        learner = mn.MetaLearner(model, squared_error, prox=PROX, execution=execution)
        tasks = on(device, small())
        adapted = learner.adapt(mn.Batch(*(leaf[0] for leaf in tasks.support)))
        ends.append((learner.evaluate(tasks).values.cpu(), nn.utils.parameters_to_vector(adapted.parameters()).cpu()))
    for here, there in zip(*ends, strict=True):
        assert distance(there.detach(), here.detach()) < 1e-9


def test_warm_starts() -> None:
    found = []
    for device in ("cpu", GPU):
        model = dropout().eval().to(device)
        learner = mn.MetaLearner(model, squared_error, prox=PROX, solver=mn.Nesterov(4), warm_start=mn.WarmStart())
        for _ in range(2):
            model.zero_grad()
            learner.backward(on(device, small()), indices=[0, 1])
        found.append(flat_gradient(model).cpu())
    assert distance(found[1], found[0]) < 1e-6


def test_check_tells_of_every_estimator() -> None:
    learner = mn.MetaLearner(dropout().eval(), squared_error, prox=PROX, solver=mn.Nesterov(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mn.UnsolvedWarning)
        assert "FOBMAML" in str(mn.check(learner, on(GPU, small())))


# Processes.


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


@pytest.mark.parametrize("name", ["fsdp2", "many_processes"])
def test_an_example_for_many_processes_on_one_gpu(name: str) -> None:
    """By NCCL; one rank gathers from itself."""
    done = subprocess.run([*TORCHRUN, str(EXAMPLES / f"{name}.py"), "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("squared error")


def test_the_command_by_torchrun(tmp_path: Path) -> None:
    text = (EXAMPLES / "sinusoid.toml").read_text().replace("[0, 1, 2]", '[0]\ndevice = "cuda"')
    config = tmp_path / "sinusoid.toml"
    config.write_text(text.replace("steps = 1000", "steps = 2").replace("every = 100", "every = 2"))
    given = ["-m", "metanudge", "train", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run([*TORCHRUN, *given], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run").is_dir()


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:peft")
def test_adapters_over_a_frozen_base() -> None:
    """In bfloat16, the adapters in float32 as PEFT has them, the base shared; as in float64 but for the precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("peft"), pytest.importorskip("transformers")
        import test_large_models_peft as adapters
    found = []
    for kind in (torch.float64, torch.bfloat16):
        model = adapters.llama().to(GPU, kind)
        for parameter in adapters.adapters_of(model).values():
            parameter.data = parameter.to(torch.promote_types(kind, torch.float32))
        learner = mn.MetaLearner(model, adapters.loss, prox=3.0, solver=adapters.SGD, execution="in_place")
        learner.backward(on(GPU, adapters.tasks()))
        found.append(torch.cat([p.grad.reshape(-1) for p in adapters.adapters_of(model).values()]).double())
    assert distance(found[1], found[0]) < 0.1


@pytest.mark.parametrize("name", ["steps_gpu", "channels_gpu", "transformer_gpu", "lora_gpu"])
def test_a_study_of_memory(name: str, tmp_path: Path) -> None:
    if name == "lora_gpu":
        pytest.importorskip("peft"), pytest.importorskip("transformers")
    tiny = {
        "steps_gpu": {"steps": (1, 4), "limits": {}, "compared": 1, "width": 4, "depth": 2, "examples": 64},
        "channels_gpu": {"channels": (2, 3), "blocks": 1, "size": 8, "shots": 1, "inner_steps": 1},
        "transformer_gpu": {"depths": (1,), "lengths": (8, 16), "width": 32, "heads": 2, "inner_steps": 1},
        "lora_gpu": {"widths": (32,), "layers": 1, "heads": 2, "length": 8, "inner_steps": 1},
    }[name]
    entry = EXPERIMENT.studies[name]
    assert not entry.extra
    measuring = Measuring(repeats=1, budget=0.0, judged_budget=0.0)
    study = entry.run(entry.settings(measuring=measuring, **tiny), lambda share: None)
    assert study.name == name
    assert "out_of_memory" not in study.metrics
    for quantity in ("peak_bytes", "parameter_bytes", "seconds", "seconds_over_loop", "gradients"):
        assert {"plain", "fobmaml", "fobmaml_graphs", "maml"} <= set(study.metrics[quantity])
