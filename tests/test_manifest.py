"""The KubeRay manifest of a job: fields that the CRD knows, values that are the job's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from jobs import submit
from jobs.cli import ConfigError
from jobs.manifest import TEMPLATE, pods
from jobs.ray_job import make_job
from rl.fleet import FleetSpec

FIELDS = yaml.safe_load((Path(__file__).parent / "data/rayjob_fields.yaml").read_text())
SHARED = ("run_dir=/shared/first", "tracking.uri=http://mlflow:5000")


def unknown(path: str, value: object) -> list[str]:
    """The fields below path that the CRD does not have."""
    if isinstance(value, list):
        return [name for item in value for name in unknown(path, item)]
    if not isinstance(value, dict) or path not in FIELDS:
        return []
    below = (name for key, item in value.items() for name in unknown(f"{path}.{key}", item))
    return [f"{path}.{key}" for key in value if key not in FIELDS[path]] + list(below)


def written(monkeypatch, path: Path, *words: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["jobs.submit", "--manifest", str(path), *words])
    with pytest.raises(SystemExit) as end:
        submit.main()
    assert end.value.code == 0
    return list(yaml.safe_load_all(path.read_text()))


def test_the_manifest_has_the_crds_fields_and_the_jobs_values(monkeypatch, tmp_path):
    overrides = (*SHARED, "cluster.rollout={replicas: 12, num_gpus: 1}", "learner.ranks=4")
    overrides += ("cluster.learner.num_gpus=1", "rollout.prompts_per_iteration=16", "rollout.prompts_per_task=4")
    (made,) = written(monkeypatch, tmp_path / "job.yaml", "--name", "first", "--", *overrides)
    assert made["apiVersion"] == "ray.io/v1" and made["kind"] == "RayJob" and made["metadata"]["name"] == "first"
    spec, job = made["spec"], make_job(overrides)
    assert unknown("spec", spec) == []
    assert spec["submissionMode"] == "HTTPMode" and spec["shutdownAfterJobFinishes"] and spec["backoffLimit"] > 0
    assert spec["entrypoint"] == job.entrypoint
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {"env_vars": job.env_vars}
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2  # 16 GPUs in pods of 8
    head = spec["rayClusterSpec"]["headGroupSpec"]
    for pod in (head["template"]["spec"], group["template"]["spec"]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory" and "persistentVolumeClaim" in volumes["shared"]
        (container,) = pod["containers"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        assert container["envFrom"][0]["secretRef"]["name"] == "dragline"
        assert pod["terminationGracePeriodSeconds"] > job.config.train.grace_s
    assert "&" not in (tmp_path / "job.yaml").read_text()


def test_a_field_that_the_crd_does_not_have_is_found():
    spec = yaml.safe_load(TEMPLATE.read_text())["spec"]
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    spec["backofLimit"] = 1
    assert unknown("spec", spec) == [
        "spec.backofLimit", "spec.rayClusterSpec.workerGroupSpecs.template.spec.containers.volumeMount"
    ]  # fmt: skip


def test_a_job_without_gpus_asks_for_none_and_a_sweep_is_several_documents(monkeypatch, tmp_path):
    made = written(monkeypatch, tmp_path / "jobs.yaml", "--name", "s", "--sweep", "--", *SHARED, "seed=0,1")
    assert [one["metadata"]["name"] for one in made] == ["s-0", "s-1"]
    assert "nvidia.com/gpu" not in (tmp_path / "jobs.yaml").read_text()


def test_pods_are_counted_by_what_fits_into_each():
    pod = {"CPU": 4.0, "GPU": 2.0}
    assert pods([FleetSpec("rollout", 4, num_cpus=3)], pod) == 4  # 12 CPU would be 3 pods
    assert pods([FleetSpec("rollout", 4, num_cpus=1, num_gpus=0.5), FleetSpec("learner", 2, num_gpus=1)], pod) == 2
    with pytest.raises(ConfigError, match=r"deploy/rayjob\.yaml"):
        pods([FleetSpec("learner", 1, num_gpus=4)], pod)


def test_a_name_that_kubernetes_does_not_take_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        sys, "argv", ["jobs.submit", "--manifest", str(tmp_path / "x"), "--name", "My_Job", "--", *SHARED]
    )
    with pytest.raises(SystemExit):
        submit.main()
    assert "--name My_Job: Kubernetes takes" in capsys.readouterr().err
