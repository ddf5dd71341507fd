"""Tables and plots of what was measured, made from the files of ``benchmarks/`` at every build.

``:::{measured} NAME ARGUMENTS`` is the table of that name in ``figure_tables`` or ``race_tables``.
``:::{race-plot} FILE TASK BATCH STEPS`` is a plot of the race. Where a file or a field is missing,
the build fails.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import figure_tables
import race_tables
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
Table = Callable[..., list[list[str]]]
TABLES: dict[str, Table] = {**figure_tables.TABLES, **race_tables.TABLES}


def markdown(rows: list[list[str]]) -> list[str]:
    """The lines of a table whose first row is its head; numbers stand at the right."""
    head, *body = rows
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *body)]


class FromResults(SphinxDirective):
    """A part of a page that is made anew where results, or what reads them, have changed."""

    def note_sources(self) -> None:
        """Let the page depend on them."""
        for path in (*HERE.glob("*.py"), *race_tables.BENCHMARKS.glob("*.json")):
            self.env.note_dependency(str(path))


class Measured(FromResults):
    """A table."""

    required_arguments = 1
    optional_arguments = 8

    def run(self) -> list[nodes.Node]:
        """The table, as what the page would say in its place."""
        self.note_sources()
        name, *arguments = self.arguments
        try:
            rows = TABLES[name](*arguments)
        except (KeyError, OSError, StopIteration, TypeError, ValueError) as error:
            raise ExtensionError(f"measured {' '.join(self.arguments)}: {error!r}") from error
        box = nodes.container(classes=["measured"])
        self.state.nested_parse(StringList(markdown(rows), name), self.content_offset, box)
        return [box]


class RacePlot(FromResults):
    """Training losses of a cell of the race, by steps and by time."""

    required_arguments = 4

    def run(self) -> list[nodes.Node]:
        """The drawing, which lies among what is built."""
        self.note_sources()
        file, task, batch, steps = self.arguments
        name = f"{file}-{task}-{batch}-{steps}.png"
        path = Path(self.env.srcdir) / "_build" / "plots" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            heading = race_tables.draw(file, task, int(batch), int(steps), path)
        except (OSError, StopIteration, ValueError) as error:
            raise ExtensionError(f"race-plot {' '.join(self.arguments)}: {error!r}") from error
        image = nodes.image(uri=f"/_build/plots/{name}", alt=f"training losses: {heading}")
        return [nodes.figure("", image, classes=["plot"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register both directives."""
    app.add_directive("measured", Measured)
    app.add_directive("race-plot", RacePlot)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
