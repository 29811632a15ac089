"""The documentation's code runs as it stands."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_python_guide_runs_in_order():
    text = (DOCS / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == text.count("```python")
    scope: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), scope)
    losses = scope["metrics"].loss
    assert losses.shape == (20,)
    assert losses[-5:].mean() < losses[:5].mean()
    assert scope["pictures"].shape == (3, 8, 8, 3)
