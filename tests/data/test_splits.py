"""Texts and images as tensors, by index and in batches."""

import struct
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from PIL import Image
from pyarrow import parquet

from recap_cli.data.sampling import batches
from recap_cli.data.splits import ImageInputs, TextInputs, make_split
from recap_cli.errors import DataError, ModelError
from tests.reading import read_splits

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat", "ran", "the"]
GREY = ImageInputs(size=(4, 6), channels=1, mean=(0.5,), std=(0.25,))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizerFast", "model_max_length": 16, "do_lower_case": true}', encoding="utf-8"
    )
    return BertTokenizerFast.from_pretrained(tmp_path)


def texts(*rows: str | tuple[str, str]) -> Dataset:
    columns: dict[str, list[Any]] = {"label": [i % 2 for i in range(len(rows))], "row": list(range(1, len(rows) + 1))}
    if isinstance(rows[0], tuple):
        columns = {"text": [row[0] for row in rows], "text_pair": [row[1] for row in rows], **columns}
    else:
        columns = {"text": list(rows), **columns}
    return Dataset.from_dict(columns)


def noise(seed: int, size: tuple[int, int] = (9, 7)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def images(folder: Path, contents: list[bytes]) -> Dataset:
    file = folder / "images.parquet"
    parquet.write_table(pa.table({"image": contents, "label": [i % 2 for i in range(len(contents))]}), file)
    return read_splits("image-classification", seed=0, train=file, validation=file).train


def test_a_text_batch_is_padded_to_its_longest(tokenizer: Any) -> None:
    split = make_split(texts("a cat", "the dog ran", "cat"), TextInputs(tokenizer, 16), origin="x")
    batch = split.batch(torch.tensor([2, 0]))
    assert len(split) == 3
    assert batch["input_ids"].tolist() == [[2, 6, 3, 0], [2, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert split.batch(torch.tensor([1]))["input_ids"].shape == (1, 5)


def test_a_long_text_is_cut_to_max_length(tokenizer: Any) -> None:
    split = make_split(texts("a cat sat the dog ran", "a"), TextInputs(tokenizer, 5), origin="x")
    assert split.batch(torch.arange(2))["input_ids"].tolist() == [[2, 5, 6, 8, 3], [2, 5, 3, 0, 0]]


def test_pairs_have_two_segments_and_the_longer_is_cut(tokenizer: Any) -> None:
    dataset = texts(("a cat sat", "the dog"), ("a", "the dog ran a cat sat"))
    batch = make_split(dataset, TextInputs(tokenizer, 8), origin="x").batch(torch.arange(2))
    assert batch["input_ids"].tolist() == [[2, 5, 6, 8, 3, 10, 7, 3], [2, 5, 3, 10, 7, 9, 5, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]


def test_batches_equal_tokenizing_them_on_the_spot(tokenizer: Any) -> None:
    lines = [" ".join(WORDS[5 + (i * j) % 6] for j in range(1 + i % 5)) for i in range(600)]
    split = make_split(texts(*lines), TextInputs(tokenizer, 6), origin="x")
    chosen = torch.tensor([0, 255, 256, 511, 512, 599])
    expected = tokenizer([lines[i] for i in chosen], truncation=True, max_length=6, padding=True, return_tensors="pt")
    batch = split.batch(chosen)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_the_tokenizer_must_pad_and_bear_the_length(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"data\.max_length is 17.* at most 16 tokens"):
        make_split(texts("a"), TextInputs(tokenizer, 17), origin="x")
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        make_split(texts("a"), TextInputs(tokenizer, 8), origin="x")


def test_the_model_must_have_positions_for_the_length(tokenizer: Any) -> None:
    tokenizer.model_max_length = int(1e30)  # what transformers says where the tokenizer does not
    with pytest.raises(ModelError, match=r"data\.max_length is 9, but the model has positions for 8 tokens") as caught:
        make_split(texts("a"), TextInputs(tokenizer, 9, 8), origin="x")
    assert (caught.value.exit_code, caught.value.hint) == (5, "--set data.max_length=8")
    assert len(make_split(texts("a"), TextInputs(tokenizer, 8, 8), origin="x")) == 1


def test_images_are_resized_and_normalised(tmp_path: Path) -> None:
    inputs = ImageInputs(size=(4, 6), channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bicubic")
    batch = make_split(images(tmp_path, [encoded(noise(i)) for i in range(3)]), inputs, origin="x").batch(torch.tensor([2, 0]))
    resized = np.array(noise(2).resize((6, 4), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    expected = (resized - np.array(inputs.mean)) / np.array(inputs.std)
    assert batch["pixel_values"].shape == (2, 3, 4, 6)
    assert batch["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(batch["pixel_values"][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_pixels_are_those_of_the_processor_of_vit(tmp_path: Path) -> None:
    from transformers import ViTImageProcessorPil

    picture = noise(5)
    inputs = ImageInputs(size=(4, 6), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    ours = make_split(images(tmp_path, [encoded(picture)] * 2), inputs, origin="x").batch(torch.arange(2))["pixel_values"][0]
    processor = ViTImageProcessorPil(size={"height": 4, "width": 6}, resample=Image.Resampling.BILINEAR)
    theirs = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_any_image_fits_any_number_of_channels(tmp_path: Path) -> None:
    modes = [noise(0).convert(mode) for mode in ("L", "RGB", "RGBA", "P", "1", "CMYK")]
    contents = [encoded(image, "tiff") for image in modes]
    dataset = images(tmp_path, contents)
    for inputs in (GREY, ImageInputs(size=(4, 6), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)):
        batch = make_split(dataset, inputs, origin="x").batch(torch.arange(6))
        assert batch["pixel_values"].shape == (6, inputs.channels, 4, 6)


@pytest.mark.parametrize("workers", [0, 3])
def test_images_decoded_when_used_are_those_held_in_memory(tmp_path: Path, workers: int) -> None:
    dataset = images(tmp_path, [encoded(noise(i)) for i in range(9)])
    held = make_split(dataset, GREY, origin="x")
    late = make_split(dataset, GREY, origin="x", workers=workers, ram_bytes=0)
    chosen = torch.tensor([8, 1, 1, 4])
    assert torch.equal(held.batch(chosen)["pixel_values"], late.batch(chosen)["pixel_values"])


@pytest.mark.parametrize("ram_bytes", [2**20, 0])
def test_a_broken_image_names_its_row(tmp_path: Path, ram_bytes: int) -> None:
    whole = encoded(noise(0, (64, 64)))
    for broken in (b"no image", whole[: len(whole) // 2]):
        dataset = images(tmp_path, [whole, whole, broken, whole])
        with pytest.raises(DataError, match=r"the image in row 3 of a\.parquet cannot be decoded"):
            make_split(dataset.select([3, 2]), GREY, origin="a.parquet", ram_bytes=ram_bytes).batch(torch.arange(2))


def test_a_truncated_image_file_is_named(tmp_path: Path) -> None:
    whole = encoded(noise(0, (64, 64)))
    for name, content in (("a", whole), ("b", whole[: len(whole) // 2])):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").write_bytes(content)
    dataset = read_splits("image-classification", seed=0, train=tmp_path / "set", validation=tmp_path / "set").train
    with pytest.raises(DataError, match=r"the image .*b/0\.png in row 2 of set cannot be decoded"):
        make_split(dataset, GREY, origin="set")


def test_channels_must_have_a_mean_and_a_std(tmp_path: Path) -> None:
    dataset = images(tmp_path, [encoded(noise(i)) for i in range(2)])
    with pytest.raises(ModelError, match="the model wants 3, with 1 means and 3 stds"):
        make_split(dataset, ImageInputs((4, 4), 3, (0.5,), (0.5,) * 3), origin="x")


def test_flips_come_from_the_seed_alone(tmp_path: Path) -> None:
    dataset = images(tmp_path, [encoded(noise(i)) for i in range(40)])
    plain = make_split(dataset, GREY, origin="x")
    flipping = make_split(dataset, ImageInputs((4, 6), 1, (0.5,), (0.25,), augment="flip"), origin="x")
    everything = torch.arange(40)

    def pixels(batch_size: int, seed: int | None) -> torch.Tensor:
        found = batches(flipping, everything, batch_size, augment_seed=seed)
        return torch.cat([batch["pixel_values"] for batch in found])

    straight = plain.batch(everything)["pixel_values"]
    augmented = pixels(40, 7)
    flipped = (augmented == straight.flip(-1)).flatten(1).all(1)
    assert torch.equal(flipped, ~(augmented == straight).flatten(1).all(1))
    assert 8 < int(flipped.sum()) < 32
    assert torch.equal(augmented, pixels(7, 7))
    assert not torch.equal(augmented, pixels(40, 8))
    assert torch.equal(straight, pixels(40, None))
    variants = torch.arange(40) % 2
    chosen = flipping.batch(everything, variants)["pixel_values"]
    assert torch.equal(chosen[variants == 0], straight[variants == 0])
    assert torch.equal(chosen[variants == 1], straight[variants == 1].flip(-1))


def test_progress_hears_of_every_chunk(tokenizer: Any) -> None:
    heard: list[tuple[str, int | None, int]] = []

    def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        counted = list(items)
        heard.append((label, total, len(counted)))
        return iter(counted)

    make_split(texts(*["a"] * 300), TextInputs(tokenizer, 8), origin="here", track=track)
    assert heard == [("tokenize here", 2, 2)]


def pgm(values: Any) -> bytes:
    """A 16-bit portable graymap; Pillow reads it as whole numbers of 32 bits."""
    return f"P5 {values.shape[1]} {values.shape[0]} 65535\n".encode() + values.astype(">u2").tobytes()


def deep_png(values: Any) -> bytes:
    """A PNG of 16 bits per value, which Pillow reads in colour too, and does not write; (height, width, 1 to 4 channels)."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(header, zlib.compress(rows))


def png_of(header: bytes, pixels: bytes) -> bytes:
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def twelve_bits(values: Any) -> bytes:
    """A TIFF of 12 bits per value, as microscopes write it: two values in three bytes."""
    pairs = values.astype(np.uint32).reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    return tiff_of(values.shape, packed.astype(np.uint8).tobytes(), bits=12)


def tiff_of(shape: tuple[int, int], content: bytes, *, bits: int) -> bytes:
    tags = [(256, 4, shape[1]), (257, 4, shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 122)]
    tags += [(277, 3, 1), (278, 4, shape[0]), (279, 4, len(content))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0) + content


def grey(values: Any, kind: str) -> bytes:
    return encoded(Image.fromarray(values), kind)


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # every value of 16 bits, 256 of them in a row


def stored_array(values: Any) -> bytes:
    """What `datasets` puts into a file for an array in a column of images."""
    import datasets

    return bytes(datasets.Image().encode_example(values)["bytes"])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: grey(RAMP, "png"), id="16-bit PNG"),
        pytest.param(lambda: grey(RAMP, "tiff"), id="16-bit TIFF"),
        pytest.param(lambda: grey(RAMP.astype(">u2"), "tiff"), id="16-bit TIFF, high byte first"),
        pytest.param(lambda: grey(RAMP, "jpeg2000"), id="16-bit JPEG 2000"),
        pytest.param(lambda: pgm(RAMP), id="16-bit PGM"),
        pytest.param(lambda: twelve_bits(RAMP >> 4), id="12-bit TIFF"),
        pytest.param(lambda: grey(RAMP / np.float32(65535), "tiff"), id="floats from 0 to 1"),
        pytest.param(lambda: deep_png(RAMP[..., None]), id="16-bit grey"),
        pytest.param(lambda: deep_png(RAMP[..., None].repeat(3, -1)), id="16-bit RGB"),
        pytest.param(lambda: deep_png(RAMP[..., None].repeat(4, -1)), id="16-bit RGBA"),
        pytest.param(lambda: stored_array(RAMP), id="array of 16 bits"),
        pytest.param(lambda: stored_array(RAMP / 65535), id="array of floats"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_ramp_of_more_than_8_bits_keeps_its_shades(tmp_path: Path, content: Any, channels: int) -> None:
    inputs = ImageInputs((256, 256), channels, (0.0,) * channels, (1.0,) * channels, "nearest")
    split = make_split(images(tmp_path, [content(), content()]), inputs, origin="x")
    got = split.batch(torch.tensor([0]))["pixel_values"][0, 0].mul(255).round()
    assert got.unique().numel() == 256
    assert (got - torch.arange(256).view(-1, 1)).abs().max() <= 1  # each row is one shade, from black to white
    assert got.diff(dim=0).min() >= 0


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.array([[0, 70000]], np.int32), "whole numbers that are signed or of 32 bits"),
        (np.array([[-1000, 3000]], np.int16), "whole numbers that are signed or of 32 bits"),
        (np.array([[0, 255]], np.float32), "floats from 0 to 255"),
        (np.array([[-1, 1]], np.float32), "floats from -1 to 1"),
        (np.array([[0, np.nan]], np.float32), "floats from nan to nan"),
    ],
)
def test_an_image_of_an_unknown_range_is_refused(tmp_path: Path, values: Any, problem: str) -> None:
    dataset = images(tmp_path, [encoded(noise(0)), grey(values, "tiff")])
    with pytest.raises(
        DataError, match=rf"the image in row 2 of x cannot be used: its pixels are {problem}.*not known"
    ) as caught:
        make_split(dataset, GREY, origin="x")
    assert (
        caught.value.hint == "convert the images to 8 bits, to 16 bits without a sign, or to floats from 0 (black) to 1 (white)"
    )


@pytest.mark.parametrize("side", [12_000, 20_000])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_very_many_pixels_is_refused_before_it_is_unpacked(tmp_path: Path, side: int, workers: int) -> None:
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    bomb = png_of(struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), rows)
    assert len(bomb) < 10**5
    dataset = images(tmp_path, [encoded(noise(0)), bomb])
    with pytest.raises(DataError, match="row 2 of x cannot be used: it has more than 89,478,485 pixels") as caught:
        make_split(dataset, GREY, origin="x", workers=workers)
    assert "make the image smaller" in str(caught.value.hint)


def test_a_picture_stands_as_its_camera_was_held(tmp_path: Path) -> None:
    lying = Image.fromarray(np.array([[10, 20], [30, 40]], np.uint8))
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    file = BytesIO()
    lying.save(file, "png", exif=exif)
    inputs = ImageInputs((2, 2), 1, (0.0,), (1.0,), "nearest")
    batch = make_split(images(tmp_path, [file.getvalue()] * 2), inputs, origin="x").batch(torch.tensor([0]))
    assert batch["pixel_values"][0, 0].mul(255).round().tolist() == [[30, 10], [40, 20]]


def test_a_palette_with_a_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    file = BytesIO()
    noise(0).convert("P").save(file, "png", transparency=bytes(range(256)))
    assert len(make_split(images(tmp_path, [file.getvalue()] * 2), GREY, origin="x")) == 2


def test_an_image_is_never_fetched_from_the_net(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(noise(0)), "path": None}, {"bytes": None, "path": "http://127.0.0.1:9/a.png"}]
    dataset = Dataset.from_dict({"image": rows, "label": [0, 1], "row": [1, 2]})
    with pytest.raises(
        DataError, match=r"the image http://127.0.0.1:9/a.png in row 2 of x cannot be decoded: there is no such"
    ):
        make_split(dataset, GREY, origin="x")


@pytest.mark.parametrize("ram_bytes", [2**31, 1])
@pytest.mark.parametrize(("peaks", "is_noted"), [((4000, 4095), True), ((4095, 4096), False), ((300, 65535), False)])
def test_images_of_12_bits_in_16_are_told(tmp_path: Path, peaks: tuple[int, int], is_noted: bool, ram_bytes: int) -> None:
    stored = [encoded(Image.fromarray(np.linspace(0, peak, 63).astype(np.uint16).reshape(7, 9))) for peak in peaks]
    split = make_split(images(tmp_path, stored), GREY, origin="scans", ram_bytes=ram_bytes)
    note = (
        "scans: its 16-bit images have no value above 4,095; the upper 8 bits are read, so 16 of 256 shades are kept: "
        "stretch their values to 0 … 65,535, or convert them to 8 bits"
    )
    assert split.notes == ((note,) if is_noted else ())


def test_images_of_8_bits_are_not_told(tmp_path: Path) -> None:
    assert make_split(images(tmp_path, [encoded(noise(0)), encoded(noise(1))]), GREY, origin="scans").notes == ()
