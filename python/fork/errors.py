class ForkError(Exception):
    """One sentence for the user: what is wrong, where, and what to do."""


class PatchError(ForkError):
    """A patch that does not apply."""


class UnexportedError(ForkError):
    """python/sglang holds work that patches/ does not."""
