"""Text that may hold anything, as a person can be shown it: files, plugins and command lines of others are quoted in it."""

LONGEST_LINE, LONGEST = 4_000, 16_000  # characters
BEGINS = 0.75  # the share of what is shown that is the beginning
# What moves the cursor, colours, or writes backwards: control characters, ends of lines and turns of direction.
_ODD = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_ESCAPES = {code: ascii(chr(code))[1:-1] for code in _ODD if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """The text with control characters escaped; of a line, and of the whole, the middle is left out where it is too long."""
    lines = text.translate(_ESCAPES).split("\n")
    return _shortened("\n".join(_shortened(line, LONGEST_LINE) for line in lines), LONGEST)


def escaped_in_json(text: str) -> str:
    """The same JSON, without the control characters that JSON allows in its texts."""
    return text.translate({code: f"\\u{code:04x}" for code in _ODD if code >= 0x20})


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    said = f" … {len(text) - most:,} characters left out … "
    first = int(BEGINS * (most - len(said)))
    return text[:first] + said + text[len(text) - (most - len(said) - first) :]
