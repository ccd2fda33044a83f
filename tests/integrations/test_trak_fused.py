"""TRAK with dropinf's rows, against TRAK's own vmapped gradients."""

import pytest
import torch
from torch import nn

import dropinf

pytest.importorskip("trak", reason="traker is not installed: pip install 'traker==0.3.*'")
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
)

from dropinf.integrations.trak import DropoutGradientComputer, fused


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LayerNorm(108), nn.Linear(108, 4)
    )
    return model.to(dtype).eval()


def images(B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(B)
    return [
        torch.randn(B, 1, 6, 6, generator=generator, dtype=dtype),
        torch.randint(4, (B,), generator=generator),
    ]


def own_features(model, task, batch, plan):
    """TRAK's gradients of every parameter, at the plan's coordinates."""
    own = FunctionalGradientComputer(model, task, 0, torch.float64, "cpu")
    grads = own.compute_per_sample_grad(batch)
    parts = [grads[s.name].flatten(1)[:, s.index] * s.scale for s in plan.slots]
    return torch.cat(parts, 1).detach()


@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize(
    "task", [ImageClassificationModelOutput(), IterativeImageClassificationModelOutput()]
)
@pytest.mark.parametrize("kind", ["dropout", "by energy", "full"])
def test_features_equal_traks(kind, task, B):
    model, batch = network(), images(B)
    compression = dropinf.Full() if kind == "full" else dropinf.Dropout(r=20)
    if kind == "by energy":
        energies = dropinf.energies(
            model, [images(7)], lambda model, batch: model(batch[0]).square().sum(1)
        )
        compression = dropinf.Dropout(r=20, energies=energies)
    plan = dropinf.Plan.make(model, compression)
    truth = own_features(model, ImageClassificationModelOutput(), batch, plan)
    computer = DropoutGradientComputer(model, task, plan=plan, device="cpu")
    rows = computer.compute_per_sample_grad(batch)
    torch.testing.assert_close(
        rows.double(), truth, rtol=1e-5, atol=1e-6 * float(truth.abs().max())
    )
    own = FunctionalGradientComputer(
        model, ImageClassificationModelOutput(), 0, torch.float64, "cpu"
    )
    assert torch.equal(computer.compute_loss_grad(batch), own.compute_loss_grad(batch))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert type(model) is nn.Sequential


def run(tmp_path, dtype=torch.float32, checkpoints=1, **arguments):
    """TRAK from beginning to end; scores [n, m] and features of the first checkpoint."""
    model = network(dtype)
    states = [{k: v + 0.1 * i for k, v in model.state_dict().items()} for i in range(checkpoints)]
    traker = TRAKer(
        model,
        "image_classification",
        train_set_size=40,
        save_dir=tmp_path,
        device="cpu",
        use_half_precision=False,
        lambda_reg=1e-3,
        logging_level=50,
        **arguments,
    )
    train, queries = images(40, dtype), images(5, dtype)
    for i, state in enumerate(states):
        traker.load_checkpoint(state, model_id=i)
        for start in (0, 20):
            traker.featurize([t[start : start + 20] for t in train], num_samples=20)
    traker.finalize_features()
    for i, state in enumerate(states):
        traker.start_scoring_checkpoint("queries", state, model_id=i, num_targets=5)
        traker.score(queries, num_samples=5)
    traker.saver.load_current_store(0)
    grads = torch.tensor(traker.saver.current_store["grads"])
    return torch.tensor(traker.finalize_scores("queries")), grads


def test_trak_fused(tmp_path):
    """Its features are TRAK's own at the plan's coordinates, and so are the scores made of them."""
    model = network(torch.float32)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=8))
    scores, grads = run(tmp_path / "fused", checkpoints=2, **fused(plan))
    P = sum(p.numel() for p in model.parameters())
    truth = (
        own_features(model, ImageClassificationModelOutput(), images(40, torch.float32), plan)
        / P**0.5
    )
    torch.testing.assert_close(grads, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))

    class Coordinates:
        proj_dim, proj_type = plan.width, "plan"

        def project(self, grads, model_id):
            parts = [grads[s.name].flatten(1)[:, s.index] * s.scale for s in plan.slots]
            return torch.cat(parts, 1)

        def free_memory(self):
            pass

    expected, _ = run(tmp_path / "trak", checkpoints=2, projector=Coordinates())
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    model = network(torch.float32)
    run(tmp_path, **fused(dropinf.Plan.make(model, dropinf.Dropout(r=8))))
    with pytest.raises(AssertionError, match="dropinf"):
        run(tmp_path, **fused(dropinf.Plan.make(model, dropinf.Dropout(r=8, seed=1))))


