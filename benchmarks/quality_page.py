"""Writes pages/quality.md from results/quality_*.json and held_out_*.json: every variant, with its seeds, steps, machine and
command.

python benchmarks/quality_page.py
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from quality import key_of, method_of
from record import RESULTS, table
from tables import ran_on

PAGE = Path(__file__).resolve().parent / "pages" / "quality.md"
TASKS = {
    "cifar100": "ViT-tiny (ImageNet weights) on CIFAR-100 at 96 px: 3,000 training and 1,000 test images",
    "sst2": "MiniLM (6 layers, d = 384) on SST-2: 6,000 sentences, the whole validation set of 872",
    "cola": "MiniLM on CoLA, Matthews correlation: 6,000 sentences, the whole validation set of 1,043; nothing was tuned on it",
    "mrpc": "MiniLM on MRPC, F1: 3,668 pairs, the whole validation set of 408; nothing was tuned on it",
    "rte": "MiniLM on RTE: 2,490 pairs, the whole validation set of 277; nothing was tuned on it",
}
SAID = {
    "full-ft": "full finetuning",
    "head-ft": "head finetuning",
    "lora-ft": "LoRA",
    "pre-ft": "pre-ft: prune, then finetune all that is left",
    "post-ft": "post-ft: finetune all, prune, finetune all that is left",
    "movement": "movement pruning",
    "recap": "RECAP",
    "plain": "RECAP: no ramp, no plan held, rate restarts each round",
    "faithful": "RECAP, `faithful: true` (that, and no head warm-up)",
    "one-course": "RECAP: no ramp, no plan held, one learning-rate schedule",
    "round-course": "RECAP, the rate restarts each round",
    "settled": "RECAP without the ramp",
    "ramped": "RECAP with no plan held",
    "late-settled": "RECAP, the ramp a round longer (`prune.hold_plan: 0.25`)",
    "averaged": "RECAP, importance averaged over rounds (`prune.ema: 0.5`)",
    "averaged-unsettled": "RECAP with no plan held, importance averaged over rounds",
    "exploring": "RECAP, a quarter of what is trainable at random (`mask.random: 0.25`)",
    "half-random": "RECAP, half of what is trainable at random (`mask.random: 0.5`)",
    "short-rounds": "RECAP, 8 rounds of half the steps",
    "long-rounds": "RECAP, 2 rounds of twice the steps",
    "rate-warmup": "RECAP, the rate rises in the first tenth",
    "same-rate": "RECAP, the head at the rate of the rest",
    "per-kind-mask": "RECAP, layers compete for the mask",
    "earlier": "RECAP, earlier defaults",
    "no-warmup": "RECAP without head warm-up",
    "two-warmups": "RECAP, head warm-up of two epochs",
    "fresh-moments": "RECAP, moments not carried over",
    "global-mask": "RECAP, layers, heads and neurons compete for the mask",
    "per-example-mask": "RECAP, mask by per-example Fisher",
    "random-mask": "RECAP, mask at random",
    "moving-embeddings": "RECAP, embeddings move too",
    "moving-tokens": "RECAP, the rows of tokens of the training data move too",
    "still-embeddings": "the embeddings left as they are",
    "deep-ramp": "RECAP, `prune.ramp: 0.25`",
    "per-layer-prune": "RECAP, all layers pruned alike (`prune.scope: per-layer`)",
    "global-prune": "RECAP, all groups ranked together (`prune.scope: global`)",
    "higher-floor": "RECAP, `prune.floor: 0.3`",
    "compensated": "RECAP, the cut compensated (`prune.compensate: auto`)",
    "one-round": "RECAP, one round of all steps",
    "taught": "RECAP after half of the steps of LoRA, which teach it (`distill.teacher: lora`)",
    "taught-whole": "RECAP after half of the steps of full finetuning, which teach it (`distill.teacher: full`)",
    "flips": "RECAP, images flipped at random",
    "forward-only": "RECAP, pruned by `wanda`",
    "bf16": "RECAP, bf16 residents, checkpoints",
    "int8": "RECAP, int8 residents, checkpoints",
    "nf4": "RECAP, NF4 residents, checkpoints",
}
Cell = Mapping[str, Any]


# RECAP's row that others are held against: its rate and its r_f.
MAIN = {"cifar100": ("recap", 0.5), **dict.fromkeys(("sst2", "cola", "mrpc", "rte"), ("recap@4", 0.0))}
UNTUNED = ("cola", "mrpc", "rte")  # RECAP takes the rate that was its best on SST-2
EARLIER = ("earlier", 0.5)  # RECAP with the defaults that it had before
OTHERS = ("pre-ft", "post-ft")
VARIED = {  # settings that a method may have in its best row
    "same-rate": "head too",
    "still-embeddings": "embeddings still",
    "global-prune": "one ranking",
    "late-settled": "longer ramp",
}
Row = tuple[str, float | None]  # variant, r_f


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The text of benchmarks/pages/quality.md."""
    found, held = results("quality"), results("held_out")
    parts = [HEAD, rates_tried(found), in_short(found), held_out(found, held)]
    for task, figures in found.items():
        parts += section(task, figures)
    return "\n".join(parts)


