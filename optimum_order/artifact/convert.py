"""An artifact in another format: the same values, and the same account of how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimum_order import formats
from optimum_order.artifact import folder as artifact
from optimum_order.artifact import manifest
from optimum_order.artifact.folder import SHARD
from optimum_order.artifact.loading import load
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats import Codec, Contents
from optimum_order.formats.transcode import needs_transcoding, transcode
from optimum_order.models.documents import documents
from optimum_order.models.source import load_processor


def convert(
    folder: str | Path,
    path: str | Path,
    format: str = "auto",
    *,
    overwrite: bool = False,
    unproven: bool = False,
    engine: str | None = None,
    max_shard_size: str = SHARD,
) -> dict[str, Any]:
    """Save an artifact in another format, every weight with the value it has, to the bit.

    The manifest stays as it is, apart from what it says of the files, and without metrics that were
    measured on kernels that do not run the new format. What the old format did not store is not
    made up: the grid of a layer that was stored dense, and its mask unless "sparse" stored it, or
    exactly as many of its weights are zero as were pruned.

    Layers with steps of their own for their columns, as ecsq makes them, have one scale for each
    row in stock formats: powers of two move from the columns into the norm or the layer that makes
    the input, and the model computes the same bits.

    Args:
        folder: The artifact; it has to be what its manifest says.
        path: The folder to write.
        format: Name of a format, or "auto" for the smallest that holds every layer exactly.
        overwrite: Whether a folder that is not empty may be replaced.
        unproven: Whether the format may be one that is not proven to load for this architecture.
        engine: The engine that is to load the folder.
        max_shard_size: The most that one weight file may take, such as "5GB".

    Returns:
        The new manifest.

    Raises:
        ArtifactError: If there is no artifact, or it is not what its manifest says.
        FormatError: If the format cannot hold a layer exactly; the message names those that can.
        OutputError: If the new folder cannot be written. Nothing is left half-written.
    """
    path = Path(path)
    artifact.check_output(path, overwrite=overwrite)
    contents, facts, codec = prepare(folder, format, unproven=unproven, engine=engine)
    return artifact.save(
        contents, facts, path, codec=codec, overwrite=overwrite, max_shard_size=max_shard_size
    )


def prepare(
    folder: str | Path, format: str = "auto", *, unproven: bool = False, engine: str | None = None
) -> tuple[Contents, dict[str, Any], Codec]:
    """Return what `convert` would save: the contents, the facts of the manifest, and the codec.

    Args:
        folder: The artifact, as in `convert`.
        format: As in `convert`, as all others.
        unproven: Whether the format may be one that is not proven to load.
        engine: The engine that is to load the new folder.

    Raises:
        ArtifactError, FormatError: As in `convert`.
    """
    folder = Path(folder)
    if problems := verify(folder):
        raise ArtifactError(
            f"'{folder}' is not what its manifest says: {problems[0]} Get it again; "
            f"'optimum-order verify' lists all differences ({len(problems)})."
        )
    facts = manifest.load(folder)
    source = formats.available()[facts["format"]]
    loaded = load(folder, facts)
    hub = {"revision": None, "token": None, "trust_remote_code": False}
    layers = loaded.layers
    packed = engine is not None or format not in ("auto", "coded", "dense")
    if packed and needs_transcoding(layers):
        codec_class = formats.intended(format, engine) or Codec
        layers = transcode(loaded.model, layers, codec_class.widths)
        for name, _, state in layers:
            facts["layers"][name] |= {
                "bits": state.bits,
                "group_size": state.group_size,
                "digest": artifact.values_digest(state.weight),
            }
    contents = Contents(
        model=loaded.model,
        layers=layers,
        processor=load_processor(str(folder), hub),
        unloaded=loaded.unloaded,
        documents=documents(str(folder), hub, loaded.model.config),
        origin=folder,
    )
    try:
        codec = formats.choose(contents, format, unproven=unproven, engine=engine)
    except FormatError as error:
        if source.name != "dense":
            raise
        raise FormatError(
            f"{error} What is stored dense are values; the codes they had are not stored."
        ) from error
    if codec.name != source.name and not (codec.runs_dense and source.runs_dense):
        facts["metrics"] = {}
    return contents, facts, codec
