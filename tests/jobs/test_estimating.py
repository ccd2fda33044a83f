"""Estimates beside what collections took, and beside arithmetic by hand."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import estimate_cases
import pytest
import torch
from estimate_cases import CASES, case_of, pair_loss
from gpu import whole_model
from live_bytes import measured
from places import ROOT
from torch import nn

from dropinf import Dropout, Plan, collect
from dropinf.jobs import CARDS, estimate, largest_batch, token_batch
from dropinf.jobs.estimating import CONTEXT_BYTES, UTILISATION
from dropinf.losses import causal_lm_loss
from dropinf.ops.dispatch import VERIFIED
from dropinf.solvers import Cholesky
from dropinf.tools.measuring import MALLOC

B, WIDTH = 64, 96


def mlp():
    return nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())))


def on_meta(make):
    with torch.device("meta"):
        model = make().eval()
    return model, Plan.make(model, Dropout(r=40))


def squares(model, batch):
    return model(batch).pow(2).flatten(1).sum(1)


def estimated(num=B):
    return estimate(*on_meta(mlp), squares, torch.randn(num, WIDTH))


@pytest.mark.more
@pytest.mark.parametrize("name", CASES)
def test_peak_of_a_collection(name):
    """Beside the resident memory that it takes in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    if name not in ("cnn", "wide cnn", "mlp", "weights"):
        pytest.importorskip("transformers")
    model, plan, loss_fn, batch = case_of(name, "meta")
    found = estimate(model, plan, loss_fn, batch())
    command = [sys.executable, estimate_cases.__file__, name]
    environment = {**os.environ, **MALLOC, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    took = float(run.stdout.splitlines()[-1])
    expected = (found.peak - found.weights) / 1e6  # weights are there before
    print(f"{name}: estimated {expected:.0f} MB, took {took:.0f}, {expected / took:.3f}")
    assert took > 200 and abs(expected / took - 1) < 0.1


@pytest.mark.parametrize("num", [B, 2])
def test_peak_of_live_tensors(num):
    """Of a small collection, whose kernels copy nothing; the gradient of a weight, which is formed
    to compare rows with, takes most for two examples."""
    found = estimated(num)
    model = mlp().eval()
    plan = Plan.make(model, Dropout(r=40))
    batches = [torch.randn(num, WIDTH)]

    def call():
        return collect(model, batches, squares, plan, progress=False)

    call()  # makes what is kept
    took = measured(call).peak
    assert abs((found.peak - found.weights - batches[0].nbytes) / took - 1) < 0.1


@pytest.mark.more
@pytest.mark.parametrize("name", whole_model.MODELS)
def test_beside_a_gpu(name):
    """The whole models that an H200 ran: peak within 1 %, and its time or somewhat more."""
    record = ROOT / "bench" / "results" / VERIFIED["cuda", "sampled_outer"]
    r = whole_model.QUICK[name]
    rows = json.loads(record.read_text())["rows"]
    (there,) = [row for row in rows if row["contestant"] == f"capture, r={r}"]
    sizes = whole_model.MODELS[name]
    with torch.device("meta"):
        model = whole_model.NeoX(sizes).bfloat16()
    ids = torch.zeros(sizes.B, sizes.T, dtype=torch.int64)
    plan = Plan.make(model, Dropout(r=r))
    found = estimate(model, plan, lambda model, ids: whole_model.losses(model(ids), ids), ids)
    assert found.peak - found.weights == pytest.approx(there["peak_bytes"], rel=0.01)
    over = found.seconds(sizes.B, CARDS["H200 SXM 141 GB"]) / (1e-6 * there["us"]["median"])
    assert 1 < over < 1.35


def test_kinds_add_up():
    found = estimated()
    assert found.weights == 3 * 4 * (WIDTH**2 + WIDTH)
    assert found.rows == B * 3 * 40 * 4
    # The input of every layer and every GELU, and the last output, whose squares are the losses.
    assert abs(found.kept / (4 * B * WIDTH * 7) - 1) < 0.1
    assert found.peak == sum(
        (found.weights, found.kept, found.rows, found.coordinates, found.temporary)
    )
    assert found.temporary > 0 and found.coordinates >= 3 * 40 * 8
    assert found.batch_size == B and not found.passes
    assert found.largest[0][2] == max(size for _, _, size in found.largest)


def test_arithmetic():
    """Forward passes of three layers, and gradients of the inputs of two."""
    found = estimated()
    assert found.flops == 5 * 2 * B * WIDTH**2
    read = 4 * B * (6 * WIDTH + 3 * 40)  # inputs and gradients of outputs, and the rows
    assert found.read == read
    card = CARDS["H100 SXM 80 GB"]
    each = found.flops / (UTILISATION * 67e12) + read / 3.35e12
    assert found.seconds(1000, card) == pytest.approx(1000 / B * each)


def test_half_precision():
    model, plan = on_meta(lambda: mlp().to(torch.bfloat16))
    found = estimate(model, plan, squares, torch.randn(B, WIDTH).bfloat16())
    assert found.dtype == torch.bfloat16 and 2 * found.weights == estimated().weights
    assert found.kept < 0.6 * estimated().kept
    assert found.seconds(9, CARDS["H100 SXM 80 GB"]) < estimated().seconds(
        9, CARDS["H100 SXM 80 GB"]
    )


def gpt2(vocabulary=50):
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": vocabulary}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=512, **sizes, **ends))


def test_arithmetic_of_attention():
    """Two products forward and five backward of [T, T], beside the layers and the head."""
    num, tokens, width, layers, vocabulary = 4, 64, 32, 2, 50
    found = estimate(*on_meta(gpt2), causal_lm_loss, token_batch(num, tokens))
    weights = 12 * width**2 * layers + vocabulary * width
    products = 14 * num * tokens**2 * width * layers
    assert found.flops == 4 * num * tokens * weights + products


def test_attention_keeps_no_scores():
    """Memory is a line in the tokens; with padding there is a mask [B, 1, T, T]."""
    model, plan = on_meta(gpt2)
    kept = {
        (tokens, padded): estimate(
            model, plan, causal_lm_loss, token_batch(4, tokens, padded=padded)
        ).kept
        for tokens in (256, 512)
        for padded in (False, True)
    }
    assert abs(kept[512, False] / kept[256, False] - 2) < 0.02
    mask, of_layer = 4 * 512**2, 4 * 4 * 512**2  # of a byte, and what each layer adds
    more = kept[512, True] - kept[512, False]
    assert mask + of_layer <= more <= 1.1 * (mask + 2 * of_layer) + 4 * 512 * 8


def test_logits_are_what_takes_most():
    model, plan = on_meta(lambda: gpt2(vocabulary=9000))
    found = estimate(model, plan, causal_lm_loss, token_batch(2, 32))
    assert 9000 in found.largest[0][0]
    # Their softmax, its gradient, and that of the logits.
    assert found.peak - found.weights > 3 * 4 * 2 * 32 * 9000


def test_largest_batch():
    model, plan = on_meta(mlp)

    def batch_of(num):
        return torch.empty(num, WIDTH)

    room = CONTEXT_BYTES + estimated(37).peak + 100
    best = largest_batch(model, plan, squares, batch_of, room)
    assert best.batch_size == 37 and best.fits(room) and not estimated(38).fits(room)
    assert largest_batch(model, plan, squares, batch_of, CONTEXT_BYTES) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bytes_of_a_store(dtype, tmp_path):
    found = estimated()
    model = mlp().eval()
    plan = Plan.make(model, Dropout(r=40))
    batches = [torch.randn(B, WIDTH)]
    ids = {"ids": lambda batch: torch.arange(B), "dtype": dtype}
    collect(model, batches, squares, plan, tmp_path / "rows", progress=False, **ids)
    files = (tmp_path / "rows" / "part-000000").glob("*.bin")
    assert found.store_bytes(B, dtype) == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("n", [B, 15])  # r x r, and n x n
def test_bytes_of_factors(n, tmp_path):
    found = estimated()
    model = mlp().eval()
    plan = Plan.make(model, Dropout(r=40))
    store = collect(model, [torch.randn(n, WIDTH)], squares, plan, progress=False)
    solver = Cholesky().fit(store)
    assert {layer.form for layer in solver.layers} == {"r x r" if n == B else "n x n"}
    solver.save(tmp_path / "solver")
    largest = max(file.stat().st_size for file in (tmp_path / "solver").iterdir())
    assert 0 <= largest - found.factor_bytes(n) < 0.01 * largest
    assert found.fit_bytes(n) > found.factor_bytes(n)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.inner(x)
        if y.sum() > 0:
            return y
        return -y


class Crossing(Routed):
    def forward(self, x):
        return self.inner(x[:, :5])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Routed, r"estimate: on the meta device Routed\.forward \(test_estimating\.py:\d+\) goes"),
        (Crossing, r"Crossing\.forward \(test_estimating\.py:\d+\) fails: .*\[4, 5\]"),
    ],
)
def test_what_cannot_be_estimated(model, said):
    with pytest.raises(ValueError, match=said) as error:
        estimate(*on_meta(model), squares, torch.randn(4, WIDTH))
    assert "\n" not in str(error.value)


