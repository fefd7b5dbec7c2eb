"""The task in words, for OneFormer: whose ids they are, that a state and an export keep them, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import recap_cli
from recap_cli.errors import ModelError
from recap_cli.models import build, create, prompts, spec_from_config, transformers_models
from recap_cli.models.checkpoints import quiet
from recap_cli.models.create import Created
from recap_cli.models.source import ModelSource
from recap_cli.models.specs import ModelSpec
from recap_cli.rounds.run_context import Context
from recap_cli.stages.export import export
from recap_cli.stages.run import run
from recap_cli.state.store import State
from tests.pico import source_for
from tests.segmentation import CONFIGS, LABELS, PROMPT, segmenter
from tests.tiny import tiny

VOCABULARY = 80
CONFIG = {"model_type": "oneformer", **CONFIGS["oneformer"], "text_encoder_vocab_size": VOCABULARY}
WHOLE = "abcdefghijklmnopqrstuvwxyz"
TEXT_MAPPER = {"text_encoder_width": 64, "text_encoder_num_layers": 1, "text_encoder_n_ctx": 2, "is_training": True}


def write_clip_tokenizer(folder: Path) -> Path:
    """Write the files of a CLIP tokenizer that has the letters, and a token for each word of the prompt."""
    tokens, merges = [*WHOLE, *(f"{letter}</w>" for letter in WHOLE)], list[str]()
    for word in PROMPT.split():
        first, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for part in rest:
            merges.append(f"{first} {part}")
            tokens.append(first := first + part)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


def checkpoint(folder: Path, **values: Any) -> Path:
    """Save a pico model with a tokenizer, as `save_pretrained` writes them."""
    kind = transformers.OneFormerConfig(**{**CONFIGS["oneformer"], "text_encoder_vocab_size": VOCABULARY, **values})
    transformers_models.set_labels(kind, LABELS, None)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        transformers.OneFormerForUniversalSegmentation(kind).save_pretrained(folder)
    return write_clip_tokenizer(folder)


def source_of(**given: Any) -> ModelSource:
    return source_for("semantic-segmentation", label_names=LABELS, **given)


def made(**given: Any) -> Created:
    with torch.random.fork_rng(devices=[]):
        return create.create_model(source_of(**given))


def library_ids(tokenizer: Any, length: int) -> list[int]:
    """What transformers' own processor feeds."""
    processor = transformers.OneFormerProcessor(transformers.OneFormerImageProcessor(), tokenizer, task_seq_length=length)
    found: Tensor = processor(torch.zeros(3, 32, 32), ["semantic"], return_tensors="pt")["task_inputs"]
    return found[0].tolist()


@pytest.mark.parametrize("length", [3, 5, 6, 9])
def test_ids_of_a_tokenizer_are_those_of_the_librarys_processor(length: int, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_clip_tokenizer(tmp_path))
    found = prompts.ids_of(tokenizer, PROMPT, length)
    assert found == library_ids(tokenizer, length)
    assert (len(found), found.count(0)) == (length, max(0, length - 6))


@pytest.mark.parametrize(("length", "ids"), [(2, [1, 2]), (4, [1, 2, 3, 4]), (6, [1, 2, 3, 4, 0, 0])])
def test_random_weights_are_told_made_up_ids_which_a_note_says(length: int, ids: list[int]) -> None:
    created = made(config={**CONFIG, "task_seq_len": length})
    assert created.spec.forward == {"task_inputs": ids}
    assert created.processor is None
    assert 'no tokenizer: the words of "the task is semantic" are numbered from 1' in " ".join(created.notes)
    assert spec_from_config.spec_of(source_of(config={**CONFIG, "task_seq_len": length})).forward == created.spec.forward


def test_a_configuration_may_name_a_tokenizer(tmp_path: Path) -> None:
    folder = write_clip_tokenizer(tmp_path)
    created = made(config={**CONFIG, "tokenizer": str(folder)})
    assert created.spec.forward["task_inputs"] == library_ids(created.processor, 6)
    assert 'the model is told "the task is semantic", as its tokenizer writes it' in created.notes


def test_the_ids_are_the_same_in_every_example_and_change_what_a_model_gives() -> None:
    model, spec = segmenter("oneformer")
    batch, seen = build.example_batch(spec, batch=3), list[Tensor]()
    model.get_submodule("model.task_encoder").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = build.flat_outputs(spec, model, batch)
    assert seen[0].tolist() == [[1, 2, 3, 4, 0, 0]] * 3
    other = replace(spec, forward={"task_inputs": [4, 3, 2, 1, 0, 0]})
    assert not torch.allclose(build.flat_outputs(other, model, batch), outputs)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (("merges.txt",), "has no tokenizer.json, and no merges.txt: a oneformer reads its task in words"),
        (("vocab.json",), "has no tokenizer.json, and no vocab.json: a oneformer"),
        (("vocab.json", "merges.txt"), "has no tokenizer.json, and no vocab.json and no merges.txt: a oneformer"),
    ],
)
def test_a_checkpoint_without_its_tokenizer_is_refused_by_the_files(lost: tuple[str, ...], words: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    for name in lost:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=words) as caught:
        made(name=str(folder))
    assert caught.value.hint == "copy the files of the checkpoint's tokenizer into that folder"


