"""Importance without a backward: weights times what they read (Wanda, 2306.11695; for groups as in FLAP, 2312.11983)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.api import Axis, Criterion, Cut, Losses, is_linear, is_transposed, owner_of, rows_of


def score_groups(model: nn.Module, axes: Sequence[Axis], losses: Losses) -> dict[str, Tensor]:
    """Return Σ |W_ij| · ‖x_j‖₂ over the weights through which each group goes out, per axis of shape (axis.size,).

    ‖x_j‖₂ is the norm of a layer's input j over all tokens of D_s; what pads a text does not count, where a layer sees
    (batch, tokens, width). A group that no layer reads, such as a key's hidden
    dimension, is scored by the weights of its own rows. Biases do not count.

    Raises:
        ValueError: A group meets no linear layer.
    """
    found = {axis.name: list(_matrices(model, axis)) for axis in axes}
    for axis in axes:
        if not found[axis.name]:
            raise ValueError(f"{axis.name} ({axis.kind}) meets no linear layer, whose inputs `wanda` scores by")
    layers = dict.fromkeys(layer for matrices in found.values() for layer, _ in matrices)
    norms = _input_norms(model, list(layers), losses)
    return {axis.name: sum(_scores(axis, cut, layer, norms[layer]) for layer, cut in found[axis.name]) for axis in axes}


def _matrices(model: nn.Module, axis: Axis) -> Iterator[tuple[nn.Module, Cut]]:
    """Yield the linear layers that read an axis, each with its cut; those that make it, where none reads it."""
    owners = [(*owner_of(model, cut.param), cut) for cut in axis.cuts]
    matrices = [(layer, cut) for layer, attribute, cut in owners if attribute == "weight" and is_linear(layer)]
    readers = [(layer, cut) for layer, cut in matrices if cut.dim == _input_dim(layer)]
    yield from readers or matrices


def _input_dim(layer: nn.Module) -> int:
    return 0 if is_transposed(layer) else 1


def _input_norms(model: nn.Module, layers: Sequence[nn.Module], losses: Losses) -> dict[nn.Module, Tensor]:
    """Run the model over D_s; the norm of each layer's inputs, fp32 on the CPU, (in,)."""
    squares: dict[nn.Module, Tensor] = {}
    mask: list[Tensor | None] = [None]  # of the batch under way

    def begin(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask[0] = named.get("attention_mask")

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        found = rows_of(inputs[0].detach(), mask[0]).float().square().sum(0).cpu()  # (in,)
        squares[layer] = squares[layer] + found if layer in squares else found

    with ExitStack() as hooks, torch.no_grad():
        hooks.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(see).remove)
        for _ in losses(False):  # the hooks see every batch
            pass
    return {layer: found.sqrt() for layer, found in squares.items()}


def _scores(axis: Axis, cut: Cut, layer: nn.Module, norms: Tensor) -> Tensor:
    """The scores that one matrix gives the groups of an axis, (axis.size,)."""
    weight = layer.get_parameter("weight").detach().float().abs()
    weight = weight.T if is_transposed(layer) else weight  # (out, in)
    entries = weight * norms.to(weight.device)
    of_cut = entries.sum(0 if cut.dim == _input_dim(layer) else 1)  # (in,) or (out,)
    return of_cut.narrow(0, cut.offset, axis.size * cut.width).view(axis.size, cut.width).sum(1).cpu()


WANDA = Criterion(score_groups=score_groups, needs="none")
