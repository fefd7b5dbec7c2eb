"""What the blocks of a model give for an example: hidden states, averaged over its tokens, each of length 1.

A student may learn those of its teacher block by block, beside the outputs (Sun et al., 2019, "Patient Knowledge Distillation",
eq. 7, which takes the first token and adds up over blocks). Of what a block gives only the average is held. No gradient of its
size waits for the backward pass to get there: states and average leave one node of the graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from recap_cli.core.task import Batch, Outputs
from recap_cli.errors import PluginError

MASK = "attention_mask"  # of a batch: which tokens are no padding, (examples, tokens)
NO_STATES = "learn from the outputs alone: --set distill.hidden_weight=0"


class HiddenStates:
    """The hidden states of the last forward that was listened to."""

    def __init__(self) -> None:
        self._means: list[Tensor] = []
        self._batch: Batch | None = None  # that is listened to

    def heard(self, forward: Callable[[Batch], Outputs]) -> Callable[[Batch], Outputs]:
        """Return the same forward, of which the hidden states are kept until the next one.

        A block that runs once more in a backward pass, as checkpoints let it, is not listened to.
        """

        def hearing(batch: Batch) -> Outputs:
            self._means, self._batch = [], batch
            try:
                return forward(batch)
            finally:
                self._batch = None

        return hearing

    def take(self) -> list[Tensor]:
        """Return what each block gave in the last forward, in the order of their runs, and forget it.

        Returns:
            (examples, width) each, float32, of length 1: averages over the tokens that are no padding.
        """
        means, self._means = self._means, []
        return [nn.functional.normalize(mean.float(), dim=1) for mean in means]

    def hear(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Keep the average of what a block gives, of several tensors of the first: a hook of its forward.

        Raises:
            PluginError: that is no tensor of (examples, …, width), or has other tokens than the mask.
        """
        if self._batch is None:
            return None
        leaves, form = tree_flatten(output)
        states = _checked(leaves[0] if leaves else None, self._batch)
        leaves[0], mean = _Mean.apply(states, _shares(states, self._batch.get(MASK)))
        self._means.append(mean)
        return tree_unflatten(leaves, form)


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


def spread(student: Sequence[int], teacher: Sequence[int]) -> list[int] | None:
    """Return which blocks of a teacher those of a student learn from, by the widths of all; None where the widths differ.

    Blocks of one width after another are a stage. In each stage they are spread evenly, the last from the last: of as many each
    learns from its own, of 12 six learn from every second, and of fewer some learn from the same.
    """
    ours, theirs = ([(width, len(list(run))) for width, run in groupby(widths)] for widths in (student, teacher))
    if [width for width, _ in ours] != [width for width, _ in theirs]:
        return None
    places, start = list[int](), 0
    for (_, count), (_, over) in zip(ours, theirs, strict=True):
        places += [start - (-(place + 1) * over // count) - 1 for place in range(count)]
        start += over
    return places


class _Mean(torch.autograd.Function):
    """Hidden states as they are, and their average over tokens, (examples, width), by the share of each token."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shares, ctx.shape = shares, states.shape  # no tensor that checkpoints would have to recompute
        return states.view_as(states), torch.bmm(shares[:, None], states.flatten(1, -2))[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor, grad_mean: Tensor) -> tuple[Tensor, None]:
        outer = (ctx.shares[:, :, None], grad_mean[:, None])  # (examples, tokens, 1), (examples, 1, width)
        return torch.baddbmm(grad_states.flatten(1, -2), *outer).view(ctx.shape), None


def _shares(states: Tensor, mask: Tensor | None) -> Tensor:
    """What each token has of the average, (examples, tokens)."""
    if mask is not None:
        return (mask / mask.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)
    tokens = states[0].numel() // states.shape[-1]
    return states.new_full((len(states), tokens), 1 / tokens)


def _checked(states: object, batch: Batch) -> Tensor:
    examples, mask = len(batch["labels"]), batch.get(MASK)
    if not isinstance(states, Tensor) or states.ndim < 3 or len(states) != examples:
        what = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise PluginError(
            f"a block gives {what} for {examples} examples, and no width after examples and tokens: its hidden states cannot "
            "be learned",
            hint=NO_STATES,
        )
    if mask is not None and mask.shape != states.shape[:-1]:
        raise PluginError(
            f"a block gives hidden states of {tuple(states.shape)}, and which tokens are padding is said for "
            f"{tuple(mask.shape)}: they cannot be learned",
            hint=NO_STATES,
        )
    return states
