"""RowStore: parts, ids, joining, pickling; readers beside a writer; what is damaged or hostile."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch
from survival_cases import tensors
from torch import nn
from torch.utils.data import DataLoader

import dropinf.rows.part_files
from dropinf import Dropout, Full, Plan, RowStore, collect, scores, self_influence, topk
from dropinf.manifest import sealed
from dropinf.rows import RowWriter
from dropinf.solvers import Cholesky, Identity
from dropinf.whole_files import appearing

PLAN = Plan.make(nn.Linear(6, 1, bias=False), Full())


def rows_of(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def losses(net, batch):
    return net(batch[0]).square().sum(1)


def gather(model, path=None, n=12, **options):
    plan = Plan.make(model, Dropout(r=8))
    loader = DataLoader(tensors(n), 4)
    return collect(model, loader, losses, plan, path, progress=False, check=False, **options)


@pytest.mark.parametrize("on_disk", [False, True])
def test_append(tmp_path, on_disk):
    rows, valid = rows_of(9), torch.ones(9, dtype=torch.bool)
    valid[[1, 6]] = False
    store = RowStore(rows[:4].clone(), PLAN, valid[:4].clone(), ids=["a", "b", "c", "d"])
    if on_disk:
        store.save(tmp_path / "rows")
        store = RowStore.load(tmp_path / "rows")
    store.append(rows[4:7], ["e", "f", "g"], valid[4:7])
    store.append(rows[7:], ids=["h", "i"])
    found = [store]
    if on_disk:
        found.append(RowStore.load(tmp_path / "rows"))
        names = sorted(p.name for p in (tmp_path / "rows").iterdir())
        assert names == ["part-000000", "part-000001", "part-000002", "plan.json", "store.json"]
    found.append(pickle.loads(pickle.dumps(store)))
    for each in found:
        assert torch.equal(each.rows, rows) and torch.equal(each.valid, valid)
        assert each.ids == list("abcdefghi") and len(each) == 9 and each.num_bytes == 9 * 24
        assert torch.equal(torch.cat([chunk for _, chunk in each.chunks()]), rows)
        assert [start for start, _ in each.chunks()] == [0, 4, 7]
        assert torch.equal(each.at([8, 0, 5, 5]), rows[[8, 0, 5, 5]])
        some = each[["i", "b"]]
        assert torch.equal(some.rows, rows[[8, 1]]) and some.ids == ["i", "b"]
        assert some.valid.tolist() == [True, False]
        each.verify()
    with pytest.raises(ValueError, match="has rows of id 'c' already"):
        store.append(rows[:1], ["c"])
    with pytest.raises(ValueError, match="has rows of id 'x' already"):
        store.append(rows[:2], ["x", "x"])
    for bad in ({"ids": None}, {"ids": [1]}, {"ids": ["x"], "origin": [[0, 0]]}):
        with pytest.raises(ValueError, match=r"append: rows must be of \(dtype, ids, origin\)"):
            store.append(rows[:1], **bad)
    with pytest.raises(ValueError, match=r"append: rows must be of"):
        store.append(rows[:1].double(), ["x"])
    with pytest.raises(ValueError, match="append: ids must have one for each of 2 rows"):
        store.append(rows[:2], ["x"])
    with pytest.raises(ValueError, match="append: row 0 is not finite"):
        store.append(rows[:1] * torch.nan, ["x"])
    assert len(store) == 9


def test_join(tmp_path):
    a, b, c = (rows_of(n, n) for n in (3, 4, 2))
    on_disk = RowStore(a, PLAN, ids=[5, 3, 9])
    on_disk.save(tmp_path / "a")
    on_disk = RowStore.load(tmp_path / "a")
    other = RowStore(b, PLAN, ids=torch.arange(100, 104))
    other.valid[1] = False
    joint = RowStore.join([on_disk, other])
    joint.save(tmp_path / "joint")
    for each in (joint, RowStore.load(tmp_path / "joint"), pickle.loads(pickle.dumps(joint))):
        assert torch.equal(each.rows, torch.cat([a, b]))
        assert each.ids.tolist() == [5, 3, 9, 100, 101, 102, 103]
        assert (~each.valid).nonzero().flatten().tolist() == [4]
        assert torch.equal(each[[101, 9]].rows, torch.stack([b[1], a[2]]))
    queries = RowStore(c, PLAN)
    solver = Cholesky().fit(joint)
    plain = RowStore(torch.cat([a, b]), PLAN, joint.valid)
    expected = scores(queries, plain, Cholesky().fit(plain))
    torch.testing.assert_close(scores(queries, joint, solver), expected, equal_nan=True)
    _, ids = topk(queries, joint, solver, 3, ids=True)
    indices = topk(queries, joint, solver, 3)[1]
    assert torch.equal(ids, joint.ids[indices])
    with pytest.raises(ValueError, match="id 9 is in two of the stores"):
        RowStore.join([joint, RowStore(c, PLAN, ids=[9, 8])])
    with pytest.raises(ValueError, match="store 1 has other ids than the first one"):
        RowStore.join([joint, queries])
    with pytest.raises(ValueError, match="store 1 has other dtype than the first one"):
        RowStore.join([queries, RowStore(c.double(), PLAN)])
    with pytest.raises(ValueError, match="store 1 has other plan than the first one"):
        RowStore.join([queries, RowStore(c, Plan.make(nn.Linear(7, 1), Dropout(r=6)))])
    with pytest.raises(ValueError, match="no stores were given"):
        RowStore.join([])
    with pytest.raises(FileExistsError, match=r"save: .*joint exists"):
        joint.save(tmp_path / "joint")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "joint"]


def test_topk_of_strings():
    store = RowStore(rows_of(4), PLAN, ids=["a", "b", "c", "d"])
    queries = RowStore(rows_of(2, 1), PLAN)
    queries.valid[1] = False
    _, ids = topk(queries, store, Identity().fit(store), 2, ids=True)
    _, indices = topk(queries, store, Identity().fit(store), 2)
    assert ids == [["abcd"[i] for i in indices[0]], [None, None]]


def test_pickled_by_its_path(tmp_path, monkeypatch):
    store = gather(net(), tmp_path / "rows", n=400)
    store.valid[3] = False
    data = pickle.dumps(store)
    assert len(data) < 2000 < store.num_bytes
    again = pickle.loads(data)
    assert torch.equal(again.rows, store.rows) and torch.equal(again.valid, store.valid)
    assert again.weights == store.weights and again.plan.fingerprint == store.plan.fingerprint


def test_a_reader_beside_a_writer(tmp_path, monkeypatch):
    monkeypatch.setattr("dropinf.rows.part_writer._FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 4 * 24)
    rows, seen = rows_of(21), []
    with RowWriter(PLAN, tmp_path / "rows") as writer:
        for start in range(0, 21, 3):
            monkeypatch.setattr(
                "dropinf.rows.part_writer._FLUSH_SECONDS", 0.0 if start % 2 or not start else 1e9
            )
            batch = rows[start : start + 3]
            writer.append(batch, torch.ones(3, dtype=torch.bool), ids=torch.arange(3) + start)
            with pytest.warns(UserWarning, match="is not finished"):
                store = RowStore.load(tmp_path / "rows")
            n = len(store)
            assert not store.finished and "so far" in repr(store)
            assert torch.equal(store.rows, rows[:n]) and store.ids.tolist() == list(range(n))
            seen.append((store, n))
        done = writer.finish()
    assert [n for _, n in seen] == [3, 6, 6, 12, 12, 18, 18] and done.finished
    for store, n in seen:  # what was open stays as it was
        assert torch.equal(store.rows, rows[:n])
    early = pickle.loads(pickle.dumps(seen[1][0]))
    assert torch.equal(early.rows, rows[:6]) and early.ids.tolist() == list(range(6))


def test_damage_is_found_by_whoever_reads_it_first(tmp_path, monkeypatch):
    """One row, and chunks that are read some at a time: nothing is taken unverified."""
    monkeypatch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 4 * 24)
    rows = rows_of(22)
    RowStore(rows, PLAN).save(tmp_path / "rows")
    file = tmp_path / "rows" / "part-000000" / "rows.bin"
    content = bytearray(file.read_bytes())
    content[24 * 9 + 5] ^= 4  # in the third chunk, of rows 8 to 11
    file.write_bytes(content)
    queries, store = RowStore(rows_of(2, 1), PLAN), RowStore.load(tmp_path / "rows")
    assert torch.equal(store.at([7, 12]), rows[[7, 12]])
    solver = Identity().fit(store)
    for read in (
        lambda: store.at([7, 10]),
        lambda: store[[10]],
        lambda: store.rows,
        lambda: list(store.chunks()),
        lambda: list(store.kept()),
        lambda: topk(queries, store, solver, 3),
        store.verify,
    ):
        with pytest.raises(ValueError, match="damaged in rows 8 to 11"):
            read()


def test_what_lies_beside_survives(tmp_path):
    """Whatever names the user's own files have, they stay as they are."""
    for name in ("rows.partial", "rows.tmp", ".rows", "solver.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    store = gather(net(), tmp_path / "rows")
    store.save(tmp_path / "copy")
    store.plan.save(tmp_path / "plan")
    (tmp_path / "plan.partial").write_text("mine")
    store.plan.save(tmp_path / "plan")
    Cholesky().fit(store).save(tmp_path / "solver")
    assert (tmp_path / "plan.partial").read_text() == "mine"
    files = sorted(p.name for p in tmp_path.iterdir())
    made = ["copy", "plan", "plan.partial", "rows", "solver"]
    assert files == sorted(["rows.partial", "rows.tmp", ".rows", "solver.partial", *made])
    for taken in ("rows.partial", "rows"):
        before = sorted(p for p in (tmp_path / taken).rglob("*"))
        with pytest.raises(FileExistsError, match="exists"):
            gather(net(), tmp_path / taken)
        with pytest.raises(FileExistsError, match="exists"):
            store.save(tmp_path / taken)
        assert before == sorted(p for p in (tmp_path / taken).rglob("*"))
    with pytest.raises(FileExistsError, match="holds no store"):
        gather(net(), tmp_path / "rows.partial", resume=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="link exists"):
        gather(net(), tmp_path / "link")
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o777 & ~umask


def killed_while_it_saves(path, begun):
    with appearing(path) as new:
        new.mkdir()
        (new / "half").write_text("of a store")
        begun.set()
        time.sleep(60)


def test_what_killed_processes_left_goes(tmp_path):
    """With the next of that name; what lives, is of another name or host, or the user's stays."""
    path, processes = tmp_path / "rows", multiprocessing.get_context("forkserver")
    begun = [processes.Event() for _ in range(2)]
    living, killed = (
        processes.Process(target=killed_while_it_saves, args=(path, one)) for one in begun
    )
    for process in (living, killed):
        process.start()
    assert all(one.wait(60) for one in begun)
    both = set(tmp_path.iterdir())
    assert len(both) == 2
    killed.kill()
    killed.join()
    (gone,) = (p for p in both if f"-{killed.pid}-" in p.name)
    kept = set()
    for name in (
        gone.name.replace(".rows-", ".other-"),
        gone.name[:-9],
        gone.name[:-1],
        gone.name + "x",
        gone.name.replace(f"-{killed.pid}-", f"-elsewhere-{killed.pid}-"),
        ".rows-mine",
    ):
        (tmp_path / name).mkdir()
        kept.add(tmp_path / name)
    RowStore(rows_of(3), PLAN).save(path)
    assert set(tmp_path.iterdir()) == {path, *kept, *(both - {gone})}
    living.kill()
    living.join()


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_appears_meanwhile_survives(tmp_path, make):
    path = tmp_path / "rows"
    with pytest.raises(FileExistsError, match="rows exists by now"), appearing(path) as new:
        new.mkdir()
        (new / "rows.bin").touch()
        make(path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]
    assert path.is_file() or not list(path.iterdir())


def test_weights(tmp_path):
    model = net()
    store = gather(model, tmp_path / "rows")
    solver = Cholesky().fit(store)
    queries = gather(model)
    assert store.weights and store.weights == queries.weights  # though running means moved
    assert gather(torch.compile(net(), backend="eager")).weights == store.weights
    assert gather(net().eval()).weights != store.weights  # where running means count
    same = nn.Sequential(*net())
    same[2] = torch.compile(same[2], backend="eager")
    assert gather(same).weights == store.weights
    with torch.no_grad():
        model[2].weight[1, 3] *= -1
        model[2].weight[2, 4] *= -1
    other = gather(model)
    for call in (
        lambda **o: scores(other, store, solver, **o),
        lambda **o: topk(other, store, solver, 2, **o),
        lambda **o: solver.sweep([0.1], other, store, **o),
    ):
        with pytest.raises(ValueError, match=r"the queries were made with weights \w+, the store"):
            call()
        call(weights="any")
        with pytest.raises(ValueError, match="weights must be 'same' or 'any', got 'all'"):
            call(weights="all")
    with pytest.raises(ValueError, match=r"the solver was fitted on rows of weights \w+"):
        self_influence(other, solver)
    assert self_influence(other, solver, weights="any").isfinite().all()
    solver.save(tmp_path / "solver")
    loaded = Cholesky.load(tmp_path / "solver")
    with pytest.raises(ValueError, match="the solver was fitted on rows of weights"):
        scores(other, other, loaded)
    with pytest.raises(ValueError, match=r"load: the solver was fitted on rows of weights"):
        Cholesky.load(tmp_path / "solver", other)
    with pytest.raises(ValueError, match="store 1 has other weights than the first one"):
        RowStore.join([store, other])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A store of two parts and chunks, with ids and origin, one of int8, and a solver."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropinf.rows.part_files, "CHUNK_BYTES", 4 * 24)
        valid = torch.ones(9, dtype=torch.bool)
        valid[[2, 5]] = False
        store = RowStore(rows_of(9), PLAN, valid, torch.arange(18).view(9, 2), ids=range(9))
        store.save(folder / "rows")
        store = RowStore.load(folder / "rows")
        store.append(rows_of(2, 1), ids=[20, 21], origin=torch.zeros(2, 2, dtype=torch.int64))
        RowStore(rows_of(5), PLAN, ids=list("abcde"), dtype=torch.int8).save(folder / "narrow")
    Cholesky().fit(store).save(folder / "solver")
    return folder


def content(folder):
    """All that one can get out of it, which raises if it is damaged."""
    store = RowStore.load(folder / "rows")
    solver = Cholesky.load(folder / "solver", store)
    solved = solver.solve(rows_of(3, 2))
    narrow = RowStore.load(folder / "narrow")
    told = (store.valid, store.rows, store.origin, store.ids, solved, narrow.rows, narrow.valid)
    told = [t.tolist() for t in told]
    finished = store.finished, narrow.finished
    return told, narrow.ids, store.plan.fingerprint, store.weights, finished


def assert_one_sentence(error, folder):
    text = str(error.value)
    assert text.count("\n") == 0 and len(text.replace(str(folder), "")) < 350, text


@pytest.mark.parametrize("share", [5, pytest.param(1, marks=pytest.mark.more)], ids=["few", "all"])
def test_every_bit(saved, tmp_path, share):
    """Some bits of every file, and whole files cut short; the next test has all of manifests."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    truth = content(folder)
    chosen = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            whole = file.read_bytes()
            every = range(8 * len(whole))
            small = file.suffix in (".json", ".jsonl")
            sampled = chosen.sample(every, min(len(every), (150 if small else 60) // share))
            flips = [bytearray(whole) for _ in sampled]
            for flipped, bit in zip(flips, sampled, strict=True):
                flipped[bit // 8] ^= 1 << bit % 8
            cuts = [whole[:-1], whole[: len(whole) // 2], b"", whole + b"x"]
            for damaged in [*flips, *cuts]:
                file.write_bytes(damaged)
                try:
                    assert content(folder) == truth, file  # harmless
                    assert False, f"{file} takes {damaged}"
                except (ValueError, FileNotFoundError) as error:
                    assert "\n" not in str(error), error
            file.write_bytes(whole)
            file.unlink()
            with pytest.raises((ValueError, FileNotFoundError)):
                if file.name != "part.json":  # without it the part is one that is being written
                    content(folder)
                else:
                    assert content(folder)[-1] != (True, True)
                    raise ValueError
            file.write_bytes(whole)
    assert content(folder) == truth


def test_every_bit_of_a_seal(saved):
    """All bits of all manifests, by what reads them."""
    from dropinf.manifest import unsealed

    for file in sorted(saved.rglob("*.json")):
        whole = bytearray(file.read_bytes())
        truth = unsealed(bytes(whole))
        for bit in range(8 * len(whole)):
            whole[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ValueError, match="its checksum is missing or wrong"):
                unsealed(bytes(whole))
            whole[bit // 8] ^= 1 << bit % 8
        assert unsealed(bytes(whole)) == truth


VALUES = [
    None,
    [],
    {},
    "",
    "x",
    True,
    -1,
    0,
    1,
    2**31,
    2**62,
    10**400,
    1.5,
    float("inf"),
    float("nan"),
    [None],
    [-1],
    [2**63],
    {"a": None},
    ["x" * 1000],
]


def changed(value):
    """JSON with one value after the other replaced or left out, down to some depth."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for new in VALUES:
                yield {**value, key: new}
            for new in changed(value[key]):
                yield {**value, key: new}
    elif isinstance(value, list):
        for i in range(min(2, len(value))):
            yield value[:i] + value[i + 1 :]
            for new in [*VALUES, *changed(value[i])]:
                yield [*value[:i], new, *value[i + 1 :]]


def hostile(file):
    """Files as somebody could write who knows the checksums."""
    text = file.read_bytes()
    lines = text.split(b"\n") if file.suffix == ".jsonl" else [text]
    lines = [line for line in lines if line]
    for at, line in enumerate(lines):
        saved = json.loads(line)
        del saved["crc32"]
        for new in changed(saved):
            other = sealed(new) if new else b"{}"
            joined = [*lines[:at], other, *lines[at + 1 :]]
            yield b"\n".join(joined) + (b"\n" if file.suffix == ".jsonl" else b"")
    for head in (b"[" * 100_000, b'{"a": ' * 50_000, b'{"n": ' + b"9" * 10_000, b"\xff\xfe\x00"):
        yield head + b', "crc32": %d}' % zlib.crc32(head)


@pytest.mark.parametrize("number", [40, pytest.param(200, marks=pytest.mark.more)])
def test_hostile_manifests(saved, tmp_path, number):
    """Anything but ValueError ends the test; each takes less than a second and 100 MB."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    slowest, chosen = 0.0, random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in sorted(p for p in folder.rglob("*.json*") if p.name != "ids.jsonl"):
            whole = file.read_bytes()
            seal_again = file.parent / "part.json" if file.suffix == ".jsonl" else None
            part = None if seal_again is None else seal_again.read_bytes()
            texts = list(hostile(file))
            for text in chosen.sample(texts, min(len(texts), number)):
                file.write_bytes(text)
                if part is not None:
                    told = json.loads(part)
                    del told["crc32"]
                    told |= {"journal_bytes": len(text), "journal_crc32": zlib.crc32(text)}
                    seal_again.write_bytes(sealed(told))
                start = time.perf_counter()
                try:
                    content(folder)
                except (ValueError, FileNotFoundError) as error:
                    assert "\n" not in str(error) and len(str(error)) < 1000, error
                slowest = max(slowest, time.perf_counter() - start)
            file.write_bytes(whole)
            if part is not None:
                seal_again.write_bytes(part)
    assert slowest < 1, slowest
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("Full", {}),
        ("Dropout", {"r": 10**9}),
        ("Dropout", {"rate": 1.0}),
        ("Sketch", {"r": 4, "s": 10**9}),
        ("FJLT", {"r": 4}),
        ("Gaussian", {"r": 4}),
        ("FactoredDropout", {"r": 10**9}),
    ],
)
@pytest.mark.parametrize("P", [10**9, 10**30])
def test_huge_plans(tmp_path, kind, fields, P):
    """A plan's file says how large it is, before anything is allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = {
        "format": "dropinf plan 2",
        "compression": {"kind": kind, **fields},
        "layers": [["l", [["l.weight", [P]]]]],
        "types": [""],
        "width": 6,
        "fingerprint": "0" * 16,
    }
    start = time.perf_counter()
    for width in (4, 6, 10**9):
        (tmp_path / "plan").write_bytes(sealed({**content, "width": width}))
        with pytest.raises(ValueError, match=r"Plan\.load: .*damaged or not a plan"):
            Plan.load(tmp_path / "plan")
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_no_regular_files(saved, tmp_path):
    """Pipes, devices, directories and links that lead nowhere or in circles, for each file."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        if file.name in ("rows.bin", "factors.bin", "part.json"):
            continue
        whole = file.read_bytes()
        for make in (
            os.mkfifo,
            os.mkdir,
            lambda path: os.symlink("/dev/zero", path),
            lambda path: os.symlink("nowhere", path),
            lambda path: os.symlink(path, path),
        ):
            file.unlink()
            make(file)
            with pytest.raises((ValueError, FileNotFoundError)) as error:
                content(folder)
            assert_one_sentence(error, folder)
            file.rmdir() if file.is_dir() else file.unlink()
            file.write_bytes(whole)
    for name, make in (("rows.bin", os.mkfifo), ("rows.bin", os.mkdir)):
        file = folder / "rows" / "part-000000" / name
        file.unlink(missing_ok=True)
        make(file)
        with pytest.raises(ValueError, match="truncated or damaged: 0 bytes"):
            content(folder)
        file.rmdir() if file.is_dir() else file.unlink()


def test_stores_of_before(tmp_path):
    (tmp_path / "store.json").write_text('{"format": "dropinf rows 1", "n": 3}')
    with pytest.raises(ValueError, match="is of an older dropinf, without parts; collect it again"):
        RowStore.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no store"):
        RowStore.load(tmp_path / "none")


def test_a_part_that_is_missing(saved, tmp_path):
    shutil.copytree(saved / "rows", tmp_path / "rows")
    shutil.rmtree(tmp_path / "rows" / "part-000000")
    with pytest.raises(ValueError, match="part-000000 is missing"):
        RowStore.load(tmp_path / "rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_in_any_memory(tmp_path, dtype):
    one = rows_of(4)[:, ::2].flatten()[::2][:1].reshape(1, 1)  # contiguous, with a stride of 2
    thin = Plan.make(nn.Linear(1, 1, bias=False), Full())
    for number, (rows, plan, truth) in enumerate(
        [
            (one, thin, one.tolist()),
            (torch._neg_view(rows_of(5)), PLAN, [[-x for x in row] for row in rows_of(5).tolist()]),
            (rows_of(5).requires_grad_(), PLAN, rows_of(5).tolist()),
            (rows_of(1).expand(5, 6), PLAN, rows_of(1).tolist() * 5),
            (rows_of(6).T, PLAN, [list(column) for column in zip(*rows_of(6).tolist())]),
        ]
    ):
        store = RowStore(rows, plan, dtype=dtype)
        store.save(tmp_path / str(number))
        for made in (store, RowStore.load(tmp_path / str(number))):
            off = made.rows - torch.tensor(truth)
            bound = 0.0 if dtype == torch.float32 else made.rows.abs().max() / 250
            assert off.abs().max() <= bound
            assert scores(made, made, Identity().fit(made)).isfinite().all()


def test_batches_and_weights_in_any_memory(tmp_path):
    """A tensor of one number is contiguous with any stride, and may be negated unseen."""
    model = nn.Linear(1, 1)
    model.weight = nn.Parameter(torch.arange(4.0)[1::2][:1].view(1, 1))
    x = torch._neg_view(torch.arange(4.0)[1::2][:1].view(1, 1))
    plan = Plan.make(model, Full())
    store = collect(model, [(x,)], losses, plan, tmp_path / "rows", progress=False, check=False)
    y = float(model.weight.detach()) * -1.0 + float(model.bias.detach())
    assert torch.allclose(store.rows, torch.tensor([[-2 * y, 2 * y]]))


def test_marks_that_do_not_fit():
    rows, plan = rows_of(3), PLAN
    for valid in (torch.ones(2, dtype=torch.bool), torch.tensor([1, 0, 1]), torch.ones(3, 1) > 0):
        for make in (RowStore(rows, plan).append, partial(RowStore, plan=plan)):
            with pytest.raises(ValueError, match=r"valid must be \[n=3\] bool"):
                make(rows, valid=valid)
    for origin in (torch.arange(3), torch.ones(3, 2), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"origin must be \[n=3, 2\] integers"):
            RowStore(rows, plan, origin=origin)
    store = RowStore(rows, plan, [True, False, True], [[0, 0], [0, 1], [1, 0]])
    store.append(rows[:1], origin=[[2, 0]])
    assert store.valid.tolist() == [True, False, True, True]
    assert store.origin.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]


@pytest.mark.parametrize("joined", [False, True])
def test_another_store_took_its_place(tmp_path, joined):
    """Neither what is open nor what was pickled goes on with it unseen."""
    path, aside = tmp_path / "rows", tmp_path / "aside"
    RowStore(rows_of(4), PLAN, ids=[0, 1, 2, 3]).save(path)
    store = RowStore.load(path)
    store.append(rows_of(3, seed=1), ids=[4, 5, 6])
    one = RowStore(rows_of(2), PLAN, ids=[7, 8])
    data = pickle.dumps(RowStore.join([store, one]) if joined else store)
    whole = store.at(range(7))  # by now the checksums were compared
    assert torch.equal(pickle.loads(data).at(range(7)), whole)
    path.rename(aside)
    for rows in (rows_of(4, seed=2), rows_of(3), rows_of(9)):
        RowStore(rows, PLAN, ids=list(range(len(rows)))).save(path)
        RowStore.load(path).append(rows_of(3, seed=1), ids=[14, 15, 16])
        with pytest.raises(ValueError, match=r"rows\.bin cannot be read any more \(another file"):
            store.at([0])
        with pytest.raises(ValueError, match="has other rows than when the store was pickled"):
            pickle.loads(data)
        shutil.rmtree(path)
    RowStore(rows_of(4), PLAN, ids=[0, 1, 2, 3]).save(path)
    gone = r"part-000001/journal\.jsonl is missing" if joined else "has fewer parts than when"
    with pytest.raises(ValueError, match=gone):
        pickle.loads(data)
