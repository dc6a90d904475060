"""Data sets in their official layout and label coding, and what contradicts itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import COLORS, NETWORK_WITH_BACKBONE, call_script
from PIL import Image
from scipy.io import savemat

from aicsd_deploy.data.check import write_overlays
from aicsd_deploy.data.cityscapes import CITYSCAPES_CLASSES, TRAIN_IDS
from aicsd_deploy.data.dataset import Subset
from aicsd_deploy.data.spec import open_dataset
from aicsd_deploy.data.voc import VOC_CLASSES
from aicsd_deploy.errors import InputError

TRAIN_ID_ORDER = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def picture(seed: int, size_hw: tuple[int, int] = (40, 56)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def write_cityscapes(root: Path) -> Path:
    """Two cities for training, one for validation; masks hold every label id and the 255 of -1."""
    seed = 0
    for split, cities in (("train", ("aachen", "bochum")), ("val", ("lindau",))):
        for city in cities:
            for frame in range(2):
                stem = f"{city}_{frame:06d}_000019"
                images, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
                for folder in (images, labels):
                    folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(seed)).save(images / f"{stem}_leftImg8bit.png")
                ids = np.resize(np.array([*range(34), 255], np.uint8), (40, 56))
                Image.fromarray(ids).save(labels / f"{stem}_gtFine_labelIds.png")
                for other in ("instanceIds", "labelTrainIds", "color"):  # what else lies there is left alone
                    Image.fromarray(ids).save(labels / f"{stem}_gtFine_{other}.png")
                seed += 1
    return root


def write_voc(root: Path, *, train: int = 4, val: int = 2) -> Path:
    base = root / "VOCdevkit/VOC2012"
    palette = [v for c in VOC_CLASSES for v in c.color_rgb]
    stems = [f"2007_{i:06d}" for i in range(train + val)]
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    for i, stem in enumerate(stems):
        size = (40, 56) if i % 2 else (56, 40)
        Image.fromarray(picture(i, size)).save(base / "JPEGImages" / f"{stem}.jpg")
        values = np.full(size, i % 21, np.uint8)
        values[:20], values[20:22] = 15, 255
        mask = Image.fromarray(values, mode="P")
        mask.putpalette(palette + [0] * (765 - len(palette)) + [224, 224, 192])
        mask.save(base / "SegmentationClass" / f"{stem}.png")
    for name, chosen in (("train", stems[:train]), ("val", stems[train:]), ("trainval", stems)):
        (base / "ImageSets/Segmentation" / f"{name}.txt").write_text("\n".join(chosen) + "\n")
    return root


def write_sbd(root: Path, stems: list[str]) -> None:
    """SBD's own release: .mat files, and lists that overlap with VOC's."""
    base = root / "benchmark_RELEASE/dataset"
    (base / "cls").mkdir(parents=True)
    for stem in stems:
        values = np.zeros((40, 56), np.uint8)
        values[5:] = 7
        savemat(base / "cls" / f"{stem}.mat", {"GTcls": {"Segmentation": values, "Boundaries": 0}})
        jpg = root / "VOCdevkit/VOC2012/JPEGImages" / f"{stem}.jpg"
        if not jpg.exists():
            Image.fromarray(picture(99)).save(jpg)
    (base / "train.txt").write_text("\n".join(stems[:2]) + "\n")
    (base / "val.txt").write_text("\n".join(stems[2:]) + "\n")


def test_cityscapes_label_ids_become_train_ids(tmp_path: Path) -> None:
    dataset = open_dataset(f"cityscapes:{write_cityscapes(tmp_path)}", "train")
    assert len(dataset) == 4
    assert [dataset.name(i)[:6] for i in range(4)] == ["aachen", "aachen", "bochum", "bochum"]
    image, labels = dataset.load(0)
    assert (image == picture(0)).all()
    expected = [TRAIN_ID_ORDER.index(i) if i in TRAIN_ID_ORDER else 255 for i in [*range(34), 255]]
    assert labels.ravel()[:35].tolist() == expected
    assert sum(v != 255 for v in TRAIN_IDS.values()) == len(CITYSCAPES_CLASSES) == 19
    assert [c.name for c in CITYSCAPES_CLASSES[:3]] == ["road", "sidewalk", "building"]
    assert CITYSCAPES_CLASSES[-1].name == "bicycle"
    (tmp_path / "leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png").write_bytes(b"what macOS leaves")
    assert len(open_dataset(f"cityscapes:{tmp_path}", "train")) == 4


def test_cityscapes_without_a_mask_or_an_archive_is_said(tmp_path: Path) -> None:
    write_cityscapes(tmp_path)
    next((tmp_path / "gtFine/val/lindau").glob("*labelIds.png")).unlink()
    with pytest.raises(InputError, match=r"labelIds\.png does not exist"):
        open_dataset(f"cityscapes:{tmp_path}", "val")
    shutil.rmtree(tmp_path / "gtFine")
    with pytest.raises(InputError, match=r"gtFine_trainvaltest\.zip"):
        open_dataset(f"cityscapes:{tmp_path}", "train")


def test_voc_palette_masks(tmp_path: Path) -> None:
    dataset = open_dataset(f"voc:{write_voc(tmp_path)}", "train")
    assert len(dataset) == 4
    assert len(VOC_CLASSES) == 21
    image, labels = dataset.load(2)
    assert image.shape == (56, 40, 3)
    assert sorted(np.unique(labels)) == [2, 15, 255]
    assert (labels[20:22] == 255).all()
    assert len(open_dataset(f"voc:{tmp_path / 'VOCdevkit'}", "val")) == 2
    with pytest.raises(InputError, match="neither"):
        open_dataset(f"vocaug:{tmp_path}", "train")


def test_voc_has_the_colours_of_its_palette_and_its_classes_by_name() -> None:
    """The palette of VOC's development kit: the index's lowest three bits are the highest of red, green and blue, and so on."""

    def bit(number: int, place: int) -> int:
        return number >> place & 1

    for index, known in enumerate(VOC_CLASSES):
        color = tuple(sum(bit(index, 3 * n + channel) << 7 - n for n in range(8)) for channel in range(3))
        assert known.color_rgb == color, known.name
    names = [c.name for c in VOC_CLASSES]
    assert names == ["background", *sorted(names[1:])]


def test_a_voc_picture_with_a_turning_tag_is_taken_as_its_labels_are(tmp_path: Path) -> None:
    path = write_voc(tmp_path) / "VOCdevkit/VOC2012/JPEGImages/2007_000000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)
    image, labels = open_dataset(f"voc:{tmp_path}", "train").load(0)
    assert image.shape[:2] == labels.shape == (56, 40)


@pytest.mark.parametrize("line", ["/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png", "{0}.jpg {0}.png", "{0} {0}"])
def test_voc_lists_of_pairs_name_the_image_first(line: str, tmp_path: Path) -> None:
    listed = write_voc(tmp_path) / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    stems = listed.read_text().split()
    listed.write_text("".join(line.format(stem) + "\n" for stem in stems))
    dataset = open_dataset(f"voc:{tmp_path}", "train")
    assert [dataset.name(i) for i in range(len(dataset))] == stems
    assert dataset.load(0)[0].shape == (56, 40, 3)


def test_voc_lists_from_windows_and_with_an_image_twice(tmp_path: Path) -> None:
    listed = write_voc(tmp_path) / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    stems = listed.read_text().split()
    listed.write_bytes(b"\xef\xbb\xbf" + "".join(f"{stem}  \r\n" for stem in stems).encode() + b"\r\n")
    assert len(open_dataset(f"voc:{tmp_path}", "train")) == 4
    listed.write_text("\n".join([*stems, stems[0]]))
    with pytest.raises(InputError, match=r"train\.txt names 1 images twice, '2007_000000' for one"):
        open_dataset(f"voc:{tmp_path}", "train")


def test_vocaug_from_sbds_own_release(tmp_path: Path) -> None:
    write_voc(tmp_path)
    # One image of VOC's training set, one of its validation set, two that only SBD has.
    write_sbd(tmp_path, ["2007_000001", "2007_000005", "2008_000001", "2008_000002"])
    dataset = open_dataset(f"vocaug:{tmp_path}", "train")
    names = [dataset.name(i) for i in range(len(dataset))]
    assert names == [f"2007_{i:06d}" for i in range(4)] + ["2008_000001", "2008_000002"], "VOC's val is held out"
    assert sorted(np.unique(dataset.load(1)[1])) == [1, 15, 255], "VOC's own labels where it has them"
    assert dataset.load(4)[1][:6, 0].tolist() == [0] * 5 + [7]
    # MATLAB stores column by column, and OpenCV refuses a picture like that.
    assert len(write_overlays(Subset(dataset, [4]), tmp_path / "look")) == 1
    for root in (tmp_path / "VOCdevkit", tmp_path / "VOCdevkit/VOC2012"):
        assert len(open_dataset(f"vocaug:{root}", "train")) == 6, (
            "the release lies beside VOCdevkit, whichever is named"
        )
    (tmp_path / "benchmark_RELEASE/dataset/cls/2008_000002.mat").write_bytes(b"no mat")
    with pytest.raises(InputError, match=r"2008_000002\.mat is no label file of SBD"):
        dataset.load(5)


def test_vocaug_without_sbds_lists_is_not_plain_voc(tmp_path: Path) -> None:
    write_voc(tmp_path)
    write_sbd(tmp_path, ["2008_000001", "2008_000002", "2008_000003"])
    listed = tmp_path / "benchmark_RELEASE/dataset/val.txt"
    listed.write_text("\n")
    with pytest.raises(InputError, match=r"val\.txt names no image"):
        open_dataset(f"vocaug:{tmp_path}", "train")
    listed.unlink()
    with pytest.raises(InputError, match=r"val\.txt does not exist"):
        open_dataset(f"vocaug:{tmp_path}", "train")


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_vocaug_from_the_usual_folder(place: str, tmp_path: Path) -> None:
    base = write_voc(tmp_path) / "VOCdevkit/VOC2012"
    labels = tmp_path / place / "SegmentationClassAug"
    labels.mkdir()
    for i in range(4):
        Image.fromarray(np.full((40, 56) if i % 2 else (56, 40), 3, np.uint8)).save(labels / f"2007_{i:06d}.png")
    listed = base / "ImageSets/Segmentation/trainaug.txt"
    listed.write_text("".join(f"2007_{i:06d}\n" for i in range(4)))
    assert (open_dataset(f"vocaug:{tmp_path}", "train").load(3)[1] == 3).all()
    listed.write_text("2007_000000\n2007_000004\n")
    with pytest.raises(InputError, match=r"trainaug\.txt names 1 images that are in val\.txt too, 2007_000004"):
        open_dataset(f"vocaug:{tmp_path}", "train")


@pytest.mark.parametrize("name", ["cityscapes", "voc"])
def test_two_steps_and_a_score_by_the_papers_protocol(name: str, tmp_path: Path) -> None:
    (write_cityscapes if name == "cityscapes" else write_voc)(tmp_path / "data")
    (tmp_path / "small_network.py").write_text(NETWORK_WITH_BACKBONE)
    common = [
        "--data",
        f"{name}:data",
        "--model",
        "small_network:small",
        "--epochs",
        1,
        "--batch-size",
        2,
        "--threads",
        1,
    ]
    size = ["--image-size", "40x56", "--crop-size", "32x32", "--keep-aspect", "--scale", 0.5, 2.0]
    result = call_script("train/teacher.py", *common, *size, "--out", "t", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    flags = ["--native", "--window", "32x32", "--scales", "0.75,1", "--flip"]
    result = call_script("train/evaluate.py", "t/best.pt", *flags, "--json", "scores.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 2
    assert scores["protocol"] == {"native": True, "window_hw": [32, 32], "scales": [0.75, 1.0], "flip": True}


def test_masks_in_colours_of_the_class_list(folder_data: Path) -> None:
    plain = open_dataset(f"folder:{folder_data}", "train").load(0)[1]
    with (folder_data / "classes.txt").open("a") as file:
        file.write("255 Void 0 0 0\n")
    colors = np.vstack([COLORS, np.zeros((253, 3), np.uint8)])
    path = folder_data / "train/labels/000.png"
    Image.fromarray(colors[plain]).save(path)
    assert (open_dataset(f"folder:{folder_data}", "train").load(0)[1] == plain).all()


@pytest.mark.parametrize("padding", [0, 1, 253])
def test_palette_masks_with_the_classes_in_another_order(padding: int, folder_data: Path) -> None:
    """What programs write that reduce a colour mask to a palette: 0 is whatever colour they met first."""
    plain = open_dataset(f"folder:{folder_data}", "train").load(0)[1]
    if padding < 253:
        plain[:2] = 0  # of a palette this short, a PNG has too few bits for 255
    mask = Image.fromarray(np.where(plain == 255, 255, 2 - plain).astype(np.uint8))
    mask.putpalette([*COLORS[::-1].ravel().tolist(), *[0, 0, 0] * padding])
    mask.save(folder_data / "train/labels/000.png")
    assert (open_dataset(f"folder:{folder_data}", "train").load(0)[1] == plain).all()


@pytest.mark.parametrize(
    "palette",
    [
        [*COLORS[::-1].ravel().tolist(), 1, 2, 3, 4, 5, 6],  # has colours of no class
        COLORS[[2, 1, 2]].ravel().tolist(),  # has one of them twice
        COLORS[[2, 0]].ravel().tolist(),  # has only some of those in the mask
        np.arange(256).repeat(3).tolist(),
        COLORS.ravel().tolist(),
    ],
)
def test_indices_count_where_the_palette_is_not_that_of_the_classes(palette: list[int], folder_data: Path) -> None:
    before = open_dataset(f"folder:{folder_data}", "train").load(0)[1]
    mask = Image.fromarray(before)
    mask.putpalette([*palette, *[0, 0, 0] * (256 - len(palette) // 3)])
    mask.save(folder_data / "train/labels/000.png")
    assert (open_dataset(f"folder:{folder_data}", "train").load(0)[1] == before).all()


def test_greys_count_where_a_palette_holds_the_label_values(folder_data: Path) -> None:
    """What oxipng makes of an index mask; greys that are no label values, or black and white, are there to be looked at."""
    path = folder_data / "train/labels/000.png"
    before = np.asarray(Image.open(path))
    assert sorted(np.unique(before)) == [0, 1, 2, 255]
    order = np.array([2, 255, 0, 1])
    mask = Image.fromarray(np.argsort(order)[np.searchsorted(np.sort(order), before)].astype(np.uint8))
    for palette, expected in (
        (order, before),
        ([0, 85, 170, 255], np.asarray(mask)),
        ([0, 255, 0, 255], np.asarray(mask)),
    ):
        mask.putpalette(np.repeat(palette, 3).tolist())
        mask.save(path)
        with (folder_data / "classes.txt").open("a") as file:
            file.write("3 purple 9 0 9\n" if palette is order else "")
        assert (open_dataset(f"folder:{folder_data}", "train").load(0)[1] == expected).all()


def test_all_images_in_one_folder_with_split_lists(folder_data: Path, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        shutil.move(folder_data / "train" / kind, folder_data / kind)
    shutil.rmtree(folder_data / "train")
    shutil.rmtree(folder_data / "val")
    (folder_data / "train.txt").write_text("".join(f"{i:03d}\n" for i in range(8)))
    (folder_data / "val.txt").write_text("008\n009\n")
    assert len(open_dataset(f"folder:{folder_data}", "train")) == 8
    (folder_data / "val.txt").write_text("007\n009\n")
    result = call_script("train/teacher.py", "--data", f"folder:{folder_data}", "--out", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "1 of the 2 images" in result.stderr
    assert "in train too, 007.png" in result.stderr
    (folder_data / "val.txt").write_text("008\n009\n008\n")
    with pytest.raises(InputError, match=r"val\.txt names 1 images twice, '008' for one"):
        open_dataset(f"folder:{folder_data}", "val")


def test_a_set_of_one_channel_is_refused_and_a_single_grey_image_is_not(folder_data: Path, tmp_path: Path) -> None:
    grey = sorted((folder_data / "train/images").iterdir())
    Image.open(grey[0]).convert("L").save(grey[0])
    result = call_script(
        "train/teacher.py", "--data", f"folder:{folder_data}", "--check-data", "--out", "x", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    for path in grey:
        Image.open(path).convert("L").save(path)
    result = call_script("train/teacher.py", "--data", f"folder:{folder_data}", "--out", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "Every image" in result.stderr
    assert "one channel" in result.stderr
    Image.fromarray(np.full((48, 64), 40000, np.uint16)).save(grey[0])
    with pytest.raises(InputError, match="more than 8 bits"):
        open_dataset(f"folder:{folder_data}", "train").load(0)
