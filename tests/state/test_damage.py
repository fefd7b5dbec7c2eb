"""A damaged state: whatever stands in its files, the next command refuses it, or works; and nothing on disk is lost."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from recap_cli.cli import main
from recap_cli.core.method import RoundPlan
from recap_cli.errors import CorruptStateError, ModelError
from recap_cli.report.report import of_state
from recap_cli.rounds.run_context import Context
from recap_cli.rounds.status import summary
from recap_cli.stages.eval import evaluate
from recap_cli.stages.finetune import finetune
from recap_cli.stages.init import init
from recap_cli.stages.mask import mask
from recap_cli.stages.merge import merge
from recap_cli.stages.prune import prune
from recap_cli.stages.run import run
from recap_cli.state.files import checksum
from recap_cli.state.manifest import checksummed, manifest_text, read_manifest
from recap_cli.state.store import State
from tests.tiny import tiny

STAGES: dict[str, Callable[[State], object]] = {"prune": prune, "mask": mask, "finetune": finetune, "merge": merge}
FLIPS, JSON_PLACES, EACH = 50, 8, 3  # the fuzzing draws many more
SEED = 14
RECIPE = {"prune": {"steps": 1, "ema": 0.5}, "mask": {"train_embeddings": "tokens"}}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A state after each stage of its first round, by the stage that comes next."""
    root = tmp_path_factory.mktemp("states")
    state = init(tiny("bert", **RECIPE), root / "now")
    found = {}
    for name, stage in STAGES.items():
        found[name] = root / name
        shutil.copytree(root / "now", found[name])
        stage(state)
    (root / "now").rename(root / "prune 2")
    return {**found, "prune 2": root / "prune 2"}


@pytest.fixture
def damaged(states: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the states, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(states[name], tmp_path / "state"))

    return copy


def contents(root: Path) -> dict[str, bytes]:
    found = (file for file in root.rglob("*") if file.is_file() and file.name != ".recap-lock")
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in found}


# --- state.yaml itself -----------------------------------------------------------------------------------------------


def cuts(text: bytes) -> Iterator[bytes]:
    lines = text.splitlines(keepends=True)
    yield from (b"".join(lines[:count]) for count in (*range(0, len(lines), EACH), len(lines) - 1))


def deletions(text: bytes) -> Iterator[bytes]:
    lines = text.splitlines(keepends=True)
    yield from (b"".join(lines[:at] + lines[at + 1 :]) for at in (*range(1, len(lines), EACH), len(lines) - 1))


def flips(text: bytes) -> Iterator[bytes]:
    drawn = random.Random(SEED)
    for _ in range(FLIPS):
        at, bit = drawn.randrange(len(text)), drawn.randrange(8)
        yield text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]


def edits(text: bytes) -> Iterator[bytes]:
    yield text + b"\n"
    yield text + b"# a note of mine\n"
    yield text.replace(b"round: 1", b"round: 2", 1)
    yield text.replace(b"\n", b"\r\n")


