"""Names of layers that hold under any head.

A checkpoint of `LlamaForCausalLM` has `model.layers.0.mlp.up_proj`, which is `layers.0.mlp.up_proj`
to whoever loads it with `AutoModel`. A quantization config names layers as patterns of the second,
after any prefix.
"""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

_ANY_PREFIX = r"(?:.*\.)?"


class Names:
    """The names that the modules of one model have under other heads.

    Args:
        model: The model; it may be empty.
    """

    def __init__(self, model: PreTrainedModel):
        self._base = getattr(model, "base_model_prefix", "")
        leaves = [name for name, module in model.named_modules() if not isinstance(module, _LISTS)]
        counts: dict[str, int] = {}
        for name in leaves:
            parts = name.split(".")
            for first in range(len(parts)):
                suffix = ".".join(parts[first:])
                counts[suffix] = counts.get(suffix, 0) + 1
        self._counts = counts

    def inner(self, name: str) -> str:
        """Return the name of a module in the model without its head.

        Args:
            name: The name in the model.
        """
        return name.removeprefix(f"{self._base}.") if self._base else name

    def is_unique(self, name: str) -> bool:
        """Return whether no other module of the model has a name that ends with the inner name.

        Args:
            name: The name in the model.
        """
        return self._counts.get(self.inner(name), 0) == 1

    def spellings(self, name: str) -> list[str]:
        """Return the names with and without a head, the model's own first.

        Args:
            name: The name in the model.
        """
        inner = self.inner(name)
        outer = f"{self._base}.{inner}" if self._base else inner
        return list(dict.fromkeys([name, inner, outer]))


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def suffix_pattern(name: str) -> str:
    """Return the regular expression of all names that end with this one.

    Args:
        name: An inner name.
    """
    return f"{_ANY_PREFIX}{re.escape(name)}$"


def suffix_of(pattern: str) -> str | None:
    """Return the name that `suffix_pattern` made a pattern of, or None if it made no such pattern.

    Args:
        pattern: Text from a file that nobody has checked; it is never run as a pattern, because
            one could take forever.
    """
    name = re.sub(r"\\(.)", r"\1", pattern.removeprefix(_ANY_PREFIX).removesuffix("$"))
    return name if pattern == suffix_pattern(name) else None


def ends_with(name: str, suffix: str) -> bool:
    """Return whether a name is another one after any prefix.

    Args:
        name: The name.
        suffix: The other one.
    """
    return name == suffix or name.endswith(f".{suffix}")
