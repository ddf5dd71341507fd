"""``make fuzz``: the properties of the rewrite on random networks, for as long as it is given.

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
from tests.strategies import DrawnNetwork, networks

ROUND = 25
SETTINGS = settings(
    max_examples=ROUND,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


def fuzz(minutes: float) -> Counter[str]:
    """Try networks until the time is over; returns how many by property."""
    tried: Counter[str] = Counter()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for check in properties.PROPERTIES:
            _one_round(check, tried)
            print(f"{sum(tried.values())} networks tried", flush=True)
    return tried


def _one_round(check, tried: Counter[str]) -> None:
    alone = check is properties.batches_add_up
    torch._dynamo.reset()

    @seed(secrets.randbits(64))
    @SETTINGS
    @given(networks(coupled=not alone, random=not alone))
    def holds(drawn: DrawnNetwork) -> None:
        tried[check.__name__] += 1
        check(drawn)

    holds()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    tried = fuzz(parser.parse_args().minutes)
    for name, count in tried.items():
        print(f"{name}: {count} networks")


if __name__ == "__main__":
    main()
