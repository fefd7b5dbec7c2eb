"""How large the values of a model's configuration may be: larger models would fill a machine's memory before they fail.

Keys are those of transformers' configurations and of timm's arguments, under all their names.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_LIMITS: dict[int, tuple[str, ...]] = {
    1_000: (
        *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks", "encoder_layers", "decoder_layers"),
        *("query_dec_layers", "depth", "depths", "num_channels", "in_chans", "num_encoder_blocks"),
    ),
    10_000: (
        *("num_attention_heads", "num_key_value_heads", "n_heads", "n_head", "num_heads", "image_size", "img_size"),
        *("num_queries", "pool_scales", "patch_sizes", "strides", "sr_ratios"),
    ),
    1_000_000: (
        *(
            "hidden_size",
            "dim",
            "n_embd",
            "embed_dim",
            "embedding_size",
            "d_model",
            "intermediate_size",
            "hidden_dim",
            "n_inner",
        ),
        *("num_labels", "num_classes", "type_vocab_size", "train_num_points"),
        *("hidden_sizes", "neck_hidden_sizes", "fusion_hidden_size", "decoder_hidden_size", "auxiliary_channels"),
        *("feature_size", "mask_feature_size", "fpn_feature_size", "encoder_feedforward_dim", "dim_feedforward"),
        *("conv_dim", "mask_dim", "task_seq_len"),
    ),
    100_000_000: ("vocab_size", "max_position_embeddings", "n_positions"),
}
LARGEST = max(_LIMITS)
LIMITS = {key: limit for limit, keys in _LIMITS.items() for key in keys}


class Beyond(NamedTuple):
    """A number of a configuration that is beyond its limit. `key` is dotted."""

    key: str
    found: int | float
    limit: int


def beyond(values: Mapping[str, Any], prefix: str = "") -> Iterator[Beyond]:
    """Yield the numbers beyond their limits, also those in lists and in nested configurations."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from beyond(value, f"{prefix}{key}.")
            continue
        numbers = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, int | float)]
        if key in LIMITS and numbers and max(numbers) > LIMITS[key]:
            yield Beyond(f"{prefix}{key}", max(numbers), LIMITS[key])
