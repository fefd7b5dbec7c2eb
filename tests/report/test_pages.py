"""The page of a comparison: well-formed, complete by itself, everything escaped, failures shown as such."""

import random
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from recap_cli.compare.metric_plots import name_of
from recap_cli.compare.schema import groups, metric_of
from recap_cli.core.task import Metric
from recap_cli.report import pages
from recap_cli.report.template import duration
from tests.report.drawing import boxes, figure_of, heights, marks, on_a_line

ACCURACY = Metric("accuracy")
VOID = {"meta", "link", "br", "img", "hr", "input"}
SHAPES_OF_SVG = {"path", "rect", "line", "circle"}
NASTY = "<script>alert('x')</script>\"&"
FULL = 86_567_656
MEMORY = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
HEADLINE: dict[str, tuple[float, float, float]] = {  # accuracy, share of the weights held, share that is trained
    "full-ft": (0.912, 1.0, 1.0),
    "head-ft": (0.741, 1.0, 0.001),
    "lora-ft": (0.894, 1.01, 0.01),
    "pre-ft": (0.861, 0.68, 0.68),
    "post-ft": (0.874, 1.0, 1.0),
    "movement": (0.852, 1.0, 1.0),
    "recap": (0.898, 0.68, 0.34),
}


def cell(method: str, seed: int, prune: float | None = None, mask: float | None = None) -> dict[str, Any]:
    """A cell that is done, with numbers that look like those of a ViT-B."""
    accuracy, weights, trained = HEADLINE[method]
    dice = random.Random(f"{method} {seed} {prune} {mask}")
    value = accuracy - 0.22 * (prune or 0.0) ** 2 - 0.05 * (mask or 0.0) ** 3 + dice.gauss(0, 0.006)
    if method in ("pre-ft", "recap"):
        weights, trained = 1 - 0.97 * (prune or 0.0), (1 - 0.97 * (prune or 0.0)) * (1 - (mask or 0.0))
    held = int(FULL * 4 * weights), int(FULL * 4 * trained), int(FULL * 8 * trained)
    activations = int(1.4e9 * weights)
    product = int(FULL * (1 - (prune or 0.0) * 0.98))
    rounds = 1 if prune is None else 5
    return {
        "method": method,
        "prune_ratio": prune,
        "mask_ratio": mask,
        "seed": seed,
        "settings": {"method": method, "seed": seed},
        "state": f"cells/{method}-{prune}-{mask}-{seed}",
        "status": "done",
        "error": None,
        "value": value,
        "last": value - abs(dice.gauss(0, 0.002)),
        "product_round": rounds,
        "per_round": [value - 0.1 * (rounds - 1 - r) / rounds for r in range(rounds)],
        "steps": 4500,
        "seconds": {"init": 12.0, "prune": 60.0 * rounds, "mask": 20.0 * rounds, "finetune": 2400 * weights, "merge": 3.0},
        "memory": {
            **dict(zip(("weights_bytes", "gradients_bytes", "optimizer_bytes"), held, strict=True)),
            "activations_bytes": activations,
            "peak_bytes": int(sum(held) * 0.97) + activations,
            "device_peak_bytes": int(sum(held) * 0.99) + activations,
        },
        "parameters": {"full": FULL, "product": product, "trainable": int(FULL * trained)},
        "product": {"bytes": product * 4, "latency_seconds": 0.03 + 0.05 * product / FULL, "latency_batch": 16},
    }


def without_result(found: dict[str, Any], status: str, error: str | None) -> dict[str, Any]:
    gone = dict.fromkeys(("value", "last", "product_round", "steps", "memory", "parameters", "product"))
    return {**found, **gone, "status": status, "error": error, "per_round": [], "seconds": dict.fromkeys(found["seconds"])}


