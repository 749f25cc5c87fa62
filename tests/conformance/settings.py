"""Settings of single folders of transformers that no rule on names gives."""

from __future__ import annotations

from typing import Any

from transformers import BeitConfig, Dinov2Config, ResNetConfig

_AHEAD = {"prediction_length": 4, "context_length": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_state": 16}


def _resnet(*stages: str) -> dict[str, Any]:
    """A backbone that needs no package besides."""
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return {"backbone_config": ResNetConfig(**sizes, out_features=list(stages))}


_VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
_DINO = {
    "backbone_config": Dinov2Config(
        **_VISION, image_size=56, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    ),
    "neck_hidden_sizes": [16, 16, 32, 32], "reassemble_hidden_size": 32,
}  # fmt: skip
"""A backbone that gives four of its hidden states."""
_BEIT = {
    "backbone_config": BeitConfig(
        **_VISION, image_size=64, patch_size=16, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )
}
_EFFICIENT = {"width_coefficient": 1.0, "depth_coefficient": 0.5, "hidden_dim": 1280, "image_size": 64}

SETTINGS: dict[str, dict[str, Any]] = {
    "clipseg": {"extract_layers": [0, 1], "reduce_dim": 16},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGA": 6, "IMGIMGB": 7}},
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "detr": _resnet("stage4"), "conditional_detr": _resnet("stage4"), "dab_detr": _resnet("stage4"),
    "table_transformer": _resnet("stage4"), "deformable_detr": _resnet("stage2", "stage3", "stage4"),
    "align": {"vision_config": _EFFICIENT}, "efficientnet": _EFFICIENT,
    "depth_anything": _DINO, "prompt_depth_anything": _DINO, "zoedepth": _BEIT,
    "chmv2": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}},
    "tipsv2_dpt": {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}},
    "longcat_flash": {"qk_head_dim": 16}, "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "perceiver": {"d_latents": 32, "d_model": 32, "num_latents": 16, "qk_channels": 32, "v_channels": 32},
    "seggpt": {"image_size": [64, 32], "patch_size": 16, "pretrain_image_size": 32},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 5, "no_token_index": 6},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "grounding_dino": {"num_queries": 5}, "mm_grounding_dino": {"num_queries": 5},
    "upernet": _resnet("stage1", "stage2", "stage3", "stage4"),
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "autoformer": _AHEAD, "informer": _AHEAD, "time_series_transformer": _AHEAD,
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 16, "n_groups": 2},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 8},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blip_2": {"image_token_index": 99},
    "gemma3": {"mm_tokens_per_image": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
}  # fmt: skip
"""Folder → fields of its config."""
WITHOUT: dict[str, tuple[str, ...]] = {}
"""Folder → parts of its config that are left out."""
CLASSES: dict[str, str] = {
    "gemma3n": "Gemma3nForCausalLM",
    "align": "AlignModel", "altclip": "AltCLIPModel", "chinese_clip": "ChineseCLIPModel", 
    "clip": "CLIPModel", "clipseg": "CLIPSegForImageSegmentation", "groupvit": "GroupViTModel", "metaclip_2": "MetaClip2Model",
    "owlv2": "Owlv2ForObjectDetection", "owlvit": "OwlViTForObjectDetection", "siglip": "SiglipModel",
    "siglip2": "Siglip2Model", "x_clip": "XCLIPModel", "blip": "BlipForConditionalGeneration", "flava": "FlavaModel",
}  # fmt: skip
"""Folder → the class that is taken, where the first one is not the one to look at."""
