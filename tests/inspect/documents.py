"""Inspector documents of residual networks, made up: no model is captured for them."""

from __future__ import annotations

import math
import textwrap
from typing import Any

HOSTILE = "</script><img onerror=owned=1 src=x>"
"""A name that is markup where it is not escaped."""


def residual_document(
    depths: tuple[int, ...] = (2, 2), *, first: str = "conv1", run: bool = False
) -> dict[str, Any]:
    """A bottleneck network with ``depths`` blocks per layer; (3, 8, 36, 3) is ResNet-152.

    Args:
        first: module path of the first convolution.
        run: with how a training run went.
    """
    network = _Network()
    output = network.layer("conv1", "x", name=first)
    output = network.op(output, "relu", "relu", "ReLU")
    width = 64
    for index, depth in enumerate(depths, start=1):
        for position in range(depth):
            output = network.bottleneck(f"layer{index}.{position}", output, width)
        width *= 2
    output = network.op(output, "flatten", "", "")
    network.linear("fc", output)
    return network.document(run)


class _Network:
    """Nodes of the captured and of the emitting graph, grown call by call."""

    def __init__(self) -> None:
        self.parameters: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.captured: list[dict[str, Any]] = []
        self.emitting: list[dict[str, Any]] = []
        self.blocks: list[dict[str, Any]] = []
        self.emitted: dict[str, str] = {}
        self.taken: dict[str, int] = {}

    def name(self, wanted: str) -> str:
        count = self.taken.get(wanted, 0)
        self.taken[wanted] = count + 1
        return f"{wanted}_{count}" if count else wanted

    def node(self, name: str, target: str, args: list[str], module: str, **more: Any) -> str:
        node = {
            "name": name,
            "op": "call_function",
            "target": target,
            "args": args,
            "shape": [8, 64, 16, 16],
            "dtype": "float32",
            "module": module,
            "module_type": "",
            "source": "resnet.py:147",
            "block": None,
            "role": "op",
            **more,
        }
        self.captured.append(node)
        renamed = [self.emitted.get(argument, argument) for argument in args]
        self.emitting.append({**node, "args": renamed})
        return name

    def op(self, source: str, target: str, module: str, kind: str, *others: str) -> str:
        return self.node(self.name(target), target, [source, *others], module, module_type=kind)

    def parameter(self, module: str, leaf: str, shape: list[int]) -> str:
        name = self.name(f"l_{module.replace('.', '_')}_{leaf}" if module.isascii() else leaf)
        name = name if name.isidentifier() else self.name("l_weight")
        self.parameters.append(
            {
                "name": name,
                "op": "placeholder",
                "target": name,
                "args": [],
                "shape": shape,
                "dtype": "float32",
                "module": "",
                "module_type": "",
                "source": "",
                "block": None,
                "role": "parameter",
            }
        )
        return name

    def layer(self, target: str, source: str, *, name: str, width: int = 64) -> str:
        """A convolution and its batch norm."""
        weight = self.parameter(name, "weight", [width, width, 3, 3])
        kinds = {"module_type": "Conv2d", "role": "site", "block": name}
        output = self.node(self.name(target), "torch.conv2d", [source, weight], name, **kinds)
        self.emit(name, "conv2d", output, source, width, 9 * width)
        norm = name.replace("conv", "bn") if "conv" in name else f"{name}.norm"
        scale = [self.parameter(norm, leaf, [width]) for leaf in ("weight", "bias", "mean", "var")]
        kinds = {"module_type": "BatchNorm2d", "role": "site", "block": norm}
        inputs = [output, *scale]
        normed = self.node(self.name(f"{target}_norm"), "batch_norm", inputs, norm, **kinds)
        self.emit(norm, "scale_shift", normed, output, 1, 2)
        return normed

    def linear(self, name: str, source: str) -> str:
        weight = self.parameter(name, "weight", [10, 512])
        kinds = {"module_type": "Linear", "role": "site", "block": name}
        output = self.node("linear", "torch.nn.functional.linear", [source, weight], name, **kinds)
        self.emit(name, "linear", output, source, 10, 513)
        return output

    def bottleneck(self, path: str, source: str, width: int) -> str:
        output = source
        for part in ("conv1", "conv2", "conv3"):
            output = self.layer("conv2d", output, name=f"{path}.{part}", width=width)
            if part != "conv3":
                output = self.op(output, "relu", f"{path}.relu", "ReLU")
        output = self.op(output, "add", path, "Bottleneck", source)
        return self.op(output, "relu", f"{path}.relu", "ReLU")

    def emit(
        self, block: str, kind: str, output: str, source: str, rows: int, columns: int
    ) -> None:
        """The block, and what the passes add at its site."""
        probes = []
        for factor, side in (("omega", columns), ("gamma", rows)):
            probe = {**self.parameters[-1], "shape": [side, side], "role": "probe", "block": block}
            stem = "".join(letter if letter.isalnum() else "_" for letter in block)
            probe["name"] = probe["target"] = f"probe_{stem}_{factor}"
            self.probes.append(probe)
            probes.append(probe["name"])
        site = self.emitting[-1]
        count = {**site, "name": self.name("numel"), "target": "numel", "role": "op"}
        count |= {"args": [output], "shape": None, "dtype": None, "block": None}
        count |= {"module": "", "module_type": ""}
        emission = {**site, "name": self.name("emit"), "target": "emit"}
        emission |= {"args": [output, source, *probes], "role": "emission", "block": block}
        self.emitting += [count, emission]
        self.emitted[output] = emission["name"]
        self.blocks.append(
            {
                "name": block,
                "kind": kind,
                "weight": f"{block}.weight",
                "bias": None,
                "groups": 1,
                "rows": rows,
                "columns": columns,
                "locations": 256,
                "grows_with_locations": True,
                "geometry": "3x3, stride 1",
                "form": "dense",
                "method": "structured",
                "why": "stride 1",
                "stack": f"{rows}x{columns}",
                "bytes": 4 * columns**2,
                "flops": 2e4 * rows * columns,
                "uses": 1,
            }
        )

    def document(self, run: bool) -> dict[str, Any]:
        source = {**self.parameters[0], "name": "x", "target": "x", "role": "input"}
        result = {**source, "name": "output", "op": "output", "target": "output", "role": "output"}
        first = [source, *self.parameters, *self.captured, {**result, "args": ["linear"]}]
        last = [source, *self.parameters, *self.probes, *self.emitting]
        last.append({**result, "args": [self.emitted["linear"]]})
        return {
            "schema": 1,
            "kfc_fx": "0.1.0",
            "torch": "2.14.1",
            "target": "residual network",
            "capture": "dynamo",
            "inputs": [{"shape": [8, 3, 32, 32], "dtype": "float32"}],
            "summary": {"parameters": 60_192_808, "blocks": len(self.blocks)},
            "warnings": ["batch norm in training mode"],
            "blocks": self.blocks,
            "generic": [{"name": "scale", "shape": [1], "reason": "used outside a layer"}],
            "frozen": ["stem.weight"],
            "graphs": [
                {"index": 0, "stages": [stage("captured", first), stage("emitting", last, first)]}
            ],
            "update": {part: self.update_code(part) for part in UPDATE_PARTS},
            "run": training_run([block["name"] for block in self.blocks]) if run else None,
        }

    def update_code(self, part: str) -> str:
        lines = [f"def {part}(statistics, examples, state):", f'    """Part {part}."""']
        stacks: dict[str, list[str]] = {}
        for block in self.blocks:
            stacks.setdefault(block["stack"], []).append(block["name"])
        for stack, names in stacks.items():
            listed = textwrap.wrap(f"{stack}: {len(names)} layers: {', '.join(names)}", 90)
            lines += ["", *(f"    # {line}" for line in listed)]
            lines.append(f"    def {part}_{stack}(statistics, examples, state):")
            lines.append("        omega = torch.cat([")
            lines += [f'            statistics["{name}.omega"],' for name in names]
            lines.append("        ]) / examples")
            lines.append('        return {"omega": torch.lerp(state["omega"], omega, 0.1)}')
        lines += ["", "    return {"]
        lines += [
            f'        "{stack}": {part}_{stack}(statistics, examples, state["{stack}"]),'
            for stack in stacks
        ]
        return "\n".join([*lines, "    }"])


