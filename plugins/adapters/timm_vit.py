"""timm's VisionTransformer: ViT, DeiT (with or without the distillation token) and other models of the same blocks.

The query, key and value are one fused matrix, or three. A feedforward block may hold gate and value as one matrix (`GluMlp`)
or two (`SwiGLU`). The attention must read its width from `attn_dim`, as timm does since 1.0.24; earlier releases used the width
of the tokens.
"""

from recap_cli.api import Adapter, Heads, Neurons

FUSED = Heads(
    block="blocks.*",
    attention="attn",
    fused="attn.qkv",
    out="attn.proj",
    head_dim="head_dim",
    count=("num_heads",),
    width=("attn_dim",),
)
SEPARATE = Heads(
    block="blocks.*",
    attention="attn",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    out="attn.proj",
    head_dim="head_dim",
    count=("num_heads",),
    width=("attn_dim",),
    kv_count=("num_kv_heads",),
    kv_width=("kv_dim",),
)

TIMM_VIT = Adapter(
    tables=(
        FUSED,
        SEPARATE,
        Neurons(block="blocks.*", up=("mlp.fc1",), down="mlp.fc2"),
        Neurons(block="blocks.*", up=("mlp.fc1",), down="mlp.fc2", chunks=2),
        Neurons(block="blocks.*", up=("mlp.fc1_g", "mlp.fc1_x"), down="mlp.fc2"),
    ),
    embeddings=("pos_embed", "cls_token", "reg_token", "dist_token", "patch_embed.*"),
    head=("head.*", "head_dist.*"),
)
