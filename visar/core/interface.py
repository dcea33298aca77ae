"""What samplers, drafters and pipelines need of models: one protocol per capability.

A model has a capability if it has the calls, whatever its class: `isinstance(model, Windowed)` asks for that. See
docs/design.md for what the calls mean. Submodules are named for type checkers only: isinstance does not see them.

B batch, R rows (2B when guided), N tokens, K drafted tokens, L positions of one call, D hidden size, V codes, C code
width.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.noise import Noise
from visar.core.window import DraftTree, Window

Callback = Callable[[int, Tensor], bool | None]
"""Called by a sampler's loop with the number of tokens that all images have, and the tokens [B, N] (0 where none is).

If it returns True the sampling ends, and the sampler returns the tokens that all images have by then.
"""


@runtime_checkable
class Generator(Protocol):
    """A model that decodes tokens from a state that it is given.

    Attributes:
        config: constructor arguments.
        num_tokens: N, tokens of an image.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def num_tokens(self) -> int: ...

    def null_condition(self, condition: Condition) -> Condition: ...

    def example_condition(self, batch: int) -> Condition: ...

    def start(self, condition: Condition, guidance: Guidance = ..., *, state: Any = None) -> Any: ...


@runtime_checkable
class Categorical(Generator, Protocol):
    """A generator that predicts the codes of block after block.

    `positions` says where the next block's tokens stand in the tokenizer's order, int64 [1 or B, K]; `result` gives
    the image's tokens int64 [B, N] in that order, 0 where none is committed yet.

    Attributes:
        block_sizes: tokens of every block.
        block_kinds: blocks of one kind do the same work (visar/core/runtime.py).
    """

    @property
    def block_sizes(self) -> tuple[int, ...]: ...

    @property
    def block_kinds(self) -> tuple[Any, ...]: ...

    def predict(self, state: Any) -> Tensor: ...

    def positions(self, state: Any) -> Tensor: ...

    def append(self, state: Any, tokens_BL: Tensor) -> None: ...

    def result(self, state: Any) -> Tensor: ...


@runtime_checkable
class Windowed(Generator, Protocol):
    """A generator of one token per step that also verifies drafted windows, with a length of its own for every row."""

    def start(
        self,
        condition: Condition,
        guidance: Guidance = ...,
        *,
        ragged: bool = False,
        window: int = 0,
        state: Any = None,
    ) -> Any: ...

    def verify(self, state: Any, draft_BK: Tensor) -> Tensor: ...

    def commit(self, state: Any, tokens_BK: Tensor, count_B: Tensor) -> None: ...


@runtime_checkable
class Trees(Windowed, Protocol):
    """A generator that also verifies drafted trees."""

    def verify_tree(self, state: Any, tree: DraftTree) -> Tensor: ...

    def commit_path(self, state: Any, slots_BK: Tensor, tokens_BL: Tensor, count_B: Tensor) -> None: ...


@runtime_checkable
class TokenHead(Protocol):
    """What draws continuous tokens given hidden vectors; see visar/layers/heads/chain.py.

    Attributes:
        channels: numbers of a token.
        noisy_end: whether the last transition of a draw adds its noise.
        silent_solvers: solvers of a draw that add no noise.
    """

    channels: int
    noisy_end: bool
    silent_solvers: tuple[str, ...]

    def check_steps(self, steps: int | None, solver: str | None = None) -> int: ...

    def deviations(self, steps: int) -> list[float] | None: ...

    def start(self, noise_BLC: Tensor) -> Tensor: ...

    def transition(
        self,
        x_BLC: Tensor,
        index: int,
        features_RLD: Tensor,
        *,
        steps: int | None = None,
        scale_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | float]: ...

    def draw(
        self,
        features_RLD: Tensor,
        noise: Callable[[int], Tensor],
        *,
        steps: int | None = None,
        temperature: float = 1.0,
        scale_BL: Tensor | None = None,
        solver: str | None = None,
    ) -> Tensor: ...


@runtime_checkable
class DensityHead(TokenHead, Protocol):
    """A head whose distribution of a token is known in closed form: see `MixtureLaw` of visar/layers/heads/mixture.py.

    Attributes:
        components: of its mixtures.
    """

    components: int

    def law(self, features_RLD: Tensor, *, temperature: float = 1.0, scale_BL: Tensor | None = None) -> Any: ...


