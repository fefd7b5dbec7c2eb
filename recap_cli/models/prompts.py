"""The task in words, for a model that reads them beside an image: OneFormer takes the ids of their tokens (Jain et al., 2023).

The ids are the same in every forward of a run, so a model's spec holds them: what is evaluated, exported and opened has those
that it was trained with. They come from the tokenizer of the checkpoint. Random weights know no words: their ids are made up.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from recap_cli.errors import ModelError
from recap_cli.models.transformers_models import ForTask, model_inputs, read_tokenizer

INPUT = "task_inputs"  # what the forward calls the ids, (images, task_seq_len)
WHOLE = "tokenizer.json"
PARTS = ("vocab.json", "merges.txt")  # of a CLIP tokenizer; with one of them alone transformers reads other ids
NO_PROMPT = "choose another model; or give the task a prompt, see docs/plugins/task.md"


class Told(NamedTuple):
    """How a model is told its task.

    Attributes:
        forward: Arguments of every forward: a row of ids, padded with zeros. Empty if it is not told.
        tokenizer: What gave the ids; None if they are made up, or if there are none.
        notes: What a user should know of it.
    """

    forward: dict[str, Any]
    tokenizer: Any
    notes: tuple[str, ...]


def told(config: Any, wanted: ForTask, prompt: str | None, folder: Path | None) -> Told:
    """Return how the model of a configuration is told its task.

    Args:
        config: The configuration.
        wanted: Which class builds the model.
        prompt: The task in words.
        folder: The folder of its tokenizer; None makes up ids.

    Raises:
        ModelError: The model reads words, and the task has none; or the folder has no tokenizer that can be read.
    """
    if INPUT not in model_inputs(config, wanted):
        return Told({}, None, ())
    if prompt is None:
        raise ModelError(f"a {config.model_type} reads its task in words, and {wanted.task_kind} has none", hint=NO_PROMPT)
    if folder is None:
        ids, note = made_up(prompt, config.task_seq_len)
        return Told({INPUT: ids}, None, (note,))
    check_tokenizer(folder, config.model_type)
    tokenizer = read_tokenizer(folder, config.text_encoder_vocab_size)
    ids = ids_of(tokenizer, prompt, config.task_seq_len)
    return Told({INPUT: ids}, tokenizer, (f'the model is told "{prompt}", as its tokenizer writes it',))


def ids_of(tokenizer: Any, prompt: str, length: int) -> list[int]:
    """Return the ids of a prompt, cut or padded with zeros to `length`, as transformers' OneFormerProcessor makes them."""
    ids = list(tokenizer(prompt, truncation=True, max_length=length)["input_ids"])
    return [*ids, *[0] * (length - len(ids))]


def made_up(prompt: str, length: int) -> tuple[list[int], str]:
    """Return ids for a model whose weights know no words, one for each word of a prompt, and a note that says so."""
    ids = list(range(1, len(prompt.split()) + 1))[:length]
    note = f'no tokenizer: the words of "{prompt}" are numbered from 1 (model.config.tokenizer=DIR names one)'
    return [*ids, *[0] * (length - len(ids))], note


def check_tokenizer(folder: Path, model_type: str) -> None:
    """Check that a folder has the files of a tokenizer.

    Raises:
        ModelError: It has not; the message names the files.
    """
    if (folder / WHOLE).is_file() or all((folder / name).is_file() for name in PARTS):
        return
    lacking = " and no ".join(name for name in PARTS if not (folder / name).is_file())
    raise ModelError(
        f"{folder} has no {WHOLE}, and no {lacking}: a {model_type} reads its task in words",
        hint="copy the files of the checkpoint's tokenizer into that folder",
    )


def kept_tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the tokenizer that is kept with a model; None if its ids were made up.

    Raises:
        ModelError: It cannot be read.
    """
    if not any((folder / name).is_file() for name in (WHOLE, *PARTS)):
        return None
    return read_tokenizer(folder, config["text_encoder_vocab_size"])


def processor_json(forward: Mapping[str, Any]) -> str:
    """Return a processor_config.json by which transformers' processor makes as many ids as the model takes."""
    values = {"processor_class": "OneFormerProcessor", "task_seq_length": len(forward[INPUT])}
    return json.dumps(values, indent=2) + "\n"
