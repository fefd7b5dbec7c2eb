"""What a frozen weight may be, and that one which lies about parts, bytes or values is named with the weight it lies about."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recap_cli import registry
from recap_cli.core.frozen_weight import FrozenWeight, _wrong_values, check, quantized
from recap_cli.errors import PluginError
from recap_cli.rounds.frozen_weights import frozen_weight_of, smaller_quantized
from recap_cli.trainable.build import make_partial
from recap_cli.trainable.placement import Placement
from tests.weights import QUANTIZED, WEIGHTS

REGISTERED = registry.names("weights")
TRUE = replace(WEIGHTS["int8"], name="liar")


def parts_with(**others: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """What int8 gives, with other parts in the place of some, or made from it."""

    def quantize(matrix: Tensor) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = dict(WEIGHTS["int8"].quantize(matrix))  # type: ignore[misc]
        return {**parts, **{name: part(parts) if callable(part) else part for name, part in others.items()}}

    return quantize


def wrong_dense(parts: Mapping[str, Tensor], out: Tensor) -> None:
    out.copy_(-2 * parts["codes"].float() * parts["scale"])


def half_dense(parts: Mapping[str, Tensor], out: Tensor) -> None:
    out[: len(out) // 2 + 1].copy_((parts["codes"] * parts["scale"])[: len(out) // 2 + 1])


def other_shape(parts: Mapping[str, Tensor], out: Tensor) -> None:
    out.copy_((parts["codes"] * parts["scale"])[:, :-1])


def other_rows(parts: Mapping[str, Tensor], ids: Tensor, out: Tensor) -> None:
    out.copy_((parts["codes"] * parts["scale"])[(ids + 1) % len(parts["codes"])])


def exits(*_: Any) -> Any:
    raise SystemExit(3)


LIES: list[tuple[dict[str, Any], str]] = [
    ({"quantize": lambda _: {}}, "quantize gives tensors by name, not none"),
    ({"quantize": lambda matrix: matrix}, "quantize gives tensors by name, not Tensor"),
    ({"quantize": lambda _: None}, "quantize gives tensors by name, not NoneType"),
    ({"quantize": parts_with(codes=lambda parts: parts["codes"].tolist())}, "its part codes is of type list, not Tensor"),
    (
        {"quantize": parts_with(codes=lambda parts: parts["codes"].to("meta"))},
        "its part codes is on meta, and the matrix on cpu",
    ),
    ({"quantize": parts_with(**{"a.b": torch.zeros(1)})}, "the name 'a.b' of a part is no identifier"),
    ({"quantize": parts_with(scale=lambda parts: nn.Parameter(parts["scale"]))}, "its part scale requires a gradient"),
    ({"nbytes": lambda shape: shape[0] * shape[1]}, r"its parts have \d+ bytes, and nbytes says \d+"),
    ({"nbytes": lambda shape: float(shape[0])}, r"nbytes gives a whole number, not [\d.]+"),
    (
        {"quantize": parts_with(scale=lambda parts: parts["scale"].repeat(9, 1)[: len(parts["scale"])])},
        r"its parts are views of \d+ bytes, and nbytes says \d+",
    ),
    ({"dense": lambda parts, out: None}, "dense leaves entries that are not finite"),
    ({"dense": half_dense}, "dense leaves entries that are not finite"),
    ({"dense": lambda parts, out: out.fill_(torch.inf)}, "dense leaves entries that are not finite"),
    ({"dense": wrong_dense}, "what dense gives is farther from the weight than zeros are"),
    ({"dense": other_shape}, "failed for .*: RuntimeError"),
    ({"rows": other_rows}, "rows gives other values than dense"),
    ({"quantize": exits}, "failed for .*: SystemExit: 3"),
]


@pytest.mark.parametrize(("lie", "said"), LIES, ids=[said for _, said in LIES])
def test_a_plugin_that_lies_is_named_with_the_weight_it_lies_about(lie: dict[str, Any], said: str) -> None:
    liar = replace(TRUE, **lie)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 3))
    with pytest.raises(PluginError, match=said) as caught:
        make_partial(model, {}, frozen=lambda name: name == "0.weight", placement=Placement(weights=liar))
    place = r"0\.weight \(12, 16\)"
    told = said.replace("failed for .*", f"failed for {place}") if said.startswith("failed") else f"for {place}: {said}"
    assert re.match(rf"the frozen weight 'liar',? {told}", caught.value.message)
    assert re.fullmatch(r"choose another with --set finetune\.weights=.*see docs/plugins/weights\.md", str(caught.value.hint))
    with pytest.raises(PluginError, match=r"^the frozen weight 'liar'(,| failed) (for a matrix of \(|in nbytes)"):
        check(liar)  # before any data are read


@pytest.mark.parametrize("name", REGISTERED)
def test_every_registered_one_does_what_it_says(name: str) -> None:
    weights = frozen_weight_of(name)
    assert weights.name == name
    check(weights)
    shapes = [(48, 32), (7, 33), (1, 1), (300, 64), (64, 1000)]
    for shape in shapes if weights.quantizes else ():
        if weights.holds(shape):
            parts = quantized(weights, "a weight", torch.randn(shape))
            assert sum(part.nbytes for part in parts.values()) == weights.nbytes(shape)  # type: ignore[misc]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_that_is_not_finite_is_no_lie_of_the_plugin(name: str) -> None:
    matrix = torch.randn(12, 64)
    matrix[3, 4] = torch.inf
    assert quantized(WEIGHTS[name], "a weight", matrix)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_values_of_fake_and_meta_tensors_are_not_looked_at(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.empty(12, 64)
    for matrix in (fake, torch.empty(12, 64, device="meta")):
        parts = quantized(WEIGHTS[name], "a weight", matrix)
        assert sum(part.nbytes for part in parts.values()) == WEIGHTS[name].nbytes((12, 64))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantize": TRUE.quantize}, "all of quantize, dense and nbytes"),
        ({"nbytes": TRUE.nbytes, "dense": TRUE.dense}, "all of quantize, dense and nbytes"),
        ({"rows": TRUE.rows}, "is plain and gives none"),
        ({"accepts": lambda _: None}, "is plain and gives none"),
        ({"dtype": torch.int8}, "floating-point"),
    ],
)
def test_a_record_that_is_neither_plain_nor_whole_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FrozenWeight(**given)


def test_a_matrix_that_is_not_accepted_stays_dense_and_the_rest_is_quantized() -> None:
    picky = replace(TRUE, accepts=lambda shape: None if shape[1] % 16 == 0 else "16 columns at a time")
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 3), nn.Embedding(5, 12), Conv1D(12, 16), Conv1D(16, 12))
    make_partial(model, {}, frozen=lambda _: True, placement=Placement(weights=picky))
    assert (model[0].matrix.shape, model[3].matrix.shape) == ((12, 16), (12, 16))  # a Conv1D's weight is (in, out)
    assert isinstance(model[4], Conv1D)
    assert (model[1].weight.dtype, model[2].weight.dtype) == (torch.bfloat16, torch.bfloat16)
    with pytest.raises(PluginError, match=r"failed in accepts\(\(12, 16\)\): TypeError: expected None, or why not; found bool"):
        make_partial(nn.Linear(16, 12), {}, frozen=lambda _: True, placement=Placement(weights=replace(TRUE, accepts=bool)))


def test_without_rows_embeddings_stay_dense() -> None:
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 3))
    make_partial(model, {}, frozen=lambda _: True, placement=Placement(weights=replace(TRUE, rows=None)))
    assert isinstance(model[0], nn.Embedding)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].matrix is not None


def test_more_entries_cost_what_their_codes_and_blocks_do() -> None:
    assert {name: WEIGHTS[name].entry_bytes for name in WEIGHTS} == {
        "fp32": 4.0,
        "bf16": 2.0,
        "int8": 1.0,  # a scale is of a row, however long
        "nf4": 0.5 + 1 / 64 + 4 / 64 / 256,
    }
    assert smaller_quantized("fp32") == smaller_quantized("bf16") == ["int8", "nf4"]
    assert (smaller_quantized("int8"), smaller_quantized("nf4")) == (["nf4"], [])


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(PluginError, match="there is no frozen weight named 'nf5'; there are: bf16, fp32, int8, nf4") as caught:
        frozen_weight_of("nf5")
    assert "did you mean nf4" in str(caught.value.hint)


def test_a_longer_row_must_have_more_bytes() -> None:
    int8 = WEIGHTS["int8"].nbytes
    for more in (0, -1):

        def nbytes(shape: tuple[int, int], more: int = more) -> int:
            return int8(shape) if shape[1] < 2**20 else 2**20 + more * shape[1] // 2**20  # type: ignore[misc]

        with pytest.raises(PluginError, match="failed in nbytes: ValueError: a longer row has no more bytes"):
            check(replace(WEIGHTS["int8"], nbytes=nbytes))


def test_a_check_tries_rows_of_whole_blocks_and_of_broken_ones() -> None:
    """Blocks of 32 or 64 entries are usual; a plugin may fail in either case."""
    seen = set()

    def quantize(matrix: Tensor) -> Any:
        seen.add(matrix.shape[1] % 64 == 0)
        return WEIGHTS["int8"].quantize(matrix)  # type: ignore[misc]

    check(replace(WEIGHTS["int8"], quantize=quantize))
    assert seen == {True, False}


def test_a_check_draws_nothing_from_the_generator_of_torch() -> None:
    before = torch.random.get_rng_state()
    check(WEIGHTS["int8"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_check_tries_the_type_that_the_forward_reads() -> None:
    seen = set()

    def dense(parts: Mapping[str, Tensor], out: Tensor) -> None:
        seen.add(out.dtype)
        WEIGHTS["int8"].dense(parts, out)  # type: ignore[misc]

    check(replace(WEIGHTS["int8"], dtype=torch.bfloat16, dense=dense))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_rows_are_near_by_the_size_of_the_weight(size: float) -> None:
    """A thousandth of it is near, a tenth is not, however small or large the weights are."""

    def rows_off(by: float) -> Any:
        return lambda parts, ids, out: out.copy_((parts["codes"] * parts["scale"])[ids] * (1 + by))

    matrix = size * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert _wrong_values(replace(TRUE, rows=rows_off(0.0)), TRUE.quantize(matrix), matrix, torch.float32) is None  # type: ignore[misc, arg-type]
    found = _wrong_values(replace(TRUE, rows=rows_off(0.1)), TRUE.quantize(matrix), matrix, torch.float32)  # type: ignore[misc, arg-type]
    assert found == "rows gives other values than dense"