def results(name: str) -> dict[str, Any]:
    """What was found on each task, where there is anything."""
    paths = {task: RESULTS / f"{name}_{task}.json" for task in TASKS}
    return {task: json.loads(path.read_text(encoding="utf-8")) for task, path in paths.items() if path.exists()}


class Contest(NamedTuple):
    """RECAP at one r_f beside `OTHERS`, each at the best of its rates; `found` is all that was found on the task."""

    task: str
    ratio: float
    mask_ratio: float
    sides: list[list[Cell]]
    found: Mapping[str, Any]


def contests(found: Mapping[str, Mapping[str, Any]], *, tuned: bool = False) -> Iterator[Contest]:
    """RECAP beside pruning before and after finetuning, wherever all three were run; `tuned` also where its rate was tried on a
    task that nothing was to be tuned on.
    """
    for task, figures in found.items():
        for ratio, mine in by_ratio(figures["cells"]):
            others = [best_of(mine, name) for name in OTHERS]
            for mask_ratio in sorted({cell["mask_ratio"] for cell in mine} - {None}, reverse=True):
                tried = [cell for cell in mine if cell["mask_ratio"] == mask_ratio and (tuned or not is_tuned(cell, task))]
                if all(sides := [best_of(tried, "recap"), *others]):
                    yield Contest(task, ratio, mask_ratio, sides, figures)


