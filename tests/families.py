"""Families of models that a capture once got wrong, refused or crashed on: tiny, from configs.

Unlike those of the zoo they move, pack or share things along the batch, or hand parameters to
functions that hide what they do. Of transformers, peft and diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from cases import Case, cross_entropy, padded_ids
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from zoo import (
    GROUPED,
    IDS,
    SMALL,
    build_as,
    causal,
    causal_case,
    classify_images,
    classify_pairs,
    image_batch,
    real_tokens_loss,
    text_case,
)


class Family(NamedTuple):
    case: Case
    float32: str = ""  # what of it is computed in float32 whatever its dtype
    options: Mapping = MappingProxyType({})  # of `capture`, which `collect` finds out by itself


def family(name, model, batch, loss_fn, float32="", **options):
    return Family(Case(name, model, batch, loss_fn), float32, options)


def weighted(y: Tensor) -> Tensor:
    """A loss for each example, in which every number of its output has a part of its own."""
    y = y.flatten(1)
    return (y * torch.linspace(0.5, 1.5, y.shape[1]).to(y)).square().mean(1)


def of_output(*names):
    """The losses of what a model of transformers gives under these names."""

    def loss_fn(model, batch):
        out = model(*batch)
        return sum(weighted(getattr(out, name)) for name in names)

    return loss_fn


def normal(*shape):
    return lambda: (torch.randn(shape),)


# Text: experts first (Llama4), groups first (DeepSeek-V4, RecurrentGemma), stack and index
# (Gemma3n), masks made by new_ones (Funnel), learned latents (Perceiver), and ways of their own to
# lay out positions (XLNet puts time first).
DEEPSEEK = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "q_lora_rank": 6,
}
V3 = DEEPSEEK | {
    "num_key_value_heads": 3,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 5,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
}
V4 = DEEPSEEK | {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "o_groups": 2,
    "o_lora_rank": 3,
    "index_n_heads": 2,
    "index_head_dim": 4,
    "index_topk": 2,
    "sliding_window": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
    ],
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
}
GEMMA3N = {
    "vocab_size_per_layer_input": 23,
    "hidden_size_per_layer_input": 4,
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "laurel_rank": 3,
    "sliding_window": 7,
    "activation_sparsity_pattern": [0.5, 0.0],
    "layer_types": ["sliding_attention", "full_attention"],
}
FUNNEL = {
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
    "d_model": 12,
    "n_head": 3,
    "d_head": 4,
    "d_inner": 16,
}
DEBERTA = {
    "max_position_embeddings": 10,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 4,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
}
PERCEIVER = {
    "num_latents": 4,
    "d_latents": 8,
    "d_model": 8,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 2,
    "max_position_embeddings": 8,
}


def of_config(name, config, float32="", experts=None, **settings):
    """A causal model of a family whose config has a name of its own."""
    model = build_as(f"{name}ForCausalLM", config, experts=experts, **(IDS | settings))
    title = f"{name}, experts {experts}" if experts else name
    return family(title, model, padded_ids, causal, float32)


def sparse_mixtral(experts):
    """More experts than find a token."""
    sizes = {"num_local_experts": 16, "num_experts_per_tok": 1}
    name = f"Mixtral, experts without tokens, {experts}"
    return causal_case(name, "Mixtral", experts=experts, **GROUPED, **sizes)


LLAMA4 = GROUPED | {"intermediate_size_mlp": 16, "num_local_experts": 3, "attention_chunk_size": 4}
NORMS, ATTENTION = "its norms", "its attention"
TEXT = [
    of_config(
        "Llama4", "Llama4TextConfig", "its norms and router", **LLAMA4, no_rope_layers=[1, 0]
    ),
    of_config("DeepseekV3", "DeepseekV3Config", NORMS, experts="eager", **(SMALL | V3)),
    of_config("DeepseekV3", "DeepseekV3Config", NORMS, experts="batched_mm", **(SMALL | V3)),
    of_config("DeepseekV4", "DeepseekV4Config", NORMS, experts="eager", **V4),
    of_config("DeepseekV4", "DeepseekV4Config", NORMS, experts="batched_mm", **V4),
    of_config(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        "its norms and recurrence",
        **(GROUPED | {"num_hidden_layers": 3}),
        attention_window_size=7,
    ),
    of_config("Gemma3n", "Gemma3nTextConfig", NORMS, **GROUPED, **GEMMA3N),
    Family(sparse_mixtral("eager"), NORMS),
    Family(sparse_mixtral("batched_mm"), NORMS),
    Family(text_case("Funnel", "Funnel", **FUNNEL), ATTENTION),
    family(
        "Funnel with its decoder",
        build_as("FunnelForMaskedLM", "FunnelConfig", **IDS, **FUNNEL),
        padded_ids,
        causal,
        ATTENTION,
    ),
    Family(
        text_case("XLNet", "XLNet", classify_pairs, d_model=12, n_layer=2, n_head=3, d_inner=16)
    ),
    Family(
        text_case(
            "Longformer", "Longformer", **SMALL, attention_window=4, max_position_embeddings=12
        ),
        ATTENTION,
    ),
    Family(text_case("DeBERTa-v2", "DebertaV2", **SMALL, **DEBERTA)),
    Family(text_case("Perceiver", "Perceiver", **PERCEIVER)),
    family(
        "Perceiver, tokens",
        build_as(
            "PerceiverForMaskedLM",
            "PerceiverConfig",
            **IDS,
            **PERCEIVER,
            qk_channels=8,
            v_channels=8,
        ),
        padded_ids,
        causal,
    ),
]


# Images and sound: learned probes and queries, windows merged with the batch, images of different
# sizes packed into one sequence (Qwen2-VL, Pixtral) or padded (SigLIP 2), masked steps (SEW-D).


def caption(model, batch):
    """Qwen2-VL: the patches of all images, each as many as it has, go in as one sequence."""
    ids, patches, grids = batch
    if patches.dim() > 2:  # padded, so that the batch can be cut into examples
        sizes = grids.prod(1).tolist()
        patches = torch.cat([p[:n] for p, n in zip(patches, sizes, strict=True)])
    out = model(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        pixel_values=patches,
        image_grid_thw=grids,
        mm_token_type_ids=(ids == 20).int(),
    )
    return real_tokens_loss(out.logits[:, :-1], ids[:, 1:])


def caption_batch(packed, *grids):
    """Images of these numbers of patches, whose tokens stand before their text."""
    grids = torch.tensor(grids)
    patches = grids.prod(1)
    ids = [torch.tensor([21] + [20] * n + [5, 7, 9]) for n in (patches // 4).tolist()]
    shape = (int(patches.sum()), 24) if packed else (len(grids), int(patches.max()), 24)
    return pad_sequence(ids, batch_first=True), torch.randn(shape), grids


QWEN2_VL = {
    "text_config": IDS
    | SMALL
    | {
        "num_key_value_heads": 3,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 0],
        },
    },
    "vision_config": {
        "depth": 2,
        "embed_dim": 8,
        "hidden_size": 12,
        "num_heads": 2,
        "patch_size": 2,
        "mlp_ratio": 2,
    },
    "image_token_id": 20,
    "vision_start_token_id": 21,
    "vision_end_token_id": 18,
    "video_token_id": 19,
}
qwen2_vl = build_as("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", **QWEN2_VL)


def of_patches(model, batch):
    """Pixtral: the patches of all images in one sequence."""
    images, sizes = batch
    packed = model(images, image_sizes=sizes).last_hidden_state[0]
    parts = packed.split((sizes // 4).prod(1).tolist())
    return torch.cat([weighted(part[None]) for part in parts])


def masked_sound(model, batch):
    sound, mask = batch
    return weighted(model(sound, mask_time_indices=mask).last_hidden_state)


def padded_patches():
    shapes = torch.tensor([[2, 2], [1, 3], [2, 3]])
    return torch.randn(3, 6, 48), torch.arange(6) < shapes.prod(1, keepdim=True), shapes


def classify_sound(model, batch):
    sound, label = batch
    return cross_entropy(lambda x: model(x).logits, (sound, label))


SOUND = SMALL | {
    "conv_dim": (6, 6),
    "conv_stride": (3, 2),
    "conv_kernel": (4, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "position_buckets": 4,
    "max_position_embeddings": 16,
    "classifier_proj_size": 5,
    "num_labels": 3,
}
RESNET = {"embedding_size": 4, "depths": [1, 1], "hidden_sizes": [4, 6], "layer_type": "basic"}
QUERIES = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 3,
    "num_labels": 3,
}
RT_DETR = QUERIES | {
    "d_model": 8,
    "encoder_hidden_dim": 8,
    "encoder_in_channels": [4, 6, 6],
    "decoder_in_channels": [8, 8, 8],
    "num_denoising": 0,
}
MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 8,
    "dim_feedforward": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "num_queries": 3,
    "num_labels": 3,
}


def detector(name, size, config="ResNet", **settings):
    """An object detector with learned queries, on a backbone of its own."""
    stages = settings.pop("stages")
    if config == "RTDetrResNet":
        backbone = transformers.RTDetrResNetConfig(
            **(RESNET | {"depths": [1] * 4, "hidden_sizes": [4, 4, 6, 6]}), out_features=stages
        )
    else:
        backbone = transformers.ResNetConfig(**RESNET, out_features=stages)
        settings["use_timm_backbone"] = False
    model = build_as(
        f"{name}ForObjectDetection", f"{name}Config", backbone_config=backbone, **settings
    )
    return family(name, model, normal(3, 3, size, size), of_output("logits", "pred_boxes"))


def mask2former():
    backbone = transformers.SwinConfig(
        image_size=64,
        embed_dim=4,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(backbone_config=backbone, **MASK2FORMER)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


SENSES = [
    family(
        "Qwen2-VL",
        qwen2_vl,
        lambda: caption_batch(False, (1, 4, 2), (1, 2, 2), (1, 4, 4)),
        caption,
        NORMS,
    ),
    family(
        "Qwen2-VL, packed batch, patches a multiple of its examples",
        qwen2_vl,
        lambda: caption_batch(True, (1, 4, 2), (1, 2, 2), (1, 2, 6)),
        caption,
        NORMS,
    ),
    family(
        "Pixtral",
        build_as(
            "PixtralVisionModel",
            "PixtralVisionConfig",
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=12,
            patch_size=4,
        ),
        lambda: (torch.randn(3, 3, 8, 12), torch.tensor([[8, 8], [4, 8], [8, 12]])),
        of_patches,
        NORMS,
    ),
    family(
        "SigLIP",
        build_as("SiglipVisionModel", "SiglipVisionConfig", **SMALL, image_size=8, patch_size=4),
        normal(3, 3, 8, 8),
        of_output("pooler_output"),
        ATTENTION,
    ),
    family(
        "SigLIP 2",
        build_as("Siglip2VisionModel", "Siglip2VisionConfig", **SMALL, num_patches=9, patch_size=4),
        padded_patches,
        of_output("pooler_output", "last_hidden_state"),
        "its positions and attention",
    ),
    family(
        "Swin v2",
        build_as(
            "Swinv2ForImageClassification",
            "Swinv2Config",
            image_size=8,
            patch_size=2,
            embed_dim=4,
            depths=(2, 1),
            num_heads=(2, 2),
            window_size=2,
            num_labels=3,
        ),
        image_batch,
        classify_images,
    ),
    detector("Detr", 16, stages=["stage2"], d_model=8, **QUERIES),
    detector("ConditionalDetr", 16, stages=["stage2"], d_model=8, **QUERIES),
    detector(
        "DeformableDetr",
        16,
        stages=["stage1", "stage2"],
        num_feature_levels=2,
        d_model=32,
        **QUERIES,
    ),
    detector("RTDetr", 32, "RTDetrResNet", stages=["stage2", "stage3", "stage4"], **RT_DETR),
    family(
        "Mask2Former",
        mask2former,
        normal(2, 3, 64, 64),
        of_output("class_queries_logits", "masks_queries_logits"),
    ),
    family(
        "SEW-D, masked",
        build_as("SEWDModel", "SEWDConfig", **SOUND),
        lambda: (torch.randn(4, 64), torch.rand(4, 10) > 0.6),
        masked_sound,
    ),
    family(
        "SEW-D, weights over its layers",
        build_as(
            "SEWDForSequenceClassification", "SEWDConfig", **SOUND, use_weighted_layer_sum=True
        ),
        lambda: (torch.randn(4, 64), torch.randint(3, (4,))),
        classify_sound,
    ),
]


# Adapters.


def prompted(model, batch):
    """With learned tokens before those of the batch."""
    (ids,) = batch
    out = model(input_ids=ids, attention_mask=(ids != 0).long())
    logits = out.logits[:, -ids.shape[1] :]
    return real_tokens_loss(logits[:, :-1], ids[:, 1:])


def adapter(name, config):
    base = causal_case("Llama", "Llama", **GROUPED).model
    model = lambda: peft.get_peft_model(base(), config).eval()  # noqa: E731
    return family(name, model, padded_ids, prompted, NORMS)


TO = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ADAPTERS = [
    adapter("prompt tuning", peft.PromptTuningConfig(**PROMPT)),
    adapter("P-tuning", peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=5)),
    adapter(
        "P-tuning, LSTM",
        peft.PromptEncoderConfig(
            **PROMPT, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"
        ),
    ),
    adapter(
        "prefix tuning",
        peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=5),
    ),
    adapter("LoRA", peft.LoraConfig(r=3, **TO)),
    adapter("DoRA", peft.LoraConfig(r=3, use_dora=True, **TO)),
    adapter("LoHa", peft.LoHaConfig(r=2, **TO)),
    adapter("LoKr", peft.LoKrConfig(r=2, **TO)),
    adapter("FourierFT", peft.FourierFTConfig(n_frequency=7, **TO)),
    adapter("RandLoRA", peft.RandLoraConfig(r=4, **TO)),
    adapter("C3A", peft.C3AConfig(block_size=4, **TO)),
    adapter("OFT", peft.OFTConfig(oft_block_size=4, **TO)),
    adapter("BOFT", peft.BOFTConfig(boft_block_size=2, **TO)),
    adapter("IA3", peft.IA3Config(feedforward_modules=["down_proj"], **TO)),
    adapter("VeRA", peft.VeraConfig(r=4, **(TO | {"target_modules": ["q_proj", "o_proj"]}))),
]


# Diffusion.


def unet():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 12),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def flux():
    """Positions without a batch dimension, which all examples share."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def noise_of_image(model, batch):
    noisy, steps, prompt = batch
    return weighted(model(noisy, steps, prompt).sample)


def noise_of_latents(model, batch):
    latents, prompt, pooled, steps = batch
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    positions = torch.stack([torch.zeros(2, 3), rows, columns], -1).flatten(0, 1)
    out = model(
        hidden_states=latents,
        encoder_hidden_states=prompt,
        pooled_projections=pooled,
        timestep=steps,
        img_ids=positions,
        txt_ids=torch.zeros(prompt.shape[1], 3),
    )
    return weighted(out.sample)


DIFFUSION = [
    family(
        "UNet",
        unet,
        lambda: (torch.randn(3, 4, 8, 8), torch.tensor([3, 500, 20]), torch.randn(3, 5, 6)),
        noise_of_image,
    ),
    family(
        "Flux",
        flux,
        lambda: (torch.randn(3, 6, 4), torch.randn(3, 5, 6), torch.randn(3, 5), torch.rand(3)),
        noise_of_latents,
        "its rotations",
    ),
]
FAMILIES = TEXT + SENSES + ADAPTERS + DIFFUSION
