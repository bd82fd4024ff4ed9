"""The error that the build raises."""


class BuildError(RuntimeError):
    """The native libraries cannot be built; the message says what to do about it."""
