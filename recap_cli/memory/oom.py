"""A device whose memory ran out while finetuning: what held it, as an error that names the settings that need less.

Who catches the lack first measures (`OOMReport.measure`), while the traceback still holds what was held. Then it leaves the
`except` block, so that all of it goes. Only then it asks for the error, whose figures of savings need time and memory.
"""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from recap_cli.core.method import RoundPlan
from recap_cli.errors import DeviceMemoryError, lacks_device_memory
from recap_cli.machine import accounting, nvml
from recap_cli.memory import budget
from recap_cli.memory.teacher_budget import teacher_savings
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.plans import teaches
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.settings import EXECUTION
from recap_cli.state.manifest import quoted
from recap_cli.trainable.optim import Optimizer

WORDS = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer state",
    accounting.REST: "activations and temporary",
}
MOVING, TRAINING, EVALUATING = "moving the model there", "training", "evaluating"


@dataclass
class OOMReport:
    """What a finetuning has put on its device by now, and what it is doing. `seen` are the figures of the moment it failed."""

    device: torch.device
    doing: str = MOVING
    model: nn.Module | None = None
    optimizer: Optimizer | None = None
    seen: dict[str, Any] = field(default_factory=dict)

    def measure(self, error: Exception) -> None:
        """Note what is held now and what was asked for, and let go of model and optimizer. Raises nothing."""
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        self.seen = {
            "asked": asked[1] if asked else None,
            "held": accounting.held_now(self.device, self.model, self.optimizer),
            **_device(self.device),
        }
        self.model = self.optimizer = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, an error of the device's memory is measured where it happens, before a model leaves the device."""
        try:
            yield
        except Exception as error:
            if lacks_device_memory(error):
                self.measure(error)
            raise


def explained(context: Context, round: int, report: OOMReport) -> DeviceMemoryError:
    """The error to raise, with all that the device held given back before the message is made."""
    gc.collect()  # modules with hooks are cycles
    if report.device.type == "cuda":
        with suppress(RuntimeError):  # a device in trouble: the message is worth more
            torch.cuda.empty_cache()
    return DeviceMemoryError(_message(round, report), hint=_hint(context, report))


def _device(device: torch.device) -> dict[str, Any]:
    """Name, bytes and holders of the device. A device in trouble may refuse to say: then less is known."""
    seen: dict[str, Any] = {}
    try:
        if device.type == "cuda":
            seen["allocated_bytes"] = torch.cuda.memory_allocated(device)
            seen |= accounting.name_and_total(device)
            free, total = torch.cuda.mem_get_info(device)
            seen["not_ours_bytes"] = total - free - torch.cuda.memory_reserved(device)
        if device.type == "mps":
            seen["allocated_bytes"] = torch.mps.current_allocated_memory()
            seen["total_bytes"] = torch.mps.recommended_max_memory()
    except RuntimeError:
        pass  # the message says what is known
    if device.type == "cuda":
        seen["others_bytes"] = nvml.processes(device).others_bytes
    return seen


def _message(round: int, report: OOMReport) -> str:
    seen = report.seen
    facts = [seen["name"]] if "name" in seen else []
    facts += [f"{_mb(seen['total_bytes'])} in all"] if "total_bytes" in seen else []
    where = f"{report.device} ({', '.join(facts)})" if facts else str(report.device)
    asked = f", where {seen['asked']} more were asked for" if seen["asked"] else ""
    parts = [
        f"{where}: out of memory in `finetune` of round {round}, while {report.doing}{asked}",
        f"this run held {_held(seen)}",
        *_others(seen),
    ]
    return "; ".join(parts)


def _held(seen: dict[str, Any]) -> str:
    held, allocated = dict(seen["held"]), seen.get("allocated_bytes")
    if allocated is not None:
        held[accounting.REST] = max(0, allocated - sum(held.values()))
    kinds = ", ".join(f"{WORDS[kind]} {_mb(count)}" for kind, count in held.items())
    return f"{_mb(sum(held.values()))}: {kinds}" if allocated is not None else kinds


def _others(seen: dict[str, Any]) -> list[str]:
    if seen.get("others_bytes") is not None:
        return [f"other processes held {_mb(seen['others_bytes'])}"]
    if "not_ours_bytes" in seen:
        return [f"{_mb(seen['not_ours_bytes'])} were held outside this run's allocator: by other processes, and by CUDA itself"]
    return []


def _hint(context: Context, report: OOMReport) -> str:
    saved = {} if report.doing == EVALUATING else dict(_savings(context))
    known = {setting: f"{setting} (about {_mb(count)} less)" for setting, count in saved.items() if count > 0}
    choices = known or {setting: setting for setting in _lighter(context.recipe, report.doing)}
    in_this_state = [setting for setting in choices if setting.partition("=")[0] in EXECUTION]
    in_a_new_state = [setting for setting in choices if setting not in in_this_state]
    path = quoted(context.state.path)
    parts = ["the state is as it was"]
    if in_this_state:
        listed = ", ".join(choices[setting] for setting in in_this_state)
        parts.append(f"go on in it with less, by {listed}: recap run --state {path} --set {in_this_state[0]}")
    if in_a_new_state:
        parts.append(f"in a new state, {', '.join(choices[setting] for setting in in_a_new_state)}")
    if report.seen.get("others_bytes"):
        parts.append("or stop the other processes on the device and run the same command again")
    if not in_this_state and not in_a_new_state:
        parts.append(f"on the CPU there may be more: recap run --state {path} --set finetune.device=cpu")
    return "; ".join(parts)


def _savings(context: Context) -> list[tuple[str, int]]:
    """Settings that would need less, each with the bytes it is predicted to save."""
    try:
        return teacher_savings(context) if teaches(_round_plan(context)) else budget.savings(context)
    except Exception:  # noqa: BLE001  (a prediction that fails must not take the place of the error that it explains)
        return []


def _lighter(recipe: Recipe, doing: str) -> list[str]:
    """Settings that need less than the recipe's, in the order of `budget.LADDER`; without figures."""
    if doing == EVALUATING:
        size = recipe.evaluate.batch_size
        return [f"evaluate.batch_size={size // 2}"] if size > 1 else []
    return [f"{key}={budget.value_text(value)}" for key, value in budget.single_changes(recipe)]


def _round_plan(context: Context) -> RoundPlan:
    return context.round_plans[context.state.manifest.round - 1]


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
