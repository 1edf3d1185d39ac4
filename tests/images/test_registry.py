"""The digest of a tag, asked of a registry that answers as the real ones do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from tanren.config.errors import TanrenError
from tanren.images import registry


class Registry(BaseHTTPRequestHandler):
    """Asks for a token, as a registry does of whoever is not logged in."""

    digest = "sha256:" + "a" * 64

    def do_HEAD(self) -> None:
        if self.headers.get("Authorization") != "Bearer let-me-in":
            self.send_response(401)
            realm = f"http://localhost:{self.server.server_port}/token"
            scope = "repository:nvidia/pytorch:pull"
            self.send_header(
                "WWW-Authenticate", f'Bearer realm="{realm}",service="reg",scope="{scope}"'
            )
        elif self.path != "/v2/nvidia/pytorch/manifests/26.01-py3":
            self.send_response(404)
        elif "image.index" not in self.headers.get("Accept", ""):
            self.send_response(406)
        else:
            self.send_response(200)
            self.send_header("Docker-Content-Digest", self.digest)
        self.end_headers()

    def do_GET(self) -> None:
        known = "service=reg" in self.path and "scope=repository%3Anvidia%2Fpytorch" in self.path
        self.send_response(200 if known else 400)
        self.end_headers()
        self.wfile.write(json.dumps({"token": "let-me-in"}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("localhost", 0), Registry)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()


def test_a_tag_has_a_digest(host: str) -> None:
    assert registry.digest_of(f"{host}/nvidia/pytorch:26.01-py3") == Registry.digest


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("{host}/nvidia/pytorch:1", r"the registry does not know this tag"),
        ("localhost:9/nvidia/pytorch:1", r"the registry cannot be reached: .*refused"),
        ("pytorch", r"pytorch: is not HOST/REPOSITORY:TAG"),
    ],
)
def test_what_cannot_be_asked_is_said(host: str, base: str, message: str) -> None:
    with pytest.raises(TanrenError, match=message):
        registry.digest_of(base.format(host=host))
