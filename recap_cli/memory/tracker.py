"""Bytes by kind over one training step: every storage from its birth to its death, on fake tensors or on real ones.

A dispatch mode sees each operation below autograd. A storage that it has not met counts from there on, under the kind that
the moment of its birth says, until its last tensor is gone. That is what torch's (private) `MemTracker` does; this one also
takes frozen parameters, a fused backward and any optimizer, and keeps apart the peak instant and each kind's own maximum.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Kind = Literal["weights", "gradients", "optimizer", "activations", "temporary", "other"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "activations", "temporary", "other")
ASKED = torch.ops.aten._local_scalar_dense.default  # by a program that asks a tensor for its value
PLACES = torch.ops.aten.nonzero.default  # of what is true; how many there are hangs on the values
GRANULE_BYTES = 512  # the CUDA allocator hands out multiples


def one(dtype: torch.dtype) -> bool | int | float:
    """What a fake tensor of this type has for a value: every number is 1, and what is asked for being true is."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def everywhere(condition: Tensor) -> Tensor:
    """Where a fake tensor is true, which is everywhere: (entries, dimensions), int64."""
    return condition.new_empty((condition.numel(), condition.dim()), dtype=torch.int64)


@dataclass(frozen=True)
class Usage:
    """Bytes of one step: what was held `at_peak`, the instant of the most; each kind's own `maxima`, whenever they were.

    `by_module` is what was held at the peak by the path of the module that made it ("" outside of all), then by kind.
    """

    at_peak: dict[Kind, int]
    maxima: dict[Kind, int]
    by_module: dict[str, dict[Kind, int]] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most that was held at one instant."""
        return sum(self.at_peak.values())

    @property
    def sum_of_maxima_bytes(self) -> int:
        """The sum of the maxima of weights, gradients, optimizer state and activations: how the paper counts."""
        return sum(self.maxima.get(kind, 0) for kind in ("weights", "gradients", "optimizer", "activations"))


@dataclass(frozen=True)
class _Held:
    count_bytes: int
    kind: Kind
    module: str
    alive: "weakref.ref[Any]"


class Tracker(TorchDispatchMode):
    """Counts the bytes of every storage that is made while it is on, and of those that `know` names before.

    What is made in a module's forward, or outside of modules with gradients on (a loss), is an activation; what is made in a
    backward or an optimizer step is temporary, until it turns out to be the gradient of a leaf that `watch` was given.
    What lies on another `device` is not counted, nor are tensors that it was told to `ignore` and what an `unseen` function
    makes: among fake tensors, which are all on the CPU, they stand for what is in main memory.
    """

    def __init__(self, model: nn.Module | None = None, device: torch.device | None = None) -> None:
        """`answers` is False until somebody sets it: then a program that asks for the value of a tensor is answered here."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._paths = {module: path for path, module in model.named_modules()} if model is not None else {}
        self._held: dict[int, _Held] = {}
        self._host: dict[int, weakref.ref[Any]] = {}
        self._now: Counter[Kind] = Counter()
        self._maxima: Counter[Kind] = Counter()
        self._peak_bytes, self._is_peak = 0, False
        self._at_peak: list[_Held] = []
        self._inside: list[str] = []
        self._device, self._is_looking = device, True
        self.answers = False

    def know(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], kind: Kind) -> None:
        """Count these tensors, named by the parameter they belong to, as `kind` from now on."""
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            self._add(tensor, kind, name.rpartition(".")[0])

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Never count these: they lie on the host."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._host[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata))

    def unseen(self, function: Callable[..., None]) -> Callable[..., None]:
        """The same function, of which nothing that it makes is counted."""

        def call(*args: Any) -> None:
            self._is_looking = False
            try:
                function(*args)
            finally:
                self._is_looking = True

        return call

    @contextmanager
    def watch(self, leaves: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Call what autograd accumulates in these leaves a gradient, and note which module's forward runs."""
        with ExitStack() as stack:
            for name, leaf in leaves:
                handle = leaf.register_post_accumulate_grad_hook(self._gradient_of(name))  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            stack.callback(modules.register_module_forward_pre_hook(self._enter).remove)
            stack.callback(modules.register_module_forward_hook(self._leave, always_call=True).remove)
            with self:
                yield

    def usage(self) -> Usage:
        """What was found so far."""
        self._note_peak()
        at_peak: Counter[Kind] = Counter()
        by_module: dict[str, Counter[Kind]] = {}
        for held in self._at_peak:
            at_peak[held.kind] += held.count_bytes
            by_module.setdefault(held.module, Counter())[held.kind] += held.count_bytes
        return Usage(
            {kind: at_peak[kind] for kind in KINDS},
            {kind: self._maxima[kind] for kind in KINDS},
            {path: dict(kinds) for path, kinds in by_module.items()},
        )

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False spares each operation a wrapper of torch's, against compiling, which nothing does here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.answers and func is ASKED:
            return one(args[0].dtype)
        out = everywhere(*args) if self.answers and func is PLACES else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor, self._kind(), self._inside[-1] if self._inside else "")
        return out

    def _kind(self) -> Kind:
        forward = self._inside or (torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1)
        return "activations" if forward else "temporary"

    def _add(self, tensor: Tensor, kind: Kind, module: str) -> None:
        if not self._is_looking or (self._device is not None and tensor.device.type != self._device.type):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._host:
            return
        size = -(-storage.nbytes() // GRANULE_BYTES) * GRANULE_BYTES
        if size:
            held = _Held(size, kind, module, weakref.ref(storage, lambda _: self._remove(key)))
            self._count(key, held)

    def _count(self, key: int, held: _Held) -> None:
        self._held[key] = held
        self._now[held.kind] += held.count_bytes
        self._maxima[held.kind] = max(self._maxima[held.kind], self._now[held.kind])
        total = self._now.total()
        if total > self._peak_bytes:
            self._peak_bytes, self._is_peak = total, True

    def _remove(self, key: int) -> None:
        self._note_peak()
        held = self._held.pop(key)
        self._now[held.kind] -= held.count_bytes

    def _forget(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._host.pop(key, None)

        return forget

    def _note_peak(self) -> None:
        """Keep what is held now, if it is the most so far: asked before anything goes, so once a rise and not once a birth."""
        if self._is_peak:
            self._at_peak, self._is_peak = list(self._held.values()), False

    def _gradient_of(self, name: str) -> Callable[[Tensor], None]:
        module = name.rpartition(".")[0]

        def relabel(leaf: Tensor) -> None:
            if leaf.grad is None:
                return
            key = leaf.grad.untyped_storage()._cdata
            held = self._held.get(key)
            if held is not None and held.kind != "gradients":
                self._note_peak()
                self._now[held.kind] -= held.count_bytes
                self._count(key, _Held(held.count_bytes, "gradients", module, held.alive))

        return relabel

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._inside.append(self._paths.get(module, self._inside[-1] if self._inside else ""))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._inside.pop()
