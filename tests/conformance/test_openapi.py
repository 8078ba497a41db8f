"""`docs/openapi.json` says what the server does: its paths, its documents, and its answers to what is wrong."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import msgspec
import pytest

from replica.durable import FileSystem
from replica.receiver.http_api import HttpApi
from replica.receiver.site import Site
from replica.transport import wire
from replica.transport.tls import client_context
from tests.receiver.loopback import Loopback, Pki, site_spec
from tests.receiver.memory_stores import MemoryStores
from tools.openapi import schemas

DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text())
OPERATIONS = [
    pytest.param(path, method, operation, id=operation["operationId"])
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
    if method != "parameters"
]
GOOD = {"replica": str(UUID(int=1)), "delta": str(UUID(int=2)), "disk": str(UUID(int=3)), "number": "0", "point": "1"}


@pytest.fixture(scope="module")
def server(pki: Pki, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    spec = site_spec(tmp_path_factory.mktemp("openapi"), pki.files("dr-1", ("localhost",)))
    with Loopback(spec, lambda: Site(FileSystem(), spec, stores=MemoryStores())) as running:
        yield running


def ask(server: Loopback, pki: Pki, identity: str, method: str, path: str, body: bytes | None) -> tuple[int, str]:
    context = client_context(pki.files(identity))
    connection = http.client.HTTPSConnection("localhost", server.port, context=context, timeout=20)
    with closing(connection):
        connection.request(method.upper(), path, body)
        response = connection.getresponse()
        data = response.read()
    kind = response.headers.get_content_type()
    if response.status >= 400:
        assert kind == "application/problem+json"
        assert wire.decode(data, wire.Problem, "it").status == response.status
    return response.status, kind


def url_of(path: str, operation: dict[str, object], **values: str) -> str:
    parameters = operation.get("parameters", [])
    assert isinstance(parameters, list)
    query = "&".join(f"{p['name']}=1" for p in parameters if p["in"] == "query")
    return path.format(**GOOD | values) + (f"?{query}" if query else "")


def body_of(operation: dict[str, object]) -> bytes | None:
    """A body that is right in form for a document, and no frame at all where frames are due."""
    content = operation.get("requestBody", {}).get("content", {})  # type: ignore[attr-defined]
    if "application/json" not in content:
        return b"x" if content else None
    name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
    epoch = wire.Epoch(0, UUID(int=4))
    documents: dict[str, msgspec.Struct] = {
        "Enrol": wire.Enrol("web-1", wire.KeyId(UUID(int=5)), bytes(32), epoch),
        "Adopt": wire.Adopt(epoch, UUID(int=4)),
        "Begin": wire.Begin(wire.DeltaId(UUID(int=0)), epoch, b"header"),
        "TreeQuery": wire.TreeQuery(wire.DeltaId(UUID(int=0)), 0, [(0, 1)]),
        "GrainQuery": wire.GrainQuery(wire.DeltaId(UUID(int=0)), bytes(192), [(0, 1)]),
    }
    return msgspec.json.encode(documents[name])


def test_the_paths_are_those_that_are_served(tmp_path: Path, pki: Pki) -> None:
    spec = site_spec(tmp_path, pki.files("dr-1", ("localhost",)))
    with Site(FileSystem(), spec, stores=MemoryStores()) as site:
        api = HttpApi(site)
        served = {(route.method.lower(), route.resource.canonical) for route in api.application().router.routes()}  # type: ignore[union-attr]
        api.close()
    assert served == {
        (method, path) for path, item in DOCUMENT["paths"].items() for method in item.keys() - {"parameters"}
    }


def test_the_documents_are_those_that_are_decoded() -> None:
    assert DOCUMENT["components"]["schemas"] == schemas(), "run tools/openapi.py"


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_a_stranger_is_refused_everywhere(
    server: Loopback, pki: Pki, path: str, method: str, operation: dict[str, dict[str, object]]
) -> None:
    body = body_of(operation)
    if path.endswith(("commit", "/{number}")):
        tail = wire.TAIL_NUMBER if path.endswith("commit") else 0
        body = wire.encode_frame(tail, 160, wire.digest_of(b"x"), b"x") + b"x"
    assert "403" in operation["responses"]
    assert ask(server, pki, "nas-1", method, url_of(path, operation), body)[0] == 403


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_what_is_not_there_or_malformed_is_answered_as_documented(
    server: Loopback, pki: Pki, path: str, method: str, operation: dict[str, dict[str, object]]
) -> None:
    for name in GOOD:
        if "{" + name + "}" in path and not (name == "disk" and "points" in path):
            status, _ = ask(server, pki, "hv-1", method, url_of(path, operation, **{name: "X"}), body_of(operation))
            assert status == 400
            assert "400" in operation["responses"]
    if "{replica}" in path and operation["operationId"] != "enrol":
        status, _ = ask(server, pki, "hv-1", method, url_of(path, operation), body_of(operation))
        assert str(status) in operation["responses"]
        assert status == 404, "whose it is, is asked before what is in the body"
    elif "requestBody" in operation:
        assert ask(server, pki, "hv-1", method, url_of(path, operation), b"")[0] == 400


def test_enrolling_and_asking_are_answered_as_documented(server: Loopback, pki: Pki) -> None:
    item = DOCUMENT["paths"]["/v1/replicas/{replica}"]
    url = url_of("/v1/replicas/{replica}", {})
    assert ask(server, pki, "hv-1", "put", url, body_of(item["put"])) == (200, "application/json")
    for path in (url, "/v1/replicas", f"{url}/points"):
        assert ask(server, pki, "hv-1", "get", path, None) == (200, "application/json")
