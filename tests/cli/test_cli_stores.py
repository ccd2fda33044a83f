"""Commands on directories: info, verify, join, export, fit, score, topk, self."""

import contextlib
import csv
import errno
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cli_runs import loader, loss_fn, make_run, model, one_object, one_sentence

pytest.importorskip("typer")

import dropinf
from dropinf import RowStore
from dropinf.cli import terminal
from dropinf.jobs import Job
from dropinf.rows import passes_watched


@pytest.fixture(
    params=[None, "example-{}".format, lambda i: 7 * i + 3], ids=["order", "str", "int"]
)
def run(tmp_path, request):
    return make_run(tmp_path / "run", ids=request.param)


def true_scores(run, damping=0.1):
    """[m, n] by float64 numpy: g_q (F + lambda)^-1 g_i of each layer, F of the valid rows."""
    store, asked = RowStore.load(run / "train"), RowStore.load(run / "queries")
    found, start = 0, 0
    rows, queries = store.rows.double().numpy(), asked.rows.double().numpy()
    n = int(store.valid.sum())
    for block in store.plan.blocks:
        own = rows[:, start : start + block.r]
        F = own.T @ own / n
        F[np.diag_indices(block.r)] += damping * np.trace(F) / block.r
        found = found + queries[:, start : start + block.r] @ np.linalg.solve(F, own.T)
        start += block.r
    found[~asked.valid.numpy()] = np.nan
    found[:, ~store.valid.numpy()] = np.nan
    return found


def near(found, truth):
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-3 * np.nanmax(np.abs(truth)))


def read(path):
    """(ids, numbers [n, w]) of a file."""
    if path.suffix == ".npy":
        return None, np.load(path)
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            _, *lines = csv.reader(file)
        return [line[0] for line in lines], np.array(
            [[float(v) if v else np.nan for v in line[1:]] for line in lines]
        )
    import pyarrow
    from pyarrow import parquet

    table = (
        parquet.read_table(path)
        if path.suffix == ".parquet"
        else pyarrow.ipc.open_file(path).read_all()
    )
    return table["id"].to_pylist(), np.array(table[table.column_names[1]].to_pylist())


@pytest.mark.parametrize("ending", ["csv", "parquet", "arrow", "npy"])
def test_files(ok, run, tmp_path, ending):
    """Rows and scores as every kind of file, with their ids; an existing file is replaced."""
    if ending in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    to = tmp_path / "out" / f"found.{ending}"
    to.parent.mkdir()
    for what, command, truth in (
        ("train", ["export", run / "train"], RowStore.load(run / "train").rows.numpy()),
        ("queries", ["score", run], true_scores(run)),
        ("train", ["self", run], None),
    ):
        ok(*command, "--to", to)
        ids, numbers = read(to)
        store = RowStore.load(run / what)
        known = store.ids if isinstance(store.ids, list) else store.ids.tolist()
        if ids is not None:
            assert list(map(str, ids)) == list(map(str, known))
        if command[0] == "export":
            assert (numbers.astype(np.float32) == truth).all()
        elif command[0] == "score":
            near(numbers, truth)
        else:
            own = dropinf.self_influence(store, dropinf.solvers.Cholesky().fit(store))
            assert numbers.size == len(store)
            np.testing.assert_allclose(numbers.reshape(-1), own.numpy(), rtol=1e-6)
    assert [p.name for p in to.parent.iterdir()] == [to.name]


