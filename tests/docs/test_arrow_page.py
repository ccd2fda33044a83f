"""docs/arrow.md runs as pasted, and what it says of the results is so."""

import re

import pytest
import torch
from places import ROOT

PAGE = (ROOT / "docs" / "arrow.md").read_text()


def test_its_code_runs(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'dropinf[arrow]'")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in PAGE.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    store, scores = names["store"], names["scores"]
    assert torch.equal(names["batch"], store.rows[:8])
    assert sum(map(len, names["parts"])) == 50 * store.plan.width
    assert names["asked"].ids == [f"a{i}" for i in range(50)]
    assert list(names["frame"].columns[:3]) == ["id", "score_a0", "score_a1"]
    assert (tmp_path / "scores.csv").read_text().count("\n") == 51
    assert names["arrow"].num_rows == 50 and scores.shape == (50, 50)
    assert names["best"].to_arrow().num_rows == 50 * 2 * 5
    assert isinstance(names["data"], datasets.Dataset)
    assert names["data"]["self_influence"][:] == names["own"].tolist()


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)h][^)]*)\)", PAGE)
    assert len(links) > 2
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