@runtime_checkable
class Continuous(Generator, Protocol):
    """A generator of tokens that are vectors, one per step, with a length of its own for every row of a ragged state.

    Attributes:
        block_sizes, block_kinds: see Categorical.
        token_head: draws a token given its hidden vector.
    """

    @property
    def block_sizes(self) -> tuple[int, ...]: ...

    @property
    def block_kinds(self) -> tuple[Any, ...]: ...

    @property
    def token_head(self) -> TokenHead: ...

    def start(
        self,
        condition: Condition,
        guidance: Guidance = ...,
        *,
        ragged: bool = False,
        window: int = 0,
        state: Any = None,
    ) -> Any: ...

    def features(self, state: Any, window: Window | None = None) -> Tensor: ...

    def scales(self, state: Any, count: int) -> Tensor | None: ...

    def positions(self, state: Any) -> Tensor: ...

    def append(self, state: Any, tokens_BLC: Tensor) -> None: ...

    def commit(self, state: Any, tokens_BKC: Tensor, count_B: Tensor) -> None: ...

    def result(self, state: Any) -> Tensor: ...


@runtime_checkable
class Masked(Generator, Protocol):
    """A generator of tokens that are vectors, any of them given any others.

    Attributes:
        token_head: draws a token given its hidden vector.
    """

    @property
    def token_head(self) -> TokenHead: ...

    def features_at(self, state: Any, visible_BK: Tensor, places_BL: Tensor) -> Tensor: ...

    def commit_at(self, state: Any, places_BL: Tensor, tokens_BLC: Tensor) -> None: ...


@runtime_checkable
class OneStep(Protocol):
    """A student that predicts all tokens from noise in one pass.

    Attributes:
        config: constructor arguments; starts, sharpness, output and late are read.
        num_tokens: N.
        codes: code vectors [V, C] in the scale of the noise.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def codes(self) -> Tensor: ...

    def check_condition(self, condition: Condition) -> None: ...

    def first_token(self, block: int) -> int: ...

    def latents(self, vectors_BNC: Tensor) -> Tensor: ...

    def __call__(self, vectors_BNC: Tensor, known: Tensor, condition: Condition) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class FineSampling:
    """How the second stage of a generator is sampled.

    Attributes:
        temperature: > 0; 1.0 = off.
        top_k, top_p: of the codes of a label's cluster; 0 and 1.0 = off.
        guidance_scale: strength of classifier-free guidance; 1.0 = off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance_scale: float = 1.0


@runtime_checkable
class Staged(Generator, Protocol):
    """A generator of two stages: labels one by one, by a generator of their own, and then all codes in one pass.

    Samplers run on the first stage as on any other generator, and draw the codes behind it; see
    visar/samplers/stages.py. `start` begins the second stage. `fine_logits` are those of all codes given all labels of
    some of the images; `preview` gives a code for every label, to show it by; `centres` a vector for every label.

    Attributes:
        fine_sampling: how the second stage is sampled.
    """

    @property
    def fine_sampling(self) -> FineSampling: ...

    def fine_logits(self, state: Any, labels_BN: Tensor, first: int = 0) -> Tensor: ...

    def preview(self, labels: Tensor) -> Tensor: ...

    def centres(self, codebook_VC: Tensor) -> Tensor: ...

    if TYPE_CHECKING:

        @property
        def coarse(self) -> Any:
            """The generator of the labels."""


def first_stage(generator: Any) -> Any:
    """What samplers run on: the generator of the labels of one of two stages, else the generator itself."""
    return generator.coarse if isinstance(generator, Staged) else generator


@runtime_checkable
class Features(Generator, Protocol):
    """A generator that shows its last hidden vectors, for the drafters that are trained on them."""

    def embed(self, tokens_BL: Tensor) -> Tensor: ...

    def hidden(self, tokens_BN: Tensor, condition: Condition) -> Tensor: ...

    def features(self, state: Any, window: Window | None = None) -> Tensor: ...

    def guided_logits(self, state: Any, features_RLD: Tensor, place_BL: Tensor | None = None) -> Tensor: ...

    if TYPE_CHECKING:

        @property
        def output(self) -> Any:
            """The linear layer from hidden vectors to logits."""


