"""Jobs, the command line and Trainers with a model on a GPU."""

import os

import on_gpu
import pytest
import torch
import torch.nn.functional as F
from lightning_runs import quiet_trainer
from on_gpu import DEVICE, GPU, assert_near
from torch import nn

import dropinf
from dropinf import Dropout, Plan, RowStore

backend = on_gpu.backend  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of other packages


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A directory of a model, train.jsonl and queries.jsonl."""
    pytest.importorskip("transformers", minversion="5")
    from job_models import gpt2, lines, sentences

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


FILES = {"model": "model", "train": "train.jsonl", "queries": "queries.jsonl"}


def job_rows(device):
    """The rows that a job in Python has, of the training examples and the queries."""
    from dropinf.jobs import Job, prepare

    job = Job.of(**FILES, r=50, device=device)
    ready = prepare(job)
    assert next(ready.model.parameters()).device.type == torch.device(device).type
    plan = job.plan(ready.model)
    return [
        dropinf.collect(ready.model, of.loader, ready.loss_fn, plan, ids=of.ids, progress=False)
        for of in (ready.train, ready.queries)
    ]


def test_job(backend, here):
    for found, truth in zip(job_rows(str(DEVICE)), job_rows("cpu"), strict=True):
        assert_near(found.rows, truth.rows)
        assert torch.equal(found.ids, truth.ids)


def test_command_line(backend, here, ok):
    """Collected there, by the device that is taken by default too; reported from the rows."""
    pytest.importorskip("typer")
    pytest.importorskip("jinja2")
    from cli_runs import one_object

    data = ["--train", FILES["train"], "--queries", FILES["queries"], "--r", 50]
    for device, out in ((str(DEVICE), "named"), ("auto", "default"), ("cpu", "cpu")):
        found = one_object(
            ok("collect", "model", *data, "--device", device, "--out", out, "--json")
        )
        assert (found["train"], found["queries"]) == (40, 3)
    for name in ("train", "queries"):
        truth = RowStore.load(here / "cpu" / name).rows
        for out in ("named", "default"):
            assert_near(RowStore.load(here / out / name).rows, truth)
    assert ok("report", "named", "-k", 2).startswith("named/report.html: ")
    told = [one_object(ok("topk", out, "-k", 2, "--json"))["queries"] for out in ("named", "cpu")]
    one, other = ([[e["example"] for e in query["top"]] for query in of] for of in told)
    assert one == other


def test_entry(backend, here, ok):
    """A function of the user's that gives a model there, and batches on the CPU."""
    pytest.importorskip("typer")
    (here / "mine.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def loss_fn(model, batch):\n"
        "    x, y = (t.to(model.weight.device) for t in batch)\n"
        "    return torch.nn.functional.cross_entropy(model(x), y, reduction='none')\n"
        "def job(device):\n"
        "    torch.manual_seed(0)\n"
        "    data = TensorDataset(torch.randn(12, 6), torch.randint(3, (12,)))\n"
        "    model = torch.nn.Linear(6, 3).to(device)\n"
        "    loader = DataLoader(data, 5)\n"
        "    return {'model': model, 'loss_fn': loss_fn, 'train': loader, 'queries': loader}\n"
        f"def there():\n    return job({str(DEVICE)!r})\n"
        "def on_cpu():\n    return job('cpu')\n"
    )
    for name in ("there", "on_cpu"):
        ok("collect", "--entry", f"mine:{name}", "--r", 10, "--out", name, "--quiet")
    rows = [RowStore.load(here / name / "train").rows for name in ("there", "on_cpu")]
    assert_near(*rows)


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        random = torch.Generator().manual_seed(1)
        self.texts = [torch.randint(1, 23, (8,), generator=random) for _ in range(7)]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return {"input_ids": self.texts[i], "labels": self.texts[i]}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("when", ["after", "during"])
def test_transformers_callback(backend, when, precision, tmp_path):
    """Of a Trainer on the device, whose rows are compared with autograd as they come."""
    transformers = pytest.importorskip("transformers", minversion="5")
    pytest.importorskip("accelerate")
    from dropinf.integrations.transformers import InfluenceCallback, causal_lm_loss

    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    )
    plan = Plan.make(model, Dropout(r=20))
    callback = InfluenceCallback(plan, path=tmp_path / "rows", when=when)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not GPU,
        bf16=precision == "bf16",
    )
    transformers.Trainer(model, arguments, train_dataset=Texts(), callbacks=[callback]).train()
    assert next(model.parameters()).device.type == DEVICE.type
    store = RowStore.load(tmp_path / "rows")
    assert len(store) == 7 and store.finished and store.proof.examples > 0
    if when == "after" and precision == "float32":
        model.cpu().eval()
        batch = torch.utils.data.default_collate([Texts()[i] for i in range(7)])
        truth = dropinf.collect(model, [batch], causal_lm_loss, plan, progress=False)
        assert_near(store.rows, truth.rows)


@pytest.mark.parametrize("when", ["after", "during"])
def test_lightning_callback(backend, when, tmp_path):
    lightning = pytest.importorskip("lightning")
    from dropinf.integrations.lightning import InfluenceCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.5), nn.Linear(9, 3))

        def training_step(self, batch, batch_idx):
            return loss_fn(self, batch).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    def loss_fn(module, batch):
        x, label = batch
        return F.cross_entropy(module.net(x), label, reduction="none")

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(7, 6), torch.randint(3, (7,)))
    module = Module()
    plan = Plan.make(module, Dropout(r=20))
    callback = InfluenceCallback(plan, loss_fn, when=when)
    quiet_trainer(
        tmp_path,
        accelerator="gpu" if GPU else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[callback],
    ).fit(module, torch.utils.data.DataLoader(data, 2))
    store = callback.store
    assert len(store) == 7 and store.proof.examples > 0
    if when == "after":
        module.cpu().eval()
        truth = dropinf.collect(module, [data[:]], loss_fn, plan, progress=False)
        assert_near(store.rows, truth.rows)
