"""What a raster transformer is told: its prefix from classes, attributes, words or captions.

B images, R rows (2B when guided), P prefix positions, L positions of one call, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.core.condition import NULL_WORD, PADDING_WORD, Condition


class LabelPrefix(nn.Module):
    """Embedding of a label column; row `num_values` is the null label."""

    def __init__(self, num_values: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_values + 1, width)

    def forward(self, label_B: Tensor) -> Tensor:
        return self.embedding_table(label_B)


class CaptionPrefix(nn.Module):
    """Projection of a text encoder's features: fc2(gelu_tanh(fc1 x)); `uncond_embedding` stands for "no caption"."""

    def __init__(self, caption_width: int, caption_length: int, width: int) -> None:
        super().__init__()
        self.cap_proj = nn.ModuleDict(
            {"fc1": nn.Linear(caption_width, width, bias=False), "fc2": nn.Linear(width, width, bias=False)}
        )
        self.register_buffer("uncond_embedding", torch.randn(caption_length, caption_width) / caption_width**0.5)

    def forward(self, text_BTC: Tensor) -> Tensor:
        hidden = functional.gelu(self.cap_proj["fc1"](text_BTC), approximate="tanh")
        return self.cap_proj["fc2"](hidden)


def check_sizes(
    *,
    width: int,
    num_heads: int,
    num_classes: int,
    attributes: tuple[int, ...],
    word_vocab_size: int,
    num_words: int,
    words: str,
    caption_width: int,
) -> None:
    """Checks sizes and conditions; arguments as of `RasterGPT`.

    Raises:
        ValueError: no condition at all, or settings that exclude each other.
    """
    if caption_width and (num_classes or attributes or word_vocab_size):
        raise ValueError("captions of a text encoder exclude classes, attributes and words")
    if not (caption_width or num_classes or word_vocab_size):
        raise ValueError("a class (num_classes), words (word_vocab_size) or captions (caption_width) are needed")
    if words not in ("sum", "prefix"):
        raise ValueError(f"words {words!r}; choose sum or prefix")
    if width % num_heads or (width // num_heads) % 4:
        raise ValueError(f"width {width} / num_heads {num_heads} must be a multiple of 4")


def add_prefix(
    model: Any,
    *,
    width: int,
    num_classes: int,
    attributes: tuple[int, ...],
    word_vocab_size: int,
    num_words: int,
    words: str,
    caption_width: int,
    caption_length: int,
) -> None:
    """Makes the embeddings that `prefix` reads, and says how long the prefix is; arguments as of `RasterGPT`."""
    model.words_as_prefix = bool(word_vocab_size) and words == "prefix"
    model.prefix_length = caption_length if caption_width else 1 + (num_words if model.words_as_prefix else 0)
    if caption_width:
        model.cls_embedding = CaptionPrefix(caption_width, caption_length, width)
    elif num_classes:
        model.cls_embedding = LabelPrefix(num_classes, width)
    else:
        model.begin_embedding = nn.Parameter(torch.randn(width) * 0.02)
    model.attribute_embeddings = nn.ModuleList(LabelPrefix(size, width) for size in attributes)
    if word_vocab_size:
        model.word_embedding = nn.Embedding(word_vocab_size, width)
    if model.words_as_prefix:
        model.word_position = nn.Parameter(torch.randn(num_words, width) * 0.02)


def check_condition(config: Mapping[str, Any], condition: Condition) -> None:
    """See `RasterGPT.check_condition`; config is the model's. First tokens are refused."""
    condition.check_without_first()
    if config["caption_width"]:
        shape = (config["caption_length"], config["caption_width"])
        if condition.text_BTC is None or tuple(condition.text_BTC.shape[1:]) != shape:
            raise ValueError(f"this model is conditioned on text features [B, {shape[0]}, {shape[1]}]")
        return
    sizes = ([config["num_classes"]] if config["num_classes"] else []) + list(config["attributes"])
    if sizes:
        labels = condition.labels_BA
        if labels is None or labels.shape[1] != len(sizes):
            raise ValueError(f"this model is conditioned on labels [B, {len(sizes)}] with {sizes} values")
        if not labels.is_cuda:
            for column, size in enumerate(sizes):
                wrong = labels[(labels[:, column] < 0) | (labels[:, column] > size), column]
                if wrong.numel():
                    raise ValueError(f"label {int(wrong[0])} in column {column}; allowed: 0 ... {size} (null)")
    if config["word_vocab_size"]:
        words = condition.words_BT
        if words is None:
            raise ValueError(f"this model is conditioned on word ids [B, up to {config['num_words']}]")
        if words.shape[1] > config["num_words"]:
            raise ValueError(f"{words.shape[1]} words; this model reads up to {config['num_words']}")


def null_condition(model: Any, condition: Condition) -> Condition:
    """See `RasterGPT.null_condition`."""
    if model.config["caption_width"]:
        assert condition.text_BTC is not None
        text = model.cls_embedding.get_buffer("uncond_embedding").expand(condition.batch, -1, -1)
        return Condition(text_BTC=text.to(condition.text_BTC), text_mask_BT=condition.text_mask_BT)
    labels = words = None
    if condition.labels_BA is not None:
        sizes = ([model.config["num_classes"]] if model.config["num_classes"] else []) + list(
            model.config["attributes"]
        )
        labels = torch.tensor(sizes, device=condition.labels_BA.device).expand(condition.batch, -1)
    if condition.words_BT is not None:
        words = torch.zeros_like(condition.words_BT)
        words[:, 0] = NULL_WORD
    return Condition(labels_BA=labels, words_BT=words)


def example_condition(config: Mapping[str, Any], batch: int) -> Condition:
    """Some condition that a model of this configuration takes, for `batch` images, on the CPU."""
    if config.get("caption_width"):
        shape = (batch, config["caption_length"], config["caption_width"])
        return Condition(text_BTC=torch.ones(shape), text_mask_BT=torch.ones(shape[:2], dtype=torch.bool))
    columns = bool(config["num_classes"]) + len(config["attributes"])
    labels = torch.zeros(batch, columns, dtype=torch.int64) if columns else None
    words = torch.ones(batch, 1, dtype=torch.int64) if config["word_vocab_size"] else None
    return Condition(labels_BA=labels, words_BT=words)


def prefix(model: Any, condition: Condition) -> tuple[Tensor, Tensor | None]:
    """See `RasterGPT.prefix`."""
    if model.config["caption_width"]:
        assert condition.text_BTC is not None
        embedding = model.cls_embedding(condition.text_BTC.to(model.norm.weight.dtype))
        return embedding, None if condition.text_mask_BT is None else condition.text_mask_BT.bool()
    if model.config["num_classes"]:
        assert condition.labels_BA is not None
        label = model.cls_embedding(condition.labels_BA[:, 0])
    else:
        label = model.begin_embedding.expand(condition.batch, -1)
    first = 1 if model.config["num_classes"] else 0
    for column, embedding in enumerate(model.attribute_embeddings, first):
        assert condition.labels_BA is not None
        label = label + embedding(condition.labels_BA[:, column])
    if not model.config["word_vocab_size"]:
        return label[:, None], None
    assert condition.words_BT is not None
    words = functional.pad(condition.words_BT, (0, model.config["num_words"] - condition.words_BT.shape[1]))
    given = words != PADDING_WORD
    vectors = model.word_embedding(words)
    if not model.words_as_prefix:
        mean = (vectors * given[..., None]).sum(1) / given.sum(1, keepdim=True).clamp(min=1)
        return (label + mean.to(label.dtype))[:, None], None
    embedding = torch.cat([vectors + model.word_position, label[:, None]], dim=1)
    return embedding, functional.pad(given, (0, 1), value=True)


class ConditionVector(nn.Module):
    """One vector for everything an image is conditioned on: class, attributes and the mean of its words, added up.

    Args:
        width: D.
        num_classes: classes of label column 0; 0 = none (a learned vector takes its place).
        attributes: number of values of every further label column.
        word_vocab_size: size of the word table; 0 = no words.
    """

    def __init__(self, width: int, num_classes: int, attributes: tuple[int, ...], word_vocab_size: int) -> None:
        super().__init__()
        if not (num_classes or word_vocab_size):
            raise ValueError("a class (num_classes) or words (word_vocab_size) are needed")
        self.label_sizes = ((num_classes,) if num_classes else ()) + tuple(attributes)
        self.num_classes, self.word_vocab_size = num_classes, word_vocab_size
        if num_classes:
            self.class_emb = nn.Embedding(num_classes + 1, width)
        else:
            self.begin = nn.Parameter(torch.randn(width) * 0.02)
        self.attribute_emb = nn.ModuleList(nn.Embedding(size + 1, width) for size in attributes)
        if word_vocab_size:
            self.word_emb = nn.Embedding(word_vocab_size, width)

    def check(self, condition: Condition) -> None:
        """Checks that the condition has what the model reads.

        Raises:
            ValueError: labels are missing, have the wrong number of columns or a value outside the table; words are
                missing.
        """
        condition.check_without_first()
        sizes = self.label_sizes
        if sizes:
            labels = condition.labels_BA
            if labels is None or labels.shape[1] != len(sizes):
                raise ValueError(f"this model is conditioned on labels [B, {len(sizes)}] with {list(sizes)} values")
            if not labels.is_cuda:
                for column, size in enumerate(sizes):
                    wrong = labels[(labels[:, column] < 0) | (labels[:, column] > size), column]
                    if wrong.numel():
                        raise ValueError(f"label {int(wrong[0])} in column {column}; allowed: 0 ... {size} (null)")
        if self.word_vocab_size and condition.words_BT is None:
            raise ValueError("this model is conditioned on word ids [B, T]")

    def null(self, condition: Condition) -> Condition:
        """The condition "nothing given" for as many images, in the same shapes."""
        labels = words = None
        if condition.labels_BA is not None:
            sizes = torch.tensor(self.label_sizes).to(condition.labels_BA.device, non_blocking=True)
            labels = sizes.expand(condition.batch, -1)
        if condition.words_BT is not None:
            words = torch.zeros_like(condition.words_BT)
            words[:, 0] = NULL_WORD
        return Condition(labels_BA=labels, words_BT=words)

    def forward(self, condition: Condition) -> Tensor:
        """float [R, D]."""
        columns = [] if condition.labels_BA is None else list(condition.labels_BA.unbind(1))
        if self.num_classes:
            vector = self.class_emb(columns.pop(0))
        else:
            vector = self.begin.expand(condition.batch, -1)
        for label_R, embedding in zip(columns, self.attribute_emb, strict=True):
            vector = vector + embedding(label_R)
        if self.word_vocab_size:
            words_RT = condition.words_BT
            assert words_RT is not None
            given = torch.ne(words_RT, PADDING_WORD)[..., None]
            total = (self.word_emb(words_RT) * given).sum(1)
            vector = vector + total / given.sum(1).clamp(min=1).to(total.dtype)
        return vector
