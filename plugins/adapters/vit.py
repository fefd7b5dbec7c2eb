"""Vision transformers of the transformers library: ViT and DeiT in one layout, DINOv2 with its two kinds of feedforward block.

transformers 5 renamed the modules: `attention.attention.query` became `attention.q_proj`, `intermediate.dense` became
`mlp.fc1`, and DINOv2's packed `weights_in` became `gate_proj` and `up_proj`. The tables have both layouts.
"""

from recap_cli.api import Adapter, Heads, Neurons

EARLIER_HEADS = Heads(
    block="**encoder.layer.*",
    attention="attention.attention",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    head_dim="attention_head_size",
    count=("num_attention_heads",),
    width=("all_head_size",),
)


def heads(block: str) -> Heads:
    """Return the current names of an attention block, for layers at `block`."""
    return Heads(
        block=block,
        attention="attention",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        out="attention.o_proj",
        head_dim="head_dim",
        count=("num_attention_heads",),
    )


VIT = Adapter(
    tables=(
        heads("**layers.*"),
        Neurons(block="**layers.*", up=("mlp.fc1",), down="mlp.fc2"),
        EARLIER_HEADS,
        Neurons(block="**encoder.layer.*", up=("intermediate.dense",), down="output.dense"),
    ),
    embeddings=("*embeddings.*",),
    head=("classifier.*", "cls_classifier.*", "distillation_classifier.*"),
)

DINOV2 = Adapter(
    tables=(
        heads("**encoder.layer.*"),
        EARLIER_HEADS,
        Neurons(block="**encoder.layer.*", up=("mlp.fc1",), down="mlp.fc2"),
        Neurons(block="**encoder.layer.*", up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj"),
        Neurons(block="**encoder.layer.*", up=("mlp.weights_in",), down="mlp.weights_out", chunks=2),
    ),
    embeddings=("*embeddings.*",),
    head=("classifier.*",),
)
