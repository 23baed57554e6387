"""Generates the files for testing a worker in another language, and the tables of protocol.md.

    python docs/protocol/make.py            writes schema.json, vectors.json, and the generated
                                            tables of ../protocol.md
    python docs/protocol/make.py --check    exits with 1 if one of them is out of date

``schema.json`` is a JSON schema of every header. ``vectors.json`` contains complete message bodies
in base64: sound messages of each kind, with their headers; unsound updates and fits, with the cause
of their rejection; encoded updates, with the deltas that they decode to; and the digest of a
payload in parts. ``vectors.py`` makes the vectors, and ``tables.py`` the tables.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from fluffle_common.protocol import messages as m
from fluffle_common.tensors.table import TensorEntry

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    """Return a module of this folder, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(text: str) -> str:
    """Return the text of protocol.md with its generated tables updated."""
    tables = load("tables")
    for name in ("worker", "timers", "requirements"):
        begin, end = f"<!-- {name}: made by docs/protocol/make.py -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{getattr(tables, name)()}\n{end}{after}"
    return text


def schema() -> dict[str, Any]:
    """Return the JSON schema of all headers; it describes binary data as strings."""
    adapter: TypeAdapter[m.Message] = TypeAdapter(Annotated[m.Message, Field(discriminator="kind")])
    schema = adapter.json_schema()
    for definition in schema["$defs"].values():
        if "protocol" in definition.get("properties", {}):
            definition["required"] = ["protocol", "kind", *definition["required"]]
    entry = schema["$defs"]["TensorEntry"]  # a tuple in Python, a map on the wire
    schema["$defs"]["TensorEntry"] = {
        "type": "object",
        "properties": dict(zip(TensorEntry._fields, entry["prefixItems"], strict=True)),
        "required": [n for n in TensorEntry._fields if n not in TensorEntry._field_defaults],
        "additionalProperties": False,
    }
    return schema


def files() -> dict[Path, str]:
    """Return the text of each generated file."""
    generated = {
        HERE / name: json.dumps(value, indent=1) + "\n"
        for name, value in (("schema.json", schema()), ("vectors.json", load("vectors").vectors()))
    }
    document = HERE.parent / "protocol.md"
    return {**generated, document: page(document.read_text(encoding="utf-8"))}


def main() -> int:
    """Write the files, or check that they are up to date."""
    generated = files()
    if "--check" in sys.argv:
        return int(any(not p.exists() or p.read_text() != text for p, text in generated.items()))
    for path, text in generated.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
