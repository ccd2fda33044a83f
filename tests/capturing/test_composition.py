"""Ways of training: rows per token and segment, batch dimensions, compiled and half models."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CASES,
    assert_exact,
    build,
    cross_entropy,
    squares,
    tokens_cross_entropy,
    true_rows,
)
from exact_autograd import Rerun
from layer_cases import LAYERS, Experts
from torch import nn

from dropinf import Dropout, Full, Plan, RowStore, capture, collect

MODES = ["activations", "grads"]
transformer = next(case for case in CASES if case.name == "transformer")


def truth_of(loss_fn, model, batch, plan):
    """[1, R] of the loss of a batch of one, by ordinary autograd."""
    return true_rows(transformer._replace(loss_fn=loss_fn), model, batch, plan)


# Rows per token.


class PerToken(nn.Module):
    """Every position on its own, so that a token's row is the gradient of its own loss."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.norm = nn.Embedding(9, 6), nn.Linear(6, 5), nn.LayerNorm(5)
        self.position = nn.Embedding(7, 6)
        self.shift, self.scale = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(1, 7, 5))

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return torch.tanh(self.norm(self.mix(x) + self.shift)) * self.scale[:, : ids.shape[1]]


def token_losses(model, ids):
    return model(ids).pow(2).sum(-1)


@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (1, 3), (3, 1)], ids=str)
def test_token_rows(shape):
    torch.manual_seed(0)
    model, ids = PerToken().double(), torch.randint(9, shape)
    plan = Plan.make(model, Dropout(r=20))
    B, T = shape
    truth = torch.cat(
        [
            truth_of(lambda m, i, t=t: token_losses(m, *i)[:, t], model, (ids[b : b + 1],), plan)
            for b in range(B)
            for t in range(T)
        ]
    )
    one_by_one = lambda losses: torch.stack([losses[:, t] for t in range(T)], 1)  # noqa: E731
    for reduce in (lambda losses: losses, lambda losses: losses.sum(1), one_by_one):
        with capture(model, plan, per="token") as tap:
            assert_exact(tap.rows(reduce(token_losses(model, ids))), truth)
        assert tap.origin.tolist() == [[b, t] for b in range(B) for t in range(T)]


def test_token_rows_behind_heads():
    """[B, heads, T, D]: the tokens are the third dimension."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(2, 1, 3))

        def forward(self, x):
            return (x.unflatten(2, (2, 3)).transpose(1, 2) * self.scale).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Heads().double(), torch.randn(2, 4, 6, dtype=torch.float64)
    plan = Plan.make(model, Full())
    with capture(model, plan, per="token") as tap:
        rows = tap.rows(model(x).pow(2).sum(-1))
    truth = 2 * model.scale.flatten() * x.flatten(0, 1).square()
    assert_exact(rows, truth)


@pytest.mark.parametrize("B", [1, 3])
def test_token_rows_where_positions_are_flattened_and_some_reach_no_loss(B):
    """As in GPT-2, of a loss without the last token; a row is a token's x times its dy."""

    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

        def forward(self, x):
            hidden = (x.flatten(0, 1) @ self.first).tanh().view(B, 5, 4)
            return hidden, (hidden.flatten(0, 1) @ self.second).view(B, 5, 4)

    def losses(found):
        return found[1][:, :-1].square().sum((1, 2))

    torch.manual_seed(0)
    model, x = Flattening().double(), torch.randn(B, 5, 4, dtype=torch.float64)
    with capture(model, Plan.make(model, Full()), per="token") as tap:
        rows = tap.rows(losses(model(x)))
    assert tap.origin.tolist() == [[b, t] for b in range(B) for t in range(5)]
    hidden, out = found = model(x)
    d_hidden, d_out = torch.autograd.grad(losses(found).sum(), (hidden, out))
    pairs = (x, d_hidden * (1 - hidden.square())), (hidden, d_out)
    truth = torch.cat([torch.einsum("bti,bto->btio", *pair).flatten(2) for pair in pairs], 2)
    assert_exact(rows, truth.flatten(0, 1).detach())