def test_a_tokenizer_of_more_words_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, text_encoder_vocab_size=10)
    with pytest.raises(ModelError, match="tokens, but the model embeds 10"):
        made(name=str(folder))


def test_a_task_without_a_prompt_has_no_such_model() -> None:
    source = source_of(config=CONFIG)
    mute = replace(source, task=replace(source.task, prompt=None))
    with pytest.raises(ModelError, match="a oneformer reads its task in words, and semantic-segmentation has none"):
        create.create_model(mute)


def test_the_text_mapper_of_a_checkpoint_is_left_out_and_nothing_else(tmp_path: Path) -> None:
    created = made(name=str(checkpoint(tmp_path, **TEXT_MAPPER)))
    assert created.spec.config["is_training"] is False
    assert not [name for name, _ in created.model.named_parameters() if "text_mapper" in name]
    (note,) = [note for note in created.notes if "text mapper" in note]
    assert note.startswith("left out the text mapper (")
    assert not [note for note in created.notes if note.startswith("ignored")]
    assert created.new == ()


def test_a_recipe_that_asks_for_the_training_of_several_tasks_is_refused() -> None:
    with pytest.raises(ModelError, match="is_training of this oneformer is true") as caught:
        made(config={**CONFIG, **TEXT_MAPPER})
    assert caught.value.hint == "leave out model.config.is_training; the model is trained without it"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mask_dim": 64}, "a oneformer has one width, but conv_dim is 32, mask_dim is 64, hidden_dim is 32"),
        ({"conv_dim": 64, "mask_dim": 64}, "hidden_dim is 32"),
        ({"enforce_input_proj": True}, "transformers saves no weights of these layers"),
        ({"decoder_layers": 1}, "decoder_layers of this oneformer is 1; expected 2 or more"),
        ({"task_seq_len": 0}, "task_seq_len of this oneformer is 0"),
        ({"conv_dim": 10**9}, "conv_dim of this oneformer is 1,000,000,000"),
    ],
)
def test_a_configuration_that_the_library_cannot_keep_or_run_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        transformers_models.configure({**CONFIG, **values})


@pytest.mark.parametrize("source", ["configuration", "folder"])
def test_all_weights_are_float32(source: str, tmp_path: Path) -> None:
    created = made(config=CONFIG) if source == "configuration" else made(name=str(checkpoint(tmp_path)))
    floats = {tensor.dtype for tensor in build.tensors_of(created.model).values() if tensor.is_floating_point()}
    assert floats == {torch.float32}


@pytest.mark.parametrize("ids", [[], [1.0], [-1], [True], ["a"], [1 << 31]])
def test_a_spec_with_ids_that_are_none_is_refused(ids: list[Any]) -> None:
    spec = replace(segmenter("oneformer")[1], forward={"task_inputs": ids})
    with pytest.raises(ModelError, match="forward has task_inputs"):
        ModelSpec.from_json(spec.to_json())


def test_a_state_and_its_export_keep_ids_and_tokenizer(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    state = run(tiny("oneformer", model={"name": str(folder), "config": None}, rounds=1), tmp_path / "state")
    ids = library_ids(transformers.AutoTokenizer.from_pretrained(folder), 6)
    context = Context(State.open(state.path))
    assert context.spec.forward == {"task_inputs": ids}
    assert prompts.ids_of(context.processor(), PROMPT, 6) == ids
    export(state, tmp_path / "small")
    assert json.loads((tmp_path / "small" / "spec.json").read_text())["forward"] == {"task_inputs": ids}
    inputs = processed(tmp_path / "small")
    assert inputs["task_inputs"].tolist() == [ids]
    with torch.no_grad():
        outputs = recap_cli.load(tmp_path / "small")(**inputs)
    assert outputs.class_queries_logits.shape == (1, 4, len(LABELS) + 1)


def processed(folder: Path) -> Any:
    """What the library's processor, found by the folder alone, makes of an image."""
    load: Callable[..., Any] = transformers.AutoProcessor.from_pretrained
    return load(folder)(torch.zeros(3, 40, 48, dtype=torch.uint8), ["semantic"], return_tensors="pt")
