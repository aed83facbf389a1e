import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rl import tracking as tracking_module
from rl.tracking import Tracking, TrackingError, flatten

PARAMS = {"seed": 1, "train": {"iterations": 10, "lr": 0.1}, "note": "x" * 9000}
STRIP = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A sqlite store, shared because making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def start(store, tmp_path, request):
    """start(uri=..., run_id=...) opens the tracking of this test's experiment and spool."""

    def start(uri=store, run_id=None, params=PARAMS, required=True, **options):
        return Tracking.open(uri, request.node.name, run_id, params=params, tags={"commit": "abc"}, required=required,
                             spool=tmp_path / "spool", **options)  # fmt: skip

    return start


@pytest.fixture
def nobody(monkeypatch):
    """The address of a port with nobody behind."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def client(store):
    from mlflow import MlflowClient

    return MlflowClient(store)


def history(store, run_id, name):
    return [(point.step, point.value) for point in client(store).get_metric_history(run_id, name)]


def artifacts(store, run_id, folder):
    return sorted(entry.path for entry in client(store).list_artifacts(run_id, folder))


def test_a_run_holds_params_metrics_videos_strips_and_its_status(store, start, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "clip.mp4").write_bytes(b"film")
    with start() as tracking:
        tracking.log({"train/kl": 0.5, "reward/q: a-b.c": float("nan")}, 0)
        tracking.log({"train/kl": 0.25}, 1)
        tracking.log_video("heldout/cat", tmp_path / "clip.mp4", 120)
        tracking.log_strip("heldout/cat", STRIP, 120)
        tracking.artifact(tmp_path / "clip.mp4", "extra")
    run = client(store).get_run(tracking.run_id)
    assert run.info.status == "FINISHED" and tracking.failures == 0
    assert run.data.params["train.iterations"] == "10" and len(run.data.params["note"]) < 6000
    assert run.data.tags["commit"] == "abc"
    assert history(store, tracking.run_id, "train/kl") == [(0, 0.5), (1, 0.25)]
    assert np.isnan(run.data.metrics["reward/q: a-b.c"])
    assert artifacts(store, tracking.run_id, "videos/step_000120/heldout") == ["videos/step_000120/heldout/cat.mp4"]
    assert artifacts(store, tracking.run_id, "extra") == ["extra/clip.mp4"]
    assert any(path.startswith("images/heldout~cat+step+120+") for path in artifacts(store, tracking.run_id, "images"))
    beside = Path(store.removeprefix("sqlite:///")).parent.as_uri()
    assert run.info.artifact_uri.startswith(f"{beside}/mlruns/")
    assert not list(elsewhere.iterdir())  # nothing lands in the working directory
    assert {path.name for path in (tmp_path / "spool").iterdir()} == {"records.jsonl", "run_id"}
    assert (tmp_path / "spool" / "records.jsonl").stat().st_size == 0


def test_a_resume_goes_on_with_the_run_whatever_the_new_config_says(store, start):
    with start() as first:
        for step in range(5):
            first.log({"a": step}, step)
    changed = {**PARAMS, "train": {"iterations": 20}}
    with start(run_id=first.run_id, params=changed) as second:
        assert client(store).get_run(first.run_id).info.status == "RUNNING"
        for step in range(3, 8):  # 3 and 4 are done once more, after the last checkpoint
            second.log({"a": step + 100, "b": step}, step)
    assert second.run_id == first.run_id and second.failures == 0
    assert history(store, first.run_id, "a") == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106), (7, 107)]
    assert [step for step, _ in history(store, first.run_id, "b")] == [3, 4, 5, 6, 7]
    assert artifacts(store, first.run_id, "config") == ["config/segment_0.yaml", "config/segment_1.yaml"]
    run = client(store).get_run(first.run_id)
    assert run.data.params["train.iterations"] == "10" and run.data.tags["resume.1.commit"] == "abc"


def test_a_run_that_was_killed_before_its_first_checkpoint_is_the_same_run_afterwards(store, start):
    with start() as first:
        first.log({"a": 0}, 0)
    with start() as second:
        second.log({"a": 0}, 0)
        second.log({"a": 1}, 1)
    assert second.run_id == first.run_id and history(store, first.run_id, "a") == [(0, 0), (1, 1)]


def test_a_run_that_the_store_does_not_know_is_continued_by_a_new_one(store, start):
    with start(run_id="0" * 32) as tracking:
        tracking.log({"a": 1}, 7)
    assert tracking.run_id != "0" * 32
    assert client(store).get_run(tracking.run_id).data.tags["continues"] == "0" * 32


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_the_status_tells_how_the_training_ended(store, start, error, status):
    with pytest.raises(error), start() as tracking:
        raise error
    assert client(store).get_run(tracking.run_id).info.status == status


@pytest.mark.parametrize("name", ["timing(s)/gen", "a@1", "a//b", "/a", "../a", "", "a\n", "ä"])
def test_a_name_that_mlflow_would_refuse_is_refused_at_once(name):
    with Tracking.open(None, "", params={}, tags={}, required=True, spool=Path("unused")) as tracking:
        tracking.log({"time/rollout": 1.0}, 0)
        for call in (lambda: tracking.log({name: 1.0}, 0), lambda: tracking.log_strip(name, STRIP, 0)):
            with pytest.raises(TrackingError, match="MLflow does not take the name"):
                call()


def test_a_required_server_that_is_down_stops_the_start_with_one_line(start, nobody):
    began = time.monotonic()
    with pytest.raises(TrackingError, match=f"tracking.uri={nobody} does not answer.*tracking.required=false") as error:
        start(nobody, timeout=2)
    assert time.monotonic() - began < 5 and "\n" not in str(error.value)


def test_training_goes_on_without_the_server_and_says_so_once(store, start, nobody, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        tracking = start(nobody, required=False)
        began = time.monotonic()
        for step in range(200):
            tracking.log({"a": step}, step)
        tracking.log_strip("strip", STRIP, 3)
        assert time.monotonic() - began < 1
        assert not tracking.flush(timeout=10) and tracking.run_id is None and tracking.failures >= 2
        told = [record for record in caplog.records if "no answer" in record.message]
        assert len(told) == 1
        tracking.close("KILLED")
    # The next process finds a server and delivers what the first one could not.
    with start(required=True) as second:
        second.log({"a": 200}, 200)
    assert [step for step, _ in history(store, second.run_id, "a")] == list(range(201))
    assert len(artifacts(store, second.run_id, "images")) == 2  # the strip and its thumbnail
    assert not list((tmp_path / "spool").glob("*.png"))


@pytest.fixture
def server(store, tmp_path, monkeypatch):
    """up(), down() and url of MLflow's own server, in threads of this process."""
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", store)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", (tmp_path / "served").as_uri())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from mlflow.server import app
    from werkzeug.serving import make_server

    class Server:
        def up(self, port=0):
            self.httpd = make_server("127.0.0.1", port, app, threaded=True)
            self.port = self.httpd.server_port
            self.url = f"http://127.0.0.1:{self.port}"
            threading.Thread(target=self.httpd.serve_forever, daemon=True).start()

        def down(self):
            self.httpd.shutdown()
            self.httpd.server_close()

    server = Server()
    server.up()
    yield server
    server.down()


