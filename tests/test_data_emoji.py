"""The emoji set: its file, its packages, its drawings and its splits."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from visar.data.emoji import PIXELS_SHA256, captions, pack_pixels, read_emoji, unpack_pixels
from visar.data.emoji_build import (
    build_emoji,
    class_names,
    collect_pictures,
    draw,
    emoji_facts,
    on_white,
    plain_json,
    read_drawings,
    read_emoji_names,
    write_archive,
)
from visar.data.emoji_splits import concept_key, near_copies, shipped_splits, split_emoji, unit_hash
from visar.data.images import load_image_set
from visar.data.packages import STYLE_PACKAGES, Package, fetch_package, read_members

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    with np.load(SAMPLE) as arrays:
        return arrays["images"]


def write_tarball(path: Path, files: dict[str, bytes]) -> Package:
    with tarfile.open(path, "w:gz") as archive:
        for name, blob in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    return Package("@scope/thing", "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest())


# ------------------------------------------------------------------------------------------------------------ packages
def install_client(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command npm that runs a shell script; its argument 4 is the folder to put tarballs into."""
    folder.mkdir()
    client = folder / "npm"
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_missing_client_is_explained_and_kept_tarballs_do_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    place = tmp_path / "packages"
    place.mkdir()
    package = write_tarball(place / "scope-thing-1.0.0.tgz", {"a.txt": b"a"})
    assert fetch_package(package, place) == place / "scope-thing-1.0.0.tgz"
    with pytest.raises(ValueError, match="no npm to fetch it with: install Node.js"):
        fetch_package(Package("@scope/thing", "2.0.0", package.sha256), place)


def test_tarball_is_fetched_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "scope-thing-1.0.0.tgz"
    package = write_tarball(source, {"a/b.txt": b"text", "c.txt": b"other"})
    install_client(tmp_path / "bin", f'[ "$2" = @scope/thing@1.0.0 ] && cp {source} "$4"', monkeypatch)
    place = tmp_path / "packages"
    path = fetch_package(package, place)
    assert list(read_members(path, r"a/.*")) == [("a/b.txt", b"text")]
    assert [file.name for file in place.iterdir()] == [path.name]
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"has sha256 .* remove .* to download it again"):
        fetch_package(package, place)


