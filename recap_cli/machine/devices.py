"""Which device a stage runs on."""

import torch

from recap_cli.errors import RecipeError


def pick(name: str) -> torch.device:
    """Return the device that a recipe names. `auto` is the first accelerator, or else the CPU.

    Raises:
        RecipeError: This machine does not have the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for an unknown or missing device
        available = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise RecipeError(
            f"there is no device {name!r} on this machine",
            hint=f"use one of {', '.join(available)}: --set finetune.device=…, --set importance.device=…",
        ) from error
    return device
