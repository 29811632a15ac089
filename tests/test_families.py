"""A family in one file: that of docs/families.md, trained by the command's own functions."""

import re
from pathlib import Path

import numpy as np
from support.runs import checkpoints, config_of

from dreambooth_jax.devices.sharding import make_mesh
from dreambooth_jax.families import FAMILIES
from dreambooth_jax.families.pipeline import read_params
from dreambooth_jax.runs.workdir import open_run


def test_a_stranger_adds_a_family_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    monkeypatch.setitem(FAMILIES, "DotsPipeline", None)  # undone after the test
    text = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == text.count("```python")
    scope = {"config": config_of(tmp_path / "run", sampler="ddim")}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/families.md, block {number}", "exec"), scope)
    assert checkpoints(tmp_path / "run") == [6]
    assert len(list((tmp_path / "run" / "class_images").glob("*.png"))) == 2
    assert (tmp_path / "run" / "samples" / "step_000006.png").exists()
    trained, base = open_run(tmp_path / "run", make_mesh())[2], read_params(scope["pipeline"])
    moved = {name for name in base if not np.array_equal(base[name], trained[name])}
    assert moved >= base.keys() - {"words.table.embedding"}
