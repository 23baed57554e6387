"""Run events: fields, sentences, and events from other versions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluffle_common.protocol.events import (
    REGISTRY,
    Begun,
    Doing,
    Evaluated,
    Joined,
    Loaded,
    NoBroker,
    Other,
    Sent,
    Waiting,
    from_fields,
)

PROTOCOL = Path(__file__).parents[2] / "docs/protocol.md"
WORD = re.compile(r"`(\w+)`")


def documented() -> dict[str, list[str]]:
    """Return the fields of each event that docs/protocol.md documents."""
    table = PROTOCOL.read_text().split("| event | fields |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [re.sub(r"\(.*?\)", "", row).split("|")[1:3] for row in table.splitlines()]
    return {name: WORD.findall(fields) for names, fields in rows for name in WORD.findall(names)}


def test_the_protocol_documents_every_journalled_event_and_its_fields():
    log_only = {"address"}
    assert documented() == {
        name: [field for field in event.field_names if field not in log_only]
        for name, event in REGISTRY.items()
        if event.journalled
    }


def test_fields_omit_missing_values_and_make_the_same_event_again():
    doing = Doing("north", "training", 3, 40)
    event = Waiting(reason="a reason", what="updates", round=7, missing=(doing,), short=0)
    fields = event.fields()
    assert fields["missing"] == [{"worker": "north", "state": "training", "step": 3, "steps": 40}]
    assert from_fields("waiting", fields) == event
    assert Joined(worker="north").fields() == {"worker": "north"}


def test_the_metrics_of_an_evaluation_are_fields_too():
    event = Evaluated(round=1, loss=0.5, metrics={"accuracy": 0.75})
    assert event.fields() == {
        "round": 1,
        "loss": 0.5,
        "accuracy": 0.75,
        "metrics": {"accuracy": 0.75},
    }
    assert from_fields("evaluated", event.fields()) == event


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("joined", {"worker": "north", "num_examples": "many"}, "north joined with ? examples"),
        ("joined", {"worker": "north", "num_examples": True}, "north joined with ? examples"),
        ("joined", {"worker": ["north"], "mood": "good"}, "? joined with ? examples"),
        ("opened", {"round": 1.0, "asked": "north"}, "round ?: opened for ?; ? updates needed"),
        ("evaluated", {"loss": float("nan")}, "round ?: loss ? on ? held-out examples"),
        (
            "personal",
            {"round": 3, "metrics": {"personal_loss": 0.25, "personal_auc": 1.0}},
            "round 3: before averaging, the workers' own models reached personal_loss 0.2500, "
            "personal_auc 1.0000 on held-out examples",
        ),
        (
            "evaluated",
            {"round": 1, "loss": 1.7e308, "num_examples": 5, "metrics": {"mae": -2e9}},
            "round 1: loss 1.7000e+308, mae -2.0000e+09 on 5 held-out examples",
        ),
        (
            "rejected",
            {"reason": "it has a NaN", "worker": "b"},
            "rejected a message of b: it has a NaN",
        ),
        (
            "rejected",
            {"reason": "the message names b as its sender, but", "worker": "b", "cause": "sender"},
            "rejected a message: the message names b as its sender, but",
        ),
        ("eclipse", {"seen_by": ["north", "south"]}, "eclipse: seen_by north, south"),
        ("eclipse", {}, "eclipse"),
    ],
)
def test_invalid_fields_count_as_missing_and_unknown_ones_are_ignored(name, fields, sentence):
    assert from_fields(name, fields).sentence() == sentence


@pytest.mark.parametrize(
    ("event", "sentence"),
    [
        (Loaded(task="t", num_examples=3, classes=("A", "B")), "task t: 3 examples, classes A, B"),
        (Loaded(task="t", num_examples=3), "task t: 3 examples"),
        (Begun(round=0, kind="init"), "round 0: making the first weights"),
        (
            Sent(round=2, kind="fit", metrics={"loss": 0.5}),
            "round 2: update sent, training loss 0.5000",
        ),
        (Sent(round=2, kind="evaluate"), "round 2: evaluation sent"),
    ],
)
def test_events_of_a_worker_in_words(event, sentence):
    assert event.sentence() == sentence
    assert not event.journalled


def test_a_count_of_one_is_singular():
    one = from_fields("opened", {"round": 1, "asked": ["a"], "needed": 1})
    assert one.sentence() == "round 1: opened for a; 1 update needed"
    assert from_fields("opened", {"needed": 3}).sentence().endswith("3 updates needed")
    assert from_fields("opened", {}).sentence() == "round ?: opened for ?; ? updates needed"
    assert (
        from_fields("joined", {"worker": "a", "num_examples": 1}).sentence().endswith("1 example")
    )
    evaluated = from_fields("evaluated", {"round": 1, "num_examples": 1, "loss": 0.5})
    assert evaluated.sentence() == "round 1: loss 0.5000 on 1 held-out example"
    first = from_fields("first_weights", {"tensors": 1, "parameters": 1200})
    assert first.sentence() == "received the first weights: 1 tensor, 1,200 parameters"


def test_an_empty_list_of_workers_is_nobody():
    event = from_fields("reopened", {"reason": "0 of 3 updates", "asked": []})
    assert event.sentence() == "0 of 3 updates; reopened for nobody"


def test_a_sentence_names_a_few_of_many_workers_and_the_fields_name_all():
    names = tuple(f"w{number}" for number in range(1000))
    opened = from_fields("opened", {"round": 7, "asked": names, "needed": 900})
    assert opened.sentence() == (
        f"round 7: opened for {', '.join(names[:12])} and 988 more; 900 updates needed"
    )
    assert opened.fields()["asked"] == list(names)
    few = from_fields("opened", {"round": 7, "asked": names[:12], "needed": 9})
    assert few.sentence() == f"round 7: opened for {', '.join(names[:12])}; 9 updates needed"


def test_a_one_letter_format_is_no_noun():
    slow = from_fields("slow", {"what": "a hook", "running_s": 30})
    assert slow.sentence() == "a hook has been running for 30 s; the run waits for it"
    assert from_fields("slow", {}).sentence().startswith("? has been running for ? s;")


def test_no_metric_replaces_a_field_of_the_log_line():
    event = Sent(round=2, kind="fit", metrics={"round": 9.0, "metrics": 1.0, "loss": 0.5})
    fields = event.fields()
    assert (fields["round"], fields["metric/round"], fields["loss"]) == (2, 9.0, 0.5)
    assert from_fields("sent", fields) == event


def test_an_unknown_event_keeps_its_fields():
    assert from_fields("eclipse", {"at": 3}) == Other("eclipse", {"at": 3})
    assert from_fields("eclipse", {"at": 3}).fields() == {"at": 3}


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@given(st.data(), st.sampled_from(sorted(REGISTRY)))
def test_any_fields_make_an_event_with_a_sentence(data, name):
    keys = st.sampled_from([*REGISTRY[name].field_names, "other"])
    event = from_fields(name, data.draw(st.dictionaries(keys, _anything)))
    assert isinstance(event.sentence(), str)
    assert from_fields(name, event.fields()) == event


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("amqp://127.0.0.1:5673/", True),
        ("amqps://broker.example.org/fluffle", False),
        (None, False),
    ],
)
def test_a_broker_of_another_machine_is_not_to_be_started_here(address, local):
    sentence = NoBroker(address=address, reason="refused").sentence()
    assert ("start a broker with 'fluffle broker up'" in sentence) is local
    assert ("change to the folder in which you started it" in sentence) is local
    assert sentence.endswith("correct --url)")
