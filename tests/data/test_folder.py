"""Data sets in files: both CamVid layouts, own folders, and every kind of bad file named before training starts."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import cv2
import numpy as np
import pytest
from helpers import NETWORK, TINY, call_script, write_folder_dataset
from PIL import Image

from aicsd_deploy.data.check import check_dataset, write_overlays
from aicsd_deploy.data.dataset import CachedDataset, read_image, read_mask
from aicsd_deploy.data.folder import read_classes, read_stems
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


@pytest.mark.parametrize("name", ["two\ttabs", "two\nlines"])
def test_a_folder_whose_name_no_checkpoint_may_carry_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(write_folder_dataset(tmp_path / "good"), tmp_path / name)
    open_dataset(f"folder:{tmp_path / 'good'}", "val")
    with pytest.raises(InputError, match=r"control characters.* Rename the folder"):
        open_dataset(f"folder:{tmp_path / name}", "val")


def test_camvid_in_its_original_colours(tmp_path: Path) -> None:
    """The 32 classes of label_colors.txt become the 11 of the SegNet split."""
    groups = {
        "sky": [(128, 128, 128)],
        "building": [(128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)],
        "pole": [(192, 192, 128), (0, 0, 64)],
        "road": [(128, 64, 128), (128, 0, 192), (192, 0, 64)],
        "pavement": [(0, 0, 192), (64, 192, 128), (128, 128, 192)],
        "tree": [(128, 128, 0), (192, 192, 0)],
        "signsymbol": [(192, 128, 128), (128, 128, 64), (0, 64, 64)],
        "fence": [(64, 64, 128)],
        "car": [(64, 0, 128), (128, 64, 64), (64, 128, 192), (192, 64, 128), (192, 128, 192)],
        "pedestrian": [(64, 64, 0), (64, 128, 64), (64, 0, 192), (192, 128, 64)],
        "bicyclist": [(0, 128, 192), (192, 0, 192)],
        "void": [(0, 0, 0)],
    }
    colors = [color for group in groups.values() for color in group]
    assert len(set(colors)) == 32
    for folder in ("train", "train_labels"):
        (tmp_path / folder).mkdir()
    picture = Image.fromarray(np.array(colors, np.uint8).reshape(4, 8, 3))
    picture.save(tmp_path / "train/0001TP_006690.png")
    picture.save(tmp_path / "train_labels/0001TP_006690_L.png")
    dataset = open_dataset(f"camvid:{tmp_path}", "train")
    names = [*(c.name for c in dataset.classes), *["void"] * 245]
    assert [names[i] for i in dataset.load(0)[1].ravel()] == [name for name, group in groups.items() for _ in group]
    Image.new("RGB", (8, 4), (1, 2, 3)).save(tmp_path / "train_labels/0001TP_006690_L.png")
    with pytest.raises(InputError, match=r"1 colour that no class has, such as \(1, 2, 3\)"):
        dataset.load(0)


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
        "# ids as Cityscapes has them\n7 road 128 64 128\n26 big car 0 0 142\n3 Void 0 0 0\n"
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
    assert "train id" in report.to_text(), "which the masks' values need not be"
    names = ("red", "green", "blue", "ignored")
    assert report.to_dict() == {
        "data": f"folder:{folder_data}",
        "split": "val",
        "images": 4,
        "sizes_hw": {"48x64": 4},
        "pixels": {name: (everything == v).sum() for name, v in zip(names, (0, 1, 2, 255), strict=True)},
        "images_with": dict(zip(names, report.images_with, strict=True)),
    }
    for path in write_overlays(dataset, tmp_path / "overlays", count=2):
        assert Image.open(path).size == (128, 48)


@pytest.mark.parametrize("size_hw", [(10, 64), (48, 10)])
def test_a_mask_of_another_height_or_width_than_its_image_is_refused(
    size_hw: tuple[int, int], folder_data: Path
) -> None:
    save_mask(folder_data / "train/labels/003.png", np.zeros(size_hw, np.uint8))
    with pytest.raises(InputError, match=rf"003\.png is {size_hw[0]}x{size_hw[1]} \(HxW\) but its image .* is 48x64"):
        open_dataset(f"folder:{folder_data}", "train").load(3)


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
    Image.new("RGB", (64, 48), (1, 2, 3)).save(root / "train/labels/007.png")
    return "1 colour that no class has, such as (1, 2, 3)"


def break_three_equal_channels(root: Path) -> str:
    path = root / "train/labels/007.png"
    Image.open(path).convert("RGB").save(path)
    return "three channels that are all the same, such as (0, 0, 0), which is no class's colour. If its values are the class indices"


def break_missing_label(root: Path) -> str:
    (root / "train/labels/008.png").unlink()
    return "1 of the 12 images"


def break_list(root: Path) -> str:
    (root / "train.txt").write_text("001\n002\n901\n902\n")
    return "lacks 2 of the 4 images that the split's list names, '901'"


def break_no_class_list(root: Path) -> str:
    (root / "classes.txt").unlink()
    return "Write a line for each class"


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


def break_class_names(root: Path) -> str:
    (root / "classes.txt").write_text("0 red 200 60 40\n1 red 40 160 60\n2 blue 50 70 190\n")
    return "2 classes named 'red'"


def break_class_colors(root: Path) -> str:
    (root / "classes.txt").write_text("0 red 200 60 40\n1 green 200 60 40\n2 blue 50 70 190\n")
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(root / "train/labels/007.png")
    return "classes.txt gives the colour (200, 60, 40) to two classes"


def break_one_stem_twice(root: Path) -> str:
    Image.new("RGB", (64, 48)).save(root / "train/images/003.webp")
    return "holds both 003.png and 003.webp"


def break_jpeg_mask(root: Path) -> str:
    path = root / "train/labels/003.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    return "003.jpg is a JPEG"


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
        break_three_equal_channels,
        break_missing_label,
        break_list,
        break_no_class_list,
        break_empty_folder,
        break_no_folder,
        break_class_list,
        break_class_names,
        break_class_colors,
        break_one_stem_twice,
        break_jpeg_mask,
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
        "train/teacher.py",
        "--data",
        f"folder:{folder_data}",
        "--check-data",
        "--out",
        "look",
        "--json",
        "data.json",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "12 images" in result.stderr
    written = json.loads((tmp_path / "data.json").read_text())
    assert {split: report["images"] for split, report in written.items()} == {"train": 12, "val": 4}
    assert "green" in result.stderr
    assert len(list((tmp_path / "look").glob("*.png"))) == 10


def test_check_data_without_a_folder_leaves_none(folder_data: Path, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    result = call_script("train/teacher.py", "--data", f"folder:{folder_data}", "--check-data", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "green" in result.stderr
    assert set(tmp_path.rglob("*")) == before


def test_advice_that_holds_for_several_files_is_given_once(folder_data: Path) -> None:
    for name in ("001", "002", "003"):
        Image.new("L", (64, 48), int(name) + 6).save(folder_data / f"train/labels/{name}.png")
    (folder_data / "train/labels/004.png").write_text("no picture")
    with pytest.raises(InputError) as caught:
        check_dataset(open_dataset(f"folder:{folder_data}", "train"))
    text = str(caught.value)
    assert all(f"{name}.png" in text for name in ("001", "002", "003", "004"))
    assert all(f"label value {value}," in text for value in (7, 8, 9))
    assert text.count("Correct the mask") == 1
    assert text.index("003.png") < text.index("Correct the mask") < text.index("004.png")


def test_the_message_about_one_file_stays_whole(folder_data: Path) -> None:
    root = folder_data.rename(folder_data.with_name("St. Louis"))
    path = root / "train/labels/004.png"
    path.write_text("no picture")
    with pytest.raises(InputError, match=f"{path} .* Copy or make it anew"):
        check_dataset(open_dataset(f"folder:{root}", "train"))


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


def test_an_image_that_two_threads_load_at_once_counts_once_in_the_cache(folder_data: Path) -> None:
    inner = open_dataset(f"folder:{folder_data}", "train")
    original, both = inner.load, Barrier(2, timeout=20)
    inner.load = lambda index: (both.wait(), original(index))[1]  # type: ignore[method-assign]
    cached = CachedDataset(inner)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(cached.load, [0, 0]))
    assert cached.kept_bytes == sum(array.nbytes for array in original(0))


def test_classes_file_is_read_with_names_of_several_words(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n1 traffic light 250 170 30\n0 road 1 2 3\n")
    classes, values, colors = read_classes(tmp_path / "classes.txt")
    assert [(c.name, c.color_rgb) for c in classes] == [("road", (1, 2, 3)), ("traffic light", (250, 170, 30))]
    assert values == {0: 0, 1: 1}
    assert colors == {(1, 2, 3): 0, (250, 170, 30): 1}


@pytest.mark.parametrize(
    "line", ["0 sky 7 8 9", "256 sky 7 8 9", "-1 sky 7 8 9", "1 sky 7 8 256", "1 sky 7 8", "1 7 8 9"]
)
def test_a_wrong_line_of_the_class_list_is_told_by_its_number(line: str, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text(f"0 road 1 2 3\n{line}\n2 tree 4 5 6\n")
    with pytest.raises(InputError, match=r"line 2: .* is not `index name R G B` with an index used once"):
        read_classes(tmp_path / "classes.txt")


def test_a_class_that_255_would_ignore_is_refused(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("0 ground 0 0 0\n1 sky 0 0 9\n255 person 255 255 255\n")
    with pytest.raises(InputError, match="gives the value 255 to the class 'person', but pixels of 255 are ignored"):
        read_classes(tmp_path / "classes.txt")


def test_training_images_of_one_class_are_refused(folder_data: Path) -> None:
    """Masks of 0 and 255, as many programs write two classes, would train on the background alone."""
    for split in ("train", "val"):
        for path in (folder_data / split / "labels").iterdir():
            Image.fromarray(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(InputError, match=r"(?s)are 'red'.*write 1 in the place of 255"):
        check_dataset(open_dataset(f"folder:{folder_data}", "train"))
    assert check_dataset(open_dataset(f"folder:{folder_data}", "val")).pixels[1] == 0


def test_masks_without_an_image_are_said(folder_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their images may have been lost, or have a format that is not read."""
    (folder_data / "train/images/000.png").rename(folder_data / "train/images/000.gif")
    open_dataset(f"folder:{folder_data}", "train")
    assert "1 of the masks" in capsys.readouterr().err
    (folder_data / "train.txt").write_text("001\n")
    open_dataset(f"folder:{folder_data}", "train")
    assert not capsys.readouterr().err


