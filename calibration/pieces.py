"""Text that can be stored and tokenized, and a long one in pieces. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import SourceError


def check_whole(text: str, what: str) -> str:
    """Return a text of JSON, which may hold halves of characters that no file in UTF-8 can.

    Args:
        text: to be checked.
        what: it is, and where it stands, for the message.

    Raises:
        SourceError: it holds such a half.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{what}: character {error.start} is one half of a surrogate pair, which is no text",
            hint="write the whole character, or leave the line out",
        ) from None
    return text


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
