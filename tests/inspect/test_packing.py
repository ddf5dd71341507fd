"""The compact document holds what the document held."""

from __future__ import annotations

import json
import math

from kfc_fx.inspect.packing import NODE_FIELDS, embedded_json, pack_document
from tests.inspect.documents import HOSTILE, residual_document


def unpack(packed):
    """The plain reading of the packed form, as the page's script does it."""
    strings = packed["strings"]
    text = [field for field in NODE_FIELDS if field not in ("args", "shape")]

    def node(row):
        fields = dict(zip(packed["fields"], row, strict=False))
        fields |= {field: strings[fields[field]] for field in text if fields[field] is not None}
        fields["args"] = [strings[index] for index in fields["args"]]
        return fields | (row[len(NODE_FIELDS)] if len(row) > len(NODE_FIELDS) else {})

    def stage(graph, held):
        names = {key: [strings[index] for index in held[key]] for key in ("created", "erased")}
        return {**held, **names, "nodes": [node(graph["rows"][row]) for row in held["nodes"]]}

    return [
        {"index": graph["index"], "stages": [stage(graph, held) for held in graph["stages"]]}
        for graph in packed["graphs"]
    ]


def test_packing_loses_nothing():
    document = residual_document((2, 2))
    document["graphs"][0]["stages"][0]["nodes"][3]["note"] = {"more": [1, 2]}
    packed = json.loads(json.dumps(pack_document(document)))
    assert unpack(packed) == document["graphs"]
    assert packed["blocks"] == document["blocks"]


def test_nodes_that_stages_share_are_stored_once():
    document = residual_document((2, 2))
    first, last = document["graphs"][0]["stages"]
    document["graphs"][0]["stages"] = [first, {**first, "name": "canonical"}, last]
    graph = pack_document(document)["graphs"][0]
    different = {json.dumps(node) for stage in (first, last) for node in stage["nodes"]}
    assert len(graph["rows"]) == len(different)


def test_no_text_can_end_the_element():
    text = embedded_json({HOSTILE: ["<!--", "&amp;", "\u2028"]})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {HOSTILE: ["<!--", "&amp;", "\u2028"]}


def test_numbers_that_json_lacks_become_null():
    assert json.loads(embedded_json({"loss": [1.5, math.nan, math.inf]})) == {
        "loss": [1.5, None, None]
    }
