"""docs/evaluating.md runs as it stands, and what it finds is so."""

from places import ROOT


def blocks():
    text = (ROOT / "docs" / "evaluating.md").read_text()
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def test_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks():
        exec(block, namespace)
    evaluate, scores, wrong = (namespace[name] for name in ("evaluate", "scores", "wrong"))
    assert evaluate.mislabeled_auc(-scores.mean(0), wrong).value > 0.7
    found = evaluate.lds(scores, namespace["members"], namespace["losses"])
    assert found.value > 2 * (found.error + found.runs_error)
    assert (tmp_path / "halves" / "losses.jsonl").read_bytes().count(b"\n") == 1 + 2 * 40
