"""The printed update is the one that runs; a text that is not is found out."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kfc_fx.errors import TargetError
from kfc_fx.inspect.document import build_document
from kfc_fx.inspect.inputs import parse_input
from kfc_fx.inspect.inspection import InspectionOptions, inspect_model
from kfc_fx.inspect.update_text import prove_update, run_text, split_update
from kfc_fx.inspect.update_view import whole_update
from tests.inspect.small_networks import INPUTS, ConvNet, Functional


@cache
def inspection(network, scaling="adam", input_factor="auto", capture="dynamo"):
    torch.manual_seed(0)
    options = InspectionOptions(capture, scaling=scaling, input_factor=input_factor)
    return inspect_model(network(), network.__name__, [parse_input(INPUTS[network])], options)


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
@pytest.mark.parametrize("network", INPUTS)
def test_the_printed_source_steps_as_the_engine_does(network, scaling):
    found = inspection(network, scaling)
    proof = prove_update(found, found.update_source)
    assert proof.different == ()
    assert proof.changed > 0


def test_the_source_is_that_of_the_optimizer():
    found = inspection(ConvNet)
    assert found.update_source == found.optimizer.update_source


def test_the_parts_put_together_are_the_source():
    source = inspection(ConvNet).update_source
    assert list(split_update(source)) == ["", "accumulate", "refresh", "apply"]
    assert whole_update(build_document(inspection(ConvNet))["update"]) == source


def test_a_text_that_does_something_else_is_found_out():
    found = inspection(ConvNet)
    source = found.update_source.replace("1 - momentum", "1 - momentum * 0.5")
    assert source != found.update_source
    assert "head.weight" in prove_update(found, source).different


def test_the_functions_come_from_the_text():
    functions = run_text("def apply(x):\n    return x + 1\n")
    assert functions["apply"](1) == 2


def test_a_symbolic_capture_takes_no_step():
    found = inspection(ConvNet, capture="symbolic")
    with pytest.raises(TargetError, match="--capture dynamo"):
        prove_update(found, found.update_source)


def test_a_model_without_blocks_has_nothing_to_prove():
    found = inspect_model(Functional(), "Functional", [parse_input("2x3")])
    with pytest.raises(TargetError, match="no parameter of the model has a block"):
        prove_update(found, found.update_source)
