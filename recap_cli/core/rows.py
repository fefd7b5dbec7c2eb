"""Which rows of a layer's inputs count: the tokens of texts, and not what pads them."""

from torch import Tensor


def rows_of(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that count of a layer's inputs, (rows, in).

    Of inputs (batch, tokens, …, in) those tokens are left out where the attention mask, (batch, tokens), is 0. Of inputs of any
    other form every row counts.
    """
    if mask is not None and inputs.dim() > 2 and inputs.shape[:2] == mask.shape:
        inputs = inputs[mask.bool()]  # (tokens that count, …, in)
    return inputs.reshape(-1, inputs.shape[-1])
