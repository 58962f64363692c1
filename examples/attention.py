"""Meta-learning a transformer whose fused attention cannot be differentiated twice.

A task is a score of every token, and to be predicted is the mean score of a sequence. Second-order MAML stops with
"derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented" (another kernel on a GPU,
the same end); FO-B-MAML takes first derivatives only.

python examples/attention.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metanudge as mn

TOKENS, LENGTH, WIDTH, HEADS = 12, 4, 32, 4
COMMON = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(0))


class Transformer(nn.Module):
    """One block; PyTorch chooses the attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(TOKENS, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """From ``[n, length]`` to ``[n, 1]``."""
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))
        return self.head(x.mean(-2))


def tasks(number: int, generator: torch.Generator, size: int = 6) -> mn.Tasks:
    """Scores of two common directions each, ``size`` sequences to learn from and as many to be judged by."""
    scores = torch.randn(number, 1, 1, 2, generator=generator) @ COMMON

    def batch() -> mn.Batch:
        tokens = torch.randint(TOKENS, (number, size, LENGTH), generator=generator)
        return mn.Batch(tokens, scores.expand(-1, size, LENGTH, -1).gather(-1, tokens.unsqueeze(-1)).sum(-2) / 2)

    return mn.Tasks(support=batch(), query=batch())


def main(steps: int = 100) -> tuple[float, float]:
    """Train, and return the squared error on new tasks before and after."""
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), Transformer()
    learner = mn.MetaLearner(
        model,
        mn.metrics.squared_error,
        prox=1.0,
        solver=mn.TorchOptimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.03, momentum=0.9), steps=5),
        estimator=mn.FOBMAML(nudge="full", start="initialization", certify=False),  # three copies of the parameters
        execution="in_place",  # on the model as it is, by .backward() alone
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    new = tasks(50, torch.Generator().manual_seed(2))
    before = learner.evaluate(new).mean
    for _ in range(steps):
        optimizer.zero_grad()
        learner.backward(tasks(4, generator))
        optimizer.step()
    return before, learner.evaluate(new).mean


if __name__ == "__main__":
    before, after = main()
    print(f"squared error after 5 steps on a new task: {before:.3f} before meta-learning, {after:.3f} after")
