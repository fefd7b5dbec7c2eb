"""The sound inputs that cases damage, made once per run: states after every stage, data files, model folders and exports."""

import contextlib
import hashlib
import io
import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from recap_cli.cli import main
from recap_cli.recipe.recipe import dump
from tests.pico import pico
from tests.tiny import data_folder, tiny

STAGES = ("prune", "mask", "finetune", "merge")
AFTER = ("init", *(f"{stage}{number}" for number in (1, 2) for stage in STAGES))  # merge2 is a finished state
MODELS = ("bert", "vit")


class World:
    """Folders of sound inputs below `root`; each is made when it is first asked for, and never written to again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def recipe(self, name: str) -> dict[str, Any]:
        """The values of a tiny recipe for a pico model."""
        values: dict[str, Any] = yaml.safe_load(_recipe(name))
        return values

    def data(self) -> Path:
        """The texts, the images and the tokenizer that the tiny recipes name."""
        return data_folder()

    def state(self, model: str, after: str) -> Path:
        """A state of two rounds, as it is after a stage such as `mask1`."""
        folder = self.root / "states" / model / after
        if not folder.exists():
            self._run_through(model)
        return folder

    def export(self, base: str) -> Path:
        """An export of the finished state of a model: `bert/ragged`, `bert/dense`, `vit/ragged` or `vit/dense`."""
        model, form = base.split("/")
        folder = self.root / "exports" / base
        if not folder.exists():
            run("export", self.state(model, AFTER[-1]), folder, *(["--dense"] if form == "dense" else []))
        return folder

    def checkpoint(self, base: str) -> Path:
        """A folder as `save_pretrained` makes it, of a pico model: `bert`, `vit`, or `bert-sharded`."""
        folder = self.root / "checkpoints" / base
        if not folder.exists():
            name, _, sharded = base.partition("-")
            model: Any = pico(name)[0]
            with contextlib.redirect_stderr(io.StringIO()):
                model.save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
            if name == "bert":
                shutil.copytree(self.data() / "tokenizer", folder, dirs_exist_ok=True)
            else:
                values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 16, "width": 16}}
                (folder / "preprocessor_config.json").write_text(json.dumps(values))
        return folder

    def _run_through(self, model: str) -> None:
        at_work = self.root / "at-work" / model
        at_work.parent.mkdir(parents=True, exist_ok=True)
        recipe = self.root / f"{model}.yaml"
        recipe.write_text(_recipe(model))
        run("init", recipe, "--state", at_work)
        for number, after in enumerate(AFTER):
            if number:
                run(after[:-1], at_work)
            shutil.copytree(at_work, self.root / "states" / model / after)


@cache
def _recipe(name: str) -> str:
    return dump(tiny(name, prune={"compensate": "auto"} if name == "vit" else {}))


def run(*arguments: object) -> None:
    """Run a command that must end well, and print nothing."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main([str(argument) for argument in arguments])
    if code:
        raise RuntimeError(f"recap {' '.join(map(str, arguments))} ended with {code}: {told.getvalue()}")


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def facts_of(state: Path) -> dict[str, Any]:
    """What the state.yaml of a sound state says; sound states are never written to."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    facts: dict[str, Any] = yaml.load((state / "state.yaml").read_text(), Loader=loader)
    return facts


def tensors_since(before: Path | None, after: Path) -> dict[str, str]:
    """The safetensors files that a state has and an earlier one, if any, has not, with their sha256."""
    old = facts_of(before)["files"] if before else {}
    return {
        name: checksum["sha256"]
        for name, checksum in facts_of(after)["files"].items()
        if name not in old and name.endswith(".safetensors")
    }


def environment(scratch: Path) -> dict[str, str]:
    """The environment that calls run in: no hub, one thread, caches of their own."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(scratch / "hub"),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "MPLCONFIGDIR": str(scratch / "matplotlib"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PATH": os.environ.get("PATH", ""),
    }
