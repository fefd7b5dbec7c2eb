"""Which rows of a text model's token table its data look up: what `finetune` holds of it, and what of it is trainable."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recap_cli.core.method import RoundPlan
from recap_cli.core.surgery import IndexMap
from recap_cli.trainable.embedding import is_plain


class Texts(Protocol):
    """Examples of which it is known what tokens occur in them; of images both are None."""

    @property
    def tokens(self) -> Tensor | None:
        """The ids that occur, sorted, int64."""

    @property
    def special(self) -> Tensor | None:
        """The ids that the tokenizer may add, such as padding, sorted, int64."""


@dataclass(frozen=True)
class TokenRows:
    """The rows of one table: those that training or validation examples may look up, and the trainable ones.

    Attributes:
        table: the parameter's name.
        size: how many rows there are.
        held: the ids that may be looked up, sorted, int64.
        trained: the trainable ids, sorted, int64.
    """

    table: str
    size: int
    held: Tensor
    trained: Tensor

    def used_rows(self) -> dict[str, Tensor]:
        """As `make_partial` takes it."""
        return {self.table: self.held}

    def along(self) -> dict[str, int]:
        """The dimension along which the rows of the table are chosen."""
        return {self.table: 0}

    def index_map(self, round_plan: RoundPlan) -> IndexMap:
        """The trainable rows of a round, where these are neither all of them nor none."""
        return {self.table: {0: self.trained}} if round_plan.trains == "mask" and round_plan.embeddings == "tokens" else {}

    def to_tensors(self) -> dict[str, Tensor]:
        """As a state stores it."""
        rows = {"held": self.held, "trained": self.trained}
        return {f"{self.table}/{name}": ids.to(torch.int32) for name, ids in rows.items()} | {"size": torch.tensor([self.size])}

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor]) -> "TokenRows":
        ids = {key.rpartition("/")[2]: tensor.long() for key, tensor in found.items()}
        table = next(key.rpartition("/")[0] for key in found if "/" in key)
        return cls(table, int(ids["size"]), ids["held"], ids["trained"])


def used_token_rows(model: nn.Module, train: Texts, validation: Texts) -> TokenRows | None:
    """The rows that these examples look up; None where there is no table of tokens that does that and nothing else.

    A row for padding has no gradient (`nn.Embedding`), and is always frozen.
    """
    table = _table(model)
    if table is None or train.tokens is None or validation.tokens is None or train.special is None:
        return None
    name, module = table
    held = torch.unique(torch.cat([train.tokens, validation.tokens, train.special]))  # (held,)
    return TokenRows(name, module.num_embeddings, held, _without(module.padding_idx, train.tokens))


def all_token_rows(model: nn.Module) -> TokenRows | None:
    """All rows, as if the data used every token; None where `used_token_rows` has none."""
    table = _table(model)
    if table is None:
        return None
    name, module = table
    rows = torch.arange(module.num_embeddings)
    return TokenRows(name, len(rows), rows, _without(module.padding_idx, rows))


def _without(padding: int | None, rows: Tensor) -> Tensor:
    """The rows, (rows,), without that of padding."""
    return rows if padding is None else rows[rows != padding]


def _table(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """The table of tokens and the name of its weight, if the model looks it up by ids alone and uses it nowhere else."""
    find: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)  # of transformers; timm has none
    try:
        module = None if find is None else find()
    except NotImplementedError:  # how transformers says that it does not know a model's table
        return None
    if not isinstance(module, nn.Embedding) or not is_plain(module):
        return None
    names = [name for name, param in model.named_parameters(remove_duplicate=False) if param is module.weight]
    return (names[0], module) if len(names) == 1 else None