@pytest.mark.parametrize("damages", [cuts, deletions, flips, edits], ids=lambda damages: damages.__name__)
def test_a_damaged_state_yaml_is_refused_and_not_one_file_is_lost(
    damages: Callable[[bytes], Iterator[bytes]], damaged: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged("prune 2")
    place, before = path / "state.yaml", contents(path)
    for text in damages(before["state.yaml"]):
        place.write_bytes(text)
        codes = main(["status", str(path)]), main(["prune", str(path)])
        after = contents(path)
        assert after.keys() - {".recap-lock"} == before.keys(), f"lost {before.keys() - after.keys()} by {text!r}"
        assert {**after, "state.yaml": b""} == {**before, "state.yaml": b""}
        assert codes == (11, 11), text
        assert "recap init RECIPE --state NEW" in capsys.readouterr().err


class Stop(Exception):
    """Ends a stage once its draft is open, when all sweeping is done."""


def forged(text: bytes) -> Iterator[bytes]:
    """Lines deleted and lines doubled, under a checksum that is right."""
    body = text.decode().splitlines(keepends=True)[:-1]
    for at in range(len(body)):
        yield checksummed("".join(body[:at] + body[at + 1 :])).encode()
        yield checksummed("".join([*body[: at + 1], *body[at:]])).encode()


@pytest.mark.parametrize("name", ["merge", "prune 2"])
def test_another_state_yaml_under_a_right_checksum_is_refused_or_works_and_not_one_file_is_lost(
    name: str, damaged: Callable[[str], Path]
) -> None:
    path = damaged(name)
    place, before = path / "state.yaml", contents(path)
    refused = 0
    for text in forged(before["state.yaml"]):
        place.write_bytes(text)
        try:
            state = State.open(path)
            summary(state)
            Context(state).round_plans  # noqa: B018  (what every stage asks for)
            with state.writing(name.removesuffix(" 2")):
                raise Stop
        except Stop:
            pass
        except CorruptStateError:
            refused += 1
        assert contents(path) == {**before, "state.yaml": text}
    assert refused > 200


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (0, {"round_plans": []}, r"history\[0\]\.round_plans is"),
        (0, {"round_plans": None}, r"history\[0\]\.round_plans is"),
        (0, {"round_plans": [{**RoundPlan().to_json(), "warp": 1}]}, r"history\[0\]\.round_plans\.0\.warp is"),
        (0, {"notes": [1]}, r"history\[0\]\.notes\.0 is"),
        (0, {"head_new": "yes"}, r"history\[0\]\.head_new is"),
        (0, {"label_places": "no"}, r"history\[0\]\.label_places is"),
        (0, {"label_words": 1}, r"history\[0\]\.label_words is"),
        (0, {"threads": "all"}, r"history\[0\]\.threads is"),
        (0, {"metric": "speed"}, r"history\[0\]\.metric is"),
        (0, {"chance": {"accuracy": 0.5}}, r"history\[0\]\.chance\.loss is"),
        (0, {"warmed_up": {"loss": 0.5}}, r"history\[0\]\.warmed_up\.accuracy is"),
        (0, {"budget": {"memory_budget": "1GB"}}, r"history\[0\]\.budget\.changes is"),
        (1, {"kept": {"heads": 4}}, r"history\[1\]\.kept\.heads is"),
        (1, {"of": {"neurons": [32, 32]}}, r"history\[1\]\.of is"),
        (1, {"of": {"heads": [4], "neurons": [32]}}, r"history\[1\]\.of is"),
        (1, {"of": {"heads": [1, 1], "neurons": [1, 1]}}, r"history\[1\]\.of is"),
        (1, {"params_full": 0}, r"history\[1\]\.params_full is"),
        (3, {"weights_bytes": [1]}, r"history\[3\]\.weights_bytes is"),
        (3, {"accuracy": "high"}, r"history\[3\]\.accuracy is"),
        (3, {"metric": "beauty"}, r"history\[3\]\.beauty is"),
        (3, {"metric": "f1"}, r"history\[3\]\.metric is"),
        (3, {"full_finetuning": {}}, r"history\[3\]\.full_finetuning\.weights_bytes is"),
    ],
)
def test_facts_of_a_stage_that_make_no_sense_are_named(
    stage: int, changes: Mapping[str, Any], message: str, damaged: Callable[[str], Path]
) -> None:
    path = damaged("prune 2")
    manifest = read_manifest(path)
    manifest.history[stage] |= changes
    (path / "state.yaml").write_text(manifest_text(manifest))
    for look in (summary, Context):
        with pytest.raises(CorruptStateError, match=message):
            look(State.open(path))


@pytest.mark.parametrize("key", ["threads", "chance", "metric"])
def test_a_fact_of_init_that_is_not_there_is_named_by_every_stage(key: str, damaged: Callable[[str], Path]) -> None:
    path = damaged("prune 2")
    manifest = read_manifest(path)
    del manifest.history[0][key]
    (path / "state.yaml").write_text(manifest_text(manifest))
    for look in (summary, Context, mask):
        with pytest.raises(CorruptStateError, match=rf"history\[0\]\.{key} is missing"):
            look(State.open(path))


