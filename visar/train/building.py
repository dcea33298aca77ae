"""Making and copying models from a recipe's options."""

import json
from copy import deepcopy
from typing import Any

import torch
from torch import nn


def json_options(text: str) -> dict[str, Any]:
    """Constructor arguments given as JSON.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"model_options {text!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model_options {text!r}; needed: a JSON object such as '{{\"base_channels\": 48}}'")
    return values


def in_dtype(model: Any, dtype: str) -> Any:
    """A copy with contiguous weights in a dtype; modules that must stay float32 see to that themselves."""
    copy = deepcopy(model)
    nn.Module.to(copy, dtype=getattr(torch, dtype))
    nn.Module.to(copy, memory_format=torch.contiguous_format)
    return copy
