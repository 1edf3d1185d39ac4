"""What a base image's tag means now: its digest, asked of the registry (OCI distribution API)."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPMessage

from tanren.config.errors import RequestError, WorkError

_TYPES = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
TIMEOUT_SECONDS = 30


def split_base(base: str) -> tuple[str, str, str]:
    """`host/repository:tag` as its three parts; the tag is empty where there is none."""
    match = re.fullmatch(r"([a-z0-9.-]+(?::\d+)?)/([a-z0-9._/-]+)(?::([A-Za-z0-9._-]+))?", base)
    if match is None:
        raise RequestError(
            base, "is not HOST/REPOSITORY:TAG", "check it in containers/versions.env"
        )
    return match[1], match[2], match[3] or ""


def digest_of(base: str) -> str:
    """The digest that a base's tag has now, `sha256:...`.

    Raises:
        WorkError: the registry cannot be reached or does not know the tag.
    """
    host, repository, tag = split_base(base)
    local = host.split(":")[0] in ("localhost", "127.0.0.1")
    url = f"{'http' if local else 'https'}://{host}/v2/{repository}/manifests/{tag}"
    try:
        headers = _head(url)
    except urllib.error.HTTPError as error:
        problem = "the registry does not know this tag" if error.code == 404 else f"{error}"
        raise WorkError(base, problem, "check the base in containers/versions.env") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise WorkError(
            base,
            f"the registry cannot be reached: {reason}",
            "build where the network reaches it (a login node, mostly); https_proxy is honoured",
        ) from None
    digest = headers.get("Docker-Content-Digest")
    if not digest:
        raise WorkError(
            base, "the registry's answer names no digest",
            "the same command again; a proxy may have answered in its place",
        )  # fmt: skip
    return digest


def _head(url: str, token: str | None = None) -> HTTPMessage:
    request = urllib.request.Request(url, method="HEAD", headers={"Accept": _TYPES})
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            headers: HTTPMessage = answer.headers
            return headers
    except urllib.error.HTTPError as error:
        if error.code != 401 or token:
            raise
        return _head(url, _token(error.headers.get("WWW-Authenticate", "")))


def _token(challenge: str) -> str:
    """An anonymous token, from where the registry's challenge says (RFC 6750)."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = fields.pop("realm", "")
    if not realm.startswith(("https://", "http://localhost", "http://127.0.0.1")):
        raise OSError(f"asks for a login that is not understood: {challenge}")
    query = urllib.parse.urlencode({k: v for k, v in fields.items() if k in ("service", "scope")})
    with urllib.request.urlopen(f"{realm}?{query}", timeout=TIMEOUT_SECONDS) as answer:
        value = json.load(answer)
    return str(value.get("token") or value["access_token"])