def test_token_rows_of_a_sequence_first_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    plan = Plan.make(model, Dropout(r=20))
    x = torch.randn(4, 2, 3, dtype=torch.float64)  # [T, B, I]
    truth = torch.cat(
        [
            truth_of(lambda m, one: m(*one).pow(2).sum(1), model, (x[t, b : b + 1],), plan)
            for b in range(2)
            for t in range(4)
        ]
    )
    with capture(model, plan, per="token", batch_dim=1) as tap:
        assert_exact(tap.rows(model(x).pow(2).sum(-1).T), truth)


def test_token_rows_add_up_to_the_examples():
    model, batch = build(transformer, torch.float64)
    plan = Plan.make(model, Dropout(r=30))
    truth = true_rows(transformer, model, batch, plan)
    with capture(model, plan, per="token") as tap:
        rows = tap.rows(transformer.loss_fn(model, batch))
    assert rows.shape == (5 * 8, plan.width)
    assert_exact(rows.unflatten(0, (5, 8)).sum(1), truth)


@pytest.mark.parametrize("style", ["index_add", "sorted"])
def test_token_rows_of_routed_tokens(style):
    """Experts see tokens out of order; each token's row is the gradient of its own loss."""
    torch.manual_seed(0)
    model, x = Experts(style).double(), torch.randn(4, 6, 8, dtype=torch.float64)
    plan = Plan.make(model, Dropout(r=30))
    with capture(model, plan, per="token") as tap:
        rows = tap.rows(model(x).pow(2).sum(-1))
    truth = torch.cat(
        [
            truth_of(lambda m, b, t=t: m(*b)[:, t].pow(2).sum(-1), model, (x[b : b + 1],), plan)
            for b in range(4)
            for t in range(6)
        ]
    )
    assert_exact(rows, truth)


def test_token_rows_are_refused_where_a_function_may_hide_parameters():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(Rerun.apply(self.inside, x))

    model, x = Hidden(), torch.randn(4, 5, 3, requires_grad=True)
    with (
        pytest.raises(ValueError, match=r"no rows of its own for tokens.*Rerun, which is not"),
        capture(model, Plan.make(model, Full()), per="token") as tap,
    ):
        tap.rows(model(x).sum(-1))


def test_token_rows_are_refused_where_there_are_none():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.pooled = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.pooled(self.token(x).mean(1))

    model, x = Pooled(), torch.randn(4, 5, 3)
    plan = Plan.make(model, Full())
    with (
        pytest.raises(ValueError, match=r"'pooled.weight' met 1 positions an example.*5 tokens"),
        capture(model, plan, per="token") as tap,
    ):
        tap.rows(squares(model, (x,)))
    with pytest.raises(ValueError, match="per='token' needs mode='activations'"):
        capture(model, plan, "grads", per="token")
    with pytest.raises(ValueError, match="per must be 'example', 'token' or 'segment', got 'word'"):
        capture(model, plan, per="word")
    model = nn.LSTM(3, 4, batch_first=True)
    with (
        pytest.raises(
            ValueError, match=r"_l0' met 1 positions an example, where 5 tokens have rows"
        ),
        capture(model, Plan.make(model, Full()), per="token") as tap,
    ):
        tap.rows(model(x)[0].sum((1, 2)))


# Packed sequences.


