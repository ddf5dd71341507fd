"""The command ``kfc-fx inspect``: what was captured, what will run, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from kfc_fx.inspect.document import build_document, code_document
from kfc_fx.inspect.dot import dot_text
from kfc_fx.inspect.graph_view import diff_view, find_stage, graph_view, passes_view
from kfc_fx.inspect.inputs import InputSpec, guess_inputs, parse_input
from kfc_fx.inspect.inspection import CAPTURES, Inspection, InspectionOptions, inspect_model
from kfc_fx.inspect.memory import memory_document
from kfc_fx.inspect.memory_view import memory_view
from kfc_fx.inspect.plan_view import plan_view
from kfc_fx.inspect.run_view import read_report, run_view, save_plots
from kfc_fx.inspect.summary_view import summary_view
from kfc_fx.inspect.target import Subject, load_checkpoint, parse_arguments, resolve_target
from kfc_fx.inspect.update_text import prove_update
from kfc_fx.inspect.update_view import proof_view, update_view, whole_update
from kfc_fx.inspect.world import WAYS, Machine, Way, world_document
from kfc_fx.inspect.world_view import world_view
from kfc_fx.optim.scalings.table import SCALINGS
from kfc_fx.tools.failures import CommandError, one_line_failures, unknown_name, writable
from kfc_fx.tools.terminal import show, show_json, show_text

VIEWS = (
    *("summary", "plan", "graph", "update", "passes", "dot", "json", "html", "run", "world"),
    "memory",
)
CODE_VIEWS = ("graph", "update", "passes", "dot", "memory")
"""Views that need no counting of the work of a step."""
DIFFERENT_EXIT_CODE = 1


@dataclass(frozen=True)
class ViewOptions:
    """What to show, and where."""

    view: str
    stage: str
    diff: tuple[str, str] | None
    part: str | None
    run: bool
    as_json: bool
    save: Path | None
    report: Path | None
    world: WorldOptions | None


@dataclass(frozen=True)
class WorldOptions:
    """Ranks that are thought of, and their machine."""

    ranks: int
    way: Way
    machine: Machine


def inspect(
    target: Annotated[str, typer.Argument(help="module:attribute, ./file.py:Name, or a file.pt2.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="Shape of an input, as 1x3x224x224 or 1x16:int64; once for each input. "
            "Guessed where a convention allows it.",
        ),
    ] = None,
    capture: Annotated[str, typer.Option(help="dynamo or symbolic.")] = "dynamo",
    model_arg: Annotated[
        list[str] | None,
        typer.Option(help="Keyword argument of the model, as num_classes=10; may be repeated."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="state_dict to load, with weights_only=True.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="Put the model into evaluation mode.")
    ] = False,
    view: Annotated[
        str,
        typer.Option(help=f"{', '.join(VIEWS[:-1])} or {VIEWS[-1]}."),
    ] = "summary",
    stage: Annotated[
        str, typer.Option(help="Of the graph: captured, canonical, probes, emissions or emitting.")
    ] = "emitting",
    diff: Annotated[
        tuple[str, str] | None, typer.Option(help="Two stages: what changed from A to B.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="Of the update: start, accumulate, refresh or apply.")
    ] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run", help="Step once by the printed update and once by the engine, and compare."
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            help="What opt.save_report wrote: --view html shows it too, --view run alone, as plots "
            "with --save FILE.png."
        ),
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Ranks: who would own what, hold, send and compute how much; no process is made.",
        ),
    ] = None,
    distribute: Annotated[
        str, typer.Option(help="With --world: refresh, update or none.")
    ] = "refresh",
    shard: Annotated[
        bool, typer.Option("--shard", help="With --world: parameters are sharded by fully_shard.")
    ] = False,
    tflops: Annotated[
        float, typer.Option(min=1e-3, help="With --world: 10^12 operations a second of a device.")
    ] = Machine.tflops,
    bandwidth: Annotated[
        float, typer.Option(min=1e-3, help="With --world: 10^9 bytes a second of its memory.")
    ] = Machine.memory,
    network: Annotated[
        float, typer.Option(min=1e-3, help="With --world: 10^9 bytes a second that a rank sends.")
    ] = Machine.network,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Does it fit? Bytes of every scaling, beside SGD and AdamW."),
    ] = False,
    scaling: Annotated[str, typer.Option(help=f"KFC's scaling: {', '.join(SCALINGS)}.")] = "adam",
    input_factor: Annotated[str, typer.Option(help="auto, dense or separable.")] = "auto",
    weight_sharing: Annotated[
        str, typer.Option(help="Of linear layers over tokens or pixels: expand or reduce.")
    ] = "expand",
    norm_layers: Annotated[
        bool, typer.Option(help="Give the scale and shift of norms a block.")
    ] = True,
    stop_after: Annotated[
        str | None, typer.Option(help="Leave out all passes after this one.")
    ] = None,
    disable: Annotated[
        list[str] | None, typer.Option(help="Leave out this pass; may be repeated.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="File to write to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The view's data as JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Look at a model before training it: what is preconditioned and how, at what cost, and the
    code that will run.
    """
    with one_line_failures(debug=debug):
        thought_of = None
        if world is not None:
            if distribute not in WAYS[:3]:
                raise unknown_name("way to distribute", distribute, WAYS[:3])
            way: Way = "shard" if shard else distribute  # type: ignore[assignment]
            thought_of = WorldOptions(world, way, Machine(tflops, bandwidth, network))
            view = "world" if view == "summary" else view
        if memory:
            if view not in ("summary", "memory"):
                raise CommandError(f"--memory belongs to --view memory; the view is {view}")
            view = "memory"
        options = ViewOptions(view, stage, diff, part, run, as_json, save, report, thought_of)
        _check_names(options, capture, scaling)
        subject = resolve_target(target, parse_arguments(model_arg or []))
        if checkpoint is not None:
            load_checkpoint(subject.model, checkpoint)
        if evaluate:
            _evaluate(subject)
        specs, notes = _inputs(subject, inputs or [])
        compiling = InspectionOptions(
            capture, frozenset(), scaling, input_factor, norm_layers, weight_sharing
        )
        inspection = inspect_model(subject.model, target, specs, compiling, notes)
        left_out = _left_out(inspection, stop_after, disable or [])
        if left_out:
            compiling = replace(compiling, without=left_out)
            inspection = inspect_model(subject.model, target, specs, compiling, notes)
        if not _show(inspection, options):
            raise typer.Exit(DIFFERENT_EXIT_CODE)