def test_an_outage_in_the_middle_leaves_no_gap_and_no_step_twice(store, start, server, caplog):
    with caplog.at_level(logging.WARNING), start(server.url) as tracking:
        tracking.log({"a": 0}, 0)
        assert tracking.flush(timeout=20)
        server.down()
        for step in range(1, 50):
            tracking.log({"a": step}, step)
        assert not tracking.flush(timeout=20)
        server.up(server.port)
        tracking.log({"a": 50}, 50)
        assert tracking.flush(timeout=20)
    assert history(store, tracking.run_id, "a") == [(step, step) for step in range(51)]
    assert tracking.failures >= 1
    messages = [record.message for record in caplog.records if record.name == "rl.tracking"]
    assert len(messages) == 2 and "no answer" in messages[0] and "answers again" in messages[1]


def test_records_delivered_before_a_crash_are_not_delivered_twice(store, start, nobody, tmp_path):
    away = start(nobody, required=False)
    for step in range(4):
        away.log({"a": step}, step)
    away.close()
    spool = tmp_path / "spool" / "records.jsonl"
    undelivered = spool.read_bytes()
    with start() as first:
        pass
    spool.write_bytes(undelivered + b'{"kind": "metr')  # as if it had died between delivering and emptying the file
    with start(run_id=first.run_id) as second:
        second.log({"a": 4}, 4)
    assert [step for step, _ in history(store, first.run_id, "a")] == [0, 1, 2, 3, 4]
    assert second.failures == 0


