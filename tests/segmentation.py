"""The smallest models of semantic segmentation, from configurations as JSON has them: forwards of 2 to 20 ms.

Images of 32 × 32 pixels are the least for Swin with patches of 2: its last stage then has one window of 2 × 2 tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from recap_cli.models import prompts, transformers_models
from recap_cli.models.specs import ModelSpec, image_facts

LABELS = ["road", "tree", "sky"]
SIDE = 32  # pixels
PROMPT = "the task is semantic"
STAGES = ["stage1", "stage2", "stage3", "stage4"]
VIT: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 8},
    "num_channels": 3,
}
SWIN: dict[str, Any] = {
    **{"model_type": "swin", "image_size": SIDE, "patch_size": 2, "num_channels": 3, "embed_dim": 8, "depths": [1, 1, 1, 1]},
    **{"num_heads": [2, 2, 4, 4], "window_size": 2, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "out_features": STAGES},
}
CONVNEXT: dict[str, Any] = {
    **{"model_type": "convnext", "num_channels": 3, "patch_size": 2, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "out_features": STAGES,
}
BEIT: dict[str, Any] = {  # four layers, as four are read; what is read of layer n is its input, so the last has no effect
    **{**VIT, "num_hidden_layers": 4, "intermediate_size": 24, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]},
    **{"use_relative_position_bias": True, "drop_path_rate": 0.0, "auxiliary_channels": 8},
}
UPERNET: dict[str, Any] = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_channels": 8}
EOMT: dict[str, Any] = {
    **{**VIT, "mlp_ratio": 2, "num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1, "train_num_points": 8},
}
DETR: dict[str, Any] = {
    **{"model_type": "detr", "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 40},
    **{"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 8, "num_queries": 4},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "segformer": {
        **{"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [7, 3]},
        **{"num_attention_heads": [2, 4], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16},
        **{"num_channels": 3, "drop_path_rate": 0.0},
    },
    "dpt": {
        **{**VIT, "intermediate_size": 24, "backbone_out_indices": [0, 1], "reassemble_factors": [2, 1]},
        **{"neck_hidden_sizes": [8, 16], "fusion_hidden_size": 16},
    },
    "beit": BEIT,
    "data2vec-vision": BEIT,
    "upernet": {**UPERNET, "backbone_config": SWIN},
    "eomt": EOMT,
    "mask2former": {  # its norms have 32 groups, so features are a multiple of 32
        **{"feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32, "encoder_feedforward_dim": 24, "encoder_layers": 1},
        **{"dim_feedforward": 40, "decoder_layers": 3, "num_attention_heads": 4, "num_queries": 4, "train_num_points": 8},
        "backbone_config": SWIN,
    },
    "maskformer": {
        **{"fpn_feature_size": 32, "mask_feature_size": 16, "backbone_config": SWIN, "decoder_config": DETR},
    },
    "oneformer": {
        **{"conv_dim": 32, "mask_dim": 32, "hidden_dim": 32, "encoder_feedforward_dim": 24, "encoder_layers": 1},
        **{"dim_feedforward": 40, "decoder_layers": 3, "query_dec_layers": 1, "num_attention_heads": 4, "num_queries": 4},
        **{"train_num_points": 8, "task_seq_len": 6, "text_encoder_vocab_size": 64, "backbone_config": SWIN},
    },
}
SHARED = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # of another layout: the model type, and its values
    "beit, shared": ("beit", {**BEIT, **SHARED}),
    "data2vec-vision, shared": ("data2vec-vision", {**BEIT, **SHARED}),
    "upernet, ConvNeXt": ("upernet", {**UPERNET, "backbone_config": CONVNEXT}),
    "eomt, SwiGLU": ("eomt", {**EOMT, "use_swiglu_ffn": True}),
}
SEGMENTERS = ("segformer", "dpt", "mask2former", "maskformer", "oneformer")  # those that whole rounds are run of
TYPICAL = ("segformer", "mask2former")  # of them those that go through every test: one with each kind of loss
UNIVERSAL = ("eomt", "mask2former", "maskformer", "oneformer")  # those of masks and classes


def spec_of(name: str) -> ModelSpec:
    """The spec of a model of `CONFIGS` or `VARIANTS`."""
    model_type, values = VARIANTS[name] if name in VARIANTS else (name, CONFIGS[name])
    auto = "AutoModelForUniversalSegmentation" if model_type in UNIVERSAL else "AutoModelForSemanticSegmentation"
    config = transformers_models.configure({"model_type": model_type, **values}, strict=True)
    transformers_models.set_labels(config, LABELS, None)
    kind, image = "semantic-segmentation", image_facts(SIDE, 3)
    spec = ModelSpec("transformers", model_type, {}, len(LABELS), LABELS, kind, image, auto_class=auto)
    forward = prompts.told(config, spec, PROMPT, None).forward
    return replace(spec, config=transformers_models.config_values(config), forward=forward)


def segmenter(name: str, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    """A pico model with the random weights of `seed`, in eval mode, and its spec; torch's own generator is left as it was."""
    spec = spec_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers_models.build(spec), spec
