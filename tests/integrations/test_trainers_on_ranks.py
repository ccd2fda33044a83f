"""The callbacks of Trainers in two processes: their one store beside that of one process."""

import copy
import gc
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning_runs import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

transformers = pytest.importorskip("transformers", minversion="5")
lightning = pytest.importorskip("lightning")
accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

import dropinf  # noqa: E402
from dropinf.integrations.lightning import InfluenceCallback as LightningCallback  # noqa: E402
from dropinf.integrations.transformers import (  # noqa: E402
    InfluenceCallback,
    causal_lm_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of both tools, and what they use
WORLD = 2
# A fork has what is imported, which takes longest; with a GPU it has no autograd.
START = "spawn" if torch.cuda.is_available() else "fork"


def texts(n):
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 23, (n, 6), generator=random)
    return [{"input_ids": one, "labels": one} for one in ids]


class Stream(IterableDataset):
    def __iter__(self):
        yield from texts(8)


def gpt2():
    """Without dropout, so that two processes train as one does."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=1)
    )


def plan_of(model):
    return dropinf.Plan.make(model, dropinf.Dropout(r=12))


class Noting(transformers.Trainer):
    """Notes each batch, and its rows by autograd, one example at a time."""

    def __init__(self, *args, plan, **kwargs):
        super().__init__(*args, **kwargs)
        self.plan, self.seen, self.truth = plan, [], []

    def training_step(self, model, inputs, *args, **kwargs):
        inner = self.accelerator.unwrap_model(model).eval()
        named = dict(inner.named_parameters())
        for ids in inputs["input_ids"]:
            loss = inner(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
            grads = torch.autograd.grad(loss, [named[slot.name] for slot in self.plan.slots])
            parts = zip(self.plan.slots, grads, strict=True)
            self.truth.append(torch.cat([g.flatten()[s.index] * s.scale for s, g in parts]))
            self.seen.append(ids)
        inner.train()
        return super().training_step(model, inputs, *args, **kwargs)


def train(folder, callback, model, data, batch_size=2, first=None, **settings):
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": batch_size,
            "num_train_epochs": 2,
            "learning_rate": 0.01,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **settings,
        }
    )
    callbacks = [callback] if first is None else [first, callback]
    trainer = Noting(model, arguments, train_dataset=data, callbacks=callbacks, plan=callback.plan)
    trainer.train()
    return trainer


def check_trainer(rank, folder):
    """After training, and during it, where an epoch's last batch is filled up or is not."""
    for n, when in ((7, "after"), (7, "during"), (8, "during")):
        model = gpt2()
        path = folder / f"{when}-{n}"
        callback = InfluenceCallback(plan_of(model), path, when=when)
        accumulated = {"gradient_accumulation_steps": 2} if n == 8 else {}
        trainer = train(folder / "out", callback, model, texts(n), **accumulated)
        assert trainer.model_wrapped is not model  # but DistributedDataParallel
        if rank == 0:
            torch.save(model.state_dict(), folder / f"{when}-{n}.pt")
        if when == "during":
            parts = callback.store.parts
            part, rows = parts[rank], callback.store.rows.split([len(one) for one in parts])[rank]
            where = [texts(n)[i]["input_ids"] for i in part.ids.tolist()]
            assert torch.equal(torch.stack(where), torch.stack(trainer.seen))
            assert torch.equal(part.ids, part.origin[:, 1])
            truth = torch.stack(trainer.truth)
            torch.testing.assert_close(rows, truth, rtol=0, atol=1e-5 * float(truth.abs().max()))
    refuse(folder, None, texts(8), "several processes write one store; give path=")
    refuse(folder, "after", Stream(), "IterableDataset cannot be shared out", max_steps=1)
    dispatching = {"accelerator_config": {"dispatch_batches": True}}
    refuse(folder, "during", texts(8), "not known which examples are whose", **dispatching)


def refuse(folder, when, data, said, **settings):
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    path = None if when is None else folder / "refused"
    callback = InfluenceCallback(plan_of(model), path, when=when or "after")
    with pytest.raises(ValueError, match=said):
        train(folder / "out", callback, model, data, **settings)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not (folder / "refused").exists()


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def digits(n):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 6), torch.randint(3, (n,)), torch.arange(n))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def fit(folder, callback, model, loader, **settings):
    quiet_trainer(
        folder,
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        **settings,
    ).fit(model, loader)


class SharedOut(DDPStrategy):
    """As DeepSpeed's strategy, which is a kind of it too."""


def check_lightning(rank, folder):
    several = {"strategy": "ddp", "devices": WORLD}
    model = Digits()
    callback = LightningCallback(plan_of(model), loss_fn, folder / "fit-after")
    fit(folder, callback, model, DataLoader(digits(7), 2), **several)
    torch.save(model.state_dict(), folder / f"fit-{rank}.pt")
    model = Digits()
    model.net[1] = nn.Identity()  # whose batches would not be those of one process
    callback = LightningCallback(
        plan_of(model), loss_fn, folder / "fit-during", "during", index=lambda batch: batch[2]
    )
    sampler = DistributedSampler(digits(8), shuffle=False)  # Lightning's own shuffles
    loader = DataLoader(digits(8), 2, sampler=sampler)
    fit(folder, callback, model, loader, use_distributed_sampler=False, **several)
    shared = LightningCallback(plan_of(model), loss_fn, folder / "refused")
    with pytest.raises(ValueError, match="under SharedOut no process may have the whole module"):
        fit(folder, shared, model, loader, strategy=SharedOut(), devices=WORLD)
    with pytest.raises(ValueError, match="several processes write one store; give path="):
        fit(folder, LightningCallback(plan_of(model), loss_fn), model, loader, **several)


