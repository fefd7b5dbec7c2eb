"""A compensated cut once more, by plain hooks and numpy: the rows of every layer, and least squares on them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recap_cli.data.sampling import sample
from recap_cli.rounds.run_context import Context
from tests.pico import logits_for


def rows_by_layer(context: Context, half: int | None) -> dict[str, np.ndarray]:
    """The inputs of every layer with a weight over D_s, or over its first or second batch, one token a row."""
    recipe, (split, _) = context.recipe, context.splits(lambda items, label, total=None: iter(items))
    size = recipe.importance.batch_size
    chosen = sample(len(split), 2 * size, seed=recipe.seed, round=1, stage="compensate")
    batch = split.batch(chosen if half is None else chosen[half * size : (half + 1) * size])
    model, found, handles = context.model(context.full_tensors()), dict[str, list[np.ndarray]](), []
    for path, layer in model.named_modules():

        def keep(layer: Any, args: tuple[Tensor, ...], out: Any, path: str = path) -> None:
            inputs = args[0].detach().double()
            if "attention_mask" in batch and inputs.dim() == 3:  # of texts every layer sees (batch, tokens, width)
                tokens = batch["attention_mask"].tolist()
                rows = [inputs[b, t].numpy() for b in range(len(tokens)) for t in range(len(tokens[b])) if tokens[b][t]]
            else:
                rows = list(inputs.reshape(-1, inputs.shape[-1]).numpy())
            found.setdefault(path, []).append(np.array(rows))

        if isinstance(layer, nn.Linear) or hasattr(layer, "nf"):
            handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        logits_for(context.spec)(model, {name: t for name, t in batch.items() if name != "labels"})
    return {path: np.concatenate(rows) for path, rows in found.items()}


def inputs_that_stay(context: Context) -> dict[str, list[bool]]:
    """Of each weight that an axis cuts along its inputs, which of them the plan keeps."""
    model, found, plan = context.model(context.full_tensors()), dict[str, list[bool]](), context.plan("round-001")
    for axis in context.layout.axes:
        for cut in axis.cuts:
            layer = model.get_submodule(cut.param.rpartition(".")[0])
            reads = (isinstance(layer, nn.Linear) and cut.dim == 1) or (hasattr(layer, "nf") and cut.dim == 0)
            if cut.param.endswith(".weight") and reads:
                along = found.setdefault(cut.param, [True] * model.get_parameter(cut.param).shape[cut.dim])
                for unit, stays in enumerate(plan[axis.name].tolist()):
                    for entry in range(cut.width):
                        along[cut.offset + unit * cut.width + entry] = stays
    return {name: along for name, along in found.items() if not all(along)}


@dataclass
class Regression:
    """The rows of one layer: what is left of its inputs, and what is lost of its outputs."""

    left: np.ndarray  # (rows, kept)
    lost: np.ndarray  # (rows, out)
    has_bias: bool

    def change(self, ridge: float) -> np.ndarray:
        """D by least squares, with one more row for each input that is penalised; (out, kept + 1)."""
        count, kept = self.left.shape
        ones = np.full((count, 1), float(self.has_bias))
        k = np.concatenate([self.left, ones], 1) / count**0.5
        more = np.concatenate([np.sqrt(ridge * (self.left**2).mean()) * np.eye(kept), np.zeros((kept, 1))], 1)
        wanted = np.concatenate([self.lost / count**0.5, np.zeros((kept, self.lost.shape[1]))])
        return np.linalg.lstsq(np.concatenate([k, more]), wanted, rcond=None)[0].T

    def left_over(self, change: np.ndarray) -> float:
        return float(((self.lost - self.left @ change[:, :-1].T - change[:, -1]) ** 2).sum())


def regressions(context: Context, half: int | None = None) -> dict[str, Regression]:
    """One for each weight that is cut along its inputs."""
    rows, tensors, found = rows_by_layer(context, half), context.full_tensors(), dict[str, Regression]()
    for name, stays in inputs_that_stay(context).items():
        path, at = name.removesuffix(".weight"), np.array(stays)
        matrix = tensors[name].double().numpy()
        matrix = matrix if matrix.shape[1] == len(stays) and context.spec.model_type != "gpt2" else matrix.T  # (out, in)
        found[name] = Regression(rows[path][:, at], rows[path][:, ~at] @ matrix[:, ~at].T, f"{path}.bias" in tensors)
    return found
