"""How fast the predictor is, how much memory it takes itself, and how near it is to a real step on the CPU.

    python benchmarks/predictor.py

Each prediction is a fresh process, imports included. Mask2Former with a Swin-base backbone has no recipe yet, so its step is
put together here: full finetuning with AdamW at 512 × 512, with a surrogate loss of the outputs' shapes (the real one matches
predictions to targets by the Hungarian algorithm on the CPU, which fake tensors cannot). The real steps have random weights.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from memory import CASES, SETTINGS
from record import parser, status_bytes, table, write
from torch import Tensor

from recap_cli.memory import measure, predict
from recap_cli.memory.fake_step import Fakes, Step, usage
from recap_cli.models.build import tensors_of
from recap_cli.plugins.tasks.classification import TEXT_CLASSIFICATION
from recap_cli.recipe import recipe as recipes
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.optim import Optimizer, adamw

SIDE = 512
REAL = (("ViT-base", "full"), ("ViT-base", "head"), ("ViT-base", "lora"), ("ViT-base", "recap"), ("BERT-base", "recap"))


def mask2former() -> Step:
    """A step of Mask2Former-Swin-base on fake tensors."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone))
    fakes = Fakes()
    made = fakes.like(tensors_of(model))
    for name, tensor in made.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        grad_param = (
            torch.nn.Parameter(tensor) if isinstance(getattr(owner, name.rpartition(".")[2]), torch.nn.Parameter) else tensor
        )
        setattr(owner, name.rpartition(".")[2], grad_param)
    trainables = make_partial(model, {}, frozen=lambda _: False)

    def forward(batch: dict[str, Tensor]) -> Tensor:
        out = model(pixel_values=batch["pixel_values"])
        return torch.cat([out.class_queries_logits.flatten(), out.masks_queries_logits.flatten()])

    batch = fakes.like(
        {
            "pixel_values": torch.zeros(1, 3, SIDE, SIDE, device="meta"),
            "labels": torch.zeros(1, dtype=torch.int64, device="meta"),
        }
    )
    return Step(
        model.train(),
        Optimizer(trainables, adamw(betas=(0.9, 0.999), eps=1e-8)),
        forward,
        replace(TEXT_CLASSIFICATION, loss=lambda x, _: x.square().mean(), count=lambda _: 1),
        batch,
    )


def predicted(name: str, method: str) -> dict[str, Any]:
    """One prediction in this very process: seconds since its start, and its peak resident set."""
    import transformers.modeling_utils  # noqa: F401  (so that it counts as imported)

    before, started = status_bytes("VmRSS"), time.perf_counter()
    if name == "Mask2Former-Swin-base":
        step = mask2former()
        parameters = sum(p.numel() for p in step.model.parameters())
        found = Fakes().usage(step)
    else:
        model = CASES[name].of_recipe()
        result = predict.predict(model, CASES[name].settings(optimizer="adamw"), method)  # type: ignore[arg-type]
        parameters, found = result.total, result.usage
    return {
        "model": name,
        "method": method,
        "peak_bytes": found.peak_bytes,
        "seconds": time.perf_counter() - started,
        "process_peak_rss_bytes": status_bytes("VmHWM"),
        "imports_rss_bytes": before,
        "model_bytes": 4 * parameters,
    }


def real(name: str, method: str, settings: str) -> dict[str, Any]:
    """The prediction with CPU kernels beside the tracker's count over the same step on real tensors."""
    model, recipe = CASES[name].of_recipe(), recipes.changed(CASES[name].settings(), SETTINGS[settings])
    expected = predict.predict(model, recipe, method, kernels="cpu").usage  # type: ignore[arg-type]
    step, _ = predict.prepare(model, recipe, method, measure.random_tensors)  # type: ignore[arg-type]
    counted = usage(step)
    kinds = {kind: {"predicted_bytes": expected.maxima[kind], "real_bytes": counted.maxima[kind]} for kind in counted.maxima}
    return {
        "model": name,
        "method": method,
        "settings": settings,
        "predicted_bytes": expected.peak_bytes,
        "real_bytes": counted.peak_bytes,
        "kinds": kinds,
    }


def main() -> None:
    command = parser(__doc__, "predictor")
    command.add_argument("--one", nargs=2, metavar=("MODEL", "METHOD"), help="predict in this process, and print JSON")
    args = command.parse_args()
    if args.one:
        print(json.dumps(predicted(*args.one)))
        return
    speed, rows = [], []
    for name, method in (*((n, m) for n in CASES for m in ("full", "recap")), ("Mask2Former-Swin-base", "full")):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, __file__, "--one", name, method], capture_output=True, text=True, check=True)
        speed.append({**json.loads(done.stdout), "process_seconds": time.perf_counter() - started})
        seen = speed[-1]
        rows.append(
            [
                name,
                method,
                f"{seen['process_seconds']:.1f}",
                *(f"{seen[k] / 1e6:.0f}" for k in ("process_peak_rss_bytes", "imports_rss_bytes", "model_bytes", "peak_bytes")),
            ]
        )
    print(table(["model", "method", "seconds", "peak RSS, MB", "of it imports", "the model, MB", "predicted peak, MB"], rows))
    steps = [real(name, method, "fp32") for name, method in REAL]
    steps += [real(name, "recap", settings) for name in ("ViT-base", "BERT-base") for settings in ("best", "int8")]
    print(
        table(
            ["model", "method", "settings", "predicted, MB", "real step, MB"],
            [
                [s["model"], s["method"], s["settings"], f"{s['predicted_bytes'] / 1e6:.3f}", f"{s['real_bytes'] / 1e6:.3f}"]
                for s in steps
            ],
        )
    )
    write(
        args.out,
        "predictor",
        {"speed": speed, "real": steps},
        how="measured seconds and RSS; predicted bytes, and counted ones of a real CPU step",
    )


if __name__ == "__main__":
    main()
