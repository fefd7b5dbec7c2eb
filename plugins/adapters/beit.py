"""BEiT and the vision model of data2vec, whose heads own a column of a table of position biases.

Each layer may have such a table. A table that all layers share stands outside of them: then the heads of all layers are one
axis. A checkpoint that classifies, or was pretrained, has no pyramid and no decode heads: they are new for a task.
"""

from dataclasses import replace

from torch import nn

from recap_cli.api import Adapter, Axis, Cut, Heads, Neurons, find_axes

TABLE = "relative_position_bias.relative_position_bias_table"
SHARED = (f"beit.shared_position_bias.{TABLE.rpartition('.')[2]}", f"data2vec_vision.encoder.{TABLE}")
EMBEDDINGS = ("*embeddings.*",)
HEAD = ("fpn*", "decode_head.*", "auxiliary_head.*", "classifier.*", "*.pooler.*")

BEIT_HEADS = Heads(
    block="**layers.*",
    attention="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    head_dim="head_dim",
    count=("num_attention_heads",),
    extra=((TABLE, 1),),
)
BEIT_NEURONS = Neurons(block="**layers.*", up=("mlp.fc1",), down="mlp.fc2")

DATA2VEC_HEADS = Heads(
    block="**encoder.layer.*",
    attention="attention.attention",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    head_dim="attention_head_size",
    count=("num_attention_heads",),
    width=("all_head_size",),
    extra=((f"attention.attention.{TABLE}", 1),),
)
DATA2VEC_NEURONS = Neurons(block="**encoder.layer.*", up=("intermediate.dense",), down="output.dense")


def adapter(heads: Heads, neurons: Neurons) -> Adapter:
    """Return the adapter of these layers, with a table of biases in each layer, or one for all, or both."""
    joined = replace(heads, shared=True)

    def axes(model: nn.Module) -> list[Axis]:
        tables = [name for name, _ in model.named_parameters() if name.endswith(SHARED)]
        found = find_axes(Adapter((joined if tables else heads, neurons), EMBEDDINGS, HEAD), model)
        cuts = tuple(Cut(name, 1, couple=name) for name in tables)
        return [replace(axis, cuts=(*axis.cuts, *cuts)) if axis.kind == "heads" else axis for axis in found]

    # The counts are made true by the tables: the axes of the two forms have other names, so only one of them applies.
    return Adapter((heads, joined, neurons), EMBEDDINGS, HEAD, axes=axes)


BEIT = adapter(BEIT_HEADS, BEIT_NEURONS)
DATA2VEC_VISION = adapter(DATA2VEC_HEADS, DATA2VEC_NEURONS)
