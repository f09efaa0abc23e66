"""The exception that means "the input is wrong": shown as one sentence, exit code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to do next."""
