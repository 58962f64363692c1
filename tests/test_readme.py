"""The README's example runs, and its table is the registry's."""

import re
from pathlib import Path

import metanudge as mn

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    found = {}
    exec(code.replace("range(200)", "range(3)").replace("sinusoid(200", "sinusoid(20"), found)
    assert found["scores"].curve.shape == (17,)
    assert found["step"].dropped_tasks == 0


def test_table_is_made_from_the_registry():
    rows = [
        f"| `{kind.__name__}` | {kind.rule} | {kind.cost} | {kind.memory} | {kind.bias} |"
        for kind in mn.ESTIMATORS.values()
    ]
    for row in rows:
        assert row in README, row
