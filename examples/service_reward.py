"""A reward that asks a service over HTTP: one line of JSON, then the raw bytes of the videos; JSON comes back.

    POST /score    {"shape": [B, T, H, W, 3], "sample_id": [...], "prompt": [...], "fps": 8.0}\\n<B*T*H*W*3 bytes>
    200            {"scores": [0.7, null, ...]}    one per video, null = not scored

Pixels go as they are: JPEG or PNG of a video would change what a quality reward measures, and pickle would let the
service run code here.
"""

import json
import time
import urllib.error
import urllib.request

PASSING = (429, 500, 502, 503, 504)
"""Answers after which trying again may help."""


class Service:
    """url: of the service. timeout_s: for each attempt to connect, and for each wait for bytes. retries: further
    attempts, the first after `pause_s`, each later one after twice as long.

    Raises after the last attempt; then the clips are masked and counted, never scored 0. The fleet's own timeout_s is
    the limit for a service that keeps sending and never ends: set it above (retries + 1) * timeout_s.
    """

    def __init__(self, url, timeout_s=10.0, retries=2, pause_s=0.5):
        self.url, self.timeout_s, self.retries, self.pause_s = url, timeout_s, retries, pause_s

    def __call__(self, batch):
        asked = {"shape": batch.video.shape, "sample_id": batch.sample_id, "prompt": batch.prompt, "fps": batch.fps}
        answer = self.ask(json.dumps(asked).encode() + b"\n" + batch.video.tobytes())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(batch):
            raise ValueError(f"{self.url} must answer {{'scores': [{len(batch)} numbers]}}, not {str(answer)[:80]}")
        return scores

    def ask(self, body):
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/octet-stream"})
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                problem = f"{error.code} {error.read(200).decode(errors='replace')}"
                if error.code not in PASSING:
                    break
            except OSError as error:  # no connection, or no answer in time
                problem = str(error)
            if attempt < self.retries:
                time.sleep(self.pause_s * 2**attempt)
        raise RuntimeError(f"{self.url}: no scores after {attempt + 1} attempts: {problem}")
