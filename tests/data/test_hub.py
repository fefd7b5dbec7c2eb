"""Data sets of the hub, with and without one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from recap_cli.data.sources import Raw
from recap_cli.errors import DataError
from tests.reading import read_splits


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A hub with one data set; the list holds what was asked of it."""
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    asked: list[Any] = []

    def load(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split, datasets.are_progress_bars_disabled()))
        if split not in ("train", "validation"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'validation'].")
        return datasets.Dataset.from_dict({"sentence": list("abcd"), "label": [0, 1, 1, 0]}, features=features)

    monkeypatch.setattr("recap_cli.data.hub._answers", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    yield asked
    assert not datasets.are_progress_bars_disabled()


def read(**keys: Any) -> Raw:
    return read_splits("text-classification", seed=0, name="org/set", subset="cola", text="sentence", **keys)


def test_both_splits_are_read_quietly_with_the_names_of_their_labels(hub: list[Any]) -> None:
    raw = read()
    assert hub == [("org/set", "cola", "train", True), ("org/set", "cola", "validation", True)]
    assert raw.label_names == ["no", "yes"]
    assert raw.validation[1] == {"text": "b", "label": 1, "row": 2}
    assert raw.validation_origin == "split 'validation' of org/set (cola)"


def test_a_share_to_hold_out_goes_before_the_validation_split(hub: list[Any]) -> None:
    raw = read(validation_share=0.5)
    assert [split for _, _, split, _ in hub] == ["train"]
    assert (len(raw.train), len(raw.validation)) == (2, 2)


def test_an_unknown_split_lists_those_there_are(hub: list[Any]) -> None:
    with pytest.raises(
        DataError, match=r"split 'dev' of org/set \(cola\) cannot be read from the hub: .*'validation'"
    ) as caught:
        read(validation_split="dev")
    assert "data.validation_split" in str(caught.value.hint)


def test_without_a_hub_the_error_comes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for proxy in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    offline, load, seen = datasets.config.HF_HUB_OFFLINE, datasets.load_dataset, []

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(datasets.config.HF_HUB_OFFLINE)  # with which `datasets` looks into its cache and tries nothing again
        return load(*given, **named)

    monkeypatch.setattr("datasets.load_dataset", watched)
    with pytest.raises(DataError, match="the hub cannot be reached, and recap-no-such/set is not in its cache") as caught:
        read_splits("text-classification", seed=0, name="recap-no-such/set", text="sentence")
    assert seen == [True]
    assert caught.value.hint == "without the hub, use local files: --set data.train=FILE --set data.validation=FILE"
    assert offline == datasets.config.HF_HUB_OFFLINE


def test_datasets_itself_reads_a_folder_laid_out_like_one_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("recap_cli.data.hub._answers", lambda endpoint: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for split in ("train", "validation"):
        table = pa.table({"sentence": ["a", "b", split], "label": [0, 1, 1]})
        parquet.write_table(table, tmp_path / "set" / f"{split}.parquet")
    raw = read_splits("text-classification", seed=0, name=str(tmp_path / "set"), text="sentence")
    assert raw.train["text"][:] == ["a", "b", "train"]
    assert raw.validation["label"][:] == [0, 1, 1]
    with pytest.raises(DataError, match=r"split 'dev' of .* cannot be read from the hub: .*\['train', 'validation'\]"):
        read_splits("text-classification", seed=0, name=str(tmp_path / "set"), text="sentence", validation_split="dev")
    assert capfd.readouterr().err == ""
