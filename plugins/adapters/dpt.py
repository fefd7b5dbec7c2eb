"""DPT with a plain ViT as its encoder.

Neck and heads read the encoder's layers, and no encoder brings them: they are new for a task. The convolutions in front of a
hybrid DPT are not pruned.
"""

from recap_cli.api import Adapter, Heads, Neurons

BLOCK = "**encoder.layer.*"

DPT = Adapter(
    tables=(
        Heads(
            block=BLOCK,
            attention="attention.attention",
            q="attention.attention.query",
            k="attention.attention.key",
            v="attention.attention.value",
            out="attention.output.dense",
            head_dim="attention_head_size",
            count=("num_attention_heads",),
            width=("all_head_size",),
        ),
        Neurons(block=BLOCK, up=("intermediate.dense",), down="output.dense"),
    ),
    embeddings=("*embeddings.*",),
    head=("neck.*", "head.*", "auxiliary_head.*"),
)
