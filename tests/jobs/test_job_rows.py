"""Rows of jobs: those of plain autograd, of each example alone; and of loaders written by hand."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", minversion="5")

from job_models import CHAT, VOCABULARY, WORDS, gpt2, lines, saved, sentences, tokenizer

import dropinf
from dropinf.jobs import Job, prepare

IDS = {"vocab_size": len(VOCABULARY), "pad_token_id": 0}
SMALL = {
    **{"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"intermediate_size": 16, "max_position_embeddings": 16},
}


def ids(*words):
    return torch.tensor([[VOCABULARY.get(word, 2) for word in words]])


def rows_of(job, **options):
    """Rows of a job with every entry kept, by the position of their example."""
    ready = prepare(job)
    plan = job.plan(ready.model)
    store = dropinf.collect(
        ready.model,
        ready.train.loader,
        ready.loss_fn,
        plan,
        ids=ready.train.ids,
        progress=False,
        **options,
    )
    order = [ready.train.position(i) for i in listed(store.ids)]
    assert sorted(order) == list(range(len(order)))
    return ready, plan, store.rows[torch.tensor(order).argsort()]


def listed(ids):
    return ids.tolist() if isinstance(ids, torch.Tensor) else ids


def assert_rows(model, plan, rows, losses):
    """Rows of `losses`, functions model -> loss of one example, by plain autograd."""
    assert len(rows) == len(losses)
    for row, loss in zip(rows, losses, strict=True):
        params = [model.get_parameter(slot.name) for slot in plan.slots]
        grads = torch.autograd.grad(loss(model), params, materialize_grads=True)
        truth = torch.cat([grad.flatten() for grad in grads])
        assert truth.dtype == torch.float64 and truth.norm() > 1e-3
        assert (row - truth).norm() <= 1e-12 * truth.norm()  # thousands of roundings


def job_of(tmp_path, rows, **given):
    train = lines(tmp_path / "train.jsonl", rows)
    options = {"compression": "Full", "dtype": "float64", "device": "cpu", "batch_tokens": 30}
    return Job.of(**{"model": str(tmp_path / "model"), "train": str(train), **options, **given})


def next_tokens(tokens, first=0):
    """The loss of a causal model at tokens from `first`, each told by those before it."""

    def loss(model):
        logits = model(input_ids=tokens).logits[0, :-1]
        losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
        return losses[max(first - 1, 0) :].sum()

    return loss


def test_texts(tmp_path):
    gpt2(tmp_path / "model")
    texts = sentences(9)
    ready, plan, rows = rows_of(job_of(tmp_path, [{"text": text} for text in texts]))
    assert_rows(ready.model, plan, rows, [next_tokens(ids(*t.split())) for t in texts])
    assert list(ready.train.texts) == texts and "".join(ready.train.tokens(3)) == texts[3]
    assert [piece.strip() for piece in ready.train.tokens(3)] == texts[3].split()


def test_prompts_and_completions(tmp_path):
    """There is no loss on the prompt, and there is one on the end of the text."""
    gpt2(tmp_path / "model")
    pairs = [(p, f" {c}") for p, c in zip(sentences(6), sentences(6, 1, 3), strict=True)]
    examples = [{"question": p, "answer": c} for p, c in pairs]
    job = job_of(tmp_path, examples, prompt="question", completion="answer")
    ready, plan, rows = rows_of(job)
    truths = [next_tokens(ids(*(p + c).split(), "</s>"), len(p.split())) for p, c in pairs]
    assert_rows(ready.model, plan, rows, truths)
    assert ready.train.texts[0] == pairs[0][0] + pairs[0][1] and not ready.notes


def test_chats(tmp_path):
    """The loss is on what the assistant says, and on its end."""
    gpt2(tmp_path / "model", n_positions=64)
    tokenizer(chat_template=CHAT).save_pretrained(tmp_path / "model")
    turns = [("the cat", "sat"), ("it was", "a good mat")]
    chat = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    ready, plan, rows = rows_of(job_of(tmp_path, [{"messages": chat[:2]}, {"messages": chat}]))

    def truth(turns):
        words, said = [], []
        for asked, answer in turns:
            for text, by_assistant in (
                (f"user : {asked} </s> assistant :", False),
                (f"{answer} </s>", True),
            ):
                words += text.split()
                said += [by_assistant] * len(text.split())
        tokens = ids(*words)

        def loss(model):
            losses = F.cross_entropy(
                model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="none"
            )
            return losses[torch.tensor(said[1:])].sum()

        return loss

    assert_rows(ready.model, plan, rows, [truth(turns[:1]), truth(turns)])


def test_adapter(tmp_path):
    """Its parameters alone are tracked; whether it is named, or the directory is one."""
    peft = pytest.importorskip("peft")
    model = gpt2(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    tuned.save_pretrained(tmp_path / "adapter")
    texts = sentences(5)
    job = job_of(tmp_path, [{"text": t} for t in texts], adapter=str(tmp_path / "adapter"))
    ready, plan, rows = rows_of(job)
    assert all("lora_" in slot.name for slot in plan.slots) and len(plan.slots) == 2 * 2 * 3
    assert_rows(ready.model, plan, rows, [next_tokens(ids(*t.split())) for t in texts])
    alone = job_of(tmp_path, [{"text": t} for t in texts], model=str(tmp_path / "adapter"))
    assert torch.equal(rows_of(alone)[2], rows)


CLASSES = {
    "label2id": {"bad": 0, "good": 1, "fair": 2},
    "id2label": {0: "bad", 1: "good", 2: "fair"},
}


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_classes(tmp_path, kind):
    """Labels are names and numbers; a model without a pad token gets one."""
    texts, labels = sentences(6), ["good", "bad", "fair", 1, 2, "good"]
    numbers = [CLASSES["label2id"].get(label, label) for label in labels]
    if kind == "GPT2":
        gpt2(tmp_path / "model", "GPT2ForSequenceClassification", **CLASSES)
        words = [t.split() for t in texts]
    else:
        config = {**IDS, **SMALL, **CLASSES}
        saved(
            tmp_path / "model", "BertForSequenceClassification", "BertConfig", ends=True, **config
        )
        words = [["<s>", *t.split(), "</s>"] for t in texts]
    examples = [{"review": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    ready, plan, rows = rows_of(job_of(tmp_path, examples, text="review"))
    truths = [
        lambda model, w=w, y=y: F.cross_entropy(model(input_ids=ids(*w)).logits, torch.tensor([y]))
        for w, y in zip(words, numbers, strict=True)
    ]
    assert_rows(ready.model, plan, rows, truths)


def test_regression(tmp_path):
    config = {**IDS, **SMALL, "num_labels": 1}
    saved(tmp_path / "model", "BertForSequenceClassification", "BertConfig", **config)
    texts, numbers = sentences(4), [0.5, -1, 2.25, 3]
    examples = [{"text": t, "label": y} for t, y in zip(texts, numbers, strict=True)]
    ready, plan, rows = rows_of(job_of(tmp_path, examples))
    truths = [
        lambda model, t=t, y=y: (model(input_ids=ids(*t.split())).logits[0, 0] - y) ** 2
        for t, y in zip(texts, numbers, strict=True)
    ]
    assert_rows(ready.model, plan, rows, truths)


def test_sequences_to_sequences(tmp_path):
    config = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
    config |= {"decoder_start_token_id": 0, **IDS, "eos_token_id": 1}
    saved(tmp_path / "model", "T5ForConditionalGeneration", "T5Config", ends=True, **config)
    pairs = list(zip(sentences(5), sentences(5, 1), strict=True))
    examples = [{"prompt": p, "completion": c} for p, c in pairs]
    ready, plan, rows = rows_of(job_of(tmp_path, examples))

    def truth(prompt, completion):
        x, y = (ids("<s>", *text.split(), "</s>") for text in (prompt, completion))
        shifted = torch.cat([torch.zeros(1, 1, dtype=torch.int64), y[:, :-1]], 1)
        return lambda model: F.cross_entropy(
            model(input_ids=x, decoder_input_ids=shifted).logits[0], y[0], reduction="sum"
        )

    assert_rows(ready.model, plan, rows, [truth(*pair) for pair in pairs])


def test_masked_tokens(tmp_path):
    """At least one token of each text is masked, none at its ends, and the same ones each time."""
    config = {**IDS, **SMALL}
    saved(tmp_path / "model", "BertForMaskedLM", "BertConfig", ends=True, **config)
    texts = sentences(12)
    *_, rows = rows_of(job_of(tmp_path, [{"text": t} for t in texts]))
    batches = [
        list(prepare(job_of(tmp_path, [{"text": t} for t in texts])).train.loader) for _ in "ab"
    ]
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    seen = 0
    for batch in batches[0]:
        for given, labels, mask in zip(
            *(batch[k] for k in ("input_ids", "labels", "attention_mask")), strict=True
        ):
            chosen = labels != -100
            length = int(mask.sum())
            assert chosen.any() and chosen.sum() <= max(1, length // 4)
            assert (given[chosen] == VOCABULARY["<mask>"]).all() and not chosen[0]
            assert not chosen[length - 1 :].any()
            whole = given.where(~chosen, labels)[1 : length - 1]
            assert " ".join(WORDS[i - 5] for i in whole.tolist()) in texts
            seen += 1
    assert seen == len(texts) and rows.isfinite().all() and (rows.norm(dim=1) > 0).all()


def test_token_classes(tmp_path):
    """A word of several tokens has its loss at the first."""
    config = {**IDS, **SMALL, **CLASSES}
    saved(tmp_path / "model", "BertForTokenClassification", "BertConfig", ends=True, **config)
    tokenizer(ends=True, hyphens=True).save_pretrained(tmp_path / "model")
    words = [["sat-on", *text.split()] for text in sentences(5, longest=8)]
    labels = [["good" if i % 2 else 2 for i in range(len(w))] for w in words]
    examples = [{"words": w, "tags": y} for w, y in zip(words, labels, strict=True)]
    ready, plan, rows = rows_of(job_of(tmp_path, examples, text="words", label="tags"))

    def truth(words, labels):
        y = torch.tensor([CLASSES["label2id"].get(label, label) for label in labels])
        tokens = ids("<s>", "sat", "-", "on", *words[1:], "</s>")
        firsts = [1, *range(4, tokens.shape[1] - 1)]
        return lambda model: F.cross_entropy(
            model(input_ids=tokens).logits[0, firsts], y, reduction="sum"
        )

    assert_rows(ready.model, plan, rows, [truth(*e) for e in zip(words, labels, strict=True)])


def test_images(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    import transformers

    config = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
    config |= {"image_size": 8, "patch_size": 4, **CLASSES}
    saved(tmp_path / "model", "ViTForImageClassification", "ViTConfig", **config)
    size = {"height": 8, "width": 8}
    exact = {"rescale_factor": 1 / 256, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    transformers.ViTImageProcessor(size=size, do_resize=False, **exact).save_pretrained(
        tmp_path / "model"
    )
    (tmp_path / "pictures").mkdir()
    pixels = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    labels = [0, "good", 2, 1, "bad"]
    examples = []
    for i, (values, label) in enumerate(zip(pixels, labels, strict=True)):
        Image.fromarray(values.numpy()).save(tmp_path / "pictures" / f"{i}.png")
        examples.append({"image": f"pictures/{i}.png", "label": label, "id": f"p{i}"})
    ready, plan, rows = rows_of(job_of(tmp_path, examples, id="id", batch_size=2))

    def truth(values, label):
        x = ((values.double() / 256 - 0.5) / 0.25).permute(2, 0, 1)[None]
        y = torch.tensor([CLASSES["label2id"].get(label, label)])
        return lambda model: F.cross_entropy(model(pixel_values=x).logits, y)

    found = [truth(*e) for e in zip(pixels, labels, strict=True)]
    assert_rows(ready.model, plan, rows, found)
    assert [len(batch["labels"]) for batch in ready.train.loader] == [2, 2, 1]
    assert ready.train.images[2].endswith("pictures/2.png") and ready.train.tokens is None


def test_rows_of_a_loader_written_by_hand(tmp_path):
    """The same plan and texts, without any of this."""
    model = gpt2(tmp_path / "model")
    texts = sentences(8)
    job = job_of(
        tmp_path,
        [{"text": t, "key": f"k{i}"} for i, t in enumerate(texts)],
        id="key",
        compression="Dropout",
        r=40,
        seed=3,
        dtype="float32",
        exclude=["*.ln_1"],
    )
    ready, plan, rows = rows_of(job)
    assert (
        plan.fingerprint
        == dropinf.Plan.make(model, dropinf.Dropout(r=40, seed=3), exclude="*.ln_1").fingerprint
    )

    def loss_fn(model, tokens):
        losses = F.cross_entropy(
            model(input_ids=tokens).logits[0, :-1], tokens[0, 1:], reduction="sum"
        )
        return losses[None]

    by_hand = dropinf.collect(
        model, [ids(*t.split()) for t in texts], loss_fn, plan, progress=False
    )
    assert (rows - by_hand.rows).norm() <= 1e-5 * by_hand.rows.norm()
    assert ready.train.names == [f"k{i}" for i in range(8)] and ready.train.position("k5") == 5


@pytest.mark.parametrize("key", [None, "id"])
def test_resumed(tmp_path, key):
    """A run that was stopped goes on with the same batches; the model runs for no other."""
    gpt2(tmp_path / "model")
    examples = [{"text": t, "id": f"e{i}"} for i, t in enumerate(sentences(12))]
    job = job_of(tmp_path, examples, compression="Dropout", r=20, id=key)
    ready = prepare(job)
    plan = job.plan(ready.model)

    def run(loss_fn, path, **options):
        return dropinf.collect(
            ready.model,
            ready.train.loader,
            loss_fn,
            plan,
            tmp_path / path,
            ids=ready.train.ids,
            progress=False,
            check=False,
            **options,
        )

    whole = run(ready.loss_fn, "whole")
    batches = len(ready.train.loader)
    calls = []

    def stops(model, batch):
        calls.append(len(batch["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ready.loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        run(stops, "part")
    calls = [0, 0, 0]
    again = run(stops, "part", resume=True)
    assert len(calls) - 3 == batches - 2 and batches > 3
    assert torch.equal(again.rows, whole.rows) and listed(again.ids) == listed(whole.ids)


def test_queries_keep_their_order(tmp_path):
    gpt2(tmp_path / "model")
    examples = [{"text": t} for t in sentences(9)]
    queries = lines(tmp_path / "queries.jsonl", examples)
    ready = prepare(job_of(tmp_path, examples, queries=str(queries)))
    store = dropinf.collect(
        ready.model,
        ready.queries.loader,
        ready.loss_fn,
        job_of(tmp_path, examples).plan(ready.model),
        ids=ready.queries.ids,
        progress=False,
    )
    assert store.ids.tolist() == list(range(9))


def test_long_examples_are_cut_and_said(tmp_path):
    gpt2(tmp_path / "model")
    texts = sentences(9)
    cut = sum(len(t.split()) > 6 for t in texts)
    ready, plan, rows = rows_of(job_of(tmp_path, [{"text": t} for t in texts], max_tokens=6))
    assert_rows(ready.model, plan, rows, [next_tokens(ids(*t.split()[:6])) for t in texts])
    assert 0 < cut < 9 and ready.notes == [
        f"{tmp_path / 'train.jsonl'}: {cut} of 9 examples are cut to 6 tokens"
    ]


def test_a_named_loss(tmp_path):
    """In place of the model's own."""
    gpt2(tmp_path / "model")
    texts = sentences(4)
    ready, plan, rows = rows_of(job_of(tmp_path, [{"text": t} for t in texts], loss="masked_lm"))

    def truth(tokens):
        return lambda model: F.cross_entropy(
            model(input_ids=tokens).logits[0], tokens[0], reduction="sum"
        )

    assert_rows(ready.model, plan, rows, [truth(ids(*t.split())) for t in texts])


def test_energies_of_examples_from_all_of_the_file(tmp_path):
    gpt2(tmp_path / "model")
    job = job_of(tmp_path, [{"text": t} for t in sentences(12)], compression="Dropout", energies=4)
    ready = prepare(job)
    batches = list(ready.train.spread(4))
    positions = sorted(
        i
        for batch in batches
        for ids in batch["input_ids"]
        for i in range(12)
        if [p.strip() for p in ready.train.tokens(i)] == [w for w in tokens_of(ids) if w != "<pad>"]
    )
    assert positions == [0, 3, 6, 9]
    energies = dropinf.energies(ready.model, batches, ready.loss_fn, 4)
    plan = job.plan(ready.model, energies)
    assert plan.compression.energies is energies and plan.compression.r == 1024
    with pytest.raises(ValueError, match=r"energies of 4 examples; measure them"):
        job.plan(ready.model)


def tokens_of(ids):
    names = {i: word for word, i in VOCABULARY.items()}
    return [names[i] for i in ids.tolist()]
