"""Losses of examples against formulas in numpy, one example at a time, in float64."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Transformer
from torch import nn

import dropinf
from dropinf import losses


class Given(nn.Module):
    """Returns what it is given, as a model of transformers would."""

    def forward(self, logits, **others):
        return SimpleNamespace(logits=logits)


class Texts(nn.Module):
    """A small causal language model; or a reward model, of the sum of its last logits."""

    def __init__(self, seed=0, reward=False):
        super().__init__()
        torch.manual_seed(seed)
        self.lm, self.reward = Transformer().double().eval(), reward

    def forward(self, input_ids, attention_mask=None):
        logits = self.lm(input_ids)
        return SimpleNamespace(logits=logits[:, -1].mean(1, True) if self.reward else logits)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def log_softmax(z):
    z = np.asarray(z, dtype=np.float64)
    return z - z.max() - np.log(np.exp(z - z.max()).sum())


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def asked(loss_fn, logits, labels):
    found = loss_fn(Given(), {"logits": logits, "labels": labels})
    if not torch.is_tensor(logits) or loss_fn is losses.causal_lm_loss:
        return found.numpy()
    assert torch.equal(found, loss_fn(lambda x: x, (logits, labels)))  # a pair, and a plain model
    return found.numpy()


def test_classification():
    z, y = random(5, 4), torch.tensor([0, 3, -100, 1, 2], dtype=torch.int32)
    truth = [0 if c == -100 else -log_softmax(z[b])[c] for b, c in enumerate(y.tolist())]
    np.testing.assert_allclose(asked(losses.classification_loss, z, y), truth, rtol=1e-12)
    q = random(5, 4, seed=1).softmax(1)
    truth = [-(q[b].numpy() * log_softmax(z[b])).sum() for b in range(5)]
    np.testing.assert_allclose(asked(losses.classification_loss, z, q), truth, rtol=1e-12)
    pixels, y = random(3, 4, 2, 5), torch.randint(4, (3, 2, 5))
    y[0, 1, 2:] = -100
    truth = [
        -sum(
            log_softmax(pixels[b, :, i, j])[y[b, i, j]]
            for i in range(2)
            for j in range(5)
            if y[b, i, j] >= 0
        )
        for b in range(3)
    ]
    np.testing.assert_allclose(asked(losses.classification_loss, pixels, y), truth, rtol=1e-12)


def test_multilabel_and_regression():
    z, y = random(5, 3), torch.randint(2, (5, 3))
    p = sigmoid(z.numpy())
    truth = -np.where(y == 1, np.log(p), np.log(1 - p)).mean(1)
    np.testing.assert_allclose(asked(losses.multilabel_loss, z, y), truth, rtol=1e-12)
    y = random(5, 3, seed=1)
    truth = ((z - y).numpy() ** 2).mean(1)
    np.testing.assert_allclose(asked(losses.regression_loss, z, y), truth, rtol=1e-12)
    truth = (z[:, 0] - y[:, 0]).numpy() ** 2
    for outputs in (z[:, :1], z[:, 0]):
        np.testing.assert_allclose(asked(losses.regression_loss, outputs, y[:, 0]), truth)


def test_tokens():
    z, y = random(3, 6, 7), torch.randint(7, (3, 6))
    y[0, 2:] = y[1, :3] = -100
    for loss_fn, shift in ((losses.causal_lm_loss, 1), (losses.masked_lm_loss, 0)):
        truth = [
            -sum(log_softmax(z[b, t - shift])[y[b, t]] for t in range(shift, 6) if y[b, t] >= 0)
            for b in range(3)
        ]
        np.testing.assert_allclose(asked(loss_fn, z, y), truth, rtol=1e-12)
    one = losses.causal_lm_loss(Given(), {"logits": z[:, :1], "labels": y[:, :1]})
    assert torch.equal(one, torch.zeros(3, dtype=torch.float64))  # nothing comes after one token


def test_half_precision_is_summed_in_float32():
    z, y = random(5, 4).bfloat16(), torch.randint(4, (5,))
    found = losses.classification_loss(lambda x: x, (z, y))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses.classification_loss(lambda x: x, (z.float(), y)))


def pairs(B=3, T=7, reference=True):
    torch.manual_seed(3)
    ids = torch.randint(1, 23, (2 * B, T))
    mask = torch.zeros(2 * B, T, dtype=torch.long)
    mask[:, 3:] = 1
    mask[1, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    given = {"ref_chosen_logps": random(B, seed=4) - 9, "ref_rejected_logps": random(B, seed=5) - 9}
    return batch | given if reference else batch


def logp(model, ids, mask):
    z = model(ids[None]).logits[0].detach().numpy()
    return sum(log_softmax(z[t - 1])[ids[t]] for t in range(1, len(ids)) if mask[t])


def test_dpo():
    """With the reference's numbers given, and by a reference model; TRL's two forms of a batch."""
    model, reference, B = Texts(), Texts(seed=1), 3
    batch = pairs(B)
    ids, mask = batch["input_ids"], batch["completion_mask"]
    own, ref = ([logp(m, ids[i], mask[i]) for i in range(2 * B)] for m in (model, reference))
    for by_model in (False, True):
        if not by_model:
            ref = [*batch["ref_chosen_logps"].tolist(), *batch["ref_rejected_logps"].tolist()]
        else:
            ref = [logp(reference, ids[i], mask[i]) for i in range(2 * B)]
        truth = [
            -np.log(sigmoid(0.3 * (own[b] - ref[b] - own[B + b] + ref[B + b]))) for b in range(B)
        ]
        loss_fn = losses.dpo_loss(reference if by_model else None, beta=0.3)
        np.testing.assert_allclose(loss_fn(model, batch).detach(), truth, rtol=1e-10)
        labels = {k: v for k, v in batch.items() if k != "completion_mask"}
        labels["labels"] = ids.masked_fill(mask == 0, -100)
        np.testing.assert_allclose(loss_fn(model, labels).detach(), truth, rtol=1e-10)


def test_rewards():
    model, B = Texts(reward=True), 3
    batch = {"input_ids": pairs(B)["input_ids"]}
    f = [model(ids[None]).logits.item() for ids in batch["input_ids"]]
    truth = [-np.log(sigmoid(f[b] - f[B + b])) for b in range(B)]
    np.testing.assert_allclose(losses.reward_loss(model, batch).detach(), truth, rtol=1e-10)
    margin = random(B)
    truth = [-np.log(sigmoid(f[b] - f[B + b] - margin[b].item())) for b in range(B)]
    found = losses.reward_loss(model, batch | {"margin": margin})
    np.testing.assert_allclose(found.detach(), truth, rtol=1e-10)
    linear = nn.Linear(4, 1).double()
    chosen, rejected = random(B, 4), random(B, 4, seed=1)
    f = [linear(x).detach().numpy()[:, 0] for x in (chosen, rejected)]
    found = losses.reward_loss(linear, (chosen, rejected)).detach()
    np.testing.assert_allclose(found, -np.log(sigmoid(f[0] - f[1])), rtol=1e-10)


@pytest.mark.parametrize("τ", [1.0, 2.5])
def test_distillation(τ):
    """Up to the teacher's entropy, τ² KL; and its gradient is that of the KL divergence."""
    torch.manual_seed(0)
    student, teacher = (nn.Linear(5, 4).double() for _ in range(2))
    x = random(6, 5)
    loss_fn = losses.distillation_loss(teacher, temperature=τ)
    found = loss_fn(student, (x, torch.zeros(6, dtype=torch.long)))
    grads = torch.autograd.grad(found.sum(), student.weight)
    z, t = student(x), teacher(x).detach()
    kl = 0
    for b in range(6):
        log_q, log_p = log_softmax(t[b] / τ), torch.log_softmax(z[b] / τ, 0)
        entropy = -(np.exp(log_q) * log_q).sum()
        value = τ**2 * (torch.from_numpy(np.exp(log_q)) * (torch.from_numpy(log_q) - log_p)).sum()
        np.testing.assert_allclose(found[b].item(), value.item() + τ**2 * entropy, rtol=1e-10)
        kl = kl + value
    torch.testing.assert_close(grads, torch.autograd.grad(kl, student.weight))
    with torch.no_grad():  # of tokens, those without a label do not count
        texts = {"input_ids": torch.randint(1, 23, (2, 6)), "labels": torch.full((2, 6), -100)}
        texts["labels"][0, 2] = 1
        of_texts = losses.distillation_loss(Texts(1), losses.causal_lm_loss, τ)
        p, q = (m(texts["input_ids"]).logits[0, 1] / τ for m in (Texts(), Texts(1)))
        truth = [-(τ**2) * (np.exp(log_softmax(q)) * log_softmax(p)).sum(), 0]
        np.testing.assert_allclose(of_texts(Texts(), texts), truth, rtol=1e-10)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_pair_has_one_row(kind, recwarn):
    """Its gradient by autograd of that pair alone, in closed form, and no warning."""
    model, B = Texts(reward=kind == "reward").double(), 3
    batch = pairs(B)
    if kind == "reward":
        batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    loss_fn = losses.dpo_loss() if kind == "dpo" else losses.reward_loss
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    store = dropinf.collect(model, [batch], loss_fn, plan, progress=False)
    assert not recwarn and set(plan.paths.values()) == {"closed form"}
    singly = [
        {k: v[[b, B + b]] if len(v) == 2 * B else v[[b]] for k, v in batch.items()}
        for b in range(B)
    ]
    again = dropinf.collect(model, singly, loss_fn, plan, progress=False)
    torch.testing.assert_close(again.rows, store.rows)
    assert not recwarn
    for b, one in enumerate(singly):
        named = dict(model.named_parameters())
        loss = loss_fn(model, one).sum()
        grads = torch.autograd.grad(loss, [named[s.name] for s in plan.slots])
        parts = zip(plan.slots, grads, strict=True)
        truth = torch.cat([g.flatten()[s.index] * s.scale for s, g in parts])
        torch.testing.assert_close(store.rows[b], truth, rtol=0, atol=1e-12 * truth.abs().max())


