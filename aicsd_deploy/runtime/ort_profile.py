"""Where ONNX Runtime spends a frame's time, read off its own profiler."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aicsd_deploy.runtime.base import UInt8Array

_HEAVY = re.compile("Conv(?!ert)|MatMul|Gemm|FullyConnected")
"""Operators with one of these in their name are the network; what runs before or after all of them is not."""
_COPIES = {"MemcpyFromHost": "host_to_device", "MemcpyToHost": "device_to_host"}


def profile(
    path: Path, options: Any, providers: Sequence[Any], disabled: Sequence[str], batches_NHWC: Sequence[UInt8Array]
) -> list[list[Any]]:
    """Run a file with the profiler on; profiling slows it, so it gets a session of its own.

    Args:
        path: the .onnx file.
        options: the `SessionOptions` to run it with; profiling is switched on in them for this call.
        providers, disabled: providers and disabled optimizers, as `InferenceSession` takes them.
        batches_NHWC: uint8 (N, H, W, 3) each; the first is a warm-up and is left out.

    Returns:
        for each batch the operators in the order they ran, as (operator type, node name, milliseconds).
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
    return [
        [(e["args"]["op_name"], e["name"], e["dur"] / 1000) for e in nodes if start <= e["ts"] <= end]
        for start, end in runs[1:]
    ]


def stages(operators: Sequence[Any]) -> dict[str, float]:
    """Add one run's operators up to the stages of `Backend.time_stages`, in milliseconds."""
    heavy = [i for i, (kind, _, _) in enumerate(operators) if _HEAVY.search(kind)]
    if not heavy:
        return {}
    times: dict[str, float] = {"preprocessing": 0.0, "network": 0.0, "postprocessing": 0.0}
    for i, (kind, _, milliseconds) in enumerate(operators):
        inside = "network" if i <= heavy[-1] else "postprocessing"
        stage = _COPIES.get(kind, "preprocessing" if i < heavy[0] else inside)
        times[stage] = times.get(stage, 0.0) + milliseconds
    return times
