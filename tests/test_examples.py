"""The examples run: small, and as a user would run them."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:peft")
@pytest.mark.parametrize("name", ["attention", "lora"])
def test_an_example_trains(name: str) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports
        example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    before, untrained = example["main"](steps=0)
    assert before == untrained
    assert example["main"](steps=3)[1] < before


def test_the_blocks_of_the_page_for_those_who_come_from_elsewhere_run() -> None:
    """The first compares MAML with the loop by hand, the second asserts that its inner problems are solved."""
    page = (EXAMPLES.parent / "docs" / "migrating.md").read_text()
    found: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, found)
    assert found["by_hand"][0].abs().max() > 0
    assert found["step"].dropped_tasks == 0


def test_the_blocks_of_the_page_on_large_models_run() -> None:
    page = (EXAMPLES.parent / "docs" / "large_models.md").read_text()
    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, found)
        assert found["step"].dropped_tasks == 0
