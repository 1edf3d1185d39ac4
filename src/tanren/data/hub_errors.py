"""What the hub's refusals and broken connections mean for the person who fetches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tanren.config.errors import RequestError, TanrenError, WorkError, is_full
from tanren.data import hub
from tanren.data.hub import Reference

OTHER_HUB = "check the network and the proxy (https_proxy); HF_ENDPOINT= names a mirror"


@contextmanager
def explained(reference: Reference, file: str | None = None) -> Iterator[None]:
    """Turn the many errors of huggingface_hub and its HTTP client into one of ours."""
    try:
        yield
    except (TanrenError, InterruptedError):
        raise
    except Exception as error:
        raise _explanation(error, reference, file) from None


def _explanation(error: BaseException, reference: Reference, file: str | None) -> TanrenError:
    from huggingface_hub import errors, get_token

    # "Not in the cache either" has the reason behind it.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    login = "the login of this machine" if get_token() else "no login (HF_TOKEN is not set)"
    place = f"{reference} {file}" if file else str(reference)
    if isinstance(error, errors.GatedRepoError):
        return RequestError(
            place, f"is gated, and {login} may not read it",
            "ask for access on its page on the hub, and set HF_TOKEN to a token of that account",
        )  # fmt: skip
    if isinstance(error, errors.RepositoryNotFoundError):
        other = "model" if reference.kind == "dataset" else "dataset"
        return RequestError(
            place, f"the hub has no such {reference.kind}, or it is private and {login} may not "
            "read it",
            f"check the name (or is it a {other}?); for a private one set HF_TOKEN",
        )  # fmt: skip
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(
            place, f"has no revision {reference.revision}",
            "name a branch, a tag, or the 40 digits of a commit",
        )  # fmt: skip
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return WorkError(
            place, "the hub lists this file and does not have it",
            "try again later, or pin another revision",
        )  # fmt: skip
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return RequestError(place, f"the hub refuses it to {login} ({status})",
                                "set HF_TOKEN to a token that may read it")  # fmt: skip
        return WorkError(place, f"the hub answers {status}", "the same command goes on later")
    if isinstance(error, OSError) and is_full(error):
        return WorkError(
            hub.data_root(), f"the disk was full while {place} came",
            "make room, or DATA= on a larger disk; the same command goes on",
        )  # fmt: skip
    if isinstance(error, PermissionError) and error.filename:
        return RequestError(error.filename, f"cannot be written: {error.strerror}",
                            "DATA= where you may write")  # fmt: skip
    said = str(error).strip().splitlines()
    reason = said[0] if said else "no message"
    return WorkError(
        place, f"the hub cannot be reached, or broke off: {type(error).__name__}: {reason}",
        f"{OTHER_HUB}. The same command goes on with the files that came",
    )  # fmt: skip
