"""Reserved places, on a cluster of several nodes in a process of its own."""

from __future__ import annotations

import logging

import pytest
from test_node_loss import STORE, Worker, alone, head


def places() -> None:
    from rl.fleet import FleetSpec, FleetSpecError, closing, fetch, make_fleet
    from rl.placement import reserved

    logging.basicConfig(level=logging.WARNING)
    specs = [FleetSpec("rollout", 2, num_cpus=1.5, timeout_s=120), FleetSpec("learner", 2, num_cpus=0.5, timeout_s=120)]
    nodes = lambda fleet: fetch(fleet.broadcast("where"))  # noqa: E731
    with head(num_cpus=0) as cluster:
        added = [cluster.add_node(num_cpus=2, object_store_memory=STORE) for _ in range(2)]
        with reserved(specs, "colocated"):
            with closing(*(make_fleet("ray", Worker, spec) for spec in reversed(specs))) as (learner, rollout):
                assert nodes(rollout) == nodes(learner)
                assert len(set(nodes(rollout))) == 2
            try:
                with reserved([FleetSpec("other", 3, num_cpus=1)], "apart", timeout_s=2):
                    raise AssertionError("there was no room")
            except FleetSpecError as error:
                print(error)
        with reserved(specs[:1], "apart"), closing(make_fleet("ray", Worker, specs[0])) as (rollout,):
            before = nodes(rollout)
            assert set(before) == {node.node_id for node in added}
            cluster.remove_node(added[1], allow_graceful=False)
            cluster.add_node(num_cpus=2, object_store_memory=STORE)
            after = nodes(rollout)
            assert added[1].node_id not in after and len(set(after)) == 2 and rollout.restarts >= 1


@pytest.mark.slow
def test_places_are_shared_or_apart_and_those_of_a_lost_node_move():
    output = alone("places", module="test_placement")
    missing = "cluster.placement=apart needs places: 3 of 1 CPU; free are 0 of 4 CPU and 0 of 0 GPU"
    assert output.count(missing) == 2  # told while it waits, and at the end
