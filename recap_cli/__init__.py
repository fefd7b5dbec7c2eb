"""RECAP: finetune large transformers on hardware that cannot hold them; prune, mask, finetune, merge, round by round."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__all__ = ["__version__", "load"]

__version__: str


def load(folder: "str | Path") -> "nn.Module":
    """The model that `recap export` wrote into `folder`, in eval mode, with the ordinary forward of its library.

    Raises:
        ModelError: The folder holds no such model, or its files do not fit together.
    """
    from recap_cli.models.export import load as load_product

    return load_product(folder)


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("recap-cli")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
