"""LoRA adapters of a Hugging Face transformer: adapted in place, over a frozen base that is never copied."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import metanudge as mn
from metanudge.diagnostics.memory import LiveBytes
from problems import DTYPE, distance

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers",
    "ignore::FutureWarning:peft",
    "ignore:There is a performance drop because:UserWarning",  # attention under vmap
)

LEAN = mn.FOBMAML(nudge="full", start="initialization", certify=False)
SGD = mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=4)


def llama(attention: str = "sdpa", width: int = 16) -> nn.Module:
    """Small and random; adapters that are not zero at the start, so that all of them have gradients."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation=attention,
    )
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), adapters).to(DTYPE)


def loss(model: nn.Module, batch: mn.Batch) -> Tensor:
    return model(input_ids=batch.inputs, labels=batch.targets, use_cache=False).loss


def tasks() -> mn.Tasks:
    g = torch.Generator().manual_seed(2)
    return mn.Tasks(*(mn.Batch(*[torch.randint(32, (2, 3, 8), generator=g)] * 2) for _ in range(2)))


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradient(model: nn.Module, **settings: object) -> Tensor:
    mn.MetaLearner(model, loss, **settings).backward(tasks())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    return torch.cat([parameter.grad.reshape(-1) for parameter in adapters_of(model).values()])


def test_the_meta_gradient_of_adapters() -> None:
    """Against Tangent on plain attention. Softmax is taken in float32 by transformers, which nu="auto" cannot see."""
    settings = {"prox": 3.0, "solver": mn.Nesterov(40)}
    found = gradient(llama(), estimator=mn.FOBMAML(nu=1e-2), execution="in_place", **settings)
    exact = gradient(llama("eager"), estimator=mn.Tangent(), **settings)
    assert distance(found, exact) < 1e-4
    assert distance(gradient(llama(), estimator=mn.FOBMAML(), execution="in_place", **settings), exact) < 2e-3


def test_in_place_equals_the_stack() -> None:
    settings = {"estimator": mn.FOBMAML(nudge="full", nu=0.1)}
    live = gradient(llama(), solver=SGD, **settings)
    stacked = gradient(llama(), solver=mn.GradientDescent(4, lr=0.1), execution="vectorized", **settings)
    assert distance(live, stacked) < 1e-10


def test_maml_says_what_to_use_instead() -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mn.LossError, match=r"Use FOBMAML.*is not implemented"):
        gradient(model, solver=mn.GradientDescent(2, lr=0.1), estimator=mn.MAML(), execution="vectorized")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_frozen_base_is_not_copied() -> None:
    """Bytes alive at the peak, those of the base itself once among them: it is seen as its parameters are used."""
    model = llama(width=256)
    bytes_of = {flag: sum(p.nbytes for p in model.parameters() if p.requires_grad is flag) for flag in (True, False)}
    learner = mn.MetaLearner(model, loss, solver=SGD, estimator=LEAN)
    data = tasks()
    with LiveBytes() as live:
        learner.backward(data)
    assert bytes_of[False] > 50 * bytes_of[True]
    assert live.peak - bytes_of[False] < 0.25 * bytes_of[False]


def test_adapted_models_share_the_frozen_base() -> None:
    model = llama()
    learner = mn.MetaLearner(model, loss, solver=SGD)
    adapted = learner.adapt(mn.Batch(*(leaf[0] for leaf in tasks().support)))
    for (name, own), its in zip(model.named_parameters(), adapted.parameters(), strict=True):
        assert (own.data_ptr() == its.data_ptr()) is (not own.requires_grad), name
    assert any(not torch.equal(own, adapters_of(adapted)[name]) for name, own in adapters_of(model).items())
    learner.model.get_parameter(next(iter(adapters_of(model)))).detach().zero_()
    assert adapters_of(adapted)[next(iter(adapters_of(model)))].abs().sum() > 0
