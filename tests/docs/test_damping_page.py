"""The figures of the page on damping are those of the experiment."""

from places import ROOT

PAGE = (ROOT / "docs" / "damping.md").read_text()


def test_its_tables_are_those_of_the_experiment():
    measured = (ROOT / "bench" / "results" / "spectrum.md").read_text().splitlines()
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and "---" not in line]
    assert len(rows) > 5
    for row in rows:
        assert row in measured, row
    assert len(PAGE.splitlines()) <= 80
