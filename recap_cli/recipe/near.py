"""Names that a misspelt one may mean."""

import difflib
from collections.abc import Iterable, Sequence


def near(word: str, words: Iterable[str]) -> list[str]:
    """Return the few `words` that `word` may be a misspelling of, best first. Case does not count."""
    lowered = {known.lower(): known for known in words}
    return [lowered[found] for found in difflib.get_close_matches(word.lower(), lowered, cutoff=0.65)]


def did_you_mean(words: Sequence[str]) -> str:
    """Return the end of a message that proposes `words`; nothing if there are none."""
    return f"; did you mean {' or '.join(words)}?" if words else ""
