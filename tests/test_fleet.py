"""Real Ray, real processes: they are killed with SIGKILL, hang for ever, raise."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from rl import ray_fleet
from rl.fleet import Fleet, FleetError, FleetSpec, FleetSpecError, as_completed, fetch, make_fleet


class PromptRefused(ValueError):
    """A user's error."""


class Untransportable(ValueError):
    def __init__(self, file: str, row: int) -> None:
        super().__init__(f"a row: {file}:{row}")


class Worker:
    def __init__(self, name: str = "sampler", trouble: Callable[[], None] | None = None) -> None:
        self.name, self.weights, self.version = name, 0.0, -1
        if trouble:
            trouble()

    def load_weights(self, weights: np.ndarray, version: int) -> int:
        self.weights, self.version = float(weights.sum()), version
        return os.getpid()

    def seen(self, *_: object) -> tuple[float, int, int]:
        return self.weights, self.version, os.getpid()

    def sample(self, prompt: int) -> float:
        return self.weights + np.random.default_rng(prompt).normal()

    def video(self, frames: int) -> tuple[np.ndarray, int]:
        return np.full((frames, 64, 64, 3), 7, np.uint8), frames

    def brightness(self, video: np.ndarray, others: list[np.ndarray]) -> tuple[float, bool]:
        return float(video.mean() + sum(other.mean() for other in others)), video.flags.writeable

    def rank(self, rank: int) -> tuple[int, int]:
        return rank, os.getpid()

    def trouble(self, trouble: Callable[[], object]) -> object:
        trouble()
        return self.seen()

    def threads(self) -> tuple[int, int]:
        import cv2  # not at the top, where every worker process would pay for it
        import torch

        return torch.get_num_threads(), cv2.getNumThreads()

    def grow(self, mb: int) -> tuple[int, np.ndarray]:
        self.held = [*getattr(self, "held", []), b"1" * (mb * 2**20)]
        return len(self.held), np.full(10**6, len(self.held), np.uint8)

    def lock(self) -> object:
        return threading.Lock()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    threading.Event().wait()


def refuse() -> None:
    raise PromptRefused("prompts.jsonl:7: track 2 leaves the picture; mark it invisible there")