@pytest.mark.parametrize(
    "gone", ["full-001/model.safetensors", "full-001/layout.json", "best-001/plan.safetensors", "round-001/mask.safetensors"]
)
def test_a_state_yaml_that_leaves_out_what_must_be_there_is_refused(gone: str, damaged: Callable[[str], Path]) -> None:
    path = damaged("prune 2")
    manifest = read_manifest(path)
    files = {name: of for name, of in manifest.files.items() if name != gone}
    (path / "state.yaml").write_text(manifest_text(replace(manifest, files=files)))
    for look in (summary, Context):
        with pytest.raises(CorruptStateError, match=f"{gone} is not in files"):
            look(State.open(path))


# --- the files that it names, with checksums that are right ----------------------------------------------------------


def forge(path: Path, rel: str, data: bytes) -> State:
    """The state with other contents of a file, and checksums that agree with them."""
    (path / rel).write_bytes(data)
    manifest = read_manifest(path)
    text = manifest_text(replace(manifest, files={**manifest.files, rel: checksum(path / rel)}))
    (path / "state.yaml").write_text(text)
    return State.open(path)


def of_another_shape(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])


def of_another_type(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int64 if tensors[name].is_floating_point() else torch.float16)


def under_another_name(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"evil.{name}"] = tensors.pop(name)


