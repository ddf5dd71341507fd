"""The view of many processes: a row for each number of ranks, and who owns what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from kfc_fx.inspect.quantities import bytes_text
from kfc_fx.inspect.summary_view import plain_table

TITLES = {
    "none": "distribute='none': every rank computes everything",
    "refresh": "distribute='refresh': blocks are refreshed by their owners",
    "update": "distribute='update': blocks are held and stepped by their owners",
    "shard": "fully_shard: shards go to the owners of their blocks and come back",
}
MOST_NAMED = 3


def world_view(document: Mapping[str, Any]) -> RenderableType:
    """One table of numbers of ranks, one of the owners."""
    world, machine = document["world"], document["world"]["machine"]
    stated = (
        f"stated: {machine['tflops']:g} TFLOP/s, {machine['memory']:g} GB/s of memory, "
        f"{machine['network']:g} GB/s of network a rank; nothing overlaps"
    )
    right = (
        *("ranks", "state a rank", "of one", "gradients", "KFC", "due step adds", "traffic"),
        *("busiest/mean", "mean step"),
    )
    table = plain_table(*right, right=right)
    for own in world["worlds"]:
        table.add_row(
            str(own["ranks"]),
            bytes_text(own["state_bytes"]),
            f"{own['state_share']:.3f}",
            bytes_text(own["gradient_sent"]),
            bytes_text(own["step_sent"]),
            bytes_text(own["due_sent"]),
            f"{own['traffic']:.3f}x",
            f"{own['imbalance']:.2f}",
            f"{own['mean_step']:.3f}x",
        )
    owners = plain_table("rank", "blocks", "refresh", "state", "names", right=("rank", "blocks"))
    for own in world["owners"]:
        names = [name or "(root)" for name in own["blocks"]]
        more = ", ..." * (len(names) > MOST_NAMED)
        owners.add_row(
            str(own["rank"]),
            str(len(names)),
            f"{100 * own['refresh_share']:.1f}%",
            bytes_text(own["state_bytes"]),
            Text(", ".join(names[:MOST_NAMED]) + more),
        )
    return Group(
        Text.assemble((document["target"], "bold"), f"  {TITLES[world['way']]}"),
        Text("bytes that a rank sends, and a mean step in steps of SGD on as many ranks"),
        Text(stated, style="dim"),
        Text(),
        table,
        Text(),
        Text(f"owners of {world['ranks']} ranks", style="bold"),
        owners,
    )
