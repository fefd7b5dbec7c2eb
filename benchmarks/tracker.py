"""The one place that touches torch's private memory tracker: bytes by category over one training step, fake tensors or
real ones."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

try:
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
except ImportError as error:  # a private module may go away
    raise SystemExit(f"torch {torch.__version__} has no memory tracker as this benchmark knows it: {error}") from error

CATEGORIES = {
    "activations": ("Activation",),
    "gradients": ("Gradient",),
    "optimizer": ("Optstate",),
    "weights": ("Parameter", "Buffer"),
    "temporary": ("Temp",),
}
Optimizers = optim.Optimizer | Iterable[Tensor]


class Tracker(MemTracker):  # type: ignore[misc]
    """`MemTracker` that accepts frozen parameters, and that keeps the maximum of each category besides the peak instant."""

    def __init__(self) -> None:
        super().__init__()
        self.maxima: dict[str, int] = {}

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        for param in module.parameters():  # a frozen parameter has no gradient to hook; stock MemTracker raises there
            if not param.requires_grad and param not in self._param_to_grad_hook_handles:
                self._param_to_grad_hook_handles[param] = (_NoHook(), _NoHook())
        found: tuple[int, int] = super()._track_module_params_and_buffers(module, install_grad_hooks)
        return found

    def _update_peak_stats(self, peak_state: Any) -> None:
        super()._update_peak_stats(peak_state)
        for name, held in _by_category(self._curr_mem_snap).items():
            self.maxima[name] = max(self.maxima.get(name, 0), held)

    def _update_and_maybe_create_winfos(self, t: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """A fused backward has freed the gradient before the tracker's own hook looks for it."""
        return set() if t is None else super()._update_and_maybe_create_winfos(t, *args, **kwargs)

    def track_moments(self, moments: Iterable[Tensor]) -> None:
        """Count tensors as optimizer state that no `torch.optim.Optimizer` holds."""
        for tensor in moments:
            self._update_and_maybe_create_winfos(tensor, _MemRefType.OPT)


class _NoHook:
    def remove(self) -> None:
        """There is nothing to remove."""


def step_bytes(model: nn.Module, x: Tensor, optimizer: Optimizers, step: Callable[[], None]) -> dict[str, Any]:
    """Bytes over one steady `step`: the maximum of each category, their sum, the peak instant, and what that was made of.

        `optimizer` is one of torch's, or the moments of another. The first call of `step` is not tracked: it makes the
    states."""
    step()
    tracker = Tracker()
    tracker.track_external(model, x)
    if isinstance(optimizer, optim.Optimizer):
        tracker.track_external(optimizer)
    else:
        tracker.track_moments(optimizer)
    with tracker:
        step()
    peak = _by_category(tracker.get_tracker_snapshot("peak"))
    named = {name: tracker.maxima.get(name, 0) for name in CATEGORIES if name != "temporary"}
    return {**named, "sum_of_maxima": sum(named.values()), "peak": sum(peak.values()), "at_the_peak": peak}


def fake() -> FakeTensorMode:
    """Tensors with shapes and no memory, on the cpu device."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def make_fake(mode: FakeTensorMode, model: nn.Module) -> None:
    """Swap the tensors of a model, in place, for fake ones; those that share memory still do."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            made = mode.from_tensor(param.detach())
            module.register_parameter(name, nn.Parameter(made, requires_grad=param.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, mode.from_tensor(buffer))


def _by_category(snapshot: Mapping[torch.device, Mapping[Any, int]]) -> dict[str, int]:
    held = {getattr(key, "value", key): count for devices in snapshot.values() for key, count in devices.items()}
    named = {name: sum(held.get(part, 0) for part in parts) for name, parts in CATEGORIES.items()}
    return {**named, "other": held.get("Total", 0) - sum(named.values())}
