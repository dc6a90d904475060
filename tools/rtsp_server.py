"""An RTSP server whose pictures say when they were taken: a source to test against, with GStreamer's own server.

It runs in the system's Python, which has GStreamer's bindings (on Debian: apt install gir1.2-gst-rtsp-server-1.0 python3-gi
gstreamer1.0-plugins-base gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly):

    /usr/bin/python3 tools/rtsp_server.py --port 8554 --fps 30

The stream is rtsp://127.0.0.1:PORT/live, H.264. The first 32 blocks of BLOCK_PX pixels in the first row of blocks are black or
white: the bits, the highest first, of time.monotonic() in milliseconds, which is the same in all processes of a machine.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from typing import Any

BLOCK_PX = 8
BITS = 32


def picture(width: int, height: int, number: int, noise: bytes) -> bytes:
    """Return a picture in I420: noise that moves, under the clock."""
    milliseconds = time.monotonic_ns() // 1_000_000
    row = b"".join((b"\xeb" if milliseconds >> bit & 1 else b"\x10") * BLOCK_PX for bit in reversed(range(BITS)))
    row = row.ljust(width, b"\x80")
    luma = row * BLOCK_PX + noise[number % 64 * width :][: width * (height - BLOCK_PX)]
    return luma + bytes([128]) * (width * height // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8554, help="port on 127.0.0.1")
    parser.add_argument("--fps", type=int, default=30, help="pictures per second")
    parser.add_argument("--size", default="480x360", metavar="WxH", help="width and height, 256 pixels wide at least")
    args = parser.parse_args()
    width, height = (int(part) for part in args.size.split("x"))

    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer

    Gst.init(None)
    small = random.Random(0).randbytes(width * (height + 64) // 4)
    noise = bytes(96 + value // 4 for value in small for _ in range(4))

    def feed(source: Any) -> None:
        started, number = time.monotonic(), 0
        while (
            source.emit("push-buffer", Gst.Buffer.new_wrapped(picture(width, height, number, noise)))
            == Gst.FlowReturn.OK
        ):
            number += 1
            time.sleep(max(0.0, started + number / args.fps - time.monotonic()))

    def configure(factory: Any, media: Any) -> None:
        source = media.get_element().get_child_by_name("source")
        threading.Thread(target=feed, args=(source,), daemon=True).start()

    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(
        f"( appsrc name=source is-live=true do-timestamp=true format=time caps=video/x-raw,format=I420,width={width},"
        f"height={height},framerate={args.fps}/1 ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max={args.fps} "
        "bitrate=3000 ! video/x-h264,profile=baseline ! rtph264pay name=pay0 pt=96 config-interval=1 )"
    )
    factory.set_shared(True)
    factory.connect("media-configure", configure)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(str(args.port))
    server.get_mount_points().add_factory("/live", factory)
    if not server.attach(None):
        raise SystemExit(f"port {args.port} is taken")
    print(f"rtsp://127.0.0.1:{args.port}/live, process {os.getpid()}", flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
