"""Swin transformers of the transformers library: stages of growing width, whose heads own a column of a table of biases.

Patch merging, between the stages, keeps its width: only heads and neurons go.
"""

from recap_cli.api import Adapter, Heads, Neurons

BLOCK = "**encoder.layers.*.blocks.*"

SWIN = Adapter(
    tables=(
        Heads(
            block=BLOCK,
            attention="attention",
            q="attention.q_proj",
            k="attention.k_proj",
            v="attention.v_proj",
            out="attention.o_proj",
            head_dim="head_dim",
            count=("num_attention_heads",),
            extra=(("attention.relative_position_bias.relative_position_bias_table", 1),),
        ),
        Neurons(block=BLOCK, up=("mlp.fc1",), down="mlp.fc2"),
    ),
    embeddings=("*embeddings.*",),
    head=("classifier.*",),
)
