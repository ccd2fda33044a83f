"""What reaches a terminal: our own words in ASCII, and of others' names no escape codes."""

import ast
import contextlib
import io
import json
import sys

import pytest
import torch
from places import ROOT
from torch import nn

import dropinf
from dropinf import __main__ as command_line
from dropinf import text_table
from dropinf.manifest import sealed
from dropinf.tools.microbenchmark import check
from dropinf.tools.microbenchmark import main as microbenchmark

SOURCES = [
    ROOT / "setup.py",
    *(ROOT / "dropinf").rglob("*.py"),
    *(ROOT / "triton_kernels").rglob("*.py"),
]
RED = "\x1b[31m"
ODD = {f"{RED}red": r"\x1b[31mred", "слой": r"\u0441\u043b\u043e\u0439", "a\nb": r"a\nb"}


def lines_on_an_ascii_terminal(run):
    """What it prints with sys.stdout as PYTHONIOENCODING=ascii makes it."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    with contextlib.redirect_stdout(terminal), contextlib.suppress(SystemExit):
        run()
    return terminal.buffer.getvalue().decode("ascii").splitlines()


def plan_with(names, tmp_path):
    """A plan whose file has other layer names than its model."""
    model = nn.Sequential(*(nn.Linear(3, 2) for _ in names))
    path = tmp_path / "plan.json"
    dropinf.Plan.make(model, dropinf.Full()).save(path)
    saved = json.loads(path.read_text())
    for layer, name in zip(saved["layers"], names, strict=True):
        layer[0] = name
    saved["types"][0] = RED
    del saved["crc32"]
    path.write_bytes(sealed(saved))
    return dropinf.Plan.load(path)


def test_our_own_words_are_ascii():
    """Every string of the package but docstrings, so that any terminal can show it."""
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        documented = ast.Module | ast.ClassDef | ast.FunctionDef
        docs = {
            ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value.isascii() or node.value in docs, (path, node.lineno, node.value)


def test_names_in_messages_are_quoted():
    """An f-string writes the name of a layer or parameter with !r, which escapes control codes."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.FormattedValue) or not isinstance(
                node.value, ast.Attribute
            ):
                continue
            of = ast.unparse(node.value)
            if node.value.attr == "name" and of not in ("error.name", "gpu.name"):
                assert node.conversion == ord("r"), f"{path}:{node.lineno}: {of}"


def test_printable():
    for text, shown in ODD.items():
        assert text_table.printable(text) == (text if text == "слой" else shown)
    assert text_table.printable("a b_c.0 λ") == "a b_c.0 λ"
    assert text_table.printable("\u202eleft\x9b1m\udc80") == r"\u202eleft\x9b1m\udc80"


def test_tables_of_a_plan_and_a_solver(tmp_path):
    """On an ASCII terminal, with names out of a file: columns still stand below each other."""
    plan = plan_with(ODD, tmp_path)
    store = dropinf.RowStore(torch.randn(4, plan.width), plan)
    solver = dropinf.solvers.Cholesky().fit(store)
    for describe in (plan.describe, solver.describe):
        lines = lines_on_an_ascii_terminal(lambda: print(describe()))
        assert all(line.isprintable() for line in lines)
        for shown in ODD.values():
            assert len([line for line in lines if line.startswith(f"{shown} ")]) == 1
        assert len({line.index(" ", len(max(ODD.values(), key=len))) for line in lines[1:4]}) == 1
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # has no encoding
        print(plan.describe())
    assert "слой" in printed.getvalue() and RED not in printed.getvalue()


def test_command_line_on_an_ascii_terminal(monkeypatch):
    states = {"cpu": f"not available: ≥ c++ {RED}", "reference": "available"}
    monkeypatch.setattr(dropinf, "backends", lambda: states)
    monkeypatch.setattr(sys, "argv", ["dropinf", "backends"])
    cpu, reference = lines_on_an_ascii_terminal(command_line.main)
    assert cpu == r"cpu         not available: \u2265 c++ \x1b[31m"
    assert reference == "reference   available"


def test_results_of_another_run(monkeypatch, capsys):
    """Contestants' names in the file that `bench --against` is given."""
    line = f"formed: dropinf {RED} takes 2 times the floor, 1 before"
    monkeypatch.setattr(check, "slower", lambda old, new: [line])
    assert len(microbenchmark.compare({}, {}, dict)) == 1
    assert capsys.readouterr().out == line.replace("\x1b", r"\x1b") + "\n"


def test_parameters_that_take_passes():
    model = nn.Sequential()
    model.add_module(RED, nn.Embedding(9, 5, max_norm=1.0))
    plan = dropinf.Plan.make(model, dropinf.Full())
    with dropinf.capture(model, plan) as tap, pytest.warns(UserWarning) as said:
        tap.rows(model(torch.tensor([[1, 2], [3, 4]])).sum((1, 2)))
    assert r"\x1b[31m.weight (" in str(said[0].message)
    assert RED not in str(said[0].message)


def test_kind_of_a_saved_solver(tmp_path):
    plan = plan_with(["a"], tmp_path)
    solver = dropinf.solvers.Cholesky().fit(dropinf.RowStore(torch.randn(40, plan.width), plan))
    solver.save(tmp_path / "solver")
    file = tmp_path / "solver" / "solver.json"
    saved = {**json.loads(file.read_text()), "kind": RED}
    del saved["crc32"]
    file.write_bytes(sealed(saved))
    with pytest.raises(ValueError, match=r"holds a \\x1b\[31m; use"):
        dropinf.solvers.Cholesky.load(tmp_path / "solver")
