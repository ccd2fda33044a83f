"""Calls of the command line, in this process."""

import pytest
from cli_runs import call


@pytest.fixture
def dropinf_(monkeypatch, capsys):
    """dropinf_("topk", "run"): exit code, stdout, stderr."""
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


@pytest.fixture
def ok(dropinf_):
    """stdout of a call that works."""

    def run(*arguments):
        code, out, err = dropinf_(*arguments)
        assert code == 0, err
        return out

    return run
