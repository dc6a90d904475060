"""Data sets in files: both CamVid layouts, own folders, and every kind of bad file named before training starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import call_script
from PIL import Image

from aicsd_deploy.data.check import check_dataset, write_overlays
from aicsd_deploy.data.dataset import CachedDataset
from aicsd_deploy.data.folder import read_classes
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.errors import InputError


def save_mask(path: Path, labels: np.ndarray, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(labels.astype(np.uint8))
    if mode == "P":
        picture.putpalette([10, 20, 30] * 256)
    picture.save(path)


def test_public_camvid_layout(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.uint8).repeat(4).reshape(6, 8)
    for split in ("train", "val", "test"):
        save_mask(tmp_path / f"{split}annot" / "0001TP.png", labels)
        (tmp_path / split).mkdir()
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / split / "0001TP.png")
    dataset = open_dataset(f"camvid:{tmp_path}", "test")
    _, loaded = dataset.load(0)
    assert len(dataset.classes) == 11
    assert loaded[labels == 11].tolist() == [255] * 4
    assert (loaded[labels != 11] == labels[labels != 11]).all()


def test_camvid_as_given(shared: Path) -> None:
    for split, count in (("train", 367), ("val", 101)):
        dataset = open_dataset(f"camvid:{shared / 'data/camvid'}", split)
        assert len(dataset) == count
        image, labels = dataset.load(0)
        assert image.shape == (360, 480, 3)
        assert set(np.unique(labels)) <= {*range(11), 255}


def test_folder_indices_with_gaps_palette_masks_and_a_void_class(tmp_path: Path) -> None:
    labels = np.array([[7, 26, 3], [7, 255, 3]], np.uint8)
    save_mask(tmp_path / "val/labels/a.png", labels, mode="P")
    (tmp_path / "val/images").mkdir()
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(tmp_path / "val/images/a.jpg")
    (tmp_path / "classes.txt").write_text(
        "# ids as Cityscapes has them\n7 road 128 64 128\n26 big car 0 0 142\n3 void 0 0 0\n"
    )
    dataset = open_dataset(f"folder:{tmp_path}", "val")
    assert [c.name for c in dataset.classes] == ["road", "big car"]
    assert dataset.load(0)[1].tolist() == [[0, 1, 255], [0, 255, 255]]


def test_split_lists_choose_and_order(folder_data: Path) -> None:
    (folder_data / "val.txt").write_text("002\n000.png\n")
    dataset = open_dataset(f"folder:{folder_data}", "val")
    assert [dataset.name(i) for i in range(len(dataset))] == ["002", "000"]
    (folder_data / "val.txt").write_text("002\nnothere\n")
    with pytest.raises(InputError, match="nothere"):
        open_dataset(f"folder:{folder_data}", "val")


def test_report_counts_pixels_and_images(folder_data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(f"folder:{folder_data}", "val")
    report = check_dataset(dataset)
    everything = np.stack([dataset.load(i)[1] for i in range(len(dataset))])
    assert report.pixels.tolist() == [(everything == v).sum() for v in (0, 1, 2, 255)]
    assert report.images_with[3] == len(dataset)
    assert report.sizes_hw == {(48, 64): 4}
    assert "blue" in report.to_text()
    for path in write_overlays(dataset, tmp_path / "overlays", count=2):
        assert Image.open(path).size == (128, 48)


def break_size(root: Path) -> str:
    save_mask(root / "train/labels/003.png", np.zeros((10, 10), np.uint8))
    return "003.png is 10x10"


def break_value(root: Path) -> str:
    path = root / "train/labels/004.png"
    labels = np.asarray(Image.open(path)).copy()
    labels[3, 3:9] = 77
    save_mask(path, labels)
    return "004.png holds label value 77"


def break_label_picture(root: Path) -> str:
    path = root / "train/labels/005.png"
    path.write_text("this is text")
    return "005.png"


def break_image_cut_off(root: Path) -> str:
    path = root / "train/images/006.png"
    path.write_bytes(path.read_bytes()[:200])
    return "006.png"


def break_color_mask(root: Path) -> str:
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(root / "train/labels/007.png")
    return "colours that no class has, (0, 0, 0)"


def break_missing_label(root: Path) -> str:
    (root / "train/labels/008.png").unlink()
    return "no label file for the image 008.png"


def break_empty_folder(root: Path) -> str:
    shutil.rmtree(root / "train/images")
    (root / "train/images").mkdir()
    return "holds no pictures"


def break_no_folder(root: Path) -> str:
    shutil.rmtree(root / "val")
    return "does not exist"


def break_class_list(root: Path) -> str:
    (root / "classes.txt").write_text("0 red 200 60\n")
    return "line 1"


def break_everything_ignored(root: Path) -> str:
    for path in (root / "train/labels").iterdir():
        save_mask(path, np.full((48, 64), 255, np.uint8))
    return "all are ignored"


@pytest.mark.parametrize(
    "damage",
    [
        break_size,
        break_value,
        break_label_picture,
        break_image_cut_off,
        break_color_mask,
        break_missing_label,
        break_empty_folder,
        break_no_folder,
        break_class_list,
        break_everything_ignored,
    ],
)
def test_bad_data_is_named_before_training(damage: object, folder_data: Path, tmp_path: Path) -> None:
    expected = damage(folder_data)  # type: ignore[operator]
    result = call_script("train/teacher.py", "--data", f"folder:{folder_data}", "--out", "run", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_check_data_prints_and_writes_overlays(folder_data: Path, tmp_path: Path) -> None:
    result = call_script(
        "train/teacher.py", "--data", f"folder:{folder_data}", "--check-data", "--out", "look", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "12 images" in result.stderr
    assert "green" in result.stderr
    assert len(list((tmp_path / "look").glob("*.png"))) == 10


@pytest.mark.parametrize("spec", ["nosuch", "camvid:", "camvid:/no/such/folder", "folder", ""])
def test_wrong_specs_are_refused(spec: str) -> None:
    with pytest.raises(InputError):
        open_dataset(spec, "val")


def test_cache_loads_each_image_once_and_stops_at_its_limit(folder_data: Path) -> None:
    inner = open_dataset(f"folder:{folder_data}", "train")
    loads: list[int] = []
    original = inner.load
    inner.load = lambda index: (loads.append(index), original(index))[1]  # type: ignore[method-assign, func-returns-value]
    one = 48 * 64 * 4
    cached = CachedDataset(inner, limit_bytes=2 * one + 10)
    for _ in range(2):
        for index in range(3):
            assert (cached.load(index)[1] == original(index)[1]).all()
    assert loads == [0, 1, 2, 2]


def test_classes_file_is_read_with_names_of_several_words(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n1 traffic light 250 170 30\n0 road 1 2 3\n")
    classes, values, colors = read_classes(tmp_path / "classes.txt")
    assert [(c.name, c.color_rgb) for c in classes] == [("road", (1, 2, 3)), ("traffic light", (250, 170, 30))]
    assert values == {0: 0, 1: 1}
    assert colors == {(1, 2, 3): 0, (250, 170, 30): 1}
