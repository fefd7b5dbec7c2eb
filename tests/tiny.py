"""Tiny recipes: every pico model on a few made examples, so that whole rounds take a second."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import yaml
from PIL import Image

from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from tests.pico import LABELS, PICO, TIMM, write_tokenizer

TRAIN, VALIDATION = 40, 18


@cache
def data_folder() -> Path:
    """Made once per test run: a tokenizer, texts as csv, and images in a folder per class, each with a mark of its own."""
    root = Path(mkdtemp(prefix="recap-tiny-"))
    write_tokenizer(root / "tokenizer")
    random = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        lines = ["sentence,label"]
        for i in range(count):
            label = i % len(LABELS)
            words = [
                f"w{label}" if random.random() < 0.5 else f"w{random.integers(3, 59)}" for _ in range(random.integers(3, 9))
            ]
            lines.append(f"{' '.join(words)},{LABELS[label]}")
            pixels = random.integers(0, 128, (16, 16, 3), dtype=np.uint8)
            pixels[:, :, label] += 96
            place = root / split / LABELS[label] / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place)
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def model_section(name: str) -> dict[str, Any]:
    """The `model` of a recipe that builds the pico or strange model of that name, with random weights."""
    made: Any = PICO[name] if name in PICO else _strange(name)
    if made.args[0].startswith(("vit_", "deit_")):
        return {"library": "timm", "config": {"architecture": made.args[0], **TIMM, **made.keywords}}
    model_type, values = made.args
    text = {} if "patch_size" in values else {"tokenizer": str(data_folder() / "tokenizer")}
    return {"config": {"model_type": model_type, **values, **text}}


def one_layer(name: str) -> dict[str, Any]:
    """The same with one layer."""
    section = model_section(name)
    if "depths" in section["config"]:  # of stages
        return {**section, "config": {**section["config"], "depths": [1], "num_heads": section["config"]["num_heads"][:1]}}
    key = next(key for key in ("num_hidden_layers", "n_layers", "depth") if key in section["config"])
    return {**section, "config": {**section["config"], key: 1}}


def _strange(name: str) -> Any:
    from tests.strange import STRANGE  # which imports transformers

    return STRANGE[name]


def is_text(name: str) -> bool:
    return "tokenizer" in model_section(name)["config"]


def tiny(name: str, **sections: Any) -> Recipe:
    """A recipe of two rounds for a pico model; `sections` are merged over it."""
    root, text = data_folder(), is_text(name)
    kind = "text" if text else "image"
    files = {s: str(root / (f"{s}.csv" if text else s)) for s in ("train", "validation")}
    columns = {"text": "sentence"} if text else {"image": "image"}
    whole: dict[str, Any] = {
        "name": f"tiny-{name}",
        "rounds": 2,
        "model": model_section(name),
        "task": {"kind": f"{kind}-classification"},
        "data": {**files, **columns, "max_length": 16} if text else {**files, **columns},
        "importance": {"batches": 2, "batch_size": 8},
        "prune": {"ratio": 0.4, "steps": 2},
        "mask": {"ratio": 0.6},
        "finetune": {"epochs": 1, "batch_size": 8, "lr": 0.01, "device": "cpu"},
    }
    for section, values in sections.items():
        whole[section] = {**whole.get(section, {}), **values} if isinstance(values, dict) else values
    return recipes.parse(yaml.safe_dump(whole), f"tiny {name}")
