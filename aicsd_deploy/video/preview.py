"""The live picture in a browser: pages ask for the newest frame, blend the classes themselves, and slow nobody down."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import cv2

from aicsd_deploy.console import say
from aicsd_deploy.errors import InputError
from aicsd_deploy.metadata import SegClass
from aicsd_deploy.runtime.base import UInt8Array
from aicsd_deploy.runtime.frames import resize_image, resize_labels
from aicsd_deploy.video.figures import Figures
from aicsd_deploy.video.load import LoadMeter
from aicsd_deploy.video.sinks import Sink
from aicsd_deploy.video.sources import Frame, Source

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_ADDRESS = ("127.0.0.1", 8765)
MAX_FPS = 20
"""Pages get no more frames than this, however fast the pipeline is: each costs the encoding of a picture."""
MAX_WIDTH = 960
_WAIT_S = 5.0  # how long a page's question for the next frame is kept open
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class _Parcel:
    """A frame as all pages get it."""

    number: int
    head: str
    body: bytes


class PreviewSink(Sink):
    """A page with the picture, the classes to switch on and off, and the figures of the run.

    Frames are encoded in a thread of their own, once for all pages and only while a page asks. A page that is slow gets
    fewer frames; the pipeline never waits for one.

    Args:
        classes: names and colours of the label values.
        address: host and port to listen on; None is 127.0.0.1 on port 8765, or on a free port where that is taken.
        opacity: what the page begins with.
        title: what the page calls itself.

    Attributes:
        about: what a page has to know once: title, source, size and classes.

    Raises:
        InputError: the address cannot be listened on.
    """

    wants_overlay, wants_plain, paced = False, True, True

    def __init__(
        self,
        classes: Sequence[SegClass],
        *,
        address: tuple[str, int] | None = None,
        opacity: float = 0.55,
        title: str = "aicsd-deploy",
    ) -> None:
        legend = [{"name": c.name, "rgb": list(c.color_rgb)} for c in classes]
        self.about: dict[str, Any] = {"title": title, "opacity": opacity, "classes": legend}
        self._server = _listen(address)
        self._server.sink = self
        host, port = self._server.server_address[:2]
        self.url = f"http://[{host!s}]:{port}/" if ":" in str(host) else f"http://{host!s}:{port}/"
        self.name = f"preview at {self.url}"
        self._changed = threading.Condition()
        self._latest: Frame | None = None
        self._count, self._parcel, self._wanted, self._ended = 0, _Parcel(0, "{}", b""), False, False
        self._figures: Figures | None = None

    def open(self, source: Source) -> Self:
        self.about |= {"source": source.name, "live": source.live, "size_hw": list(source.size_hw)}
        self._load = LoadMeter()
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.1,), name="preview", daemon=True),
            threading.Thread(target=self._encode, name="preview encoder", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        say(f"Look at {self.url} (Ctrl-C ends)")
        return self

    def write(self, frame: Frame) -> bool:
        with self._changed:
            self._latest, self._count = frame, self._count + 1
            self._changed.notify_all()
        return True

    def note(self, figures: Figures) -> None:
        self._figures = figures

    def close(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        time.sleep(0.2)  # pages that wait for a frame hear that there is none
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()
        self._load.close()

    def next_parcel(self, after: int) -> _Parcel | None:
        """Wait for a frame newer than number `after`; None after a few seconds without one.

        Raises:
            EOFError: the run has ended.
        """
        with self._changed:
            if self._parcel.number <= after:
                self._wanted = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._ended or self._parcel.number > after, _WAIT_S)
            if self._parcel.number > after:
                return self._parcel
            if self._ended:
                raise EOFError
            return None

    def _encode(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or (self._wanted and self._count > self._parcel.number))
                if self._ended:
                    return
                frame, number, self._wanted = self._latest, self._count, False
            started_s = time.perf_counter()
            assert frame is not None
            parcel = self._pack(frame, number)
            with self._changed:
                self._parcel = parcel
                self._changed.notify_all()
            time.sleep(max(0.0, 1 / MAX_FPS - (time.perf_counter() - started_s)))

    def _pack(self, frame: Frame, number: int) -> _Parcel:
        assert frame.plain_bgr is not None
        assert frame.labels is not None
        height, width = frame.labels.shape
        size_hw = (round(height * min(1, MAX_WIDTH / width)) or 1, min(width, MAX_WIDTH))
        picture = _encoded(".jpg", resize_image(frame.plain_bgr, size_hw), [cv2.IMWRITE_JPEG_QUALITY, 85])
        labels = _encoded(".png", resize_labels(frame.labels, size_hw), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        head = {
            "number": number,
            "picture_bytes": len(picture),
            "frame": frame.index,
            "time_s": round(frame.time_s, 3),
            "cpu_percent": self._load.cpu_percent,
            "gpu_percent": self._load.gpu_percent,
            **(asdict(self._figures) if self._figures else {}),
        }
        return _Parcel(number, json.dumps(head), picture + labels)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a page that keeps its connection open must not hold up the end
    sink: PreviewSink

    def __init__(self, address: tuple[str, int]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pages come and go; a connection that breaks is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: _Server

    def do_GET(self) -> None:
        try:
            parts, asked = urlsplit(self.path), urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:  # a bracket that is not closed
            self._answer(400, b"This is no address.", "text/plain")
            return
        if not self._is_own_name(asked):
            self._answer(403, b"This preview answers only under its own address.", "text/plain")
        elif parts.path == "/":
            page = files("aicsd_deploy.video").joinpath("preview.html").read_bytes()
            self._answer(200, page, "text/html; charset=utf-8")
        elif parts.path == "/about.json":
            self._answer(200, json.dumps(self.server.sink.about).encode(), "application/json")
        elif parts.path == "/frame":
            self._answer_frame(parse_qs(parts.query).get("after", ["0"])[0])
        else:
            self._answer(404, b"There is no such page.", "text/plain")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer_frame(self, after: str) -> None:
        try:
            parcel = self.server.sink.next_parcel(int(after))
        except ValueError:
            self._answer(400, b"after= must be a number.", "text/plain")
        except EOFError:
            self._answer(410, b"The run has ended.", "text/plain")
        else:
            if parcel is None:
                self._answer(204, b"", "text/plain")
            else:
                self._answer(200, parcel.body, "application/octet-stream", head=parcel.head)

    def _is_own_name(self, asked: str | None) -> bool:
        """Refuse, on loopback, a web site that has its own name point here to read the pictures."""
        bound = str(self.server.server_address[0])
        return bound not in _LOOPBACK or asked in _LOOPBACK

    def _answer(self, status: int, body: bytes, kind: str, *, head: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if head:
            self.send_header("X-Frame", head)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: one line per frame and page would bury the rest."""


def _listen(address: tuple[str, int] | None) -> _Server:
    host, port = address or DEFAULT_ADDRESS
    try:
        return _Server((host, port))
    except (OSError, TypeError, ValueError) as error:  # the last two: a name that no host can have
        if address is None:
            return _Server((host, 0))
        reason = getattr(error, "strerror", None) or "that is no host's name"
        raise InputError(
            f"The preview cannot listen on {host}:{port} ({reason}). Choose another with --preview HOST:PORT."
        ) from error


def _encoded(suffix: str, image: UInt8Array, options: list[int]) -> bytes:
    return cv2.imencode(suffix, image, options)[1].tobytes()
