"""Files appear whole or not at all, and metadata survives its trip through a file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from aicsd_deploy.errors import InputError
from aicsd_deploy.files import atomic_path, write_json
from aicsd_deploy.metadata import Metadata, SegClass


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"old": 1})

    def fail() -> None:
        with atomic_path(path) as temporary:
            assert temporary.suffix == ".json"
            temporary.write_text("half of it")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_a_folder_in_the_way_and_a_file_for_a_folder_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder"), atomic_path(tmp_path):
        pass
    with pytest.raises(InputError, match=r"Cannot write .*file is a file"), atomic_path(tmp_path / "file" / "x.json"):
        pass


def test_a_name_may_be_as_long_as_the_system_takes_it(tmp_path: Path) -> None:
    name = f"{'ü' * 125}.json"
    write_json(tmp_path / name, {})
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises((InputError, OSError), match="too long"):
        write_json(tmp_path / f"{name}.json", {})


def test_an_error_leaves_no_folder_that_was_made_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()

    def fail() -> None:
        with atomic_path(tmp_path / "old" / "new" / "deep" / "file.json"):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    (tmp_path / "new").mkdir()
    write_json(tmp_path / "new" / "deep" / "file.json", {})
    assert (tmp_path / "new" / "deep" / "file.json").exists()


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, encoding: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"):
        write_json(tmp_path / "x.json", {})
    assert list(tmp_path.iterdir()) == []


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"miou": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_metadata_survives_json() -> None:
    metadata = Metadata(
        "net", (SegClass("a", (1, 2, 3)), SegClass("b", (4, 5, 6))), (48, 64), dynamic=("batch",), scores={"miou": 0.5}
    )
    assert Metadata.from_json(json.dumps(metadata.to_dict()), origin="x") == metadata


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"image_size_hw": [0, 3]},
        {"channel_order": "gbr"},
        {"mean": [1, 2]},
        {"schema_version": 99},
        {"scores": 3},
    ],
)
def test_wrong_metadata_is_refused(change: dict[str, object]) -> None:
    value = Metadata("net", (SegClass("a", (1, 2, 3)),), (48, 64)).to_dict() | change
    with pytest.raises(InputError, match=r"x\.onnx"):
        Metadata.from_dict(value, origin="x.onnx")
    with pytest.raises(InputError, match=r"x\.onnx"):
        Metadata.from_json("[1", origin="x.onnx")