def test_experts_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, **heads, vocab_size=90, pad_token_id=None)
    config._experts_implementation = "eager"
    model, plan = on_meta(lambda: transformers.MixtralForCausalLM(config))
    with pytest.raises(ValueError, match=r"MixtralExperts\.forward \(modeling_mixtral\.py"):
        estimate(model, plan, causal_lm_loss, token_batch(2, 8))


def test_weights_in_memory_are_refused():
    model = mlp()
    plan = Plan.make(model, Dropout(r=40))
    with pytest.raises(ValueError, match="the model is on cpu; make it inside"):
        estimate(model, plan, squares, torch.randn(B, WIDTH))


def test_nothing_stays_with_the_plan():
    model, plan = on_meta(mlp)
    estimate(model, plan, squares, torch.randn(B, WIDTH))
    assert not plan.prepared and not plan.paths


def test_a_pass_for_each_loss_is_said(capsys):
    def sorted_loss(model, batch):
        return squares(model, batch).sort().values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = estimate(*on_meta(mlp), sorted_loss, torch.randn(4, WIDTH))
    assert "Sort" in found.passes
    print(found.describe(500))
    printed = capsys.readouterr().out
    assert "predicted" in printed and "Sort" in printed and "500 rows on disk" in printed


def test_pairs():
    make = lambda: nn.Sequential(nn.Linear(WIDTH, 10))  # noqa: E731
    batch = torch.randn(8, WIDTH), torch.zeros(8, dtype=torch.int64)
    assert estimate(*on_meta(make), pair_loss, batch).flops == 2 * 8 * WIDTH * 10
