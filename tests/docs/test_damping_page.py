"""The page on damping runs as pasted, and its figures are those of the experiment."""

import warnings

from places import ROOT

PAGE = (ROOT / "docs" / "damping.md").read_text()


def test_its_code_runs():
    blocks = [part.split("```")[0] for part in PAGE.split("```python\n")[1:]]
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="choose_damping: .* end of the dampings")
        for block in blocks:
            exec(block, names)
    choice, plan = names["choice"], names["plan"]
    # r / n is .512 in the first layer and in all of the last one's .5.
    assert [block.r for block in plan.blocks] == [128, 128]
    assert choice.damping == 1.0 and "chosen" in str(choice)
    assert names["own"].metric == "metric" and names["by_masks"].metric == "agreement"


def test_its_tables_are_those_of_the_experiment():
    measured = (ROOT / "bench" / "results" / "spectrum.md").read_text().splitlines()
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) > 5
    for row in rows:
        assert row in measured, row
    assert len(PAGE.splitlines()) <= 80