def gone(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def all_gone(tensors: dict[str, Tensor], name: str) -> None:
    tensors.clear()


READ = [
    ("prune", "full-000/model.safetensors"),
    ("mask", "round-001/plan.safetensors"),
    ("mask", "round-001/small.safetensors"),
    ("finetune", "round-001/mask.safetensors"),
    ("merge", "round-001/trained.safetensors"),
    ("merge", "round-001/moments.safetensors"),
    ("merge", "round-001/rows.safetensors"),
]


CHANGES = (of_another_shape, of_another_type, under_another_name, gone, all_gone)
HARMLESS = [("round-001/moments.safetensors", all_gone)]  # as a rule without moments has it


@pytest.mark.parametrize(
    ("name", "rel", "change"), [(*read, change) for read in READ for change in CHANGES if (read[1], change) not in HARMLESS]
)
def test_tensors_that_no_stage_has_written_are_refused_whatever_their_checksum(
    name: str, rel: str, change: Callable[[dict[str, Tensor], str], None], damaged: Callable[[str], Path]
) -> None:
    path = damaged(name)
    tensors = load((path / rel).read_bytes())
    change(tensors, sorted(tensors)[0])
    state, before = forge(path, rel, save(tensors)), contents(path)
    with pytest.raises(CorruptStateError, match=rel) as caught:
        STAGES[name.removesuffix(" 2")](state)
    assert caught.value.hint
    assert contents(path) == before


BESIDE: dict[str, Callable[[State], object]] = {
    "full-001/moments.safetensors": lambda state: Context(state).full_moments(("exp_avg", "exp_avg_sq")),
    "round-001/importance.safetensors": lambda state: Context(state).importance("round-001"),
    "best-001/model.safetensors": lambda state: evaluate(state, which=["best"]),
}


@pytest.mark.parametrize("change", [of_another_shape, of_another_type, under_another_name, gone])
@pytest.mark.parametrize("rel", BESIDE)
def test_moments_importance_and_product_are_checked_too(
    rel: str, change: Callable[[dict[str, Tensor], str], None], damaged: Callable[[str], Path]
) -> None:
    path = damaged("prune 2")
    BESIDE[rel](State.open(path))
    tensors = load((path / rel).read_bytes())
    change(tensors, sorted(tensors)[0])
    state = forge(path, rel, save(tensors))
    with pytest.raises(CorruptStateError, match=rel):
        BESIDE[rel](state)


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON value."""
    yield place
    if isinstance(value, dict | list):
        for key, of in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(of, (*place, key))


def changed(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    if not place:
        return other
    copy: Any = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], other)
    return copy


def read_full(state: State) -> None:
    context = Context(state)
    context.adapter, context.processor(), context.layout  # each is read when it is asked for
    context.model(context.full_tensors())


@pytest.mark.parametrize(
    ("rel", "read"),
    [
        ("full-001/layout.json", read_full),
        ("full-001/spec.json", read_full),
        ("full-001/tokenizer_config.json", read_full),
        ("round-001/metrics.json", of_state),
        ("round-001/memory.json", of_state),
    ],
)
def test_facts_in_json_that_no_stage_has_written_are_refused_whatever_their_checksum(
    rel: str, read: Callable[[State], object], damaged: Callable[[str], Path]
) -> None:
    """Each value in turn is replaced by one of another type: refused, or it is of no consequence; never a bug."""
    path, drawn = damaged("prune 2"), random.Random(SEED)
    found = json.loads((path / rel).read_text())
    places = list(leaves(found))
    refused = 0
    for place in places if len(places) < JSON_PLACES else drawn.sample(places, JSON_PLACES):
        for other in (None, -1, "evil", [], {"a": 1}):
            try:
                read(forge(path, rel, json.dumps(changed(found, place, other)).encode()))
            except CorruptStateError:
                refused += 1
            except ModelError:  # a library or an adapter says that it knows no such model
                assert rel == "full-001/spec.json"
    assert refused >= 5
    for text in (b"", b"[" * 100_000, b"\xff", *([] if "tokenizer" in rel else [b'{"a": 1}', b"[]"])):
        with pytest.raises(CorruptStateError, match=rel.removesuffix("/tokenizer_config.json")):
            read(forge(path, rel, text))


# --- pipes -----------------------------------------------------------------------------------------------------------


def every_command(path: Path, out: Path, recipe: Path) -> list[list[str]]:
    """Each command that reads a state, on the one at `path`."""
    stages = ["status", "prune", "mask", "finetune", "merge", "eval", "report", "profile-memory"]
    commands = [[stage, str(path)] for stage in stages]
    commands += [["export", str(path), str(out)], ["run", "--state", str(path)]]
    return [*commands, ["run", str(recipe), "--state", str(path)]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes on this system")
def test_no_command_waits_for_a_pipe_in_the_place_of_a_file(damaged: Callable[[str], Path], tmp_path: Path) -> None:
    sound, recipe, paths = damaged("prune 2"), tmp_path / "recipe.yaml", [tmp_path / "first", tmp_path / "second"]
    shutil.copy(sound / "recipe.yaml", recipe)
    for path, rel in zip(paths, ("state.yaml", "recipe.yaml"), strict=True):
        shutil.copytree(sound, path)
        (path / rel).unlink()
        os.mkfifo(path / rel)
    before = [contents(path) for path in paths]
    codes = [main(command) for path in paths for command in every_command(path, tmp_path / "out", recipe)]
    assert codes == [CorruptStateError.exit_code] * 22  # and none of them waits: pytest's own limit would end it
    assert [contents(path) for path in paths] == before


# --- a finished state ------------------------------------------------------------------------------------------------


def test_a_finished_state_whose_product_was_altered_is_not_called_finished(tmp_path: Path) -> None:
    recipe = tiny("vit", rounds=1, prune={"steps": 1})
    state = run(recipe, tmp_path / "state")
    assert run(recipe, state.path).manifest == state.manifest
    place = state.path / "best-001/model.safetensors"
    data = place.read_bytes()
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptStateError, match=r"best-001/model\.safetensors: its sha256"):
        run(recipe, state.path)


@pytest.mark.parametrize(
    "name", ["bert.embeddings.position_ids", "bert.embeddings.token_type_ids"]
)  # one is looked up, one gathered
def test_an_index_of_a_buffer_that_no_table_has_is_said_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    state = init(tiny("bert", rounds=1), tmp_path / "state")
    rel = "full-000/buffers.safetensors"
    tensors = load((state.path / rel).read_bytes())
    forged = forge(state.path, rel, save({**tensors, name: 10_000 + tensors[name]}))
    before = contents(state.path)
    with pytest.raises(ModelError, match="the model looks up a row that it does not have") as caught:
        STAGES["prune"](forged)
    assert "restore the state from a copy" in str(caught.value.hint)
    assert contents(state.path) == before
