"""Teach stock transformers to load formats whose layers are bytes under the names of their weights.

`import optimum_order` registers the method `optimum_order`, for every encoding of ours, as soon as
transformers knows about quantization. A plug-in registers its own format. What is loaded is an
ordinary dense model, which knows nothing of how it was stored: it can be run, trained, saved and
compressed like any other.
"""

from __future__ import annotations

from torch import Tensor

from optimum_order.errors import ArtifactError, unknown
from optimum_order.formats import coded, sparse
from optimum_order.models.quantizer import METHOD, DecodeWeight, register

__all__ = ["METHOD", "DecodeWeight", "decode", "register"]

_ENCODINGS: dict[str, DecodeWeight] = {
    coded.Coded.name: coded.decode_weight,
    sparse.Sparse.name: sparse.decode_weight,
}


def decode(encoding: str, payload: Tensor) -> Tensor:
    """Return the weight (out, in) that the bytes of a layer stand for.

    Args:
        encoding: What the bytes are; the key in `quantization_config`, which nobody has checked.
        payload: (bytes,) uint8, on the CPU.

    Raises:
        ArtifactError: If the encoding is not known, or the bytes do not fit together.
    """
    if encoding not in _ENCODINGS:
        raise ArtifactError(unknown("encoding", str(encoding), _ENCODINGS))
    return _ENCODINGS[encoding](payload)
