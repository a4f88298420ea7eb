"""The one exception of this package."""


class LoraInitError(ValueError):
    """Says where something is wrong, what was got and expected, and what to do about it, in one line."""
