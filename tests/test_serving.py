"""`pyiqa-qscorer serve`: under load nothing is lost and nothing is wrong; full, too large, broken, stopped."""

import importlib.util
import io
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from commands import server_of
from environments import REPOSITORY
from fake_metric import FakeMetric
from PIL import Image

from pyiqa_qscorer.scorer import Scorer

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason='the HTTP server is an optional extra that is not installed: pip install "pyiqa-qscorer[serve]"',
)
PHOTOS = sorted((REPOSITORY / "tests" / "photos").glob("*.jpg"))
QUEUE, MAX_BYTES, MAX_IMAGES = 8, 400_000, 4
BATCH_TOLERANCE = 1e-5  # a score in a batch beside the score alone


class Server(NamedTuple):
    process: subprocess.Popen[str]
    address: tuple[str, int]

    def begin(self, body: bytes, kept_back: int) -> socket.socket:
        """Send a request without the last bytes of its body: it holds a place."""
        connection = socket.create_connection(self.address, timeout=20)
        head = f"POST /score HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: len(body) - kept_back])
        return connection

    def wait_for_queue(self, client: httpx.Client, length: int) -> None:
        end = time.monotonic() + 10
        while (health := client.get("/health").json())["queue"] != length:
            assert time.monotonic() < end, health
            time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = ["--queue", str(QUEUE), "--max-bytes", str(MAX_BYTES), "--max-images", str(MAX_IMAGES)]
    with server_of("serve", *limits) as (process, address):
        host, port = address.removeprefix("http://").split(":")
        yield Server(process, (host, int(port)))


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url="http://{}:{}".format(*server.address), timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    scores = Scorer("qscorer-mini", "cpu", 1).score(PHOTOS).tolist()
    return dict(zip((path.name for path in PHOTOS), scores, strict=True))


def form(*names: str) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (name, content(name))) for name in names]


def content(name: str) -> bytes:
    photo = (REPOSITORY / "tests" / "photos" / name.removeprefix("cut ")).read_bytes()
    return photo[: len(photo) // 2] if name.startswith("cut ") else photo


@needs_extra
@pytest.mark.slow
def test_under_load_nothing_is_lost_and_nothing_is_wrong(server, client, expected) -> None:
    names = [path.name for path in PHOTOS]
    bad = {
        "empty": (200, "it is empty"),
        "text": (200, "not an image that Pillow can read"),
        "bomb": (200, "exceeds limit"),
        "too large": (413, "more than 400,000 bytes"),
        "too large, not declared": (413, "more than 400,000 bytes"),
        "too many": (400, "Too many files"),
        "no file": (400, "field 'image' is no file"),
        "form breaks off": (400, "breaks off"),
        "method": (405, "Method Not Allowed"),
    }
    bodies = {
        "empty": b"",
        "text": b"no picture" * 99,
        "bomb": b"P6 20000 20000 255 ",
        "too large": bytes(MAX_BYTES + 1),
    }
    chance, kinds = random.Random(0), [*(["form"] * 50), *(["body"] * 50), *(list(bad) * 11)]
    chance.shuffle(kinds)
    plan = [(kind, chance.choices([*names, "README.md", "cut cat.jpg"], k=chance.choice([1, 1, 2]))) for kind in kinds]

    def ask(kind: str, chosen: list[str]) -> httpx.Response:
        if kind == "form":
            return client.post("/score", files=form(*chosen))
        if kind == "too large, not declared":
            return client.post("/score", content=iter([bytes(MAX_BYTES), b"1", b"2"]))
        if kind == "too many":
            return client.post("/score", files=form(*["README.md"] * (MAX_IMAGES + 1)))
        if kind == "no file":
            return client.post("/score", files={"image": (None, "cat.jpg")})
        if kind == "form breaks off":
            request = client.build_request("POST", "/score", files=form("cat.jpg", "cat.jpg"))
            head = {"content-type": request.headers["content-type"]}
            return client.post("/score", content=request.read()[:-3000], headers=head)
        if kind == "method":
            return client.get("/score")
        return client.post("/score", content=bodies[kind] if kind in bodies else content(chosen[0]))

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda one: ask(*one), plan))
    wrong = 0.0
    for (kind, chosen), answer in zip(plan, answers, strict=True):
        status, words = bad.get(kind, (200, ""))
        assert answer.status_code == status and words in answer.text, (kind, answer.text)
        if kind not in ("form", "body"):
            continue
        rows = answer.json()["results"]
        asked = chosen if kind == "form" else chosen[:1]
        assert [row["name"] for row in rows] == (asked if kind == "form" else ["body"])
        for name, row in zip(asked, rows, strict=True):
            if name in expected:
                wrong = max(wrong, abs(row["score"] - expected[name]))
            else:
                assert ("truncated" if "cut" in name else "not an image") in row["error"] and "score" not in row
    assert wrong <= BATCH_TOLERANCE
    server.wait_for_queue(client, 0)


@needs_extra
@pytest.mark.slow
def test_alone_a_score_is_that_of_the_scorer_to_the_bit(client: httpx.Client, expected: dict[str, float]) -> None:
    for name, score in expected.items():
        answer = client.post("/score", content=content(name)).json()
        assert answer["metric"] == "qscorer-mini" and np.float32(answer["results"][0]["score"]) == np.float32(score)


@needs_extra
@pytest.mark.slow
def test_a_full_queue_refuses_and_a_stop_answers_those_that_wait(server, client, expected) -> None:
    body = content("cat.jpg")
    waiting = [server.begin(body, kept_back=9) for _ in range(QUEUE)]
    server.wait_for_queue(client, QUEUE)
    refused = client.post("/score", content=body)
    assert refused.status_code == 503 and refused.headers["retry-after"] == "1", refused.text
    waiting.pop().close()  # a client that goes away frees its place
    server.wait_for_queue(client, QUEUE - 1)
    client.close()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    for connection in waiting:
        connection.sendall(body[-9:])
    for connection in waiting:
        with connection, connection.makefile("rb") as stream:
            answer = stream.read().decode()
        assert answer.startswith("HTTP/1.1 200 ") and f'"score":{expected["cat.jpg"]:.4f}'[:-1] in answer, answer
    assert server.process.wait(20) == 0
    assert server.process.stderr is not None and "Traceback" not in server.process.stderr.read()


def test_a_failing_model_fails_its_callers_and_no_others() -> None:
    from pyiqa_qscorer.serving.web import ScoringThread

    metric, noise = FakeMetric(), io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(noise, "PNG")
    thread = ScoringThread(Scorer(metric))
    metric.score_pixels = lambda pixels: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        thread.submit(noise.getvalue()).result(20)
    del metric.score_pixels
    left = thread.submit(noise.getvalue())
    thread.close()
    assert left.result(0).score == Scorer(metric).score(noise.getvalue())[0]
