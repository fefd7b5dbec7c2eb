"""The types of a recipe's values: numbers with their limits, names that can name a folder, devices, amounts of memory."""

import math
import re
import unicodedata
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def as_number(value: object) -> object:
    """Return `value` with texts such as `1e-4` as numbers: they are in YAML 1.2, but not in PyYAML, which has YAML 1.1."""
    if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) and math.isfinite(number := float(value)):
        return number
    if isinstance(value, dict):
        return {key: as_number(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_number(item) for item in value]
    return value


def _whole(value: object) -> object:
    """Return `value` with texts such as `1e3` as whole numbers; `1.5e0` stays as it is."""
    number = as_number(value) if isinstance(value, str) else value
    return int(number) if isinstance(value, str) and isinstance(number, float) and number.is_integer() else value


def _one_of(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    """Let a union of types fail once, at its key, and not once for each type."""
    try:
        return handler(value)
    except ValidationError as error:
        raise PydanticCustomError("one_of", "none of the types fits") from error


def _false(value: object) -> object:
    """Return False. Raises `PydanticCustomError` for any other value, also for 0, which is equal to it."""
    if value is not False:
        raise PydanticCustomError("not_false", "not false")
    return value


def _tuple(value: object) -> object:
    """Return a list of YAML as a tuple, which is frozen."""
    return tuple(value) if isinstance(value, list) else value


def _path_part(name: str) -> str:
    """Return a name that can name one folder. Raises `PydanticCustomError` for any other."""
    odd = {"Cc", "Cs", "Zl", "Zp"}  # control characters, surrogates, line separators
    if (
        name in (".", "..")
        or name != name.strip()
        or name.startswith(("-", "~"))
        or any(letter in "/\\" or unicodedata.category(letter) in odd for letter in name)
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise PydanticCustomError("path_part", "not the name of one folder")
    return name


_LONGEST_NAME = 200  # bytes: file names of 255 bytes have room for a prefix and a suffix
_NAME_WORDS = (
    "text that can name a folder: no / or \\, no control characters, not . or .., neither - nor ~ at the front, no blanks at "
    f"either end, at most {_LONGEST_NAME} bytes"
)
# Strict: `true` is no number, "3" no integer and 2.0 no count. The upper limits are far above useful values: a larger value is
# a mistake, or a recipe that is meant to hang the machine.
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Name = Annotated[str, Field(strict=True, min_length=1, json_schema_extra={"$comment": _NAME_WORDS}), AfterValidator(_path_part)]
Threads = Annotated[int, Field(strict=True, ge=0, le=1024), BeforeValidator(_whole)]
WarmUp = Annotated[int, Field(strict=True, ge=0, le=10**5), BeforeValidator(_whole)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1), BeforeValidator(_whole)]  # numpy's range
Count = Annotated[int, Field(strict=True, ge=1, le=10**9), BeforeValidator(_whole)]
Rounds = Annotated[int, Field(strict=True, ge=1, le=5000), BeforeValidator(_whole)]
PruneSteps = Annotated[int, Field(strict=True, ge=1, le=1000), BeforeValidator(_whole)]
Million = Annotated[int, Field(strict=True, ge=1, le=10**6), BeforeValidator(_whole)]
Pixels = Annotated[int, Field(strict=True, ge=1, le=2**13), BeforeValidator(_whole)]
Epochs = Annotated[float, Field(strict=True, gt=0, le=10**5, allow_inf_nan=False), BeforeValidator(as_number)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1), BeforeValidator(as_number)]  # a share of 1 would leave nothing
PartialShare = Annotated[float, Field(strict=True, gt=0, lt=1), BeforeValidator(as_number)]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1), BeforeValidator(as_number)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), BeforeValidator(as_number)]
AutoPositive = Annotated[Positive | Literal["auto"], WrapValidator(_one_of)]
AutoPositiveOrFalse = Annotated[
    Positive | Literal["auto"] | Annotated[Literal[False], BeforeValidator(_false)], WrapValidator(_one_of)
]
TextOrTexts = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=2, max_length=10**4)], BeforeValidator(_tuple), WrapValidator(_one_of)
]
Value = Annotated[int, Field(strict=True, ge=0, le=2**16 - 1), BeforeValidator(_whole)]  # of a pixel of a label map
OneOrMore = Annotated[
    Value | Annotated[tuple[Value, ...], Field(min_length=1, max_length=2**16)], BeforeValidator(_tuple), WrapValidator(_one_of)
]
Classes = Annotated[
    Text
    | Annotated[list[JsonValue], Field(min_length=2, max_length=10**4)]
    | Annotated[dict[str, JsonValue], Field(min_length=2, max_length=10**4)],
    WrapValidator(_one_of),
]
FlagOrAttention = Annotated[Flag | Literal["attention"], WrapValidator(_one_of)]
FlagOrTokens = Annotated[Flag | Literal["tokens"], WrapValidator(_one_of)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), BeforeValidator(as_number)]
Device = Annotated[
    str,
    Field(strict=True, pattern=r"^(auto|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?)$", examples=["auto", "cpu", "mps", "cuda", "cuda:1"]),
]
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_AMOUNT = r"^([0-9]{1,12}(?:\.[0-9]{1,12})?) ?([KMGT]i?|)B$"
Bytes = Annotated[str, Field(strict=True, pattern=_AMOUNT, examples=["2GiB", "1500MB", "0.5GB"])]
Scope = Literal["per-kind", "global", "per-layer"]
RankBy = Literal["sum", "parameter", "layer", "size"]


def bytes_of(text: str) -> int:
    """Return the bytes of an amount such as `2GiB`, `1500 MB` or `0.5GB`. Raises `ValueError` for any other text."""
    if (match := re.fullmatch(_AMOUNT, text)) is None:
        raise ValueError(f"expected an amount of memory, as in 2GiB or 1500MB; found {text!r}")
    return int(float(match[1]) * UNITS[match[2]])
