"""The one exception that reaches a user: a single line that says what is wrong, where, and how to fix it."""


class UserError(Exception):
    """Bad input or environment. Drivers print its message on one line and exit with status 2."""
