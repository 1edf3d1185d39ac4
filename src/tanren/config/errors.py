"""Errors for people: every one names a place, a problem and a next step.

The exit codes are the project's contract: 0 done, 1 the work failed, 2 the request is wrong,
75 stopped early and resumable (the value of EX_TEMPFAIL in sysexits.h).
"""

from __future__ import annotations

import errno

EXIT_FAILED = 1
EXIT_REQUEST = 2
EXIT_STOPPED = 75
# Ended by SIGTERM, as a shell would report it.
EXIT_TERMINATED = 143


class TanrenError(Exception):
    """What a person reads when something is wrong.

    Args:
        place: the file, line, field or folder that the problem is in.
        problem: what is wrong, with the values of both sides where two disagree.
        next_step: what to do now, as a command wherever one exists; empty where the problem says
            it, as `input should be a valid integer` does.
    """

    exit_code = EXIT_FAILED

    def __init__(self, place: object, problem: str, next_step: str) -> None:
        self.place = str(place)
        self.problem = problem.rstrip(".")
        self.next_step = next_step.rstrip()
        super().__init__(self.text())

    def text(self) -> str:
        """The message as one paragraph: `place: problem.` and the next step."""
        message = f"{self.place}: {self.problem}."
        return f"{message}\n  next: {self.next_step}" if self.next_step else message

    def __reduce__(self) -> tuple[object, ...]:
        """Cross from one process to another: Exception would take the text for the parts."""
        return type(self), (self.place, self.problem, self.next_step), self.__dict__

    def as_dict(self) -> dict[str, object]:
        """The same as plain values, to cross from a worker process to the command."""
        return {
            "place": self.place,
            "problem": self.problem,
            "next_step": self.next_step,
            "exit_code": self.exit_code,
        }


class RequestError(TanrenError):
    """The request cannot be carried out as it stands (exit code 2)."""

    exit_code = EXIT_REQUEST


class WorkError(TanrenError):
    """The request was right and the work failed (exit code 1)."""

    exit_code = EXIT_FAILED


def error_from_dict(value: dict[str, object]) -> TanrenError:
    """Rebuild an error that a worker process wrote with `as_dict`."""
    kind = RequestError if value.get("exit_code") == EXIT_REQUEST else WorkError
    return kind(
        str(value.get("place", "?")),
        str(value.get("problem", "unknown problem")),
        str(value.get("next_step", "")),
    )


# What is a person's to mend: rights, a disk that may not be written.
_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_yours(error: OSError) -> bool:
    """Whether the system refuses something that a person can mend, and no mistake of ours."""
    return is_full(error) or (error.errno in _RIGHTS and error.filename is not None)


def is_full(error: OSError) -> bool:
    """Whether a disk, or what one may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def of_system(error: OSError, place: object) -> WorkError:
    """An error of the operating system for people.

    Args:
        place: what to name where the system names no file.
    """
    return WorkError(
        error.filename or place,
        error.strerror or str(error),
        "free some space, or name a larger disk (RUNS=, DATA=, TMPDIR=); the same command goes on"
        if is_full(error)
        else "mend that and run the same command again",
    )