class Packed(nn.Module):
    """Attention inside of each segment, positions that start anew in each."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(9, 6), nn.Embedding(8, 6)
        self.qkv, self.out, self.shift = (
            nn.Linear(6, 18),
            nn.Linear(6, 9),
            nn.Parameter(torch.randn(6)),
        )

    def forward(self, ids, segments):
        same = segments[:, :, None] == segments[:, None, :]
        at = (same.tril() & (segments >= 0)[:, None, :]).sum(-1) - 1
        x = self.embed(ids) + self.position(at.clamp(min=0)) + self.shift
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=same))


def packed_losses(model, batch):
    ids, segments = batch
    return model(ids, segments).pow(2).sum(-1) * (segments >= 0)


SEGMENTS = [[0, 0, 0, 1, 1, 4, 4, 4], [2, 2, -1, 7, 7, 7, 7, -1], [0] * 8]


def test_segment_rows(tmp_path):
    """A row for every segment, as if it had been alone in its batch."""
    torch.manual_seed(0)
    model, ids = Packed().double(), torch.randint(9, (3, 8))
    segments = torch.tensor(SEGMENTS)
    plan = Plan.make(model, Dropout(r=40))
    origin = [[0, 0], [0, 1], [0, 4], [1, 2], [1, 7], [2, 0]]
    alone = [
        (ids[b][segments[b] == s][None], torch.zeros(1, 8, dtype=torch.long)) for b, s in origin
    ]
    alone = [(i, s[:, : i.shape[1]]) for i, s in alone]
    truth = torch.cat([truth_of(packed_losses, model, batch, plan) for batch in alone])
    with capture(model, plan, per="segment") as tap:
        rows = tap.rows(packed_losses(model, (ids, segments)), segment_ids=segments)
    assert_exact(rows, truth)
    assert tap.origin.tolist() == origin

    batches = [(ids[:2], segments[:2]), (ids[2:], segments[2:])]
    for path in (None, tmp_path / "rows"):
        store = collect(
            model,
            batches,
            packed_losses,
            plan,
            path=path,
            progress=False,
            per="segment",
            segment_ids=lambda batch: batch[1],
        )
        assert_exact(store.rows, truth)
        assert store.origin.tolist() == origin and len(store) == 6
    assert RowStore.load(path).origin.tolist() == origin
    (path / "part-000000" / "origin.bin").unlink()
    with pytest.raises(ValueError, match=r"origin\.bin is damaged: it is missing"):
        RowStore.load(path).origin


def test_segments_are_not_compared():
    """Positions of no segment may have a loss, which is in no row."""
    model, batch = nn.Linear(3, 2), (torch.randn(2, 3, 3),)
    store = collect(
        model,
        [batch],
        lambda model, batch: model(*batch).square().sum(-1),
        Plan.make(model, Full()),
        per="segment",
        segment_ids=lambda batch: torch.tensor([[0, 0, -1], [0, -1, -1]]),
        progress=False,
    )
    assert len(store) == 2 and store.proof.examples == 0


def test_bad_segments():
    model, ids = Packed(), torch.randint(9, (3, 8))
    plan = Plan.make(model, Full())
    segments = torch.tensor(SEGMENTS)
    with capture(model, plan, per="segment") as tap:
        losses = packed_losses(model, (ids, segments))
        with pytest.raises(ValueError, match="needs segment_ids"):
            tap.rows(losses)
        with pytest.raises(ValueError, match=r"integers \[B, T\], got torch.float32"):
            tap.rows(losses, segment_ids=segments.float())
        with pytest.raises(ValueError, match=r"8 positions an example, where 5 tokens have rows"):
            tap.rows(losses, segment_ids=segments[:, :5])
    with capture(model, plan) as tap, pytest.raises(ValueError, match="need capture"):
        tap.rows(packed_losses(model, (ids, segments)).sum(1), segment_ids=segments)
    with pytest.raises(ValueError, match="go together"):
        collect(model, [(ids, segments)], packed_losses, plan, per="segment")


def test_collect_per_token():
    model, (ids,) = build(transformer, torch.float64)
    plan = Plan.make(model, Dropout(r=30))
    batches = [(ids[:2],), (ids[2:, :6],)]  # of different lengths
    store = collect(model, batches, tokens_cross_entropy, plan, per="token", progress=False)
    assert len(store) == 2 * 8 + 3 * 6
    for b, batch in enumerate([*((i[None],) for i in ids[:2]), *((i[None, :6],) for i in ids[2:])]):
        truth = true_rows(transformer, model, batch, plan)[0]
        torch.testing.assert_close(store.rows[store.origin[:, 0] == b].sum(0), truth)


def test_a_loss_that_is_not_finite_stays_in_its_row():
    """Also where a row is a sum of items: segments, and windows merged with the batch."""
    torch.manual_seed(0)
    model, ids = Packed(), torch.randint(9, (3, 8))
    segments = torch.tensor(SEGMENTS)
    plan = Plan.make(model, Full())
    with capture(model, plan, per="segment") as tap:
        losses = packed_losses(model, (ids, segments))
        rows = tap.rows(
            losses * losses.new_tensor([1.0, torch.nan, 1.0])[:, None], segment_ids=segments
        )
    assert rows.isfinite().all(1).tolist() == [True] * 3 + [False] * 2 + [True]

    windows = next(layer.case for layer in LAYERS if layer.name == "merged windows")
    model, batch = build(windows, torch.float32)
    with capture(model, Plan.make(model, Full())) as tap:
        losses = windows.loss_fn(model, batch)
        rows = tap.rows(losses * losses.new_tensor([1.0, torch.inf, 1.0, 1.0]))
    assert rows.isfinite().all(1).tolist() == [True, False, True, True]


# Where the batch dimension is.


class SequenceFirst(nn.Module):
    """[T, B] throughout: embedding, attention, a position table, an LSTM, a flattened head."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Embedding(9, 8), nn.Parameter(torch.randn(7, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.rnn, self.head, self.pooled = nn.LSTM(8, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, ids):
        T, B = ids.shape
        x = self.layer(self.embed(ids) + self.position[:T])
        x, _ = self.rnn(x)
        y = self.head(x.reshape(T * B, 6)).reshape(T, B, 3)
        return torch.cat([y.transpose(0, 1).flatten(1), self.pooled(x[-1])], 1)


