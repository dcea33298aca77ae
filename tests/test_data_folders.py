"""Which files of a folder are taken, how classes are named and ordered, and which splits names say."""

import io
import json
import logging
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from visar.data.folders import find_pictures, hold_out, sort_names, split_folders, split_of_file
from visar.data.images import ImageSet, load_image_set
from visar.data.vocabulary import Vocabulary
from visar.evaluate.images import FolderImages
from visar.pipelines.requests import number_or_name


def picture(value: int) -> bytes:
    blob = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(blob, "PNG")
    return blob.getvalue()


def write(root: Path, *names: str) -> Path:
    """Pictures, each of another grey, in the order of the names."""
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(value))
    return root


def classes(images: ImageSet) -> tuple[str, ...]:
    return images.vocabulary.attributes["class"]


def counts(images: ImageSet) -> list[int]:
    return np.bincount(images.split_N, minlength=3).tolist()


def test_training_and_evaluation_take_the_same_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "visar.data")
    root = write(
        tmp_path,
        *("a/1.png", "a/2.PNG", "a/.hidden.png", "a/.ipynb_checkpoints/1.png", "b/1.png", "b/deep/2.png"),
        *("__MACOSX/a/._1.png", "a/._1.png", "a/.3.png.x1y2z3.png", "b/notes.txt", "b/.cache/x.png"),
    )
    (root / "b" / "up").symlink_to("..")
    taken = ["a/1.png", "a/2.PNG", "b/1.png", "b/deep/2.png"]
    found = find_pictures(root)
    assert found.names == taken and not found.broken
    assert {reason: len(names) for reason, names in found.left_out.items()} == {
        "hidden": 6,
        "not named as an image": 1,
        "links to a folder above": 1,
    }
    images, scored = load_image_set(root, 8), FolderImages(root)
    assert [str(file.relative_to(root)) for file in scored.files] == taken
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 4, 5] and classes(images) == ("a", "b")
    lines = [record.getMessage() for record in caplog.records]
    assert "4 images of 8 pixels, 2 classes; 1 for validation; 6 left out, hidden (" in lines[0]
    assert "1 left out, not named as an image (b/notes.txt)" in lines[0] and "4 images; 6 left out" in lines[1]


def test_links_are_followed_and_dead_ones_named(tmp_path: Path) -> None:
    write(tmp_path / "whole", "b/1.png", "c/1.png", "c/2.png")
    root = write(tmp_path / "part", "a/1.png")
    for name in "bc":
        (root / name).symlink_to(tmp_path / "whole" / name)
    (root / "a" / "2.png").symlink_to(tmp_path / "whole" / "c" / "2.png")
    (tmp_path / "whole" / "c" / "back").symlink_to(root)
    images = load_image_set(root, 8)
    assert len(images) == len(FolderImages(root)) == 5 and classes(images) == ("a", "b", "c")
    (root / "d").symlink_to("nowhere")
    os.mkfifo(root / "a" / "pipe.png")
    for read in (lambda: load_image_set(root, 8), lambda: FolderImages(root)):
        with pytest.raises(ValueError, match=r"links to nothing, or pipes: a/pipe\.png, d; repair"):
            read()


def test_every_ending_that_pillow_reads(tmp_path: Path) -> None:
    for ending in ("png", "jpg", "jpeg", "jfif", "webp", "gif", "bmp", "tif", "TIFF", "ppm", "pgm", "tga", "jp2"):
        kind = PIL.Image.registered_extensions()[f".{ending.lower()}"]
        PIL.Image.new("L" if ending == "pgm" else "RGB", (8, 8)).save(tmp_path / f"{ending}.{ending}", kind)
    assert len(load_image_set(tmp_path, 8)) == len(FolderImages(tmp_path)) == 13


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a/1", "val/a/1", "test/a/1"], {"train": "train", "val": "val", "test": "test"}),
        (["Training/a/1", "VALIDATION/a/1"], {"Training": "train", "VALIDATION": "val"}),
        (["train/1", "dev/1", "docs/1"], {"train": "train", "dev": "val"}),
        (["train2017/1", "val2017/1"], {"train2017": "train", "val2017": "val"}),
        (["Train_Images/a/1", "TestSet/a/1"], {"Train_Images": "train", "TestSet": "test"}),
        (["bullet_train/1", "crash_test/1", "trainer/1"], {}),
        (["train/a/1"], {"train": "train"}),
        (["train/1", "plane/1", "ship/1"], {}),
        (["train/steam/1", "plane/1"], {"train": "train"}),
        (["test/1", "val/1"], {}),
        (["cat/1", "dog/1", "loose"], {}),
    ],
)
def test_split_folders_unless_they_are_classes(names: list[str], splits: dict[str, str]) -> None:
    assert split_folders(names) == splits


