"""Calls into third-party adapters, run so that every failure is an error of RECAP, and no weight is written to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from recap_cli.core.adapter import Adapter
from recap_cli.core.axes import Axis
from recap_cli.errors import ConformanceError, PluginError
from recap_cli.untrusted.code import guarded

HINT = "choose another model, or repair the adapter; see docs/plugins/adapter.md"


def guarding(adapter: Adapter, name: str) -> Adapter:
    """Return an adapter whose functions are guarded; one that is only a table is returned unchanged.

    The guarded functions raise `ConformanceError` if a lookup in `axes` fails: the adapter does not know the model. They raise
    `PluginError` for all other failures, and if a weight was written to.
    """
    if adapter.axes is None and adapter.resize is None:
        return adapter
    plain_axes, plain_resize = adapter.axes, adapter.resize
    who = f"the adapter {name!r}"

    def axes(model: nn.Module) -> list[Axis]:
        with guarded(f"{who} failed", HINT), _unwritten(model, who):
            try:
                return plain_axes(model)  # type: ignore[misc]
            except (LookupError, AttributeError, TypeError, ValueError) as error:
                raise ConformanceError(f"{who} does not describe this {type(model).__name__}: {error}", hint=HINT) from error

    def resize(model: nn.Module, sizes: dict[str, int]) -> None:
        with guarded(f"{who} failed", HINT), _unwritten(model, who):
            plain_resize(model, dict(sizes))  # type: ignore[misc]

    return replace(adapter, axes=plain_axes and axes, resize=plain_resize and resize)


@contextmanager
def _unwritten(model: nn.Module, who: str) -> Iterator[None]:
    """Raise `PluginError` if a parameter is written to inside.

    It does not see writes through `.data`, which would take a pass over all weights. A `resize` that writes so changes the
    logits, and the conformance check refuses that.
    """
    before = [(name, param, param._version) for name, param in model.named_parameters()]
    yield
    if written := [name for name, param, version in before if param._version != version]:
        raise PluginError(f"{who} has written to {written[0]}", hint=HINT)
