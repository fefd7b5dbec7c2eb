"""SegFormer: efficient attention and Mix-FFN, in stages of growing width.

The convolution that shortens keys and values keeps its width: only heads and neurons go. An encoder alone (`nvidia/mit-b0`) has
no decode head, so all of that is new for a task. Embeddings are the patches of the first stage only; those of later stages
merge patches, as Swin's do, and are trained.
"""

from recap_cli.api import Adapter, Heads, Neurons

BLOCK = "**stages.*.blocks.*"

SEGFORMER = Adapter(
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
        ),
        Neurons(block=BLOCK, up=("mlp.fc1",), depthwise=("mlp.dwconv.dwconv",), down="mlp.fc2"),
    ),
    embeddings=("*stages.0.patch_embeddings.*",),
    head=("decode_head.*", "classifier.*"),
)
