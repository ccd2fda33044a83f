"""What all commands share: help, wrong calls, exit codes, JSON, no colours where none belong."""

import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from cli_runs import make_run, one_object, one_sentence, started
from places import PACKAGE, ROOT

import dropinf

typer = pytest.importorskip("typer")

from dropinf.cli import errors  # noqa: E402
from dropinf.cli.app import app, command  # noqa: E402
from dropinf.jobs import Job  # noqa: E402

PARAMETERS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", PARAMETERS)
def test_help(dropinf_, name):
    """A sentence, an example that is called so, and the shared options."""
    code, told, _ = dropinf_(name, "--help")
    assert code == 0 and f"Example: dropinf {name}" in " ".join(told.split())
    assert {"--debug", "--json", "--quiet"} <= {
        option for one in PARAMETERS[name].params for option in one.opts
    }
    assert all(one.help for one in PARAMETERS[name].params)


def test_the_sections_of_a_job_stand_above_its_options(dropinf_):
    """The brackets of their names are no markup."""
    told = dropinf_("collect", "--help")[1]
    for section in ("model", "data", "loss", "plan", "collect", "solver", "out"):
        assert f"[{section}] in a job's file" in told


def test_examples_parse():
    """What the help shows is no wrong call."""
    for name, one in PARAMETERS.items():
        for line in one.epilog.removeprefix("Example: ").split(", or "):
            program, called, *arguments = line.split()
            assert (program, called) == ("dropinf", name)
            one.make_context(name, arguments, resilient_parsing=False)


