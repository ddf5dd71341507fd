"""``kfc-fx inspect`` from the command line: views, files, colours, errors."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from typer.testing import CliRunner

from kfc_fx.inspect.document import load_schema
from kfc_fx.tools.cli import app
from tests.inspect.small_networks import ConvNet

CONV_NET = ["tests.inspect.small_networks:ConvNet", "--input", "4x2x6x6"]
CHANGED = ("1 - momentum", "1 - 0.5 * momentum")
ESCAPE = "\x1b["


def invoke(*arguments, **environment):
    return CliRunner(env=environment).invoke(app, ["inspect", *arguments])


def looked_at(*arguments, **environment):
    result = invoke(*CONV_NET, *arguments, **environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    """The one line of an error that a user can mend."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("view", ["summary", "plan", "graph", "update", "passes"])
def test_a_pipe_gets_plain_text_and_a_terminal_colours(view):
    piped = looked_at("--view", view)
    assert ESCAPE not in piped
    assert all(line == line.rstrip() for line in piped.splitlines())
    coloured = looked_at("--view", view, FORCE_COLOR="1", COLUMNS="100", TERM="xterm-256color")
    assert ESCAPE in coloured


def test_a_table_keeps_its_columns_on_a_narrow_terminal():
    shown = looked_at("--view", "plan", FORCE_COLOR="1", NO_COLOR="1", COLUMNS="60", TERM="xterm")
    assert "3x3 padding 1" in shown
    assert len(shown.splitlines()) < 20


@pytest.mark.parametrize("view", ["graph", "update"])
def test_no_color_is_respected_on_a_terminal(view):
    on = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}
    shown = looked_at("--view", view, **on)
    assert "\x1b[3" not in shown  # no foreground; bold and dim are no colours


def test_created_lines_are_marked_in_text_and_in_colour():
    assert "created by emissions" in looked_at("--view", "graph", "--stage", "emissions")
    coloured = looked_at(
        "--view", "graph", "--stage", "emissions", FORCE_COLOR="1", TERM="xterm-256color"
    )
    green = [line for line in coloured.splitlines() if "\x1b[32;49m" in line]
    assert len(green) == 5
    assert all("created by emissions" in line for line in green)


@pytest.mark.parametrize(
    "view", ["summary", "plan", "graph", "update", "passes", "dot", "json", "html"]
)
def test_every_view_has_its_data_as_json(view):
    found = json.loads(looked_at("--view", view, "--json"))
    assert found["schema"] == 1
    assert found["target"] == CONV_NET[0]
    expected = {
        "summary": "summary",
        "plan": "blocks",
        "update": "update",
        "json": "run",
        "html": "run",
    }.get(view, "graphs")
    assert expected in found


def test_the_json_view_fits_the_schema():
    jsonschema.validate(json.loads(looked_at("--view", "json")), load_schema())


def test_one_stage_or_two_as_json():
    (graph,) = json.loads(looked_at("--view", "graph", "--stage", "probes", "--json"))["graphs"]
    assert [stage["name"] for stage in graph["stages"]] == ["probes"]
    found = json.loads(looked_at("--view", "graph", "--diff", "captured", "probes", "--json"))
    assert [stage["name"] for stage in found["graphs"][0]["stages"]] == ["captured", "probes"]


def test_a_diff_shows_what_a_pass_did():
    shown = looked_at("--view", "graph", "--diff", "probes", "emissions")
    added = [line for line in shown.splitlines() if line.startswith("+ ")]
    removed = [line for line in shown.splitlines() if line.startswith("- ")]
    assert sum("emission.emit(" in line and "kind='conv2d'" in line for line in added) == 3
    assert not any("emit" in line for line in removed)
    assert "created by" not in shown
    same = looked_at("--view", "graph", "--diff", "probes", "probes")
    assert same == "graph 0: probes and probes are the same\n"


def test_a_part_of_the_update():
    shown = looked_at("--view", "update", "--part", "accumulate")
    assert shown.startswith("def accumulate(")
    assert "def apply(" not in shown
    found = json.loads(looked_at("--view", "update", "--part", "accumulate", "--json"))
    assert list(found["update"]) == ["accumulate"]


@pytest.mark.parametrize("scaling", ["adam", "inverse"])
def test_run_proves_the_source(scaling):
    shown = looked_at("--view", "update", "--part", "apply", "--run", "--scaling", scaling)
    assert "equal: one step of the printed source and one of the engine" in shown
    proof = json.loads(looked_at("--view", "update", "--run", "--json", "--scaling", scaling))
    assert proof["proof"]["different"] == []


def test_a_proof_that_fails_has_an_exit_code_of_its_own(monkeypatch):
    from kfc_fx.tools import inspect_command

    own = inspect_command.whole_update
    monkeypatch.setattr(
        inspect_command, "whole_update", lambda update: own(update).replace(*CHANGED)
    )
    assert CHANGED[0] in looked_at("--view", "update")
    result = invoke(*CONV_NET, "--view", "update", "--run")
    assert result.exit_code == 1
    assert "disagree on" in result.output


def test_passes_are_left_out_by_name_or_after_one():
    shown = looked_at("--view", "passes", "--stop-after", "probes")
    assert "emissions (left out)" in shown
    assert "emitting (left out)" in shown
    shown = looked_at("--view", "passes", "--disable", "emissions")
    assert "emissions (left out)" in shown
    assert "emitting (left out)" not in shown


