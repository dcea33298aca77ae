"""The interface of drafters, which propose tokens, and the functions that they share.

A drafter object holds weights or settings; `start` opens a drafting for one batch, whose tensors live in the sampler's
session. For every pass the sampler calls `begin` once, which catches up with the committed tokens and returns the
distribution of the next position, and then `extend` (a chain) or `extend_tree` (a level of a tree) for the
distributions behind the drafts. Whatever the distributions are, speculation stays exact, because each draft is
verified against the distribution it was drawn from. Only a drafter that looks at other images would break the rule
that an image depends on its own seed.

B batch, J drafts so far, W nodes of a level, L slots of a pass, R rows (2B when guided), D hidden size, V codes, N
tokens.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import Guidance
from visar.core.interface import Features, Generator
from visar.core.runtime import Session
from visar.core.window import DraftTree


@dataclass(frozen=True)
class Target:
    """The generator that a drafter proposes tokens to, and the settings of the call.

    Attributes:
        model, state: the generator and its decoding state.
        condition, guidance: of the call.
        window: most tokens that are drafted in a pass; depth: most of them one after another.
        filters: temperature, top_k and top_p, which drafters of the same kind of distribution apply too.
        chain: whether a pass's tokens all follow one another.
    """

    model: Any
    state: Any
    condition: Condition
    guidance: Guidance
    window: int
    depth: int
    filters: tuple[float, int, float]
    chain: bool = True


@dataclass
class Kept:
    """Decoding states that a session keeps for its next call: the target's, and the drafter's if it has one."""

    target: Any = None
    drafter: Any = None


class Drafting(Protocol):
    """A drafter at work on one batch.

    Attributes:
        reads_features: whether `observe` needs the target's hidden vectors.
    """

    reads_features: bool

    def calls(self, depth: int) -> int:
        """Forward passes of a model that drafting to this depth takes; 0 when no model is run."""
        ...

    def begin(self) -> Tensor:
        """Distribution float32 [B, V] of the position after the committed tokens."""
        ...

    def extend(self, draft_BJ: Tensor) -> Tensor:
        """Distribution float32 [B, V] of the position after J drafts."""
        ...

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        """Distributions float32 [B, W, V] behind the nodes from slot `first` on: the last level, all at `depth`."""
        ...

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        """Takes what the target's pass showed, before the next `begin`.

        start_B: tokens that were committed before the pass; count_B: tokens it committed; features_RLD: the target's
        hidden vectors, row j of which predicted position start + j; None unless reads_features.
        """
        ...


@runtime_checkable
class Drafter(Protocol):
    """A source of drafts that can start drafting for a batch."""

    def key(self) -> tuple:
        """Everything that a captured pass depends on besides the target."""
        ...

    def start(self, session: Session, kept: Kept, target: Target) -> Drafting:
        """Opens a drafting.

        Raises:
            ValueError: the drafter does not fit the target.
        """
        ...


def check_fit(drafter: Generator, model: Generator) -> None:
    """Checks that two models have the same vocabulary and grid of tokens.

    Raises:
        ValueError: they have different vocabularies or grids.
    """
    if "grid" not in drafter.config:
        raise ValueError(f"a {type(drafter).__name__} cannot draft here; a drafter must draw one token per step too")
    ours, theirs = ((m.config["vocab_size"], tuple(m.config["grid"])) for m in (drafter, model))
    if ours != theirs:
        raise ValueError(f"the drafter's vocabulary and grid are {ours}, the generator's {theirs}; they must agree")


def weights_key(module: Any) -> tuple[int, int]:
    """Tells a module, and where its weights are, from others; see Drafter.key."""
    return id(module), hash(tuple(parameter.data_ptr() for parameter in module.parameters()))


def target_digest(model: Features) -> str:
    """Tells a target from others: 16 hexadecimal digits of the sha256 of some rows of its output head.

    The rows are rounded to bfloat16 first, so that it does not matter whether they were loaded in that or in float32.
    """
    rows = model.output.weight[:64].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def check_features(drafter: Any, model: Generator) -> None:
    """Checks that a drafter can read a target's hidden vectors, and was trained on this one's if it says so.

    Raises:
        ValueError: the target shows none, has another hidden size, or is not the one that the drafter was trained on.
    """
    if not isinstance(model, Features):
        raise ValueError(f"this drafter reads hidden vectors, which {type(model).__name__} does not show")
    check_fit(drafter, model)
    if drafter.config["width"] != model.config["width"]:
        raise ValueError(
            f"the drafter's hidden size is {drafter.config['width']}, the generator's {model.config['width']}"
        )
    digest = drafter.config["target_digest"]
    if digest and digest != target_digest(model):
        raise ValueError(
            f"the drafter was trained for {drafter.config['target'] or 'another generator'} (weights {digest}); the "
            f"weights of this generator are {target_digest(model)}"
        )


def probs_or_uniform(probs_BV: Tensor, known_B: Tensor) -> Tensor:
    """The distribution where hidden vectors are known, else the uniform one (in the first pass there are none)."""
    return torch.where(known_B[:, None], probs_BV, 1.0 / probs_BV.shape[-1])
