"""The documentation is true: commands parse, keys and files exist, tables agree with the code, examples work as they stand."""

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

from recap_cli import errors, registry
from recap_cli.api import Adapter, Criterion
from recap_cli.cli import INTERRUPTED, app, main
from recap_cli.compare import processes
from recap_cli.compare.grid import plan
from recap_cli.compare.runner import compare
from recap_cli.core.adapter import find_axes
from recap_cli.core.axes import refine
from recap_cli.core.importance import group_scores
from recap_cli.errors import PipeError
from recap_cli.models import build
from recap_cli.recipe.recipe import dump, json_schema, parse, read, shipped
from recap_cli.rounds.examples import read_raw
from recap_cli.rounds.plans import round_plans_for
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.tasks import task
from tests.pico import TEXT, pico
from tests.tiny import data_folder, tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(name), flags=re.MULTILINE | re.DOTALL)


def named_blocks(name: str) -> dict[str, str]:
    """The code blocks that open with a comment that names a file, by that name."""
    found = [*blocks(name, "python"), *blocks(name, "toml")]
    return {match[1]: block for block in found if (match := re.match(r"# (\S+\.(?:py|toml))\n", block))}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `recap …` of a shell block, and every one between backticks that has a subcommand, with its page."""
    for name in NAMES:
        lines = "".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in re.split(r"\||&&", line)]
        parts += re.findall(r"`(recap [a-z][^`\n]*)`", text_of(name)) if name != "CHANGELOG.md" else []
        for part in parts:
            words = shlex.split(part, comments=True)
            if words and words[0].rpartition("/")[2] == "recap" and words[1:] and "…" not in part:
                yield name, words[1:]


def wrong_with(words: list[str]) -> str | None:
    """What the command line parser has to say against the words after `recap`; nothing is run."""
    command: Any = get_command(app)
    path, rest = ["recap"], list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            return None if not rest else f"there is no command {' '.join([*path, rest[0]])}"
        path.append(rest.pop(0))
        command = command.commands[path[-1]]
    if command.name == "run" or rest:
        try:
            command.make_context(" ".join(path), rest)
        except Exception as error:  # noqa: BLE001 (the parser's own, whose module is private to Typer)
            return f"{' '.join(path)}: {error}"
    return None


def test_there_are_commands_to_check():
    subcommands = {words[0] for name, words in commands() if name == "README.md"}
    assert subcommands >= {"run", "init", "prune", "mask", "finetune", "merge", "status", "eval", "export", "recipes"}


def test_every_command_in_the_documentation_parses():
    assert [(name, problem) for name, words in commands() if (problem := wrong_with(words))] == []


def test_a_wrong_command_would_be_found():
    assert wrong_with(["run", "quickstart", "--stat", "x"]) is not None
    assert wrong_with(["prunes"]) is not None


def test_the_test_command_of_the_readme_is_what_ci_runs():
    (command,) = [line for line in "".join(blocks("README.md", "sh")).splitlines() if "pytest" in line]
    assert command in [line.partition("#")[0].strip() for line in text_of(".ci/run").splitlines()]


def keys_of(schema: dict[str, Any]) -> set[str]:
    found = set()
    for name, value in schema["properties"].items():
        section = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
        found |= {name, *(f"{name}.{key}" for key in section.get("properties", {}))}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_key_that_is_named_exists(name):
    known = keys_of(json_schema())
    sections = {key.partition(".")[0] for key in known if "." in key}
    text = text_of(name)
    used = set(re.findall(r"--set ([a-z_.]+)=", text))
    quoted = re.findall(r"`([a-z_]+\.[a-z_]+)(?:(?:=|: )[^`]*)?`", text)
    used |= {key for key in quoted if key.partition(".")[0] in sections and not key.endswith((".json", ".yaml", ".py"))}
    used -= {"section.key"}  # what the recipe reference says of keys as such
    assert {key for key in used if key not in known and not key.startswith("model.config.")} == set()


def test_every_overridden_recipe_of_the_documentation_is_a_recipe():
    for _, words in commands():
        if words[0] in ("run", "init") and len(words) > 1 and words[1] in {recipe.name for recipe in shipped()}:
            read(words[1], [words[i + 1] for i, word in enumerate(words) if word == "--set"])


def test_own_data_as_the_readme_has_them_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f'"text {i}, and more",{1 + i % 5}' for i in range(50)]
    Path("reviews.csv").write_text("\n".join(["review,stars", *lines]) + "\n")
    shutil.copytree(data_folder() / "train", "FOLDER")
    own = [words for name, words in commands() if name == "README.md" and "--state" in words and words[0] == "run"]
    given = [(words[1], [words[i + 1] for i, word in enumerate(words) if word == "--set"]) for words in own]
    reviews, flowers = (read_raw(read(recipe, sets)) for recipe, sets in given if any("data.train" in value for value in sets))
    assert reviews.label_names == ["1", "2", "3", "4", "5"]
    assert (len(reviews.train), len(reviews.validation)) == (45, 5)
    assert flowers.label_names == ["cat", "dog", "newt"]
    assert len(flowers.train) > len(flowers.validation) > 0


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        place = page if not path else page.parent / path
        assert place.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", place.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_project_that_are_named_exist(name):
    for place in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text_of(name)):
        written = ("full-", "round-", "best-", "runs/", "small/")
        if not place.startswith(written) and re.search(r"/$|\.(py|json|md|svg|yaml)$", place):
            assert (ROOT / place).exists() or (ROOT / "recap_cli" / place).exists(), place


def test_the_readme_names_every_shipped_recipe_and_no_other():
    named = set(re.findall(r"`((?:bert|vit)_[a-z0-9_]+)`", text_of("README.md")))
    assert named | {"quickstart"} == {recipe.name for recipe in shipped()}
    assert "quickstart" in text_of("README.md")


def test_the_stages_of_the_readme_run_one_by_one_as_they_stand_there(tmp_path, monkeypatch):
    section = text_of("README.md").partition("## Stage by stage")[2]
    lines = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)[0].splitlines()
    assert [line.split()[1] for line in lines] == ["init", "prune", "status", "mask", "finetune", "merge", "eval"]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line


def test_the_readme_names_every_plugin_of_ours():
    ours = {entry.name for kind in registry.KINDS for entry in registry.entries(kind) if entry.distribution == "recap-cli"}
    assert ours <= set(re.findall(r"`([a-z0-9-]+)`", text_of("README.md")))


def test_the_papers_figures_in_the_readme_are_those_of_the_recipes():
    row_form = r"^\| `(\w+)` \| Table \d \| (.+) \| ([\d.]+), (\d+) MB \| ([\d.]+), (\d+) MB \|$"
    rows = re.findall(row_form, text_of("README.md"), re.MULTILINE)
    assert len(rows) == len([recipe for recipe in shipped() if not recipe.name.endswith(("ft", "movement"))]) - 1
    for row in rows:
        name, metric, value, memory, full_value, full_memory = row
        head = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"(paper: {metric} {value} %; full finetuning {full_value} %)" in head
        assert f"(paper: {memory} MB at batch size 1; full finetuning {full_memory} MB)" in head


def test_the_readmes_memory_figures_are_those_of_the_benchmark():
    results = json.loads(text_of("benchmarks/results/partial_memory.json"))["results"]
    peaks = {(row["way"], row["trains"]): f"{row['measured_bytes']['peak'] / 1e6:.0f} MB" for row in results}
    text = " ".join(text_of("README.md").split())
    assert f"{peaks['dense gradients × mask (the authors)', 'rows']} with masked dense gradients" in text
    assert f"{peaks['ours, rows in both', 'rows']} with the same rows moving here" in text
    assert f"{peaks['ours', 'neurons']} with whole neurons moving" in text


def kinds_of_error() -> set[type[errors.RecapError]]:
    found = {errors.RecapError, PipeError}
    return found | {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RecapError)}


def test_the_table_of_exit_codes_is_that_of_the_errors():
    rows = re.findall(r"^\| (\d+) \| (\S*) ?\| (.+) \|$", text_of("docs/errors.md"), flags=re.MULTILINE)
    wanted = {(str(kind.exit_code), f"`{kind.__name__}`", str(kind.__doc__).splitlines()[0]) for kind in kinds_of_error()}
    assert {row for row in rows if row[1]} == wanted
    assert [int(row[0]) for row in rows] == sorted([0, INTERRUPTED, *(kind.exit_code for kind in kinds_of_error())])


@pytest.fixture
def extra(tmp_path, monkeypatch) -> Path:
    """The package of docs/plugins.md, its two files as they stand there, installed in a folder of its own."""
    files = named_blocks("docs/plugins.md")
    project = tomllib.loads(files["pyproject.toml"])["project"]
    _, method = map(tomllib.loads, blocks("docs/plugins.md", "toml"))
    (tmp_path / "recap_extra.py").write_text(files["recap_extra.py"], encoding="utf-8")
    (tmp_path / "recap_activation.py").write_text(files["recap_activation.py"], encoding="utf-8")
    (tmp_path / "recap_headstart.py").write_text(files["recap_headstart.py"], encoding="utf-8")
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in named.items())
        for group, named in {**project["entry-points"], **method["project"]["entry-points"]}.items()
    )
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_plugins_of_the_documentation_are_found_and_loaded(extra):
    assert isinstance(registry.load("criteria", "abs-taylor"), Criterion)
    assert isinstance(registry.load("adapters", "megatron-bert"), Adapter)
    assert registry.used("adapters", "megatron-bert")["distribution"] == "recap-extra"


def test_the_method_of_the_documentation_plans_round_plans(extra, monkeypatch):
    import recap_headstart

    monkeypatch.setattr("recap_cli.rounds.plans.method_of", lambda _: recap_headstart.HEADSTART)
    first, *others = round_plans_for(tiny("vit", options={"head_share": 0.4}, rounds=3))
    assert (first.trains, first.share, first.product) == ("head", 0.4, False)
    assert [round_plan.share for round_plan in others] == pytest.approx([0.2] * 3)
    assert [round_plan.lr_window[1] for round_plan in others] == pytest.approx([0.6, 0.8, 1.0])


def here(waiting: list[processes.Process], _jobs: int) -> Iterator[processes.Ended]:
    """What `processes.run` does, by calls in this process."""
    for one in waiting:
        code = main(list(one.command)[list(one.command).index("recap_cli") + 1 :])
        yield processes.Ended(one.name, f"it ended with {code}" if code else None)


def test_the_method_of_the_documentation_is_compared_on_texts(extra, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "run", here)
    recipe = tmp_path / "texts.yaml"
    recipe.write_text(dump(tiny("bert", rounds=3)), encoding="utf-8")
    results = compare(plan(str(recipe), methods=["recap", "headstart"], seeds=[0]), tmp_path / "out")
    ours, theirs = results["cells"]
    assert [(cell["method"], cell["status"], cell["error"]) for cell in results["cells"]] == [
        ("recap", "done", None),
        ("headstart", "done", None),
    ]
    assert (theirs["prune_ratio"], theirs["mask_ratio"]) == (ours["prune_ratio"], ours["mask_ratio"]) == (0.4, 0.6)
    assert (theirs["steps"], len(theirs["per_round"])) == (ours["steps"], len(ours["per_round"]) + 1)
    assert theirs["memory"]["peak_bytes"] > 0
    assert theirs["product"]["bytes"] > 0
    assert results["notes"] == []


def losses_of(model, spec):
    """A D_s of two batches."""
    forward = build.forward(spec)

    def losses(each):
        for seed in (0, 1):
            batch = build.example_batch(spec, seed=seed)
            yield task.loss(forward(model, batch), torch.tensor([0, 2])), 0.5

    return losses


def test_the_criterion_of_the_documentation_scores_groups(extra):
    model, spec = pico("bert")
    axes, losses = find_axes(build.adapter_of(spec), model), losses_of(model, spec)
    scores = group_scores(model, axes, registry.load("criteria", "abs-taylor"), losses)
    sum(loss * share for loss, share in losses(False)).backward()
    axis = next(axis for axis in axes if axis.kind == "neurons")
    params = dict(model.named_parameters())
    products = {name: (param * param.grad).abs() for name, param in params.items() if param.grad is not None}
    last = sum(products[cut.param].select(cut.dim, -1).sum() for cut in axis.cuts)
    torch.testing.assert_close(scores[axis.name][-1], torch.as_tensor(last).detach())


def test_the_activation_criterion_of_the_documentation_scores_groups_of_both_sizes(extra):
    import recap_activation

    model, spec = pico("vit")
    axes = find_axes(build.adapter_of(spec), model)
    for sizes in (axes, [refine(axis) for axis in axes]):
        scores = group_scores(model, sizes, recap_activation.ACTIVATION, losses_of(model, spec))
        assert all(scores[axis.name].shape == (axis.size,) and bool((scores[axis.name] > 0).all()) for axis in sizes)


def test_the_plugins_of_the_documentation_run_a_round(extra, tmp_path):
    root = data_folder()
    recipe = {
        "name": "extra",
        "rounds": 1,
        "model": {"config": {"model_type": "megatron-bert", **TEXT, "tokenizer": str(root / "tokenizer")}},
        "task": {"kind": "text-classification"},
        "data": {
            "train": str(root / "train.csv"),
            "validation": str(root / "validation.csv"),
            "text": "sentence",
            "max_length": 16,
        },
        "importance": {"batches": 1, "batch_size": 8},
        "prune": {"criterion": "abs-taylor", "ratio": 0.5, "steps": 2},
        "mask": {"criterion": "abs-taylor", "ratio": 0.5},
        "finetune": {"steps": 2, "batch_size": 8},
    }
    state: State = run(parse(yaml.safe_dump(recipe), "docs/plugins.md"), tmp_path / "state")
    used = {(plugin["kind"], plugin["name"], plugin["distribution"]) for plugin in state.manifest.plugins["used"]}
    assert used == {
        ("methods", "recap", "recap-cli"),
        ("criteria", "abs-taylor", "recap-extra"),
        ("adapters", "megatron-bert", "recap-extra"),
    }
    assert state.manifest.best is not None


def test_the_short_examples_of_the_readme_are_plugins():
    made: dict[str, Any] = {}
    for block in blocks("README.md", "python"):
        if "recap_cli.api" in block:
            exec(block, made)
    assert isinstance(made["ABS_TAYLOR"], Criterion)
    assert isinstance(made["MEGATRON_BERT"], Adapter)
    points = tomllib.loads(next(block for block in blocks("README.md", "toml")))["project"]["entry-points"]
    assert points == tomllib.loads(named_blocks("docs/plugins.md")["pyproject.toml"])["project"]["entry-points"]
    examples = [block for block in blocks("README.md", "python") if "recap_cli.api" in block]
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 15 for block in examples)


def test_the_picture_is_plain_svg_without_anything_from_elsewhere():
    from xml.etree import ElementTree

    text = text_of("docs/loop.svg")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r'(?:href="(?!#)|url\((?!#)|<script|@import)', text) == []


def test_the_page_on_states_names_all_settings_that_may_be_changed() -> None:
    from recap_cli.rounds.settings import EXECUTION

    text = text_of("docs/state.md")
    listed = text[text.index("how something is computed and not what:") : text.index("So a stage that ran out of memory")]
    assert set(re.findall(r"`([a-z_.]+)`", listed)) == set(EXECUTION)
