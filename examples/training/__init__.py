"""The parts of `train.py`."""


class FlagError(ValueError):
    """What the command line asks for cannot be done; the message names the flag."""
