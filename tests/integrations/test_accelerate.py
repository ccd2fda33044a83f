"""Models that accelerate placed: rows are those of the plain model, or refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

import dropinf  # noqa: E402

MODES = pytest.mark.parametrize("mode", ["activations", "grads"])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def rows_of(model, mode, include=None):
    torch.manual_seed(1)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=6), include)
    batch = torch.randn(4, 5)
    with dropinf.capture(model, plan, mode) as tap:
        return tap.rows(model(batch).square().sum(1))


def on_the_cpu(model, folder):
    places = {"0": "cpu", "1": "cpu", "2": "cpu", "3": "cpu", "4": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


def moved_when_called(model, folder):
    return accelerate.cpu_offload_with_hook(model, execution_device="cpu")[0]


@MODES
@pytest.mark.parametrize("place", [on_the_cpu, moved_when_called])
def test_in_place(place, mode, tmp_path):
    placed = place(net(), tmp_path)
    assert "_hf_hook" in vars(placed)
    assert torch.equal(rows_of(placed, mode), rows_of(net(), mode))


def all_on_the_cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def all_on_the_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def one_on_the_disk(model, folder):
    places = {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "cpu"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@MODES
@pytest.mark.parametrize("include", [None, "0"])
@pytest.mark.parametrize("place", [all_on_the_cpu, all_on_the_disk, one_on_the_disk])
def test_offloaded(place, include, mode, tmp_path):
    """Whole or in part, tracked or not; the model runs as before."""
    placed = place(net(), tmp_path)
    x = torch.randn(3, 5)
    said = (
        r"is on the meta device, as the weights .* accelerate offloads; load the model onto a dev"
    )
    with pytest.raises(ValueError, match=said):
        rows_of(placed, mode, include)
    loader = DataLoader(TensorDataset(x), 2)
    with pytest.raises(ValueError, match=said):
        dropinf.collect(
            placed,
            loader,
            lambda model, batch: model(batch[0]).square().sum(1),
            dropinf.Plan.make(placed, dropinf.Dropout(r=6), include),
            tmp_path / "rows",
            mode,
            progress=False,
        )
    assert not (tmp_path / "rows").exists()
    torch.testing.assert_close(placed(x), net()(x))


def test_prepared_in_one_process():
    """What `Accelerator.prepare` gives: rows, and the ids of what its loader draws."""
    data = TensorDataset(torch.randn(7, 5), torch.arange(7))
    loader = DataLoader(data, 2, shuffle=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model, loader = accelerator.prepare(net(), loader)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=6))

    def losses(model, batch):
        seen.extend(batch[1].tolist())
        return model(batch[0]).square().sum(1)

    seen = []
    store = dropinf.collect(model, loader, losses, plan, progress=False, check=False)
    assert store.ids.tolist() == seen and sorted(seen) == list(range(7))
    plain = DataLoader(data, 1)
    whole = dropinf.collect(net(), plain, losses, plan, progress=False, check=False)
    torch.testing.assert_close(store.rows, whole.rows[store.ids])