def test_a_loss_of_ones_own():
    @losses.likelihood
    def own(model, batch):
        """Mine."""
        x, y, w = batch
        return losses.SquaredError(model(x), y, w)

    model, x, y, w = nn.Linear(3, 2).double(), random(4, 3), random(4, 2), random(4).abs()
    truth = w * (model(x) - y).square().sum(1)
    torch.testing.assert_close(own(model, (x, y, w)), truth)
    assert own.__name__ == "own" and own.__doc__ == "Mine."
    again = pickle.loads(pickle.dumps(losses.classification_loss))
    assert again is losses.classification_loss


def test_losses_refuse():
    """In one sentence each, with the way out."""
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    loss_fn = losses.classification_loss
    for call, said in (
        (lambda: loss_fn(Given(), {"logits": x}), r"no 'labels', only \['logits'\]; use a data"),
        (lambda: loss_fn(model, x), "must be a mapping with 'labels' or a pair .* got a Tensor"),
        (
            lambda: loss_fn(model, (x, y, y)),
            "a tuple of Tensor, Tensor, Tensor; write a loss function",
        ),
        (lambda: loss_fn(model, (x, y[:3])), r"labels \[3\] do not belong to logits \[4, 2\]"),
        (lambda: loss_fn(model, (x, torch.rand(4))), r"or \[4, 2\] probabilities"),
        (lambda: loss_fn(lambda x: x.sum(1), (x, y)), r"must be \[B, \.\.\., C\], got \[4\]"),
        (lambda: loss_fn(lambda x: (x,), (x, y)), "returned a tuple, which is no tensor"),
        (
            lambda: losses.regression_loss(model, (x, torch.rand(4))),
            r"targets \[4\] do not belong to outputs \[4, 2\]; give one for each output",
        ),
        (
            lambda: losses.SquaredError(torch.rand(4, 2, 3), torch.rand(4, 3, 2)),
            r"targets \[4, 3, 2\] do not belong to outputs \[4, 2, 3\]",
        ),
        (
            lambda: losses.Bernoulli(torch.rand(4, 1), torch.rand(1, 4)),
            r"targets \[1, 4\] do not belong to outputs \[4, 1\]",
        ),
        (
            lambda: losses.causal_lm_loss(model, (x, y)),
            "do not have the same examples and positions",
        ),
        (lambda: losses.dpo_loss(beta=0), "beta must be positive, got 0"),
        (lambda: losses.dpo_loss()(Texts(), pairs(reference=False)), "has no 'ref_chosen_logps'"),
        (lambda: losses.dpo_loss()(model, (x, y)), "must be a mapping with input_ids"),
        (
            lambda: losses.dpo_loss()(Texts(), {"input_ids": torch.ones(2, 3)}),
            "neither 'completion_mask' nor 'labels'",
        ),
        (
            lambda: losses.dpo_loss()(Texts(), pairs() | {"ref_chosen_logps": torch.zeros(1)}),
            r"'ref_chosen_logps' must be \[3\], one number a pair, got \[1\]",
        ),
        (
            lambda: losses.reward_loss(Given(), {"logits": torch.ones(5, 1)}),
            "chosen texts and then as many rejected ones, got 5 in all",
        ),
        (lambda: losses.reward_loss(Given(), {"logits": x}), r"one number a text, got \[4, 3\]"),
        (lambda: losses.reward_loss(model, x), r"or a pair \(chosen, rejected\), got a Tensor"),
        (lambda: losses.distillation_loss(model, temperature=0), "temperature must be positive"),
        (lambda: losses.distillation_loss(model, nn.MSELoss()), "must be a cross entropy of"),
        (
            lambda: losses.distillation_loss(model, losses.regression_loss)(model, (x, x[:, :2])),
            "is a SquaredError, and distillation needs a Categorical",
        ),
        (
            lambda: losses.distillation_loss(nn.Linear(3, 5))(model, (x, y)),
            r"the teacher's logits are \[4, 5\], the student's \[4, 2\]",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            call()