@runtime_checkable
class Scales(Categorical, Protocol):
    """A generator whose blocks are the scales of a pyramid, coarse to fine.

    Attributes:
        scales: (height, width) of every scale.
        ends: number of tokens up to the end of every scale.
    """

    @property
    def scales(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def ends(self) -> tuple[int, ...]: ...

    def start(
        self,
        condition: Condition,
        guidance: Guidance = ...,
        *,
        state: Any = None,
        first_scale: int = 0,
        last_scale: int | None = None,
        history: Any = None,
    ) -> Any: ...

    def begin_of(self, scale: int) -> int: ...

    def append(self, state: Any, tokens_BL: Tensor, codes_BLC: Tensor | None = None) -> None: ...

    def commit_map(self, state: Any, tokens_BL: Tensor, map_BChw: Tensor) -> None: ...

    if TYPE_CHECKING:

        @property
        def pyramid(self) -> Any:
            """Codebook and convolutions of its tokenizer (`ScalePyramid`)."""


@runtime_checkable
class Refining(Scales, Protocol):
    """A generator over scales that also predicts a scale's hidden tokens from those that are shown."""

    def refine(self, state: Any, tokens_BL: Tensor, masked_BL: Tensor, guidance_scale: float = 1.0) -> Tensor: ...


@dataclass(frozen=True)
class TokenLayout:
    """How a tokenizer arranges an image's tokens.

    Attributes:
        shapes: of every map of tokens, coarse to fine: (height, width), with the number of frames before it for a box,
            or (length,) for a sequence.
        arrangement: "grid" (one map, in raster order), "scales" (several maps, coarse to fine), "sequence" (tokens
            without places in the image) or "box" (one map of several frames).
        vocab_size: number of codes; 0 for tokens that are vectors of floats.
        channels: width of a code or of such a vector.
        previews: numbers of leading tokens that decode to an image of their own, ascending; empty where only all
            tokens do.
    """

    shapes: tuple[tuple[int, ...], ...]
    arrangement: Literal["grid", "scales", "sequence", "box"]
    vocab_size: int
    channels: int
    previews: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of every map."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return sum(self.sizes)


@runtime_checkable
class Tokenizer(Protocol):
    """Images to tokens and back.

    Attributes:
        config: constructor arguments.
        layout: how tokens are arranged.
        downsampling: pixels per side of a position of the finest grid; of a sequence, the height of the image.
        dtype, training, parameters: as every module has them.
    """

    training: bool

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def layout(self) -> TokenLayout: ...

    @property
    def downsampling(self) -> int: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode(self, image_BCHW: Tensor) -> Tensor: ...

    def latents(self, tokens_BN: Tensor, grid: tuple[int, int] | None = None) -> Tensor: ...

    def decode_latents(self, latent_BChw: Tensor) -> Tensor: ...

    def decode(self, tokens_BN: Tensor) -> Tensor: ...

    if TYPE_CHECKING:

        @property
        def codebook(self) -> Tensor:
            """Code vectors [V, C] as looked up, of tokenizers whose tokens are ids."""
            ...


@runtime_checkable
class Drawing(Tokenizer, Protocol):
    """A tokenizer whose decoder draws: an image is a function of its tokens and of the noise that it begins with.

    `decode_latents` and `decode` raise ValueError where they get no noise.
    """

    def starting_noise(self, noise: Noise, size: tuple[int, int] | None = None) -> Tensor: ...

    def decoding_values(self, batch: int) -> int: ...

    def decode_latents(self, latent_BChw: Tensor, noise_BCHW: Tensor | None = None) -> Tensor: ...

    def decode(
        self, tokens_BN: Tensor, grid: tuple[int, int] | None = None, *, noise: Tensor | None = None
    ) -> Tensor: ...


class Stream(Protocol):
    """Decoding of images while their tokens still come.

    `feed` takes the next tokens [B, L] and gives the images that they complete, see `TokenLayout.previews`; None where
    they complete none.

    Attributes:
        steps: steps of the decoder so far.
        num_tokens: tokens so far.
    """

    steps: int
    num_tokens: int

    def feed(self, tokens_BL: Tensor) -> Tensor | None: ...


@runtime_checkable
class Streaming(Drawing, Protocol):
    """A tokenizer that decodes tokens as they come, at no more cost than all of them at once."""

    def stream(self, noise_BCHW: Tensor) -> Stream: ...


if TYPE_CHECKING:

    class _Saved(nn.Module):
        @property
        def device(self) -> torch.device: ...

        @property
        def dtype(self) -> torch.dtype: ...

        def save_pretrained(self, save_directory: str | os.PathLike[str], **settings: Any) -> None: ...

    class TokenizerModel(_Saved, Tokenizer):
        """A tokenizer that is a module and can be saved, for type checkers."""

    class GeneratorModel(_Saved, Categorical):
        """A generator that is a module and can be saved, for type checkers; students of one step have fewer calls."""

else:
    TokenizerModel = GeneratorModel = nn.Module