def test_a_training_says_once_what_is_odd_in_the_data(folder_data: Path) -> None:
    (folder_data / "train/images/000.png").rename(folder_data / "train/images/000.gif")
    (folder_data.parent / "tiny_network.py").write_text(NETWORK)
    arguments = [*TINY, "--model", "tiny_network:tiny", "--epochs", 1, "--out", "run"]
    result = call_script("train/teacher.py", *arguments, cwd=folder_data.parent)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("1 of the masks") == 1


def test_files_that_macos_leaves_beside_others_are_passed_over(folder_data: Path) -> None:
    for kind in ("images", "labels"):
        (folder_data / "train" / kind / "._000.png").write_bytes(b"\0\5\x16\7")
    count = len(list((folder_data / "train/images").glob("[!.]*")))
    assert len(open_dataset(f"folder:{folder_data}", "train")) == count


def test_masks_of_any_whole_numbers_and_no_others(tmp_path: Path) -> None:
    values = np.arange(6).reshape(2, 3)
    path = tmp_path / "a.tif"
    Image.frombytes("I;16B", (3, 2), values.astype(">u2").tobytes()).save(path)
    assert (read_mask(path) == values).all()
    for beyond in (-1, 256):
        Image.fromarray(np.where(values == 0, beyond, values).astype(np.int32)).save(path)
        with pytest.raises(InputError, match="they must lie in 0 to 255"):
            read_mask(path)
    Image.fromarray(values.astype(np.float32)).save(path)
    with pytest.raises(InputError, match=r"mode F\. Labels must be index masks"):
        read_mask(path)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greys_of_a_few_bits_are_the_values_of_the_mask(bits: int, tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.uint8).reshape(2, 8) % 2**bits
    rows = np.packbits(np.unpackbits(values[..., None], axis=2)[..., -bits:].reshape(2, -1), axis=1)
    head = struct.pack(">IIBBBBB", 8, 2, bits, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert (read_mask(tmp_path / "a.png") == values).all()


def test_a_mask_in_the_jpeg_format_of_phones_is_refused(tmp_path: Path) -> None:
    """MPO, which holds a JPEG and its preview in a file that is named .jpg."""
    picture = Image.new("L", (6, 4))
    picture.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture])
    with pytest.raises(InputError, match=r"a\.jpg is a JPEG"):
        read_mask(tmp_path / "a.jpg")


