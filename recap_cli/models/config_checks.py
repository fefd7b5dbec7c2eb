"""What of a configuration shows that no model can be made of it, before memory is asked for."""

from collections.abc import Mapping
from typing import Any

from recap_cli.errors import ModelError
from recap_cli.untrusted.model_limits import beyond

HINT = "correct it in model.config, or in the config.json of the model's folder"


def check_limits(model_type: str, values: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a size that is beyond all models (`untrusted.model_limits`), as one of a damaged file may be."""
    for key, found, limit in beyond(values):
        raise ModelError(f"{key} of this {model_type} is {found:,}; expected at most {limit:,}", hint=HINT)


def check_padding(config: Any) -> None:
    """Raise `ModelError` where the token that pads is none of the vocabulary's, which torch answers with an assertion."""
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
        raise ModelError(
            f"pad_token_id of this {config.model_type} is {pad}, and its vocabulary has the tokens 0 to {size - 1}", hint=HINT
        )