def sequence_losses(model, batch):
    return model(batch[0].T).pow(2).sum(1)


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (3, 6), (6, 3)], ids=str)
def test_sequence_first(shape):
    torch.manual_seed(0)
    model, batch = SequenceFirst().double(), (torch.randint(9, shape),)
    plan = Plan.make(model, Dropout(r=30))
    case = transformer._replace(loss_fn=sequence_losses)
    truth = true_rows(case, model, batch, plan)
    with capture(model, plan, batch_dim=1) as tap:
        assert_exact(tap.rows(sequence_losses(model, batch)), truth)


@pytest.mark.parametrize("batch_dim", [None, 0, 1, {"encoder": 1}], ids=str)
def test_one_sequence_first_part(batch_dim):
    """A batch-first model with a part that is not; also where T = B or divides by it."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)

        def forward(self, x):
            x = self.encoder(self.inner(self.first(x)).transpose(0, 1)).transpose(0, 1)
            return self.last(x)

    torch.manual_seed(0)
    model = Mixed().double()
    plan = Plan.make(model, Dropout(r=30))
    case = transformer._replace(loss_fn=squares)
    for shape in ((4, 4, 3), (4, 8, 3), (4, 5, 3)):
        batch = (torch.randn(shape, dtype=torch.float64),)
        truth = true_rows(case, model, batch, plan)
        with capture(model, plan, batch_dim=batch_dim) as tap:
            assert_exact(tap.rows(squares(model, batch)), truth)
        assert set(plan.paths.values()) == {"closed form"}


def test_bad_batch_dims():
    model = nn.Linear(3, 2)
    for bad in (2, {"encoder": 2}):
        with pytest.raises(ValueError, match="batch_dim must be 0 or 1, got"):
            capture(model, Plan.make(model, Full()), batch_dim=bad)


# Losses.


def test_several_losses_of_one_pass():
    model, batch = build(transformer, torch.float64)
    plan = Plan.make(model, Dropout(r=30))

    def second(model, batch):
        return model(batch[0])[:, -1].pow(2).sum(1)

    truths = [
        true_rows(transformer._replace(loss_fn=f), model, batch, plan)
        for f in (tokens_cross_entropy, second)
    ]
    with capture(model, plan) as tap:
        logits = model(*batch)
        model_out = lambda *_: logits  # noqa: E731
        first = tap.rows(tokens_cross_entropy(model_out, batch), retain_graph=True)
        other = tap.rows(second(model_out, batch), retain_graph=True)
        both = tap.rows(tokens_cross_entropy(model_out, batch) + 0.5 * second(model_out, batch))
    assert_exact(first, truths[0])
    assert_exact(other, truths[1])
    assert_exact(both, truths[0] + 0.5 * truths[1])


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]


class Structured(nn.Module):
    """Takes a dictionary, gives a dataclass."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, inputs, *, scale=None):
        hidden = torch.tanh(self.inner(inputs["x"]))
        return Output(self.head(hidden), (hidden,))