class Odd(ImageClassificationModelOutput):
    """A task with its own way of calling the model."""

    def __init__(self, call):
        super().__init__()
        self.get_output = call


REFUSED = {
    "no batch of one": (lambda m, w, b, x, y: m(x[0]).sum(), "batches of one"),
    "no call of the model": (lambda m, w, b, x, y: x.sum(), "did not call the model"),
    "fails before": (lambda m, w, b, x, y: w["nowhere"].sum(), "failed first"),
    "twice": (lambda m, w, b, x, y: (m(x.unsqueeze(0)) + m(x.unsqueeze(0))).sum(), "twice"),
    "in a transform": (
        lambda m, w, b, x, y: torch.func.vmap(lambda x: m(x[None]).sum())(x[None]).sum(),
        "vmap or grad of its own",
    ),
    "random": (
        lambda m, w, b, x, y: m(x.unsqueeze(0)).sum() * torch.rand(()),
        "alone; call .eval",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_tasks(name):
    """What cannot be run on a whole batch is refused in a sentence; output_fn is the way out."""
    call, message = REFUSED[name]
    model, batch = network(), images(3)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=8))
    computer = DropoutGradientComputer(model, Odd(call), plan=plan)
    with pytest.raises(ValueError, match=message):
        computer.compute_per_sample_grad(batch)
    assert type(model) is nn.Sequential
    computer = DropoutGradientComputer(
        model, Odd(call), plan=plan, output_fn=lambda model, batch: model(batch[0]).sum(1)
    )
    assert computer.compute_per_sample_grad(batch).shape == (3, plan.width)


def test_a_task_that_uses_the_weights_itself():
    """A penalty on a weight, in the output of each example, is a part of its gradient."""

    def penalised(m, w, b, x, y):
        own = ImageClassificationModelOutput.get_output(m, w, b, x, y)
        return own + w["4.weight"].pow(2).sum()

    model, batch = network(), images(3)
    plan = dropinf.Plan.make(model, dropinf.Full())
    rows = [
        DropoutGradientComputer(model, task, plan=plan).compute_per_sample_grad(batch)
        for task in (Odd(penalised), ImageClassificationModelOutput())
    ]
    penalty = torch.zeros(plan.width, dtype=rows[0].dtype)
    (slot,) = (slot for slot in plan.slots if slot.name == "4.weight")
    penalty[slot.entries] = 2 * model[4].weight.detach().flatten()[slot.index]
    torch.testing.assert_close(rows[0], rows[1] + penalty)


def test_an_input_made_with_weights():
    """What the function does before it calls the model is a part of the gradient too."""

    def scaled(m, w, b, x, y):
        return ImageClassificationModelOutput.get_output(m, w, b, x * w["4.bias"].sum(), y)

    model, batch, task = network(), images(3), Odd(scaled)
    plan = dropinf.Plan.make(model, dropinf.Full())
    rows = DropoutGradientComputer(model, task, plan=plan).compute_per_sample_grad(batch)
    torch.testing.assert_close(rows.float(), own_features(model, task, batch, plan).float())


def test_one_call_a_batch():
    """The function and the model run once on a batch, and the model's own error comes as it is."""
    calls = []

    def counted(m, w, b, x, y):
        calls.append("function")
        return ImageClassificationModelOutput.get_output(m, w, b, x, y)

    def noted(module, args):
        calls.append(("model", type(module), len(args[0])))
        if len(args[0]) == 2:
            raise KeyError("of the model")

    model = network()
    model.register_forward_pre_hook(noted)
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=8))
    computer = DropoutGradientComputer(model, Odd(counted), plan=plan, check=False)
    computer.compute_per_sample_grad(images(3))
    assert calls == ["function", ("model", nn.Sequential, 3)]
    with pytest.raises(KeyError, match="of the model"):
        computer.compute_per_sample_grad(images(2))


def test_mixed_examples_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, 4))
    model.register_forward_hook(lambda module, args, output: output - output.mean(0))
    plan = dropinf.Plan.make(model, dropinf.Full())
    computer = DropoutGradientComputer(model, ImageClassificationModelOutput(), plan=plan)
    with pytest.raises(ValueError, match="example 0 has output"):
        computer.compute_per_sample_grad(images(3, torch.float32))


def test_grad_wrt_must_be_the_plans():
    model = network()
    plan = dropinf.Plan.make(model, dropinf.Full(), include="4")
    task = ImageClassificationModelOutput()
    DropoutGradientComputer(model, task, grad_wrt=["4.weight", "4.bias"], plan=plan)
    with pytest.raises(ValueError, match="include=grad_wrt"):
        DropoutGradientComputer(model, task, grad_wrt=["4.weight"], plan=plan)
