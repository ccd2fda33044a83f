"""bench/experiments/retrain.py in its tiny size, its texts, and what it concludes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from bench_runs import assert_second_run_changes_the_date_alone, run_quick

pytest.importorskip("sklearn")
pytest.importorskip("tokenizers")

import retrain
import retrain_report as report
import retrain_smollm
import retrain_tasks
from records import Records

import dropinf

pytestmark = pytest.mark.more


def test_quick_run(tmp_path):
    pytest.importorskip("bm25s")
    path = tmp_path / "retrain.json"
    data = run_quick("retrain", path)
    settings = data["settings"]
    for task, about in settings["tasks"].items():
        mine = [x for x in data["records"] if x["task"] == task]
        methods = [m for m in retrain.METHODS if m != report.BM25 or task == "sentences"]
        assert [x["method"] for x in mine] == [report.ALL, report.RANDOM, *methods]
        models = {report.ALL: 1, report.RANDOM: settings["random"]}
        for record in mine:
            shape = settings["seeds"], models.get(record["method"], about["groups"])
            assert np.shape(record["losses"]) == (*shape, about["groups"])
            assert np.min(record["losses"]) > 0
    assert list(tmp_path.glob("*.unfinished")) == []
    assert_second_run_changes_the_date_alone("retrain", path)


def test_the_highest_of_a_method_are_left_out(tmp_path, monkeypatch):
    """By scores of planted order; the losses that come back are of those models."""
    task = retrain_tasks.digits().tiny()
    left_out = []

    def losses_of(self, indices, seed):
        left_out.append((seed, sorted(set(range(len(task.train))) - set(indices.tolist()))))
        return torch.full((len(task.groups),), float(len(left_out)))

    monkeypatch.setattr(retrain_tasks.Task, "losses_of", losses_of)
    scores = torch.zeros(2, len(task.train))
    scores[0, 5:11], scores[1, 20:26] = 1.0, 2.0
    monkeypatch.setattr(retrain.Removals, "scores", lambda self, method: scores)
    monkeypatch.setattr(retrain, "METHODS", ("Dropout",))
    records = Records(tmp_path / "r.json", {"seeds": 2, "random": 1}, retrain.NAMES)
    retrain.Removals(task, records).run()
    top = left_out[-4:]
    first, second = list(range(5, 11)), list(range(20, 26))
    assert top == [(0, first), (0, second), (1, first), (1, second)]
    assert left_out[:2] == [(0, []), (1, [])]
    assert all(len(gone) == 6 for _, gone in left_out[2:4])
    losses = records.get(("digits-cnn", "Dropout", 6))["losses"]
    assert losses == [[[5.0] * 2, [6.0] * 2], [[7.0] * 2, [8.0] * 2]]


def test_a_task_s_own_settings(tmp_path, monkeypatch):
    """They are in its description, and stand in place of the experiment's."""
    own = {"seeds": 2, "random": 3, "methods": ["Gaussian"]}
    task = replace(retrain_tasks.digits().tiny(), own=own)
    assert own.items() <= task.description().items()
    assert not own.keys() & retrain_tasks.digits().description().keys()
    monkeypatch.setattr(
        retrain_tasks.Task, "losses_of", lambda self, i, seed: torch.ones(len(self.groups))
    )
    monkeypatch.setattr(retrain.Removals, "scores", lambda self, method: torch.rand(2, 60))
    records = Records(tmp_path / "r.json", {"seeds": 1, "random": 1}, retrain.NAMES)
    retrain.Removals(task, records).run()
    shapes = {x["method"]: np.shape(x["losses"]) for x in records.data["records"]}
    assert shapes == {report.ALL: (2, 1, 2), report.RANDOM: (2, 3, 2), "Gaussian": (2, 2, 2)}


def test_smollm_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(retrain_smollm, "PACKAGE", "no_such_package")
    assert [task.name for task in retrain_tasks.make_tasks()] == ["digits-cnn", "sentences"]
    said = capsys.readouterr().out
    assert said.startswith("smollm2-lora is left out: no ") and "no_such_package; see" in said
    retrain_tasks.make_tasks(quick=True)
    assert capsys.readouterr().out.startswith("smollm2-lora is left out of --quick: ")


@pytest.fixture(scope="module")
def smollm():
    if missing := retrain_smollm.missing_packages():
        pytest.skip(f"no {', '.join(missing)}")
    return retrain_tasks.smollm()


def test_texts_of_smollm(smollm):
    """Each is whole, between two ends; topics are those of demo_text."""
    tokenizer, texts = retrain_smollm.tokenizer(), retrain_tasks.load_texts()
    for data, some in (smollm.train, smollm.texts), (smollm.queries, smollm.query_texts):
        for text, row, next_row in zip(some, *data.tensors, strict=True):
            count = int((next_row != retrain_tasks.PAD).sum())
            assert row[0] == 0 and next_row[count - 1] == 0
            assert tokenizer.decode(row[1:count].tolist()) == text
    topic = dict(zip(texts.queries, texts.query_topics.tolist(), strict=True))
    for number, group in enumerate(smollm.groups):
        assert group and {topic[smollm.query_texts[query]] for query in group} == {number}
    assert sorted(query for group in smollm.groups for query in group) == list(
        range(len(smollm.query_texts))
    )
    topic = dict(zip(texts.train, texts.topics.tolist(), strict=True))
    assert torch.tensor([topic[text] for text in smollm.texts]).bincount().tolist() == [20] * 6