@pytest.mark.parametrize("mode", MODES)
def test_structured_inputs_and_outputs(mode):
    def loss_fn(model, batch):
        output = model({"x": batch[0]}, scale=None)
        losses = F.cross_entropy(output.logits, batch[1], reduction="none")
        return losses + output.hidden[0].pow(2).sum(1)

    model = Structured().double()
    batch = (torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,)))
    plan = Plan.make(model, Full())
    truth = true_rows(transformer._replace(loss_fn=loss_fn), model, batch, plan)
    with capture(model, plan, mode) as tap:
        assert_exact(tap.rows(loss_fn(model, batch)), truth)


# Precision.


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_models(mode, dtype):
    """Rows in float32, as close to the float64 truth as twice autograd in that dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16), nn.RMSNorm(16), *mlp()).to(dtype)
    ids = torch.randint(9, (5, 6))
    wide = copy.deepcopy(model).double()
    plan = Plan.make(model, Dropout(r=50))
    case = transformer._replace(loss_fn=lambda model, batch: squares(model, batch).double())
    truth = true_rows(case, wide, (ids,), plan)
    plain = (true_rows(case, model, (ids,), plan).double() - truth).norm()
    with capture(model, plan, mode) as tap:
        rows = tap.rows(squares(model, (ids,)).float())
    assert rows.dtype == torch.float32
    assert (rows.double() - truth).norm() <= 2 * plain < 0.2 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(dtype):
    """Gradients too small for float16 survive in scaled losses; the scale is taken out."""
    torch.manual_seed(0)
    model = mlp()
    x, label = torch.randn(5, 16), torch.randint(4, (5,))
    plan = Plan.make(model, Full())
    tiny = 1e-9  # of the losses: their gradients round to zero in float16

    def loss_fn(model, batch):
        with torch.autocast("cpu", dtype):
            return tiny * cross_entropy(model, batch).float()

    wide = copy.deepcopy(model).double()
    exact = lambda model, batch: tiny * cross_entropy(model, batch)  # noqa: E731
    case = transformer._replace(loss_fn=exact)
    truth = true_rows(case, wide, (x.double(), label), plan)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36)
    scale = scaler.scale(torch.ones(())).item()
    assert scale == scaler.get_scale() == 2.0**36
    for mode in MODES:
        with capture(model, plan, mode) as tap:
            rows = tap.rows(scaler.scale(loss_fn(model, (x, label))), loss_scale=scale)
        assert (rows.double() - truth).norm() <= 0.02 * truth.norm()
    with capture(model, plan, "grads") as tap:
        scaler.scale(loss_fn(model, (x, label)).sum()).backward()
        row = tap.row(loss_scale=scale)
    assert (row.double() - truth.sum(0)).norm() <= 0.02 * truth.norm()
    store = collect(
        model,
        [(x, label)],
        lambda m, b: scale * loss_fn(m, b),
        plan,
        loss_scale=scale,
        progress=False,
    )
    assert (store.rows.double() - truth).norm() <= 0.02 * truth.norm()


# Compilation.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "a layer", "a function"])
def test_compiled_models(how, mode):
    """Exact inside the capture, where they run as written; compiled before and after."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {"backend": backend, "fullgraph": True}
    model, batch = build(transformer, torch.float64)
    plain, plan = copy.deepcopy(model), Plan.make(model, Dropout(r=30))
    if how == "torch.compile":
        model = torch.compile(model, **options)
        assert Plan.make(model, Dropout(r=30)).fingerprint == plan.fingerprint
    elif how == "module.compile":
        model.compile(**options)
    elif how == "a layer":
        model.layers[1]["mlp"] = torch.compile(model.layers[1]["mlp"], **options)
        plan = Plan.make(model, Dropout(r=30))
        model.layers[1]["mlp"] = model.layers[1]["mlp"]
    else:
        model.forward = torch.compile(model.forward, **options)
    before = model(*batch)
    assert graphs
    torch.testing.assert_close(before, plain(*batch))
    truth = true_rows(transformer, plain, batch, Plan.make(plain, Dropout(r=30)))
    with capture(model, plan, mode) as tap:
        assert_exact(tap.rows(transformer.loss_fn(model, batch)), truth)
    compiled = len(graphs)
    torch.testing.assert_close(model(*batch), before)
    assert len(graphs) == compiled  # what was compiled is still good
    torch._dynamo.reset()