def _evaluate(subject: Subject) -> None:
    if subject.example_inputs is not None:
        raise CommandError(f"--eval: {subject.target} is saved in the mode that it was exported in")
    subject.model.eval()


def _check_names(options: ViewOptions, capture: str, scaling: str) -> None:
    if options.view not in VIEWS:
        raise unknown_name("view", options.view, VIEWS)
    if capture not in CAPTURES:
        raise unknown_name("capture", capture, CAPTURES)
    if scaling not in SCALINGS:
        raise unknown_name("scaling", scaling, SCALINGS)
    wanted = {
        "--diff": (options.diff is not None, "graph"),
        "--part": (options.part is not None, "update"),
        "--run": (options.run, "update"),
    }
    if options.view == "run" and options.report is None:
        raise CommandError("--view run needs --report FILE, which opt.save_report writes")
    if options.view == "world" and options.world is None:
        raise CommandError("--view world needs --world RANKS")
    for flag, (given, view) in wanted.items():
        if given and options.view != view:
            raise CommandError(f"{flag} belongs to --view {view}; the view is {options.view}")


def _inputs(subject: Subject, texts: list[str]) -> tuple[tuple[InputSpec, ...], list[str]]:
    if texts:
        return tuple(map(parse_input, texts)), []
    guessed = guess_inputs(subject)
    if subject.example_inputs is not None:
        return guessed, []
    shown = " ".join(map(str, guessed))
    return guessed, [f"the input {shown} is guessed: --input sets its shape and batch"]


