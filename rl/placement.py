"""Places for all workers of a run, reserved together: of two runs that fill a cluster none holds half of it idly."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rl.fleet import FleetSpec, FleetSpecError
from rl.stop import check

log = logging.getLogger(__name__)

# Ray's soft strategies: after the loss of a node its places move to whichever node has room.
STRATEGIES = {"colocated": "PACK", "apart": "SPREAD"}
PATIENCE_S = 5.0  # without a place: say what is missing
_SEATS: dict[tuple[str, int], PlacementGroupSchedulingStrategy] = {}


def seat(fleet: str, replica: int) -> Any:
    """Ray's scheduling strategy for a replica: its reserved place, or whichever node has room."""
    return _SEATS.get((fleet, replica), "DEFAULT")


@contextmanager
def reserved(specs: Sequence[FleetSpec], how: str | None, timeout_s: float = 300.0) -> Iterator[None]:
    """Inside the block the replicas of these fleets have reserved places; workers that need nothing need none.

    how: "colocated": replica i of every fleet is in the same place, so that fractions of a GPU are those of one GPU;
    "apart": every replica is in its own, spread over the nodes; None: nothing is reserved.
    Raises FleetSpecError, saying what is missing, where there is no room within timeout_s.
    """
    places: dict[Any, Counter[str]] = {}
    seats: dict[tuple[str, int], Any] = {}
    for spec in specs if how else ():
        for i in range(spec.replicas):
            if need := {kind: n for kind, n in (("CPU", spec.num_cpus), ("GPU", spec.num_gpus)) if n}:
                seats[spec.name, i] = place = i if how == "colocated" else (spec.name, i)
                places.setdefault(place, Counter()).update(need)
    if not places:
        yield
        return
    group = placement_group([dict(place) for place in places.values()], strategy=STRATEGIES[how])
    try:
        _wait(group, f"cluster.placement={how}", timeout_s)
        order = list(places)
        _SEATS.update(
            (who, PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=order.index(place)))
            for who, place in seats.items()
        )
        yield
    finally:
        _SEATS.clear()
        remove_placement_group(group)


def _wait(group: PlacementGroup, what: str, timeout_s: float) -> None:
    start, told = time.monotonic(), False
    while not group.wait(1.0):
        check()
        elapsed = time.monotonic() - start
        if elapsed > min(PATIENCE_S, timeout_s) and not told:
            log.warning("%s; waiting for %.0f s in all", _missing(group, what), timeout_s)
            told = True
        if elapsed > timeout_s:
            raise FleetSpecError(_missing(group, what))


def _missing(group: PlacementGroup, what: str) -> str:
    kinds = Counter(" and ".join(f"{n:g} {kind}" for kind, n in place.items()) for place in group.bundle_specs)
    places = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    free, total = ray.available_resources(), ray.cluster_resources()
    there = " and ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
    return f"{what} needs places: {places}; free are {there}; lower replicas, num_cpus or num_gpus, or add nodes"
