"""Models that no adapter of ours is for, each with an adapter of a few lines: what of them has units of its own size.

- llama-grouped: two query heads share a key and a value, so a prune unit has another width in each of them;
- albert: one layer is all layers;
- t5-encoder: all layers add the position bias of the first, so their heads are one axis.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, T5Config, T5EncoderModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from recap_cli import registry
from recap_cli.core.adapter import Adapter, Heads, Neurons
from recap_cli.models import build
from recap_cli.models.specs import ModelSpec
from tests.pico import WORDS, _hf

SIZES: dict[str, dict[str, Any]] = {
    "llama-grouped": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"intermediate_size": 48, "vocab_size": len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0},
        **{"attention_bias": True},
    },
    "albert": {
        **{"hidden_size": 32, "embedding_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
        **{"vocab_size": len(WORDS), "max_position_embeddings": 40, "classifier_dropout_prob": 0.0},
    },
    "t5-encoder": {
        **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0},
        **{"relative_attention_num_buckets": 8, "vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 3},
        **{"feed_forward_proj": "gated-gelu"},
    },
}
ADAPTERS = {
    "llama-grouped": Adapter(
        tables=(
            Heads(
                block="model.layers.*",
                attention="self_attn",
                q="self_attn.q_proj",
                k="self_attn.k_proj",
                v="self_attn.v_proj",
                out="self_attn.o_proj",
                head_dim="head_dim",
            ),
            Neurons(block="model.layers.*", up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj"),
        ),
        embeddings=("*.embed_tokens.*",),
        head=("score.*",),
    ),
    "albert": Adapter(
        tables=(
            Heads(
                block="**albert_layers.*",
                attention="attention",
                q="attention.query",
                k="attention.key",
                v="attention.value",
                out="attention.dense",
                head_dim="attention_head_size",
                count=("num_attention_heads",),
                width=("all_head_size",),
            ),
            Neurons(block="**albert_layers.*", up=("ffn",), down="ffn_output"),
        ),
        embeddings=("*embeddings.*", "*embedding_hidden_mapping_in.*"),
        head=("classifier.*", "*.pooler.*"),
    ),
    "t5-encoder": Adapter(
        tables=(
            Heads(
                block="**encoder.block.*",
                attention="layer.0.SelfAttention",
                q="layer.0.SelfAttention.q",
                k="layer.0.SelfAttention.k",
                v="layer.0.SelfAttention.v",
                out="layer.0.SelfAttention.o",
                head_dim="key_value_proj_dim",
                count=("n_heads",),
                width=("inner_dim",),
                extra=(("layer.0.SelfAttention.relative_attention_bias.weight", 1),),
                shared=True,
            ),
            Neurons(
                block="**encoder.block.*",
                up=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
                down="layer.1.DenseReluDense.wo",
            ),
        ),
        embeddings=("*shared.*", "*embed_tokens.*"),
        head=("classifier.*",),
    ),
}


class T5EncoderConfig(T5Config):  # type: ignore[misc]
    """A T5 of which there is the encoder only: no such type is in the library, as a user's own model may be none."""

    model_type = "t5-encoder"


class T5EncoderForSequenceClassification(T5PreTrainedModel):  # type: ignore[misc]
    """T5's encoder, the mean of its outputs, and a linear head."""

    config_class = T5EncoderConfig
    _tied_weights_keys: ClassVar = {"encoder.embed_tokens.weight": "shared.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5EncoderModel(config).encoder
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (batch, tokens, width)
        weight = (attention_mask.unsqueeze(-1) / attention_mask.sum(1).clamp(min=1)[:, None, None]).to(
            hidden.dtype
        )  # (batch, tokens, 1)
        return SequenceClassifierOutput(logits=self.classifier((hidden * weight).sum(1)))


AutoConfig.register("t5-encoder", T5EncoderConfig)
AutoModelForSequenceClassification.register(T5EncoderConfig, T5EncoderForSequenceClassification)


TYPES = {name: {"llama-grouped": "llama"}.get(name, name) for name in SIZES}
STRANGE: dict[str, Callable[[], ModelSpec]] = {name: partial(_hf, TYPES[name], sizes) for name, sizes in SIZES.items()}
REGISTERED = {TYPES[name]: adapter for name, adapter in ADAPTERS.items()}
FROM = {"distribution": "a-strangers", "version": "1.0"}


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be the adapters, as if a package had registered them."""
    names, load, used = registry.names, registry.load, registry.used

    def known(of: Callable[..., Any], ours: Callable[[str], Any]) -> Callable[..., Any]:
        return lambda kind, name: ours(name) if kind == "adapters" and name in REGISTERED else of(kind, name)

    monkeypatch.setattr(registry, "names", lambda kind: [*names(kind), *(REGISTERED if kind == "adapters" else ())])
    monkeypatch.setattr(registry, "load", known(load, lambda name: REGISTERED[name]))
    monkeypatch.setattr(registry, "used", known(used, lambda name: {"kind": "adapters", "name": name, **FROM}))


def strange(name: str, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    """A pico model of that name with the random weights of `seed`, in eval mode, and its spec."""
    spec = STRANGE[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build._build(spec), spec
