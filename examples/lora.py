"""Meta-learning LoRA adapters: an initialisation of them from which a few sentences of a new task suffice.

A Hugging Face transformer with adapters of PEFT. The base is frozen: it has no gradients, and no step copies it. Here
it is small and random, and a task is an arithmetic progression modulo the vocabulary; load a pretrained one, and your
texts, in its place.

pip install 'metanudge[peft]' && python examples/lora.py
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import metanudge as mn

VOCABULARY, LENGTH = 17, 12


def with_adapters() -> PeftModel:
    """A frozen base, with trainable adapters in its attention and feed-forward layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], modules_to_save=["lm_head"])
    return get_peft_model(LlamaForCausalLM(config), adapters)


def loss(model: PeftModel, batch: mn.Batch) -> Tensor:
    """Of the next token."""
    return model(input_ids=batch.inputs, labels=batch.targets, use_cache=False).loss


def tasks(number: int, generator: torch.Generator, size: int = 4) -> mn.Tasks:
    """Progressions of one stride each: ``size`` to learn from, as many to be judged by."""
    stride = torch.randint(1, VOCABULARY, (number, 1, 1), generator=generator)

    def batch() -> mn.Batch:
        first = torch.randint(VOCABULARY, (number, size, 1), generator=generator)
        tokens = (first + stride * torch.arange(LENGTH)) % VOCABULARY
        return mn.Batch(tokens, tokens)

    return mn.Tasks(support=batch(), query=batch())


def main(steps: int = 30) -> tuple[float, float]:
    """Train, and return the loss on new tasks before and after."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), with_adapters()
    learner = mn.MetaLearner(
        model,
        loss,
        prox=0.1,
        solver=mn.TorchOptimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), steps=5),
        estimator=mn.FOBMAML(certify=False),
    )
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    new = tasks(20, torch.Generator().manual_seed(2))
    before = learner.evaluate(new).mean
    for _ in range(steps):
        optimizer.zero_grad()
        learner.backward(tasks(4, generator))
        optimizer.step()
    return before, learner.evaluate(new).mean


if __name__ == "__main__":
    before, after = main()
    print(f"loss after 5 steps on a new task: {before:.3f} before meta-learning, {after:.3f} after")
