"""EoMT: a plain ViT whose last blocks also see the queries, through a mask that has the model's number of heads built in.

The heads of those blocks stay whole; their neurons, and all of the other blocks, are pruned. For other classes the class
predictor is new, and the weights of the classes in the loss; the queries and the mask head of a checkpoint remain.
"""

from typing import Any, cast

from torch import nn

from recap_cli.api import Adapter, Axis, Heads, Neurons, find_axes

BLOCK = "layers.*"
HEADS = Heads(
    block=BLOCK,
    attention="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.out_proj",
    head_dim="head_dim",
    count=("num_heads",),
)
TABLES = (
    HEADS,
    Neurons(block=BLOCK, up=("mlp.fc1",), down="mlp.fc2"),
    Neurons(block=BLOCK, up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj"),
    Neurons(block=BLOCK, up=("mlp.weights_in",), down="mlp.weights_out", chunks=2),
)
EMBEDDINGS = ("embeddings.*",)
HEAD = ("class_predictor.*", "criterion.empty_weight")


def unmasked(model: nn.Module) -> list[Axis]:
    """Return the axes without the heads of masked blocks."""
    config = cast(Any, model).config
    blocks = config.num_hidden_layers - config.num_blocks
    return [axis for axis in find_axes(Adapter(TABLES, EMBEDDINGS, HEAD), model) if axis.kind != "heads" or axis.layer < blocks]


EOMT = Adapter(TABLES, EMBEDDINGS, HEAD, axes=unmasked)