def rates_tried(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How many peak rates each method had on each task, and whether its best is at the edge of them."""
    lines = []
    for task, figures in found.items():
        done = [cell for cell in figures["cells"] if cell["status"] == "done"]
        for name in dict.fromkeys(method_of(cell["variant"]) for cell in done):
            mine = [cell for cell in done if method_of(cell["variant"]) == name]
            rows = [of for ratio in {cell["prune_ratio"] for cell in mine} for of in by_row(of_ratio(mine, ratio)).values()]
            tried = sorted({rate_of(cell["variant"], figures["lr"]) for cell in mine})
            known = [of for of in rows if len(of) >= min(3, max(map(len, rows)))]
            top = max(known, key=lambda of: fmean(cell["last"] for cell in of))
            best = rate_of(top[0]["variant"], figures["lr"])
            where = "one rate" if len(tried) == 1 else "at the edge" if best in (tried[0], tried[-1]) else "inside"
            lines.append([task, name, len(tried), ", ".join(f"{rate:g}" for rate in tried), f"{best:g}", len(top), where])
    head = ["task", "method", "rates", "tried, in any of its settings", "at the best row", "its seeds", "its best is"]
    return f"{RATES}\n{table(head, lines)}\n"


def of_ratio(cells: Sequence[Cell], ratio: float | None) -> list[Cell]:
    """The cells of one r_p, None for those that have none."""
    return [cell for cell in cells if cell["prune_ratio"] == ratio]


def rate_of(variant: str, usual: float) -> float:
    """The peak learning rate of a variant."""
    return usual * float(variant.partition("@")[2] or 1)


def in_short(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The contests on the data that settings were chosen by."""
    lines = []
    for task, ratio, mask_ratio, sides, figures in contests(found):
        line: list[object] = [task, f"{ratio:.1%}", f"{100 * mask_ratio:g}%", seeds_of(sides)]
        line += [f"{mean_of(of)} ({rates_of(of[0]['variant'], figures['lr'])})" for of in sides]
        line += [against(sides[0], of) for of in sides[1:]]
        lines.append([*line, *(f"{share_of(of):.0%}" for of in sides)])
    head = ["task", "r_p", "r_f", "seeds", "RECAP, % (rate)", *OTHERS, *(f"RECAP − {name}" for name in OTHERS), "RECAP holds"]
    return f"{SHORT}\n{table([*head, *(f'{name} holds' for name in OTHERS)], lines)}\n"


def held_out(found: Mapping[str, Mapping[str, Any]], held: Mapping[str, Mapping[str, Any]]) -> str:
    """The same contests, as far as their runs were scored, on examples that nothing was chosen by."""
    lines = []
    scorable = {task: of for task, of in found.items() if task in held}
    for task, ratio, mask_ratio, sides, figures in [*contests(scorable), *contests(scorable, tuned=True)]:
        metric = held[task]["metric"]
        scored = {key_of(cell): {**cell, "last": cell[metric]} for cell in held[task]["cells"]}
        ours, *others = [[scored[key] for cell in of if (key := key_of(cell)) in scored] for of in sides]
        if len(ours) < 2 or max(map(len, others)) < 2:
            continue
        seeds = seeds_of(of for of in (ours, *others) if of)
        line: list[object] = [task, f"{ratio:.1%}", f"{100 * mask_ratio:g}%", seeds, ours[0]["examples"]]
        rates = [rates_of(of[0]["variant"], figures["lr"]) for of in sides]
        line += [f"{mean_of(of)} ({rate})" if len(of) > 1 else "" for of, rate in zip((ours, *others), rates, strict=True)]
        line += [against(ours, of) for of in others]
        if line not in lines:
            lines.append(line)
    if not lines:
        return ""
    head = ["task", "r_p", "r_f", "seeds", "examples", "RECAP, % (rate)", *OTHERS, *(f"RECAP − {name}" for name in OTHERS)]
    sources = "\n".join(f"- {task}: {of['held_out']}." for task, of in held.items())
    return f"{HELD_OUT}\n{sources}\n\n{table(head, lines)}\n\n" + "\n".join(map(ran_on, held.values()))


def best_of(cells: Sequence[Cell], name: str) -> list[Cell]:
    """The cells of a method at the best of its rates, and of what is `VARIED`, of three seeds or more; of equals the plain."""
    mine = [of for (variant, _), of in by_row(cells).items() if method_of(variant) == name and len(of) > 2]
    found = [of for of in mine if set(settings_of(of[0]["variant"])) <= {name, *VARIED}]
    return max(
        found, key=lambda of: (round(fmean(c["last"] for c in of), 4), settings_of(of[0]["variant"]) == [name]), default=[]
    )


def settings_of(variant: str) -> list[str]:
    """The names that a variant is made of, without its rate."""
    return variant.partition("@")[0].split("+")


def is_tuned(cell: Cell, task: str) -> bool:
    """Whether a cell has a rate that was tried on a task that nothing was to be tuned on."""
    return task in UNTUNED and cell["variant"] != MAIN[task][0]


def by_ratio(cells: Sequence[Cell]) -> Iterator[tuple[float, list[Cell]]]:
    """The cells of each r_p, those of methods without one among all of them."""
    done = [cell for cell in cells if cell["status"] == "done"]
    for ratio in sorted({cell["prune_ratio"] for cell in done if cell["prune_ratio"] is not None}):
        yield ratio, [cell for cell in done if cell["prune_ratio"] in (None, ratio)]


def by_row(cells: Sequence[Cell]) -> dict[Row, list[Cell]]:
    """The cells of each row of a table, one a seed."""
    found: dict[Row, list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell["variant"], cell["mask_ratio"]), []).append(cell)
    return found


