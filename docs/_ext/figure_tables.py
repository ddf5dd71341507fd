"""Tables of every file of ``benchmarks/`` but those of the race."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MEGABYTE, GIGABYTE = 1e6, 1e9


@cache
def figures(name: str) -> dict[str, Any]:
    """What a file holds."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))


def steps() -> list[list[str]]:
    """Whole training steps, as ratios."""
    rows = [["own time over the other's", "median", "quartiles"]]
    for ratio in figures("step-cpu")["ratios"]:
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        rows.append([ratio["what"], f"{ratio['median']:.2f}", spread])
    return rows


def trainers() -> list[list[str]]:
    """KFC beside AdamW in the trainers of others."""
    names = {
        "transformers": "Hugging Face Trainer",
        "lightning": "Lightning",
        "peft": "PEFT (LoRA)",
    }
    rows = [["trainer", "lines", "loss: AdamW, KFC", "first step, s", "median step, ms"]]
    for row in figures("trainers-cpu")["rows"]:
        rows.append(
            [
                names.get(row["trainer"], row["trainer"]),
                str(row["lines"]),
                f"{row['adamw_loss']:.3f}, {row['kfc_loss']:.3f}",
                f"{row['adamw_first']:.2f}, {row['kfc_first']:.2f}",
                f"{1e3 * row['adamw_median']:.1f}, {1e3 * row['kfc_median']:.1f}",
            ]
        )
    return rows


def scripts() -> list[list[str]]:
    """KFC beside the optimizers of public scripts."""
    rows = [
        [
            "script",
            "lines, flags",
            "loss: own, KFC",
            "first step, s",
            "median step, ms",
            "likelihood",
            "blocks, generic",
        ]
    ]
    for row in figures("scripts-cpu")["rows"]:
        own, kfc = row["own"], row["kfc"]
        error = own.get("error") or kfc.get("error")
        if error:
            rows.append([row["script"], f"{row['lines']}", error, "", "", "", ""])
            continue
        pairs = [
            f"{name} {own['losses'][name]:.3g}, {loss:.3g}".removeprefix("loss ")
            for name, loss in kfc["losses"].items()
        ]
        models = kfc["models"]
        counts = [f"{model['blocks']}, {len(model['generic'])}" for model in models]
        rows.append(
            [
                row["script"],
                f"{row['lines']}, {len(row['flags'])}",
                "; ".join(pairs),
                f"{own['first']:.2f}, {kfc['first']:.2f}",
                f"{1e3 * own['median']:.0f}, {1e3 * kfc['median']:.0f}",
                "; ".join(model["likelihood"].partition("(")[0] for model in models),
                "; ".join(counts),
            ]
        )
    return rows


def memory() -> list[list[str]]:
    """Peak memory and optimizer state of large models."""
    rows = [["model", "parameters", "GB", "state / parameters", "peak, GB", "peak with AdamW, GB"]]
    for model in figures("memory-cpu")["models"]:
        peaks = (model[name]["peak_bytes"] / GIGABYTE for name in ("kfc", "adamw"))
        rows.append(
            [
                model["model"],
                f"{model['parameters']:,}",
                f"{model['parameter_bytes'] / GIGABYTE:.2f}",
                f"{model['state_ratio']:.2f}",
                *(f"{peak:.2f}" for peak in peaks),
            ]
        )
    return rows


def distributed() -> list[list[str]]:
    """Collectives, bytes and times of the ways of several processes."""
    rows = [
        [
            "way",
            "collectives, due",
            "sent, MB",
            "due adds, MB",
            "state, million",
            "step, s",
            "due, s",
        ]
    ]
    for row in figures("distributed-cpu")["rows"]:
        rows.append(
            [
                f"`{row['way']}`",
                f"{row['step_calls']}, {row['due_calls']}",
                f"{row['step_bytes'] / MEGABYTE:.1f}",
                f"{row['due_bytes'] / MEGABYTE:.1f}",
                f"{row['state_numbers'] / 1e6:.1f}",
                f"{row['step_seconds']:.2f}",
                f"{row['due_seconds']:.2f}",
            ]
        )
    return rows


def rank() -> list[list[str]]:
    """One rank of a world of which nobody else is there."""
    found = figures("rank-cpu")
    return [
        [f"{found['model']}, rank {found['rank']} of {found['ranks']}", "figure"],
        ["batch of the rank", str(found["batch"])],
        ["refresh work over that of the mean rank", f"{found['refresh_imbalance']:.3f}"],
        ["state over that of one process", f"{found['state_share']:.3f}"],
        ["step of SGD, s", f"{found['sgd_seconds']:.2f}"],
        ["plain step, s", f"{found['plain_seconds']:.2f}"],
        ["step with statistics and a refresh, s", f"{found['due_seconds']:.2f}"],
        ["mean step in SGD steps", f"{found['mean_step']:.3f}"],
    ]