def sample() -> dict[str, Any]:
    """What `recap compare` writes, of seven methods and three seeds, with a cell that failed and one that is impossible."""
    seeds = (0, 1, 2)
    cells = [cell(method, seed) for method in ("full-ft", "head-ft", "lora-ft") for seed in seeds]
    for prune in (0.25, 0.5, 0.75):
        cells += [cell(method, seed, prune) for method in ("pre-ft", "post-ft", "movement") for seed in seeds]
        cells += [cell("recap", seed, prune, mask) for mask in (0.3, 0.7) for seed in seeds]
    at = next(i for i, one in enumerate(cells) if one["method"] == "recap" and one["prune_ratio"] == 0.5 and one["seed"] == 1)
    cells[at] = without_result(cells[at], "failed", "TrainingError: the loss of step 217 is not finite")
    error = "SelectionError: no plan keeps 10% of the prunable parameters with at least 15% of each layer; prune.floor=0.05"
    cells += [without_result(cell("recap", seed, 0.9, 0.3), "impossible", error) for seed in seeds]
    return {
        "schema": 1,
        "kind": "comparison",
        "recipe": "vit-cifar100",
        "metric": "accuracy",
        "better": "more",
        "task": "image-classification",
        "created": "2026-11-24T21:04:11+00:00",
        "versions": {"recap": "0.1.0", "python": "3.11.7", "torch": "2.14.1"},
        "machine": {"cores": 16, "cpu": "Xeon", "ram_gib": 128, "system": "Linux", "accelerator": "NVIDIA H100"},
        "command": "recap compare vit-cifar100 --prune-ratios 0.25 0.5 0.75 0.9 --mask-ratios 0.3 0.7 --seeds 0 1 2 --out cmp",
        "total_steps": 4500,
        "grid": {
            "methods": list(HEADLINE),
            "ratios": [0.25, 0.5, 0.75, 0.9],
            "mask_ratios": [0.3, 0.7],
            "seeds": list(seeds),
        },
        "cells": cells,
    }


def page_of(found: dict[str, Any]) -> str:
    return pages.results_page({**found, "place": "results.json", "groups": list(groups(found["cells"], metric_of(found)))})


@cache
def sample_page() -> str:
    return page_of(sample())


class Reader(HTMLParser):
    """Reads a page: its tags in order, that each is closed, its text, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def loads(self) -> Iterator[str]:
        for tag, attributes in self.tags:
            yield from (f"{tag} {value}" for name, value in attributes.items() if name in ("src", "srcset", "action", "data"))
            if tag == "link":
                yield str(attributes["href"])


def read(text: str) -> Reader:
    """The page, read, after what holds of every page is checked."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert [one for one in reader.loads() if not one.startswith("img data:image/")] == ["data:,"]
    assert "http:" not in text.lower()
    assert "https:" not in text.lower()
    assert "@import" not in text
    assert len(text.encode()) < 1_000_000
    assert not {"script", "iframe", "object"} & {tag for tag, _ in reader.tags}
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    hrefs = [str(attributes["href"]) for tag, attributes in reader.tags if tag == "use"]
    assert {*re.findall(r"url\(([^)]*)\)", text), *hrefs} <= {f"#{name}" for name in ids}
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r'(?:fill|stroke)[:=]"?(?!none|url|var)', figures), "a dark page would not know the colour"
    assert re.search(r"^svg \{[^}]*fill: var\(--c000000\)", text, re.MULTILINE), "matplotlib leaves black out, as SVG's own"
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--[\w-]+):", text))
    for tag, attributes in reader.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")
        if tag in SHAPES_OF_SVG:
            assert not any("nan" in str(value) or "inf" in str(value) for value in attributes.values())
    return reader


def test_a_comparison_shows_the_result_first_and_what_has_none() -> None:
    text = sample_page()
    reader = read(text)
    said = " ".join(" ".join(reader.text).split())
    assert said.index("Result") < said.index("Cells without a result") < said.index("Every cell")
    assert "the loss of step 217 is not finite" in said
    assert "impossible: SelectionError" in said
    assert "(1 failed)" in said
    assert "recap compare vit-cifar100" in said
    assert text.count("Pareto front") > 1


