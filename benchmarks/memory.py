"""Predicted memory of finetuning beside the paper's figures, beside the rivals', and what each saving is worth.

    python benchmarks/memory.py

Every figure is one training step on tensors without memory, with CUDA's kernels (`recap profile-memory`), from the
configuration alone: random weights, 224 px or 128 tokens. Figures that are arithmetic on such a prediction say *computed*.
Nothing here ran on a GPU, which would add cuBLAS's workspace and the allocator's fragmentation.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from record import parser, table, write
from torch import Tensor, optim

from recap_cli.memory import meta_model, predict
from recap_cli.memory.fake_step import Fakes
from recap_cli.memory.meta_model import MetaModel
from recap_cli.memory.predict import Prediction
from recap_cli.memory.tracker import Tracker
from recap_cli.models import build
from recap_cli.models.recomputing import enable_checkpointing
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.small_model import placement_of
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import mean_loss

LEAN = {"finetune.fused_backward": True, "finetune.checkpointing": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "best": {**LEAN, "finetune.weights": "bf16"},
    "int8": {**LEAN, "finetune.weights": "int8"},
    "best, offloaded": {**LEAN, "finetune.weights": "bf16", "finetune.offload": True},
    "int8, offloaded": {**LEAN, "finetune.weights": "int8", "finetune.offload": True},
}
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"finetune.weights": "bf16"},
    "bf16, checkpoints": {"finetune.weights": "bf16", "finetune.checkpointing": True},
}
OFFLOAD = {"finetune.offload": True}
EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)  # two moments of a byte, and an fp32 scale for each block of 256, as in bitsandbytes


class Case(NamedTuple):
    """A model of the paper by its recipe and configuration, the paper's memory column in MB, and the bars of this project."""

    recipe: str
    config: dict[str, Any]
    labels: int
    paper: dict[str, int]
    bars: dict[str, int]

    def settings(self, **finetune: Any) -> Recipe:
        """The recipe at batch size 1 with SGD (or as `finetune` says)."""
        values = {"batch_size": 1, "optimizer": "sgd", **finetune}
        sets = [f"finetune.{key}={value}" for key, value in values.items()]
        return recipes.read(self.recipe, [f"model.config={self.config}", "evaluate.batch_size=1", *sets])

    def of_recipe(self) -> MetaModel:
        """The model without weights."""
        return meta_model.of_recipe(self.settings(), [f"label {i}" for i in range(self.labels)])


def _vit(width: int, layers: int, patch: int = 16) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width, "patch_size": patch}
    return {"model_type": "vit", **sizes, "num_attention_heads": 12 if width == 768 else 16}


CASES = {
    "ViT-base": Case(
        "vit_base_cifar100",
        _vit(768, 12),
        100,
        {"full": 1200, "head": 414, "lora": 480, "pre-ft": 825, "recap": 431},
        {"fp32": 375, "best": 215, "int8": 165},
    ),
    "ViT-large": Case(
        "vit_large_cifar100",
        _vit(1024, 24),
        100,
        {"full": 3854, "head": 1339, "lora": 1564, "pre-ft": 2657, "recap": 1251},
        {"fp32": 1240, "best": 680, "int8": 480},
    ),
    "ViT-huge": Case(
        "vit_large_cifar100",
        _vit(1280, 32, 14),
        100,
        {"full": 7984, "head": 2708, "lora": 2840, "pre-ft": 5377, "recap": 2483},
        {"fp32": 2480, "best": 1350, "int8": 950},
    ),
    "BERT-base": Case(
        "bert_base_cola",
        {"model_type": "bert"},
        2,
        {"full": 1553, "head": 524, "pre-ft": 957, "recap": 702},
        {"fp32": 560, "best": 350, "int8": 280},
    ),
}


def figures(found: Prediction) -> dict[str, Any]:
    """What of a prediction goes into the results."""
    keys = ("training_peak_bytes", "sum_of_maxima_bytes", "trainable_parameters", "held_parameters", "total_parameters")
    values = found.to_json()
    return {**{key: values[key] for key in keys}, "maxima": found.usage.maxima, "at_peak": values["at_peak"]}


def paper_rows() -> Iterator[dict[str, Any]]:
    """The paper's table: every method in fp32, and RECAP with the settings that need less."""
    for name, case in CASES.items():
        model, plain = case.of_recipe(), case.settings()
        for method in ("full", "head", "lora", "pre-ft", "recap"):
            started = time.perf_counter()
            found = figures(predict.predict(model, plain, method))
            seconds = time.perf_counter() - started
            yield {
                "model": name,
                "method": method,
                "settings": "fp32",
                "paper_mb": case.paper.get(method),
                "seconds": seconds,
                **found,
            }
        for settings in list(SETTINGS)[1:]:
            found = figures(predict.predict(model, recipes.changed(plain, SETTINGS[settings]), "recap"))
            yield {"model": name, "method": "recap", "settings": settings, "paper_mb": case.paper["recap"], **found}