class Once:
    """Trouble the first time, whichever process it is in."""

    def __init__(self, trouble: Callable[[], None], marker: Path) -> None:
        self.trouble, self.marker = trouble, marker

    def __call__(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            self.trouble()


def ends(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process is gone, or goes soon: Ray kills without waiting."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], within_s)[0])
    finally:
        os.close(process)


@pytest.fixture(scope="module")
def five(ray_local: None) -> Iterator[Fleet]:
    """Five workers on two CPUs."""
    with closing(make_fleet("ray", Worker, FleetSpec("five", replicas=5, num_cpus=0.2, timeout_s=60))) as fleet:
        yield fleet


@pytest.fixture
def inline() -> Fleet:
    return make_fleet("inline", Worker, FleetSpec("inline", replicas=2), args=("sampler",))


def sampled(fleet: Fleet) -> list[float]:
    fleet.broadcast("load_weights", np.ones(3), 1)
    tasks = {fleet.submit("sample", prompt): prompt for prompt in range(12)}
    values = {tasks[task]: fetch(task.values[0]) for task in as_completed(tasks)}
    return [values[prompt] for prompt in range(12)]


def test_inline_and_ray_give_the_same_results_whichever_worker_computed_them(five: Fleet, inline: Fleet) -> None:
    assert sampled(five) == sampled(inline)
    assert len(set(sampled(inline))) == 12
    assert len({pid for *_, pid in fetch(five.broadcast("seen"))}) == 5


@pytest.mark.parametrize("at_once", [1, 3])
def test_idle_workers_take_turns_so_that_dead_ones_are_found_and_cost_a_call_one_chance(ray_local, at_once) -> None:
    with closing(make_fleet("ray", Worker, FleetSpec("idle", replicas=3, retries=1))) as fleet:
        pids = [pid for *_, pid in fetch(fleet.broadcast("seen"))]
        assert {fetch(fleet.submit("seen").result()[0])[2] for _ in pids} == {*pids}
        for dead in range(at_once, 4, at_once):
            for victim in pids[dead - at_once : dead]:
                os.kill(victim, signal.SIGKILL)
                assert ends(victim)
            alive = {fetch(fleet.submit("seen").result()[0])[2] for _ in pids}
            assert alive.isdisjoint(pids[:dead]) and fleet.restarts == dead


@pytest.mark.parametrize("backend", ["inline", "five"])
def test_a_call_sees_the_broadcasts_before_it_and_none_after_it(backend: str, request: pytest.FixtureRequest) -> None:
    fleet = request.getfixturevalue(backend)
    tasks = []
    for version in (10, 11, 12):
        fleet.submit_all("load_weights", [(np.ones(2), version)] * fleet.spec.replicas)
        tasks += [fleet.submit("seen", version) for _ in range(7)]
    versions = [fetch(task.result()[0])[1] for task in tasks]
    assert versions == [10] * 7 + [11] * 7 + [12] * 7


@pytest.mark.parametrize("backend", ["inline", "five"])
def test_scatter_gives_row_i_to_replica_i(backend: str, request: pytest.FixtureRequest) -> None:
    fleet = request.getfixturevalue(backend)
    rows = [(rank,) for rank in range(fleet.spec.replicas)]
    first, second = fetch(fleet.scatter("rank", rows)), fetch(fleet.scatter("rank", rows))
    assert [rank for rank, _ in first] == list(range(fleet.spec.replicas))
    assert first == second  # the same process keeps the same rank
    with pytest.raises(FleetSpecError, match="1 rows for"):
        fleet.scatter("rank", [(0,)])


@pytest.mark.parametrize("backend", ["inline", "five"])
def test_results_go_into_other_calls_as_references(backend: str, request: pytest.FixtureRequest) -> None:
    fleet = request.getfixturevalue(backend)
    video, frames = fleet.submit("video", 5, returns=2).result()
    other, _ = fleet.submit("video", 3, returns=2).result()
    mean, writeable = fetch(fleet.submit("brightness", video, [video, other]).result()[0])
    assert (mean, fetch(frames), fetch([video, 1])[1]) == (21.0, 5, 1)
    assert fetch(video).shape == (5, 64, 64, 3)
    assert writeable == fetch(video).flags.writeable == (backend == "inline")  # the object store is read-only
    fault = next(as_completed([fleet.submit("video", 5, returns=3)])).fault
    assert fault.kind == "error" and "a tuple of 2 where returns=3" in fault.text


@pytest.mark.parametrize("backend", ["inline", "five"])
def test_an_exception_of_the_worker_is_a_fault_without_retry_or_restart(
    backend: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fleet = request.getfixturevalue(backend)
    task = fleet.submit("trouble", Once({}.__getitem__, tmp_path / "a"))
    (done,) = as_completed([task])
    assert done is task and task.values == () and task.fault.kind == "error"
    assert task.fault.text.startswith(f"{fleet.spec.name}[") and ".trouble: TypeError: " in task.fault.text
    assert "in __call__" in task.fault.tail and len(task.fault.text.splitlines()) == 1
    with pytest.raises(FleetError, match="TypeError"):
        task.result()
    assert fleet.restarts == 0


@pytest.mark.parametrize("backend", ["inline", "five"])
def test_a_value_error_of_the_user_arrives_as_it_was(backend: str, request: pytest.FixtureRequest) -> None:
    fleet = request.getfixturevalue(backend)
    with pytest.raises(PromptRefused, match=r"^prompts.jsonl:7: track 2 leaves the picture; mark it invisible there$"):
        fleet.broadcast("trouble", refuse)
    with pytest.raises(FleetError, match="no_such_method"):
        fleet.submit("no_such_method").result()


def refuse_untransportably() -> None:
    raise Untransportable("a.json", 3)


def test_what_cannot_travel_between_processes_is_told_in_text(five: Fleet) -> None:
    with pytest.raises(FleetError, match="Untransportable: a row"):
        five.submit("trouble", refuse_untransportably).result()
    with pytest.raises(FleetError, match="lock"):
        five.submit("lock").result()
    assert five.restarts == 0


def test_workers_are_single_threaded_before_they_import_anything(five: Fleet) -> None:
    assert fetch(five.submit("threads").result()) == [(1, 1)]
    spec = FleetSpec("two threads", env={"OMP_NUM_THREADS": "2"})
    with closing(make_fleet("ray", Worker, spec)) as fleet:
        assert fetch(fleet.broadcast("threads")) == [(2, 1)]  # the environment of the spec wins


def test_a_killed_worker_is_replaced_with_the_latest_weights_and_its_call_run_again(
    ray_local: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = FleetSpec("rollout", replicas=2, timeout_s=60)
    with closing(make_fleet("ray", Worker, spec)) as fleet:
        fleet.broadcast("load_weights", np.full(4, 1.0), 1, keep=True)
        pids = fetch(fleet.broadcast("load_weights", np.full(4, 2.0), 2, keep=True))
        begin = time.monotonic()
        tasks = [fleet.submit("trouble", Once(die, tmp_path / "a")), *(fleet.submit("seen") for _ in range(6))]
        seen = [fetch(task.result()[0]) for task in tasks]
        assert {(weights, version) for weights, version, _ in seen} == {(8.0, 2)}
        assert time.monotonic() - begin < 30
        (told,) = [text for text in caplog.messages if "died" in text]  # a busy machine warns of other things too
        assert fleet.restarts == 1 and told.startswith("rollout[") and ".trouble: the worker died" in told

        # One that dies while nobody looks is found by the next call.
        pids = [pid for *_, pid in fetch(fleet.broadcast("seen"))]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        now = fetch(fleet.broadcast("seen"))
        assert {(weights, version) for weights, version, _ in now} == {(8.0, 2)}
        assert not {pid for *_, pid in now} & set(pids)
        assert fleet.restarts == 3


def test_a_call_that_kills_every_worker_ends_as_a_fault_and_the_fleet_goes_on(ray_local: None) -> None:
    with closing(make_fleet("ray", Worker, FleetSpec("reward", retries=1))) as fleet:
        poison, healthy = fleet.submit("trouble", die), fleet.submit("sample", 3)
        assert [task.fault and task.fault.kind for task in as_completed([poison, healthy])] == ["crash", None]
        assert fleet.restarts == 2


def test_a_worker_that_hangs_is_killed_at_its_deadline_which_counts_from_dispatch(
    ray_local: None, tmp_path: Path
) -> None:
    with closing(make_fleet("ray", Worker, FleetSpec("reward", timeout_s=1.5, retries=0))) as fleet:
        (pid,) = fetch(fleet.broadcast("load_weights", np.ones(1), 5, keep=True))
        pause = threading.Event()
        queued = [fleet.submit("trouble", Pause(0.4)) for _ in range(5)]  # 2 s in all, longer than one deadline
        assert [task.fault for task in as_completed(queued)] == [None] * 5

        away = fleet.submit("sample", 1)
        pause.wait(2.0)  # the driver is away for longer than the deadline
        assert fetch(away.result()[0]) == fetch(fleet.submit("sample", 1).result()[0])
        assert fleet.restarts == 0

        begin = time.monotonic()
        stuck, after = fleet.submit("trouble", hang), fleet.submit("seen")
        assert next(as_completed([stuck])).fault.kind == "timeout"
        assert 1.4 < time.monotonic() - begin < 4
        assert "reward[0].trouble: no result after 1.5 s" in stuck.fault.text
        weights, version, new_pid = fetch(after.result()[0])
        assert (weights, version, fleet.restarts) == (1.0, 5, 1) and new_pid != pid
        assert ends(pid)


class Pause:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> None:
        threading.Event().wait(self.seconds)


def test_a_worker_that_hangs_in_c_and_keeps_the_interpreter_is_killed_and_its_call_not_run_again(
    ray_local: None,
) -> None:
    spec = FleetSpec("reward", timeout_s=1.0, retries=3, retry_timeouts=False)
    with closing(make_fleet("ray", Worker, spec)) as fleet:
        ((_, _, pid),) = fetch(fleet.broadcast("seen"))
        begin = time.monotonic()
        stuck = fleet.submit("trouble", hang_in_c)
        assert next(as_completed([stuck])).fault.kind == "timeout"
        assert time.monotonic() - begin < 3 and fleet.restarts == 1
        assert ends(pid)


def hang_in_c() -> None:
    ctypes.PyDLL(None).pause()


def test_a_worker_that_grows_is_replaced_and_what_it_returned_stays(ray_local: None) -> None:
    with closing(make_fleet("ray", Worker, FleetSpec("leaky", memory_gb=0.5))) as fleet:
        fleet.broadcast("load_weights", np.ones(3), 1, keep=True)
        tasks = [fleet.submit("grow", 100, returns=2) for _ in range(8)]
        counts, arrays = zip(*(fetch(list(task.result())) for task in as_completed(tasks)))
        assert max(counts) < 6 and counts.count(1) == fleet.recycled + 1 >= 2 and fleet.restarts == 0
        assert [int(array[-1]) for array in arrays] == list(counts)
        assert fetch(fleet.submit("seen").result()[0])[:2] == (3.0, 1)
    with closing(make_fleet("ray", Worker, FleetSpec("fat", memory_gb=0.01))) as fleet:
        with pytest.raises(FleetSpecError, match=r"'fat': a fresh worker holds 0\.\d+ GB already; raise memory_gb"):
            fleet.broadcast("seen")


def test_a_dead_rank_ends_the_fleet_until_it_is_renewed_and_is_named_though_the_other_ranks_hang(
    ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_fleet, "GRACE_S", 0.5)
    spec = FleetSpec("learner", replicas=2, timeout_s=60, replace=False)
    with closing(make_fleet("ray", Worker, spec)) as fleet:
        pids = fetch(fleet.broadcast("load_weights", np.ones(1), 0))
        begin = time.monotonic()
        with pytest.raises(FleetError, match=r"learner\[1\].trouble: the worker died"):
            fleet.scatter("trouble", [(hang,), (die,)])
        assert time.monotonic() - begin < 10
        assert fleet.restarts == 0
        with pytest.raises(FleetError, match=r"'learner' has ended: learner\[1\]"):
            fleet.submit("seen")
        fleet.renew()
        again = fetch(fleet.broadcast("load_weights", np.ones(1), 1))
        assert not {*pids} & {*again} and fleet.restarts == 2
        waiting = fleet.submit_all("trouble", [(hang,), (hang,)])
        fleet.renew()  # also of a fleet that has lost nobody
        assert "all its workers were replaced" in waiting.fault.text
        last = fetch(fleet.broadcast("load_weights", np.ones(1), 2))
        assert not {*again} & {*last}
    with pytest.raises(FleetError, match="'learner' has no processes to replace"):
        fleet.renew()
    assert all(ends(pid) for pid in (*pids, *again, *last))


def test_fleets_work_side_by_side_while_the_driver_waits_for_one(five: Fleet, ray_local: None) -> None:
    with closing(make_fleet("ray", Worker, FleetSpec("slow"))) as slow:
        slow.broadcast("seen")
        quick = [five.submit("sample", prompt) for prompt in range(20)]  # more than five can be under way
        slow.submit("trouble", Pause(1.5)).result()
        assert all(task.done for task in quick)


def test_closing_a_fleet_gives_what_is_under_way_a_fault(ray_local: None) -> None:
    fleet = make_fleet("ray", Worker, FleetSpec("closed"))
    tasks = [fleet.submit("trouble", hang), fleet.submit("seen"), fleet.submit_all("seen", [()])]
    fleet.close()
    fleet.close()
    assert [task.fault.text for task in as_completed(tasks)] == ["it was closed"] * 3
    with pytest.raises(FleetError, match="'closed' has ended"):
        fleet.submit("seen")


def test_a_worker_that_cannot_be_built_is_told_at_once(ray_local: None) -> None:
    with pytest.raises(PromptRefused):
        make_fleet("ray", Worker, FleetSpec("broken"), kwargs={"trouble": refuse}).broadcast("seen")
    with pytest.raises(PromptRefused):
        make_fleet("inline", Worker, FleetSpec("broken"), kwargs={"trouble": refuse})
    fleet = make_fleet("ray", Worker, FleetSpec("broken", retries=1), kwargs={"trouble": die})
    with pytest.raises(FleetError, match=r"broken\[0\].__build__: the worker died"):
        fleet.broadcast("seen")
    assert fleet.restarts == 1


def test_missing_resources_are_named_within_the_start_timeout(ray_local: None) -> None:
    spec = FleetSpec("tracker", replicas=2, num_gpus=1, start_timeout_s=1)
    with pytest.raises(FleetSpecError, match=r"'tracker': each of 2 replicas needs 1 GPU \(0 of 0 free\)"):
        make_fleet("ray", Worker, spec).broadcast("seen")


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"retries": -1}, {"timeout_s": 0.0}, {"num_cpus": -0.5}])
def test_a_wrong_setting_is_told_with_its_key(wrong: dict) -> None:
    with pytest.raises(FleetSpecError, match=f"'reward': {next(iter(wrong))} must be"):
        FleetSpec("reward", **wrong)


def test_an_unknown_backend_is_told() -> None:
    with pytest.raises(FleetSpecError, match="'inline' or 'ray', not 'slurm'"):
        make_fleet("slurm", Worker, FleetSpec("reward"))


def test_seeds_do_not_depend_on_the_process(five: Fleet) -> None:
    fourth, fifth = ({fetch(five.submit("sample", prompt).result()[0]) for _ in range(5)} for prompt in (4, 5))
    assert len(fourth) == len(fifth) == 1 and fourth != fifth