def test_means_and_deviations_are_those_of_the_seeds_that_are_done() -> None:
    found = {"method": "pre-ft", "prune_ratio": 0.5, "mask_ratio": None, "status": "done", "error": None, "steps": 10}
    parts: dict[str, Any] = {name: cell("pre-ft", 0, 0.5)[name] for name in ("seconds", "memory", "parameters", "product")}
    cells = [{**found, **parts, "value": value} for value in (0.5, 0.7)]
    cells.append({**cells[0], "status": "failed", "value": None, "error": "no"})
    (group,) = groups(cells, ACCURACY)
    assert (group["n"], group["statuses"]["failed"], group["errors"]) == (2, 1, ["no"])
    assert group["value"] == pytest.approx(0.6)
    assert group["deviation"] == pytest.approx(0.02**0.5)
    assert group["held_bytes"] == sum(cells[0]["memory"][f"{kind}_bytes"] for kind in ("weights", "gradients", "optimizer"))
    said = "".join(read(page_of({**sample(), "cells": [{**cell("pre-ft", 0, 0.5), **one} for one in cells]})).text)
    assert "0.6000 ± 0.1414" in said


def test_whatever_is_named_is_escaped() -> None:
    found = sample()
    found |= dict.fromkeys(("recipe", "metric", "task", "command", "created", "recipe_text"), NASTY)
    found |= {name: {NASTY: NASTY} for name in ("versions", "machine", "grid")}
    for one in found["cells"]:
        one |= {"method": NASTY, "state": NASTY, "error": NASTY}
    text = page_of(found)
    assert NASTY not in "".join(read(text).text[:1])
    assert "<script" not in text


@pytest.mark.parametrize("count", [0, 1])
def test_few_cells_give_a_page_too(count: int) -> None:
    found = sample()
    found["cells"] = found["cells"][:count]
    assert ("There are no cells" in page_of(found)) == (count == 0)
    read(page_of(found))


@pytest.mark.parametrize("status", ["waiting", "failed", "impossible"])
def test_a_comparison_without_any_result_says_so(status: str) -> None:
    found = sample()
    found["cells"] = [without_result(one, status, None) for one in found["cells"]]
    said = "".join(read(page_of(found)).text)
    assert f"{len(found['cells'])} {status}" in said
    assert ("The comparison is not over" in said) == (status == "waiting")


def test_missing_parts_of_a_cell_are_left_empty() -> None:
    found = sample()
    for one in found["cells"]:
        one |= {name: dict.fromkeys(one[name] or ()) for name in ("seconds", "memory", "parameters", "product")}
    page_of({**found, "cells": [{**found["cells"][0], "memory": {}}]})
    done = [one for one in found["cells"] if one["status"] == "done"]
    read(page_of({**found, "cells": done}))


def test_latency_is_in_milliseconds_and_what_is_held_a_share_of_full_finetuning() -> None:
    found = sample()
    found["cells"] = [found["cells"][0]]
    found["cells"][0]["memory"] |= {"full_held_bytes": FULL * 16, "held_share": 0.34567}
    found["cells"][0]["product"]["latency_seconds"] = 0.2134
    text = page_of(found)
    assert text.count("<td>213 ms</td>") == 2  # of the result and of the sizes
    assert text.count("<td>34.6%</td>") == 2  # of the result and of the memory
    widths = [len(re.findall(r"<t[dh]\b", row)) for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)]
    assert widths[0] == widths[1]  # the head of the result, and its row


def test_a_row_without_a_result_is_as_wide_as_one_with() -> None:
    found = sample()
    found["cells"] = [without_result(found["cells"][0], "failed", "no")]
    head, row = re.findall(r"<tr.*?</tr>", page_of(found), re.DOTALL)[:2]
    (spanned,) = re.findall(r'colspan="(\d+)"', row)
    assert len(re.findall(r"<t[dh]\b", head)) == len(re.findall(r"<t[dh]\b", row)) - 1 + int(spanned)


