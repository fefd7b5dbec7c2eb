"""Checks of a configuration before memory is allocated: values that no model can have, and what fits into no machine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recap_cli.errors import ModelError
from recap_cli.untrusted.model_limits import beyond

if TYPE_CHECKING:
    from torch import nn

NEW_HEAD = 100_000_000  # the most weights of a new head; they are made in a second
HINT = "correct it in model.config, or in the config.json of the model's folder"


def check_limits(model_type: str, values: Mapping[str, Any]) -> None:
    """Check sizes against the limits of all models (`untrusted.model_limits`), as a damaged file may exceed them.

    Raises:
        ModelError: A size is larger.
    """
    for key, found, limit in beyond(values):
        raise ModelError(f"{key} of this {model_type} is {found:,}; expected at most {limit:,}", hint=HINT)


def check_padding(config: Any) -> None:
    """Check that the padding token is in the vocabulary: torch would fail with an assertion.

    Raises:
        ModelError: It is not.
    """
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ModelError(
            f"pad_token_id of this {config.model_type} is {pad}, and its vocabulary has the tokens 0 to {size - 1}", hint=HINT
        )


def check_widths(config: Any) -> None:
    """Check that a OneFormer has one width, and a layer behind its first prediction.

    transformers keeps layers between features of two widths where neither a checkpoint nor an optimizer finds them.

    Raises:
        ModelError: It has several.
    """
    if not hasattr(config, "enforce_input_proj"):
        return
    widths = {key: getattr(config, key) for key in ("conv_dim", "mask_dim", "hidden_dim")}
    if len(set(widths.values())) > 1:
        said = ", ".join(f"{key} is {width}" for key, width in widths.items())
        raise ModelError(f"a {config.model_type} has one width, but {said}", hint=HINT)
    if config.enforce_input_proj:
        raise ModelError(
            f"enforce_input_proj of this {config.model_type} is true: transformers saves no weights of these layers", hint=HINT
        )
    if config.decoder_layers < 2:
        raise ModelError(
            f"decoder_layers of this {config.model_type} is {config.decoder_layers}; expected 2 or more", hint=HINT
        )


def check_fit(kind: str, on_meta: "nn.Module", held: int | None = None) -> None:
    """Check that a model fits into this machine and has the size of its checkpoint.

    Args:
        kind: The name of its type, for messages.
        on_meta: The model on the meta device.
        held: How many numbers its checkpoint has, if there is one.

    Raises:
        ModelError: Its float32 weights need more memory than this machine has, or are far more than those of its checkpoint.
    """
    import psutil

    wanted = sum(param.numel() for param in on_meta.parameters())
    machine_bytes = psutil.virtual_memory().total + psutil.swap_memory().total
    if 4 * wanted > machine_bytes:
        raise ModelError(
            f"a {kind} of this configuration has {4 * wanted / 1e9:,.1f} GB of weights, but this machine has "
            f"{machine_bytes / 1e9:,.1f} GB of memory",
            hint=HINT,
        )
    if held is not None and wanted > 2 * held + NEW_HEAD:
        raise ModelError(f"a {kind} of this configuration has {wanted:,} weights, but its files hold {held:,}", hint=HINT)
