"""UPerNet: a backbone, of which the blocks are pruned, and convolutions that read its stages.

Swin's heads and neurons go, and ConvNeXt's neurons. A backbone brings neither the norms of its outputs nor the decode heads:
they are new for a task.
"""

from torch import nn

from recap_cli.api import Adapter, Axis, Heads, Neurons, find_axes

BLOCK = "**encoder.layers.*.blocks.*"
SWIN = (
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
CONVNEXT = (Neurons(block="**encoder.stages.*.layers.*", up=("pwconv1",), down="pwconv2"),)
EMBEDDINGS = ("*embeddings.*",)
HEAD = ("decode_head.*", "auxiliary_head.*", "*.hidden_states_norms.*")


def axes(model: nn.Module) -> list[Axis]:
    """Return the axes of the backbone; one without attention has no heads."""
    has_heads = not any(name.endswith(CONVNEXT[0].down) for name, _ in model.named_modules())
    return find_axes(Adapter(SWIN if has_heads else CONVNEXT, EMBEDDINGS, HEAD), model)


UPERNET = Adapter((*SWIN, *CONVNEXT), EMBEDDINGS, HEAD, axes=axes)
