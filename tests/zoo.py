"""Models that people use, tiny and with random weights: what capture must take as it comes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from cases import Case, cross_entropy, padded_ids
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

IDS = {"vocab_size": 23, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 22}
SMALL = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 4}  # heads that share keys and values


class Float64Throughout(TorchFunctionMode):
    """Keeps in float64 what a model of transformers computes in float32 whatever its dtype.

    Norms and softmaxes do. There the last bit of a sum, which may depend on the batch, now and
    then tips a rounding to float32, and the truth would be known to seven digits.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(
            lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {})
        )
        return (Tensor.double if func is Tensor.float else func)(*args, **kwargs)


def real_tokens_loss(logits, labels):
    """Summed over the real tokens of each example; 0 is padding."""
    losses = F.cross_entropy(logits.mT, labels, reduction="none")
    return (losses * (labels != 0)).sum(1)


def causal(model, batch):
    (ids,) = batch
    logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    return real_tokens_loss(logits[:, :-1], ids[:, 1:])


def classify_text(model, batch):
    ids, label = batch
    logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    return F.cross_entropy(logits, label, reduction="none")


def classify_pairs(model, batch):
    """Two segments: tokens of both kinds."""
    ids, label = batch
    kinds = (torch.arange(ids.shape[1]) > 3).long().expand_as(ids)
    logits = model(input_ids=ids, attention_mask=(ids != 0).long(), token_type_ids=kinds).logits
    return F.cross_entropy(logits, label, reduction="none")


def classify_images(model, batch):
    images, label = batch
    return F.cross_entropy(model(images).logits, label, reduction="none")


def translate(model, batch):
    ids, labels = batch
    ignored = labels.masked_fill(labels == 0, -100)
    logits = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=ignored).logits
    return real_tokens_loss(logits, labels)


def transcribe(model, batch):
    sound, ids = batch
    logits = model(input_features=sound, decoder_input_ids=ids[:, :-1]).logits
    return real_tokens_loss(logits, ids[:, 1:])


def matching_pairs(model, batch):
    """Each image with its own text.

    Not CLIP's own loss, whose negatives are the other examples of the batch: an example's gradient
    would be one of the whole batch, and no row could be its own.
    """
    ids, images = batch
    out = model(input_ids=ids, attention_mask=(ids != 0).long(), pixel_values=images)
    return -F.logsigmoid(out.logits_per_image.diagonal())


def text_batch():
    return (*padded_ids(), torch.randint(3, (5,)))


def image_batch():
    return torch.randn(3, 3, 8, 8), torch.randint(3, (3,))


def translation_batch():
    labels = torch.randint(1, 23, (5, 6))
    labels[2, 4:] = 0
    return (*padded_ids(), labels)


def sound_batch():
    (ids,) = padded_ids()
    return torch.randn(3, 5, 12), ids[:3]


def pair_batch():
    (ids,) = padded_ids()
    last = (ids != 0).sum(1, keepdim=True) - 1
    return ids.scatter(1, last, 22)[:4], torch.randn(4, 3, 8, 8)


def build_as(architecture, config, attention="eager", experts=None, **settings):
    """A model builder: architecture and config by their names in transformers."""

    def make():
        made = getattr(transformers, config)(**settings, attn_implementation=attention)
        if experts:
            made._experts_implementation = experts
        return getattr(transformers, architecture)(made).eval()

    return make


def causal_case(name, family, loss_fn=causal, **settings):
    model = build_as(f"{family}ForCausalLM", f"{family}Config", **IDS, **settings)
    return Case(name, model, padded_ids, loss_fn)


def text_case(name, family, loss_fn=classify_text, **settings):
    config, settings = f"{family}Config", IDS | {"num_labels": 3} | settings
    model = build_as(f"{family}ForSequenceClassification", config, **settings)
    return Case(name, model, text_batch, loss_fn)


