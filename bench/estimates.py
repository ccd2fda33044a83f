"""What a collection will take of large language models on one GPU, all of it predicted.

    python bench/estimates.py > bench/results/estimates.md

No weights are made, and nothing is run on a GPU: models are on the meta device. Takes two minutes
and 1 GB.
"""

import time

import torch
import transformers

import dropinf
from dropinf.jobs import CARDS, estimate, largest_batch, token_batch
from dropinf.jobs.estimating import CONTEXT_BYTES, UTILISATION
from dropinf.losses import causal_lm_loss

TOKENS = 2048
R = 4096  # entries of a layer
NUM_EXAMPLES = 1000
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def neox(width, layers, heads, inner, vocabulary):
    return transformers.GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=TOKENS,
        **ENDS,
    )


MODELS = {
    "Pythia-1.4B": neox(2048, 24, 16, 8192, 50304),
    "Pythia-6.9B": neox(4096, 32, 32, 16384, 50432),
    "Llama-3-8B": transformers.LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=8192,
        **ENDS,
    ),
}
KINDS = {
    "weights": "weights",
    "kept": "kept for the backward pass",
    "rows": "rows of the batch",
    "coordinates": "coordinates",
    "temporary": "temporary",
    "peak": "peak",
}


def made(config):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def columns():
    """(title, model's parameters, seconds of the plan, estimate, card) of each column."""
    for name, config in MODELS.items():
        model = made(config)
        start = time.perf_counter()
        plan = dropinf.Plan.make(model, dropinf.Dropout(r=R))
        seconds = time.perf_counter() - start
        for card_name, card in CARDS.items():
            found = largest_batch(
                model,
                plan,
                causal_lm_loss,
                lambda batch_size: token_batch(batch_size, TOKENS),
                card.num_bytes,
            )
            if found is None:
                found = estimate(model, plan, causal_lm_loss, token_batch(1, TOKENS))
            yield name, card_name, model, seconds, found, card


def table(found):
    lines = [["", *(f"{name}, {card}" for name, card, *_ in found)]]
    lines.append(["---", *["---:"] * len(found)])

    def line(title, of):
        lines.append([title, *(of(*column) for column in found)])

    def parameters(name, card_name, model, seconds, e, card):
        return f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}"

    line("parameters, 10⁹", parameters)
    line("largest batch", lambda *c: str(c[4].batch_size) if c[4].fits(c[5].num_bytes) else "none")
    for kind, title in KINDS.items():
        line(f"{title}, GB", lambda *c, kind=kind: f"{getattr(c[4], kind) / 1e9:.2f}")
    line("width of a row", lambda *c: f"{c[4].plan.width:,}")
    line(f"s for {NUM_EXAMPLES:,} examples", lambda *c: f"{c[4].seconds(NUM_EXAMPLES, c[5]):.0f}")
    line(
        f"{NUM_EXAMPLES:,} rows on disk, GB",
        lambda *c: f"{c[4].store_bytes(NUM_EXAMPLES) / 1e9:.2f}",
    )
    for n in (NUM_EXAMPLES, 100 * NUM_EXAMPLES):
        line(f"Cholesky on {n:,} rows, GB", lambda *c, n=n: f"{c[4].fit_bytes(n) / 1e9:.1f}")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def page(found):
    largest = [
        f"- {name}: "
        + ", ".join(
            f"{size / 1e9:.1f} GB of {list(shape)} {str(dtype).removeprefix('torch.')}"
            for shape, dtype, size in e.largest
        )
        for name, card_name, _, _, e, _ in found
        if card_name == next(iter(CARDS))
    ]
    slowest = max(column[3] for column in found)
    versions = f"PyTorch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    context = f"{CONTEXT_BYTES / 1e9:.0f} GB"
    return f"""# What a collection will take on one GPU

**Everything here is predicted.** No GPU has measured these
batches. It is written by
`python bench/estimates.py > bench/results/estimates.md`, from models on the meta device.

The first batch of `collect` runs there as it would on the device, with its checks, which takes the
most; tensors are counted as they come and go. On the CPU this is within 10 % of the resident memory
that `collect` takes of ten small models (`tests/jobs/test_estimating.py`, which prints both). A GPU
differs in what its kernels and its caching allocator take beside tensors: {context} is left for
CUDA's context and workspaces, and nothing for fragments.

bfloat16, examples of {TOKENS:,} tokens without padding, `causal_lm_loss`, `Dropout(r={R})`;
{versions}. The batch is the largest that fits.
`Plan.make` took {slowest:.1f} s at most.

{table(found)}

Time is the arithmetic of the forward pass and of the gradients of layers' inputs, at
{UTILISATION:.0%} of the card's dense peak of 989 Tflop/s (an assumption; of Pythia-1.4B and 6.9B
an H200 measured 41% and 50%, see docs/gpu.md), and behind it one read of
each layer's input and output gradient and one write of the rows, at the bandwidth of its data sheet
(3.35 and 4.8 TB/s). Loading data, the disk and what a capture costs the host are not in it.

What takes most at the peak, with all tensors of a shape together:

{chr(10).join(largest)}
"""


if __name__ == "__main__":
    print(page(list(columns())), end="")
