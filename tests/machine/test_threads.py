"""How many threads compute: by the model and not by the load, and never more than the user or a quota says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recap_cli.cli import main
from recap_cli.machine import threads
from recap_cli.recipe import recipe as recipes
from recap_cli.stages import eval as evaluation
from recap_cli.stages.init import init
from recap_cli.stages.prune import prune
from recap_cli.state.store import State
from tests.tiny import tiny


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch has four threads, and nobody has said how many there are to be."""
    for name in (*threads.GIVEN, threads.CORES_DIVIDED):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def layers(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def batch(examples: int, tokens: int, width: int) -> dict[str, Tensor]:
    return {"inputs": torch.zeros(examples, tokens, width), "labels": torch.zeros(examples, dtype=torch.int64)}


def test_the_largest_product_is_counted() -> None:
    model = layers(8, 32, 16, 4)
    assert threads.largest_flops(model, lambda batch: model(batch["inputs"]), batch(3, 5, 8)) == 2 * 3 * 5 * 32 * 16
    assert not any(module._forward_hooks for module in model.modules())


def test_a_transposed_linear_counts_as_one() -> None:
    from transformers.pytorch_utils import Conv1D

    model = Conv1D(32, 8)
    assert threads.largest_flops(model, lambda batch: model(batch["inputs"]), batch(3, 5, 8)) == 2 * 3 * 5 * 32 * 8


@pytest.mark.parametrize(("size", "count"), [(32, 1), (512, None)])
def test_one_thread_where_the_products_of_a_step_are_small(size: int, count: int | None) -> None:
    model = layers(64, 256, 64)
    assert threads.fitting(model, lambda batch: model(batch["inputs"]), batch(2, 17, 64), size) == count


def test_a_large_model_is_not_run_to_be_measured() -> None:
    def forward(_: dict[str, Tensor]) -> Tensor:
        raise AssertionError("it was run")

    assert threads.fitting(layers(1024, 4096), forward, batch(1, 1, 1024), 32) is None


@pytest.mark.parametrize("quota", [None, 2, 6])
def test_threads_are_limited_and_come_back(quota: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "quota_cores", lambda: quota)
    with threads.limited(1, {}):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 4
    with threads.limited(None, {}):
        assert torch.get_num_threads() == (2 if quota == 2 else 4)
    assert torch.get_num_threads() == 4


def test_a_number_that_the_user_gives_stands_and_that_of_a_comparison_is_an_upper_limit() -> None:
    with threads.limited(1, {"OMP_NUM_THREADS": "4"}):
        assert torch.get_num_threads() == 4
    with threads.limited(1, {"OMP_NUM_THREADS": "4", threads.CORES_DIVIDED: "1"}):
        assert torch.get_num_threads() == 1


V1 = {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # A group below the root, of this process: its own limit, and those of all above it, count.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/cpu.max": "400000 100000\n",
            },
            1,
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/b/cpu.max": "100000 100000\n"}, None),  # another's
        # A container that sees the name which its group has outside, and its own group as the root.
        ({"proc/self/cgroup": "0::/docker/1f\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/../../c\n", "sys/fs/cgroup/cpu.max": "200000 100000\n", "c/cpu.max": "1 1\n"}, 2),
        # Version 1, and both beside each other.
        ({**V1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n"}, 1),
        (V1, None),
        (
            {
                **V1,
                "proc/self/cgroup": "7:memory:/m\n4:cpu,cpuacct:/a:b\n1:name=systemd:/s\n0::/s\n",
                "sys/fs/cgroup/cpu/a:b/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/a:b/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/m/cpu.cfs_quota_us": "100000\n",
                "sys/fs/cgroup/cpu/m/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/s\n", "sys/fs/cgroup/unified/s/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "no such line\n", "sys/fs/cgroup/cpu.max": "what is this\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_the_control_group_of_this_process(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota_cores(tmp_path) == cores


def test_every_stage_computes_with_the_number_that_init_has_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = init(tiny("vit"), tmp_path / "state")
    assert state.manifest.made["threads"] == 1
    assert torch.get_num_threads() == 4
    seen: list[int] = []
    plainly = State.load_tensors

    def look(self: State, rel: str) -> dict[str, Tensor]:
        seen.append(torch.get_num_threads())
        return plainly(self, rel)

    monkeypatch.setattr(State, "load_tensors", look)
    prune(state)
    evaluation.evaluate(state, which=["full"])
    assert set(seen) == {1}
    assert torch.get_num_threads() == 4


def test_the_quickstart_is_a_small_model(tmp_path: Path) -> None:
    recipe = recipes.read("quickstart", ["data.train_samples=64", "data.validation_samples=20"])
    assert init(recipe, tmp_path / "state").manifest.made["threads"] == 1


def test_a_run_does_not_depend_on_how_many_threads_there_are(tmp_path: Path) -> None:
    from recap_cli.stages.run import run

    found = []
    for count in (4, 2):
        torch.set_num_threads(count)
        state = run(tiny("bert", rounds=1), tmp_path / str(count))
        found.append(
            {name: checksum.sha256 for name, checksum in state.manifest.files.items() if name.endswith(".safetensors")}
        )
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "1000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_sleep_soon_unless_the_user_says_how_they_wait(given: dict[str, str], expected: str | None) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    code = (
        "import os, sys; from recap_cli.cli import main; main(['--version']); "
        "assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(expected)


def test_doctor_says_what_was_chosen_and_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    main(["doctor"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 for models whose largest matrix product has less than 32 MFLOP per step" in shown
    assert "GOMP_SPINCOUNT=1000" in shown
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.described()["threads"] == "4 for every model, set by OMP_NUM_THREADS=3"