def test_a_model_under_torch_compile_is_taken_by_collect():
    torch._dynamo.reset()
    model, batch = build(transformer, torch.float64)
    plan = Plan.make(model, Dropout(r=30))
    compiled = torch.compile(model, backend="eager")
    store = collect(compiled, [batch], tokens_cross_entropy, plan, progress=False)
    assert_exact(store.rows, true_rows(transformer, model, batch, plan))
    torch._dynamo.reset()


# Parts of models.


def test_shared_and_frozen():
    """One module under two names, a tied weight, a frozen layer, and one frozen parameter."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
            self.head.weight = self.embed.weight
            self.one = self.other = nn.Linear(6, 6)
            self.frozen = nn.Linear(6, 6).requires_grad_(False)
            self.last = nn.Linear(6, 6)
            self.last.bias.requires_grad_(False)

        def forward(self, ids):
            x = torch.tanh(self.one(self.embed(ids)))
            x = torch.tanh(self.frozen(self.other(x)))
            return self.head(self.last(x))

    torch.manual_seed(0)
    model, batch = Shared().double(), (torch.randint(9, (5, 6)),)
    case = transformer._replace(loss_fn=squares)
    for compression in (Dropout(r=20), Full()):
        plan = Plan.make(model, compression)
        names = [slot.name for slot in plan.slots]
        assert names == ["embed.weight", "head.bias", "one.weight", "one.bias", "last.weight"]
        truth = true_rows(case, model, batch, plan)
        for mode in MODES:
            with capture(model, plan, mode) as tap:
                assert_exact(tap.rows(squares(model, batch)), truth)


def test_describe(capsys):
    model, batch = build(transformer, torch.float64)
    plan = Plan.make(model, Dropout(r=30))
    print(plan.describe())
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == [
        "layer",
        "type",
        "parameters",
        "path",
        "entries",
        "bytes",
        "a",
        "row",
    ]
    assert text.count("not run yet") == len(plan.blocks)
    with capture(model, plan) as tap:
        tap.rows(transformer.loss_fn(model, batch))
    print(plan.describe())
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("layers.0.attention.qkv "))
    assert line.split() == [
        "layers.0.attention.qkv",
        "Linear",
        "432",
        "closed",
        "form",
        "30",
        "120",
    ]
    assert lines[-1].split() == [
        "total",
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{plan.width:,}",
        f"{4 * plan.width:,}",
    ]
    with capture(model, plan, "grads") as tap:
        tap.rows(transformer.loss_fn(model, batch))
    print(plan.describe())
    assert " .grad " in capsys.readouterr().out
