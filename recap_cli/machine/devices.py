"""Which device a stage runs on."""

import torch

from recap_cli.errors import RecipeError


def pick(name: str) -> torch.device:
    """The device a recipe names; `auto` is the first accelerator there is, else the CPU.

    Raises `RecipeError` if the named device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that it does not have or know
        there = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise RecipeError(
            f"there is no device {name!r} on this machine",
            hint=f"use one of {', '.join(there)}: --set finetune.device=…, --set importance.device=…",
        ) from error
    return device
