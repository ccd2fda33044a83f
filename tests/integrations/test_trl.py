"""TRL's trainers with the callback: rows are of the losses that the trainers compute themselves."""

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1")
datasets = pytest.importorskip("datasets")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import dropinf  # noqa: E402
from dropinf import losses  # noqa: E402
from dropinf.integrations.transformers import InfluenceCallback  # noqa: E402

SFT = {"text": ["a b c d", "b c", "c d e f g", "h i j"]}
PROMPTS = {"prompt": ["a b", "c", "d e f", "g"]}
CHOSEN, REJECTED = ["c d", "e", "f g h", "h"], ["e", "f g", "a", "b c"]
KINDS = ["sft", "dpo", "dpo, precomputed", "reward"]


def tokenizer():
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij"])}
    inside = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inside.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inside, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama(seed, kind=LlamaForCausalLM, **more):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return kind(LlamaConfig(vocab_size=13, pad_token_id=0, **sizes, **heads, **more))


def trainer(kind, out, callback, **more):
    """A trainer of TRL on four examples, a model and a callback made for it."""
    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **more,
    }
    given = {"processing_class": tokenizer(), "callbacks": [callback]}
    pairs = {"chosen": CHOSEN, "rejected": REJECTED}
    if kind == "sft":
        data = datasets.Dataset.from_dict(SFT)
        return trl.SFTTrainer, {"args": trl.SFTConfig(**options), "train_dataset": data, **given}
    if kind == "reward":
        data = datasets.Dataset.from_dict(pairs)
        args = trl.RewardConfig(**options)
        return trl.RewardTrainer, {"args": args, "train_dataset": data, **given}
    data = datasets.Dataset.from_dict(PROMPTS | pairs)
    args = trl.DPOConfig(**options, beta=0.3, precompute_ref_log_probs="pre" in kind)
    return trl.DPOTrainer, {
        "args": args,
        "ref_model": llama(1),
        "train_dataset": data,
        **given,
    }


def made(kind, out, when, loss_fn="ours", **more):
    reward = {"kind": LlamaForSequenceClassification, "num_labels": 1} if kind == "reward" else {}
    model = llama(0, **reward)
    ours = {
        "sft": None,
        "dpo": losses.dpo_loss(llama(1).eval(), beta=0.3),
        "dpo, precomputed": losses.dpo_loss(beta=0.3),
        "reward": losses.reward_loss,
    }
    plan = dropinf.Plan.make(model, dropinf.Dropout(r=20))
    loss_fn = ours[kind] if loss_fn == "ours" else loss_fn
    callback = InfluenceCallback(plan, loss_fn=loss_fn, when=when)
    make, options = trainer(kind, out, callback, **more)
    return make(model, **options), callback


def truth(trainer, plan):
    """Of the trainer's loss of each example alone, which of a text is a mean over its tokens."""
    model, rows = trainer.model.eval(), []
    named = dict(model.named_parameters())
    for i in range(4):
        batch = trainer.data_collator([trainer.train_dataset[i]])
        loss = trainer.compute_loss(model, dict(batch))
        if isinstance(trainer, trl.SFTTrainer):
            loss = loss * (batch["labels"][:, 1:] != -100).sum()
        grads = torch.autograd.grad(
            loss, [named[s.name] for s in plan.slots], materialize_grads=True
        )
        parts = zip(plan.slots, grads, strict=True)
        rows.append(torch.cat([g.flatten()[s.index] * s.scale for s, g in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_after(kind, tmp_path):
    run, callback = made(kind, tmp_path, "after")
    run.train()
    exact = truth(run, callback.plan)
    assert exact.norm(dim=1).min() > 0.1
    torch.testing.assert_close(
        callback.store.rows, exact, rtol=0, atol=1e-5 * exact.abs().max().item()
    )
    assert callback.store.ids.tolist() == [0, 1, 2, 3]
    assert set(callback.plan.paths.values()) == {"closed form"}


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward"])
def test_during(kind, tmp_path):
    """With a learning rate of 0 the weights of each step are the first ones."""
    run, callback = made(kind, tmp_path, "during", learning_rate=0.0)
    run.train()
    exact = truth(run, callback.plan)[callback.store.ids]
    assert sorted(callback.store.ids.tolist()) == [0, 1, 2, 3]
    assert callback.store.origin[:, 0].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(
        callback.store.rows, exact, rtol=0, atol=1e-5 * exact.abs().max().item()
    )


def test_refuses(tmp_path):
    for kind in ("dpo", "reward"):
        run, _ = made(kind, tmp_path, "after", loss_fn=None)
        with pytest.raises(ValueError, match=r"preference pairs, .* loss_fn=dropinf\.losses\.dpo"):
            run.train()
    run, _ = made("sft", tmp_path, "after", loss_type="dft")
    with pytest.raises(ValueError, match="loss_type='dft' is not the model's own loss"):
        run.train()
