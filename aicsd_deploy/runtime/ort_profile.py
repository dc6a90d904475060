"""Where ONNX Runtime spends a frame's time, read off its own profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aicsd_deploy.runtime.base import UInt8Array


def profile(
    path: Path, options: Any, providers: Sequence[Any], disabled: Sequence[str], batches_NHWC: Sequence[UInt8Array]
) -> list[list[tuple[str, float]]]:
    """Run a file with the profiler on; profiling slows it, so it gets a session of its own.

    Args:
        path: the .onnx file.
        options: the `SessionOptions` to run it with; profiling is switched on in them for this call.
        providers, disabled: providers and disabled optimizers, as `InferenceSession` takes them.
        batches_NHWC: uint8 (N, H, W, 3) each.

    Returns:
        for each batch the operators in the order they ran, as (type, milliseconds).
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="aicsd.profile.") as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "ort")
        try:
            session = ort.InferenceSession(
                str(path), options, providers=list(providers), disabled_optimizers=list(disabled)
            )
        finally:
            options.enable_profiling = False
        name = session.get_inputs()[0].name
        for batch in batches_NHWC:
            session.run(None, {name: batch})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run"]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    nodes.sort(key=lambda event: event["ts"])
    return [[(e["args"]["op_name"], e["dur"] / 1000) for e in nodes if start <= e["ts"] <= end] for start, end in runs]