@pytest.mark.parametrize("suffix", ["txt", "json", "html", "dot"])
def test_save_writes_what_a_pipe_would_get(tmp_path, suffix):
    view = {"txt": "plan"}.get(suffix, suffix)
    path = tmp_path / "new" / f"out.{suffix}"
    result = invoke(*CONV_NET, "--view", view, "--save", str(path))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "saved" in result.stderr
    if suffix in ("txt", "dot"):
        assert path.read_text() == looked_at("--view", view)
    else:
        assert path.stat().st_size > 1000


def test_dot_has_a_node_for_every_node_and_an_edge_for_every_argument():
    (graph,) = json.loads(looked_at("--view", "dot", "--stage", "canonical", "--json"))["graphs"]
    (stage,) = graph["stages"]
    shown = looked_at("--view", "dot", "--stage", "canonical")
    assert shown.count("fillcolor=") == len(stage["nodes"])
    assert shown.count(" -> ") == sum(len(node["args"]) for node in stage["nodes"])
    assert shown.startswith("digraph ")


def test_checkpoint_evaluation_and_arguments(tmp_path):
    torch.save(ConvNet(7).state_dict(), tmp_path / "seven.pt")
    arguments = ["--checkpoint", str(tmp_path / "seven.pt"), "--eval", "--view", "plan", "--json"]
    found = json.loads(looked_at("--model-arg", "classes=7", *arguments))
    assert next(b for b in found["blocks"] if b["name"] == "head")["rows"] == 7
    assert any("evaluation mode" in warning for warning in found["warnings"])


def test_the_options_of_compile_shape_the_plan():
    shown = looked_at("--view", "plan", "--no-norm-layers")
    assert "norm_layers=False" in shown
    tokens = ["tests.inspect.small_networks:GroupedNet", "--input", "4x4x8x8"]
    result = invoke(*tokens, "--view", "plan", "--json", "--weight-sharing", "reduce")
    blocks = {block["name"]: block for block in json.loads(result.stdout)["blocks"]}
    assert blocks["tokens"]["sharing"] == "reduce"
    assert "linear reduce" in invoke(*tokens, "--view", "plan", "--weight-sharing", "reduce").stdout


@pytest.mark.parametrize("command", ["inspect", "doctor"])
def test_the_commands_explain_themselves(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_a_guessed_input_is_told():
    result = invoke(CONV_NET[0])
    assert result.exit_code == 0
    assert "the input 1x2x6x6 is guessed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--view", "plna"], "unknown view 'plna' (did you mean 'plan'?)"),
        (["--scaling", "adma"], "unknown scaling 'adma' (did you mean 'adam'?)"),
        (["--capture", "dynmo"], "unknown capture 'dynmo' (did you mean 'dynamo'?)"),
        (
            ["--view", "graph", "--stage", "probs"],
            "unknown stage 'probs' (did you mean 'probes'?)",
        ),
        (
            ["--view", "graph", "--diff", "captured", "emision"],
            "unknown stage 'emision' (did you mean 'emissions'?)",
        ),
        (["--view", "dot", "--stage", "nonsense"], "unknown stage 'nonsense'"),
        (
            ["--view", "update", "--part", "aply"],
            "unknown part 'aply' (did you mean 'apply'?)",
        ),
        (
            ["--view", "update", "--part", "aply", "--json"],
            "unknown part 'aply' (did you mean 'apply'?)",
        ),
        (["--disable", "prob"], "unknown pass 'prob' (did you mean 'probes'?)"),
        (["--stop-after", "canonicl"], "unknown pass 'canonicl' (did you mean 'canonical'?)"),
        (["--disable", "probes"], "pass 'emissions' failed"),
        (["--part", "apply"], "--part belongs to --view update; the view is summary"),
        (["--run"], "--run belongs to --view update"),
        (["--diff", "captured", "probes"], "--diff belongs to --view graph"),
        (["--input-factor", "dens"], "input_factor must be one of 'auto', 'dense', 'separable'"),
        (["--weight-sharing", "redcue"], "weight_sharing must be one of expand, reduce"),
        (["--view", "update", "--run", "--capture", "symbolic"], "needs --capture dynamo"),
        (["--input", "4x3x6x6", "--input", "4x3x6x6"], "does not run on 4x2x6x6 4x3x6x6"),
        (["--checkpoint", "nothing.pt"], "checkpoint nothing.pt"),
        (["--model-arg", "clases=3"], "unexpected keyword argument 'clases'"),
        (["--save", "/proc/nothing/file"], "--save /proc/nothing/file"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(arguments, message):
    assert message in refused(*CONV_NET, *arguments)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("resnet18", "names no model"),
        ("tests.inspect.small_networks:ConvNett", "(did you mean 'ConvNet'?)"),
        ("tests.inspect.smal_networks:ConvNet", "(did you mean 'tests.inspect.small_networks'?)"),
        ("torch.nn:ReLU", "--input 1x3x224x224"),
        ("nothing.pt2", "there is no file"),
    ],
)
def test_a_wrong_target_is_told_in_one_line(target, message):
    assert message in refused(target)


def test_a_saved_program_keeps_its_mode_and_proves_its_update(tmp_path):
    path = str(tmp_path / "net.pt2")
    torch.export.save(torch.export.export(ConvNet(), (torch.randn(4, 2, 6, 6),)), path)
    assert "saved in the mode that it was exported in" in refused(path, "--eval")
    result = invoke(path, "--view", "update", "--run", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["proof"] == {"parameters": 10, "different": []}


def test_debug_lets_the_traceback_through():
    result = invoke("tests.inspect.small_networks:ConvNett", "--debug")
    assert result.exit_code == 1
    assert "TargetError" in type(result.exception).__name__
