"""What a plain `pip install recap-cli` leaves out, by extra. A command that needs one says so before it computes anything.

And whether torch and torchvision, which pip may take from two indexes, go together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import MappingProxyType

from recap_cli.errors import MissingExtraError


@dataclass(frozen=True)
class Extra:
    """What an extra of pyproject.toml is for, and the modules that it brings."""

    purpose: str
    modules: tuple[str, ...]


EXTRAS: Mapping[str, Extra] = MappingProxyType(
    {
        "lora": Extra("finetune with LoRA: the methods lora-ft and recap-lora", ("peft",)),
        "plots": Extra("pictures of recap compare and recap profile-memory --plot", ("matplotlib",)),
        "report": Extra("pages for a browser: recap report", ("jinja2", "matplotlib")),
        "segmentation": Extra("the task semantic-segmentation: models that match their queries with objects", ("scipy",)),
        "tokens": Extra("metrics of the task token-classification", ("seqeval",)),
    }
)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def require(extra: str, *modules: str) -> None:
    """Do nothing if these modules of an extra are installed; it looks for them and imports none.

    Args:
        extra: a name of `EXTRAS`.
        modules: top-level modules that the command at hand needs; all of the extra if none is given.

    Raises:
        MissingExtraError: one is not installed. The message names it and its extra, the hint is the pip command.
    """
    if missing := [module for module in modules or EXTRAS[extra].modules if find_spec(module) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(
            f"{' and '.join(missing)} {verb} not installed: the extra {extra} ({EXTRAS[extra].purpose}) needs {_it(missing)}",
            hint=pip_command(extra),
        )


def is_installed(extra: str) -> bool:
    """Whether all modules of an extra are installed."""
    return all(find_spec(module) is not None for module in EXTRAS[extra].modules)


def pip_command(extra: str) -> str:
    """The command line that installs an extra, quoted for the shells that read brackets."""
    return f"pip install 'recap-cli[{extra}]'"


def torchvision_problem() -> tuple[str, str] | None:
    """Why torchvision cannot be imported, and the command that mends it; None where it can. The import takes seconds.

    transformers and timm import torchvision for every model. One built for CUDA does not go with a torch built for CPUs.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # each of them is what a mismatch has been seen to raise
        first = str(error).partition("\n")[0]
        torch = version("torch")
        index = f" --index-url {CPU_INDEX}" if torch.endswith("+cpu") else ""
        return (
            f"torchvision cannot be imported beside torch {torch}: {type(error).__name__}: {first}",
            f"install both from one index: pip install --force-reinstall torch torchvision{index}",
        )
    return None


def _it(modules: list[str]) -> str:
    return "it" if len(modules) == 1 else "them"