def mean_of(cells: Sequence[Cell]) -> str:
    """The mean of the last round, in points, ± its standard error."""
    last = [100 * cell["last"] for cell in cells]
    return f"{fmean(last):.1f} ± {stdev(last) / len(last) ** 0.5:.1f}"


def rates_of(variant: str, usual: float) -> str:
    """The peak learning rate of a variant, and what else is another way."""
    rate = f"{rate_of(variant, usual):g}"
    return ", ".join([rate, *(said for setting, said in VARIED.items() if setting in settings_of(variant))])


def seeds_of(rows: Iterable[Sequence[Cell]]) -> str:
    """How many seeds there are, or the fewest and the most."""
    counts = sorted({len(cells) for cells in rows})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def held_of(cells: Sequence[Cell]) -> int:
    """The most bytes of weights, gradients and optimizer state that any of the cells held."""
    return max(sum(cell["memory"][f"{kind}_bytes"] for kind in KINDS) for cell in cells)


def share_of(cells: Sequence[Cell]) -> float:
    """What was held, as a share of full finetuning's: fp32 weights, gradients and two moments."""
    return held_of(cells) / (16 * cells[0]["parameters"]["full"])


def section(task: str, found: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a task: one for each r_p, methods without one in all of them."""
    cells = [cell for cell in found["cells"] if cell["status"] == "done"]
    yield f"## {TASKS[task]}\n"
    steps = sorted({cell["steps"] for cell in cells})
    taken = " / ".join(map(str, steps))
    usual = f"a peak rate of {found['lr']:g}, after one epoch of head warm-up"
    yield f"{taken} AdamW steps of 32; but where a row says otherwise at {usual}.\n"
    for ratio, mine in by_ratio(cells):
        yield f"### r_p = {ratio:.1%}\n"
        yield table(HEADER, list(rows(mine, MAIN[task]))) + "\n"
    if peaks := found.get("predicted"):
        yield predicted(peaks)
    if lost := [cell for cell in found["cells"] if cell["status"] != "done"]:
        yield "Not done: " + "; ".join(f"{cell['variant']}, seed {cell['seed']}: {cell['error']}" for cell in lost) + "\n"
    if note := found.get("note"):
        yield f"{note}\n"
    yield ran_on(found)


def predicted(peaks: Sequence[Cell]) -> str:
    """Predicted peaks of a training step, each beside full finetuning with the library's settings and the same batch."""
    whole = {
        p["micro_batch_size"]: p["peak_bytes"] for p in peaks if (p["method"], p["settings"]) == ("full-ft", "as it comes")
    }
    names = [
        [
            *(p["method"], f"{p['prune_ratio']:.1%}", p["settings"], p["micro_batch_size"], f"{p['peak_bytes'] / 1e6:.1f}"),
            f"{p['peak_bytes'] / whole[p['micro_batch_size']]:.0%}",
        ]
        for p in peaks
    ]
    head = ["method", "r_p", "settings", "examples a backward", "peak, MB", "of full as it comes"]
    return "Memory of a training step, *predicted* (fp32, r_f = 50 %):\n\n" + table(head, names) + "\n"


HEADER = [
    *("variant", "r_f", "last round, %", "± s.d.", "± s.e.", "against RECAP, paired", "product, %", "each seed", "held, MB"),
    *("of full", "peak, MB"),
]


def rows(cells: Sequence[Cell], base: Row) -> Iterator[list[object]]:
    """A row a variant, the best first; differences are to RECAP's row `base`, or to that of its earlier defaults."""
    found = by_row(cells)
    for row, mine in sorted(found.items(), key=lambda item: -fmean(cell["last"] for cell in item[1])):
        variant, mask_ratio = row
        last = [100 * cell["last"] for cell in mine]
        deviation = stdev(last) if len(last) > 1 else None
        peaks = [cell["memory"]["peak_bytes"] for cell in mine if cell["memory"].get("peak_bytes")]
        ours = EARLIER if was_earlier(row, base) and EARLIER in found else twin_of(row, found, base)
        difference = "" if row == ours else against(mine, found.get(ours, ()))
        mark = " (e)" if ours == EARLIER else "" if ours == base else " (s)"
        yield [
            f"**{said(variant)}**" if row == base else said(variant),
            "" if mask_ratio is None else f"{100 * mask_ratio:g}%",
            f"{fmean(last):.1f}",
            "" if deviation is None else f"{deviation:.1f}",
            "" if deviation is None else f"{deviation / len(last) ** 0.5:.1f}",
            f"{difference}{mark}" if difference else "",
            f"{fmean(100 * cell['value'] for cell in mine):.1f}",
            " / ".join(f"{value:.1f}" for value in last),
            f"{held_of(mine) / 1e6:.1f}",
            f"{share_of(mine):.0%}",
            f"{max(peaks) / 1e6:.0f}" if peaks else "",
        ]


def was_earlier(row: Row, base: Row) -> bool:
    """Whether a row was measured beside RECAP with its earlier defaults: it has one of them, or the rate that was usual then
    and is not that of `base`.
    """
    return bool({"earlier", "same-rate", "per-kind-mask"} & {*settings_of(row[0])}) or (row[0] == "recap" != base[0])


def twin_of(row: Row, found: Mapping[Row, Any], base: Row) -> Row:
    """RECAP's row at the rate and the r_f of one of its variants, which differs from it in its settings alone; else `base`."""
    names, _, times = row[0].partition("@")
    twin = (f"recap@{times}" if times else "recap", row[1])
    return twin if row[1] is not None and names != "recap" and twin in found else base


def against(cells: Sequence[Cell], others: Sequence[Cell]) -> str:
    """The mean difference of `cells` to `others`, in points, over the seeds that both have, ± its standard error."""
    theirs = {cell["seed"]: cell["last"] for cell in others}
    found = [100 * (cell["last"] - theirs[cell["seed"]]) for cell in cells if cell["seed"] in theirs]
    if len(found) < 2:
        return ""
    return f"{fmean(found):+.1f} ± {stdev(found) / len(found) ** 0.5:.1f}"


def said(variant: str) -> str:
    """What a variant is, in words."""
    names, _, times = variant.partition("@")
    first, *others = names.split("+")
    more = [SAID[name].removeprefix("RECAP, ").removeprefix("RECAP ") for name in others]
    return ", ".join([SAID[first], *more, *([f"rate × {times}"] if times else [])])


HELD_OUT = """## Held out

The models of the last rounds above, scored by `benchmarks/held_out.py` on examples that no run was trained on and no rate, r_f
or default was chosen by. The standard error of one accuracy by that of its examples alone is 0.6 (of 4,000) to 0.9 points (of
1,725); those below are over the seeds. The phrases of SST-2 have 7 words on average, its validation sentences 20. Of MRPC's
1,725 test pairs 245 share one of their two sentences with a training pair, and none shares both.
"""

KINDS = ("weights", "gradients", "optimizer")
HEAD = """# Quality

What RECAP gives beside other methods for the same number of optimizer steps, and what each of its settings is worth. Written
by `python benchmarks/quality_page.py` from what `benchmarks/quality.py` measured: pretrained weights, real data, small models
and few steps, as a CPU can bear. The paper's own setting (20 epochs of 50,000 images, ViT-base) was not run.

- *Last round* is the metric after the last optimizer step; *product* that of the best round, which is chosen on the same
  validation data, and flatters methods that have several rounds to choose from. Compare by the first.
- *± s.d.* is the sample standard deviation over the seeds, *± s.e.* that divided by the root of their number. A seed changes
  the training examples, the head and every draw.
- *Against RECAP* is the mean difference, seed by seed, ± its standard error: to the row of RECAP that is set in bold, or, with
  *(e)*, to that with its earlier defaults at r_f = 50 % (the head at the rate of the rest, layers competing for the mask), or,
  with *(s)*, to that at the same r_f and rate.
- *Held* is weights, gradients and optimizer state as measured, the most of all rounds, with `fused_backward`, which frees
  each gradient as it is used. *Of full* is its share of 16 bytes a parameter: weights, gradients and both moments in fp32,
  held at once, as full finetuning has them as it comes. *Peak* is predicted for a training step on CUDA: held, and the
  activations of 32 examples without checkpoints.
- What is not measured: most variants on more than one of the tasks, and some that `benchmarks/quality.py` knows on none.
- Nothing was tuned on CoLA, MRPC and RTE: RECAP has 4e-4 and r_f = 0, `post-ft` 2e-4, their best on SST-2; `pre-ft` has 2e-4
  too, though 4e-4 was better by 0.3 ± 0.6 on SST-2 at r_p = 50 %. On CoLA and RTE no method learns in so few steps (one seed of
  most), and they say nothing. On MRPC other settings of RECAP were tried afterwards.
- With three seeds a difference of two standard errors may well be chance. Of many variants the best one is flattered: they
  were all looked at on the data they were chosen by.
- Methods share one learning rate on a task, but where a row says otherwise. It was chosen by one-seed trials of several methods
  on CIFAR-100, and by hand for texts. It need not be the best of each, and full finetuning's it was not, by 6 points. For texts
  1e-4, 2e-4 and 4e-4 were tried on SST-2 at r_p = 50 %. The head has 1e-3 but where a row says otherwise, and a new one is
  warmed up before.
- Where two machines stand below a table, it was not kept which cell ran on which. The same seed gives other figures on another
  machine or by another commit: `post-ft` on CIFAR-100 at r_p = 33 % once had 51.8 / 49.0 / 52.2 and has 50.5 / 50.1 / 53.4,
  RECAP at r_f = 50 % had 54.9 / 55.3 / 55.0. Where it was so, a difference seed by seed is paired by its data alone.
- Many cells of CIFAR-100 and SST-2 were run by earlier commits, when defaults and names of variants were others: all that are
  compared with (e), and those that had today's defaults set by hand. The commands are those that do it now.
- `pre-ft` and `post-ft` train the embeddings too, RECAP leaves them as they are: in MiniLM they are half of the parameters,
  and much of the difference in what is held. On CIFAR-100 it is much of the difference in accuracy too: `post-ft` that leaves
  them (*embeddings still*) is better. On texts this was tried on SST-2 at r_p = 50 % alone, and with `pre-ft` on CIFAR-100 at
  r_p = 50 % alone, with all groups in one ranking.
- *Longer ramp* is `prune.hold_plan: 0.25`: of four rounds the third is then the first at the last r_p, else it is the second.
- Full, head and LoRA finetuning prune nothing, and stand in the tables of every r_p. Movement pruning was tried at r_p = 33 %
  alone.
- What RECAP *holds* of a text is of runs that held every row of the token table, but for those whose tokens move. By now it
  holds the rows that the data use: on SST-2 at r_f = 0 29 % of full finetuning's memory at r_p = 33 %, where 38 % stands below,
  and 23 % at r_p = 50 %, where 32 % does ([benchmarks.md](benchmarks.md#rows-of-the-token-table)). It computes the same, to the
  bit on the CPU.
- Cells with averaged importance were run before it was averaged by what is ranked together.
"""

RATES = """## Rates that were tried

A method that was tried at one rate, or is best at the edge of those it was tried at, may be better than it stands here. That is
no small matter: full finetuning stood at 57.4 % on CIFAR-100 as long as 5e-4 was its only rate, and has 63.7 % at 2e-4. Run
again beside it, on one machine, 5e-4 gave 56.2 %.
The last rates of RECAP, `post-ft`, full finetuning and LoRA, at r_p = 33 %, have one seed where the tables below show one.
"""

SHORT = """## In short

The mean of the last round ± its standard error over so many seeds, at the best of the peak rates that the method was tried at
(in parentheses), and RECAP's on MRPC at a rate of SST-2. The best may have, as far as that was run, the head at the rate of the
rest, all groups in one ranking (`prune.scope: global`), `pre-ft` and `post-ft` the embeddings left as they are, and RECAP a
longer ramp (`prune.hold_plan: 0.25`).
Rate and settings were chosen by these figures, which flatters every method by as much as it had to choose from. All take the
same number of optimizer steps. The paper's r_f is 50 % for texts and 87.5 % for images; at r_f = 0 everything is trainable but
the embeddings. Differences are over the seeds that both have. What is held is a share of full finetuning's.
"""


if __name__ == "__main__":
    main()
