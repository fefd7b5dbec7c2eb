"""Mask2Former, MaskFormer and OneFormer with a Swin backbone: its heads and neurons, and the decoders' feedforward blocks.

The decoders of Mask2Former and OneFormer keep their attention: each form there has the width of the tokens built in.
MaskFormer's decoder has plain attention, to itself and to the pixels, and both are pruned.

For other classes the class predictor is new, and the weights of the classes in the loss; queries and masks of a checkpoint
remain.
"""

from recap_cli.api import Adapter, Heads, Neurons

BLOCK = "**encoder.layers.*.blocks.*"
DECODER = "**transformer_module.decoder.layers.*"
EMBEDDINGS = ("*embeddings.*",)
HEAD = ("class_predictor.*", "criterion.empty_weight")


def attention(name: str) -> Heads:
    """Return the table of one attention of MaskFormer's decoder layers."""
    return Heads(
        block=f"{DECODER}.{name}",
        attention="",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        out="o_proj",
        head_dim="head_dim",
    )


BACKBONE = (
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
)
PIXEL_DECODER = Neurons(block="**pixel_level_module.decoder.encoder.layers.*", up=("fc1",), down="fc2")

MASK2FORMER = Adapter(
    tables=(*BACKBONE, PIXEL_DECODER, Neurons(block=DECODER, up=("fc1",), down="fc2")),
    embeddings=EMBEDDINGS,
    head=HEAD,
)

MASKFORMER = Adapter(
    tables=(
        Heads(
            block=BLOCK,
            attention="attention.self",
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
            out="attention.output.dense",
            head_dim="attention_head_size",
            count=("num_attention_heads",),
            width=("all_head_size",),
            extra=(("attention.self.relative_position_bias_table", 1),),
        ),
        attention("self_attn"),
        attention("encoder_attn"),
        Neurons(block=BLOCK, up=("intermediate.dense",), down="output.dense"),
        Neurons(block=DECODER, up=("mlp.fc1",), down="mlp.fc2"),
    ),
    embeddings=EMBEDDINGS,
    head=HEAD,
)

ONEFORMER = Adapter(
    tables=(
        *BACKBONE,
        PIXEL_DECODER,
        Neurons(block=DECODER, up=("ffn.linear1",), down="ffn.linear2"),
        Neurons(block="**transformer_module.decoder.query_transformer.decoder.layers.*", up=("linear1",), down="linear2"),
    ),
    embeddings=EMBEDDINGS,
    head=("*transformer_module.decoder.class_embed.*", "criterion.*"),
)
