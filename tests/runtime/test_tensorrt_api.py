"""Every TensorRT name that the code uses exists in the real bindings of 10.3, 10.16 and 11.4, and of TensorRT-RTX.

The bindings install without TensorRT's libraries, which need a driver; empty ones stand in, since nothing is called.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

VARIABLES = {
    "export/tensorrt_build.py": {
        "builder": "Builder",
        "config": "IBuilderConfig",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "profile": "IOptimizationProfile",
        "layer": "ILayer",
        "convolution": "IConvolutionLayer",
        "tensor": "ITensor",
        "error": "ParserError",
    },
    "runtime/trt_backend.py": {"engine": "ICudaEngine", "_context": "IExecutionContext", "runtime": "Runtime"},
    "runtime/tensorrt_module.py": {},
}
"""What the variables of these modules hold."""
RTX_ONLY = {"ComputeCapability", "REQUIRE_USER_ALLOCATION", "is_stream_capturable", "DynamicShapesKernelSpecializationStrategy", "num_compute_capabilities", "set_compute_capability", "create_runtime_config"}  # fmt: skip
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
STAND_IN = """
#define EMPTY(name) void* name(void) { return 0; }
EMPTY(createInferBuilder_INTERNAL) EMPTY(createInferRefitter_INTERNAL) EMPTY(createInferRuntime_INTERNAL)
EMPTY(createNvOnnxParserRefitter_INTERNAL) EMPTY(createNvOnnxParser_INTERNAL) EMPTY(getBuilderPluginRegistry)
EMPTY(getNvOnnxParserVersion) EMPTY(getPluginRegistry) EMPTY(initLibNvInferPlugins)
"""
LOOK_UP = """
import functools, importlib, json, sys
sys.path.insert(0, sys.argv[2])
trt = importlib.import_module(sys.argv[1])
def missing(chain):
    try:
        functools.reduce(getattr, chain, trt)
    except AttributeError:
        return True
print(json.dumps([chain for chain in json.load(sys.stdin) if missing(chain)]))
"""


def used_names() -> list[list[str]]:
    """Return chains such as ["IBuilderConfig", "set_flag"] and ["LayerType", "CONSTANT"], read from the source."""
    found: set[tuple[str, ...]] = set()
    for module, variables in VARIABLES.items():
        for node in ast.walk(ast.parse((REPO / "aicsd_deploy" / module).read_text())):
            chain: list[str] = []
            while isinstance(node, ast.Attribute):
                chain.insert(0, node.attr)
                node = node.value
            base = node.id if isinstance(node, ast.Name) else ""
            if base == "self" and chain and chain[0] in variables:
                base, chain = chain[0], chain[1:]
            if chain and base == "trt":
                # An enum's member is a chain of two; what follows it is no concern of the bindings.
                found.add(tuple(chain[:2]))
            elif chain and base in variables:
                found.add((variables[base], chain[0]))
    return [list(chain) for chain in sorted(found) if not chain[-1].startswith("__")]


def missing_in(module: str, folder: Path, chains: list[list[str]], libraries: Path | None = None) -> list[list[str]]:
    result = subprocess.run(
        [sys.executable, "-c", LOOK_UP, module, str(folder)],
        input=json.dumps(chains),
        env={"LD_LIBRARY_PATH": str(libraries or "")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [list(chain) for chain in json.loads(result.stdout)]


def test_the_names_are_found_in_the_source() -> None:
    names = used_names()
    assert ["IBuilderConfig", "progress_monitor"] in names
    assert ["IExecutionContext", "execute_async_v3"] in names
    assert ["NetworkDefinitionCreationFlag", "STRONGLY_TYPED"] in names
    assert ["ICudaEngine", "get_tensor_mode"] in names
    assert len(names) > 60


def test_tensorrt_rtx_has_every_name() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert missing_in("tensorrt_rtx", Path(), used_names()) == []


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("tensorrt-cu12-bindings", "10.3.0"),
        ("tensorrt-cu13-bindings", "10.16.1.11"),
        ("tensorrt-cu13-bindings", "11.4.0.106"),
    ],
)
def test_tensorrt_has_every_name(package: str, version: str, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to make stand-ins for TensorRT's libraries")
    bindings, libraries = tmp_path / "bindings", tmp_path / "libraries"
    libraries.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(bindings)]
    done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"the bindings of TensorRT {version} cannot be had here: {done.stderr[-200:]}")
    (tmp_path / "empty.c").write_text(STAND_IN)
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        compile_it = ["gcc", "-shared", "-fPIC", "-o", libraries / name, f"-Wl,-soname,{name}", tmp_path / "empty.c"]
        subprocess.run([str(part) for part in compile_it], check=True)
    chains = [chain for chain in used_names() if RTX_ONLY.isdisjoint(chain)]
    assert missing_in("tensorrt_bindings.tensorrt", bindings, chains, libraries) == []
    # The look-up does notice what is not there.
    assert missing_in("tensorrt_bindings.tensorrt", bindings, [["Builder", "build_engine"]], libraries) != []
