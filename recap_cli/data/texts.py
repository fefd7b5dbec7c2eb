"""Texts as tensors: tokenized once, padded to the longest of a batch. A text may be split into words, each with a label."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recap_cli.core.ragged import Ragged
from recap_cli.core.task import IGNORED
from recap_cli.data.split import Split, chunks, targets_of
from recap_cli.errors import DataError, ModelError
from recap_cli.progress import Track, silent

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class TextInputs:
    """How text becomes tensors.

    Attributes:
        tokenizer: A tokenizer of transformers.
        max_length: The most tokens of an example.
        positions: How many tokens the model has positions for, if known. Tokenizers often lack this number.
        words: True for texts that are lists of words, each with a label.
    """

    tokenizer: Any
    max_length: int
    positions: int | None = None
    words: bool = False


class Tokens:
    """The tokens of all texts, without padding, in main memory as int32."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._pieces: dict[str, list[np.ndarray]] = {}

    def add(self, tokens: Any) -> None:
        """Add what a tokenizer has made of a list of texts."""
        self.lengths += map(len, tokens["input_ids"])
        for name, lists in tokens.items():
            self._pieces.setdefault(name, []).append(np.fromiter(chain.from_iterable(lists), dtype=np.int32))

    def split(self, tokenizer: Any, origin: str, targets: Tensor | Ragged) -> Split:
        """Return them as examples, whose batches the tokenizer pads."""
        flat = {name: np.concatenate(arrays) for name, arrays in self._pieces.items()}
        ends = np.cumsum(self.lengths).tolist()

        def fetch(indices: Tensor, _: Tensor | None) -> dict[str, Tensor]:
            places = [slice(ends[i] - self.lengths[i], ends[i]) for i in indices.tolist()]
            ragged = {name: [array[place].tolist() for place in places] for name, array in flat.items()}
            return dict(tokenizer.pad(ragged, padding=True, return_tensors="pt"))

        occurs = np.bincount(flat["input_ids"], minlength=1) > 0
        special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.int64)
        arrays = [array for _, array in sorted(flat.items())] + [np.array(self.lengths)]
        return Split(
            origin,
            targets,
            fetch,
            torch.from_numpy(occurs.nonzero()[0]),
            special,
            content=lambda: (array.data.cast("B") for array in arrays if array.size),
        )


def text_split(dataset: "Dataset", inputs: TextInputs, *, origin: str, track: Track = silent) -> Split:
    """Tokenize the columns `text` and, if there is one, `text_pair`. A batch is padded to its longest example.

    The batch has the outputs of the tokenizer (`input_ids`, `attention_mask`, …), each (batch, tokens), int64. A pair that is
    too long loses tokens from its longer text.

    Raises:
        ModelError: The tokenizer cannot pad, or `max_length` is more than its model takes.
    """
    _check_tokenizer(inputs)
    texts, found = dataset.select_columns([name for name in ("text", "text_pair") if name in dataset.column_names]), Tokens()
    for chunk in chunks(len(texts), track, f"tokenize {origin}"):
        columns = texts[chunk.start : chunk.stop].values()
        found.add(inputs.tokenizer(*columns, truncation=True, max_length=inputs.max_length))
    return found.split(inputs.tokenizer, origin, targets_of(dataset))


def words_split(dataset: "Dataset", inputs: TextInputs, *, origin: str, track: Track = silent) -> Split:
    """Tokenize the column `text`, a list of words for each example, whose labels stand in the column `label`.

    A batch is that of `text_split`. Its labels, (batch, tokens), have the label of a word at the first token of it. All other
    tokens have `IGNORED`.

    Raises:
        ModelError: As `text_split`; or the tokenizer does not say which word a token is from.
        DataError: An example has more words than labels, or fewer: the message names its row. Or no word makes a token.
    """
    _check_tokenizer(inputs)
    if not inputs.tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {inputs.tokenizer.name_or_path} does not say which word a token is from",
            hint="save a fast tokenizer (tokenizer.json) beside the model",
        )
    found, lost, words_found = Tokens(), 0, 0
    labels: list[list[int]] = []
    for chunk in chunks(len(dataset), track, f"tokenize {origin}"):
        examples = dataset[chunk.start : chunk.stop]
        for row, words, tags in zip(examples["row"], examples["text"], examples["label"], strict=True):
            if len(words) != len(tags):
                raise DataError(
                    f"row {row} of {origin} has {len(words)} words and {len(tags)} labels", hint="give each word one label"
                )
        tokens = inputs.tokenizer(examples["text"], is_split_into_words=True, truncation=True, max_length=inputs.max_length)
        found.add(tokens)
        of_chunk = [_at_first_tokens(tokens.word_ids(i), tags) for i, tags in enumerate(examples["label"])]
        words_found += (count := sum(map(len, examples["label"])))
        lost += count - sum(label != IGNORED for row in of_chunk for label in row)
        labels += of_chunk
    if len(dataset) and lost == words_found:
        raise DataError(
            f"no word of {origin} makes a token within data.max_length ({inputs.max_length} tokens)",
            hint="raise it, as in --set data.max_length=128",
        )
    made = found.split(inputs.tokenizer, origin, Ragged.of(labels, left=inputs.tokenizer.padding_side == "left"))
    note = f"{origin}: {lost:,} words are beyond data.max_length ({inputs.max_length} tokens), or make no token; none is scored"
    return replace(made, notes=(note,)) if lost else made


def _at_first_tokens(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """Return a label for each token: that of its word at the word's first token, else `IGNORED`."""
    before = [None, *word_ids[:-1]]  # the tokens of a word stand side by side
    return [IGNORED if word is None or word == last else labels[word] for word, last in zip(word_ids, before, strict=True)]


def _check_tokenizer(inputs: TextInputs) -> None:
    tokenizer = inputs.tokenizer
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of {name} has no padding token, so that texts of different lengths cannot make a batch",
            hint='give "pad_token" in the tokenizer_config.json beside the model',
        )
    if inputs.max_length > tokenizer.model_max_length:
        raise ModelError(
            f"data.max_length is {inputs.max_length}, but the model takes at most {tokenizer.model_max_length} tokens "
            f"by the tokenizer of {name}",
            hint=f"--set data.max_length={tokenizer.model_max_length}",
        )
    if inputs.positions is not None and inputs.max_length > inputs.positions:
        raise ModelError(
            f"data.max_length is {inputs.max_length}, but the model has positions for {inputs.positions} tokens",
            hint=f"--set data.max_length={inputs.positions}",
        )
