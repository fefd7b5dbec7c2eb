"""Hostile values, as JSON that can be printed, and what they stand for."""

from typing import Any

from hypothesis import strategies as st

PLAIN: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, -5, 0.5, 1.5, -0.5, 1e-300, 1e308, 1e20),
    *(float("inf"), float("-inf"), float("nan"), 2**31, 2**63, 10**12, 10**30),
    *(
        "",
        " ",
        "x",
        "..",
        ".",
        "../../x",
        "/",
        "/etc/passwd",
        "~",
        "-x",
        "a\0b",
        "a\nb",
        "\x1b[31mred\x1b[0m",
        "é",
        "𝔘",
        "\u202ex",
    ),
    *(
        "null",
        "true",
        "1e-4",
        "1e5",
        "1:30",
        "٢",
        "0x10",
        "NaN",
        "evil",
        "timm",
        "__import__('os').system('x')",
        "${HOME}",
        "{{7*7}}",
    ),
    *(
        [],
        {},
        [1],
        ["x"],
        [[1, 2], [3]],
        {"a": 1},
        {"": None},
        [None, None],
        [0.9, 1.0],
        [0.5, 0.5],
        {"$long": 5000},
        {"$deep": 40},
    ),
]
# Also as large and as deep as a hostile file may be.
LARGE: list[Any] = [{"$long": 200_000}, {"$deep": 3000}, {"$deep": 100_000}, {"$wide": 20_000}]

hostile = st.one_of(
    st.sampled_from(PLAIN),
    st.sampled_from(PLAIN),
    st.integers(),
    st.floats(),
    st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=12),
    st.lists(st.sampled_from(PLAIN[:20]), max_size=4),
)
shares = st.floats(0, 1, exclude_max=True).map(lambda share: int(share * 10_000) / 10_000)  # of a file's length, lines or nodes


def unfold(value: Any) -> Any:
    """What a value stands for: `$long` a text, `$wide` a section of so many keys; `$deep` is made by `deep`."""
    if isinstance(value, dict) and len(value) == 1:
        if "$long" in value:
            return "x" * value["$long"]
        if "$wide" in value:
            return {f"k{number}": number for number in range(value["$wide"])}
        if "$deep" in value and value["$deep"] < 500:
            return deep(value["$deep"])
    return value


def deep(levels: int) -> Any:
    """A list in a list, so many levels."""
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def in_text(text: str) -> str:
    """The text of a file with what `$deep` stands for, where that is deeper than a writer of YAML or JSON can go."""
    for levels in (3000, 100_000):
        for mark in (f'{{"$deep": {levels}}}', f"{{$deep: {levels}}}", f"$deep: {levels}"):
            text = text.replace(mark, "[" * levels)
    return text
