"""Rows of the Fisher and the Gauss-Newton matrix against Jacobians and Hessians of autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Transformer
from torch import nn

import dropinf
from dropinf import losses
from dropinf.losses.noise import Noise


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ones(C, kind, seed=0):
    """n examples of a linear model with C outputs, and how torch computes their losses."""
    n, random_ints = 6, torch.Generator().manual_seed(seed)
    x = random(n, 3, seed=seed + 1)
    if kind == "classes":
        y = torch.randint(C, (n,), generator=random_ints)
        y[2] = -100
        return losses.classification_loss, (x, y), lambda z, y: F.cross_entropy(z, y) * (y >= 0)
    if kind == "soft":
        y = random(n, C, seed=seed + 2).softmax(1)
        return losses.classification_loss, (x, y), F.cross_entropy
    if kind == "multilabel":
        y = torch.randint(2, (n, C), generator=random_ints).double()
        return losses.multilabel_loss, (x, y), F.binary_cross_entropy_with_logits
    y = random(n, C, seed=seed + 2)
    return losses.regression_loss, (x, y), F.mse_loss


def gauss_newton_matrix(model, batch, loss):
    """mean Jᵀ H J, every example alone: J of its outputs and H of its loss by autograd."""
    total, parameters = 0, dict(model.named_parameters())
    for x, y in zip(*batch, strict=True):

        def outputs(*values, x=x):
            named = dict(zip(parameters, values, strict=True))
            return torch.func.functional_call(model, named, x[None])

        values = tuple(p.detach() for p in parameters.values())
        J = torch.autograd.functional.jacobian(outputs, values)
        z = outputs(*values)
        J = torch.cat([j.reshape(z.numel(), -1) for j in J], 1)
        if y.dim() == 0 and y == -100:
            continue
        H = torch.autograd.functional.hessian(lambda z, y=y: loss(z, y[None]), z)
        total = total + J.T @ H.reshape(z.numel(), -1) @ J
    return total / len(batch[0])


def rows_of(model, batch, loss_fn):
    plan = dropinf.Plan.make(model, dropinf.Full())
    return dropinf.collect(model, [batch], loss_fn, plan, progress=False, check=False).rows


KINDS = ["classes", "soft", "multilabel", "regression"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [1, 3])
def test_gauss_newton_by_outputs(kind, C):
    """The rows of all C outputs make the matrix to rounding; of one output, one row does."""
    loss_fn, batch, loss = ones(C, kind)
    torch.manual_seed(0)
    model = nn.Linear(3, C).double()
    truth = gauss_newton_matrix(model, batch, loss)
    of = losses.gauss_newton
    rows = torch.cat([rows_of(model, batch, of(loss_fn, output=c)) for c in range(C)])
    assert kind in ("classes", "soft") or truth.norm() > 0.1  # a single class has no curvature
    torch.testing.assert_close(rows.T @ rows / len(rows), truth, rtol=1e-10, atol=1e-12)
    if C == 1:
        rows = rows_of(model, batch, of(loss_fn))
        torch.testing.assert_close(rows.T @ rows / len(rows), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("of", [losses.gauss_newton, losses.sampled])
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.more] * (k == "soft")) for k in KINDS]
)
def test_in_expectation(kind, of):
    """The mean over 600 seeds is the matrix, within five of its own standard errors."""
    loss_fn, batch, loss = ones(3, kind)
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    truth = gauss_newton_matrix(model, batch, loss)
    found = []
    for seed in range(600):
        total = of(loss_fn, seed=seed)(model, batch)
        parameters = list(model.parameters())
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(t, parameters, retain_graph=True)])
            for t in total
        ]
        rows = torch.stack(rows)
        found.append(rows.T @ rows / len(rows))
    found = torch.stack(found)
    error = found.std(0) / 600**0.5
    assert ((found.mean(0) - truth).abs() <= 5 * error + 1e-12).all()
    assert error.max() < 0.1 * truth.abs().max()  # so that a factor of two would be seen


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).cumsum(1).tanh())


def test_of_tokens():
    """Tokens that count have noise of their own: E is the sum of their matrices, by Monte Carlo."""
    model = Texts().double()
    ids = torch.randint(7, (1, 5), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 2] = -100
    batch = {"input_ids": ids, "labels": labels}
    weight = model.head.weight

    def loss(w):
        z = torch.func.functional_call(model, {"head.weight": w}, ids)
        return F.cross_entropy(z[0, :-1], labels[0, 1:], reduction="sum")

    # The last layer's outputs are linear in its weight, so that its Hessian is the matrix.
    truth = torch.autograd.functional.hessian(loss, weight.detach()).reshape(21, 21)
    for of in (losses.gauss_newton, losses.sampled):
        outer = []
        for seed in range(1000):
            (row,) = torch.autograd.grad(of(losses.causal_lm_loss, seed)(model, batch)[0], weight)
            outer.append(torch.outer(row.flatten(), row.flatten()))
        outer = torch.stack(outer)
        error = outer.std(0) / 1000**0.5
        assert ((outer.mean(0) - truth).abs() <= 5 * error + 1e-12).all()
        assert error.max() < 0.15 * truth.abs().max()


@pytest.mark.parametrize("of", [losses.sampled, losses.gauss_newton])
def test_a_class_ruled_out_by_an_infinite_logit(of):
    """As of a vocabulary that was made longer: rows are those of the other classes."""
    model, (x, y) = nn.Linear(3, 4).double(), (random(6, 3), torch.tensor([0, 2, 1, 2, 0, 1]))

    def padded(model, x):
        return torch.cat([model(x)[:, :3], torch.full((len(x), 1), -torch.inf)], 1)

    @losses.likelihood
    def ruled_out(model, batch):
        return losses.Categorical(padded(model, batch[0]), batch[1])

    @losses.likelihood
    def few(model, batch):
        return losses.Categorical(
            padded(model, batch[0]).masked_fill(torch.arange(4) == 3, -1e9), batch[1]
        )

    rows = rows_of(model, (x, y), of(ruled_out))
    assert rows.abs().sum() > 0
    torch.testing.assert_close(rows, rows_of(model, (x, y), of(few)), rtol=0, atol=1e-12)


def test_labels_are_drawn_from_the_model():
    """The frequencies of 20,000 examples, within five standard errors; none of probability 0."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    n = 20_000
    z = p.log().clamp(min=-1000).repeat(n, 1).requires_grad_()
    batch = (torch.arange(n), torch.zeros(n, dtype=torch.long))
    rows = losses.sampled(losses.likelihood(lambda m, b: losses.Categorical(z, b[1])))(None, batch)
    (u,) = torch.autograd.grad(rows.sum(), z)
    drawn = (p - u).round().mean(0)  # e_y = p - u
    assert ((drawn - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_what_is_in_an_example_counts():
    """Other numbers, or the same ones elsewhere, have other noise; and every number has its own."""
    ids = torch.tensor([[1, 2, 3], [2, 1, 3], [0, 3, 3], [1, 2, 4]])
    for batch in (ids, [ids.double()], {"x": ids.bfloat16(), "y": torch.zeros(9)}):
        u = Noise(batch, 4, 0, ids.device).uniform(torch.arange(50))
        assert len(u.unique()) == 200 and u.min() > 0 and u.max() < 1
    assert torch.equal(u, Noise({"x": ids.bfloat16()}, 4, 0, ids.device).uniform(torch.arange(50)))
    one = {"x": ids[:1].bfloat16(), "y": torch.zeros(9)}  # a table, which is no example's
    assert torch.equal(u[:1], Noise(one, 1, 0, ids.device).uniform(torch.arange(50)))
    more = {"x": ids.bfloat16(), "none": ids[:, :0]}  # a field without numbers
    assert torch.equal(u, Noise(more, 4, 0, ids.device).uniform(torch.arange(50)))
    pairs = Noise(torch.cat([ids, ids + 1]), 4, 0, ids.device, inputs=2).uniform(torch.arange(50))
    one = torch.stack([ids[2], ids[2] + 1])
    assert torch.equal(pairs[2:3], Noise(one, 1, 0, ids.device, inputs=2).uniform(torch.arange(50)))


class Masked(nn.Module):
    """Logits that depend on what a text has before them, and on no padding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)

    def forward(self, input_ids, attention_mask):
        real = self.embed(input_ids) * attention_mask[..., None]
        return self.head(real.cumsum(1).tanh())


def padded(texts, side, pad, labels=None):
    """As of a collator: ids and labels [B, T], T the longest and `pad` more."""
    T = max(map(len, texts)) + pad

    def of(rows, value):
        rows = [list(row) for row in rows]
        fill = [[value] * (T - len(row)) for row in rows]
        sides = zip(rows, fill, strict=True)
        return torch.tensor([row + f if side == "right" else f + row for row, f in sides])

    return {
        "input_ids": of(texts, 3),
        "attention_mask": of([[1] * len(text) for text in texts], 0),
        "labels": of(texts if labels is None else labels, -100),
    }


TEXTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [9, 2, 6]]
# Without the first token's label, which a text padded on the left has and another has not.
LABELS = [[-100, *text[1:]] for text in TEXTS]


@pytest.mark.parametrize("of", [losses.gauss_newton, losses.sampled])
@pytest.mark.parametrize("side, pad", [("right", 0), ("right", 4), ("left", 0), ("left", 4)])
def test_padding_does_not_count(of, side, pad):
    """Rows of texts in a batch are those of each alone, where it has none."""
    model = Masked().double()
    rows = []
    for texts, labels, where in (
        *(([text], [label], ("right", 0)) for text, label in zip(TEXTS, LABELS, strict=True)),
        (TEXTS, LABELS, (side, pad)),
    ):
        for total in of(losses.causal_lm_loss)(model, padded(texts, *where, labels)):
            rows.append(torch.autograd.grad(total, model.head.weight, retain_graph=True)[0])
    alone, together = torch.stack(rows).split(len(TEXTS))
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)
    assert alone.flatten(1).norm(dim=1).min() > 0.1


def test_a_first_label_more_leaves_the_others():
    """As padding on the left gives it."""
    weight = []
    for side in ("right", "left"):
        batch = padded(TEXTS, side, 1)
        z = torch.zeros(*batch["labels"].shape, 20, dtype=torch.float64, requires_grad=True)
        losses.sampled(losses.causal_lm_loss)(lambda z=z, **batch: z, batch).sum().backward()
        drawn = [u[u.abs().sum(1) > 0].argmin(1).tolist() for u in z.grad]
        weight.append(drawn)
    right, left = weight
    assert [len(row) for row in right] == [4, 1, 6, 2]
    assert [row[1:] for row in left] == right


def uniform(batch, B, **options):
    return Noise(batch, B, 0, torch.device("cpu"), **options).uniform(torch.arange(4))


def test_what_padding_is():
    ids, more = padded(TEXTS, "right", 0), padded(TEXTS, "right", 2)
    without = [{k: v for k, v in b.items() if k != "attention_mask"} for b in (ids, more)]
    pairs = [(b["input_ids"], b["labels"]) for b in (ids, more)]
    of_classes = [{**b, "labels": torch.arange(4)} for b in (ids, more)]
    types = [{**b, "token_type_ids": b["attention_mask"]} for b in (ids, more)]
    embedded = [{**b, "inputs_embeds": torch.stack([b["input_ids"]] * 3, 2)} for b in (ids, more)]
    inside = [{"inputs": b, "weight": torch.ones(4)} for b in (ids, more)]
    targets = [[1, 2, 3], [4, 5], [6], [7, 8, 9]]
    seq2seq = []  # of as many positions as the inputs once, whose padding is not theirs
    for longest in (2, 4, 6):
        labels = padded(targets, "right", longest)["labels"]
        shifted = labels.roll(1).clamp(min=0)
        seq2seq.append({**ids, "labels": labels, "decoder_input_ids": shifted})
    for batches in (without, pairs, of_classes, types, embedded, inside, seq2seq):
        drawn = [uniform(batch, 4) for batch in batches]
        assert all(torch.equal(one, drawn[0]) for one in drawn)
        assert len(drawn[0].unique()) == 16
    chosen = [
        uniform(padded(TEXTS, side, n), 2, inputs=2) for side in ("left", "right") for n in (0, 2)
    ]
    assert all(torch.equal(one, chosen[0]) for one in chosen) and len(chosen[0].unique()) == 8


def test_what_no_padding_is():
    """Token by token, also of the same number as the padding's; labels; and tables as wide."""
    ids = padded(TEXTS, "right", 0)
    other = [
        padded([[*text, 3] for text in TEXTS], "right", 0),
        padded([[3, *text] for text in TEXTS], "right", 0),
        padded([text[:-1] for text in TEXTS], "right", 1),
        padded(TEXTS, "right", 0, LABELS),
        {**ids, "features": torch.arange(4)[:, None]},
    ]
    for batch in other:
        assert not (uniform(batch, 4) == uniform(ids, 4)).any()


@pytest.mark.parametrize("of", [losses.gauss_newton, losses.sampled])
def test_rows_are_reproducible(of):
    """Of any batches, in any order, one by one; other seeds and other examples differ."""
    model = Transformer().eval()

    @losses.likelihood
    def loss_fn(model, ids):
        return losses.Categorical(model(ids)[:, :-1], ids[:, 1:])

    ids = torch.randint(1, 23, (6, 8), generator=torch.Generator().manual_seed(0))
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=50))

    def rows(loader, seed=0):
        return dropinf.collect(model, loader, of(loss_fn, seed), plan, progress=False).rows

    whole = rows([ids])
    size = 2e-5 * whole.abs().max().item()
    for loader in ([ids], [ids[:4], ids[4:]], list(ids.split(1))):
        torch.testing.assert_close(rows(loader), whole, rtol=0, atol=size)
    torch.testing.assert_close(rows([ids.flip(0)]).flip(0), whole, rtol=0, atol=size)
    assert (rows([ids], seed=1) - whole).norm(dim=1).min() > 0.1 * whole.norm(dim=1).max()
    twins = rows([ids[[0, 0, 1]]])
    torch.testing.assert_close(twins[0], twins[1], rtol=0, atol=size)


