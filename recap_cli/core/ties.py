"""Parameters that have several names: one tensor, by identity, that several modules hold (a table tied to an output layer).

The first of its names, in the order of the modules, stands for all of them: there is one gradient, one state, one step.
"""

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

Made = TypeVar("Made")


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(id(param), name), []).append(name)
    return found


def first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter, by every name that it has."""
    return {name: first for first, names in names_of(model).items() for name in names}


class Once:
    """Makes something of each parameter of a model, and of one that several modules hold once for all of them.

    Tensors that are tied are kept as long as this lives, so that their identity stands.
    """

    def __init__(self, model: nn.Module) -> None:
        held: dict[int, tuple[Tensor, list[tuple[nn.Module, str]]]] = {}
        for module in model.modules():
            for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    held.setdefault(id(tensor), (tensor, []))[1].append((module, attribute))
        self._tied = {key: found for key, found in held.items() if len(found[1]) > 1}
        self._made: dict[int, tuple[str, object]] = {}

    def holders(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that hold a tied tensor, each with the attribute; none for one that a single module holds."""
        return self._tied[id(tensor)][1] if id(tensor) in self._tied else []

    def make(self, tensor: Tensor, form: str, made: Callable[[], Made]) -> Made:
        """What `made` makes of the tensor, or has made of it before. Raises `TypeError` if that was of another form."""
        if id(tensor) not in self._tied:
            return made()
        if id(tensor) not in self._made:
            self._made[id(tensor)] = form, made()
        known, result = self._made[id(tensor)]
        if known != form:
            held = sorted({f"{type(module).__name__}.{attribute}" for module, attribute in self.holders(tensor)})
            raise TypeError(f"a parameter that is tied ({' and '.join(held)}) would be {known} in one and {form} in the other")
        return result  # type: ignore[return-value]
