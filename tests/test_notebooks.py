"""What a notebook shows of a compiled model and its plan: short, true and escaped."""

from __future__ import annotations

import torch
from torch import nn

import kfc_fx
from kfc_fx.plan.spec import CurvaturePlan, GenericSpec
from tests.models import IMAGES, conv_network


def test_a_plan_is_a_table_of_every_parameter():
    compiled = kfc_fx.compile(conv_network())
    shown = compiled.kfc.trace(IMAGES)._repr_html_()
    for block in compiled.kfc.plan.blocks:
        assert f"<td>{block.name}</td><td>{block.kind}</td>" in shown
    assert shown.count("<tr>") == 1 + len(compiled.kfc.plan.blocks)


def test_names_and_reasons_are_escaped():
    plan = CurvaturePlan((), (GenericSpec("<b>", (2,), 'a & "b"'),), ("<script>",))
    shown = plan._repr_html_()
    assert "<b>" not in shown
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "a &amp; &quot;b&quot;" in shown


def test_a_compiled_model_shows_its_summary_and_then_its_plan():
    compiled = kfc_fx.compile(conv_network())
    assert compiled.kfc._repr_html_().count("<table>") == 0
    assert "not captured yet" in compiled.kfc._repr_html_()
    compiled.kfc.trace(IMAGES)
    assert repr(compiled.kfc).startswith("Compilation(Sequential: 1 graph, 4 blocks; likelihood=")
    assert "1 graph, 4 blocks" in compiled.kfc._repr_html_()
    assert compiled.kfc._repr_html_().count("<table>") == 1


def test_a_class_name_is_escaped():
    network = type("<img>", (nn.Linear,), {})(2, 2)
    compiled = kfc_fx.compile(network)
    compiled.kfc.trace(torch.ones(3, 2))
    assert "<img>" not in compiled.kfc._repr_html_()
    assert "(root)" in compiled.kfc._repr_html_()
