"""Commands that run a model: from a directory and a file to a report; what ends them early."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from cli_runs import one_object, one_sentence, started

pytest.importorskip("typer")
pytest.importorskip("jinja2")
pytest.importorskip("transformers", minversion="5")

from job_models import VOCABULARY, gpt2, lines, saved, sentences

import dropinf
from dropinf import Plan, RowStore
from dropinf.jobs import Job, prepare


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A directory of a model, train.jsonl and queries.jsonl."""
    path = tmp_path_factory.mktemp("given")
    gpt2(path / "model")
    lines(path / "train.jsonl", [{"text": text} for text in sentences(40)])
    lines(path / "queries.jsonl", [{"text": text} for text in sentences(3, seed=1)])
    return path


@pytest.fixture
def here(given, tmp_path, monkeypatch):
    """A working directory with those."""
    for name in ("model", "train.jsonl", "queries.jsonl"):
        os.symlink(given / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_hand(r=1024, **job):
    """The rows that a job in Python has."""
    job = Job.of(model="model", train="train.jsonl", queries="queries.jsonl", r=r, **job)
    ready = prepare(job)
    plan = job.plan(ready.model)
    return [
        dropinf.collect(ready.model, of.loader, ready.loss_fn, plan, ids=of.ids, progress=False)
        for of in (ready.train, ready.queries)
    ]


def test_three_commands(ok, here):
    """A report of a model's directory and two files; its best examples are those of Python."""
    ok("init", "model", "--train", "train.jsonl", "--queries", "queries.jsonl", "--r", 50)
    found = one_object(ok("collect", "job.toml", "--json"))
    assert (found["train"], found["queries"]) == (40, 3)
    printed = ok("report", "job.toml")
    assert printed.startswith("dropinf-run/report.html: ")
    run = here / "dropinf-run"
    names = {"plan.json", "train", "queries", "solver", "job.toml", "report.html"}
    assert {path.name for path in run.iterdir()} == names
    store, asked = by_hand(50)
    assert torch.equal(RowStore.load(run / "train").rows, store.rows)
    assert torch.equal(RowStore.load(run / "queries").rows, asked.rows)
    solver = dropinf.solvers.Cholesky().fit(store)
    truth = dropinf.topk(asked, store, solver, 2, ids=True)[1].tolist()
    told = one_object(ok("topk", run, "-k", 2, "--json"))
    assert [[one["example"] for one in query["top"]] for query in told["queries"]] == truth
    page = (run / "report.html").read_text("utf-8")
    texts = sentences(40)
    for q, text in enumerate(sentences(3, seed=1)):
        assert text in page and all(texts[i] in page for i in truth[q])
    kept = Job.load("dropinf-run/job.toml")
    assert kept.r == 50 and os.path.samefile(kept.train, "train.jsonl")


def examples_of(page):
    """Those that a report shows."""
    text = page.read_text("utf-8")
    data = re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", text, re.S)[1]
    for query in json.loads(data)["queries"]:
        assert len(query["top"]) == len(query["bottom"]) == 3
        yield from query["top"] + query["bottom"]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokens_are_shaded(ok, here, kind):
    """Their parts add up to the score; GPT-2's layers flatten positions."""
    config = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes = {"intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0}
    llama = ("LlamaForCausalLM", "LlamaConfig")
    saved(here / "llama", *llama, vocab_size=len(VOCABULARY), **config, **sizes)
    data = ["--train", "train.jsonl", "--queries", "queries.jsonl"]
    ok("collect", {"gpt2": "model", "llama": "llama"}[kind], *data, "--r", 30)
    ok("report", "dropinf-run", "-k", 3)
    texts = sentences(40)
    for example in examples_of(here / "dropinf-run" / "report.html"):
        tokens, parts = zip(*example["tokens"], strict=True)
        assert "".join(tokens) == texts[example["id"]]
        size = sum(map(abs, parts))
        assert abs(sum(parts) - example["score"]) <= 1e-5 * size and len(set(parts)) > 1


def test_tokens_are_not_shaded_by_other_weights(dropinf_, ok, here):
    """The model's directory may hold another checkpoint by now."""
    gpt2(here / "changing")
    data = ["--train", "train.jsonl", "--queries", "queries.jsonl"]
    ok("collect", "changing", *data, "--r", 30)
    model = prepare(Job.load("dropinf-run/job.toml")).model
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    model.save_pretrained(here / "changing")
    code, _, said = dropinf_("report", "dropinf-run", "-k", 3)
    assert code == 0 and "texts are not shaded by token: the model has other weights" in said
    page = here / "dropinf-run" / "report.html"
    assert all(example["tokens"] is None for example in examples_of(page))


def test_options_in_place_of_a_file(ok, here):
    """And over what it says; the run keeps the job as it ran."""
    ok("init", "model", "--train", "train.jsonl", "--r", 50, "--to", "other.toml")
    ok("collect", "other.toml", "--r", 30, "--queries", "queries.jsonl", "--out", "first", "-q")
    flags = ["--train", "train.jsonl", "--queries", "queries.jsonl", "--text", "text"]
    ok("collect", "model", *flags, "--r", 30, "--out", "second", "--quiet")
    first, second = (RowStore.load(here / name / "train") for name in ("first", "second"))
    assert first.plan.fingerprint == second.plan.fingerprint and first.plan.blocks[0].r == 30
    assert torch.equal(first.rows, second.rows)
    kept = Job.load("first/job.toml")
    assert kept.r == 30 and os.path.samefile(kept.model, "model") and kept.out == "first"
    ok(
        "collect",
        "model",
        *flags,
        "--include",
        "*.mlp.*",
        "--include",
        "*.ln_f.*",
        "--out",
        "third",
    )
    names = [block.name for block in RowStore.load("third/train").plan.blocks]
    assert len(names) == 5 and all("mlp" in name or "ln_f" in name for name in names)


def test_without_queries(dropinf_, here):
    """The examples of largest self-influence are asked about, which is said."""
    assert dropinf_("collect", "model", "--train", "train.jsonl", "--r", 30)[0] == 0
    code, out, err = dropinf_("report", "dropinf-run", "--json")
    assert code == 0 and one_object(out)["queries"] == 20
    assert "the 20 training examples of largest self-influence are asked about" in err
    assert not (here / "dropinf-run" / "queries").exists()


def test_a_report_is_of_the_job_that_was_collected(dropinf_, ok, here):
    """Another model, file or plan would stand beside scores that are not its own."""
    ok("collect", "model", "--train", "train.jsonl", "--queries", "queries.jsonl", "--r", 30)
    gpt2(here / "changed", seed=1)
    lines(here / "other.jsonl", [{"text": text} for text in sentences(40, seed=2)])
    for other, said in (
        (["changed", "--train", "train.jsonl", "--r", 30, "--out", "dropinf-run"], "[model] path"),
        (["dropinf-run", "--train", "other.jsonl"], "[data] train"),
        (["dropinf-run", "--queries", "other.jsonl"], "[data] queries"),
        (["dropinf-run", "--r", 31], "[plan] r"),
    ):
        sentence = wrong(dropinf_, "report", *other)
        assert sentence.startswith(f"the run in dropinf-run was begun with {said} = "), other
        assert sentence.endswith("; dropinf report dropinf-run is of what was collected")
    assert {path.name for path in (here / "dropinf-run").iterdir()} == {
        *("plan.json", "job.toml", "train", "queries")
    }
    ok("report", "dropinf-run", "--batch-size", 1)


def test_a_report_of_another_damping(ok, here):
    """It is fitted anew, and the run's own solver stays."""
    ok("collect", "model", "--train", "train.jsonl", "--queries", "queries.jsonl", "--r", 30)
    ok("report", "dropinf-run", "--damping", 5, "--to", "first.html")
    assert not (here / "dropinf-run" / "solver").exists()
    ok("fit", "dropinf-run")
    own = (here / "dropinf-run" / "solver" / "solver.json").read_bytes()
    ok("report", "dropinf-run", "--damping", 5, "--to", "second.html")
    ok("report", "dropinf-run")
    assert (here / "dropinf-run" / "solver" / "solver.json").read_bytes() == own
    for name, damping in (("first", 5), ("second", 5), ("dropinf-run/report", 0.1)):
        page = (here / f"{name}.html").read_text("utf-8")
        assert f"Cholesky(damping={float(damping)}" in page, name


@pytest.mark.more
def test_a_report_of_an_unfinished_run_saves_no_solver(dropinf_, slow, tmp_path):
    """Which the rows that follow would not fit."""
    process = started(*JOB, "--out", "run", "--quiet")
    rows = tmp_path / "run" / "train" / "part-000000" / "rows.bin"
    while not (rows.exists() and rows.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, process.stderr.read()
    code, _, err = dropinf_("report", "run", "--quiet")
    assert code == 0 and "not finished" in err
    assert not (tmp_path / "run" / "solver").exists()


def test_energies_and_plan(ok, here):
    """The plan that is there is the one that rows are collected under."""
    flags = ["model", "--train", "train.jsonl", "--r", 30, "--energies", 16]
    energies = one_object(ok("energies", *flags, "--json"))
    assert "transformer.h.0.attn.c_attn.weight" in energies and min(energies.values()) > 0
    assert not (here / "dropinf-run").exists()
    found = one_object(ok("plan", *flags, "--json"))
    plan = Plan.load("dropinf-run/plan.json")
    assert found["plan"] == plan.fingerprint and plan.compression.energies is not None
    assert sum(layer["r"] for layer in found["layers"]) == plan.width == found["width"]
    ok("collect", *flags)
    assert RowStore.load("dropinf-run/train").plan.fingerprint == plan.fingerprint


def test_stability(ok, dropinf_, here):
    """That of Python; every entry is kept at the largest size, where masks agree."""
    flags = ["model", "--train", "train.jsonl", "--queries", "queries.jsonl", "--seed", 5]
    sizes = ["--size", 500, "--size", 8]
    found = one_object(ok("stability", *flags, *sizes, "--masks", 2, "-k", 4, "--json"))
    ready = prepare(Job.of(model="model", train="train.jsonl", queries="queries.jsonl"))
    loaders = ready.train.loader, ready.queries.loader
    truth = dropinf.stability(
        *(ready.model, *loaders, ready.loss_fn, (8, 500), 2, 4),
        compression=dropinf.Dropout(r=1, seed=5),
        progress=False,
    )
    assert [one["size"] for one in found["sizes"]] == [8, 500] and found["smallest"] == 500
    assert [one["overlap"] for one in found["sizes"]] == [a.overlap for a in truth.agreements]
    assert found["sizes"][0]["overlap"] < 1 == found["sizes"][1]["overlap"]
    said = wrong(dropinf_, "stability", *flags[:3])
    assert said == "stability is of queries; name them with --queries"


def test_a_solver_that_is_not_saved(ok, here):
    flags = ["model", "--train", "train.jsonl", "--queries", "queries.jsonl", "--r", 30]
    ok("collect", *flags, "--solver-kind", "DataInf", "--damping", 0.2)
    ok("report", "dropinf-run")
    assert not (here / "dropinf-run" / "solver").exists()
    told = one_object(ok("topk", "dropinf-run", "--json"))
    assert told["facts"]["solver"].startswith("DataInf(damping=0.2")


def wrong(dropinf_, command, *arguments, code=2):
    """The sentence that a call ends with."""
    found, out, err = dropinf_(command, *arguments)
    assert (found, out) == (code, ""), err
    return one_sentence(f"dropinf {command}", err.splitlines(True)[-1])


def test_wrong_jobs(dropinf_, here):
    """One sentence and code 2, and no directory of a run."""
    lines(here / "empty.jsonl", [])
    (here / "broken.toml").write_text("[plan]\nr = 'many'\n")
    (here / "unknown.toml").write_text("[data]\ntrian = 'x'\n")
    gpt2(here / "bare")
    for file in (here / "bare").glob("*token*"):
        file.unlink()
    (here / "file").write_text("")
    data = ["--train", "train.jsonl"]
    for arguments, said in (
        (["model", *data, "--text", "body"], "train.jsonl, line 1 has no column 'body'"),
        (["model", "--train", "empty.jsonl"], "empty.jsonl holds no example"),
        (["model", "--train", "none.jsonl"], "there is no data file none.jsonl"),
        (["model"], "the job names no train"),
        ([], "the job names no model"),
        (["bare", *data], "bare has no tokenizer"),
        (["nowhere", *data], "there is no nowhere: no job's file, and no directory of a run or a"),
        (["none.toml"], "there is no job file none.toml"),
        (["broken.toml"], "broken.toml: [plan] r must be a whole number, got 'many'"),
        (["unknown.toml"], "unknown.toml: 'trian' is no key of [data]; did you mean 'train'?"),
        (["model", *data, "--adapter", "model"], "model is no adapter directory"),
        (["model", *data, "--r", "0"], "[plan] r must be a whole number from 1, got 0"),
        (["model", *data, "--compression", "Best"], "[plan] compression must be one of"),
        (["model", *data, "--device", "cuda:9"], "device 'cuda:9' cannot be used"),
        (["model", *data, "--include", "*.nothing"], "Plan.make: "),
        (["model", *data, "--entry", "x:y"], "the job has an entry"),
        (["--entry", "no_module:x"], "entry no_module:x cannot be imported"),
    ):
        assert wrong(dropinf_, "collect", *arguments).startswith(said), arguments
    for out in ("file", "file/run"):
        said = wrong(dropinf_, "collect", "bare", *data, "--out", out)  # whose tokenizer is missing
        assert said == "file is a file, and a run needs a directory; give another --out"
    assert wrong(dropinf_, "report", "none").startswith("there is no none: no job's file, and no ")
    assert wrong(dropinf_, "report", "model", *data).startswith("there are no training rows at")
    for name, said in (("train", "there is no none"), ("adapter", "there is no none (adapter)")):
        assert wrong(dropinf_, "init", "model", f"--{name}", "none").startswith(said)
    assert not (here / "dropinf-run").exists() and not (here / "job.toml").exists()


def test_what_is_there_stays(dropinf_, ok, here):
    """Without --resume; and with it, the job must be the run's."""
    flags = ["model", "--train", "train.jsonl"]
    ok("init", *flags)
    before = (here / "job.toml").read_bytes()
    assert wrong(dropinf_, "init", *flags).startswith("job.toml exists; remove it, or name another")
    assert (here / "job.toml").read_bytes() == before
    ok("plan", *flags, "--r", 30)
    assert wrong(dropinf_, "collect", *flags, "--r", 31).startswith(
        "dropinf-run/plan.json is the plan of another job or model (Dropout(r=30))"
    )
    gpt2(here / "wider", n_embd=24)
    assert "plan of another job" in wrong(dropinf_, "collect", "wider", *flags[1:], "--r", 30)
    assert not (here / "dropinf-run" / "train").exists()
    ok("collect", *flags, "--r", 30)
    rows = (here / "dropinf-run" / "train" / "part-000000" / "rows.bin").read_bytes()
    assert wrong(dropinf_, "collect", *flags, "--r", 30).startswith(
        "dropinf-run/train is there already; go on with it by --resume"
    )
    assert wrong(dropinf_, "collect", *flags, "--r", 31, "--resume").startswith(
        "the run in dropinf-run was begun with [plan] r = 30, and this job has 31"
    )
    gpt2(here / "model2", seed=1)
    said = wrong(dropinf_, "collect", "model2", *flags[1:], "--r", 30, "--resume")
    assert said.startswith("the run in dropinf-run was begun with [model] path = ")
    ok("collect", "dropinf-run", "--resume", "--queries", "queries.jsonl")  # which are new
    assert (here / "dropinf-run" / "train" / "part-000000" / "rows.bin").read_bytes() == rows
    assert len(RowStore.load("dropinf-run/queries")) == 3


def test_other_weights(dropinf_, ok, here):
    """Of a model that was changed in its directory since."""
    os.unlink(here / "model")
    gpt2(here / "model")
    flags = ["model", "--train", "train.jsonl", "--r", 30]
    ok("collect", *flags)
    gpt2(here / "model", seed=1)
    said = wrong(dropinf_, "collect", *flags, "--queries", "queries.jsonl", "--resume")
    assert said.startswith("collect: the rows in dropinf-run/train were made with weights ")
    assert not (here / "dropinf-run" / "queries").exists()


SLOW = """
import time, torch
from torch.utils.data import DataLoader, Dataset
from dropinf.rows import part_writer
part_writer._FLUSH_SECONDS = 0
class Examples(Dataset):
    def __len__(self): return 60
    def __getitem__(self, i):
        time.sleep(0.02)
        return torch.sin(torch.arange(5.0) * (i + 1))
def job():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    data = DataLoader(Examples(), 3)
    return model, data, data, lambda m, x: m(x).square().sum(1)
"""


JOB = ["collect", "--entry", "slow_job:job", "--r", "9"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of a job of 20 batches, 60 ms each."""
    path = tmp_path_factory.mktemp("whole")
    (path / "slow_job.py").write_text(SLOW)
    process = started(*JOB, "--out", "run", "--quiet", cwd=path)
    assert process.wait() == 0, process.stderr.read()
    return path / "run"


@pytest.fixture
def slow(whole, tmp_path, monkeypatch):
    """The working directory has the job."""
    (tmp_path / "slow_job.py").write_text(SLOW)
    monkeypatch.chdir(tmp_path)


def assert_same(run, whole):
    for name in ("train", "queries"):
        mine, theirs = (path / name / "part-000000" / "rows.bin" for path in (run, whole))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "number, code, queries",
    [
        (signal.SIGINT, 130, False),
        pytest.param(signal.SIGINT, 130, True, marks=pytest.mark.more),
        pytest.param(signal.SIGTERM, 143, False, marks=pytest.mark.more),
    ],
)
def test_signals(slow, whole, tmp_path, number, code, queries):
    """They leave rows that --resume goes on with, to the same bytes; nothing else is left."""
    process = started(*JOB, "--out", "run")
    place = tmp_path / "run" / ("queries" if queries else "train") / "part-000000" / "journal.jsonl"
    while not place.exists() or place.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code and out == "" and "Traceback" not in err
    if number == signal.SIGINT:
        said = err.splitlines()[-1]
        assert said == "dropinf collect: interrupted; the same command with --resume goes on"
    with pytest.warns(UserWarning, match="not finished"):
        assert 0 < len(RowStore.load(place.parent.parent)) < 60
    resumed = started(*JOB, "--out", "run", "--resume", "--quiet")
    assert resumed.wait() == 0 and resumed.stderr.read() == ""
    assert_same(tmp_path / "run", whole)
    left = {path.name for path in (tmp_path / "run").rglob("*")}
    assert left == {path.name for path in whole.rglob("*")}


def on_a_terminal(*arguments):
    """(stdout, what stands on a terminal)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "dropinf", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "TQDM_MININTERVAL": "0"},
    )
    os.close(theirs)
    told = b""
    with contextlib.suppress(OSError):  # when nobody holds the other end
        while more := os.read(ours, 1 << 12):
            told += more
    os.close(ours)
    out, _ = process.communicate()
    assert process.returncode == 0
    return out, told.decode()


@pytest.mark.more
def test_progress_is_on_a_terminal(slow):
    """On stderr, with the time that is left; beside one, or with --quiet, there is none."""
    out, err = on_a_terminal(*JOB, "--out", "run", "--json")
    assert one_object(out)["train"] == 60
    assert re.search(r"train: +\d+%.*/60 .*<00:0\d.*ex/s", err)
    assert on_a_terminal(*JOB, "--out", "quiet", "--json", "--quiet")[1] == ""
    process = started(*JOB, "--out", "piped")
    assert "%" not in process.communicate()[1]


@pytest.mark.more
def test_a_full_disk(slow, whole, tmp_path):
    """Code 1, one sentence last, and what is there can be gone on with."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "none"]
    if subprocess.run(["mount", *options, disk], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(32 << 10))
        process = started(*JOB, "--out", disk / "run", "--quiet")
        out, err = process.communicate()
        assert process.returncode == 1 and out == ""
        said = one_sentence("dropinf collect", err)
        assert said.startswith("No space left on device")
        assert said.endswith(
            "; make room, or write elsewhere; the same command with --resume goes on"
        )
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        resumed = started(*JOB, "--out", disk / "run", "--resume", "--quiet")
        assert resumed.wait() == 0, resumed.stderr.read()
        assert_same(disk / "run", whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def data_of(page):
    text = page.read_text("utf-8")
    return json.loads(re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", text, re.S)[1])


def test_a_report_with_truth(ok, dropinf_, here):
    """The AUC is that of the examples in the file's order, whatever the order of the rows."""
    texts, wrong_ones = sentences(40), {3, 8, 21, 30}
    rows = [{"text": text, "wrong": i in wrong_ones} for i, text in enumerate(texts)]
    lines(here / "marked.jsonl", rows)
    flags = ["--train", "marked.jsonl", "--queries", "queries.jsonl"]
    ok("collect", "model", *flags, "--r", 30)
    how = ["--truth", "wrong", "--dampings", "0.1,1,10", "--json"]
    found = one_object(ok("report", "dropinf-run", *how))
    data = data_of(here / "dropinf-run" / "report.html")
    marked = zip(data["suspicious"]["ids"], data["suspicious"]["truth"], strict=True)
    assert {i for i, truth in marked if truth} == wrong_ones
    store, asked = (RowStore.load(f"dropinf-run/{name}") for name in ("train", "queries"))
    for damping, worth in found["dampings"].items():
        solver = dropinf.solvers.Cholesky(float(damping)).fit(store)
        low = dict(
            zip(store.ids.tolist(), (-dropinf.scores(asked, store, solver).mean(0)).tolist())
        )
        pairs = [(low[i], low[j]) for i in wrong_ones for j in set(range(40)) - wrong_ones]
        auc = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        assert abs(worth - auc) < 0.02, damping
    assert found["chosen damping"] in (0.1, 1, 10)
    tables = {table["title"]: dict(table["rows"]) for table in data["tables"] if table.get("rows")}
    assert tables["Finding what is wrong"]["known to be wrong"] == "4 of 40"
    assert "Damping" in {chart["title"] for chart in data["charts"]}
    lines(here / "marked.jsonl", [*rows[:2], {"text": texts[2], "wrong": "perhaps"}, *rows[3:]])
    said = wrong(dropinf_, "report", "dropinf-run", "--truth", "wrong")
    assert said == (
        "marked.jsonl, line 3: column 'wrong' must be true or false, or 1 or 0, got 'perhaps'"
    )


def test_a_report_with_other_masks(ok, dropinf_, here):
    """Dampings by what the rows can tell, and stability over sizes, as in Python."""
    ok("collect", "model", "--train", "train.jsonl", "--queries", "queries.jsonl", "--r", 30)
    how = ["--dampings", "0.1,1", "--stability", "8,16", "-k", 4, "--json"]
    found = one_object(ok("report", "dropinf-run", *how))
    store, asked = by_hand(30)
    part = asked, store, dropinf.solvers.Cholesky().fit(store)
    with pytest.warns(UserWarning, match="at the end"):
        truth = dropinf.choose_damping([0.1, 1.0], [part])
    assert found["dampings"].keys() == {"0.1", "1.0"} and found["chosen damping"] == truth.damping
    for mine, its in zip(found["dampings"].values(), truth.values.tolist(), strict=True):
        assert abs(mine - its) < 1e-3
    data = data_of(here / "dropinf-run" / "report.html")
    (table,) = [one for one in data["tables"] if one["title"] == "Stability over masks"]
    assert [row[0] for row in table["rows"]] == ["8", "16"]
    for options, said in (
        (["--dampings", "0.1,much"], "--dampings must be positive numbers with commas"),
        (["--stability", "0"], "--stability must be positive numbers with commas"),
        (["--dampings", "1", "--solver-kind", "Diagonal"], "--dampings tries those of Cholesky"),
    ):
        assert wrong(dropinf_, "report", "dropinf-run", *options).startswith(said)


def test_cut_weights(dropinf_, here, capsys):
    """What is damaged is a failure, not a wrong call."""
    gpt2(here / "cut")
    (file,) = (here / "cut").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])
    capsys.readouterr()
    code, out, err = dropinf_("collect", "cut", "--train", "train.jsonl")
    assert code == 1 and out == ""
    said = one_sentence("dropinf collect", err)
    assert said.startswith("the weights in cut are damaged: ") and said.endswith("save them again")
    assert not (here / "dropinf-run").exists()
