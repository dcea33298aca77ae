"""Names, words and the law of open conditions."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from visar.data.vocabulary import Vocabulary, build_vocabulary, pack_numbers, split_words, unpack_numbers

ATTRIBUTES = {
    "class": ("animals/cat", "animals/dog", "food/other", "smileys/other"),
    "style": ("flat", "3d"),
}
LABELS = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [2, 1], [3, 0]])
CAPTIONS = [
    "Black cat, flat style",
    "black cat, 3d style",
    "cat’s paw, 3d style",
    "dog, flat style",
    "slice of pie, 3d style",
    "grin, flat style",
]


@pytest.fixture
def vocabulary() -> Vocabulary:
    return build_vocabulary(ATTRIBUTES, LABELS, CAPTIONS, np.arange(5))


def equal(a: Vocabulary, b: Vocabulary) -> bool:
    same = (a.attributes, a.words, a.num_words, a.texts) == (b.attributes, b.words, b.num_words, b.texts)
    return same and np.array_equal(a.rows, b.rows)


def test_words_are_split_and_small_ones_left_out() -> None:
    assert split_words("A slice of PIE, the cat’s e-mail: 3D style") == ["slice", "pie", "cat’s", "e", "mail", "3d"]


@pytest.mark.parametrize("text", ["cat’s piñata", "cat's pinata", "Cat’s pin\u0303ata", "cät’s piñata"])
def test_apostrophes_and_accents_may_be_written_either_way(text: str) -> None:
    known = build_vocabulary({"class": ("a",)}, np.zeros((1, 1), np.int64), ["cat’s piñata"], np.arange(1))
    assert [known.words[number] for number in known.encode_text(text)] == ["cat’s", "piñata"]


def test_a_word_goes_before_the_plain_spelling_of_another() -> None:
    known = build_vocabulary({"class": ("a",)}, np.zeros((1, 1), np.int64), ["rose rosé"], np.arange(1))
    assert [known.words[number] for number in known.encode_text("rosé rose")] == ["rosé", "rose"]


@pytest.mark.parametrize(
    "numbers", [[], [7], [5, 5, 5, 6], [0, 1, 2, 3], [-1, -1, 4, 0, 0, 0], np.random.default_rng(0).integers(0, 9, 99)]
)
def test_packed_numbers_come_back(numbers: list[int]) -> None:
    assert unpack_numbers(pack_numbers(list(numbers))).tolist() == list(numbers)


@pytest.mark.parametrize("text", ["1 2y3", "x4", "1.5"])
def test_text_that_is_not_packed_numbers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not packed numbers"):
        unpack_numbers(text)


def test_json_round_trip(vocabulary: Vocabulary) -> None:
    assert equal(Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))), vocabulary)


@pytest.mark.parametrize("captions", [["", ", x", "x", "a, b, c", "x,", " y"], None])
def test_json_round_trip_of_odd_captions_and_of_none(captions: list[str] | None) -> None:
    vocabulary = build_vocabulary({"class": ("a",)}, np.zeros((6, 1), np.int64), captions, np.arange(6))
    assert equal(Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))), vocabulary)


def test_plain_lists_are_read_too(vocabulary: Vocabulary) -> None:
    values = vocabulary.to_dict() | {"texts": list(vocabulary.texts), "columns": vocabulary.rows.T.tolist()}
    assert equal(Vocabulary.from_dict(values), vocabulary)


def test_labels_by_name_short_name_and_number(vocabulary: Vocabulary) -> None:
    names: list = ["animals/dog", "Animals/DOG ", "dog", 1, np.int64(1), torch.tensor(1)]
    for name in names:
        assert vocabulary.label_id("class", name) == 1
    assert vocabulary.null_labels == (4, 2)


@pytest.mark.parametrize(
    ("column", "name", "message"),
    [
        ("class", "dgo", "unknown class 'dgo'; nearest: .*dog"),
        ("class", "other", "fits several: food/other, smileys/other"),
        ("class", 4, "class 4; the numbers are 0 ... 3"),
        ("class", -1, "class -1"),
        ("class", 1.5, "class 1.5; give a name or a whole number"),
        ("tone", "dark", "unknown attribute 'tone'; this model has class, style"),
    ],
)
def test_unknown_labels_are_explained(vocabulary: Vocabulary, column: str, name: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocabulary.label_id(column, name)


def test_text_becomes_words_and_padding(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode_texts(["Black Cat", "dog"])
    assert ids.shape == (2, vocabulary.num_words) and ids.dtype == torch.int64
    words = [[vocabulary.words[i] for i in row if i] for row in ids.tolist()]
    assert words == [["black", "cat"], ["dog"]]


def test_empty_text_is_not_given(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode_texts([""]).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("black kat", "does not know: 'kat'; nearest: cat"),
        ("of the", "no word"),
        ("dog dog dog dog", "4 words; this model reads up to 3"),
    ],
)
def test_unreadable_texts_are_explained(vocabulary: Vocabulary, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocabulary.encode_text(text)


def drawn(vocabulary: Vocabulary, count: int = 600, **given: object) -> Counter:
    uniform_B = (torch.arange(count) + 0.5) / count
    condition, texts = vocabulary.complete(uniform_B, **given)  # type: ignore[arg-type]
    assert condition.labels_BA is not None and condition.words_BT is not None
    assert condition.words_BT.tolist() == [vocabulary.encode_texts([text]).tolist()[0] for text in texts_of(texts)]
    return Counter(zip(map(tuple, condition.labels_BA.tolist()), texts_of(texts), strict=True))


def texts_of(descriptions: list[str]) -> list[str]:
    return [text.partition(", ")[2] for text in descriptions]


def test_nothing_given_follows_the_training_rows(vocabulary: Vocabulary) -> None:
    rows = Counter(((a, b), CAPTIONS[i]) for i, (a, b) in enumerate(LABELS[:5].tolist()))
    assert drawn(vocabulary) == Counter({row: 120 * count for row, count in rows.items()})


def test_what_is_left_open_follows_the_rows_that_fit(vocabulary: Vocabulary) -> None:
    cats = drawn(vocabulary, class_labels=["cat"] * 600)
    assert cats == {((0, i > 0), CAPTIONS[i]): 200 for i in range(3)}
    flat = drawn(vocabulary, class_labels=[0] * 600, attributes={"style": "3d"})
    assert flat == {((0, 1), CAPTIONS[1]): 300, ((0, 1), CAPTIONS[2]): 300}


def test_each_image_depends_on_its_own_number(vocabulary: Vocabulary) -> None:
    uniform_B = torch.rand(7, generator=torch.Generator().manual_seed(0))
    together, texts = vocabulary.complete(uniform_B)
    for i in range(7):
        alone, text = vocabulary.complete(uniform_B[i : i + 1])
        assert text == texts[i : i + 1]
        assert alone.labels_BA is not None and together.labels_BA is not None
        assert torch.equal(alone.labels_BA[0], together.labels_BA[i])


def test_prompts_set_words_only(vocabulary: Vocabulary) -> None:
    condition, texts = vocabulary.complete(torch.tensor([0.5]), prompts=["black dog"])
    assert condition.labels_BA is None and texts == ["black dog"]
    assert condition.words_BT is not None and condition.words_BT.equal(vocabulary.encode_texts(["black dog"]))


def test_conditions_that_cannot_be_met_are_explained(vocabulary: Vocabulary) -> None:
    half = torch.tensor([0.5])
    with pytest.raises(ValueError, match="no training image has style '3d'.*they occur with: flat"):
        vocabulary.complete(half, class_labels=["dog"], attributes={"style": "3d"})
    with pytest.raises(ValueError, match="no training image has class 'smileys/other'"):
        vocabulary.complete(half, class_labels=["smileys/other"])
    with pytest.raises(ValueError, match="put attributes into its words"):
        vocabulary.complete(half, prompts=["dog"], attributes={"style": "3d"})
    with pytest.raises(ValueError, match="2 class labels for 1 images"):
        vocabulary.complete(half, class_labels=["dog", "cat"])


def test_without_rows_classes_are_drawn_alike_and_the_rest_is_open() -> None:
    names = Vocabulary(ATTRIBUTES)
    condition, texts = names.complete((torch.arange(8) + 0.5) / 8)
    assert condition.labels_BA is not None and condition.words_BT is None
    assert condition.labels_BA.tolist() == [[i // 2, 2] for i in range(8)]
    assert texts[0] == "animals/cat"
    condition, _ = names.complete(torch.tensor([0.9]), class_labels=["dog"], attributes={"style": "3d"})
    assert condition.labels_BA is not None and condition.labels_BA.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"attributes": {"style": ("flat",)}}, "first label column is 'style'"),
        ({"attributes": {"class": ("a",)}, "words": ("cat", "dog")}, "a word table begins"),
        ({"attributes": {"class": ("a",)}, "rows": np.zeros((2, 4), np.int32)}, "rows of shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Vocabulary(**parts)
