"""Image sets from every kind of place."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from visar.data import decoding
from visar.data.images import as_float, load_image_set, make_image_set
from visar.io.pictures import to_uint8

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def sample() -> dict[str, np.ndarray]:
    with np.load(SAMPLE) as arrays:
        return dict(arrays)


def write_folder(root: Path, sample: dict[str, np.ndarray], count: int = 12, splits: bool = False) -> Path:
    """The first pictures of the sample as PNG files, three classes in turn."""
    for i in range(count):
        split = [("train", "val", "test")[i // 3 % 3]] if splits else []
        place = root.joinpath(*split, f"class {i % 3}")
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(sample["images"][i]).save(place / f"{i:02}.png")
    return root


def test_sample_npz_has_names_captions_and_words(sample: dict[str, np.ndarray]) -> None:
    images = load_image_set(SAMPLE)
    assert len(images) == 64 and images.image_size == 64
    assert np.array_equal(images.images, sample["images"])
    assert images.vocabulary.attributes == {"class": tuple(sample["classes"])}
    assert images.labels_NA[:, 0].tolist() == sample["class_id"].tolist()
    assert images.captions == sample["captions"].tolist()
    assert images.words_NT is not None
    words = images.vocabulary.words
    first = [words[i] for i in images.words_NT[0].tolist() if i]
    assert first == sample["captions"][0].replace(",", "").split()[:-1]  # "style" says nothing and is left out
    assert len(images.indices("train")) + len(images.indices("val")) == 64
    assert len(images.vocabulary.rows) == len(images.indices("train"))


def test_pixels_survive_the_way_to_floats_and_back(sample: dict[str, np.ndarray]) -> None:
    images = torch.from_numpy(sample["images"])
    assert torch.equal(to_uint8(as_float(images)), images.permute(0, 3, 1, 2))


def test_npz_without_labels_and_of_another_size(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", draws.integers(0, 256, (5, 12, 20, 3), np.uint8))
    images = load_image_set(tmp_path / "a.npz")
    assert images.images.shape == (5, 12, 12, 3) and images.vocabulary.attributes == {"class": ("0",)}
    assert load_image_set(tmp_path / "a.npz", 8).image_size == 8


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4, 3), np.uint8)}, "has arrays pictures; images or arr_0 is needed"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "images are float32"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \(2, 3, 4, 4\)"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "N >= 1"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0.5, 1])}, "labels is float64"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, -1])}, "whole numbers"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0])}, "1 labels for 2 images"),
        (
            {"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, 2]), "classes": np.array(["a"])},
            "label 2 with 1 classes",
        ),
        ({"images": np.zeros((2, 0, 4, 3), np.uint8)}, "N >= 1"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "labels": np.array([10**9])}, "the label 1000000000; allowed"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "labels": np.zeros((1, 1), int)}, r"labels is int64 \(1, 1\)"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "classes": np.array([0.5])}, "classes is float64"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "classes": np.array("a")}, r"classes is <U1 \(\)"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "classes": np.array(["a", "a"])}, "the same name twice"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "captions": np.array([5])}, r"captions is int64 \(1,\); texts"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "captions": np.array(["a"])}, "1 captions"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8), "captions": np.array([None])}, "its array captions"),
    ],
)
def test_npz_of_another_form_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_image_set(tmp_path / "a.npz")


def test_folder_with_a_subfolder_a_class(tmp_path: Path, sample: dict[str, np.ndarray]) -> None:
    root = write_folder(tmp_path / "set", sample)
    (root / "class 0" / "notes.txt").write_text("not a picture")
    (root / "class 0" / ".hidden.png").write_text("not a picture")
    images = load_image_set(root, 64)
    assert images.vocabulary.attributes == {"class": ("class 0", "class 1", "class 2")}
    assert images.labels_NA[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    order = [i for label in range(3) for i in range(label, 12, 3)]
    assert np.array_equal(images.images, sample["images"][order])
    assert images.words_NT is None and images.captions is None
    again = load_image_set(root, 64)
    assert again.digest() == images.digest() and np.array_equal(again.split_N, images.split_N)
    assert len(images.indices("val")) >= 1
    with pytest.raises(ValueError, match="no images in its split test"):
        images.indices("test")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        images.indices("dev")


def test_folder_with_split_folders(tmp_path: Path, sample: dict[str, np.ndarray]) -> None:
    images = load_image_set(write_folder(tmp_path, sample, splits=True), 64)
    assert {split: len(images.indices(split)) for split in ("train", "val", "test")} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    assert np.array_equal(images.images[images.indices("test")], sample["images"][6:9])


def test_pictures_are_cut_to_the_middle_and_resized(tmp_path: Path) -> None:
    wide = np.full((20, 60, 3), 255, np.uint8)
    wide[:, 20:40] = (200, 30, 0)
    PIL.Image.fromarray(wide).save(tmp_path / "wide.png")
    PIL.Image.fromarray(wide).convert("L").save(tmp_path / "grey.png")
    images = load_image_set(tmp_path, 10).images
    assert images.shape == (2, 10, 10, 3)
    assert (images[1] == (200, 30, 0)).all() and images[0].std(-1).max() == 0


def test_pictures_of_folders_are_decoded_when_asked_for(
    tmp_path: Path, sample: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "set", sample)
    kept = load_image_set(root, 64)
    monkeypatch.setattr(decoding, "KEPT_BYTES", 3 * 64 * 64 * 3)
    images = load_image_set(root, 64)
    assert isinstance(images.images, decoding.DecodedPictures) and images.digest() == kept.digest()
    whole = np.asarray(kept.images)
    in_memory = replace(kept, images=whole)
    assert in_memory.digest() == kept.digest()
    assert images.images.shape == whole.shape and images.images.dtype == whole.dtype
    for key in (3, -1, slice(2, 9, 3), np.array([5, 5, 0]), whole[:, 0, 0, 0] > 9, (slice(1, 3), 0, ..., 0), (2, 4)):
        assert np.array_equal(images.images[key], whole[key])
    for rows in (None, np.array([7, 1, 1, 11, 0])):
        batches = list(decoding.in_batches(images.images, 4, rows))
        assert [len(batch) for batch in batches] == ([4, 4, 4] if rows is None else [4, 1])
        assert np.array_equal(np.concatenate(batches), whole if rows is None else whole[rows])
    removed = next(root.rglob("*11.png"))
    removed.unlink()
    with pytest.raises(ValueError, match=r"11\.png is not a readable image \(no such file\)"):
        images.images[:]
    assert np.array_equal(images.images[:3], whole[:3])


def test_unreadable_pictures_are_all_named_or_left_out(
    tmp_path: Path, sample: dict[str, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_image_set(write_folder(tmp_path / "whole", sample), 64)
    root = write_folder(tmp_path / "set", sample)
    (root / "class 1" / "broken.png").write_bytes((root / "class 1" / "01.png").read_bytes()[:300])
    (root / "class 2" / "empty.jpg").touch()
    with pytest.raises(ValueError, match=r"2 unreadable: .*\n.*broken\.png is not .*\n.*empty\.jpg is .*it is empty"):
        load_image_set(root, 64)
    (root / "class 0" / "nothing").symlink_to("nowhere")
    with pytest.raises(ValueError, match="links to nothing, or pipes: class 0/nothing; repair"):
        load_image_set(root, 64)
    images = load_image_set(root, 64, skip_unreadable=True)
    assert images.digest() == whole.digest()
    assert [record.levelname for record in caplog.records].count("WARNING") == 3
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.png").touch()
    with pytest.raises(ValueError, match="1 unreadable"):
        load_image_set(tmp_path / "none", 64, skip_unreadable=True)
    for number in range(150):
        (tmp_path / "none" / f"{number}.png").touch()
    with pytest.raises(ValueError, match=r"^151 unreadable: (.*\n){101}and 51 more$"):
        load_image_set(tmp_path / "none", 64)


def test_places_that_are_no_image_sets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.md").write_text("text")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.zip").write_text("text")
    for place, size, message in [
        ("nowhere", 8, "no image set at"),
        ("empty", 8, "has no images"),
        ("empty", None, "image_size None.*--image-size"),
        ("empty", 0, "image_size 0"),
        ("text.md", 8, "not an image set"),
        ("text.npz", 8, "damaged or not an .npz"),
        ("text.zip", 8, "damaged or not an emoji set"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_image_set(tmp_path / place, size)


def png(image: np.ndarray, path: Path) -> bytes:
    PIL.Image.fromarray(image).save(path, "PNG")
    return path.read_bytes()


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_files(tmp_path: Path, sample: dict[str, np.ndarray], nested: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (extra train)")
    from pyarrow import parquet

    blobs = [png(image, tmp_path / "one") for image in sample["images"][:6]]
    cells = [{"bytes": blob, "path": None} for blob in blobs] if nested else blobs
    folder = tmp_path / "set"
    folder.mkdir()
    for part in range(2):
        rows = slice(3 * part, 3 * part + 3)
        columns = {
            "image": cells[rows],
            "label": [7, 3, 7],
            "caption": [f"picture {i}" for i in range(rows.start, rows.stop)],
        }
        parquet.write_table(pyarrow.table(columns), folder / f"{part}.parquet")
    images = load_image_set(folder, 64)
    assert np.array_equal(images.images, sample["images"][:6])
    assert images.vocabulary.attributes == {"class": ("3", "7")}
    assert images.labels_NA[:, 0].tolist() == [1, 0, 1] * 2
    assert images.captions == [f"picture {i}" for i in range(6)]
    assert load_image_set(folder / "1.parquet", 64).captions == [f"picture {i}" for i in range(3, 6)]


def test_parquet_files_of_another_form_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (extra train)")
    from pyarrow import parquet

    for columns, message in [
        ({"picture": [b"x"]}, "has columns picture; a column image or img is needed"),
        ({"image": [b"x"], "label": [0]}, r"parquet row 0 is not a readable image"),
        ({"image": [b"x"], "label": pyarrow.array([None], pyarrow.int64())}, "row 0 has no label"),
        ({"image": ["x"]}, "row 0: the image is str"),
        ({"image": pyarrow.array([], pyarrow.binary())}, "has no rows"),
    ]:
        parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=message):
            load_image_set(tmp_path / "a.parquet", 8)
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(ValueError, match="damaged or not parquet"):
        load_image_set(tmp_path / "a.parquet", 8)


def test_captions_without_words_are_not_given() -> None:
    images, labels = np.zeros((3, 2, 2, 3), np.uint8), np.zeros((3, 1), np.int64)
    captions = ["black cat", "", "The!"]
    made = make_image_set("a", images, labels, {"class": ("x",)}, np.zeros(3), captions)
    assert made.captions == ["black cat", "", ""] and made.words_NT is not None
    assert made.words_NT.tolist() == [[2, 3], [1, 0], [1, 0]]
    assert made.vocabulary.texts == ("", "black cat")


def test_digest_sees_pixels_labels_splits_and_mirroring() -> None:
    images, labels = np.zeros((4, 2, 2, 3), np.uint8), np.zeros((4, 1), np.int64)
    split, mirror = np.array([0, 0, 0, 1]), np.ones(4, bool)
    base = dict(name="a", images=images, labels_NA=labels, attributes={"class": ("x", "y")}, split_N=split)
    other = images.copy()
    other[0, 0, 0, 0] = 1
    digests = {
        make_image_set(**base | change).digest()  # type: ignore[arg-type]
        for change in (
            {},
            {"images": other},
            {"labels_NA": np.array([[1], [0], [0], [0]])},
            {"split_N": np.array([0, 0, 1, 1])},
            {"mirror_allowed_N": ~mirror},
        )
    }
    assert len(digests) == 5
    assert make_image_set(**base).digest() == make_image_set(**base | {"name": "b"}).digest()  # type: ignore[arg-type]


def test_sets_without_training_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no training images"):
        make_image_set("a", np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 1), int), {"class": ("x",)}, np.ones(1))
