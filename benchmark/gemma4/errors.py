"""What ends a command with one sentence."""


class UserError(Exception):
    """One sentence for the user: what is wrong, where, and what to do.

    Attributes:
        status: The command's exit status.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status
