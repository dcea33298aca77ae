"""Images of the tokens that are there, while the others are still drawn."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visar.core.interface import Streaming
from visar.tokenizers.decoding import BatchStream, decoder_noise


def check_previews(pipeline: Any) -> None:
    """Checks that some of the first tokens of a pipeline's images make images of their own.

    Raises:
        ValueError: only all tokens do.
    """
    layout = pipeline.tokenizer.layout
    if not layout.previews:
        raise ValueError(
            "for previews a model over scales is needed (VAR, HMAR), or one of a diffusion tokenizer (D-AR); the "
            f"tokens of this one are a {layout.arrangement}"
        )


class Previews:
    """The images of a batch as its tokens come. A tokenizer that streams carries its decoding from one to the next;
    others decode anew.

    Args:
        pipeline: an `ImagePipeline`.
        seeds: of the images; needed where the tokenizer's decoder draws.

    Raises:
        ValueError: see `check_previews`, or no seeds where they are needed.
    """

    def __init__(self, pipeline: Any, seeds: Sequence[int] | None) -> None:
        check_previews(pipeline)
        self._pipeline, self._seeds, self._shown = pipeline, seeds, 0
        self._stream: BatchStream | None = None
        self._image_BCHW: Tensor | None = None
        tokenizer = pipeline.tokenizer
        if isinstance(tokenizer, Streaming):
            noise = decoder_noise(tokenizer, seeds, pipeline.device)
            assert noise is not None
            self._stream = BatchStream(tokenizer, noise, pipeline._invariant())

    def update(self, done: int, tokens_BN: Tensor) -> tuple[int, Tensor] | None:
        """The images [B, C, H, W] in [-1, 1] of the most tokens that give some, and their number; None where nothing
        is new.

        Args:
            done: tokens that all images have.
            tokens_BN: ids; those from `done` on are not read.
        """
        newest = max((end for end in self._pipeline.tokenizer.layout.previews if end <= done), default=0)
        if newest <= self._shown:
            return None
        if self._stream is None:
            made_BCHW = self._pipeline.decode(tokens_BN[:, :newest], self._seeds)
        else:
            with self._pipeline._fetched(self._pipeline.tokenizer):
                streamed_BCHW = self._stream.feed(tokens_BN[:, self._shown : newest])
            assert streamed_BCHW is not None
            made_BCHW = streamed_BCHW.float().clamp(-1.0, 1.0)
        self._shown, self._image_BCHW = newest, made_BCHW
        return newest, made_BCHW

    def whole(self, tokens_BN: Tensor) -> Tensor | None:
        """The images of all tokens [B, N], where the stream has made them with the bits that decoding has."""
        # Sampling may have put its own products in the place of torch's.
        if self._stream is None or self._shown != tokens_BN.shape[1] or self._pipeline._invariant():
            return None
        return self._image_BCHW
