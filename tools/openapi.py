"""Write the documents of the wire into docs/openapi.json, as the code has them: `python tools/openapi.py`.

Paths and answers in that file are written by hand; the schemas are the structs of `replica.transport.wire`, and a
test compares them. Run this after a change to one of those structs.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from replica.transport import wire

DOCUMENT = Path(__file__).parents[1] / "docs" / "openapi.json"
KINDS = (
    wire.ReplicaInfo,
    wire.StillDamaged,
    wire.Enrol,
    wire.Adopt,
    wire.Begin,
    wire.Begun,
    wire.TreeQuery,
    wire.GrainQuery,
    wire.PointSummary,
    wire.Problem,
)
"""Every document that travels by itself; what they consist of follows."""


def schemas() -> dict[str, object]:
    """The schemas as they must be in the document."""
    _, found = msgspec.json.schema_components(KINDS, ref_template="#/components/schemas/{name}")
    plain: dict[str, object] = json.loads(json.dumps(found))
    return plain


def main() -> None:
    document = json.loads(DOCUMENT.read_text())
    document["components"]["schemas"] = schemas()
    DOCUMENT.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
