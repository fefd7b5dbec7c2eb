"""The documentation is true: commands parse, keys and files exist, tables agree with the code, examples work as they stand."""

import json
import re
import runpy
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
from recap_cli.compare.grid import Grid, plan
from recap_cli.compare.runner import compare
from recap_cli.core.adapter import find_axes
from recap_cli.core.axes import mask_axes
from recap_cli.core.importance import group_scores
from recap_cli.errors import PipeError
from recap_cli.models import build
from recap_cli.recipe import recipe as recipes
from recap_cli.recipe.recipe import dump, json_schema, parse, read, shipped
from recap_cli.rounds.examples import read_raw
from recap_cli.rounds.frozen_weights import frozen_weight_of
from recap_cli.rounds.plans import round_plans_for
from recap_cli.rounds.run_context import Context
from recap_cli.stages.run import run
from recap_cli.state.store import State
from recap_cli.tasks.calls import task_named
from recap_cli.tasks.losses import mean_loss
from tests.calls import here
from tests.pico import TEXT, logits_for, pico
from tests.strange import ADAPTERS, strange
from tests.tiny import data_folder, tiny

ROOT = Path(__file__).parents[1]
PLACES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "benchmarks/README.md", "benchmarks/pages/*.md")
PAGES = [page for place in PLACES for page in sorted(ROOT.glob(place))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WRITTEN = [name for name in NAMES if name not in ("docs/reference/cli.md", "docs/reference/recipe.md")]  # by hand
HUMAN = r"(-?[\d.]+) ± ([\d.]+)"


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
            words = shlex.split(part.partition(" > ")[0], comments=True)
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


def test_every_subcommand_stands_on_a_page_that_is_written_by_hand():
    subcommands = {words[0] for name, words in commands() if name in WRITTEN}
    every: Any = get_command(app)
    assert subcommands >= set(every.commands)
    assert {words[0] for name, words in commands() if name == "README.md"} >= {"run", "export", "compare", "profile-memory"}


def test_every_command_in_the_documentation_parses():
    assert [(name, problem) for name, words in commands() if (problem := wrong_with(words))] == []


def test_a_wrong_command_would_be_found():
    assert wrong_with(["run", "quickstart", "--stat", "x"]) is not None
    assert wrong_with(["prunes"]) is not None


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_the_two_commands_are_those_of_the_readme_and_the_second_is_what_ci_runs(name):
    lines = "".join(blocks(name, "sh")).splitlines()
    (command,) = [line for line in lines if "pytest" in line]
    assert command in [line.partition("#")[0].strip() for line in text_of(".ci/run").splitlines()]
    assert lines[0] == "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/recap run quickstart"
    assert lines[0] in blocks("docs/guide/install.md", "sh")[0]


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


def test_own_data_as_the_guide_has_them_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f'"text {i}, and more",{1 + i % 5}' for i in range(50)]
    Path("reviews.csv").write_text("\n".join(["review,stars", *lines]) + "\n")
    shutil.copytree(data_folder() / "train", "FOLDER")
    own = [words for name, words in commands() if name == "docs/guide/own-data.md" and "--state" in words]
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
            rooms = (ROOT, ROOT / "recap_cli", ROOT / "docs", (ROOT / name).parent)
            assert any((room / place).exists() for room in rooms), place


def test_code_that_is_named_with_its_file_is_defined_there():
    named = [
        (place, code) for name in WRITTEN for code, place in re.findall(r"(`\w+`(?:, `\w+`)*) in `([\w/]+\.py)`", text_of(name))
    ]
    assert len(named) > 10  # those of the glossary
    for place, code in named:
        file = next(file for room in ("recap_cli", ".") if (file := ROOT / room / place).exists())
        for word in re.findall(r"`(\w+)`", code):
            assert re.search(rf"^(?:(?:class|def) )?{word}\b", file.read_text(encoding="utf-8"), re.MULTILINE), (place, word)


def test_the_page_of_recipes_names_every_shipped_one_and_no_page_names_another():
    named = {name: set(re.findall(r"`((?:bert|vit|mask2former|camvid)_[a-z0-9_]+)`", text_of(name))) for name in NAMES}
    every = {recipe.name for recipe in shipped()}
    assert named["docs/guide/paper.md"] | {"quickstart"} == every
    assert {name: unknown for name, found in named.items() if (unknown := found - every)} == {}
    assert "quickstart" in text_of("README.md")
    assert "`quickstart`" in text_of("docs/guide/paper.md")


