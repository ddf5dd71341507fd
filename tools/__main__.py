"""``python -m kfc_fx.tools`` is ``kfc-fx``."""

from kfc_fx.tools.cli import main

main()