def test_splits_classes_and_the_folder_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "visar.data")
    root = write(tmp_path / "a", "Train/x/1.png", "Train/y/2.png", "Train/y/3.png", "valid/y/4.png", "other/5.png")
    images = load_image_set(root, 8)
    assert classes(images) == ("x", "y") and counts(images) == [3, 1, 0]
    assert "1 left out, outside of the splits (other/5.png)" in caplog.records[-1].getMessage()
    below = load_image_set(write(tmp_path / "b", "data/train/x/1.png", "data/train/y/2.png", "data/test/y/3.png"), 8)
    assert classes(below) == ("x", "y") and counts(below) == [1, 1, 1]  # one of two is held out for validation
    trains = load_image_set(write(tmp_path / "c", "train/1.png", "plane/2.png"), 8)
    assert classes(trains) == ("plane", "train")


def test_held_out_pictures_are_a_function_of_names() -> None:
    names = [f"{i}.png" for i in range(400)]
    split = hold_out(names)
    assert 8 <= (split == 1).sum() <= 32 and hold_out(names[:1]).tolist() == [0]
    kept = hold_out(names[100:])
    assert np.array_equal(split[100:], kept)
    known = np.array([0, 0, 2, 1], np.int8)
    assert hold_out(names[:4], known).tolist() == [0, 0, 2, 1]
    assert (hold_out(names[:4], np.array([0, 0, 2, 2])) == 1).sum() == 1


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002", "train"),
        ("mnist_TEST", "test"),
        ("validation.0", "val"),
        ("part-3", None),
        ("train-and-test", None),
        ("trainer", None),
    ],
)
def test_splits_that_names_of_files_say(name: str, split: str | None) -> None:
    assert split_of_file(name) == split


def test_numbers_are_sorted_as_numbers_and_names_win(tmp_path: Path) -> None:
    assert sort_names(["10", "9", "1", "9"]) == ("1", "9", "10")
    assert sort_names(["b10", "b9"]) == ("b10", "b9") and sort_names(["x", "2", "10"]) == ("10", "2", "x")
    images = load_image_set(write(tmp_path, *(f"{number}/1.png" for number in range(12))), 8)
    vocabulary = images.vocabulary
    assert classes(images) == tuple(str(number) for number in range(12))
    years = Vocabulary({"class": ("1990", "2000", "7")})
    for text, given, number in (("7", "7", 2), ("0", 0, 0), (" 1990", " 1990", 0), ("2000", "2000", 1)):
        assert number_or_name(text, years) == given and years.label_id("class", given) == number
    assert number_or_name("3", None) == 3 and number_or_name("-1", vocabulary) == -1
    assert number_or_name("cat", None) == "cat"


def test_names_match_in_other_forms_and_cases() -> None:
    vocabulary = Vocabulary({"class": ("Cafe\u0301", "\u212bngstrom", "Cat", "cat", "animals/DOG")})
    for name, number in (
        ("Caf\u00e9", 0),
        ("caf\u00e9", 0),
        ("CAFE\u0301", 0),
        ("\u00c5NGSTROM", 1),
        ("cat", 3),
        ("Cat", 2),
        ("dog", 4),
        ("ANIMALS/dog", 4),
    ):
        assert vocabulary.label_id("class", name) == number
    with pytest.raises(ValueError, match="'CAT' fits several: Cat, cat"):
        vocabulary.label_id("class", "CAT")