UPDATE_PARTS = ("accumulate", "refresh", "apply")


def stage(
    name: str, nodes: list[dict[str, Any]], before: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """A stage of the document; ``before`` holds the nodes of the stage that it followed."""
    old = {node["name"] for node in (nodes if before is None else before)}
    created = [node["name"] for node in nodes if node["name"] not in old]
    return {
        "name": name,
        "code": stage_code(nodes),
        "created": created,
        "erased": [],
        "seconds": 0.1,
        "nodes": nodes,
    }


def stage_code(nodes: list[dict[str, Any]]) -> str:
    """Source of a stage, in the form in which torch.fx prints a graph."""
    inputs = [node["name"] for node in nodes if node["op"] == "placeholder"]
    lines = [f"def forward(self, {', '.join(inputs)}):"]
    for node in nodes:
        arguments = ", ".join(node["args"])
        if node["op"] == "output":
            lines.append(f"    return ({arguments},)")
        elif node["op"] != "placeholder":
            lines.append(f"    {node['name']} = {node['target']}({arguments});  # {node['shape']}")
        elif node["role"] == "parameter":
            lines.append(f"    {node['name']} = L_{node['name']}")
    return "\n".join(lines) + "\n"


def training_run(blocks: list[str], steps: int = 40) -> dict[str, Any]:
    """A run whose loss falls, once not finite, with factors for every block."""
    seconds = {"gradient": 0.2, "statistics": 0.05, "refresh": 0.1, "update": 0.02}
    rows = [
        {"step": step, "loss": 2.3 * math.exp(-step / 12), "lr": 0.01, "damping": 0.01}
        | {"nu": 0.3 / step, "clip_scale": 1.0, "seconds": seconds}
        for step in range(1, steps + 1)
    ]
    rows[7]["loss"] = math.nan
    spectrum = [10.0 ** (-index / 4) for index in range(24)]
    image = [
        [math.cos(row - column) / (1 + abs(row - column)) for column in range(16)]
        for row in range(16)
    ]
    factors = {"omega_spectrum": spectrum, "gamma_spectrum": spectrum[::2], "omega_image": image}
    factors |= {"omega_condition": 5.6e5, "gamma_condition": 1e3}
    factors |= {"omega_effective_rank": 7.5, "gamma_effective_rank": 4.0}
    return {"steps": rows, "factors": dict.fromkeys(blocks, factors)}
