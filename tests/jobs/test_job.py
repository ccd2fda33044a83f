"""Jobs as flags and as files; their plans and solvers."""

import os
from dataclasses import fields

import pytest
from torch import nn

import dropinf
from dropinf.jobs import Job, prepare


def toml(tmp_path, text):
    file = tmp_path / "job.toml"
    file.write_text(text, encoding="utf-8")
    return file


FULL = {
    **{"model": "m", "adapter": "a", "entry": "x:y", "dtype": "bfloat16", "device": "cpu"},
    **{"train": "t.jsonl", "queries": "q.csv", "text": 'a "b"\\ü\x7f', "prompt": "p"},
    **{"completion": "c", "messages": "m", "label": "l", "image": "i", "id": "k"},
    **{"max_tokens": 7, "loss": "causal_lm", "compression": "Sketch", "total": 99, "seed": 5},
    **{"energies": 64, "allocation": "energy", "include": ["*.a", "b"], "exclude": "c"},
    **{"batch_tokens": 100, "batch_size": 3, "rows_dtype": "int8", "solver_kind": "Eigen"},
    **{"damping": 0.5, "max_bytes": 10**9, "out": "run"},
}


@pytest.mark.parametrize("given", [{}, FULL], ids=["defaults", "all"])
def test_a_file_says_what_was_saved(tmp_path, monkeypatch, given):
    """Read from anywhere: relative paths are the same files."""
    monkeypatch.chdir(tmp_path)
    job = Job.of(**given)
    job.save("one/two/job.toml")
    found = Job.load("one/two/job.toml")
    assert found == job and found.include == (None if not given else ("*.a", "b"))
    os.chdir("one")
    there = Job.load("two/job.toml")
    assert there.out == os.path.join("..", job.out)
    assert there.but(out=job.out) == job.but(
        **{name: f"../{given[name]}" for name in ("model", "adapter", "train", "queries") if given}
    )


def test_absolute_paths_stay(tmp_path):
    job = Job.of(model=str(tmp_path / "m"), out=str(tmp_path / "run"))
    job.save(tmp_path / "elsewhere" / "job.toml")
    assert Job.load(tmp_path / "elsewhere" / "job.toml") == job


def test_every_key_is_in_the_file_with_a_comment(tmp_path):
    """Those that are not set show an example, which can be taken as it stands."""
    Job().save(tmp_path / "job.toml")
    lines = (tmp_path / "job.toml").read_text().splitlines()
    shown = [line for line in lines if line.startswith("# ") and " = " in line]
    for line in shown:
        before = lines[lines.index(line) - 1]
        assert before.startswith("# ") and " = " not in before, line
    uncommented = [line[2:] if line in shown else line for line in lines]
    read = Job.load(toml(tmp_path, "\n".join(uncommented)))
    assert (
        len(shown) == sum(one.default is None for one in fields(Job))
        and read.r == 1024
        and read.include == ("*.mlp.*",)
    )


WRONG = {
    "[modle]\npath = 'x'": "'modle' is no section of a job; did you mean 'model'?",
    "[model]\npth = 'x'": "'pth' is no key of [model]; did you mean 'path'?",
    "[model]\nzzz = 'x'": "'zzz' is no key of [model]; there are path, adapter, entry, dtype",
    "model = 'x'": "'model' must be a section, [model]",
    "[plan]\nr = '5'": "[plan] r must be a whole number, got '5'",
    "[plan]\nr = 1.5": "[plan] r must be a whole number, got 1.5",
    "[plan]\nr = true": "[plan] r must be a whole number, got True",
    "[plan]\nr = 0": "[plan] r must be a whole number from 1, got 0",
    "[plan]\nrate = 'x'": "[plan] rate must be a number, got 'x'",
    "[plan]\ninclude = [1]": "[plan] include must be a string or a list of strings, got (1,)",
    "[plan]\ncompression = 'Dropuot'": "[plan] compression must be one of Dropout, Factored",
    "[solver]\nkind = 'lu'": "[solver] kind must be one of Cholesky, ",
    "[model]\npath = 3": "[model] path must be a string, got 3",
    "[model\npath = 3": "cannot be read as TOML: ",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_files(tmp_path, text):
    with pytest.raises(ValueError) as error:
        Job.load(toml(tmp_path, text))
    said = str(error.value)
    assert said.startswith(str(tmp_path / "job.toml")) and WRONG[text] in said and "\n" not in said


def test_wrong_flags(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no job file .*none\.toml"):
        Job.load(tmp_path / "none.toml")
    with pytest.raises(ValueError, match=r"'trian' is no part of a job; did you mean 'train'\?"):
        Job.of(trian="x")
    with pytest.raises(ValueError, match=r"\[plan\] r must be a whole number, got '3'"):
        Job.of(r="3")
    with pytest.raises(ValueError, match="the job names no model; give a model directory and"):
        prepare(Job())
    with pytest.raises(ValueError, match=r"has an entry, which gives model, data .* 'train' too"):
        prepare(Job.of(entry="a:b", train="t.jsonl"))


def test_flags_take_the_place_of_a_file(tmp_path):
    job = Job.load(toml(tmp_path, "[plan]\nr = 5\nseed = 3"))
    assert job.but(rate=0.5, seed=None) == Job.of(rate=0.5, seed=3)
    assert job.but(r=9).r == 9 and job.but() == job


@pytest.mark.parametrize(
    ("given", "compression"),
    [
        ({}, dropinf.Dropout(r=1024)),
        ({"rate": 0.5, "seed": 4}, dropinf.Dropout(rate=0.5, seed=4)),
        ({"total": 8, "allocation": "sqrt"}, dropinf.Dropout(total=8, allocation="sqrt")),
        ({"compression": "Full"}, dropinf.Full()),
        ({"compression": "Sketch", "r": 3}, dropinf.Sketch(r=3)),
        ({"compression": "FactoredDropout", "r": 4}, dropinf.FactoredDropout(r=4)),
        ({"compression": "LoGra", "r": 4}, dropinf.LoGra(r=4)),
        ({"compression": "SJLT", "r": 4}, dropinf.SJLT(r=4)),
    ],
)
def test_plan(given, compression):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    plan = Job.of(**given, exclude="1").plan(model)
    assert plan.compression == compression
    assert plan.fingerprint == dropinf.Plan.make(model, compression, exclude="1").fingerprint


def test_plans_that_cannot_be():
    model = nn.Linear(4, 3)
    energies = dropinf.energies(model, [nn.Parameter(nn.Linear(4, 5).weight)], _squares)
    with pytest.raises(ValueError, match="Full keeps every entry and takes no r"):
        Job.of(compression="Full", r=3).plan(model)
    with pytest.raises(ValueError, match="SJLT does not draw by energies; Dropout and Sketch do"):
        Job.of(compression="SJLT", energies=5).plan(model, energies)
    plan = Job.of(r=3, energies=5).plan(model, energies)
    assert plan.compression == dropinf.Dropout(r=3, energies=energies)


def _squares(model, x):
    return model(x).square().sum(1)


def test_solver():
    for kind in ("Cholesky", "Eigen", "DataInf", "Diagonal", "CG", "LiSSA", "Identity"):
        solver = Job.of(solver_kind=kind, max_bytes=10**6).solver()
        assert type(solver) is getattr(dropinf.solvers, kind)
        assert solver.max_bytes == 10**6 and solver.plan is None
    assert Job.of(damping=0.5).solver().damping == 0.5 and Job().solver().damping == 0.1
    with pytest.raises(ValueError, match="Identity inverts nothing and takes no damping"):
        Job.of(solver_kind="Identity", damping=0.1).solver()
