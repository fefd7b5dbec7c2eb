"""Made examples of every task that is no classification: a few files, and a recipe of two rounds for a pico model on them.

What is to be learned stands in the words: the words `w0`, `w1` and `w2` of a text are its labels, its number, and its names.
"""

import csv
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from recap_cli.recipe.recipe import Recipe
from tests.tiny import tiny

KINDS = ("text-regression", "text-multi-label", "image-multi-label", "token-classification")
TRAIN, VALIDATION = 40, 18
CLASSES = ("ant", "bee", "cow")
TAGS = ("O", "B-ant", "I-ant", "B-bee")  # of any other word, and of w0, w1 and w2
COLUMNS = {
    "text-regression": {"text": "text", "label": "score"},
    "text-multi-label": {"text": "text", "label": "kinds"},
    "image-multi-label": {"image": "image", "label": "kinds"},
    "token-classification": {"text": "words", "label": "tags"},
}


def write_pieces(folder: Path, *, side: str = "right") -> Path:
    """Write a WordPiece tokenizer that splits `w12` into `w`, `##1` and `##2`, padding on one side; return its folder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, "w", *(f"##{digit}" for digit in range(10)), *(f"w{digit}" for digit in range(3))]
    words = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=words, padding_side=side, **names).save_pretrained(folder)
    return folder


def rows(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of a task; images are arrays, uint8, (16, 16, 3)."""
    random = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        marks = [int(mark) for mark in range(3) if random.random() < 0.4]
        words = [f"w{number}" for number in random.permutation([*marks, *random.integers(3, 59, random.integers(3, 7))])]
        kinds = [CLASSES[mark] for mark in marks]
        if kind == "token-classification":
            tags = [TAGS[1 + int(word[1:])] if int(word[1:]) < 3 else "O" for word in words]
            made.append({"words": words, "tags": tags})
        elif kind == "image-multi-label":
            pixels = random.integers(0, 128, (16, 16, 3), dtype=np.uint8)
            pixels[:, :, marks] += 96
            made.append({"image": pixels, "kinds": kinds})
        elif kind == "text-multi-label":
            made.append({"text": " ".join(words), "kinds": kinds})
        else:
            made.append({"text": " ".join(words), "score": 0.5 + len(marks)})
    return made


def write(file: Path, examples: list[dict[str, Any]]) -> Path:
    """Write examples as csv, jsonl or parquet by the suffix, and images beside them as png; return the file."""
    examples = [
        {name: _saved(value, file, row) if name == "image" else value for name, value in example.items()}
        for row, example in enumerate(examples)
    ]
    if file.suffix == ".jsonl":
        file.write_text("".join(f"{json.dumps(example)}\n" for example in examples), encoding="utf-8")
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(examples), file)
    else:
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, examples[0])
            writer.writeheader()
            writer.writerows(examples)
    return file


def _saved(pixels: Any, file: Path, row: int) -> str:
    name = f"{file.stem}-{row}.png"
    if isinstance(pixels, np.ndarray):
        Image.fromarray(pixels).save(file.parent / name)
        return name
    return str(pixels)


@cache
def folder() -> Path:
    """Made once per test run: a tokenizer that splits words, and the training and validation examples of each task as jsonl."""
    root = Path(mkdtemp(prefix="recap-tasks-"))
    write_pieces(root / "pieces")
    for kind in KINDS:
        for seed, (split, count) in enumerate((("train", TRAIN), ("validation", VALIDATION))):
            write(root / f"{kind}-{split}.jsonl", rows(kind, count, seed))
    return root


def recipe(kind: str, **sections: Any) -> Recipe:
    """A recipe of two rounds of a pico model for a task; `sections` are merged over it."""
    root, model = folder(), "vit" if kind.startswith("image") else "bert"
    files = {split: str(root / f"{kind}-{split}.jsonl") for split in ("train", "validation")}
    columns = {"text": None, "image": None, **COLUMNS[kind], **sections.pop("data", {})}
    if model == "bert":
        from tests.pico import TEXT

        made = {"config": {"model_type": "bert", **TEXT, "tokenizer": str(root / "pieces")}}
        sections = {"model": made, **sections}
    return tiny(model, task={"kind": kind, **sections.pop("task", {})}, data={**files, **columns}, **sections)
