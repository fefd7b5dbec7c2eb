"""Accuracy on examples that no run was trained on and no setting was chosen by: the last rounds of `quality.py`'s runs, scored
once more.

    python benchmarks/quality.py --task mrpc --variants pre-ft@2,post-ft@2,recap@4 --ratios 0.333 --mask-ratios 0
    python benchmarks/held_out.py --task mrpc --variants pre-ft@2,post-ft@2,recap@4

It reads the states that `quality.py` left below `--work`. Held out are images of the test file that validated no seed's run,
GLUE's labelled test examples, or, for each seed, phrases of the training file that share no three words in a row with any in
its sample. `benchmarks/quality_page.py` shows the results.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quality
import torch
import yaml
from record import command_line, parser, write

from recap_cli.core.axes import counts
from recap_cli.data.split import Split
from recap_cli.data.splits import make_split
from recap_cli.models import build
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import Recipe
from recap_cli.rounds.examples import inputs_of, read_raw
from recap_cli.rounds.plans import method_of
from recap_cli.rounds.recipe_model import forward_of
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import finished
from recap_cli.state.store import State
from recap_cli.training.evaluation import Pass, evaluate

if TYPE_CHECKING:
    from datasets import Dataset

SEEDS = range(6)  # whose validation images settings were chosen by
MOST = 4000  # examples
WORDS = 3  # in a row, which no two phrases may share
SOURCES = {
    "cifar100": "images of the test file that validated no run",
    "mrpc": "GLUE's test examples",
    "sst2": "phrases of the training file that share no three words in a row with any that the run was trained on",
}


def examples(task: str, seed: int) -> "Dataset":
    """The examples that are held out from a run, at most `MOST`: the first ones after a shuffle of a fixed seed."""
    if task == "mrpc":
        return raw_of(task, {"validation": str(quality.shared() / "glue/mrpc/test.parquet")}).validation
    if task == "cifar100":
        found = raw_of(task, {"validation_samples": None}).validation
        used = {row for other in SEEDS for row in raw_of(task, {}, other).validation["row"]}
        kept = [at for at, row in enumerate(found["row"]) if row not in used]
    else:
        found = raw_of(task, {"train_samples": None}).train
        known = {run for text in raw_of(task, {}, seed).train["text"] for run in runs_of(text.split())}
        kept = [at for at, text in enumerate(found["text"]) if (runs := runs_of(text.split())) and not known & runs]
    drawn = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[:MOST]
    return found.select(sorted(kept[at] for at in drawn.tolist()))


def runs_of(words: list[str]) -> set[tuple[str, ...]]:
    """Every run of `WORDS` words; none of a shorter phrase."""
    return {tuple(words[at : at + WORDS]) for at in range(len(words) - WORDS + 1)}


def raw_of(task: str, data: dict[str, Any], seed: int = 0) -> Any:
    """The examples of a task with other settings of its data, or of another seed."""
    values = quality.recipe_of(task)
    return read_raw(recipe_from({**values, "data": {**values["data"], **data}, "seed": seed}))


def recipe_from(values: dict[str, Any]) -> Recipe:
    return recipes.parse(yaml.safe_dump(values), values["name"])


def score(context: Context, split: Split) -> dict[str, float]:
    """The metrics of the small model of a state's last round."""
    folder = str(context.state.manifest.small)
    plan = context.plan(folder)
    model = context.model(context.gathered(folder, plan), counts(plan))
    return evaluate(forward_of(context.spec, model), split, context.objective, how=Pass(batch_size=64))


def split_of(context: Context, task: str) -> Split:
    """What is held out from a run, ready for its model."""
    found, origin = examples(task, context.recipe.seed), SOURCES[task]
    processor = build.load_processor(context.state.path / context.full, context.spec)
    return make_split(found, inputs_of(context.recipe, context.spec, processor), origin=origin)


def runs(work: Path, task: str, variant: str) -> Iterator[Context]:
    """The finished runs of a variant."""
    for path in sorted((work / f"{task}-{variant}" / "cells").glob("*")):
        if not (path / "state.yaml").exists():  # a run that was stopped as it began
            continue
        context = Context(State.open(path))
        if finished(context.recipe, context.state.manifest):
            yield context


def keys_of(context: Context, variant: str) -> dict[str, Any]:
    """What tells a run from the others, and the metric of its last round on the data that it was validated on."""
    recipe, method = context.recipe, method_of(context.recipe)
    return {
        "variant": variant,
        "method": recipe.method,
        "prune_ratio": recipe.prune.ratio if method.prunes else None,
        "mask_ratio": recipe.mask.ratio if method.masks else None,
        "seed": recipe.seed,
        "validated": context.state.load_json(f"{context.state.manifest.small}/metrics.json")[recipe.task.metric],
    }


def main() -> None:
    command = parser(__doc__, "held_out_TASK")
    command.add_argument("--task", choices=SOURCES, required=True)
    command.add_argument("--variants", required=True)
    command.add_argument("--work", type=Path, action="append", help="where `quality.py` left its states; may be given again")
    args = command.parse_args()
    out, places = Path(str(args.out).replace("TASK", args.task)), args.work or [Path("runs/quality")]
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": [], "commands": []}
    cells = {quality.key_of(cell): cell for cell in before["cells"]}
    splits: dict[int, Split] = {}  # by seed
    metric = quality.TASKS[args.task]["task"]["metric"]
    for variant in args.variants.split(","):
        known = [context for work in places for context in runs(work, args.task, variant)]
        if not known:
            raise SystemExit(f"{args.task}: there are no runs of {variant} below {', '.join(map(str, places))}")
        for context in known:
            keys, seed = keys_of(context, variant), context.recipe.seed
            splits[seed] = splits.get(seed) or split_of(context, args.task)
            cells[quality.key_of(keys)] = {**keys, "examples": len(splits[seed]), **score(context, splits[seed])}
            print(*quality.key_of(keys), cells[quality.key_of(keys)][metric], keys["validated"], flush=True)
        figures = {
            "held_out": SOURCES[args.task],
            "metric": metric,
            "lr": quality.TASKS[args.task]["finetune"]["lr"],
            "commands": list(dict.fromkeys([*before["commands"], command_line()])),
            "cells": list(cells.values()),
        }
        write(out, f"held_out_{args.task}", figures, how="measured")


if __name__ == "__main__":
    main()