def shorter(monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    """Let the recipe of the quickstart say another thing than it does."""
    plain = recipes.shipped_text
    assert plain("quickstart").count(old) == 1
    monkeypatch.setattr(recipes, "shipped_text", lambda name: plain(name).replace(old, new))


def test_the_stages_of_the_guide_run_one_by_one_as_they_stand_there(tmp_path, monkeypatch, capfd):
    lines = blocks("docs/guide/stages.md", "sh")[0].splitlines()
    assert [line.split()[1] for line in lines] == ["init", "prune", "status", "mask", "finetune", "merge", "eval"]
    monkeypatch.chdir(tmp_path)
    shorter(monkeypatch, "epochs: 8", "epochs: 0.2")
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    capfd.readouterr()
    assert main(["status", lines[0].split()[-1]]) == 0
    said = {" ".join(line.split()) for line in "".join(capfd.readouterr()).splitlines()}
    for name in ("README.md", "docs/quickstart.md"):  # the heads of their tables are those that are printed today
        heads = [line for line in "".join(blocks(name, "text")).splitlines() if line.split()[:1] == ["round"]]
        assert {" ".join(head.split()) for head in heads} <= said, name
        assert heads


def test_the_page_of_plugins_names_every_one_of_ours_and_that_of_methods_every_method():
    ours = {kind: {each.name for each in registry.entries(kind) if each.distribution == "recap-cli"} for kind in registry.KINDS}
    kinds = "|".join(registry.KINDS)
    rows = re.findall(rf"^\| ({kinds}) \| (.+) \|$", text_of("docs/plugins/index.md"), re.MULTILINE)
    assert {kind: set(re.findall(r"`([a-z0-9-]+)`", names)) for kind, names in rows} == ours
    table = text_of("docs/guide/compare.md").partition("## The methods")[2].partition("\n\n**")[0]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE)) == ours["methods"]


def test_the_papers_figures_on_the_page_of_recipes_are_those_of_the_recipes():
    row_form = r"^\| `(\w+)` \| Table \d \| (.+) \| ([\d.]+), (\d+) MB \| ([\d.]+), (\d+) MB \|$"
    rows = re.findall(row_form, text_of("docs/guide/paper.md"), re.MULTILINE)
    of_paper = [recipe.name for recipe in shipped() if "Table" in (ROOT / "recipes" / f"{recipe.name}.yaml").read_text("utf-8")]
    assert {row[0] for row in rows} == {name for name in of_paper if not name.endswith(("ft", "movement"))}
    for row in rows:
        name, metric, value, memory, full_value, full_memory = row
        head = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        assert f"(paper: {metric} {value} %; full finetuning {full_value} %)" in head
        assert f"(paper: {memory} MB at batch size 1; full finetuning {full_memory} MB)" in head


def test_the_memory_figures_of_the_home_page_are_those_of_the_benchmark():
    results = json.loads(text_of("benchmarks/results/partial_memory.json"))["results"]
    peaks = {(row["way"], row["trains"]): f"{row['measured_bytes']['peak'] / 1e6:.0f} MB" for row in results}
    dense, rows = peaks["dense gradients × mask (the authors)", "rows"], peaks["ours, rows in both", "rows"]
    table = text_of("docs/index.md")
    assert f"| masked dense gradients | {dense} |" in table
    assert f"| here, the same rows trainable | {rows} |" in table
    assert f"| here, whole neurons trainable, as RECAP's mask chooses them | {peaks['ours', 'neurons']} |" in table
    text = " ".join(text_of("README.md").split())
    assert f"peaks at {rows} where masked dense gradients take {dense}" in text


def test_the_figures_of_the_results_page_are_those_of_the_notebook():
    rows = [line.split("|") for line in text_of("benchmarks/pages/quality.md").splitlines() if line.startswith("|")]
    known = {(row[3].strip(), row[5].strip()) for row in rows if len(row) > 6}  # the last round, and its standard error
    table = text_of("docs/results.md").partition("## On data")[0]
    shown = [pair for line in table.splitlines() if line.startswith("|") for pair in re.findall(HUMAN, line)]
    assert len(shown) > 15
    assert [pair for pair in shown if pair not in known] == []


def test_the_one_table_of_the_readme_is_from_the_results_page():
    text, results = text_of("README.md"), text_of("docs/results.md")
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len([table for table in tables if "±" in table]) == 1
    figures = re.findall(HUMAN, text)
    assert len(figures) >= 7
    assert [figure for figure in figures if " ± ".join(figure) not in results] == []
    for held, accuracy in re.findall(r"\| (\d+ %) \| \**([\d.]+ ± [\d.]+) %", text):  # side by side, as on the page
        assert re.search(rf"{accuracy}\W[^|]*\| {held}", results), (accuracy, held)


