"""System metrics of every node, on real Ray."""

from __future__ import annotations

import time

import ray

from rl.monitor import Gauge, monitoring

NVIDIA_SMI = "#!/bin/sh\nprintf '37, 1024\\n0, 512\\n'\n"


def later(sample, timeout_s: float = 60) -> dict[str, float]:
    deadline = time.monotonic() + timeout_s
    while not (found := sample()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


def test_this_machine_is_read_without_ray():
    with monitoring("inline") as sample:
        found = sample()
    (node,) = {name.split("/")[1] for name in found}
    assert found[f"system/{node}/memory_gb"] > 0.01 and found[f"system/{node}/disk_free_gb"] > 0
    assert 0 <= found[f"system/{node}/cpu_percent"] <= 100
    with monitoring(None) as sample:
        assert sample() == {}


def test_gpus_are_read_where_the_driver_tells(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = Gauge().read()
    assert (found["gpu_0_percent"], found["gpu_0_memory_gb"]) == (37, 1) and found["gpu_1_memory_gb"] == 0.5
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert not [name for name in Gauge().read() if name.startswith("gpu")]


def test_every_node_is_read_and_one_whose_actor_dies_is_read_again(ray_local):
    with monitoring("ray") as sample:
        assert sample() == {}  # it only asks
        found = later(sample)
        assert {name.split("/")[2] for name in found} >= {"cpu_percent", "memory_gb"}
        (node,) = sample.__self__.watched.values()
        ray.kill(node.gauge)
        deadline = time.monotonic() + 60
        while sample.__self__.watched.get(ray.nodes()[0]["NodeID"]) is node:
            assert time.monotonic() < deadline
            sample()
            time.sleep(0.2)
        assert later(sample).keys() == found.keys()
