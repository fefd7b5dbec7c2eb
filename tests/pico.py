"""The smallest models there are of every registered adapter, with fixed weights: hidden 32, two layers, four heads, or so."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recap_cli.core.task import logits_of
from recap_cli.models import build
from recap_cli.models.source import ModelSource
from recap_cli.models.specs import Library, ModelSpec, image_facts
from recap_cli.tasks.calls import task_named

LABELS = ["cat", "dog", "newt"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
HF_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**HF_SIZES, "intermediate_size": 48, "vocab_size": len(WORDS), "max_position_embeddings": 40}
VISION: dict[str, Any] = {**HF_SIZES, "intermediate_size": 48, "image_size": 16, "patch_size": 8, "num_channels": 3}
DINO: dict[str, Any] = {**HF_SIZES, "mlp_ratio": 2, "image_size": 16, "patch_size": 8}
SWIN: dict[str, Any] = {
    **{"image_size": 16, "patch_size": 2, "num_channels": 3, "embed_dim": 16, "depths": [2, 2], "num_heads": [4, 8]},
    **{"window_size": 2, "mlp_ratio": 2.0, "drop_path_rate": 0.0},
}
DISTIL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 40,
}
TIMM: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}


def _hf(model_type: str, values: dict[str, Any]) -> ModelSpec:
    from recap_cli.models import transformers_models

    config = transformers_models.configure({"model_type": model_type, **values}, strict=True)
    image = image_facts(16, 3) if "patch_size" in values else None
    kind = "text-classification" if image is None else "image-classification"
    task = task_named(kind)
    transformers_models.set_labels(config, LABELS, task.problem_type)
    spec = ModelSpec("transformers", model_type, {}, len(LABELS), LABELS, kind, image, auto_class=task.auto_class)
    return replace(spec, config=transformers_models.to_dict(transformers_models.from_config(config, spec)))


def _timm(architecture: str, **args: Any) -> ModelSpec:
    config = {"architecture": architecture, "args": {**TIMM, **args, "num_classes": len(LABELS)}}
    return ModelSpec("timm", "timm-vit", config, len(LABELS), LABELS, "image-classification", image_facts(16, 3))


PICO: dict[str, Callable[[], ModelSpec]] = {
    "bert": partial(_hf, "bert", TEXT),
    "roberta": partial(_hf, "roberta", {**TEXT, "pad_token_id": 0}),
    "electra": partial(_hf, "electra", {**TEXT, "embedding_size": 16}),
    "distilbert": partial(_hf, "distilbert", DISTIL),
    "vit": partial(_hf, "vit", VISION),
    "deit": partial(_hf, "deit", VISION),
    "dinov2": partial(_hf, "dinov2", DINO),
    "dinov2-swiglu": partial(_hf, "dinov2", {**DINO, "use_swiglu_ffn": True}),
    "swin": partial(_hf, "swin", SWIN),  # two stages of other width
    "timm-vit": partial(_timm, "vit_tiny_patch16_224"),
    "timm-vit-distilled": partial(_timm, "deit_tiny_distilled_patch16_224"),
    "timm-vit-qk-norm": partial(_timm, "vit_tiny_patch16_224", qk_norm=True, init_values=1e-5),
    "timm-vit-packed-glu": partial(_timm, "vit_giant_patch14_dinov2", mlp_ratio=3, num_heads=4),
}


def pico(name: str, seed: int = 0) -> tuple[nn.Module, ModelSpec]:
    """A pico model with the random weights of `seed`, in eval mode, and its spec; torch's own generator is left as it was."""
    spec = PICO[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build._build(spec), spec


def source_for(kind: str, library: Library = "transformers", **given: Any) -> ModelSource:
    """What a model for a task of this kind is made from."""
    return ModelSource(library, task_named(kind), kind, **given)


def logits_for(spec: ModelSpec) -> Callable[[nn.Module, dict[str, Any]], Tensor]:
    """From a model of a spec and a batch to its logits."""
    forward = build.forward(spec)
    return lambda model, batch: logits_of(forward(model, batch))


def write_tokenizer(folder: Path) -> Any:
    """Write a word-level tokenizer of `WORDS` into `folder`, and return it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer
