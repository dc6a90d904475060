"""What may import what, and what the runtime runs without."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

from aicsd_deploy.cli import SCRIPTS

PACKAGE = REPO / "aicsd_deploy"
TORCH_FREE = ("errors", "files", "metadata", "memory", "cli", "console", "runs", "metrics", "runtime.base", "runtime.frames", "runtime.ort_backend", "runtime.openvino_backend", "runtime.trt_backend", "video", "bench", "data.synthetic", "data.spec", "data.check", "evaluate", "export.verify")  # fmt: skip
TRAINING_PACKAGES = ("torch", "torchvision", "pydantic", "yaml", "rich", "onnx", "onnxscript", "matplotlib", "tensorboard", "timm", "segmentation_models_pytorch")  # fmt: skip
# A layer may import those before it, not those after it. What stands together in a line may know each other.
LAYERS = (
    ("errors",),
    ("files", "metadata", "memory"),
    ("console", "cli", "runs"),
    ("runtime.driver", "runtime.tensorrt_module", "runtime.engine_card", "runtime.device_memory"),
    (
        "runtime.base",
        "runtime.frames",
        "runtime.operators",
        "runtime.ort_profile",
        "runtime.ort_backend",
        "runtime.openvino_backend",
        "runtime.trt_backend",
    ),
    (
        "config",
        "models",
        "losses",
        "metrics",
        "data.dataset",
        "data.folder",
        "data.camvid",
        "data.voc",
        "data.cityscapes",
        "data.spec",
        "data.synthetic",
        "class_map",
    ),
    ("data.transforms", "data.loader", "video"),
    ("checkpoint", "data.check", "training.distributed", "training.timing"),
    ("teachers",),
    ("features", "distiller"),
    ("runtime.torch_backend", "export.tensorrt_build", "export.precision", "export.ranges", "export.engine_checks"),
    (
        "evaluate",
        "protocol",
        "export.verify",
        "export.onnx_export",
        "export.cpu_graph",
        "export.quantize",
        "export.int8_search",
        "export.gate",
        "export.engine",
        "tracking",
    ),
    ("training", "bench"),
    ("trainer",),
    ("recipes",),
    ("study",),
)


def layer_of(module: str) -> int:
    for number, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in layer):
            return number
    raise AssertionError(f"{module} stands in no layer; say in tests/test_architecture.py where it belongs")


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, but for those inside functions, which serve to load late."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aicsd_deploy."):
            found.add((node.module or "").removeprefix("aicsd_deploy."))
    return found


def test_imports_run_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__" or path.read_text().strip() == "":
            continue
        for imported in imports_of(path):
            same = imported.split(".")[0] == module.split(".")[0]
            if not same and layer_of(imported) > layer_of(module):
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_losses_know_only_torch() -> None:
    for path in (PACKAGE / "losses").glob("*.py"):
        assert all(name.startswith("losses.") for name in imports_of(path)), path


def test_the_trainer_knows_no_method() -> None:
    text = (PACKAGE / "trainer.py").read_text().split('"""', 2)[2].lower()
    assert "aicsd_deploy.losses" not in text
    assert "teacher." not in text


def test_no_module_bears_the_name_of_a_library() -> None:
    names = {path.stem for folder in ("train", "export", "demo") for path in (REPO / folder).glob("*.py")}
    assert not names & {"onnx", "json", "torch", "tensorrt", "numpy", "av", "cv2"}


def blocked_program(body: str, packages: tuple[str, ...] = TRAINING_PACKAGES) -> str:
    """A program in which the training packages cannot be imported, as on a device that does not have them."""
    return f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
{body}
"""


@pytest.mark.parametrize("module", TORCH_FREE)
def test_runtime_and_video_import_without_training_packages(module: str) -> None:
    path = PACKAGE.joinpath(*module.split("."))
    modules = [f"{module}.{p.stem}" for p in path.glob("[a-z]*.py")] if path.is_dir() else [module]
    body = "\n".join(f"import aicsd_deploy.{m}" for m in modules)
    result = subprocess.run([sys.executable, "-c", blocked_program(body)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_video_is_segmented_without_training_packages(trained: Path, tmp_path: Path) -> None:
    script = REPO / "demo/video.py"
    out = tmp_path / "out.mp4"
    body = (
        f"sys.argv = [{str(script)!r}, '--engine', 'runs/student/student.onnx', '--source', 'synthetic', "
        f"'--max-frames', '5', '-o', {str(out)!r}]\n"
        f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", blocked_program(body)],
        cwd=trained,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert out.stat().st_size > 1000


def test_scripts_are_short() -> None:
    for folder in ("train", "export", "demo"):
        for path in (REPO / folder).glob("*.py"):
            lines = path.read_text().count("\n")
            assert lines <= 120, (
                f"{path.relative_to(REPO)} has {lines} lines; a script is parse, build, one call, one table"
            )


@pytest.mark.parametrize("start", [["aicsd", "distill"], *([str(REPO / path)] for path, _ in SCRIPTS.values())])
def test_every_command_says_which_package_is_missing(start: list[str], tmp_path: Path) -> None:
    run_it = (
        "from aicsd_deploy.cli import main; main()"
        if start[0] == "aicsd"
        else "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    body = f"sys.argv = {start!r}\n{run_it}"
    command = [sys.executable, "-c", blocked_program(body, (*TRAINING_PACKAGES, "cv2"))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "not installed" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script", [path for path, _ in SCRIPTS.values() if path != "demo/quickstart.py"])
def test_flags_are_read_before_torch_is_imported(script: str, tmp_path: Path) -> None:
    """Importing it takes seconds, which nobody should wait for to read --help or that a flag is wrong."""
    body = (
        f"import runpy; sys.argv = [{script!r}, '--help']; runpy.run_path({str(REPO / script)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", blocked_program(body, ("torch", "torchvision"))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--json" in result.stdout


@pytest.mark.parametrize("script", [path for path, _ in SCRIPTS.values()])
def test_a_python_without_any_package_is_told_what_to_install(script: str, tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", str(REPO / script)]  # -S: nothing that was installed, not even this package
    result = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "pip install" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    command = [sys.executable, str(REPO / "train/evaluate.py")]
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "libGL.so.1" in result.stderr
    assert "Traceback" not in result.stderr