def rivals() -> Iterator[dict[str, Any]]:
    """AdamW at batch 1, 8 and 32: RECAP, lean full finetuning, LoRA, and a lower bound of torchao's CPU offload."""
    for name in ("ViT-base", "BERT-base"):
        model = CASES[name].of_recipe()
        for batch in (1, 8, 32):
            plain = CASES[name].settings(batch_size=batch, optimizer="adamw")
            for form, changes in FORMS.items():
                for method, found in _side_by_side(model, recipes.changed(plain, changes)):
                    yield {"model": name, "batch": batch, "form": form, "method": method, **found}
            for method, extra in (("RECAP, fused", {}), ("RECAP, fused, offloaded", {"finetune.offload": True})):
                found = _predicted(model, recipes.changed(plain, {**SETTINGS["int8"], **extra}), "recap")
                yield {"model": name, "batch": batch, "form": "int8, checkpoints", "method": method, **found}


def _side_by_side(model: MetaModel, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every rival with the same weights and the same checkpoints."""
    if recipe.finetune.weights == "fp32":
        yield "full finetuning", _predicted(model, recipe, "full")
    else:
        yield "full finetuning, no fp32 masters", _plain(model, recipe, offload=False)
        yield "full finetuning, fp32 masters", _predicted(model, recipe, "full")
    yield "torchao CPU offload, at least", _plain(model, recipe, offload=True)
    yield "LoRA, r = 8", _predicted(model, recipe, "lora")
    yield "RECAP", _predicted(model, recipe, "recap")
    fused = {"finetune.fused_backward": True}
    yield "RECAP, fused", _predicted(model, recipes.changed(recipe, fused), "recap")
    yield "RECAP, fused, offloaded", _predicted(model, recipes.changed(recipe, {**fused, "finetune.offload": True}), "recap")


def _predicted(model: MetaModel, recipe: Recipe, method: Any) -> dict[str, Any]:
    found = predict.predict(model, recipe, method)
    peak, states = found.usage.peak_bytes, found.usage.maxima["optimizer"]
    eight = {"peak_with_8_bit_moments_bytes": round(peak - states + EIGHT_BIT_BYTES * found.trainable)}
    return {"peak_bytes": peak, **({} if recipe.finetune.offload else eight), "trainable_parameters": found.trainable}


def _plain(model: MetaModel, recipe: Recipe, *, offload: bool) -> dict[str, Any]:
    """Full finetuning with torch's own AdamW in the type of the weights throughout: weights, gradients and moments, no masters.

    With `offload` no moments are on the device and each gradient leaves it as soon as it is complete: a lower bound of
    torchao's `CPUOffloadOptimizer(offload_gradients=True)`, which needs CUDA to run.
    """
    dtype, fakes = placement_of(recipe.finetune).dtype, Fakes()
    shapes = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.tensors.items()}
    built = build.assemble(model.spec, fakes.like(shapes), model.adapter, {}).train()
    if recipe.finetune.checkpointing:
        enable_checkpointing(built)
    shown = predict.batch_of(model.spec, recipe, recipe.finetune.batch_size)
    batch = fakes.like({n: t.to(dtype) if t.is_floating_point() else t for n, t in shown.items()})
    params, call, task = dict(built.named_parameters()), build.forward(model.spec), task_named(model.spec.task_kind)
    tracker, moments = Tracker(built), list[Tensor]()
    with fakes.pretending("cuda"):
        optimizer = None if offload else optim.AdamW(params.values(), foreach=False)

        def step() -> None:
            mean, _ = mean_loss(task, task.read(call(built, batch)), batch)
            mean.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        if optimizer is not None:
            step()  # makes the moments
            moments = [t for state in optimizer.state.values() for t in state.values()]
        tracker.know([*params.items(), *built.named_buffers()], "weights")
        tracker.know([("", moment) for moment in moments], "optimizer")
        tracker.know(batch, "other")
        with tracker.watch(params.items()):
            if offload:
                for param in params.values():
                    param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            step()
    usage, trainable = tracker.usage(), sum(p.numel() for p in params.values())
    eight = (
        {}
        if offload
        else {
            "peak_with_8_bit_moments_bytes": round(usage.peak_bytes - usage.maxima["optimizer"] + EIGHT_BIT_BYTES * trainable)
        }
    )
    return {"peak_bytes": usage.peak_bytes, **eight, "trainable_parameters": trainable}


def ablation() -> Iterator[dict[str, Any]]:
    """Each saving on and off, by itself over plain fp32 and taken from the best settings, at batch 1 and 8 with SGD."""
    for name in ("ViT-base", "BERT-base"):
        model = CASES[name].of_recipe()
        for batch in (1, 8):
            for saving, over, off, on, how in _savings(model, CASES[name].settings(batch_size=batch)):
                facts = {"saving": saving, "over": over, "off_bytes": off, "on_bytes": on, "how": how}
                yield {"model": name, "batch": batch, **facts}


def _savings(model: MetaModel, plain: Recipe) -> Iterator[tuple[str, str, int, int, str]]:
    """The name of each saving, over what, the peak without and with it, and how the figures were got."""

    def peak(recipe: Recipe, method: Any = "recap", of: MetaModel = model) -> int:
        return predict.predict(of, recipe, method).usage.peak_bytes

    best = recipes.changed(plain, SETTINGS["best"])
    pruned, base, lean = peak(plain, "pre-ft"), peak(plain), peak(best)
    yield "pruning (r_p)", "full finetuning", peak(plain, "full"), pruned, "predicted"
    yield "partial updates (r_f)", "pruned, all moves", pruned, base, "predicted"
    for saving, key, on, off in (
        ("fused backward", "finetune.fused_backward", True, False),
        ("bf16 residents", "finetune.weights", "bf16", "fp32"),
        ("checkpoints", "finetune.checkpointing", True, False),
    ):
        yield saving, "fp32", base, peak(recipes.changed(plain, {key: on})), "predicted"
        yield saving, "the best without it", peak(recipes.changed(best, {key: off})), lean, "predicted"
    quantized = peak(recipes.changed(plain, SETTINGS["int8"]))
    yield "int8 for frozen matrices", "the best", lean, quantized, "predicted"
    yield "masters and moments offloaded", "the best", lean, peak(recipes.changed(best, OFFLOAD)), "predicted"
    yield (
        "masters and moments offloaded",
        "the best, int8",
        quantized,
        peak(recipes.changed(plain, {**SETTINGS["int8"], **OFFLOAD})),
        "predicted",
    )
    if plain.finetune.batch_size > 1:
        yield "micro-batches of 1", "fp32", base, peak(recipes.changed(plain, {"finetune.micro_batch_size": 1})), "predicted"
    eager = replace(model, spec=replace(model.spec, config={**model.spec.config, "attn_implementation": "eager"}))
    yield "fused attention (SDPA)", "fp32", peak(plain, of=eager), base, "predicted"
    found = predict.predict(model, plain, "recap")
    kept = base + 4 * found.trainable - found.usage.at_peak["gradients"]
    yield "gradients freed between steps", "fp32", kept, base, "computed"
    yield "no second copy of scattered entries", "fp32", base + _scattered(model, plain), base, "computed"


def _scattered(model: MetaModel, recipe: Recipe) -> int:
    """Bytes of the entries that move and do not lie side by side: what a compact copy of them would hold."""
    step, _ = predict.prepare(model, recipe, "recap", Fakes().like)
    return sum(4 * trainable.grad_param.numel() for trainable in step.optimizer.trainables if trainable.own_master is None)


def importance() -> Iterator[dict[str, Any]]:
    """The peak of the importance stages on an accelerator, the full model streamed, beside that of finetuning."""
    for name, case in CASES.items():
        model = case.of_recipe()
        for batch in (1, 8, 32):
            for settings, changes in SETTINGS.items():
                recipe = recipes.changed(case.settings(batch_size=batch, optimizer="adamw"), changes)
                yield {
                    "model": name,
                    "batch": batch,
                    "settings": settings,
                    "importance_bytes": predict.importance_bytes(model, recipe),
                    "finetuning_bytes": predict.predict(model, recipe, "recap").usage.peak_bytes,
                    "full_model_bytes": 4 * sum(t.numel() for t in model.tensors.values()),
                }


def main() -> None:
    args = parser(__doc__, "memory").parse_args()
    found = {"paper": list(paper_rows())}
    rows = []
    for r in found["paper"]:
        bar = CASES[r["model"]].bars.get(r["settings"]) if r["method"] == "recap" else None
        peak, total = (f"{r[key] / 1e6:.1f}" for key in ("training_peak_bytes", "sum_of_maxima_bytes"))
        rows.append([r["model"], r["method"], r["settings"], r["paper_mb"] or "-", peak, total, bar or "-"])
    print(table(["model", "method", "settings", "paper, MB", "peak, MB", "sum of maxima, MB", "bar"], rows))
    found["rivals"] = list(rivals())
    print(
        table(
            ["model", "batch", "form", "method", "peak, MB"],
            [[r["model"], r["batch"], r["form"], r["method"], f"{r['peak_bytes'] / 1e6:.0f}"] for r in found["rivals"]],
        )
    )
    found["ablation"] = list(ablation())
    print(
        table(
            ["model", "batch", "saving", "over", "off, MB", "on, MB"],
            [
                [r["model"], r["batch"], r["saving"], r["over"], f"{r['off_bytes'] / 1e6:.1f}", f"{r['on_bytes'] / 1e6:.1f}"]
                for r in found["ablation"]
            ],
        )
    )
    found["importance"] = list(importance())
    print(
        table(
            ["model", "batch", "settings", "importance, MB", "finetuning, MB"],
            [
                [
                    r["model"],
                    r["batch"],
                    r["settings"],
                    f"{r['importance_bytes'] / 1e6:.1f}",
                    f"{r['finetuning_bytes'] / 1e6:.1f}",
                ]
                for r in found["importance"]
            ],
        )
    )
    write(
        args.out,
        "memory",
        {"bars_mb": {n: c.bars for n, c in CASES.items()}, **found},
        how="predicted on fake tensors with CUDA's kernels; rows marked computed are arithmetic on that",
    )


if __name__ == "__main__":
    main()
