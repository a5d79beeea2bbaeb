"""The one exception for users: a single line that says what is wrong, where, and how to fix it."""


class UserError(Exception):
    """Bad input or a bad environment. Drivers print the message on one line and exit with status 2."""
