"""Pictures of predictions are made without a display, say what they show, and are the same bytes each time."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from recap_cli.errors import RecapError, StorageError, UsageError
from recap_cli.memory import picture, plot_style, plots
from recap_cli.memory.tracker import KINDS

Draw = Callable[[list[dict[str, Any]], Path], None]
MEGABYTE = 1_000_000


def row(method: str = "recap", peak: int = 300, **settings: Any) -> dict[str, Any]:
    """A row as `Prediction.to_json` gives it, its peak in megabytes; only what `recap` has by default has ratios."""
    return {
        "method": method,
        "batch_size": 1,
        "micro_batch_size": settings.get("batch_size", 1),
        "weights": "fp32",
        "checkpointing": False,
        "fused_backward": False,
        "optimizer": "sgd",
        "prune_ratio": 0.333 if method == "recap" else 0.0,
        "mask_ratio": 0.875 if method == "recap" else 0.0,
        **{f"{kind}_bytes": peak * MEGABYTE // 5 for kind in KINDS},
        "training_peak_bytes": peak * MEGABYTE,
        "evaluation_peak_bytes": peak * MEGABYTE // 2,
        "peak_bytes": peak * MEGABYTE,
        **settings,
    }


def rows(**settings: Any) -> list[dict[str, Any]]:
    return [row("full", 1000, **settings), row("lora", 432, **settings), row(**settings)]


def draw_bars(of: list[dict[str, Any]], path: Path) -> None:
    picture.save(plots.bars(of, name="ViT-base", budget_bytes=500 * MEGABYTE), path)


def draw_curves(of: list[dict[str, Any]], path: Path) -> None:
    picture.save(plots.curves(of, by="batch_size", name="ViT-base", budget_bytes=500 * MEGABYTE), path)


both = pytest.mark.parametrize("draw", [draw_bars, draw_curves])


def points(of: list[dict[str, Any]], by: plots.By) -> dict[str, list[tuple[float, int]]]:
    return {line.label: line.predicted for line in plots._lines(of, by)}


def test_every_kind_has_a_look() -> None:
    assert tuple(plot_style.KINDS) == KINDS


@both
@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_a_picture_is_the_same_bytes_each_time(draw: Draw, suffix: str, magic: bytes, tmp_path: Path) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    draw(rows(), first)
    draw(rows(), second)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


def test_bars_say_kinds_peaks_budget_and_settings_as_text(tmp_path: Path) -> None:
    draw_bars(rows(), tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    for words in (
        *("weights", "gradients", "optimizer state", "activations", "temporary", "other", "full", "lora", "recap"),
        *("1,000.0 MB", "432.0 MB", "300.0 MB", "budget 500.0 MB", "memory (MB = 10^6 bytes)", "peak instant"),
        *("ViT-base: predicted memory of finetuning", "batch size 1, sgd, fp32, prune ratio 33.3%, mask ratio 87.5%"),
    ):
        assert f">{words}</" in text
    assert "measured" not in text
    assert "<dc:date>" not in text


def test_what_was_measured_is_called_so(tmp_path: Path) -> None:
    of = [row("full", 1000), row(measured_bytes=311 * MEGABYTE)]
    draw_bars(of, tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    assert all(words in text for words in ("predicted and measured memory", "311.0 MB measured", "measured peak"))
    draw_curves(of, tmp_path / "curves.svg")
    assert ">measured</" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


def test_a_peak_of_scoring_is_called_so(tmp_path: Path) -> None:
    draw_bars([row(evaluation_peak_bytes=400 * MEGABYTE, peak_bytes=400 * MEGABYTE)], tmp_path / "bars.svg")
    assert "400.0 MB (scoring)" in (tmp_path / "bars.svg").read_text(encoding="utf-8")


def test_settings_that_differ_stand_beside_the_method_and_not_in_the_title(tmp_path: Path) -> None:
    draw_bars([*rows(), *rows(batch_size=8, checkpointing=True)], tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    assert ">sgd, fp32, prune ratio 33.3%, mask ratio 87.5%</" in text
    labels = plots._labels([*rows(), row(batch_size=8)], without=())
    assert labels == ["full, batch size 1", "lora, batch size 1", "recap, batch size 1", "recap, batch size 8"]
    several = plots._labels([row(), row(batch_size=32, weights="int8", checkpointing=True)], without=())
    assert several[0].splitlines() == ["recap, batch size 1, fp32,", "no checkpointing"], "no setting is broken"


def test_names_of_any_length_and_letters_are_drawn(tmp_path: Path) -> None:
    of = [row("a method of a very long name, with $x_1$ and 模型 in it", 700), row()]
    drawn = plots.bars(of, name="C:\\模型 $a_b$\n" + "long/" * 40, budget_bytes=10**12)
    picture.save(drawn, tmp_path / "bars.svg")
    text = (tmp_path / "bars.svg").read_text(encoding="utf-8")
    assert "$x_1$" in text
    assert ">budget 1,000,000.0 MB</" in text
    assert ">(beyond the axis)</" in text
    picture.save(plots.curves(of, by="batch_size", name="x", budget_bytes=10**12), tmp_path / "curves.svg")
    assert ">(beyond the axis)</" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


def test_the_whole_budget_is_on_the_axis_unless_it_is_far() -> None:
    assert plots._reach([100.0], 200 * MEGABYTE, 1.2) > 200
    assert plots._reach([100.0], 500 * MEGABYTE, 1.2) == pytest.approx(120)
    assert plots._reach([0.0], None, 1.2) > 0


def test_a_curve_is_sorted_and_belongs_to_one_method_and_its_other_settings() -> None:
    of = [row(batch_size=size, peak=300 + size, optimizer=rule) for rule in ("sgd", "adamw") for size in (8, 1, 2)]
    expected = [(1, 301 * MEGABYTE), (2, 302 * MEGABYTE), (8, 308 * MEGABYTE)]
    assert points(of, "batch_size") == {"recap, sgd": expected, "recap, adamw": expected}
    first, second = plots._lines(of, "batch_size")
    assert first.look == second.look
    assert first.dash != second.dash


def test_a_method_without_the_ratio_is_drawn_flat() -> None:
    of = [row("full", 1000), *(row(peak=peak, mask_ratio=ratio) for ratio, peak in ((0.9, 300), (0.0, 600), (0.5, 400)))]
    found = points(of, "mask_ratio")
    assert found["full"] == [(ratio, 1000 * MEGABYTE) for ratio in (0.0, 0.5, 0.9)]
    assert found["recap"] == [(0.0, 600 * MEGABYTE), (0.5, 400 * MEGABYTE), (0.9, 300 * MEGABYTE)]


def test_a_method_with_one_batch_size_is_a_point_and_no_line() -> None:
    assert points([row("full"), *(row(batch_size=size) for size in (1, 4))], "batch_size")["full"] == [(1, 300 * MEGABYTE)]


@pytest.mark.parametrize(("by", "label"), plots.AXES.items())
def test_curves_name_their_axes(by: plots.By, label: str, tmp_path: Path) -> None:
    values = (1, 4, 64) if by == "batch_size" else (0.0, 0.25, 0.5)
    of = [made for value in values for made in (row(peak=round(300 + value), **{by: value}), row("full", 1000))]
    picture.save(plots.curves(of, by=by, name="ViT-base"), tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text(encoding="utf-8").replace("&#x27;", "'")
    for words in (label, "peak memory (MB = 10^6 bytes)", "full", "recap", "ViT-base: predicted peak memory of finetuning"):
        assert f">{words}</" in text
    assert all(f">{tick}</" in text for tick in (("1", "4", "64") if by == "batch_size" else ("0%", "50%")))


@both
def test_a_png_has_the_colours_on_white(draw: Draw, tmp_path: Path) -> None:
    draw(rows(), tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).astype(np.int32) @ [1 << 16, 1 << 8, 1]
    found = {f"#{colour:06X}" for colour in np.unique(pixels)}
    bars = [fill.colour for fill in plot_style.KINDS.values()]
    curves = [plot_style.looks_of([method])[method].colour.upper() for method in ("full", "lora", "recap")]
    assert found >= set(bars if draw is draw_bars else curves)
    assert (pixels == 0xFFFFFF).mean() > 0.5


def test_pyplot_stays_away_and_the_settings_of_the_user_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    draw_bars(rows(), tmp_path / "first.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "text.usetex": True}):
        draw_bars(rows(), tmp_path / "second.svg")
        assert matplotlib.rcParams["font.size"] == 30, "those of the user are put back"
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def refusal(draw: Draw, of: list[dict[str, Any]], path: Path) -> RecapError:
    with pytest.raises(RecapError) as caught:
        draw(of, path)
    assert caught.value.hint
    return caught.value


@both
@pytest.mark.parametrize("name", ["memory.jpg", "memory", ".png"])
def test_an_unknown_ending_is_refused(draw: Draw, name: str, tmp_path: Path) -> None:
    error = refusal(draw, rows(), tmp_path / name)
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    assert error.message == f"{tmp_path / name}: a picture's name ends in .png, .svg, .pdf"


@both
def test_no_rows_are_refused(draw: Draw, tmp_path: Path) -> None:
    error = refusal(draw, [], tmp_path / "memory.svg")
    assert error.exit_code == 2
    assert "no predictions" in error.message
    assert not list(tmp_path.iterdir())


@both
def test_a_folder_that_is_not_there_is_named(draw: Draw, tmp_path: Path) -> None:
    error = refusal(draw, rows(), tmp_path / "none" / "memory.svg")
    assert isinstance(error, StorageError)
    assert error.exit_code == 12
    assert error.message.endswith(f"there is no folder {tmp_path / 'none'}")


@both
def test_a_folder_that_may_not_be_written_to_is_named(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture.os, "access", lambda *_: False)  # root may write anywhere
    error = refusal(draw, rows(), tmp_path / "memory.svg")
    assert error.exit_code == 12
    assert error.message.endswith(f"nothing may be written to {tmp_path}")


def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    error = refusal(draw_bars, rows(), tmp_path / "memory.svg")
    assert error.exit_code == 12
    assert error.message == f"{tmp_path / 'memory.svg'} cannot be written: No space left on device"