def zoo() -> list[list[str]]:
    """Models of other libraries."""
    rows = [["library", "models", "passed", "bit-equal", "one graph", "99 % in blocks"]]
    models = figures("zoo")["models"]
    for library, count in Counter(row["library"] for row in models).items():
        own = [row for row in models if row["library"] == library]
        reports = [row["report"] for row in own if row["report"]]
        rows.append(
            [
                library,
                str(count),
                str(sum(row["status"] == "passed" for row in own)),
                str(sum(report["bit_equal"] for report in reports)),
                str(sum(report["graphs"] == 1 for report in reports)),
                str(sum(report["in_blocks"] >= 0.99 for report in reports)),
            ]
        )
    return rows


def zoo_capture() -> list[list[str]]:
    """How long capture took, and how much was compared."""
    reports = [row["report"] for row in figures("zoo")["models"] if row["report"]]
    seconds = [report["capture_seconds"] for report in reports]
    worst = max(report["truth_error"] for report in reports)
    return [
        ["of all models", "figure"],
        ["capture, median, s", f"{statistics.median(seconds):.1f}"],
        ["capture, longest, s", f"{max(seconds):.0f}"],
        ["statistics that were checked", f"{sum(report['statistics'] for report in reports):,}"],
        ["factors that were compared", f"{sum(report['compared'] for report in reports):,}"],
        ["largest error of a factor", f"{worst:.1e}"],
    ]


def losses() -> list[list[str]]:
    """The likelihoods that were found."""
    found = figures("losses")
    right = sum(
        str(loss["result"]["decision"]) == str(loss["expected"]) for loss in found["losses"]
    )
    models = found["models"].values()
    return [
        ["what", "tried", "as expected"],
        ["losses", str(len(found["losses"])), str(right)],
        [
            "models with losses of their own",
            str(len(models)),
            str(sum(model["found"] == model["expected"] for model in models)),
        ],
    ]


def faults() -> list[list[str]]:
    """What faults in the middle of training leave behind."""
    counted: dict[str, Counter[str]] = {}
    for row in figures("faults")["rows"]:
        own = counted.setdefault(row["scaling"], Counter())
        own["tried"] += row["tried"]
        own["right"] += row["tried"] * row["is_right"]
        own.update({f"left {name}": count for name, count in row["left"].items()})
    rows = [["scaling", "tries", "right", "state of before the step", "of after it"]]
    for scaling, own in counted.items():
        numbers = (own["tried"], own["right"], own["left before"], own["left after"])
        rows.append([f'"{scaling}"', *(f"{number:,}" for number in numbers)])
    return rows


def kernels(file: str = "kernels-cpu-float32") -> list[list[str]]:
    """Ω of convolutions: times faster than the better of two ways by ``F.unfold``, by network."""
    rows = [["network", "layers", "least", "median", "most"]]
    shapes = figures(file)["shapes"]
    for network in dict.fromkeys(shape["network"] for shape in shapes):
        own = [shape["ways"]["auto"] for shape in shapes if shape["network"] == network]
        ratios = [way["timing"]["ratio"] for way in own]
        spread = (min(ratios), statistics.median(ratios), max(ratios))
        rows.append([network, str(len(ratios)), *(f"{ratio:.2f}" for ratio in spread)])
    return rows


def gpu_layers() -> list[list[str]]:
    """Ω of convolutions on a GPU, in milliseconds."""
    found = figures("gpu-h100")
    rows = [["layer", "dtype", "unfold", "structured", "im2col", "times faster"]]
    for layer in (*found["layers"], *found["earlier layers"]):
        times = {name: time["device"]["median"] for name, time in layer["times"].items()}
        own = min(times["structured"], times["im2col"])
        rows.append(
            [
                layer["layer"],
                layer["dtype"].removeprefix("torch."),
                *(f"{times[name]:.3f}" for name in ("unfold", "structured", "im2col")),
                f"{times['unfold'] / own:.1f}",
            ]
        )
    return rows


TABLES = {
    "steps": steps,
    "trainers": trainers,
    "scripts": scripts,
    "memory": memory,
    "distributed": distributed,
    "rank": rank,
    "zoo": zoo,
    "zoo-capture": zoo_capture,
    "losses": losses,
    "faults": faults,
    "kernels": kernels,
    "gpu-layers": gpu_layers,
}
