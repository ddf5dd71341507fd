"""``make fuzz``: the properties of the rewrite on random networks, and the truth of the factors of
random programs with breaks, for as long as it is given.

Stops at the first failure, with the shortest network that hypothesis could shrink it to.
"""

from __future__ import annotations

import argparse
import secrets
import time
from collections import Counter

import torch
from hypothesis import HealthCheck, given, seed, settings

from tests import properties
from tests.capture.broken_programs import (
    BrokenProgram,
    batches_for,
    broken_programs,
    factors_are_true,
)
from tests.strategies import networks

ROUND = 25
SETTINGS = settings(
    max_examples=ROUND,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def factors_of_broken_programs(program: BrokenProgram) -> None:
    """Under both Fisher options, on whichever backend."""
    for fisher in ("empirical", "sampled"):
        torch._dynamo.reset()
        factors_are_true(program.build(), batches_for(program), fisher, program.backend)


PROPERTIES = (*properties.PROPERTIES, factors_of_broken_programs)


def fuzz(minutes: float, only: str = "") -> Counter[str]:
    """Try networks until the time is over; returns how many by property.

    Args:
        only: name of the one property to try; all of them if empty.
    """
    tried: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for check in PROPERTIES:
            if only in ("", check.__name__):
                _one_round(check, tried)
        print(f"{sum(tried.values())} networks tried", flush=True)
    return tried


def _one_round(check, tried: Counter[str]) -> None:
    alone = check is properties.batches_add_up
    drawn = networks(coupled=not alone, random=not alone)
    if check is factors_of_broken_programs:
        drawn = broken_programs(backends=("eager", "eager", "aot_eager"))
    torch._dynamo.reset()

    @seed(secrets.randbits(64))
    @SETTINGS
    @given(drawn)
    def holds(example) -> None:
        tried[check.__name__] += 1
        check(example)

    holds()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    names = [check.__name__ for check in PROPERTIES]
    parser.add_argument("--only", choices=names, default="")
    options = parser.parse_args()
    tried = fuzz(options.minutes, options.only)
    for name, count in tried.items():
        print(f"{name}: {count} networks")


if __name__ == "__main__":
    main()