def test_there_is_no_chart_over_a_ratio_of_one_value() -> None:
    found = sample()
    assert "accuracy over r_p" in page_of(found)
    assert "accuracy over r_f" in page_of(found)
    few = [one for one in found["cells"] if one["prune_ratio"] in (None, 0.5) and one["mask_ratio"] in (None, 0.3)]
    page = page_of({**found, "cells": few})
    assert "accuracy over r_" not in page
    assert "accuracy over memory" in page


def test_results_that_are_the_same_are_on_the_front_together() -> None:
    found = sample()
    twins = [{**cell(method, 0), "value": 0.99, "memory": cell("head-ft", 0)["memory"]} for method in ("full-ft", "lora-ft")]
    assert page_of({**found, "cells": twins}).count("★</abbr>") == 2


def test_marks_stand_where_their_values_say_and_say_their_values() -> None:
    text = sample_page()
    rows = {name_of(row): row for row in groups(sample()["cells"], ACCURACY) if row["value"] is not None}
    drawing = figure_of(text, "accuracy over memory, with the Pareto front")
    found = {name.partition(":")[0]: (name, *place) for name, place in marks(drawing).items()}
    assert found.keys() == rows.keys()
    for name, (said, _, _) in found.items():
        row = rows[name]
        size = row["memory"]["device_peak_bytes"]
        assert said == f"{name}: {row['value']:.4f} ± {row['deviation']:.4f}, {size / 1e6:,.1f} MB"
    ticks = [(float(label), y - 4.2) for label, y in heights(drawing).items()]  # a number stands that far below its middle
    assert on_a_line(ticks + [(rows[name]["value"], y) for name, (_, _, y) in found.items()])
    assert on_a_line([(rows[name]["memory"]["device_peak_bytes"] / 1e6, x) for name, (_, x, _) in found.items()])


def test_lines_over_a_ratio_go_through_the_values() -> None:
    rows = {name_of(row): row for row in groups(sample()["cells"], ACCURACY) if row["value"] is not None}
    found = marks(figure_of(sample_page(), "accuracy over r_p"))
    names = {said.partition(":")[0]: place for said, place in found.items()}
    assert names.keys() == rows.keys()  # those without the ratio are level, with a mark at the end
    assert on_a_line([(rows[name]["value"], y) for name, (_, y) in names.items()])


@pytest.mark.parametrize(
    "label", ["memory by component, of each method at its ratios", "time by stage, of each method at its ratios"]
)
def test_parts_of_bars_are_as_long_as_their_amounts(label: str) -> None:
    rows = [row for row in groups(sample()["cells"], ACCURACY) if row["value"] is not None]
    amounts = {}
    for row in rows:
        parts: list[tuple[str, Any]] = [(f"{row['memory'][key] / 1e6:,.1f} MB", row["memory"][key] / 1e6) for key in MEMORY]
        names = ["weights", "gradients", "optimizer state", "activations (predicted)"]
        if label.startswith("time"):
            names, parts = [*row["seconds"]], [(duration(seconds), seconds) for seconds in row["seconds"].values()]
        for name, (said, amount) in zip(names, parts, strict=True):
            amounts[f"{name_of(row)}: {name} {said}"] = amount
    found = boxes(figure_of(sample_page(), label))
    assert found.keys() == amounts.keys()
    assert on_a_line([(amounts[said], right - left) for said, (left, right) in found.items()])


def test_figures_are_the_same_bytes_each_time() -> None:
    assert page_of(sample()) == sample_page()


def test_a_name_of_any_length_and_letters_is_drawn() -> None:
    found = sample()
    names = {
        "pre-ft": "方法の名前" * 20,
        "post-ft": "a very long name " * 20,
        "movement": "x\x01y<b>$a_1$",
        "recap": "two\nlines",
    }
    for one in found["cells"]:
        one["method"] = names.get(one["method"], one["method"])
    said = "".join(read(page_of(found)).text)
    assert "x?y<b>$a_1$" in said
    assert "方法の名前" * 5 in said


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, ""), (0.0123, "12.3 ms"), (4.25, "4.2 s"), (125, "2 min 05 s"), (11040, "3 h 04 min")]
)
def test_times_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said
