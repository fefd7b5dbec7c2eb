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
from tests import segmentation
from tests.pico import LABELS, PICO, TIMM, write_tokenizer

TRAIN, VALIDATION = 40, 18
IGNORED_VALUE = 255  # of a label map


@cache
def data_folder() -> Path:
    """Made once per test run: a tokenizer, texts as csv, images in a folder per class, and images with label maps.

    Each text and each image has a mark of its class, and so has each pixel that a map gives one.
    """
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
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        for i in range(count):
            side = segmentation.SIDE
            write_map(root / "maps" / split, f"{i}.png", i, (side, side) if split == "train" or i % 3 else (24, 40))
    return root


def write_map(folder: Path, name: str, seed: int, size: tuple[int, int]) -> None:
    """Write an image of (height, width) and its label map: two or three classes side by side, and some pixels of none."""
    random = np.random.default_rng(seed)
    shown = random.permutation(len(segmentation.LABELS))[: 2 + seed % 2]  # every other map lacks a class
    pixels = random.integers(0, 128, (*size, 3), dtype=np.uint8)
    labels = shown[np.arange(size[1]) * len(shown) // size[1]][None].repeat(size[0], 0).astype(np.uint8)  # (height, width)
    for label in shown:
        pixels[labels == label, label] += 96
    labels[::5] = IGNORED_VALUE
    for place, content in (("images", pixels), ("labels", labels)):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(folder / place / name)


def model_section(name: str) -> dict[str, Any]:
    """The `model` of a recipe that builds the pico or strange model of that name, with random weights."""
    if name in segmentation.CONFIGS:
        return {"config": {"model_type": name, **segmentation.CONFIGS[name]}}
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
    text = is_text(name)
    whole: dict[str, Any] = {
        "name": f"tiny-{name}",
        "rounds": 2,
        "model": model_section(name),
        "task": {"kind": "text-classification" if text else "image-classification"},
        "data": _data_section(name),
        "importance": {"batches": 2, "batch_size": 8},
        "prune": {"ratio": 0.4, "steps": 2},
        "mask": {"ratio": 0.6},
        "finetune": {"epochs": 1, "batch_size": 8, "lr": 0.01, "device": "cpu"},
    }
    if name in segmentation.CONFIGS:
        whole["task"] = {"kind": "semantic-segmentation"}
    for section, values in sections.items():
        whole[section] = {**whole.get(section, {}), **values} if isinstance(values, dict) else values
    return recipes.parse(yaml.safe_dump(whole), f"tiny {name}")


def _data_section(name: str) -> dict[str, Any]:
    root, text, maps = data_folder(), is_text(name), name in segmentation.CONFIGS
    files = {s: str(root / (f"{s}.csv" if text else f"maps/{s}" if maps else s)) for s in ("train", "validation")}
    if maps:
        return {**files, "classes": segmentation.LABELS, "image_size": segmentation.SIDE}
    return {**files, "text": "sentence", "max_length": 16} if text else {**files, "image": "image"}
