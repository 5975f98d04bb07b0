"""Every error this package raises on purpose.

    OptimumOrderError
    ├── OrderError (ValueError)        an order, stage or option that cannot be run
    ├── ModelError (ValueError)        a model or checkpoint that cannot be compressed
    ├── DataError (ValueError)         calibration or evaluation data that cannot be used
    ├── FormatError (ValueError)       a format that cannot hold what it was given
    ├── OutputError (OSError)          a path that cannot be written
    ├── ArtifactError (ValueError)     a saved artifact that is not what it says it is
    ├── HubError (OSError)             a model on the Hub that cannot be read or written
    ├── RankError (RuntimeError)       another process of the same run has ended
    └── InvariantError (RuntimeError)  a backend broke a promise; always a bug, never bad input

A message says what failed, what was given, what is allowed, and what to do.
"""

import difflib
import re
import traceback
from collections.abc import Iterable


class OptimumOrderError(Exception):
    """Base of all errors below; the command line turns it into one line and exit code 2."""


class OrderError(OptimumOrderError, ValueError):
    """An order, stage or option that cannot be run."""


class ModelError(OptimumOrderError, ValueError):
    """A model or checkpoint that cannot be compressed."""


class DataError(OptimumOrderError, ValueError):
    """Calibration or evaluation data that cannot be used."""


class FormatError(OptimumOrderError, ValueError):
    """A format that cannot hold what it was given."""


class OutputError(OptimumOrderError, OSError):
    """A path that cannot be written."""


class ArtifactError(OptimumOrderError, ValueError):
    """A saved artifact that is not what it says it is."""


class HubError(OptimumOrderError, OSError):
    """A model on the Hub that cannot be read or written."""


class RankError(OptimumOrderError, RuntimeError):
    """Another process of the same run has ended."""


class InvariantError(OptimumOrderError, RuntimeError):
    """A backend broke a promise that every stage keeps."""


def redacted(text: str, *secrets: str | None) -> str:
    """Return a text without secrets, and without what looks like a token.

    Args:
        text: Any text; a server may repeat any header in its messages.
        secrets: What must not be shown.
    """
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return re.sub(r"(?i:(?<=bearer ))\S+|\bhf_\w{8,}|\beyJ[\w-]+\.[\w-]+\.[\w-]*", "***", text)


def chainable(error: BaseException, *secrets: str | None) -> BaseException | None:
    """Return an error to raise another from, or None if its traceback would show a secret.

    Args:
        error: The error.
        secrets: What must not be shown.
    """
    shown = "".join(traceback.format_exception(error))
    return error if redacted(shown, *secrets) == shown else None


def unknown(what: str, got: str, allowed: Iterable[str]) -> str:
    """Return the message for a name that is not allowed, with the nearest as a suggestion.

    Args:
        what: The kind of thing that is named.
        got: The name.
        allowed: The names that are allowed.
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(got, allowed, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"Unknown {what} '{got}'.{hint} Allowed: {', '.join(allowed)}."


def missing_extra(extra: str, error: ImportError) -> OptimumOrderError:
    """Return the error for a package that is not installed because it belongs to an extra.

    Args:
        extra: The extra of optimum-order that brings the package.
        error: From the import that failed.
    """
    return OptimumOrderError(
        f"The package '{error.name}' is not installed. Install it with "
        f"pip install 'optimum-order[{extra}]'."
    )
