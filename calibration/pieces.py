"""A long text in pieces. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator


def pieces_of(text: str, length: int) -> Iterator[str]:
    """Cut a text into pieces of at most `length` characters, between lines or words where it can be."""
    start = 0
    while len(text) - start > length:
        stop = start + length
        # A word keeps the space before it, as tokenizers have it; a line the break behind it.
        stop = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start + 1, stop)
        stop = stop if stop > start else start + length
        yield text[start:stop]
        start = stop
    yield text[start:]
