"""Decoders with a cache of keys and values: GPT-2, by the tables that docs/plugins/adapter.md prints, and a Llama of ours."""

import ast
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recap_cli import api
from recap_cli.core.adapter import Adapter, Heads, Neurons
from recap_cli.models import build
from recap_cli.models.specs import ModelSpec
from tests.pico import WORDS, _hf

PLUGINS = Path(__file__).parents[1] / "docs" / "plugins" / "adapter.md"
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": len(WORDS), "pad_token_id": 0},
    "llama": {
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        **{"vocab_size": len(WORDS), "max_position_embeddings": 40, "pad_token_id": 0},
    },
}


def printed_tables() -> tuple[Heads | Neurons, ...]:
    """The tables for GPT-2 as docs/plugins/adapter.md has them: that very text, executed."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PLUGINS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (text,) = [block for block in blocks if block.startswith("Heads(") and "transformer.h" in block]
    return tuple(eval(ast.unparse(line), {name: getattr(api, name) for name in api.__all__}) for line in ast.parse(text).body)


ADAPTERS = {
    "gpt2": Adapter(printed_tables(), embeddings=("*.wte.*", "*.wpe.*"), head=("score.*",)),
    "llama": Adapter(
        (
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
}


def decoder(name: str, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    """A pico decoder with a classification head, in eval mode, and its spec."""
    spec = _hf(name, SIZES[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build._build(spec), spec
