"""A mistake that the user can mend is a sentence: what is wrong, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake that the user can mend: printed as a sentence, exit code 1, no traceback."""


@contextmanager
def as_user_error(sentence: str, kinds=Exception) -> Iterator[None]:
    """Turn exceptions of these kinds into a UserError: the sentence, and the library's reason."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{sentence}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """Return the reason of an exception in one line, with its kind where it gives no text."""
    # torch.distributed.checkpoint keeps the exceptions of all processes in "failures".
    failures = getattr(error, "failures", None)
    if failures:
        first_process = next(iter(failures.values()))
        error = first_process[0]
    reason = error.__cause__ or error
    text = " ".join(str(reason).split())
    return text or type(reason).__name__
