"""What of a configuration shows that no model can be made of it, before memory is asked for."""

from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch
from torch import nn

from recap_cli.errors import ModelError
from recap_cli.model_limits import beyond

HINT = "correct it in model.config, or in the config.json of the model's folder"
WEIGHT_BYTES = 4  # the full model is float32


def check_limits(model_type: str, values: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a size that is beyond all models (`recap_cli.model_limits`), as one of a damaged file may be."""
    for key, found, limit in beyond(values):
        raise ModelError(f"{key} of this {model_type} is {found:,}; expected at most {limit:,}", hint=HINT)


def check_padding(config: Any) -> None:
    """Raise `ModelError` where the token that pads is none of the vocabulary's, which torch answers with an assertion."""
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ModelError(
            f"pad_token_id of this {config.model_type} is {pad}, and its vocabulary has the tokens 0 to {size - 1}", hint=HINT
        )


def check_fits(build: Callable[[], nn.Module], origin: str) -> None:
    """Raise `ModelError` if the model that `build` makes cannot be built, or has more weights than the machine has memory.

    It is built on the meta device for that, which takes no memory and no random numbers.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            count = sum(param.numel() for param in build().parameters())
    except (AssertionError, OverflowError, RuntimeError) as error:  # torch's own, of sizes that make no tensor
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{origin}: no model can be built of it: {first_line}", hint=HINT) from error
    have_bytes = psutil.virtual_memory().total + psutil.swap_memory().total
    if count * WEIGHT_BYTES > have_bytes:
        raise ModelError(
            f"{origin}: a model of {count:,} parameters, {count * WEIGHT_BYTES / 1e9:,.0f} GB in float32, and this machine has "
            f"{have_bytes / 1e9:,.1f} GB of main memory",
            hint=HINT,
        )