def mixtral(experts):
    return causal_case(
        f"Mixtral, experts {experts}",
        "Mixtral",
        experts=experts,
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def qwen3_moe(experts):
    return causal_case(
        f"Qwen3-MoE, experts {experts}",
        "Qwen3Moe",
        experts=experts,
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    )


def clip():
    sizes = SMALL | {"attn_implementation": "eager"}
    text = IDS | sizes | {"max_position_embeddings": 10}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=7,
        attn_implementation="eager",
    )
    return transformers.CLIPModel(config).eval()


def convolution(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    expansion = 2

    def __init__(self, inputs, width, stride):
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.norm1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


def shortcut(inputs, outputs, stride):
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.conv, self.norm = convolution(3, 4, 3), nn.BatchNorm2d(4)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        widths = [4, 4 * block.expansion, 6 * block.expansion]
        self.blocks = nn.Sequential(block(4, 4, 1), block(widths[1], 6, 2), block(widths[2], 6, 1))
        self.out = nn.Linear(widths[2], 3)
        with torch.no_grad():
            self(torch.randn(8, 3, 8, 8))  # in train mode: running statistics other than 0 and 1

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.conv(x))))
        return self.out(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


class Recurrent(nn.Module):
    """Two layers of an LSTM in both directions, read at the last position."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(10, 3)

    def forward(self, ids):
        return self.out(self.lstm(self.embed(ids))[0][:, -1])


ZOO = [
    causal_case("Llama", "Llama", **GROUPED),
    causal_case("Llama, sdpa", "Llama", attention="sdpa", **GROUPED),
    causal_case("Mistral", "Mistral", sliding_window=4, **GROUPED),
    causal_case("Qwen2", "Qwen2", **SMALL, num_key_value_heads=3, tie_word_embeddings=True),
    causal_case("Gemma", "Gemma", **GROUPED),
    *(make(experts) for make in (mixtral, qwen3_moe) for experts in ("eager", "batched_mm")),
    Case(
        "GPT-2",
        build_as(
            "GPT2LMHeadModel", "GPT2Config", **IDS, n_positions=10, n_embd=12, n_layer=2, n_head=3
        ),
        padded_ids,
        causal,
    ),
    causal_case(
        "Mamba",
        "Mamba",
        hidden_size=12,
        state_size=4,
        num_hidden_layers=2,
        conv_kernel=3,
        time_step_rank=2,
    ),
    text_case("BERT", "Bert", classify_pairs, **SMALL, max_position_embeddings=10),
    text_case("BERT, sdpa", "Bert", classify_pairs, attention="sdpa", **SMALL),
    text_case("RoBERTa", "Roberta", **SMALL, max_position_embeddings=12, type_vocab_size=1),
    text_case(
        "DistilBERT",
        "DistilBert",
        dim=12,
        hidden_dim=16,
        n_layers=2,
        n_heads=3,
        max_position_embeddings=10,
    ),
    Case(
        "T5",
        build_as(
            "T5ForConditionalGeneration",
            "T5Config",
            **IDS,
            d_model=12,
            d_kv=4,
            d_ff=16,
            num_layers=2,
            num_heads=3,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
        ),
        translation_batch,
        translate,
    ),
    Case(
        "Whisper",
        build_as(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **IDS,
            d_model=12,
            num_mel_bins=5,
            max_source_positions=6,
            max_target_positions=10,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            decoder_start_token_id=1,
        ),
        sound_batch,
        transcribe,
    ),
    Case(
        "ViT",
        build_as(
            "ViTForImageClassification",
            "ViTConfig",
            **SMALL,
            image_size=8,
            patch_size=4,
            num_labels=3,
        ),
        image_batch,
        classify_images,
    ),
    Case("CLIP", clip, pair_batch, matching_pairs),
    Case("ResNet, BasicBlock", lambda: ResNet(BasicBlock).eval(), image_batch, cross_entropy),
    Case("ResNet, Bottleneck", lambda: ResNet(Bottleneck).eval(), image_batch, cross_entropy),
    Case("LSTM", lambda: Recurrent().eval(), text_batch, cross_entropy),
]