def leave_one_out(n, m, d, ridge):
    """A least-squares problem, and what its queries' losses rise by without each example.

    In closed form, one solution of the normal equations for each example that is left out.
    """
    random = np.random.default_rng(0)
    X, Q = random.normal(size=(n, d)), random.normal(size=(m, d))
    X[:, 0] = Q[:, 0] = 1
    w = random.normal(size=d)
    # Some labels are much noisier than others, as in the world.
    y = X @ w + random.normal(size=n) * np.exp(random.normal(size=n) / 2)
    a = Q @ w + random.normal(size=m)

    def solved(keep):
        A = X[keep].T @ X[keep] / n + ridge * np.eye(d)
        return np.linalg.solve(A, X[keep].T @ y[keep] / n)

    all_of_them = np.arange(n)
    whole = solved(all_of_them)
    rise = np.empty((m, n))
    for i in range(n):
        rise[:, i] = (Q @ solved(all_of_them != i) - a) ** 2 - (Q @ whole - a) ** 2
    return (X, y), (Q, a), whole, rise


def fit_of(truth, found):
    """Correlation, and the slope of the truth over what was found."""
    return np.corrcoef(truth, found)[0, 1], (truth * found).sum() / (found * found).sum()


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_leave_one_out_of_least_squares(ridge):
    """Scores / n are the rise: with gauss-newton to .999 and a slope within 0.1 of 1."""
    n, m, d = 500, 20, 10
    train, queries, w, rise = leave_one_out(n, m, d, ridge)
    model = nn.Linear(d, 1, bias=False).double()
    model.weight.data = torch.from_numpy(w)[None]
    data, asked = ([tuple(map(torch.from_numpy, pair))] for pair in (train, queries))
    plan = dropinf.Plan.make(model, dropinf.Full())

    def rows(loader, loss_fn):
        return dropinf.collect(model, loader, loss_fn, plan, progress=False)

    store, q = rows(data, losses.regression_loss), rows(asked, losses.regression_loss)
    found = {}
    loss_fn = losses.regression_loss
    drawn = torch.cat([rows(data, losses.sampled(loss_fn, seed)).rows for seed in range(8)])
    for kind, F_rows in (
        ("gauss-newton", rows(data, losses.gauss_newton(loss_fn))),
        ("sampled", dropinf.RowStore(drawn, plan)),
    ):
        # mean squared error + ridge |w|^2 has the Hessian F + 2 ridge.
        solver = dropinf.solvers.Cholesky(2 * ridge, absolute=True).fit(F_rows)
        found[kind] = dropinf.scores(q, store, solver).numpy() / n
    solver = dropinf.solvers.Cholesky(2 * ridge, absolute=True).fit(store)
    found["empirical"] = dropinf.scores(q, store, solver).numpy() / n
    fits = {kind: fit_of(rise.flatten(), scores.flatten()) for kind, scores in found.items()}
    print(fits)
    correlation, slope = fits["gauss-newton"]
    assert correlation >= 0.999 and abs(slope - 1) < 0.1
    correlation, slope = fits["sampled"]
    assert correlation >= 0.99 and abs(slope - 1) < 0.1  # of eight draws
    correlation, slope = fits["empirical"]
    assert correlation < 0.98 and abs(slope - 1) > 1
    if ridge == 0:
        for kind in ("empirical", "gauss-newton"):
            got = dropinf.influence(
                model,
                data,
                asked,
                losses.regression_loss,
                dropinf.Full(),
                damping=1e-12,
                progress=False,
                fisher=kind,
            )
            np.testing.assert_allclose(got / n, found[kind], rtol=1e-6, atol=1e-9)


def test_refuses():
    model, data = nn.Linear(3, 2), [(torch.randn(4, 3), torch.randint(2, (4,)))]

    def plain(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    for fisher, loss_fn, said in (
        ("true", plain, r"fisher must be one of \['empirical', 'sampled', 'gauss-newton'\], got"),
        ("sampled", plain, "sampled: .*plain.* does not say what the model's outputs are; take"),
        ("gauss-newton", plain, "gauss_newton: .* or make yours with dropinf.losses.likelihood"),
    ):
        with pytest.raises(ValueError, match=said):
            dropinf.influence(model, data, data, loss_fn, fisher=fisher, progress=False)
    for output in (-1, 2):
        with pytest.raises(ValueError, match=f"output must be 0 to 1, got {output}"):
            losses.gauss_newton(losses.classification_loss, output=output)(model, data[0])

    @losses.likelihood
    def hidden(model, batch):
        return losses.Categorical(model(batch.x), batch.y)

    batch = type("Batch", (), {"x": data[0][0], "y": data[0][1]})()
    with pytest.raises(ValueError, match="a Batch, holds no tensor of 4 examples"):
        losses.sampled(hidden)(model, batch)
