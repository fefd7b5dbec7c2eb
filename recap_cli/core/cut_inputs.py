"""Linear layers that read pruned inputs: those whose output a cut changes, and whose weights can make up for it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recap_cli.core.adapter import is_linear, is_transposed
from recap_cli.core.surgery import IndexMap, owner_of
from recap_cli.core.ties import names_of


@dataclass(frozen=True)
class CutInputs:
    """A weight that is cut along its inputs.

    Attributes:
        weight: the parameter's first name.
        bias: that of the bias of its layers; None where they have none, or not one of their own.
        layers: the paths of all layers that hold it.
        dim: the dimension of its inputs.
        kept: the inputs that stay, int64, (kept,).
    """

    weight: str
    bias: str | None
    layers: tuple[str, ...]
    dim: int
    kept: Tensor

    def split(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs that stay, (rows, kept), and what the others contribute to the output, (rows, out).

        Args:
            inputs: of one of the layers, (rows, in).
            weight: of it, on the same device.
        """
        kept = self.kept.to(inputs.device)
        gone = torch.ones(inputs.shape[1], dtype=torch.bool, device=inputs.device).index_fill(0, kept, False)  # (in,)
        gone_weight = weight.index_select(self.dim, gone.nonzero().flatten())
        return inputs[:, kept], inputs[:, gone] @ (gone_weight if self.dim == 0 else gone_weight.T)

    def named(self, entries: Tensor) -> dict[str, Tensor]:
        """A change D, (out, kept + 1), by parameter in the shapes of the cut ones, fp32."""
        weight = entries[:, :-1] if self.dim == 1 else entries[:, :-1].T
        found = {self.weight: weight} if self.bias is None else {self.weight: weight, self.bias: entries[:, -1]}
        return {name: tensor.float().contiguous() for name, tensor in found.items()}


def cut_inputs(model: nn.Module, index_map: IndexMap) -> list[CutInputs]:
    """The weights of linear layers that `index_map` cuts along their inputs. The model may be on the meta device.

    A weight that something else holds too, such as an embedding, is none of them: what helps one would harm the other.
    """
    return list(_found(model, index_map))


def _found(model: nn.Module, index_map: IndexMap) -> Iterator[CutInputs]:
    called = names_of(model)
    for name, dims in index_map.items():
        holders = [owner_of(model, each) for each in called[name]]
        layers = [layer for layer, attribute in holders if attribute == "weight" and is_linear(layer)]
        inputs = {0 if is_transposed(layer) else 1 for layer in layers}
        if len(layers) == len(holders) and dims.keys() == inputs:
            ((dim, kept),) = dims.items()
            paths = tuple(each.rpartition(".")[0] for each in called[name])
            yield CutInputs(name, _bias(called, index_map, paths), paths, dim, kept)


def _bias(called: Mapping[str, list[str]], index_map: IndexMap, paths: Sequence[str]) -> str | None:
    """The bias that all the layers have and nothing else has, if no axis cuts it."""
    own = {f"{path}.bias" for path in paths}
    return next((name for name, names in called.items() if set(names) == own and name not in index_map), None)
