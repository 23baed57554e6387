"""The schema and the test vectors for workers in other languages."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path

import jsonschema
import msgpack
import numpy as np
import pytest

from fluffle_common.errors import MalformedMessage
from fluffle_common.protocol import messages, wire_format
from fluffle_coordinator.conformance.examine import SCENARIOS
from fluffle_coordinator.strategy.update_checks import decode_update
from fluffle_worker.inbox import check_message

FOLDER = Path(__file__).parents[2] / "docs/protocol"
SCHEMA = json.loads((FOLDER / "schema.json").read_text())
VECTORS = json.loads((FOLDER / "vectors.json").read_text())
CHECK = jsonschema.Draft202012Validator(SCHEMA)
BASE = {"w": np.zeros(2, np.float32)}


def each(part: str):
    return [pytest.param(one, id=one["name"]) for one in VECTORS[part]]


def loaded(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_up_to_date():
    made = loaded("make").files()
    assert {path.name for path in made} == {"schema.json", "vectors.json", "protocol.md"}
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/protocol/make.py"


def test_there_is_a_vector_of_every_kind():
    kinds = set(messages.kinds_of(messages.Message))
    assert {one["header"]["kind"] for one in VECTORS["sound"]} == kinds
    assert len(VECTORS["unsound"]) >= 20
    assert len(VECTORS["unsound_fits"]) >= 20


@pytest.mark.parametrize("one", each("sound"))
def test_a_valid_message_is_decoded_and_matches_the_schema(one):
    body = base64.b64decode(one["body"])
    message, payload = wire_format.decode(body, "letters")
    assert message.kind == one["header"]["kind"]
    assert len(payload) == one["payload_bytes"]
    header, _ = msgpack.unpackb(body)
    header.pop("pad", None)
    assert header == one["header"]
    CHECK.validate(header)


@pytest.mark.parametrize("one", each("unsound"))
def test_an_invalid_message_is_refused_with_its_cause(one):
    with pytest.raises(MalformedMessage) as refused:
        message, payload = wire_format.decode(base64.b64decode(one["body"]), "letters")
        decode_update(message, payload, BASE)
    assert refused.value.cause == one["cause"]


@pytest.mark.parametrize("one", each("unsound_fits"))
def test_an_invalid_fit_is_refused_with_its_cause(one):
    with pytest.raises(MalformedMessage) as refused:
        check_message(base64.b64decode(one["body"]), "letters")
    assert refused.value.cause == one["cause"]


def test_the_schema_refuses_invalid_headers():
    lenient = {"an unknown key that is critical"}  # of which a schema cannot know
    of_headers = [one for one in VECTORS["unsound"] if one["cause"] == "malformed"]
    refused = 0
    for one in of_headers:
        try:
            header, _ = msgpack.unpackb(base64.b64decode(one["body"]))
        except ValueError:
            continue
        if not isinstance(header, dict) or one["name"] in lenient:
            continue
        if one["name"] in ("a duration that is NaN", "a metric that is infinite"):
            continue  # no JSON
        if one["name"] == "a number of examples that is a float":
            continue  # 5.0 is an integer to JSON schema
        assert not CHECK.is_valid(header), one["name"]
        refused += 1
    assert refused >= 8


@pytest.mark.parametrize("one", VECTORS["encoded"], ids=lambda one: one["encoding"])
def test_an_encoded_update_decodes_to_these_numbers(one):
    message, payload = wire_format.decode(base64.b64decode(one["body"]), "letters")
    base = {"w": np.zeros(one["shape"], np.float32)}
    delta, _, _ = decode_update(message, payload, base)
    assert np.asarray(delta["w"]).tobytes() == base64.b64decode(one["delta_float32"])


def test_the_digest_is_blake3_of_the_blake3_of_each_part():
    from blake3 import blake3

    told = VECTORS["digest"]
    parts = [bytes(wire_format.PART_BYTES), bytes(told["nbytes"] - wire_format.PART_BYTES)]
    assert len(parts) == told["parts"]
    assert blake3(b"".join(blake3(part).digest() for part in parts)).hexdigest() == told["digest"]


# --- the tables of the document ------------------------------------------------------------------


def row(table: str, first: str) -> dict[str, str]:
    """Return a row of a table in Markdown by the names of its columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    (found,) = [cells for cells in lines if cells and cells[0] == first]
    head = next(cells for cells in lines if len(cells) == len(found))
    return dict(zip(head, found, strict=True))


def test_the_table_of_the_worker_matches_its_machine():
    made = loaded("tables").worker()
    again = row(made, "the same `fit` again")
    assert again["idle"] == "start it"
    assert again["at work"] == again["sending"] == "ignore it"
    assert again["answered"] == "send the same answer again"
    newer = row(made, "a `fit` of a newer round")
    assert newer["at work"] == "abort the work at its next step, then start it"
    assert row(made, "a `fit` of an older round")["at work"] == "ignore it"
    assert row(made, "its `verdict`, with `train_again`")["answered"] == "discard the answer"


def test_the_table_has_every_timer_of_the_coordinator():
    tables = loaded("tables")
    assert tables.missing_timers() == set()
    assert row(tables.timers(), "deadline")["default"] == "600 s"


def test_the_sections_that_conformance_cites_exist():
    headings = {
        line.removeprefix("## ")
        for line in (FOLDER.parent / "protocol.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("## ")
    }
    assert {scenario.section for scenario in SCENARIOS} <= headings
