"""Makes text printable: messages quote files, plugins and command lines, which may hold any character."""

LONGEST_LINE, LONGEST = 4_000, 16_000  # characters
BEGINS = 0.75  # of a shortened text, the share that is taken from its beginning
# Control characters, line separators and marks of writing direction: they change the cursor, the colour or the order.
_ODD = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _ODD if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """Return the text with control characters escaped. Of a long line, and of a long text, the middle is left out."""
    lines = text.translate(_ESCAPES).split("\n")
    return _shortened("\n".join(_shortened(line, LONGEST_LINE) for line in lines), LONGEST)


def escaped_in_json(text: str) -> str:
    """Return the same JSON with all control characters escaped, also those that JSON allows in strings."""
    return text.translate({code: f"\\u{code:04x}" for code in _ODD if code >= 0x20})


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    gap = f" … {len(text) - most:,} characters left out … "
    first = int(BEGINS * (most - len(gap)))
    return text[:first] + gap + text[len(text) - (most - len(gap) - first) :]