def test_a_killed_process_loses_nothing_that_it_logged(store, start, nobody, tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from rl.tracking import Tracking
spool = Path({str(tmp_path / "spool")!r})
tracking = Tracking.open({nobody!r}, "x", params={{}}, tags={{}}, required=False, spool=spool)
for step in range(20):
    tracking.log({{"a": step}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], env={**os.environ})
    assert process.returncode == -signal.SIGKILL
    with start() as tracking:
        pass
    assert [step for step, _ in history(store, tracking.run_id, "a")] == list(range(20))


def test_what_cannot_be_delivered_is_counted_and_does_not_block_the_rest(store, start, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), start() as tracking:
        tracking.log_video("gone", tmp_path / "gone.mp4", 1)
        tracking.artifact(tmp_path / "gone.txt")
        tracking.log({"a": 1}, 1)
        assert tracking.flush(timeout=20)
    assert history(store, tracking.run_id, "a") == [(1, 1)]
    assert tracking.failures == 2
    assert len([record for record in caplog.records if "lost" in record.message]) == 1


def test_a_full_spool_costs_records_and_not_the_training(start, nobody, monkeypatch, caplog):
    monkeypatch.setattr(tracking_module, "SPOOL_LIMIT", 1000)
    with caplog.at_level(logging.WARNING):
        tracking = start(nobody, required=False)
        before = tracking.failures
        for step in range(100):
            tracking.log({"a": step}, step)
        assert tracking.failures - before > 50
        tracking.close()
    assert len([record for record in caplog.records if "lost" in record.message]) == 1


def test_params_are_flat_and_fit():
    flat = flatten({"a": {"b": {"c": 1}, "d": {}}, "list": [1, 2], "odd@key": None})
    assert flat == {"a.b.c": "1", "a.d": "{}", "list": "[1, 2]", "odd_key": "None"}


def test_a_policy_is_registered_once_however_often_it_is_delivered(store, start, nobody, tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    away = start(nobody, required=False)
    away.register("drag", folder, "track error 3 -> 2")
    away.close()
    spool = tmp_path / "spool" / "records.jsonl"
    undelivered = spool.read_bytes()
    with start() as first:
        pass
    spool.write_bytes(undelivered)  # as if it had died between delivering and emptying the file
    with start(run_id=first.run_id) as second:
        assert second.flush(timeout=20)
    (version,) = client(store).search_model_versions("name = 'drag'")
    assert (version.run_id, version.description) == (first.run_id, "track error 3 -> 2") and second.failures == 0
    assert version.source.endswith("/artifacts/policy") and artifacts(store, first.run_id, "policy")
    other = start()
    other.register("drag", folder, "")
    other.close()
    assert len(client(store).search_model_versions("name = 'drag'")) == 1  # the same run, the same folder


@pytest.mark.slow
def test_a_server_process_that_is_killed_and_comes_back_has_every_step_once(store, start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination",
               str(tmp_path / "served"), "--host", "127.0.0.1", "--port", port, "--workers", "1"]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = (tmp_path / "server.log").open("w")

    def serve():
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, process_group=0)

    process = serve()
    try:
        with start(f"http://127.0.0.1:{port}", timeout=150, retry_s=2) as tracking:
            for step in range(30):
                if step == 10:
                    assert tracking.flush(timeout=60)
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                if step == 20:
                    assert not tracking.flush(timeout=60)
                    process = serve()
                tracking.log({"a": step}, step)
            deadline = time.monotonic() + 150
            while not tracking.flush(timeout=10):
                assert time.monotonic() < deadline
                time.sleep(1)
        run = client(store).get_run(tracking.run_id)
        assert run.info.status == "FINISHED" and tracking.failures >= 1
        assert history(store, tracking.run_id, "a") == [(step, step) for step in range(30)]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
