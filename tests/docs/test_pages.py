"""Every page runs as pasted, and gives what it says: its Python, in order, in one namespace."""

import os
import re
import subprocess
import sys
import warnings

import manual_pages
import pytest
import torch
from places import ROOT

import dropinf


def shown(page):
    return page.relative_to(ROOT / "docs" if page.name != "README.md" else ROOT).as_posix()


WITH_CODE = [page for page in manual_pages.pages() if manual_pages.blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=shown)
def test_page(page, tmp_path, monkeypatch, capsys):
    if command := re.match(r"# torchrun (\S+) job.py\n", manual_pages.blocks(page)[0]):
        return run_by_ranks(page, command[1], tmp_path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="choose_damping: .* end of the dampings")
        names = manual_pages.run(page)
    if check := CHECKS.get(shown(page)):
        check(names, tmp_path, capsys.readouterr().out)


def run_by_ranks(page, option, folder):
    """As its first line says. Queries are the first five examples, which help themselves most."""
    (job,) = manual_pages.blocks(page)
    (folder / "job.py").write_text(job)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", option, "job.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\[ *(\d+),", done.stdout) == list("01234")


def readme(names, folder, printed):
    assert names["scores"].shape == (20, 100)
    assert [block.r for block in names["plan"].blocks] == [256, 195]
    uses = manual_pages.blocks(ROOT / "README.md")
    assert len(uses) == 1 and uses[0].count("\n") <= 16


def start(names, folder, printed):
    assert "compared with autograd" in printed and "top-10 overlap" in printed


def solvers(names, folder, printed):
    assert names["many"].shape == (4, 20, 100)
    swept, wanted = names["many"][2], names["scores"]  # at damping 0.1
    torch.testing.assert_close(swept, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item())
    assert printed in (ROOT / "docs" / "solvers.md").read_text()


def scores(names, folder, printed):
    assert names["own"].shape == (100,) and names["mean"].shape == names["error"].shape == (20, 100)
    whole = dropinf.scores(names["asked"], names["store"], names["solver"])
    torch.testing.assert_close(names["by_layer"].sum(0), whole, rtol=1e-4, atol=1e-4)
    assert names["of_tokens"].shape == (40, 8)
    assert "example 99" in printed and "top-10 overlap" in printed
    assert (folder / "influence.csv").read_text().count("\n") == 1 + 20 * 2 * 5


def report(names, folder, printed):
    text = (folder / "report.html").read_text()
    assert "self-influence" in text and "example 99" in text


def rows(names, folder, printed):
    assert len(names["joint"]) == 105 and len(names["one"]) == 2 and names["ids"].max() < 100
    assert len(names["tokens"]) == 6 * 4


def losses(names, folder, printed):
    assert names["mean"].shape == names["scores"].shape == (20, 100)


def energy(names, folder, printed):
    assert names["projector"].proj_dim == 512


def damping(names, folder, printed):
    # r / n is .512 in the first layer and in all of the last one's .5.
    assert [block.r for block in names["plan"].blocks] == [128, 128]
    assert names["choice"].damping == 1.0 and "chosen" in str(names["choice"])
    assert names["own"].metric == "metric" and names["by_masks"].metric == "agreement"


def evaluating(names, folder, printed):
    evaluate, found, wrong = (names[name] for name in ("evaluate", "scores", "wrong"))
    assert evaluate.mislabeled_auc(-found.mean(0), wrong).value > 0.7
    lds = evaluate.lds(found, names["members"], names["losses"])
    assert lds.value > 2 * (lds.error + lds.runs_error)
    assert (folder / "halves" / "losses.jsonl").read_bytes().count(b"\n") == 1 + 2 * 40


def arrow(names, folder, printed):
    store, scores = names["store"], names["scores"]
    assert torch.equal(names["batch"], store.rows[:8])
    assert sum(map(len, names["parts"])) == 50 * store.plan.width
    assert names["asked"].ids == [f"a{i}" for i in range(50)]
    assert list(names["frame"].columns[:3]) == ["id", "score_a0", "score_a1"]
    assert (folder / "scores.csv").read_text().count("\n") == 51
    assert names["arrow"].num_rows == 50 and scores.shape == (50, 50)
    assert names["best"].to_arrow().num_rows == 50 * 2 * 5
    assert isinstance(names["data"], names["datasets"].Dataset)
    assert names["data"]["self_influence"][:] == names["own"].tolist()


def trak(names, folder, printed):
    for name in ("before", "projected", "fast"):
        assert names[name].shape == (100, 20) and names[name].std() > 0


def dattri(names, folder, printed):
    for name in ("before", "after"):
        assert names[name].shape == (40, 5) and names[name].std() > 0


def captum(names, folder, printed):
    assert names["scores"].shape == (20, 100) and names["own"].shape == (100,)
    assert names["best"].indices.shape == (20, 5)


def trainer(names, folder, printed):
    assert names["scores"].shape == (3, 7) and names["scores"].isfinite().all()


def lightning(names, folder, printed):
    store = names["rows"].store
    assert len(store) == 28 and sorted(store.origin[:14, 1].tolist()) == list(range(14))


CHECKS = {
    "README.md": readme,
    "index.md": start,
    "solvers.md": solvers,
    "scores.md": scores,
    "report.md": report,
    "rows.md": rows,
    "losses.md": losses,
    "energy.md": energy,
    "damping.md": damping,
    "arrow.md": arrow,
    "evaluating.md": evaluating,
    "tools/trak.md": trak,
    "tools/dattri.md": dattri,
    "tools/captum.md": captum,
    "tools/trainer.md": trainer,
    "tools/lightning.md": lightning,
}


def test_every_check_has_its_page():
    assert set(CHECKS) <= {shown(page) for page in WITH_CODE}


def test_a_block_that_fails_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nx = 1\n```\n\nMore.\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        manual_pages.run(page)