@pytest.mark.parametrize(
    "arguments, command, said",
    [
        ([], "dropinf", "Missing command"),
        (["tokp"], "dropinf", "No such command 'tokp'"),
        (["topk", "--k", "0"], "dropinf topk", "Invalid value for '--k'"),
        (["topk", "--k", "many"], "dropinf topk", "Invalid value for '--k'"),
        (["topk", "--kk"], "dropinf topk", "No such option"),
        (["score"], "dropinf score", "Missing option '--to'"),
        (["bench", "--preset", "x"], "dropinf bench", "Invalid value for '--preset'"),
        (["topk", "--weights", "all"], "dropinf topk", "Invalid value for '--weights'"),
    ],
)
def test_wrong_calls(dropinf_, arguments, command, said):
    code, out, err = dropinf_(*arguments)
    assert code == 2 and out == ""
    sentence = one_sentence(command, err)
    assert sentence.startswith(said) and sentence.endswith(f"; {command} --help says what there is")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("k must\nbe \x1b[31m"), 2, r"k must be \x1b[31m"),
        (ValueError("rows.bin is damaged; collect it again"), 1, "rows.bin is damaged; collect it"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "No such file or directory: x"),
        (FileExistsError("x exists"), 2, "x exists"),
        (PermissionError(13, "Permission denied", "x"), 1, "Permission denied: x"),
        (OSError(28, "No space left on device", "x"), 1, "No space left on device: x; make room"),
        (RuntimeError("locked"), 1, "locked"),
        (MemoryError(), 1, "out of memory: MemoryError; make batches smaller"),
        (KeyError("x"), 1, "KeyError: 'x'; --debug shows where"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_ends(error, code, said):
    sentence, found = errors.sentence_of(error)
    assert found == code and sentence.startswith(said)


def test_debug_shows_where(dropinf_, tmp_path):
    code, _, err = dropinf_("info", tmp_path / "none", "--debug")
    assert code == 2 and "Traceback" in err and "FileNotFoundError" in err
    code, _, err = dropinf_("info", tmp_path / "none")
    assert code == 2 and one_sentence("dropinf info", err) == f"there is no {tmp_path / 'none'}"


def test_json_is_all_of_stdout(dropinf_, tmp_path):
    run = make_run(tmp_path / "run", ids=str)
    for arguments in (
        ["backends"],
        ["info", run],
        ["verify", run],
        ["fit", run],
        ["topk", run],
        ["self", run],
        ["score", run, "--to", tmp_path / "scores.npy"],
        ["export", run / "train", "--to", tmp_path / "rows.npy"],
        ["join", run / "train", "--to", tmp_path / "joint"],
    ):
        code, out, _ = dropinf_(*arguments, "--json")
        assert code == 0 and one_object(out)


@pytest.mark.parametrize("quiet", [False, True])
def test_json_of_what_prints(dropinf_, monkeypatch, tmp_path, quiet):
    """The demo and the microbenchmark: what they print for people stands on stderr."""
    pytest.importorskip("jinja2")
    from dropinf.tools import demo_text
    from dropinf.tools.microbenchmark import main

    def tell(*_, **__):
        print("a table")
        return {"chance": 0.5}

    monkeypatch.setattr(demo_text, "main", tell)
    monkeypatch.setattr(main, "run", lambda *_: (tell(), ["slower"]))
    for arguments, code in ((["demo", "text"], 0), (["bench", "--out", tmp_path], 1)):
        assert dropinf_(*arguments) == (code, "a table\n", "")
        how = ["--json", *(["--quiet"] if quiet else [])]
        found, out, err = dropinf_(*arguments, *how)
        assert found == code and one_object(out)["chance"] == 0.5
        assert err == ("" if quiet else "a table\n")
    assert one_object(out)["slower"] == ["slower"]


def test_version(dropinf_):
    code, out, err = dropinf_("--version")
    assert (code, out, err) == (
        0,
        f"dropinf {dropinf.__version__}, torch {torch.__version__}\n",
        "",
    )


def test_quiet_leaves_notes_out(dropinf_, tmp_path):
    run = make_run(tmp_path / "run")
    assert one_sentence("dropinf topk", dropinf_("topk", run)[2]).startswith("fitting Cholesky(")
    assert dropinf_("topk", run, "-q")[2] == ""


@pytest.mark.more
def test_no_colours_beside_a_terminal():
    """As a pipe, and where NO_COLOR is set on a terminal, as far as there are boxes at all."""
    environment = {k: v for k, v in os.environ.items() if k != "FORCE_COLOR"}
    for more in ({}, {"NO_COLOR": "1"}):
        done = subprocess.run(
            [sys.executable, "-m", "dropinf", "--help"],
            capture_output=True,
            env={**environment, **more, "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0 and b"\x1b" not in done.stdout and b"topk" in done.stdout


@pytest.mark.more
def test_a_pipe_that_closes(tmp_path):
    """`dropinf backends | true`: no traceback."""
    process = started("backends")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 1)


@pytest.mark.more
def test_a_full_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dropinf", "backends"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert one_sentence("dropinf backends", done.stderr).startswith("No space left on device")


@pytest.mark.more
def test_completion():
    """What a shell asks for is answered."""
    done = subprocess.run(
        [sys.executable, "-m", "dropinf"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "_DROPINF_COMPLETE": "complete_bash",
            "COMP_WORDS": "dropinf to",
            "COMP_CWORD": "1",
        },
    )
    assert done.stdout.split() == ["topk"], done.stderr


@pytest.mark.parametrize("missing", ["typer", pytest.param("rich", marks=pytest.mark.more)])
def test_without_the_extra(missing):
    """One sentence says what to install."""
    code = f"import sys; sys.modules[{missing!r}] = None; import dropinf.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    said = f"the command line needs {missing}: pip install 'dropinf[cli]'"
    assert one_sentence("dropinf", done.stderr) == said


def test_nothing_heavy_before_a_command_runs():
    """`dropinf --help` imports torch, which the package does, and no more of that kind."""
    heavy = ["transformers", "peft", "sklearn", "matplotlib", "pandas", "pyarrow", "jinja2", "PIL"]
    code = f"import sys, dropinf.cli; sys.exit(str(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n"


def test_the_page_names_every_command():
    """And the options of a job that are not called as its key is."""
    page = (ROOT / "docs" / "commands.md").read_text()
    table = page[page.index("## Which command") : page.index("## What a command says")]
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(cells))) == set(PARAMETERS)
    keys = {one.name: (one.metadata["section"], one.metadata["name"]) for one in fields(Job)}
    said = re.findall(r"`\[(\w+)\]\s(\w+)`\sis\s`--([\w-]+)`", page)
    assert {name.replace("-", "_"): (section, key) for section, key, name in said} == {
        name: (section, key) for name, (section, key) in keys.items() if name not in (key, "model")
    }


def test_every_command_is_a_file_of_commands():
    """Those of the issue; that their functions stand in files of their kind."""
    for name in (
        *("demo", "doctor", "backends", "bench", "init", "plan", "energies", "collect", "fit"),
        *("score", "topk", "self", "report", "verify", "join", "export", "info", "stability"),
    ):
        assert name in PARAMETERS
    assert command.__module__ == "dropinf.cli.app"
    for file in (PACKAGE / "cli").glob("*.py"):
        assert len(re.findall("\n", file.read_text())) <= 300, file