def test_smollm_knows_english(smollm):
    """So its weights are read right; an adapter that was not trained changes nothing."""
    ids = torch.tensor([[0, *retrain_smollm.tokenizer().encode("The capital of France is").ids]])
    with torch.no_grad():
        logits = smollm.make()(ids)
        assert logits.equal(retrain_smollm.pretrained()(input_ids=ids).logits)
        padded = smollm.make()(torch.nn.functional.pad(ids, (0, 3)))[:, : ids.shape[1]]
    assert retrain_smollm.tokenizer().decode([int(logits[0, -1].argmax())]) == " Paris"
    assert torch.allclose(padded, logits, atol=1e-3)


def test_lora_alone_is_trained_and_each_model_has_its_own(smollm):
    before = [weight.clone() for weight in retrain_smollm.pretrained().parameters()]
    batch, chosen = smollm.train[:4], torch.arange(4)
    fresh = smollm.make()
    tracked = [name for name, p in fresh.named_parameters() if p.requires_grad]
    assert len(tracked) == 30 * 2 * 2 and all("lora_" in name for name in tracked)
    # Queries are 576 -> 576, values 576 -> 192: A and B of rank 4.
    plan = dropinf.Plan.make(fresh, dropinf.Full())
    assert plan.width == 30 * 4 * (576 + 576 + 576 + 192)

    def losses_of(model):
        with torch.no_grad():
            return smollm.loss_fn(model, batch)

    untrained, first = losses_of(fresh), smollm.trained(chosen, seed=0)
    losses, other = losses_of(first), losses_of(smollm.trained(chosen, seed=1))
    assert (losses < untrained).all() and (other < untrained).all() and not other.equal(losses)
    assert losses_of(first).equal(losses) and losses_of(fresh).equal(untrained)
    assert losses_of(smollm.trained(chosen, seed=0)).equal(losses)
    after = retrain_smollm.pretrained().parameters()
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_texts():
    texts = ["to send mail", "a socket is closed", "x" * 900]
    tokenizer = retrain_tasks.tokenizer_of(texts)
    ids, following = retrain_tasks.encode(tokenizer, texts).tensors
    for text, row, next_row in zip(texts, ids, following, strict=True):
        wanted = [0, *tokenizer.encode(text).ids, 0][: retrain_tasks.T + 1]
        count = len(wanted) - 1
        assert row[:count].tolist() == wanted[:-1] and next_row[:count].tolist() == wanted[1:]
        assert (next_row[count:] == retrain_tasks.PAD).all()


def test_a_text_s_loss_is_the_mean_over_its_own_tokens():
    following = torch.tensor([[3, 4, 5], [6, retrain_tasks.PAD, retrain_tasks.PAD]])
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(2)
    first = -(log_p[0, 0, 3] + log_p[0, 1, 4] + log_p[0, 2, 5]) / 3
    expected = torch.stack([first, -log_p[1, 0, 6]])
    assert torch.allclose(retrain_tasks.token_losses(logits, following), expected)


def planted():
    """Three groups, two seeds: losses are 1 with all; each method adds to its own group's model."""
    added = {"Dropout": (0.30, 0.32, 0.31), "gradient dot product": (0.1, 0.12, 0.11)}
    added["Gaussian"] = (0.30, 0.0, 0.6)
    base = np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])  # [seeds, groups]
    records = [{"method": report.ALL, "k": 0, "losses": base[:, None]}]
    records.append({"method": report.RANDOM, "k": 9, "losses": np.stack([base, base + 0.2], 1)})
    for method, values in added.items():
        losses = np.full((2, 3, 3), 99.0)  # of other groups, which are not to be looked at
        for seed in range(2):
            np.fill_diagonal(losses[seed], base[seed] + values)
        records.append({"method": method, "k": 9, "losses": losses})
    return [{"task": "t", **record, "losses": record["losses"].tolist()} for record in records]


def test_what_is_concluded():
    found = report.changes(planted(), "t")
    by_method = {change.method: change.removal for change in found}
    assert by_method["Dropout"].top.value == pytest.approx(0.31)
    assert by_method["Dropout"].at_random.value == pytest.approx(0.1)
    assert by_method["Dropout"].difference.value == pytest.approx(0.21)
    assert by_method["Dropout"].difference.error == pytest.approx(0.01 / 3**0.5)
    text = "\n".join(report.conclusions(found))
    assert "without the top of: Dropout. Not so: gradient dot product, Gaussian." in text
    assert "Dropout is above gradient dot product: +0.200 ± 0.000." in text
    assert "Dropout is within noise of Gaussian" in text
    table = "\n".join(report.table(found, 3))
    assert "| 9 | Gaussian | +0.300 ± 0.173 | 0.000 | +0.200 ± 0.173 | 2 of 3 |" in table


def test_page_says_what_is_a_task_s_own(tmp_path):
    about = {"about": "data", "n": 9, "m": 3, "groups": 3, "epochs": 1, "batch_size": 4, "lr": 0.1}
    tasks = {"t": {**about, "r": 8}, "u": {**about, "r": 8, "seeds": 2, "random": 4}}
    records = [{**x, "task": task} for task in tasks for x in planted()]
    settings = {"quick": False, "damping": 0.1, "seeds": 3, "random": 6, "tasks": tasks}
    data = {"settings": settings, "records": records, "machine": {"cpu": "c", "cores": 2}}
    data["machine"]["system"] = "Linux"
    data |= {"versions": {}, "runs": [{"commit": "abc", "date": "2026-01-01"}]}
    report.write_report(data, tmp_path / "page.md", tmp_path)
    _, t, u = (tmp_path / "page.md").read_text().split("\n## ")
    assert "; 3 seeds, 6 random sets." in t and "; 2 seeds, 4 random sets." in u