def check_accelerate(rank, folder):
    """A loop of one's own: what `prepare` makes of a model is taken, and of a loader refused."""
    accelerator = accelerate.Accelerator(cpu=True)
    loader = DataLoader(digits(7), 2)
    torch.manual_seed(0)
    net = nn.Linear(6, 3)
    plan = plan_of(net)
    model, prepared = accelerator.prepare(net, loader)
    assert model is not net  # but DistributedDataParallel
    options = {"progress": False, "path": folder / "prepared"}
    with pytest.raises((ValueError, RuntimeError), match=r"give dropinf\.split\(loader\)"):
        dropinf.collect(model, prepared, loss_fn, plan, **options)
    with pytest.raises(
        ValueError, match=r"Accelerator\.prepare, .* give the loader as it was before"
    ):
        dropinf.split(prepared)
    store = dropinf.collect(model, dropinf.split(loader), loss_fn, plan, **options)
    whole = dropinf.collect(net, loader, loss_fn, plan, progress=False)
    assert_same(store, whole)


def run_rank(rank, folder):
    """As torchrun starts it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(WORLD), "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # not used: a group is there
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training before the fork
    try:
        check_trainer(rank, folder)
        check_lightning(rank, folder)
        check_accelerate(rank, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without the interpreter's teardown, in which gloo's threads may abort


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    gc.freeze()  # each training collects garbage, which takes long with so much imported
    mp.start_processes(run_rank, (folder,), nprocs=WORLD, start_method=START)
    yield folder
    gc.unfreeze()


def assert_same(store, whole):
    """To the bit, and in order."""
    assert store.finished and torch.equal(store.rows, whole.rows)
    assert torch.equal(store.ids, whole.ids) and store.weights == whole.weights


def assert_same_steps(store, whole):
    """Rows of the same examples in the same steps, of weights that were summed up otherwise."""
    places = []
    for one in (store, whole):
        order = sorted(range(len(one)), key=lambda i: one.origin[i].tolist())
        places.append(torch.tensor(order))
    first, second = places
    assert torch.equal(store.origin[first], whole.origin[second])
    assert torch.equal(store.ids, store.origin[:, 1])
    limit = 1e-4 * float(whole.rows.abs().max())
    torch.testing.assert_close(store.rows[first], whole.rows[second], rtol=0, atol=limit)


def test_trainer_after(ran):
    """Each example once, whatever filled up the batches of training."""
    model = gpt2()
    model.load_state_dict(torch.load(ran / "after-7.pt"))
    loader = DataLoader(texts(7), 2)
    whole = dropinf.collect(model.eval(), loader, causal_lm_loss, plan_of(model), progress=False)
    store = dropinf.RowStore.load(ran / "after-7")
    assert_same(store, whole)
    assert len(store.parts) == WORLD


def test_trainer_during(ran, tmp_path):
    """The rows of one process with batches of all; those that fill up a step are trained on too."""
    model = gpt2()
    callback = InfluenceCallback(plan_of(model), when="during")
    train(tmp_path, callback, model, texts(8), batch_size=4, gradient_accumulation_steps=2)
    assert len(callback.store) == 16
    assert_same_steps(dropinf.RowStore.load(ran / "during-8"), callback.store)
    filled = dropinf.RowStore.load(ran / "during-7")
    assert len(filled) == 16 and filled.weights is None
    for step in (1, 3):  # the last of an epoch
        assert filled.origin[:, 0].eq(step).sum() == 4
    assert sorted(set(filled.ids.tolist())) == list(range(7))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_trainer_of_a_shared_out_model(tmp_path, monkeypatch, kind):
    """Which needs devices that are not here: accelerate says so from the first step on."""

    class Shared(transformers.TrainerCallback):
        def on_train_begin(self, *given, **names):
            monkeypatch.setitem(PartialState._shared_state, "distributed_type", wanted)

    wanted = accelerate.DistributedType[kind]
    model = gpt2()
    callback = InfluenceCallback(plan_of(model), tmp_path / "rows")
    with pytest.raises(ValueError, match=f"under {kind} no process has the whole model"):
        train(tmp_path, callback, model, texts(4), first=Shared())


def test_lightning_after(ran):
    """With the buffers of rank 0, and each rank's own afterwards."""
    states = [torch.load(ran / f"fit-{rank}.pt") for rank in range(WORLD)]
    mean = "net.1.running_mean"
    assert not torch.equal(states[0][mean], states[1][mean])
    model = Digits()
    model.load_state_dict(states[0])
    loader = DataLoader(digits(7), 2)
    whole = dropinf.collect(model.eval(), loader, loss_fn, plan_of(model), progress=False)
    assert_same(dropinf.RowStore.load(ran / "fit-after"), whole)


def test_lightning_during(ran, tmp_path):
    model = Digits()
    model.net[1] = nn.Identity()
    callback = LightningCallback(
        plan_of(model), loss_fn, None, "during", index=lambda batch: batch[2]
    )
    fit(tmp_path, callback, model, DataLoader(digits(8), 4))
    assert_same_steps(dropinf.RowStore.load(ran / "fit-during"), callback.store)