def test_a_mark_at_the_start_of_a_text_file_is_no_part_of_it(folder_data: Path) -> None:
    for name, text in (("classes.txt", (folder_data / "classes.txt").read_text()), ("val.txt", "002\n")):
        (folder_data / name).write_text(text, encoding="utf-8-sig")
    assert [c.name for c in read_classes(folder_data / "classes.txt")[0]] == ["red", "green", "blue"]
    assert read_stems(folder_data / "val.txt") == ["002"]


def test_a_text_file_in_another_encoding_is_refused(folder_data: Path) -> None:
    for encoding in ("latin-1", "utf-16"):
        (folder_data / "classes.txt").write_text("0 Straße 9 9 9\n1 Baum 0 9 0\n", encoding=encoding)
        with pytest.raises(InputError, match=r"classes\.txt is no text in UTF-8.*Save it as UTF-8"):
            read_classes(folder_data / "classes.txt")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_pictures_that_their_exif_tag_turns_are_refused(suffix: str, tmp_path: Path) -> None:
    """Labels may be drawn on the stored or on the shown picture."""
    path, exif = tmp_path / f"a{suffix}", Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        Image.new("RGB", (6, 4)).save(path, exif=exif)
        if orientation == 1:
            assert read_image(path).shape == (4, 6, 3)
    with pytest.raises(InputError, match=r"turned by its EXIF tag \(orientation 6\)"):
        read_image(path)
    if suffix == ".jpg":
        assert read_image(path, as_stored=True).shape == (4, 6, 3)
    else:
        Image.new("L", (6, 4)).save(path, exif=exif)
        with pytest.raises(InputError, match="turned by its EXIF tag"):
            read_mask(path)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*"])
def test_damaged_exif_is_passed_over(exif: bytes, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == (4, 6, 3)


@pytest.mark.parametrize("name", ["a.png", "packed.tif", "plain.tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_colour_of_16_bits_is_refused(name: str, channels: int, tmp_path: Path) -> None:
    """Pillow would keep the upper half, which is nearly black in pictures of 12 bits."""
    picture = np.full((4, 6, channels), 4000, np.uint16)
    how = [cv2.IMWRITE_TIFF_COMPRESSION, 1 if name == "plain.tif" else 5] if name.endswith("tif") else []
    for dtype, path in ((np.uint8, tmp_path / f"8_{name}"), (np.uint16, tmp_path / name)):
        cv2.imwrite(str(path), picture.astype(dtype), how)
    assert read_image(tmp_path / f"8_{name}").shape == (4, 6, 3)
    with pytest.raises(InputError, match="more than 8 bits a channel"):
        read_image(tmp_path / name)