def _left_out(
    inspection: Inspection, stop_after: str | None, disabled: list[str]
) -> frozenset[str]:
    """Names of the passes that are to be skipped."""
    passes = inspection.pass_names
    for name in [*disabled, *([stop_after] if stop_after else [])]:
        if name not in passes:
            raise unknown_name("pass", name, passes)
    after = passes[passes.index(stop_after) + 1 :] if stop_after else ()
    return frozenset([*disabled, *after])


def _show(inspection: Inspection, options: ViewOptions) -> bool:
    """Show one view; whether what it proves is so."""
    build = code_document if options.view in CODE_VIEWS else build_document
    document = build(inspection)
    if options.report is not None:
        document["run"] = read_report(options.report)
    if options.world is not None:
        if inspection.spec is None:
            raise CommandError("--world: no layer has a block, so that there is nothing to share")
        own = options.world
        document["world"] = world_document(
            inspection, document["summary"], own.ranks, own.way, own.machine
        )
    if options.view == "memory":
        if inspection.spec is None:
            raise CommandError("--memory: no layer has a block, so that KFC would hold nothing")
        document["memory"] = memory_document(inspection)
    if options.view == "run" and options.save is not None and options.save.suffix == ".png":
        save_plots(document["run"], writable("--save", options.save))
        return True
    if options.view == "update" and options.run:
        return _show_proof(inspection, document, options)
    if options.as_json or options.view == "json":
        show_json(_part_of(document, options), options.save)
    elif options.view == "html":
        from kfc_fx.inspect.page import render

        show_text(render(document), options.save)
    elif options.view == "dot":
        show_text(dot_text(document, options.stage), options.save)
    else:
        show(_text_view(document, options), options.save)
    return True


def _text_view(document: Mapping[str, Any], options: ViewOptions) -> Any:
    if options.view == "graph":
        if options.diff is not None:
            return diff_view(document, *options.diff)
        return graph_view(document, options.stage)
    if options.view == "update":
        return update_view(document, options.part)
    views = {
        "summary": summary_view,
        "plan": plan_view,
        "passes": passes_view,
        "run": run_view,
        "world": world_view,
        "memory": memory_view,
    }
    return views[options.view](document)


def _show_proof(inspection: Inspection, document: Mapping[str, Any], options: ViewOptions) -> bool:
    proof = prove_update(inspection, whole_update(document["update"]))
    if options.as_json:
        found = {"parameters": proof.parameters, "different": list(proof.different)}
        show_json({"update": document["update"], "proof": found}, options.save)
    else:
        shown = update_view(document, options.part)
        show(Text("\n\n").join([shown, proof_view(proof)]), options.save)
    return not proof.different


def _part_of(document: Mapping[str, Any], options: ViewOptions) -> dict[str, Any]:
    """The entries of the document that a view shows; all of them for ``json``."""
    head = ("schema", "kfc_fx", "torch", "target", "capture", "inputs", "warnings")
    keys = {
        "summary": ("summary",),
        "plan": ("blocks", "generic", "frozen"),
        "graph": ("graphs",),
        "dot": ("graphs",),
        "passes": ("graphs",),
        "update": ("update",),
        "world": ("world",),
        "memory": ("memory",),
    }.get(options.view)
    if keys is None:
        return dict(document)
    shown = {key: document[key] for key in (*head, *keys)}
    if options.view in ("graph", "dot"):
        names = options.diff or (options.stage,)
        shown["graphs"] = [
            {"index": graph["index"], "stages": [find_stage(graph, name) for name in names]}
            for graph in document["graphs"]
        ]
    if options.view == "update" and options.part is not None:
        update_view(document, options.part)
        shown["update"] = {options.part: document["update"][options.part]}
    return shown
