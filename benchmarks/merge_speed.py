"""`recap merge` of a ViT-base state against just saving the same tensors with safetensors, each file flushed to the
disk.

A state with random weights is brought to the end of the second round's `finetune` (AdamW, r_p = 33 %, r_f = 87.5 %), so
that the merge has moments to age and to write. Each pair merges a fresh copy of it and then saves what the merge wrote.
*In a run* the merge finds its inputs already verified by the process, as within `recap run`; *alone* it must first hash
them, as `recap merge` in a shell does. Seconds are wall clock, since the disk is part of it (dirty pages are flushed
before each timing), and CPU.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from record import parser, ratio, table, write
from safetensors.torch import save_file
from torch import Tensor

from recap_cli.recipe import recipe
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.state import files as storage
from recap_cli.state.store import State

BAR = 2.0
RECIPE = """
model: {config: {model_type: vit}}
task: {kind: image-classification}
data: {builtin: digits, train_samples: 4, validation_samples: 2}
head: {warmup_epochs: 0}
importance: {batches: 1, batch_size: 2}
prune: {steps: 1}
finetune: {steps: 1, batch_size: 2, device: cpu}
"""
Seconds = tuple[float, float]


def prepare(root: Path) -> None:
    """A state whose next stage is the merge of round 2."""
    state = init(recipe.parse(RECIPE, "the benchmark's recipe", ()), root)
    for stage in (prune, mask, finetune, merge, prune, mask, finetune):
        stage(state)


def timed(work: Callable[[], object]) -> Seconds:
    """Wall-clock and CPU seconds of `work`, with no other writes of this machine under way as it begins."""
    os.sync()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def save(files: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """What the merge is measured against."""
    for rel, tensors in files.items():
        path = folder / rel.replace("/", "-")
        save_file(tensors, path)
        storage.flush(path)


def one_pair(prepared: Path, work: Path, *, verified: bool) -> tuple[Seconds, Seconds, int]:
    """Merge a copy of the state, then save the same tensors; and how many bytes those are."""
    shutil.copytree(prepared, work / "state")
    state = State.open(work / "state")
    before = set(state.manifest.files)
    if verified:
        for rel in before:
            state.verified(rel)
    merged = timed(lambda: merge(state))
    written = [rel for rel in state.manifest.files if rel not in before and rel.endswith(".safetensors")]
    files = {rel: {name: t.clone() for name, t in state.load_tensors(rel).items()} for rel in written}
    (work / "saved").mkdir()
    saved = timed(lambda: save(files, work / "saved"))
    return merged, saved, sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())


def main() -> None:
    args_parser = parser(__doc__, "merge_speed")
    args_parser.add_argument("--pairs", type=int, default=4)
    args = args_parser.parse_args()
    torch.set_num_threads(2)
    results: list[dict[str, object]] = []
    times: dict[str, list[tuple[Seconds, Seconds]]] = {"in a run": [], "alone": []}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root / "prepared")
        for round_plan in range(args.pairs):
            for index_map in list(times)[:: 1 if round_plan % 2 else -1]:
                with TemporaryDirectory(dir=root) as work:
                    merged, saved, written_bytes = one_pair(root / "prepared", Path(work), verified=index_map == "in a run")
                times[index_map].append((merged, saved))
    rows: list[list[object]] = []
    for index_map, pairs in times.items():
        wall, cpu = (([m[i] for m, _ in pairs], [s[i] for _, s in pairs]) for i in range(2))
        found = {"wall_ratio": ratio(*wall), "cpu_ratio": ratio(*cpu)}
        raw = {"merge_seconds": wall[0], "save_seconds": wall[1], "merge_cpu_seconds": cpu[0], "save_cpu_seconds": cpu[1]}
        results.append({"where": index_map, **found, **raw})
        rows.append([index_map, median(wall[0]), median(wall[1]), found["wall_ratio"], median(cpu[0]), median(cpu[1])])
    print(f"{written_bytes / 1e6:.0f} MB are written")
    print(table(["merge", "merge s", "save s", "ratio", "merge CPU s", "save CPU s"], rows))
    figures = {"bar": BAR, "pairs": args.pairs, "written_bytes": written_bytes, "results": results}
    write(args.out, "merge_speed", figures, how="measured: wall-clock and CPU seconds, paired")


if __name__ == "__main__":
    main()
