"""Exceptions. Every one has a stable ``code`` such as ``"FN-E201"``; docs/errors.md lists them."""

from __future__ import annotations

import re

__all__ = ["BudgetError", "Error", "RuntimeFailure", "StorageError", "UsageError"]


#: what a message may quote from a file and a terminal would obey: controls (line breaks and tabs aside), and characters
#: that turn the direction of writing
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class Error(Exception):
    """Base of all errors raised by funicular.

    Attributes
    ----------
    code : str
        Stable code, ``FN-Exxx``.
    """

    code: str

    def __init__(self, code: str, message: str) -> None:
        message = _CONTROL.sub(lambda found: ascii(found.group())[1:-1], message)
        super().__init__(message if message.startswith(code) else f"{code} {message}")
        self.code = code


class UsageError(Error, ValueError):
    """A mistake in arguments, in the model or in the policy; nothing was touched."""


class BudgetError(Error, MemoryError):
    """A budget does not hold what is asked."""


class StorageError(Error, OSError):
    """Disk or file trouble; ``errno`` is the operating system's number, if there was one."""


class RuntimeFailure(Error, RuntimeError):
    """Device trouble, a closed runtime, or a broken invariant."""