def test_make_bench_runs_benchmarks_that_are_there_and_the_page_names_them():
    names = re.search(r"^BENCHMARKS = (.+)$", text_of("Makefile"), re.MULTILINE)[1].split()
    page = text_of("benchmarks/README.md")
    for name in names:
        assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name
        assert f"`python benchmarks/{name}.py" in page, name
        assert f"`{name}`" in page.partition("| command")[0], name


def test_the_readme_is_a_front_door():
    assert 120 <= len(text_of("README.md").splitlines()) <= 150


def test_the_page_on_installing_names_every_extra():
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    table = text_of("docs/guide/install.md").partition("## Extras")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) >= set(extras)


def test_the_page_of_commands_is_what_its_script_makes_of_their_help():
    written = runpy.run_path(str(ROOT / "scripts" / "cli_reference.py"))["reference"]()
    assert text_of("docs/reference/cli.md") == written, "run `make pages`"


def kinds_of_error() -> set[type[errors.RecapError]]:
    found = {errors.RecapError, PipeError}
    return found | {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RecapError)}


def test_the_table_of_exit_codes_is_that_of_the_errors():
    rows = re.findall(r"^\| (\d+) \| (\S*) ?\| (.+) \|$", text_of("docs/reference/errors.md"), flags=re.MULTILINE)
    wanted = {(str(kind.exit_code), f"`{kind.__name__}`", str(kind.__doc__).splitlines()[0]) for kind in kinds_of_error()}
    assert {row for row in rows if row[1]} == wanted
    assert [int(row[0]) for row in rows] == sorted([0, INTERRUPTED, *(kind.exit_code for kind in kinds_of_error())])


PLUGINS = [f"docs/plugins/{page}.md" for page in ("index", "criterion", "adapter", "method", "weights")]


@pytest.fixture
def extra(tmp_path, monkeypatch) -> Path:
    """The package of docs/plugins, its files as they stand there, installed in a folder of its own."""
    files = {file: block for page in PLUGINS for file, block in named_blocks(page).items()}
    project = tomllib.loads(files["pyproject.toml"])["project"]
    others = [tomllib.loads(block) for page in ("method", "weights") for block in blocks(f"docs/plugins/{page}.md", "toml")]
    _, decoders = map(tomllib.loads, blocks("docs/plugins/adapter.md", "toml"))
    others.append(decoders)
    modules = ("extra", "activation", "headstart", "decoders", "int4")
    for name in (f"recap_{module}.py" for module in modules):
        (tmp_path / name).write_text(files[name], encoding="utf-8")
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups: dict[str, dict[str, str]] = {}
    for one in (project, *(other["project"] for other in others)):
        for group, named in one["entry-points"].items():
            groups.setdefault(group, {}).update(named)
    points = "".join(
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in named.items()) for group, named in groups.items()
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


def test_the_method_of_the_documentation_is_compared_on_texts(extra, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "run", here)
    recipe = tmp_path / "texts.yaml"
    recipe.write_text(dump(tiny("bert")), encoding="utf-8")
    results = compare(plan(str(recipe), asked=Grid(["recap", "headstart"], seeds=[0])), tmp_path / "out")
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
    forward, task = logits_for(spec), task_named(spec.task_kind)

    def losses(each):
        for seed in (0, 1):
            batch = build.example_batch(spec, seed=seed)
            yield mean_loss(task, forward(model, batch), {"labels": torch.tensor([0, 2])})[0], 0.5

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

    vit, llama = pico("vit"), strange("llama-grouped")
    for model, spec, axes in (
        (*vit, find_axes(build.adapter_of(vit[1]), vit[0])),
        (*llama, find_axes(ADAPTERS["llama-grouped"], llama[0])),
    ):
        scored_in_both_sizes(model, spec, axes, recap_activation.ACTIVATION)


def scored_in_both_sizes(model, spec, axes, criterion):
    for sizes in (axes, mask_axes(axes)):
        scores = group_scores(model, sizes, criterion, losses_of(model, spec))
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
        "finetune": {"steps": 2, "batch_size": 8, "weights": "int4"},
    }
    state: State = run(parse(yaml.safe_dump(recipe), "docs/plugins/index.md"), tmp_path / "state")
    used = {(plugin["kind"], plugin["name"], plugin["distribution"]) for plugin in state.manifest.plugins["used"]}
    assert used == {
        ("methods", "recap", "recap-cli"),
        ("tasks", "text-classification", "recap-cli"),
        ("weights", "int4", "recap-extra"),
        ("criteria", "abs-taylor", "recap-extra"),
        ("adapters", "megatron-bert", "recap-extra"),
    }
    assert state.manifest.best is not None
    entry = next(entry for entry in state.manifest.history if entry["stage"] == "finetune")
    assert entry["evaluated_in"] == "int4"


