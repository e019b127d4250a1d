"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    conv = torch.nn.Conv2d(16, 16, 7, padding=3, groups=16)
    monkeypatch.chdir(tmp_path)
    names = {"model": torch.nn.Sequential(conv), "weight": conv.weight, "x": torch.randn(1, 96, 14, 14)}
    exec(code, names)
    assert names["fit"].index.shape == (16, 3)
    assert conv.weight.grad.isfinite().all()
    assert (tmp_path / "bank").is_dir()
    assert names["y"].shape == names["x"].shape
