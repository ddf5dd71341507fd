"""The command ``kfc-fx doctor``: what is installed, what will run, and whether it is right."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kfc_fx.inspect.summary_view import plain_table
from kfc_fx.kernels.cpu_matmul import onednn_is_faster
from kfc_fx.linalg.precision import has_fast_bfloat16
from kfc_fx.tools.doctor.checks import CheckResult, check_ops, kernel_path, usable_devices
from kfc_fx.tools.failures import one_line_failures
from kfc_fx.tools.terminal import show, show_json

FAILED_EXIT_CODE = 1
PACKAGES = ("kfc_fx", "torch", "triton", "numpy", "typer", "rich")
OPTIONAL = {
    "triton": "CUDA tensors take the ATen way: pip install triton",
    "torchvision": "the demo's data and networks: pip install 'kfc_fx[demo]'",
    "scikit-learn": "the digits of kfc-fx train: pip install 'kfc_fx[demo]'",
    "matplotlib": "the plot of kfc-fx train: pip install 'kfc_fx[demo]'",
    "timm": "kfc-fx zoo: pip install 'kfc_fx[zoo]'",
    "transformers": "kfc-fx zoo: pip install 'kfc_fx[zoo]'",
}
"""What is missing without a package, and what to do."""


def doctor(
    save: Annotated[Path | None, typer.Option(help="File to write to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Check this installation: versions, devices, which kernels will run, and every statistics op
    against a plain reference.
    """
    with one_line_failures(debug=debug):
        devices = usable_devices()
        results = [result for device in devices for result in check_ops(device)]
        if as_json:
            show_json(_as_json(devices, results), save)
        else:
            show(_report(devices, results), save)
        if not all(result.passed for result in results):
            raise typer.Exit(FAILED_EXIT_CODE)


def installed_version(package: str) -> str | None:
    """Version of a distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_packages() -> dict[str, str]:
    """Missing distributions that something needs, with what to do."""
    return {name: text for name, text in OPTIONAL.items() if installed_version(name) is None}


def device_name(device: str) -> str:
    """Name, memory and capability of a device; of the CPU, its threads."""
    if not device.startswith("cuda"):
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def product_path(device: str) -> str:
    """What multiplies matrices of float32 in a generated update, and whether polar factors are
    computed in bfloat16."""
    cpu = "oneDNN" if onednn_is_faster() else "BLAS"
    library = "cuBLAS" if device.startswith("cuda") else cpu
    return library + ", polar factors in bfloat16" * has_fast_bfloat16(device)


def _report(devices: list[str], results: list[CheckResult]) -> RenderableType:
    parts: list[RenderableType] = [_versions(), Text(), _devices(devices), Text()]
    parts.append(_checks(results))
    failed = [r for r in results if not r.passed]
    verdict = Text("every op agrees with its reference", style="green")
    if failed:
        names = ", ".join(f"{r.op} on {r.device}" for r in failed)
        verdict = Text(
            f"wrong results: {names}. Do not train with these; report the table above with "
            "kfc-fx doctor --json",
            style="bold red",
        )
    missing = [
        Text(f"{name} is not installed: {text}") for name, text in missing_packages().items()
    ]
    return Group(*parts, Text(), verdict, *([Text(), *missing] if missing else []))


def _versions() -> Table:
    table = plain_table("package", "version")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        table.add_row(package, installed_version(package) or "not installed")
    return table


def _devices(devices: list[str]) -> Table:
    table = plain_table("device", "name", "statistics ops run by", "products of the update")
    for device in devices:
        table.add_row(device, device_name(device), kernel_path(device), product_path(device))
    if len(devices) == 1:
        table.add_row("cuda", "none", "this torch sees no GPU; everything runs on the CPU", "")
    return table


def _checks(results: list[CheckResult]) -> Table:
    numeric = ("error", "allowed", "ms")
    table = plain_table("op", "device", "case", "path", *numeric, "verdict", right=numeric)
    for result in results:
        verdict = Text("ok", style="green") if result.passed else Text("WRONG", style="bold red")
        table.add_row(
            result.op,
            result.device,
            result.case,
            result.path,
            f"{result.error:.1e}",
            f"{result.allowed:.1e}",
            f"{result.milliseconds:.1f}",
            verdict,
        )
    return table


def _as_json(devices: list[str], results: list[CheckResult]) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in {*PACKAGES, *OPTIONAL}},
        "devices": [
            {
                "device": d,
                "name": device_name(d),
                "kernels": kernel_path(d),
                "products": product_path(d),
            }
            for d in devices
        ],
        "checks": [vars(result) | {"passed": result.passed} for result in results],
        "missing": missing_packages(),
    }