def test_the_frozen_weight_of_the_documentation_is_near_the_weight(extra):
    weights = frozen_weight_of("int4")
    matrix = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    out = torch.empty(40, 64)
    weights.dense(weights.quantize(matrix), out)
    assert float((out - matrix).norm() / matrix.norm()) < 0.12
    assert weights.entry_bytes == 0.5 + 2 / 32
    assert not weights.holds((40, 50))


GROUPED = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 48},
    **{"vocab_size": 80, "max_position_embeddings": 40, "pad_token_id": 0},
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_the_adapter_for_decoders_of_the_documentation_prunes_whole_groups_of_queries(extra, tmp_path, model_type):
    config = {"model_type": model_type, **GROUPED, "tokenizer": str(data_folder() / "tokenizer")}
    state: State = run(tiny("bert", rounds=1, model={"config": config}), tmp_path / "state")
    context = Context(state)
    plan, small = context.plan("best-001"), state.load_tensors("best-001/model.safetensors")
    for layer in (0, 1):
        kept, attention = int(plan[f"model.layers.{layer}.heads"].sum()), f"model.layers.{layer}.self_attn"
        assert 0 < kept < 4 or plan["model.layers.0.heads"].sum() + plan["model.layers.1.heads"].sum() < 8
        rows = {name: small[f"{attention}.{name}_proj.weight"].shape[0] for name in "qkv"}
        assert rows == {"q": 8 * kept, "k": 4 * kept, "v": 4 * kept}
    assert context.layout.whole == frozenset()
    assert ("adapters", model_type, "recap-extra") in {
        (plugin["kind"], plugin["name"], plugin["distribution"]) for plugin in state.manifest.plugins["used"]
    }


def test_the_table_for_swin_of_the_documentation_is_the_one_that_is_tested():
    from recap_cli import api

    (text,) = [
        block for block in blocks("docs/plugins/adapter.md", "python") if block.startswith("Heads(") and "blocks" in block
    ]
    assert eval(text, {name: getattr(api, name) for name in api.__all__}) == registry.load("adapters", "swin").tables[0]


def test_the_short_examples_of_criterion_and_adapter_are_plugins():
    made: dict[str, Any] = {}
    points: dict[str, Any] = {}
    for page in ("docs/plugins/criterion.md", "docs/plugins/adapter.md"):
        example = next(block for block in blocks(page, "python") if "recap_cli.api" in block)
        assert len([line for line in example.splitlines() if line.strip()]) <= 15
        exec(example, made)
        points |= tomllib.loads(blocks(page, "toml")[0])["project"]["entry-points"]
    assert isinstance(made["ABS_TAYLOR"], Criterion)
    assert isinstance(made["MEGATRON_BERT"], Adapter)
    assert points == tomllib.loads(named_blocks("docs/plugins/index.md")["pyproject.toml"])["project"]["entry-points"]


def test_the_picture_is_plain_svg_without_anything_from_elsewhere():
    from xml.etree import ElementTree

    text = text_of("docs/loop.svg")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r'(?:href="(?!#)|url\((?!#)|<script|@import)', text) == []


def test_the_page_on_states_names_all_settings_that_may_be_changed() -> None:
    from recap_cli.rounds.settings import EXECUTION

    text = text_of("docs/reference/state.md")
    listed = text[text.index("how something is computed and not what:") : text.index("So a stage that ran out of memory")]
    assert set(re.findall(r"`([a-z_.]+)`", listed)) == set(EXECUTION)


def test_the_page_on_states_names_all_files_of_a_round() -> None:
    from recap_cli.rounds import record

    files = {record.PLAN, record.IMPORTANCE, record.COMPENSATION, record.MASK, record.ROWS, record.SCORES}
    files |= {record.METRICS, record.MEMORY, record.LOOKS}
    page = text_of("docs/reference/state.md")
    tree = page.partition("  round-001/\n")[2].partition("  round-002/")[0]
    assert set(re.findall(r"^    (\S+)", tree, re.MULTILINE)) == files
    table = page.partition("## What each stage does to it")[2].partition("`small` are")[0]
    named = set(re.findall(r"`(?:round-NNN/)?(\w+)`", table)) - {"init", "prune", "mask", "finetune", "merge"} | {"mask"}
    written = (record.PLAN, record.SMALL, record.COMPENSATION, record.MASK, record.ROWS, record.TRAINED, record.MOMENTS)
    stems = {file.partition(".")[0] for file in written}
    assert named == stems