def test_names_in_any_bytes(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"caf\xc3\xa9"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for file in (b"1\xff.png", b"2.png"):
            with open(os.path.join(folder, file), "wb") as handle:
                handle.write(picture(5))
    images, scored = load_image_set(tmp_path, 8), FolderImages(tmp_path)
    assert sorted(classes(images)) == ["caf\\xe9", "caf\u00e9"] and len(images) == len(scored) == 4
    assert len(scored.digest()) == 64
    json.dumps(images.vocabulary.to_dict(), ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------------------- tables
def table(path: Path, labels: object = None, hub: list[str] | None = None, **columns: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (extra train)")
    from pyarrow import parquet

    count = len(next(iter(columns.values())))  # type: ignore[arg-type]
    given: dict = {"image": [{"bytes": picture(i), "path": None} for i in range(count)], **columns}
    made = pyarrow.table(given)
    if hub is not None:
        features = {"label": {"names": hub, "_type": "ClassLabel"}}
        made = made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(made, path)
    return path


def test_tables_of_the_hub(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "visar.data")
    names = ["zebra", "ape", "cat"]
    columns = {"text": ["one", None, "three", "four"], "more": [1, 2, 3, 4]}
    for part in range(2):
        table(tmp_path / f"data/train-0000{part}-of-00002.parquet", label=[2, 0, 2, 0], hub=names, **columns)
    table(tmp_path / "data/test-00000-of-00001.parquet", label=[1, 1, 0, 2], hub=names, **columns)
    (tmp_path / "README.md").write_text("a card")
    images = load_image_set(tmp_path, 8)
    assert classes(images) == ("zebra", "ape", "cat") and len(images.indices("test")) == 4
    assert images.labels_NA[images.indices("test"), 0].tolist() == [1, 1, 0, 2]
    assert images.captions is not None and images.captions[:4] == ["one", "", "three", "four"]
    assert counts(images) == [7, 1, 4]
    assert "12 images of 8 pixels, 3 classes; 1 for validation, 4 for tests" in caplog.records[-1].getMessage()
    assert "columns not read: more" in caplog.records[-1].getMessage()


def test_tables_of_several_files_and_their_splits(tmp_path: Path) -> None:
    for name in ("train/0.parquet", "train/1.parquet", "validation/0.parquet"):
        table(tmp_path / "a" / name, label=["10", "9", "9"])
    images = load_image_set(tmp_path / "a", 8)
    assert classes(images) == ("9", "10") and counts(images) == [6, 3, 0]
    for name in ("0.parquet", "1.parquet"):
        table(tmp_path / "b" / name, label=[5, 7, 5])
    images = load_image_set(tmp_path / "b", 8)
    assert classes(images) == ("5", "7") and sum(counts(images)) == 6 and counts(images)[1] == 1
    assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [[0], [1]]}, r"x\.parquet: the column label is list<.*>; whole numbers or texts are needed"),
        ({"label": [{"id": 0}, {"id": 1}]}, r"x\.parquet: the column label is struct<id: int64>"),
        ({"label": [0.0, float("nan")]}, "the column label is double"),
        ({"label": [0, None]}, "row 1 has no label"),
        ({"label": [0, 1], "caption": [["a", "b"], ["c"]]}, "the column caption is list<.*>; texts are needed"),
        ({"caption": [5, 6]}, "the column caption is int64; texts are needed"),
        ({"image": [{"path": "0.png"}] * 2}, r"x\.parquet row 0: the image is a struct of path without bytes"),
        ({"image": [[1, 2], [3]]}, "row 0: the image is list; encoded bytes are needed"),
        ({"image": [picture(0), None]}, "row 1: the image is NoneType"),
        ({"image": [picture(0), b"no picture"]}, r"x\.parquet row 1 is not a readable image"),
    ],
)
def test_cells_of_other_kinds_are_named(tmp_path: Path, columns: dict, message: str) -> None:
    table(tmp_path / "x.parquet", **columns)
    with pytest.raises(ValueError, match=message):
        load_image_set(tmp_path / "x.parquet", 8)


def test_labels_that_do_not_fit_their_names_are_refused(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", label=[0, -1], hub=["x", "y"])
    with pytest.raises(ValueError, match=r"a\.parquet: the label of row 1 is -1; the 2 named classes are 0 \.\.\. 1"):
        load_image_set(tmp_path / "a.parquet", 8)
    table(tmp_path / "b" / "0.parquet", label=[0, 1])
    table(tmp_path / "b" / "1.parquet", label=["0", "1"])
    with pytest.raises(ValueError, match="cells of another kind"):
        load_image_set(tmp_path / "b", 8)
