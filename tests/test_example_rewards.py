"""The three example rewards run in the training job as they are; the service is a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from jobs_cases import run_job, small_run  # noqa: F401  (a fixture)
from reward_cases import batch_of, film
from safetensors.numpy import save_file

from rewards.contract import as_output, resolve

EXAMPLES = Path(__file__).parents[1] / "examples"


class Judge(BaseHTTPRequestHandler):
    """Scores by brightness; fails as often as its server's list of troubles says, one trouble per request."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head, pixels = body.split(b"\n", 1)
        asked = json.loads(head)
        video = np.frombuffer(pixels, np.uint8).reshape(asked["shape"])
        self.server.asked.append(asked)
        trouble = self.server.troubles.pop(0) if self.server.troubles else 200
        if trouble == "hang":
            self.server.released.wait()
            return
        scores = [float(clip.mean() / 255) for clip in video]
        answer = {"scores": scores[1:] if trouble == "short" else scores}
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode() if trouble != "noise" else b"<html>")

    def log_message(self, *_: object) -> None:
        """Not to the terminal."""


@pytest.fixture
def service() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.troubles, server.asked, server.released = [], [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/score"


@pytest.fixture(scope="module")
def batch():
    return batch_of([film(0), film(1)], [0, 1])


def ask(server, batch, **settings) -> np.ndarray:
    make = resolve(f"{EXAMPLES}/service_reward.py:Service")
    reward = make(address(server), **{"timeout_s": 0.5, "pause_s": 0.01, **settings})
    return as_output(reward(batch), batch, "service").score


def test_the_service_reward_gets_the_pixels_as_they_are(service, batch):
    np.testing.assert_allclose(ask(service, batch), batch.video.mean((1, 2, 3, 4)) / 255, rtol=1e-6)
    assert service.asked == [{"shape": list(batch.video.shape), "sample_id": list(batch.sample_id),
                              "prompt": list(batch.prompt), "fps": batch.fps}]  # fmt: skip


@pytest.mark.parametrize("troubles", [[503], [429, 500], ["hang"], ["hang", 502]])
def test_the_service_reward_tries_again_after_what_may_pass(service, batch, troubles):
    service.troubles += troubles
    assert np.isfinite(ask(service, batch)).all() and len(service.asked) == len(troubles) + 1


@pytest.mark.parametrize(
    "troubles, attempts, message",
    [
        ([400], 1, r"/score: no scores after 1 attempts: 400"),
        ([503, 503, 503], 3, r"/score: no scores after 3 attempts: 503"),
        (["hang"] * 3, 3, "after 3 attempts: .*timed out"),
        (["short"], 1, r"must answer {'scores': \[2 numbers\]}"),
        (["noise"], 1, "Expecting value"),
    ],
)
def test_the_service_reward_raises_after_what_does_not_pass(service, batch, troubles, attempts, message):
    service.troubles += troubles
    with pytest.raises((RuntimeError, ValueError), match=message):
        ask(service, batch, timeout_s=0.2)
    assert len(service.asked) == attempts


def test_the_learned_reward_reads_its_weights_and_refuses_others(tmp_path, batch):
    make = resolve(f"{EXAMPLES}/learned_reward.py:Colours")
    save_file({"weight": np.float32([4, 0, 0, 0, 0, 0]), "bias": np.float32([-1])}, tmp_path / "colours.safetensors")
    output = as_output(make(tmp_path / "colours.safetensors")(batch), batch, "colours")
    red = batch.video[..., 0].mean((2, 3)) / 255
    np.testing.assert_allclose(output.frame_score[:, 1:], (1 / (1 + np.exp(1 - 4 * red)))[:, 1:], rtol=1e-4)
    assert output.metrics["logit"].shape == (2,)
    save_file({"weight": np.zeros(3, np.float32), "bias": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors: weight must be \[6\]"):
        make(tmp_path / "other.safetensors")


def test_all_three_train_together(small_run, service, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(EXAMPLES.parent)
    save_file({"weight": np.float32([1, 0, -1, 0, 0, 0]), "bias": np.zeros(1, np.float32)}, tmp_path / "c.safetensors")
    more = ["+rewards.bright.fn=examples/one_line_reward.py:bright",
            "+rewards.colours.fn=examples/learned_reward.py:Colours",
            f"+rewards.colours.args.weights={tmp_path}/c.safetensors",
            "+rewards.service.fn=examples/service_reward.py:Service", f"+rewards.service.args.url={address(service)}",
            "+rewards.service.args.pause_s=0.01", "train.iterations=1", "tracking.uri=null"]  # fmt: skip
    service.troubles += [200, 200, 503]
    assert run_job("train", *small_run, *more, f"run_dir={tmp_path / 'run'}") == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["masked/terms"] == 0 and len(service.asked) > 4
    assert line["reward/service"] == pytest.approx(line["reward/bright"], abs=0.02)
    assert 0 < line["reward/colours"] < 1 and "metric/colours/logit" in line
