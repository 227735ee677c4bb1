"""The model of an arena, of `vattn.allocator.testing_mirror`."""

from vattn.allocator.testing_mirror import (
    PAGE,
    WORDS,
    Mirror,
    Sheet,
    maps_within,
    open_things,
    words_at,
)

__all__ = ["PAGE", "WORDS", "Mirror", "Sheet", "maps_within", "open_things", "words_at"]