@pytest.mark.parametrize("command", ["score", "topk", "self", "export"])
def test_a_package_that_is_missing_is_known_at_once(dropinf_, tmp_path, monkeypatch, command):
    """Before anything is read or computed."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, out, err = dropinf_(command, tmp_path / "none", "--to", tmp_path / "out.parquet")
    assert (code, out) == (2, "")
    said = one_sentence(f"dropinf {command}", err)
    assert said == "a .parquet file needs pyarrow: pip install 'dropinf[arrow]'"


def test_topk(ok, run, tmp_path):
    truth = true_scores(run)
    store, asked = RowStore.load(run / "train"), RowStore.load(run / "queries")
    known = store.ids if isinstance(store.ids, list) else store.ids.tolist()
    found = one_object(ok("topk", run, "-k", 3, "--json"))
    assert len(found["queries"]) == 5 and found["facts"]["solver"].startswith("Cholesky(")
    for q, one in enumerate(found["queries"]):
        if not asked.valid[q]:
            assert all(pair == {"example": None, "score": None} for pair in one["top"])
            continue
        order = [i for i in np.argsort(-truth[q]) if not np.isnan(truth[q, i])]
        for side, wanted in (("top", order[:3]), ("bottom", order[::-1][:3])):
            assert [pair["example"] for pair in one[side]] == [known[i] for i in wanted]
            near([pair["score"] for pair in one[side]], truth[q, wanted])
    printed = ok("topk", run, "-k", 2, "--to", tmp_path / "found.csv")
    assert "not divided by n" in printed and f"{known[0]}" in printed
    assert (tmp_path / "found.csv").read_text().count("\n") == 1 + 5 * 2 * 2
    ok("topk", run, "--to", tmp_path / "found.html")
    assert "<table>" in (tmp_path / "found.html").read_text()
    assert len(one_object(ok("topk", run, "-k", 99, "--json"))["queries"][0]["top"]) >= 29


def test_self(ok, run):
    truth = [pair["self_influence"] for pair in one_object(ok("self", run, "--json"))["largest"]]
    assert truth == sorted(truth, reverse=True) and len(truth) == 20
    assert ok("self", run, "-k", 2).count("\n") == 3


def test_a_saved_solver_is_used(ok, dropinf_, run):
    """And another one where options ask for it."""
    ok("fit", run, "--damping", 0.5)
    near(scores_of(ok, run), true_scores(run, 0.5))
    near(scores_of(ok, run, "--damping", 0.02), true_scores(run, 0.02))
    near(scores_of(ok, run, "--kind", "Eigen"), true_scores(run, 0.1))
    code, _, err = dropinf_("fit", run)
    assert code == 2 and "exists; remove it" in one_sentence("dropinf fit", err)
    code, _, err = dropinf_("fit", run, "--kind", "Eigen", "--solver", run / "other")
    assert code == 2 and "Eigen cannot be saved" in one_sentence("dropinf fit", err)
    assert not (run / "other").exists()


def scores_of(ok, run, *options):
    ok("score", run, "--to", run / "scores.npy", *options)
    return np.load(run / "scores.npy")


def test_info(ok, run):
    found = one_object(ok("info", run, "--json"))
    assert found[str(run / "train")]["rows"] == 30 and found[str(run / "queries")]["rows"] == 5
    assert found[str(run / "plan.json")]["width"] == 40
    ok("fit", run, "--damping", 0.3)
    solver = one_object(ok("info", run / "solver", "--json"))[str(run / "solver")]
    assert (solver["kind"], solver["damping"]) == ("Cholesky", 0.3)
    assert solver["rows"] == int(RowStore.load(run / "train").valid.sum())
    printed = ok("info", run)
    assert "Dropout(r=20)" in printed and str(run / "solver") in printed


def test_join(ok, dropinf_, tmp_path):
    first, second = (make_run(tmp_path / str(i), ids=lambda j, i=i: 100 * i + j) for i in (0, 1))
    ok("join", first / "train", second / "train", "--to", tmp_path / "all")
    joint = RowStore.load(tmp_path / "all")
    assert joint.ids.tolist() == [*range(30), *range(100, 130)]
    parts = [RowStore.load(one / "train").rows for one in (first, second)]
    assert torch.equal(joint.rows, torch.cat(parts))
    for stores, said in (
        ([first / "train", first / "train"], "id 0 is in two of the stores"),
        ([first / "train", make_run(tmp_path / "r", r=9) / "train"], "store 1 has other plan than"),
    ):
        code, _, err = dropinf_("join", *stores, "--to", tmp_path / "none")
        assert code == 2 and said in one_sentence("dropinf join", err)
    code, _, err = dropinf_("join", first / "train", "--to", tmp_path / "all")
    assert code == 2 and "exists; remove it" in one_sentence("dropinf join", err)
    assert not (tmp_path / "none").exists()


def flip(file, at):
    text = bytearray(file.read_bytes())
    text[at] ^= 1
    file.write_bytes(text)


@pytest.mark.parametrize(
    "file", ["train/part-000000/rows.bin", "train/store.json", "plan.json", "solver/factors.bin"]
)
def test_damage(dropinf_, ok, tmp_path, file):
    """verify ends with 1, and says which file."""
    run = make_run(tmp_path / "run")
    ok("fit", run)
    assert ok("verify", run).count("every checksum is right") == 4
    flip(run / file, 100)
    code, out, err = dropinf_("verify", run)
    sentence = one_sentence("dropinf verify", err)
    assert code == 1 and out == "" and "damaged" in sentence and str(run / file) in sentence
    if file.startswith("train"):
        code, _, err = dropinf_("topk", run)
        assert code == 1 and "damaged" in one_sentence("dropinf topk", err.splitlines(True)[-1])


def test_wrong_directories(dropinf_, ok, tmp_path):
    """One sentence and code 2, and nothing is written."""
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=1)
    narrow = make_run(tmp_path / "narrow", r=9)
    ok("fit", other)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    to = tmp_path / "to.csv"
    for arguments, said in (
        (["topk", tmp_path / "none"], "there are no query rows at"),
        (["topk", run, "--queries", narrow / "queries"], "the queries were made under plan"),
        (["topk", run, "--queries", other / "queries"], "the queries were made with weights"),
        (["topk", run, "--solver", other / "solver"], "the solver was fitted on"),
        (["score", run, "--to", to, "--queries", other / "queries"], "the queries were made with"),
        (["score", run, "--to", tmp_path / "to.xlsx"], "--to must be a file of .csv, .parquet"),
        (["score", run, "--to", tmp_path / "file" / "to.csv"], "there is no directory "),
        (["topk", run, "--kind", "Best"], "--kind must be one of Cholesky, Eigen"),
        (["topk", run, "--kind", "Identity", "--damping", 1], "Identity inverts nothing and takes"),
        (["fit", run, "--damping", -1], "Cholesky: damping must be"),
        (["fit", tmp_path / "empty"], "there are no training rows at"),
        (["export", tmp_path / "file", "--to", to], "RowStore.load: "),
        (["export", run / "solver", "--to", to], "RowStore.load: "),
        (["info", tmp_path / "empty"], f"{tmp_path / 'empty'} is no run, store, solver or plan"),
        (["verify", tmp_path / "none"], "there is no "),
    ):
        code, out, err = dropinf_(*arguments)
        last = one_sentence(f"dropinf {arguments[0]}", err.splitlines(True)[-1])
        assert code == 2 and out == "" and said in last, (arguments, err)
    assert not to.exists() and not (run / "solver").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["run", "other", "narrow", "file", "empty"]
    )
    ok("topk", run, "--queries", other / "queries", "--weights", "any")


def test_rows_that_are_not_finished(dropinf_, tmp_path):
    """They are scored as far as they go, and that is said."""
    net = model()
    plan = dropinf.Plan.make(net, dropinf.Dropout(r=20))

    def broken():
        for i, batch in enumerate(loader(30, 1)):
            if i == 2:
                raise OSError
            yield batch

    make_run(tmp_path / "run")
    with pytest.raises(OSError), pytest.warns(UserWarning):
        dropinf.collect(net, broken(), loss_fn, plan, tmp_path / "part", progress=False)
    code, _, err = dropinf_("topk", tmp_path / "run", "--train", tmp_path / "part", "--quiet")
    assert code == 0 and "is not finished; these are its first 14 rows" in err


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 24 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=24k", "none"]
    if subprocess.run(["mount", *options, disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "RUN/train", "--to", "DISK/rows.csv"],
        ["export", "RUN/train", "--to", "DISK/rows.npy"],
        ["export", "RUN/train", "--to", "DISK/rows.parquet"],
        ["export", "RUN/train", "--to", "DISK/rows.arrow"],
        ["fit", "RUN", "--solver", "DISK/solver"],
        ["join", "RUN/train", "--to", "DISK/rows"],
    ],
    ids=lambda arguments: arguments[-1].removeprefix("DISK/"),
)
def test_a_full_disk(dropinf_, tmp_path, small_disk, arguments):
    """Code 1, one sentence, and nothing half-written."""
    if arguments[-1].endswith(("parquet", "arrow")):
        pytest.importorskip("pyarrow")
    run = make_run(tmp_path / "run", r=400)
    small_disk.joinpath("filler").write_bytes(bytes(20 << 10))
    places = {"RUN": run, "DISK": small_disk}
    given = [
        x.replace("RUN", str(places["RUN"])).replace("DISK", str(small_disk)) for x in arguments
    ]
    code, out, err = dropinf_(*given, "--quiet")
    sentence = one_sentence(f"dropinf {arguments[0]}", err)
    assert code == 1 and out == "" and "No space left on device" in sentence, errno.ENOSPC
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


@pytest.fixture
def watched(monkeypatch):
    """A terminal, on which bars appear at once."""
    monkeypatch.setattr(terminal.Terminal, "progress", property(lambda self: not self.quiet))
    monkeypatch.setattr(terminal, "_DELAY", 0)


def test_bars(dropinf_, watched, run, tmp_path):
    """Rows done, and the time left, of each command that reads a store; none with --quiet."""
    for arguments, bars in (
        (["fit", run], ["fit"]),
        (["score", run, "--to", tmp_path / "scores.npy"], ["score"]),
        (["score", run, "--to", tmp_path / "scores.npy", "--damping", 1], ["fit", "score"]),
        (["topk", run], ["topk"]),
        (["self", run], ["self"]),
        (["verify", run], [f"verify {run / 'train'}", f"verify {run / 'queries'}"]),
        (["join", run / "train", "--to", tmp_path / "joint"], ["join"]),
        (["export", run / "train", "--to", tmp_path / "rows.npy"], ["export"]),
    ):
        code, _, err = dropinf_(*arguments)
        assert code == 0, err
        for bar in bars:
            assert re.search(rf"{re.escape(bar)}: +0%\|.*\| 0/\d+ \[.*<", err), (bar, err)
    code, _, err = dropinf_("self", run, "--quiet")
    assert code == 0 and err == ""


def test_no_bars_beside_a_terminal(dropinf_, monkeypatch, run):
    monkeypatch.setattr(terminal, "_DELAY", 0)
    assert "%" not in dropinf_("self", run)[2]


def test_a_pass_inside_of_a_pass_has_no_bar_of_its_own(run):
    seen = []

    @contextlib.contextmanager
    def watch(num_rows):
        seen.append([num_rows])
        yield seen[-1].append

    store = RowStore.load(run / "train")
    with passes_watched(watch):
        for _ in store.chunks():
            for _ in store.chunks():
                pass
        next(store.chunks())  # one that is left early
        store.verify()
    assert seen == [[30, 30], [30], [30, 30]]
    for _ in store.chunks():
        pass
    assert len(seen) == 3


def test_files_that_are_no_stores(dropinf_, run, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a"}\n' * 9)
    for command in ("info", "verify"):
        code, out, err = dropinf_(command, data)
        assert code == 2 and out == ""
        assert one_sentence(f"dropinf {command}", err).startswith(f"{data} is a file, and no plan;")
    (tmp_path / "a plan").write_bytes((run / "plan.json").read_bytes())
    assert dropinf_("info", tmp_path / "a plan")[0] == 0
    whole = (run / "plan.json").read_bytes()
    (tmp_path / "a plan").write_bytes(whole[:9] + b"x" + whole[10:])
    code, _, err = dropinf_("info", tmp_path / "a plan")
    assert code == 1 and "is damaged" in one_sentence("dropinf info", err)


def test_the_file_of_a_job_is_no_run(dropinf_, run, tmp_path):
    """But it names the directory of its run."""
    job = tmp_path / "job.toml"
    Job.of(train="train.jsonl", out=str(run)).save(job)
    for command, *options in (
        *(["fit"], ["score", "--to", tmp_path / "to.csv"], ["topk"], ["self"]),
        *(["info"], ["verify"]),
    ):
        code, out, err = dropinf_(command, job, *options)
        assert code == 2 and out == ""
        said = f"{job} is a job's file; give the directory of its run, {run}"
        assert one_sentence(f"dropinf {command}", err) == said
    assert not (tmp_path / "to.csv").exists() and not (run / "solver").exists()


def test_a_directory_that_is_not_there(dropinf_, run, tmp_path):
    """It is not made for a name that may be a slip, and nothing is computed first."""
    for command in ("score", "topk", "self"):
        code, out, err = dropinf_(command, run, "--to", tmp_path / "none" / "x.csv")
        assert code == 2 and out == ""
        said = (
            f"there is no directory {tmp_path / 'none'} to write in; make it, or name another file"
        )
        assert one_sentence(f"dropinf {command}", err).startswith(said)
    assert not (tmp_path / "none").exists()
