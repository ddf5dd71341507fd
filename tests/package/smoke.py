"""What has to work in a fresh installation, of the wheel or of the source distribution.

Every module is imported, ``kfc-fx doctor`` and the page of ``kfc-fx inspect`` are run through the
installed entry point, and a small network takes two steps. It needs the installed package alone,
no test dependency, and runs as ``python -P tests/package/smoke.py``: without ``-P`` Python would
look for modules in the folder of this file first.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distribution, version
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import kfc_fx

OPTIONAL = {
    *("PIL", "asdfghjkl", "curvlinops", "diffusers", "einconv", "heavyball", "lightning"),
    *("matplotlib", "sklearn", "timm", "torchvision", "transformers", "triton"),
}
"""Modules of the extras, and Triton, which torch brings where it has GPUs. What needs one of them
is left out where that is not installed."""


def main() -> None:
    """Raises where something does not work."""
    print(
        f"kfc_fx {kfc_fx.__version__} of {Path(kfc_fx.__file__).parent}, torch {version('torch')}"
    )
    assert version("kfc_fx") == kfc_fx.__version__
    assert all(hasattr(kfc_fx, name) for name in kfc_fx.__all__)
    import_modules()
    run_command("doctor")
    inspect()
    train()
    print("all works")


def import_modules() -> None:
    """Import every module of the package."""
    left_out, count = dict[str, str](), 0
    for name in module_names():
        try:
            importlib.import_module(name)
            count += 1
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in OPTIONAL:
                raise
            left_out[name] = missing
    print(f"{count} modules imported")
    for name, missing in left_out.items():
        print(f"{name} was left out: {missing} is not installed")


def module_names() -> Iterator[str]:
    """Names of all modules, but for those that run a command when they are imported."""
    for folder in pkgutil.walk_packages(kfc_fx.__path__, "kfc_fx."):
        if not folder.name.endswith(".__main__"):
            yield folder.name


def run_command(*arguments: str) -> None:
    """Run ``kfc-fx`` as its script does."""
    (entry,) = distribution("kfc_fx").entry_points.select(name="kfc-fx")
    given, sys.argv = sys.argv, ["kfc-fx", *arguments]
    code: object = None
    try:
        entry.load()()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = given
    assert not code, f"kfc-fx {' '.join(arguments)} ended with {code}"


def inspect() -> None:
    """The page of the inspector, which is made of the package's data files."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        shown = ("--input", "2x3x8x8", "--view", "html", "--save", str(page))
        run_command("inspect", f"{__file__}:network", *shown)
        assert "<html" in page.read_text(encoding="utf-8")


def network() -> nn.Module:
    """A convolution and a linear layer, for images of 8 pixels."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def train() -> None:
    """Two steps, both with statistics: every parameter moves, and the loss falls."""
    torch.manual_seed(0)
    net = kfc_fx.compile(network())
    opt = kfc_fx.KFC(net)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    x, y = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
    losses = []
    for _ in range(2):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    losses.append(float(F.cross_entropy(net(x), y).detach()))
    print(f"two steps: loss {', '.join(f'{loss:.3f}' for loss in losses)}")
    assert losses[0] > losses[1] > losses[2]
    assert opt.diagnostics.statistics_steps == 2
    assert not any(map(torch.equal, before, net.parameters()))


if __name__ == "__main__":
    main()
