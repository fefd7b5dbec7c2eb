"""What the blocks of a model give for an example: hidden states, averaged over its tokens, each of length 1.

A student may learn those of its teacher block by block, beside the outputs (Sun et al., 2019, "Patient Knowledge Distillation",
eq. 7, which takes the first token). An average needs no room to speak of: it is kept as a teacher's outputs are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recap_cli.core.task import Batch, Outputs
from recap_cli.errors import PluginError

MASK = "attention_mask"  # of a batch: which tokens are no padding, (examples, tokens)


class HiddenStates:
    """The hidden states of the last forward that was listened to."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._listens = False

    def heard(self, forward: Callable[[Batch], Outputs]) -> Callable[[Batch], Outputs]:
        """Return the same forward, of which the hidden states are kept until the next one.

        A block that runs once more in a backward pass, as checkpoints let it, is not listened to.
        """

        def hearing(batch: Batch) -> Outputs:
            self._given, self._listens = [], True
            try:
                return forward(batch)
            finally:
                self._listens = False

        return hearing

    def take(self, batch: Batch) -> list[Tensor]:
        """Return what each block gave in the forward of this batch, in the order of their runs, and forget it.

        Returns:
            (examples, width) each, float32, of length 1: averages over the tokens that are no padding.

        Raises:
            PluginError: a block gives no tensor of (examples, …, width).
        """
        given, self._given = self._given, []
        return [_direction(states, batch) for states in given]

    def hear(self, _: nn.Module, __: Any, output: Any) -> None:
        """Keep what a block gives, of several tensors the first: a hook of its forward."""
        if self._listens:
            self._given.append(next(iter(tree_leaves(output)), output))


@contextmanager
def watched(model: nn.Module, blocks: Sequence[str]) -> Iterator[HiddenStates]:
    """Inside, the hidden states that these modules give can be heard; those of one that runs several times are several."""
    states = HiddenStates()
    hooks = [model.get_submodule(path).register_forward_hook(states.hear) for path in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def spread(count: int, over: int) -> list[int]:
    """Return which of `over` blocks of a teacher the `count` of a student learn from: evenly, the last from the last.

    Of as many it is each from its own; with 6 and 12 it is every second (Sun et al., 2019, PKD-Skip).
    """
    return [-(-(place + 1) * over // count) - 1 for place in range(count)]


def _direction(states: Tensor, batch: Batch) -> Tensor:
    if not isinstance(states, Tensor) or states.ndim < 3 or len(states) != len(batch["labels"]):
        what = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise PluginError(
            f"a block gives {what} for {len(batch['labels'])} examples, and no width after examples and tokens",
            hint="its hidden states cannot be learned: --set distill.hidden_weight=0",
        )
    tokens = states.flatten(1, -2)  # (examples, tokens, width)
    mask = batch.get(MASK)
    if mask is None or mask.shape != tokens.shape[:2]:
        mean = tokens.mean(1)
    else:
        shares = (mask / mask.sum(1, keepdim=True).clamp(min=1)).to(tokens.dtype)  # (examples, tokens)
        mean = torch.bmm(shares[:, None], tokens)[:, 0]  # which keeps nothing but the mask
    return nn.functional.normalize(mean.float(), dim=1)
