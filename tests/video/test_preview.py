"""The browser preview: what a page gets, who may ask, and, where there is a Chromium, what a page shows."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from video_helpers import CLASSES, Numbered, Threshold

from aicsd_deploy.errors import InputError
from aicsd_deploy.video import load
from aicsd_deploy.video.overlay import Overlay
from aicsd_deploy.video.pipeline import process_video
from aicsd_deploy.video.preview import MAX_WIDTH, PreviewSink, _Handler
from aicsd_deploy.video.sources import Frame

pytestmark = pytest.mark.usefixtures("no_threads_left")


def ask(sink: PreviewSink, path: str, *, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    host, port = sink.url.removeprefix("http://").rstrip("/").rsplit(":", 1)
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def picture(value: int, size_hw: tuple[int, int] = (48, 64)) -> Frame:
    """The left half is class 0, the right half class 1."""
    image = np.full((*size_hw, 3), value, np.uint8)
    labels = np.zeros(size_hw, np.uint8)
    labels[:, size_hw[1] // 2 :] = 1
    return Frame(value, image, value / 25, labels=labels, plain_bgr=image)


@pytest.fixture
def sink() -> Iterator[PreviewSink]:
    with PreviewSink(CLASSES, address=("127.0.0.1", 0)).open(Numbered(1)) as opened:
        yield opened


def test_a_page_gets_the_newest_frame_and_its_labels(sink: PreviewSink) -> None:
    for value in (40, 80, 120):
        sink.write(picture(value))
    status, headers, body = ask(sink, "/frame?after=0")
    head = json.loads(headers["X-Frame"])
    assert (status, head["frame"], head["number"]) == (200, 120, 3)
    split = head["picture_bytes"]
    shown = cv2.imdecode(np.frombuffer(body[:split], np.uint8), cv2.IMREAD_COLOR)
    labels = cv2.imdecode(np.frombuffer(body[split:], np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(shown, np.full((48, 64, 3), 120), atol=2)
    np.testing.assert_array_equal(labels, picture(0).labels)


def test_a_page_that_is_up_to_date_waits_for_the_next_frame(sink: PreviewSink) -> None:
    sink.write(picture(40))
    assert ask(sink, "/frame?after=0")[0] == 200
    threading.Timer(0.3, lambda: sink.write(picture(50))).start()
    status, headers, _ = ask(sink, "/frame?after=1")
    assert (status, json.loads(headers["X-Frame"])["frame"]) == (200, 50)


def test_frames_are_encoded_only_while_a_page_asks(sink: PreviewSink, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = sink._pack
    monkeypatch.setattr(sink, "_pack", lambda frame, number: (packed.append(number), pack(frame, number))[1])
    for value in range(20):
        sink.write(picture(value))
        time.sleep(0.005)
    assert packed == []
    threads = [threading.Thread(target=ask, args=(sink, "/frame?after=0")) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) <= 2, "once for all pages, however many ask at the same time"


def test_a_page_that_never_reads_does_not_hold_up_the_pipeline() -> None:
    sink = PreviewSink(CLASSES, address=("127.0.0.1", 0))
    sink.paced = False
    port = int(sink.url.rstrip("/").rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as stuck:
        stuck.sendall(b"GET /frame?after=0 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50)
        result = process_video(Numbered(200), Threshold(), sink, overlay=Overlay(CLASSES))
    assert result.frames_out == 200


def test_large_frames_are_sent_smaller(sink: PreviewSink) -> None:
    sink.write(picture(40, (1080, 1920)))
    _, headers, body = ask(sink, "/frame?after=0")
    split = json.loads(headers["X-Frame"])["picture_bytes"]
    assert cv2.imdecode(np.frombuffer(body[split:], np.uint8), cv2.IMREAD_UNCHANGED).shape == (540, MAX_WIDTH)


def test_the_page_and_what_it_has_to_know(sink: PreviewSink) -> None:
    status, headers, body = ask(sink, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b"<canvas" in body
    about = json.loads(ask(sink, "/about.json")[2])
    assert about["classes"] == [{"name": "dark", "rgb": [10, 200, 30]}, {"name": "bright", "rgb": [250, 0, 120]}]
    assert (about["source"], about["size_hw"]) == ("numbered", [24, 32])
    assert ask(sink, "/etc/passwd")[0] == 404
    assert ask(sink, "/frame?after=x")[0] == 400


def test_a_question_for_the_head_alone_is_answered_without_a_body(sink: PreviewSink) -> None:
    length = len(ask(sink, "/")[2])
    status, headers, body = ask(sink, "/", method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, str(length), b"")
    assert ask(sink, "/nothing", method="HEAD")[0] == 404


@pytest.mark.parametrize(("path", "host"), [("http://[::1", "localhost"), ("/", "[::1")])
def test_an_address_that_is_none_is_answered_too(path: str, host: str, sink: PreviewSink) -> None:
    assert ask(sink, path, Host=host)[0] == 400


def test_other_web_sites_cannot_ask_through_a_name_of_their_own(sink: PreviewSink) -> None:
    assert ask(sink, "/about.json", Host="evil.example:8765")[0] == 403
    assert ask(sink, "/about.json", Host="localhost:8765")[0] == 200


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        PreviewSink(CLASSES, address=taken.getsockname())


@pytest.mark.parametrize("host", ["nowhere.invalid", "a b", "\u00e9" * 80, "a\0b"])
def test_a_host_that_is_none(host: str) -> None:
    with pytest.raises(InputError, match="cannot listen"):
        PreviewSink(CLASSES, address=(host, 0))


def test_it_listens_on_an_ipv6_address() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with PreviewSink(CLASSES, address=("::1", 0)).open(Numbered(1)) as sink:
        assert sink.url.startswith("http://[::1]:")
        assert ask(sink, "/about.json")[0] == 200


def test_waiting_pages_hear_of_the_end() -> None:
    answers: list[int] = []
    with PreviewSink(CLASSES, address=("127.0.0.1", 0)).open(Numbered(1)) as sink:
        waiting = threading.Thread(target=lambda: answers.append(ask(sink, "/frame?after=0")[0]))
        waiting.start()
        time.sleep(0.3)
    waiting.join()
    assert answers == [410]


class Browser:
    """Chromium, driven through ChromeDriver by the WebDriver protocol."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --window-size=1200,800"
    )

    def __init__(self, folder: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._address, self._base = f"127.0.0.1:{port}", ""
        until(lambda: self._call("GET", "/status"))
        options = {"args": [*self.FLAGS.split(), f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{session['sessionId']}"

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def complaints(self) -> Any:
        return self._call("POST", "/se/log", {"type": "browser"})

    def close(self) -> None:
        self._call("DELETE", "")
        self._driver.terminate()
        self._driver.wait()

    def _call(self, method: str, path: str, body: object = None) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        connection.request(method, self._base + path, None if body is None else json.dumps(body))
        answer = json.load(connection.getresponse())["value"]
        connection.close()
        return answer


def until(check: Any, seconds: float = 60) -> Any:
    """Return what `check` gives once that is true; fail if it does not come to be."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if found := check():
                return found
        except OSError:
            pass
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


@pytest.fixture
def browser() -> Iterator[Browser]:
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        pytest.skip("needs Chromium and ChromeDriver (on Debian: apt install chromium chromium-driver)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = Browser(folder)
        yield opened
        opened.close()


PIXEL = "return Array.from(document.getElementById('canvas').getContext('2d').getImageData(%d, 20, 1, 1).data)"


@pytest.mark.slow
def test_a_page_in_chromium(browser: Browser, sink: PreviewSink) -> None:
    sink.write(picture(100))
    browser.open(sink.url)
    until(lambda: browser.run("return document.getElementById('state').textContent") == "running")
    blended = (0.45 * 100 + 0.55 * np.array(CLASSES[0].color_rgb)).round()
    np.testing.assert_allclose(browser.run(PIXEL % 10)[:3], blended, atol=4)

    browser.run("document.getElementById('opacity').value = 1; document.getElementById('opacity').oninput()")
    np.testing.assert_allclose(browser.run(PIXEL % 50)[:3], CLASSES[1].color_rgb, atol=2)

    browser.run("document.getElementById('class1').click()")  # hides "bright", on the right
    np.testing.assert_allclose(browser.run(PIXEL % 50)[:3], [100] * 3, atol=4)
    np.testing.assert_allclose(browser.run(PIXEL % 10)[:3], CLASSES[0].color_rgb, atol=2)

    browser.run("document.querySelector('input[value=slider]').click()")  # the overlay begins in the middle
    np.testing.assert_allclose(browser.run(PIXEL % 10)[:3], [100] * 3, atol=4)

    browser.run("document.querySelector('input[value=side]').click()")
    assert browser.run("return document.getElementById('canvas').width") == 128
    np.testing.assert_allclose(browser.run(PIXEL % 74)[:3], CLASSES[0].color_rgb, atol=2)

    sink.write(picture(140))
    until(lambda: "140 at 5.6 s" in browser.run("return document.getElementById('figures').textContent"))
    browser.run(
        "document.body.style.width = '390px'; document.getElementById('source').textContent = 'a_long_name/'.repeat(9)"
    )
    assert browser.run("return document.getElementById('state').offsetHeight") < 30, "the state breaks within a word"
    assert (
        browser.run("return document.querySelector('aside').offsetWidth / document.getElementById('stage').offsetWidth")
        == 1
    )

    of_the_page = [c for c in browser.complaints() if "will-read-frequently" not in c["message"]]  # that is this test
    assert of_the_page == []


@pytest.mark.slow
@pytest.mark.parametrize("body", [None, b"cut off"])
def test_a_page_asks_no_more_once_something_else_answers(
    body: bytes | None, browser: Browser, sink: PreviewSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer_frame(handler: _Handler, after: str) -> None:
        asked.append(after)
        if body is None:
            handler.send_error(404)
        else:
            handler.send_response(200)
            handler.send_header("X-Frame", '{"picture_bytes": 3}')
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(body)
            handler.close_connection = True

    monkeypatch.setattr(_Handler, "_answer_frame", answer_frame)
    browser.open(sink.url)
    until(lambda: browser.run("return document.getElementById('state').textContent") == "the program has ended")
    assert len(asked) == 1


def test_a_load_that_a_jetson_does_not_tell_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "load"
    monkeypatch.setattr(load, "_JETSON", (tmp_path / "missing", file))
    file.write_text("473\n")
    assert load._gpu_percent() == 47.3
    file.write_text("")
    assert load._gpu_percent() is None
    file.unlink()
    file.mkdir()  # cannot be read
    assert load._gpu_percent() is None
