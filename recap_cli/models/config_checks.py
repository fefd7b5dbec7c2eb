"""Checks of a configuration before memory is allocated: values that no model can have."""

from collections.abc import Mapping
from typing import Any

from recap_cli.errors import ModelError
from recap_cli.untrusted.model_limits import beyond

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
