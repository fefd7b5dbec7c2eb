"""A compensated cut once more, by plain hooks and numpy: gradual steps in the full model's coordinates, and least squares.

Nothing is ever cut here: what a step drops is zero in the full model, and what it absorbs is added to its entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recap_cli.data.sampling import sample
from recap_cli.rounds.run_context import Context
from tests.pico import logits_for
from tests.stages import naive
from tests.stages.naive import Group


@dataclass
class Regression:
    """The rows of one layer: what is left of its inputs, and what is lost of its outputs."""

    left: np.ndarray  # (rows, kept)
    lost: np.ndarray  # (rows, out)
    has_bias: bool
    half: np.ndarray  # (rows,), of which half of D_s a row is

    def change(self, ridge: float) -> np.ndarray:
        """D by least squares, with one more row for each input that is penalised; (out, kept + 1)."""
        count, kept = self.left.shape
        ones = np.full((count, 1), float(self.has_bias))
        k = np.concatenate([self.left, ones], 1) / count**0.5
        more = np.concatenate([np.sqrt(ridge * (self.left**2).mean()) * np.eye(kept), np.zeros((kept, 1))], 1)
        wanted = np.concatenate([self.lost / count**0.5, np.zeros((kept, self.lost.shape[1]))])
        return np.linalg.lstsq(np.concatenate([k, more]), wanted, rcond=None)[0].T

    def left_over(self, ridge: float) -> float:
        """What is left where it was not fitted, both ways."""
        return sum(self.of(half)._off(self.of(1 - half).change(ridge)) for half in (0, 1))

    def of(self, half: int) -> "Regression":
        rows = self.half == half
        return Regression(self.left[rows], self.lost[rows], self.has_bias, self.half[rows])

    def _off(self, change: np.ndarray) -> float:
        return float(((self.lost - self.left @ change[:, :-1].T - change[:, -1]) ** 2).sum())


@dataclass
class NaiveCut:
    """The first prune of a state: the plan, the full model's weights with what they absorb, and each step's regressions."""

    alive: list[Group]
    weights: dict[str, Tensor]
    steps: list[dict[str, Regression]]


def naive_cut(context: Context, ridge: float) -> NaiveCut:
    """Score by eq. (1), drop, regress, and go on with the weights that have it: N_p times."""
    recipe, layout = context.recipe, context.layout.to_json()
    weights = {name: tensor.clone() for name, tensor in context.full_tensors().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    axes = naive.Axes(layout["axes"], shapes, layout["whole_trained"], layout["whole_frozen"])
    model, cut = context.model(context.full_tensors()), NaiveCut(naive.everything(axes), weights, [])
    for step in range(1, recipe.prune.steps + 1):
        naive.load(model, weights, axes, cut.alive)
        batch = examples(context, f"prune {step}")
        scores = naive.importance(model, axes, cut.alive, [batch], recipe.prune.criterion)
        share = (1 - context.round_plans[0].prune_ratio) ** (step / recipe.prune.steps)
        whole, limits = naive.everything(axes), {"scope": recipe.prune.scope, "floor": recipe.prune.floor, "least": 1}
        kept = naive.best_groups(scores, axes, share, whole, **limits)
        cut.steps.append({})
        rows, half = rows_by_layer(model, context, f"compensate {step}")
        for name, (before, after) in inputs_that_stay(context, axes, cut.alive, kept).items():
            path, gone, transposed = name.removesuffix(".weight"), before & ~after, is_transposed(model, name)
            matrix = (weights[name].T if transposed else weights[name]).double().numpy()  # (out, in)
            has_bias, seen = f"{path}.bias" in weights, rows[path]
            cut.steps[-1][name] = found = Regression(seen[:, after], seen[:, gone] @ matrix[:, gone].T, has_bias, half[path])
            change, matrix = found.change(ridge), matrix.copy()
            matrix[:, after] += change[:, :-1]
            matrix[:, gone] = 0.0
            weights[name] = torch.from_numpy(matrix.T if transposed else matrix).float()
            if has_bias:
                weights[f"{path}.bias"] = (weights[f"{path}.bias"].double() + torch.from_numpy(change[:, -1])).float()
        cut.alive = kept
    return cut


def examples(context: Context, stage: str) -> dict[str, Tensor]:
    """D_s of a stage of the first round."""
    recipe, (split, _) = context.recipe, context.splits(lambda items, label, total=None: iter(items))
    size = recipe.importance.batches * recipe.importance.batch_size
    return split.batch(sample(len(split), size, seed=recipe.seed, round=1, stage=stage))


def rows_by_layer(model: nn.Module, context: Context, stage: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The inputs of every layer with a weight over D_s, one token a row; and of which batch of two the row is."""
    batch, size = examples(context, stage), context.recipe.importance.batch_size
    found, halves, handles = dict[str, list[np.ndarray]](), dict[str, list[np.ndarray]](), []
    for path, layer in model.named_modules():

        def keep(layer: Any, args: tuple[Tensor, ...], out: Any, path: str = path) -> None:
            inputs = args[0].detach().double()
            rows = list(_rows(inputs, batch.get("attention_mask")))
            each = len(inputs) // len(batch["labels"])  # windows of an example
            found.setdefault(path, []).append(np.array([row for _, row in rows]))
            halves.setdefault(path, []).append(np.array([at // each // size % 2 for at, _ in rows]))

        if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
            handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        logits_for(context.spec)(model, {name: t for name, t in batch.items() if name != "labels"})
    for handle in handles:
        handle.remove()
    return tuple({path: np.concatenate(parts) for path, parts in of.items()} for of in (found, halves))  # type: ignore[return-value]


def _rows(inputs: Tensor, mask: Tensor | None) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens that count, each with the number of its example or window."""
    for at, of_one in enumerate(inputs):
        tokens = of_one.reshape(-1, inputs.shape[-1]).numpy()
        for place, token in enumerate(tokens):
            if mask is None or inputs.dim() != 3 or mask[at, place]:  # of texts every layer sees (batch, tokens, width)
                yield at, token


def is_transposed(model: nn.Module, name: str) -> bool:
    return hasattr(model.get_submodule(name.rpartition(".")[0]), "nf")  # a Conv1D: (in, out)


def inputs_that_stay(
    context: Context, axes: naive.Axes, before: list[Group], after: list[Group]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each weight whose inputs a step cuts, which of them there were and which of them stay."""
    model, found = context.model(context.full_tensors()), dict[str, tuple[np.ndarray, np.ndarray]]()
    for axis in axes.axes:
        for cut in axis["cuts"]:
            name, layer = cut["param"], model.get_submodule(cut["param"].rpartition(".")[0])
            reads = (isinstance(layer, nn.Linear) and cut["dim"] == 1) or (hasattr(layer, "nf") and cut["dim"] == 0)
            if not name.endswith(".weight") or not reads:
                continue
            size = model.get_parameter(name).shape[cut["dim"]]
            pair = found.setdefault(name, (np.ones(size, bool), np.ones(size, bool)))
            for along, alive in zip(pair, (before, after), strict=True):
                for unit in range(axis["size"]):
                    for entry in range(cut["width"]):
                        along[cut["offset"] + unit * cut["width"] + entry] = (axis["name"], unit) in alive
    return {name: pair for name, pair in found.items() if (pair[0] != pair[1]).any()}
