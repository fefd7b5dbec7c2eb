"""A compensated cut: output matrices absorb what their pruned inputs contributed, over D_s (`prune.compensate`).

Each gradual step is compensated before the next one scores the model. The change of a round is a file of its own, in the
coordinates of the small model. A round that keeps the plan keeps it. The full model never has it: a merge writes the trained
values less the change.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.axes import Axis, UnitMask
from recap_cli.core.compensation import RIDGES, Balance, Change, Moments, best_change
from recap_cli.core.cut_inputs import CutInputs, cut_inputs
from recap_cli.core.rows import rows_of
from recap_cli.core.surgery import IndexMap, take
from recap_cli.core.task import Batch
from recap_cli.data.sampling import batches
from recap_cli.errors import SelectionError
from recap_cli.models import build
from recap_cli.progress import Track
from recap_cli.rounds.device_policy import on_device
from recap_cli.rounds.importance import Sample, draw_sample
from recap_cli.rounds.record import COMPENSATION
from recap_cli.rounds.run_context import Context
from recap_cli.state.store import Transaction

MOST_BYTES = 2 * 2**30  # of moments at a time; what is more takes another pass over D_s
OFF = "leave the cut as it is, in a new state: --set prune.compensate=false"


@dataclass(frozen=True)
class Absorbed:
    """What the weights of a round's small model make up for of its cut.

    Attributes:
        change: parameter → change, fp32, in the shapes of the small model; empty where there is none.
        facts: what `prune` notes of it; None where the plan cuts no inputs.
    """

    change: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] | None = None


@dataclass
class Sums:
    """The moments of one half of D_s as they add up, by weight; and the attention mask of the batch under way."""

    moments: dict[str, Moments] = field(default_factory=dict)
    mask: Tensor | None = None


class Absorbing:
    """The gradual steps of a round, each of which gives back what it takes (`gradual.Step.absorb`)."""

    def __init__(self, context: Context, number: int, track: Track) -> None:
        self._context, self._number, self._track, self._step = context, number, track, 0
        self._balances, self._ridges = defaultdict[str, Balance](Balance), dict[str, float | None]()  # by weight
        self._train, _ = context.splits(track)

    def __call__(self, model: nn.Module, axes: Sequence[Axis], index_map: IndexMap) -> dict[str, Tensor]:
        """What the weights whose inputs are about to be cut absorb, in the shapes after the cut.

        Raises:
            SelectionError: the inputs of a matrix, or the sums over them, are not finite.
        """
        recipe, found, absorbed = self._context.recipe, cut_inputs(model, index_map), dict[str, Tensor]()
        self._step += 1
        if not found:
            return absorbed
        label = f"compensation, step {self._step} of {recipe.prune.steps}"
        sample = draw_sample(recipe, self._train, self._number, f"compensate {self._step}", label)
        for together in _in_parts(model, found):
            with on_device(model, axes, sample.device, self._context.spec.model_type):
                first, second = _moments(self._context, model, together, sample, self._track)
            for cut in self._track(together, f"{label}, matrix by matrix", len(together)):
                none = Moments.none(len(cut.kept), _outputs(model, cut))  # D_s may be one example
                halves = first.pop(cut.weight), second.pop(cut.weight, none)
                change = _change(cut, halves, recipe.prune.compensate)
                absorbed |= cut.named(change.entries)
                self._balances[cut.weight] += change.balance
                self._ridges[cut.weight] = change.ridge
        return absorbed

    @property
    def facts(self) -> dict[str, Any] | None:
        """How much of what all steps took of each matrix is given back; None where they cut no inputs."""
        if not self._balances:
            return None
        left = {name: balance.left_share for name, balance in self._balances.items()}
        return {"given_back_share": 1.0 - fmean(left.values()), "left_shares": left, "ridges": self._ridges}


def absorbed_before(context: Context, number: int, plan: UnitMask) -> Absorbed:
    """What the round before has absorbed, whose plan round `number` keeps."""
    before = next(entry for entry in reversed(context.state.manifest.history) if entry["stage"] == "prune")
    return Absorbed(context.compensation(f"round-{number - 1:03d}", plan), before.get("compensated"))


def write_change(context: Context, transaction: Transaction, absorbed: Absorbed) -> None:
    """Write the change of a round, and note how much of what the cut took it gives back.

    The change of the round before, which nothing needs after it, is dropped.
    """
    if context.recipe.prune.compensate is False:
        return
    before = f"round-{transaction.round - 1:03d}/{COMPENSATION}"
    if absorbed.change:
        transaction.save_tensors(f"round-{transaction.round:03d}/{COMPENSATION}", absorbed.change)
    if before in context.state.manifest.files:
        transaction.drop(before)
    transaction.facts["compensated"] = absorbed.facts


def without_change(trained: Mapping[str, Tensor], change: Mapping[str, Tensor], in_small: IndexMap) -> dict[str, Tensor]:
    """The values at the entries `in_small` as the full model is to have them: less the change of the small model there."""
    return {
        name: values - take(change[name], in_small.get(name, {})) if name in change else values
        for name, values in trained.items()
    }


def _in_parts(model: nn.Module, found: Sequence[CutInputs]) -> Iterator[list[CutInputs]]:
    """The matrices in parts whose moments are held together: at most `MOST_BYTES` of them, or one matrix."""
    part, count_bytes = list[CutInputs](), 0
    for cut in found:
        kept, out = len(cut.kept) + 1, _outputs(model, cut)
        needed = 2 * torch.float64.itemsize * (kept * kept + out * kept)  # of both halves
        if part and count_bytes + needed > MOST_BYTES:
            yield part
            part, count_bytes = [], 0
        part.append(cut)
        count_bytes += needed
    yield part


def _change(cut: CutInputs, halves: tuple[Moments, Moments], setting: float | str | bool) -> Change:
    if not all(half.is_finite for half in halves):
        raise SelectionError(
            f"{cut.weight}: the sums over its inputs in D_s are not finite: its cut cannot be compensated", hint=OFF
        )
    auto = setting == "auto"
    try:
        return best_change(halves, RIDGES if auto else (float(setting),), has_bias=cut.bias is not None, may_be_none=auto)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise SelectionError(f"{cut.weight}: its cut cannot be compensated: {error}", hint=OFF) from error


def _moments(
    context: Context, model: nn.Module, found: Sequence[CutInputs], sample: Sample, track: Track
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """The moments of every weight over each half of D_s: one pass over all of it, without gradients.

    The model is on the device of the sample.
    """
    forward, sums = build.forward(context.spec), (Sums(), Sums())
    parts = _halves(sample, context.recipe.importance.batch_size)
    with torch.no_grad():
        steps = sum(-(-len(part) // sample.batch_size) for part in parts)
        for half, batch in track(_batches(sample, parts), sample.label, steps):
            with adding(model, found, sums[half], batch):
                forward(model, batch)
    return sums[0].moments, sums[1].moments


def _halves(sample: Sample, batch_size: int) -> tuple[Tensor, Tensor]:
    """The examples of D_s, in batches of the recipe that alternate; of a single batch its two halves."""
    size = min(batch_size, -(-len(sample.indices) // 2))
    is_second = torch.arange(len(sample.indices)) // size % 2 == 1  # (examples,)
    return sample.indices[~is_second], sample.indices[is_second]


def _batches(sample: Sample, parts: Sequence[Tensor]) -> Iterator[tuple[int, Batch]]:
    for half, part in enumerate(parts):
        if len(part) == 0:  # D_s is one example
            continue
        for batch in batches(sample.split, part, sample.batch_size, device=sample.device):
            yield half, batch


@contextmanager
def adding(model: nn.Module, found: Sequence[CutInputs], sums: Sums, batch: Batch) -> Iterator[None]:
    """Inside, every call of a layer that holds one of the weights adds its rows to the sums."""
    sums.mask = batch.get("attention_mask")
    with ExitStack() as stack:
        for cut in found:
            sums.moments.setdefault(cut.weight, Moments.none(len(cut.kept), _outputs(model, cut)))
            for path in cut.layers:
                handle = model.get_submodule(path).register_forward_pre_hook(_adder(cut, sums), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _outputs(model: nn.Module, cut: CutInputs) -> int:
    return int(model.get_parameter(cut.weight).shape[1 - cut.dim])


def _adder(cut: CutInputs, sums: Sums) -> Callable[..., None]:
    def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = rows_of(next(iter((*args, *kwargs.values()))), sums.mask)  # (rows, in)
        sums.moments[cut.weight] += Moments.of_rows(*cut.split(rows, layer.weight))

    return add
