"""Which rows of a text model's token table its data look up: what `finetune` holds of the table, and what of it may move."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recap_cli.core.method import RoundPlan
from recap_cli.core.surgery import IndexMap
from recap_cli.data.splits import Split
from recap_cli.trainable.embedding import is_plain


@dataclass(frozen=True)
class TokenRows:
    """The rows of one table: those that training or validation examples may look up, and those that may move.

    `table` is the parameter's name; `held` and `moving` are sorted ids, int64; `size` is how many rows there are.
    """

    table: str
    size: int
    held: Tensor
    trained: Tensor

    def used_rows(self) -> dict[str, Tensor]:
        """As `make_partial` takes it."""
        return {self.table: self.held}

    def along(self) -> dict[str, int]:
        """The dimension of the table that moves in part."""
        return {self.table: 0}

    def index_map(self, round_plan: RoundPlan) -> IndexMap:
        """The rows that a round lets move, where that is neither all of them nor none."""
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


def of(model: nn.Module, train: Split, validation: Split) -> TokenRows | None:
    """The rows that these examples look up; None where there is no table of tokens that does that and nothing else.

    A row for padding has no gradient (`nn.Embedding`), and never moves.
    """
    table = _table(model)
    if table is None or train.tokens is None or validation.tokens is None or train.special is None:
        return None
    name, module = table
    held = torch.unique(torch.cat([train.tokens, validation.tokens, train.special]))
    return TokenRows(name, module.num_embeddings, held, _but(module.padding_idx, train.tokens))


def everything(model: nn.Module) -> TokenRows | None:
    """All rows, as if the data used every token; None where `of` has none."""
    table = _table(model)
    if table is None:
        return None
    name, module = table
    rows = torch.arange(module.num_embeddings)
    return TokenRows(name, len(rows), rows, _but(module.padding_idx, rows))


def _but(padding: int | None, rows: Tensor) -> Tensor:
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
