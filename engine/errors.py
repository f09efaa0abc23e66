"""The exception that means "the input is wrong": shown as one sentence, exit code 2."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what to do next."""


def reason(error: Exception) -> str:
    """Why a file cannot be used, in one line, without its path: the sentence names that."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())
