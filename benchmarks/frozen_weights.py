"""What each frozen weight holds and costs: RECAP with fp32, bf16, int8 and NF4 beside LoRA and QLoRA, with the same optimizer.

    python benchmarks/frozen_weights.py

Bytes are predicted for one AdamW step with CUDA's kernels at 224 px or 128 tokens, from the configuration alone (as in
benchmarks/memory.py). `plain` is without checkpoints and with all gradients at once; `lean` has checkpoints, and uses each
gradient as soon as it is complete. QLoRA is LoRA (rank 8, query and value) over NF4 and is not pruned. Times are paired CPU
seconds of real steps with random weights at batch size 2, and of making one matrix of 3,072 × 768 dense. A CPU is not a GPU.
"""

import gc
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from memory import CASES, LEAN
from record import cpu_seconds, parser, ratio, table, write

from recap_cli.memory import measure, predict
from recap_cli.memory.fake_step import take_step
from recap_cli.recipe import recipe as recipes
from recap_cli.rounds.frozen_weights import frozen_weight_of

MODELS = ("ViT-base", "BERT-base")
BATCHES = (1, 32)
WEIGHTS = ("fp32", "bf16", "int8", "nf4")
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "RECAP, r_f 50 %": ("recap", {"prune.ratio": 0.333, "mask.ratio": 0.5}),
    "RECAP, r_f 87.5 %": ("recap", {"prune.ratio": 0.333, "mask.ratio": 0.875}),
    "LoRA, r = 8": ("lora", {}),
}
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "lean": LEAN}
MATRIX = (3072, 768)
STEP_BATCH, TOKENS_LOOKED_UP = 2, 4096


def held() -> Iterator[dict[str, Any]]:
    """The predicted step of every way with every weight."""
    for name in MODELS:
        model = CASES[name].of_recipe()
        for batch in BATCHES:
            plain = CASES[name].settings(batch_size=batch, optimizer="adamw")
            for settings, saving in SETTINGS.items():
                for way, (method, ratios) in WAYS.items():
                    for weights in WEIGHTS:
                        recipe = recipes.changed(plain, {**saving, **ratios, "finetune.weights": weights})
                        found = predict.predict(model, recipe, method)
                        yield {
                            **{"model": name, "batch": batch, "settings": settings, "way": way, "weights": weights},
                            "peak_bytes": found.usage.peak_bytes,
                            "maxima": found.usage.maxima,
                            "trainable_parameters": found.trainable,
                            "held_parameters": found.weights,
                        }


def steps(pairs: int) -> Iterator[dict[str, Any]]:
    """CPU seconds of a RECAP step with each weight, the four taking turns."""
    for name in MODELS:
        model = CASES[name].of_recipe()
        plain = CASES[name].settings(batch_size=STEP_BATCH, optimizer="adamw")
        sides = {
            weights: predict.prepare(
                model, recipes.changed(plain, {"finetune.weights": weights}), "recap", measure.random_tensors
            )[0]
            for weights in WEIGHTS
        }
        times: dict[str, list[float]] = {weights: [] for weights in WEIGHTS}
        for turn in range(pairs + 1):  # the first warms up
            for weights in list(sides)[:: 1 if turn % 2 else -1]:
                started = cpu_seconds()
                take_step(sides[weights])
                if turn:
                    times[weights].append(cpu_seconds() - started)
        yield {
            **{"model": name, "batch": STEP_BATCH, "cpu_seconds": times},
            "ratio_to_bf16": {weights: ratio(times[weights], times["bf16"]) for weights in WEIGHTS},
            "ratio_to_int8": {weights: ratio(times[weights], times["int8"]) for weights in WEIGHTS},
        }
        del sides
        gc.collect()


def matrices(pairs: int) -> dict[str, Any]:
    """CPU milliseconds of one matrix: to quantize it, to make it dense in bf16, to look its rows up."""
    generator = torch.Generator().manual_seed(0)
    matrix, out = torch.randn(MATRIX, generator=generator), torch.empty(MATRIX, dtype=torch.bfloat16)
    ids = torch.randint(0, MATRIX[0], (TOKENS_LOOKED_UP,), generator=generator)
    looked_up = torch.empty(TOKENS_LOOKED_UP, MATRIX[1], dtype=torch.bfloat16)
    sides = {name: frozen_weight_of(name) for name in ("int8", "nf4")}
    parts = {name: weights.quantize(matrix) for name, weights in sides.items()}  # type: ignore[misc]
    work = {
        "quantize": lambda name: sides[name].quantize(matrix),
        "dense": lambda name: sides[name].dense(parts[name], out),
        "rows": lambda name: sides[name].rows(parts[name], ids, looked_up),
    }
    found: dict[str, Any] = {"shape": MATRIX, "rows_looked_up": TOKENS_LOOKED_UP}
    for what, run in work.items():
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(pairs + 1):
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                started = cpu_seconds()
                for _ in range(10):
                    run(name)
                if turn:
                    times[name].append((cpu_seconds() - started) * 100)
        medians = {f"{name}_cpu_ms": median(taken) for name, taken in times.items()}
        found[what] = {**medians, "nf4_to_int8": ratio(times["nf4"], times["int8"])}
    return found


def main() -> None:
    command = parser(__doc__, "frozen_weights")
    command.add_argument("--pairs", type=int, default=5)
    args = command.parse_args()
    torch.set_num_threads(1)
    rows = list(held())
    cells = {(r["model"], r["batch"], r["settings"], r["way"], r["weights"]): r["peak_bytes"] / 1e6 for r in rows}
    lines = [
        [model, batch, settings, way, *(f"{cells[model, batch, settings, way, weights]:.1f}" for weights in WEIGHTS)]
        for model in MODELS
        for batch in BATCHES
        for settings in SETTINGS
        for way in WAYS
    ]
    print(table(["model", "batch", "settings", "peak, MB", *WEIGHTS], lines), flush=True)
    figures = {"pairs": args.pairs, "held": rows, "matrix": matrices(args.pairs), "steps": list(steps(args.pairs))}
    print(figures["matrix"])
    print(
        table(
            ["model", *WEIGHTS],
            [[r["model"], *(f"{r['ratio_to_bf16'][w]:.2f}× bf16" for w in WEIGHTS)] for r in figures["steps"]],
        )
    )
    write(args.out, "frozen_weights", figures, how="bytes are predicted; times are measured: CPU seconds, paired")


if __name__ == "__main__":
    main()
