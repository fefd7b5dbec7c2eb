"""Parameters that have several names: one tensor, by identity, that several modules hold (a table tied to an output layer).

A model's first name of a parameter, in the order of its modules, stands for all of them.
"""

from torch import nn


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
