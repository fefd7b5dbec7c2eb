"""How much each group counts: one backward per batch of D_s, summed over every coupled weight (paper, eq. (1) and (4))."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, Cut, kinds_of
from recap_cli.core.criterion import Criterion, Losses
from recap_cli.errors import PluginError, SelectionError
from recap_cli.untrusted.code import guarded

SCORE_HINT = (
    "`score(weight, grad)` returns a tensor of the weight's shape; see docs/plugins/criterion.md, or choose another criterion"
)
GROUPS_HINT = (
    "`score_groups` returns a tensor for every axis, by its name; see docs/plugins/criterion.md, or choose another criterion"
)
UNRANKED_HINT = "let the adapter leave them out, or choose a criterion that needs no gradient, as magnitude"
Scores = dict[str, Tensor]  # axis name → importance, float32, shape (axis.size,)


def group_scores(
    model: nn.Module, axes: Sequence[Axis], criterion: Criterion, losses: Losses, *, named: str | None = None
) -> Scores:
    """The importance of every group: `I_m = Σ_{θ_k ∈ G_m} score(θ_k, g_k)`, over all cuts and biases of the group.

    With `score = (g·θ)²` this is eq. (1), with `g²` eq. (4), `g` being the mean derivative over D_s. Only prunable tensors
    get a gradient, and each gradient is freed as soon as its last contribution is in, so that with one batch no two layers'
    gradients are held together. The model's `requires_grad` flags, and each module's mode, are as before when this returns.

    Args:
        model: in evaluation mode.
        axes: whose groups are scored.
        criterion: scores weights, or whole groups.
        losses: runs the model over D_s.
        named: what messages call the criterion.

    Returns:
        For each axis name the importances, float32 on the CPU, (axis.size,).

    Raises:
        PluginError: the criterion fails, gives something else than scores, or writes to the model.
        SelectionError: of a kind of groups, no weight has a gradient: nothing would rank them.
    """
    who = "the criterion" if named is None else f"the criterion {named!r}"
    if criterion.score_groups is not None:
        return _scored_groups(criterion, who, model, axes, losses)
    owners = _owners(axes)
    params = {name: param for name, param in model.named_parameters() if name in owners}
    reached = set[str]()
    totals = {axis.name: torch.zeros(axis.size, device=next(iter(params.values())).device) for axis in axes}  # (size,)

    def add(name: str, grad: Tensor, share: float) -> None:
        param = params[name].detach()
        reached.update(axis.kind for axis, _ in owners[name])
        for axis, along in _reduced(criterion, who, param, grad, owners[name]):
            totals[axis.name] += share * along.to(totals[axis.name].device)  # (axis.size,); of a streamed model, on the CPU

    if criterion.needs == "none":
        for name, param in params.items():
            add(name, torch.zeros((), device=param.device, dtype=param.dtype).expand_as(param), 1.0)
    else:
        _collect(model, params, losses, each=criterion.needs == "each", add=add)
    if unranked := [kind for kind in kinds_of(axes) if kind not in reached]:
        raise SelectionError(
            f"{who} ranks no {unranked[0]}: the loss has no gradient for any of their weights", hint=UNRANKED_HINT
        )
    return {name: total.cpu() for name, total in totals.items()}


def averaged(pools: Iterable[Sequence[Axis]], now: Scores, before: Scores, weight: float) -> Scores:
    """An exponential moving average of importances: `weight` times that `before`, and 1 − `weight` times that of `now`.

    Each is taken relative to its mean size over the axes of a pool, which are ranked together, as gradients are of another size
    in every round.
    """
    found: Scores = {}
    for pool in pools:
        units = (torch.cat([of[axis.name] for axis in pool]) for of in (now, before))  # (units of the pool,) each
        mean_now, mean_before = (scores.abs().mean().clamp(min=1e-30) for scores in units)  # scalars
        for axis in pool:
            found[axis.name] = now[axis.name] * ((1 - weight) / mean_now) + before[axis.name] * (weight / mean_before)
    return found


def _collect(
    model: nn.Module, params: dict[str, nn.Parameter], losses: Losses, *, each: bool, add: Callable[[str, Tensor, float], None]
) -> None:
    """Run the backwards and hand each parameter's complete gradient to `add`, then free it."""
    done, share = False, 0.0

    def complete(name: str) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            if done and param.grad is not None:
                add(name, param.grad, share if each else 1.0)
                param.grad = None

        return hook

    with ExitStack() as stack:
        stack.callback(_restore, [(p, p.requires_grad) for p in model.parameters()])
        for param in model.parameters():
            param.requires_grad_(False)
        for name, param in params.items():
            param.requires_grad_(True)
            handle = param.register_post_accumulate_grad_hook(complete(name))  # type: ignore[no-untyped-call]
            stack.callback(handle.remove)
        seen = 0.0
        for loss, share in losses(each):
            seen += share
            done = each or seen > 1 - 1e-9
            (loss if each else loss * share).backward()  # type: ignore[no-untyped-call]
        for name, param in params.items():
            if param.grad is not None:  # the last batch did not reach it, as with layer drop
                add(name, param.grad, 1.0)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for param, flag in flags:
        param.requires_grad_(flag)
        param.grad = None