def test_a_relative_folder_is_the_same_to_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "scope-thing-1.0.0.tgz"
    package = write_tarball(source, {"a.txt": b"text"})
    install_client(tmp_path / "bin", f'cp {source} "$4"', monkeypatch)
    monkeypatch.chdir(tmp_path)
    path = fetch_package(package, Path("data/packages"))
    assert path.samefile(tmp_path / "data" / "packages" / package.file_name)
    assert list(read_members(path, ".*")) == [("a.txt", b"text")]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'network unreachable' >&2; exit 1", "could not fetch @scope/thing 1.0.0: network unreachable"),
        ("exit 0", "could not fetch @scope/thing"),
        ('echo other > "$4/scope-thing-1.0.0.tgz"', "has sha256 .* nothing was stored"),
        ('head -c 9 /dev/zero > "$4/scope-thing-1.0.0.tgz"; kill -9 $$', "could not fetch"),
    ],
)
def test_failed_downloads_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    install_client(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(ValueError, match=message):
        fetch_package(Package("@scope/thing", "1.0.0", "0" * 64), tmp_path / "packages")
    assert list((tmp_path / "packages").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ building
def names_tarball(path: Path) -> Path:
    def entry(code: str, label: str, group: int | None, subgroup: int, order: int, **more: object) -> dict:
        return dict(hexcode=code, label=label, group=group, subgroup=subgroup, order=order, tags=["tag"], **more)

    skins = [
        dict(hexcode="1F44B-1F3FB", label="waving hand: light skin tone", tone=1),
        dict(hexcode="1F44B-1F3FC", label="waving hand: medium-light skin tone", tone=2),
        dict(hexcode="1F91D-1F3FB-1F3FC", label="mixed", tone=[1, 2]),
    ]
    data = [
        entry("1F600", "Grinning face", 0, 0, 1),
        entry("1F44B", "waving hand", 1, 1, 2, skins=skins),
        entry("2764-FE0F", "red heart", 0, 2, 3),
        entry("1F1E6-1F1E9", "flag: andorra", 2, 3, 4),
        entry("1F3FB", "light skin tone", None, 4, 5),
    ]
    groups = dict(
        groups={"0": "smileys", "1": "people", "2": "flags"},
        subgroups={"0": "face", "1": "hand", "2": "heart", "3": "country-flag", "4": "skin-tone"},
    )
    write_tarball(path, {"en/data.json": plain_json(data), "meta/groups.json": plain_json(groups)})
    return path


def webp(image: np.ndarray) -> bytes:
    blob = io.BytesIO()
    PIL.Image.fromarray(image).save(blob, "WEBP", lossless=True)
    return blob.getvalue()


def test_names_leave_out_flags_components_and_mixed_tones(tmp_path: Path) -> None:
    names = read_emoji_names(names_tarball(tmp_path / "names.tgz"))
    assert list(names) == ["1f600", "1f44b", "1f44b-1f3fb", "1f44b-1f3fc", "2764"]
    wave = names["1f44b-1f3fb"]
    assert (wave.name, wave.tone, wave.group, wave.subgroup, wave.order) == (
        "waving hand: light skin tone",
        1,
        "people",
        "hand",
        2,
    )


ICONS = {
    "icons": {
        "grinning-face": {"body": '<rect x="0" y="0" width="16" height="16" fill="#f00"/>'},
        "heart": {"body": '<rect x="2" y="0" width="8" height="8" fill="#00f"/>', "left": 2, "width": 8, "height": 16},
        "unknown": {"body": ""},
    }
}


def test_drawings_are_found_by_code_or_by_name(tmp_path: Path) -> None:
    names = read_emoji_names(names_tarball(tmp_path / "names.tgz"))
    write_tarball(tmp_path / "named.tgz", {"icons.json": plain_json(ICONS)})
    assert [drawing.code for drawing in read_drawings(tmp_path / "named.tgz", names)] == ["1f600"]
    characters = {"2764-fe0f": "heart", "1f600": "grinning-face", "1f47d": "unknown", "1f44b": "missing"}
    files = {"icons.json": plain_json(ICONS), "chars.json": plain_json(characters)}
    write_tarball(tmp_path / "coded.tgz", files)
    face, heart = sorted(read_drawings(tmp_path / "coded.tgz", names), key=lambda drawing: drawing.code)
    assert (face.code, face.width, face.height) == ("1f600", 128, 128)
    assert (heart.code, heart.width, heart.height) == ("2764", 64, 128)
    assert 'viewBox="2 0 8 16"' in str(heart.source)


def test_svg_is_drawn_in_the_middle_of_white(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="drawing needs resvg-py (extra data)")
    names = read_emoji_names(names_tarball(tmp_path / "names.tgz"))
    files = {"icons.json": plain_json(ICONS), "chars.json": plain_json({"2764": "heart"})}
    write_tarball(tmp_path / "style.tgz", files)
    image = draw(read_drawings(tmp_path / "style.tgz", names)[0])
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[:32, 16:48] = (0, 0, 255)
    assert np.array_equal(image, expected)


def test_bitmaps_are_put_on_white_and_reduced(tmp_path: Path) -> None:
    image = np.zeros((128, 128, 4), np.uint8)
    image[:64, :, 0] = image[:64, :, 3] = 255
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[:32] = (255, 0, 0)
    assert np.array_equal(on_white(PIL.Image.fromarray(image)), expected)
    names = read_emoji_names(names_tarball(tmp_path / "names.tgz"))
    write_tarball(tmp_path / "style.tgz", {"assets/2764-fe0f.webp": webp(image), "assets/0000.webp": webp(image)})
    (drawing,) = read_drawings(tmp_path / "style.tgz", names)
    assert drawing.code == "2764" and np.array_equal(draw(drawing), expected)


def test_small_subgroups_are_put_together() -> None:
    places = [("a", "big")] * 50 + [("a", "one")] * 20 + [("a", "two")] * 25 + [("b", "x")] * 3 + [("b", "y")] * 2
    assert Counter(class_names(places)) == {"a/big": 50, "a/other": 45, "b/x": 5}


def test_built_file_is_read_back_and_its_damage_is_seen(tmp_path: Path, pictures: np.ndarray) -> None:
    names = read_emoji_names(names_tarball(tmp_path / "names.tgz"))
    white = np.full((64, 64, 3), 255, np.uint8)
    sources, images = {}, {}
    for i, style in enumerate(("noto", "twemoji")):
        drawn = {"1f600": pictures[i], "1f44b-1f3fc": pictures[i + 2], "2764": white, "1f44b": pictures[4]}
        files = {f"{code}.webp": webp(image) for code, image in drawn.items()}
        write_tarball(tmp_path / f"{style}.tgz", files)
        sources[style] = read_drawings(tmp_path / f"{style}.tgz", names)
        images[style] = np.stack([draw(drawing) for drawing in sources[style]])
    kept, pixels, dropped = collect_pictures(names, sources, images)
    assert sorted((style, emoji.code) for style, emoji in kept) == [
        ("noto", "1f44b"),
        ("noto", "1f600"),
        ("twemoji", "1f600"),
    ]
    assert dropped == {"blank:noto": 1, "blank:twemoji": 1, "duplicate:twemoji": 1}

    facts = emoji_facts(kept, pixels, dropped)
    path = tmp_path / "set.zip"
    write_archive(path, {"meta.json": plain_json(facts), "pixels.npy.xz": pack_pixels(pixels)})
    first = path.read_bytes()
    write_archive(path, {"meta.json": plain_json(facts), "pixels.npy.xz": pack_pixels(pixels)})
    assert path.read_bytes() == first
    read, meta = read_emoji(path)
    assert np.array_equal(read, pixels) and meta == json.loads(plain_json(facts))
    assert set(captions(meta)) == {
        "waving hand, noto style",
        "grinning face, noto style",
        "grinning face, twemoji style",
    }
    with pytest.raises(ValueError, match=r"splits are known for ef3b30f4d67e \(13661 images\)"):
        load_image_set(path)

    write_archive(path, {"meta.json": plain_json(facts), "pixels.npy.xz": pack_pixels(255 - pixels)})
    with pytest.raises(ValueError, match="pixels differ from their recorded sha256"):
        read_emoji(path)
    path.write_bytes(first[:-200])
    with pytest.raises(ValueError, match="damaged or not an emoji set"):
        read_emoji(path)


def test_finished_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "emoji64.zip").write_text("finished")
    assert build_emoji(tmp_path) == tmp_path / "emoji64.zip"
    assert (tmp_path / "emoji64.zip").read_text() == "finished"


def test_pixels_are_packed_without_loss(pictures: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    for images in (pictures[:8], noise):
        assert np.array_equal(unpack_pixels(pack_pixels(images)), images)


# -------------------------------------------------------------------------------------------------------------- splits
def test_variants_of_an_idea_share_a_key() -> None:
    assert len({concept_key(code) for code in ("1f468-1f3fb-200d-1f680", "1f469-200d-1f680", "1f9d1-200d-1f680")}) == 1
    assert concept_key("1f3c3-1f3ff-200d-2640") == concept_key("1f3c3")
    assert concept_key("1f600") != concept_key("1f601")


def test_near_copies_are_seen_through_shifts_and_mirrors(pictures: np.ndarray) -> None:
    base = np.full((6, 64, 64, 3), 255, np.uint8)
    base[:, 8:56, 8:56] = pictures[:6, 8:56, 8:56]
    other = base.copy()
    other[0] = np.roll(base[0], (3, -2), (0, 1))
    other[1] = np.roll(base[1, :, ::-1], (-1, 1), (0, 1))
    other[2] = np.clip(base[2].astype(int) + np.where(np.arange(64) % 2, 4, -4)[:, None], 0, 255)
    other[3] = np.roll(base[3], 5, 0)
    found = {(i, j): error for i, j, error in near_copies(base, other)}
    assert found.keys() == {(0, 0), (1, 1), (2, 2), (4, 4), (5, 5)}
    assert found[0, 0] == found[1, 1] == 0.0 and 2.0 < found[2, 2] < 4.1
    assert not near_copies(base[3:4], other[3:4], threshold=6.0, cells=1)


def test_pictures_that_look_alike_never_part() -> None:
    count = 400
    codes = [f"{1000 + i // 2:x}" for i in range(count)]
    styles = ["flat", "3d"] * (count // 2)
    draws = np.random.default_rng(0)
    copies = [(int(i), int(j), 1.0) for i, j in draws.integers(0, count, (60, 2))]
    split = split_emoji(codes, styles, copies, test_share=0.15, val_share=0.2)
    assert min(Counter(split).values()) > 10 and set(split) == {0, 1, 2}
    assert all(split[i] == split[j] for i, j, _ in copies)
    concepts = [concept_key(code) for code in codes]
    trained = {concepts[i] for i in range(count) if split[i] == 0}
    assert all(concepts[i] in trained for i in range(count) if split[i] == 1)
    assert not trained & {concepts[i] for i in range(count) if split[i] == 2}
    assert split == split_emoji(codes, styles, copies, test_share=0.15, val_share=0.2)


def test_hash_is_stable_and_even() -> None:
    assert unit_hash("emoji") == pytest.approx(0.9234543002192955)
    share = np.mean([unit_hash(str(i)) < 0.3 for i in range(2000)])
    assert 0.26 < share < 0.34


def test_shipped_splits_belong_to_the_recorded_pixels() -> None:
    split = shipped_splits(PIXELS_SHA256, 13661)
    assert np.bincount(split).tolist() == [12476, 791, 394]
    with pytest.raises(ValueError, match="splits are known for ef3b30f4d67e"):
        shipped_splits("0" * 64, 13661)
    with pytest.raises(ValueError, match=r"\(10 images\)"):
        shipped_splits(PIXELS_SHA256, 10)


def test_styles_are_named_alike_everywhere() -> None:
    from visar.data.emoji_build import STYLE_LICENCES, STYLE_WORDS

    assert list(STYLE_PACKAGES) == list(STYLE_WORDS) == list(STYLE_LICENCES)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("VISAR_EMOJI" not in os.environ, reason="VISAR_EMOJI names a built emoji64.zip")
def test_real_set_is_split_as_shipped() -> None:
    images, meta = read_emoji(os.environ["VISAR_EMOJI"])
    styles = [meta["styles"][int(style)] for style in meta["style"]]
    split = split_emoji(meta["hex"], styles, near_copies(images, images))
    assert split == shipped_splits(meta["pixels_sha256"], len(images)).tolist()