def _reduced(
    criterion: Criterion, who: str, param: Tensor, grad: Tensor, owners: list[tuple[Axis, Cut]]
) -> Iterator[tuple[Axis, Tensor]]:
    """The score of one parameter, summed to the units of each axis that cuts it."""
    if criterion.score is None:
        raise ValueError("this criterion scores whole groups, not entries")
    score = _scored(criterion, who, param, grad)  # shape of param
    dim, along = owners[0][1].dim, score.float()
    if score.ndim > 1:
        along = along.sum(dim=[d for d in range(score.ndim) if d != dim])  # (length of dim,)
    for axis, cut in owners:
        entries = along[cut.offset : cut.offset + axis.size * cut.width]  # (size · width,)
        yield axis, entries.view(axis.size, cut.width).sum(1)  # (size,)


def _scored(criterion: Criterion, who: str, param: Tensor, grad: Tensor) -> Tensor:
    """The score of every entry of one parameter. The criterion is given a copy of it, for its own is the user's model."""
    with guarded(f"{who} failed", SCORE_HINT):
        score = criterion.score(param.clone(), grad)  # type: ignore[misc]
    if not isinstance(score, Tensor) or score.shape != param.shape:
        found = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
        raise PluginError(f"{who} gave {found} for a weight of shape {tuple(param.shape)}", hint=SCORE_HINT)
    if score.device != param.device:
        raise PluginError(f"{who} gave scores on {score.device} for a weight on {param.device}", hint=SCORE_HINT)
    importances = _importances(who, score, SCORE_HINT)
    if not _is_finite(importances) and _is_finite(param) and _is_finite(grad):  # else the data's or the weights' fault
        raise PluginError(f"{who} gave scores that are not finite for a weight and a gradient that are", hint=SCORE_HINT)
    return importances


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _scored_groups(criterion: Criterion, who: str, model: nn.Module, axes: Sequence[Axis], losses: Losses) -> Scores:
    flags, modes = [(p, p.requires_grad) for p in model.parameters()], [(m, m.training) for m in model.modules()]
    before = _checksums(model)
    try:
        with guarded(f"{who} failed", GROUPS_HINT):
            scores = criterion.score_groups(model, axes, losses)  # type: ignore[misc]
    finally:
        _restore(flags)
        for module, mode in modes:
            module.training = mode
    if changed := _changed(before, _checksums(model)):
        raise PluginError(
            f"{who} has changed the model: {changed}", hint="`score_groups` may look at the model, and copies what it changes"
        )
    lacking = [a.name for a in axes if not isinstance(scores, Mapping) or not isinstance(scores.get(a.name), Tensor)]
    if lacking:
        raise PluginError(f"{who} gave no scores for {lacking[0]} ({len(lacking)} of {len(axes)} axes)", hint=GROUPS_HINT)
    return {axis.name: _checked(axis, who, scores[axis.name]) for axis in axes}


def _checked(axis: Axis, who: str, scores: Tensor) -> Tensor:
    if tuple(scores.shape) != (axis.size,):
        found = tuple(scores.shape)
        raise PluginError(f"{axis.name}: {axis.size} scores wanted, {who} gave shape {found}", hint=GROUPS_HINT)
    return _importances(who, scores, GROUPS_HINT).float().cpu()


def _importances(who: str, scores: Tensor, hint: str) -> Tensor:
    """The scores. Raises `PluginError` unless they are real numbers that are there, and none is below zero."""
    if not scores.is_floating_point() or scores.layout != torch.strided or scores.is_meta:
        kind = "no values (device meta)" if scores.is_meta else f"scores of {scores.dtype}, {scores.layout}"
        raise PluginError(f"{who} gave {kind}, not a dense tensor of floating-point numbers", hint=hint)
    if scores.numel() and not bool(scores.amin().nan_to_num() >= 0):  # NaN is refused elsewhere
        raise PluginError(f"{who} gave scores below zero ({float(scores.amin()):.4g})", hint=hint)
    return scores.detach()


def _checksums(model: nn.Module) -> dict[str, int]:
    """A checksum of every parameter and buffer, those included that no checkpoint holds.

    `Tensor._version` would not see what is written through `.data`.
    """
    named = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: crc32(_bytes(tensor.detach())) for name, tensor in named}


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()  # (bytes,)


def _changed(before: Mapping[str, int], after: Mapping[str, int]) -> str | None:
    """What of the model is no longer as it was, or None."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return None if not names else f"{names[0]}{f' and {len(names) - 1} more tensors' if len(names) > 1 else ''}"


def _owners(axes: Sequence[Axis]) -> dict[str, list[tuple[Axis, Cut]]]:
    owners: dict[str, list[tuple[Axis, Cut]]] = defaultdict(list)
    for axis in axes:
        for cut in axis.cuts:
            owners[cut.param].append((axis, cut))
    return owners
