"""Images -> pixels as a model reads them, with labels where they are known.

A source is a folder of images, a dataset `id[:config][:split][:column]`, `builtin`, a list of PIL images or uint8
arrays, a tensor of pixels, or a pair of one of the last two and its labels. Images are decoded, resized and
normalised by the model's own image processor, and only those that are asked for. Like text, they are only ever read.

A folder with one subfolder for each class gives labels, as a dataset with a column of them does. Classes are matched
with the model's by name; where no name is the model's, the n-th class in the order of the source is its n-th.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor

from optimum_order.data.samples import Images
from optimum_order.data.text import Purpose, choose, dataset
from optimum_order.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Images", "digits", "load"]

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_HELD_OUT = 900
_DIGITS = 10
_AT_ONCE = 64
_MOST_BYTES = 2**33
_INSTALL = "Install it with pip install 'optimum-order[vision]'."


@dataclass(frozen=True)
class _Collection:
    """Images that have not been read yet.

    Args:
        name: What to call them.
        count: How many there are.
        open: Gives the image of an index.
        labels: (count,) int64 class numbers of the model, or None.
        sorted: Whether they lie class by class, so that the first few are no sample of all.
    """

    name: str
    count: int
    open: Callable[[int], Image]
    labels: Tensor | None = None
    sorted: bool = False


def load(
    source: Any,
    processor: Any,
    config: Any,
    *,
    samples: int | None,
    seed: int = 0,
    purpose: Purpose = "calibration",
    draw: int = 0,
) -> Images:
    """Images from wherever the user has them.

    Args:
        source: A folder of images, or one with a subfolder of images for each class; a Hub or local dataset as
            `id[:config][:split][:column]`; "builtin", the digits that come with scikit-learn; a list of PIL images
            or uint8 arrays, (h, w) or (h, w, 3); pixels as a float tensor (n, channels, h, w), which are taken as
            they are; or a tuple of one of the last two and its class numbers.
        processor: The model's image processor, or a processor that has one; None will do for pixels.
        config: The model's: it says how many channels and which classes it knows.
        samples: How many images, or None for all. A source that has fewer gives those, and a note that says so.
        seed: Which images a calibration draws, without replacement. An evaluation takes the first, and of a folder or
            dataset, which may lie sorted by class, the first of one fixed permutation.
        purpose: What the images are for. It chooses between calibration and evaluation images where a source has
            both (`builtin`; the train or test split of a dataset).
        draw: Which block of `samples` images of the seed's permutation. Two draws of one seed share no image.

    Raises:
        DataError: If the source cannot be read, has no image, or none is left for this draw, or its classes are not
            the model's.
    """
    if (samples is not None and samples < 1) or draw < 0:
        raise DataError(
            f"Images need samples of 1 or more and a draw of 0 or more, got {samples=}, {draw=}."
        )
    given, labels = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if not isinstance(given, Tensor):
        _require_pillow()
    if isinstance(given, (Tensor, list, np.ndarray)):
        found = _from_memory(given, labels)
    elif isinstance(source, (str, Path)):
        found = _from_name(os.path.expanduser(str(source)), config, purpose)
    else:
        raise DataError(
            "Images are a folder, a Hub dataset, 'builtin', a list of PIL images or uint8 arrays, a float tensor of "
            f"pixels, or a tuple of one of these two and labels, got {type(source).__name__}."
        )
    if not found.count:
        raise DataError(f"{found.name} has no images.")
    permutation = seed if purpose == "calibration" else 0 if found.sorted else None
    chosen, note = choose(found.count, samples, permutation, draw, found.name, "images")
    if isinstance(given, Tensor):
        pixels = _given_pixels(given)[chosen]
    else:
        pixels = _read(found, chosen.tolist(), processor, config)
    return Images(pixels, found.name, None if found.labels is None else found.labels[chosen], note)


def digits(purpose: Purpose) -> tuple[np.ndarray, np.ndarray]:
    """The 1797 handwritten digits that scikit-learn carries: 900 drawn once and for all to evaluate with, or the rest.

    Returns:
        Images (n, 8, 8) uint8, from 0 for paper to 255 for ink, and what they show, (n,) int64.

    Raises:
        DataError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            f"The built-in images are those of scikit-learn, which is not installed. {_INSTALL}"
        ) from None
    found = load_digits()
    order = np.random.RandomState(0).permutation(
        len(found.target)
    )  # numpy promises that this stream never changes
    part = order[:_HELD_OUT] if purpose == "evaluation" else order[_HELD_OUT:]
    return (found.images[part] * (255 / 16)).round().astype(np.uint8), found.target[part].astype(
        np.int64
    )


# --- image -> pixels -------------------------------------------------------------------------------------------------


def _read(found: _Collection, chosen: list[int], processor: Any, config: Any) -> Tensor:
    """The pixels of the chosen images, (n, channels, h, w) float32."""
    prepare = (
        processor
        if isinstance(processor, BaseImageProcessor)
        else getattr(processor, "image_processor", None)
    )
    if prepare is None:
        raise DataError(
            f"The images of {found.name} need an image processor, and there is none with the model. Save one beside "
            "the model, pass one as 'processor', or give pixels."
        )
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    pixels = None
    for begin in range(0, len(chosen), _AT_ONCE):
        images = [_open(found, index).convert(mode) for index in chosen[begin : begin + _AT_ONCE]]
        part = prepare(images=images, return_tensors="pt")["pixel_values"]
        if pixels is None:
            size = len(chosen) * part[0].numel() * 4
            if size > _MOST_BYTES:
                raise DataError(
                    f"{len(chosen)} images of {found.name} take {size / 2**30:.0f} GiB of memory at "
                    f"{'x'.join(map(str, part.shape[1:]))}. Name fewer, for example id:config:split[:5000]."
                )
            pixels = torch.empty((len(chosen), *part.shape[1:]))
        if part.ndim != 4 or part.shape[1:] != pixels.shape[1:]:
            raise DataError(
                f"{type(prepare).__name__} makes pixels of {tuple(part.shape[1:])} of an image of {found.name}, and "
                "all images must become (channels, height, width) of one size. Set its size and cropping."
            )
        pixels[begin : begin + len(part)] = part
    return pixels


def _open(found: _Collection, index: int) -> Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(found.open(index))


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise DataError(
            f"Reading images needs the library Pillow, which is not installed. {_INSTALL}"
        ) from None


# --- source -> images ------------------------------------------------------------------------------------------------


def _given_pixels(pixels: Tensor) -> Tensor:
    if not pixels.is_floating_point() or pixels.ndim != 4:
        raise DataError(
            "Pixels must be floats (n, channels, height, width), resized and normalised as the model reads them, got "
            f"{pixels.dtype} {tuple(pixels.shape)}. Raw images are given as a list of uint8 arrays."
        )
    return pixels.detach().cpu().float()


def _given_labels(labels: Any, count: int) -> Tensor | None:
    if labels is None:
        return None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if (
        found.shape != (count,)
        or found.is_floating_point()
        or found.is_complex()
        or found.dtype == torch.bool
    ):
        raise DataError(
            f"The labels of {count} images must be as many integers, the model's class numbers."
        )
    return found.detach().cpu().long()


def _from_memory(given: Sequence | np.ndarray | Tensor, labels: Any) -> _Collection:
    def open(index: int) -> Image:
        from PIL import Image

        image = given[index]
        if isinstance(image, Image.Image):
            return image
        shaped = getattr(image, "ndim", 0) > 1 and image.shape[2:] in ((), (3,))
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and shaped:
            return Image.fromarray(image)
        what = (
            f"{image.dtype} {image.shape}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise DataError(
            f"Image {index + 1} must be a PIL image or a uint8 array (h, w) or (h, w, 3), got {what}."
        )

    name = "pixels in memory" if isinstance(given, Tensor) else "images in memory"
    return _Collection(name, len(given), open, _given_labels(labels, len(given)))


def _from_name(source: str, config: Any, purpose: Purpose) -> _Collection:
    if source == "builtin":
        return _builtin(config, purpose)
    path = Path(source)
    if path.is_file():
        raise DataError(
            f"'{path.name}' is a file. Give the folder that holds the images, or a Hub dataset."
        )
    if path.is_dir() and (files := _images_in(path)):
        return _from_folder(path, files, config)
    return _from_dataset(source, config, purpose)


def _builtin(config: Any, purpose: Purpose) -> _Collection:
    from PIL import Image

    if config.num_labels != _DIGITS:
        raise DataError(
            f"The built-in images are digits, for a model of {_DIGITS} classes; this one has {config.num_labels}. Give "
            "a folder of images or a Hub dataset."
        )
    images, labels = digits(purpose)
    classes = _classes([str(digit) for digit in range(_DIGITS)], config, "builtin")
    return _Collection(
        "builtin", len(images), lambda index: Image.fromarray(images[index]), classes[labels]
    )


def _images_in(folder: Path) -> list[Path]:
    """The images anywhere in a folder, in order; nothing hidden."""
    found = (
        file for file in folder.rglob("*") if file.suffix.lower() in _ENDINGS and file.is_file()
    )
    return sorted(
        f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts)
    )


def _from_folder(folder: Path, files: list[Path], config: Any) -> _Collection:
    from PIL import Image

    def open(index: int) -> Image.Image:
        try:
            with Image.open(files[index]) as image:
                image.load()
                return image
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            name = files[index].relative_to(folder)
            raise DataError(
                f"'{name}' in '{folder.name}' is no image that can be read. Remove or repair it."
            ) from None

    name = folder.resolve().name
    flat = [file.parent == folder for file in files]
    if all(flat):
        return _Collection(name, len(files), open, sorted=True)
    if any(flat):
        raise DataError(
            f"The folder '{name}' holds images beside subfolders of images. Give one that holds images only, or one "
            "that holds a subfolder for each class only."
        )
    names = sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    classes = _classes(names, config, name)
    within = torch.tensor([names.index(file.relative_to(folder).parts[0]) for file in files])
    return _Collection(name, len(files), open, classes[within], sorted=True)


def _from_dataset(source: str, config: Any, purpose: Purpose) -> _Collection:
    import datasets

    name, found, column = dataset(source, purpose, "a folder of images")
    features: Mapping[str, Any] = found.features
    pictures = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    column = column or (
        "image" if "image" in pictures else pictures[0] if len(pictures) == 1 else None
    )
    if column not in pictures:
        others = [key for key in features if key not in pictures]
        raise DataError(
            f"'{name}' has no column '{column or 'image'}' of images. Its columns of images are: "
            f"{', '.join(pictures) or 'none'}; others: {', '.join(others) or 'none'}. Name one after the last colon of "
            "the source."
        )
    images = found.select_columns([column])
    named = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbered = [
        key for key in ("label", "labels") if getattr(features.get(key), "dtype", None) == "int64"
    ]
    key = next(
        (k for k in ("label", "labels") if k in named), named[0] if len(named) == 1 else None
    )
    labels = None
    if key is not None:
        labels = torch.tensor(list(found[key]))
        # a test split may keep its labels to itself, and says -1
        labels = None if (labels < 0).any() else _classes(features[key].names, config, name)[labels]
    elif numbered:
        labels = torch.tensor(list(found[numbered[0]]))

    def open(index: int) -> Image:
        try:
            return images[index][column]
        except (OSError, ValueError, SyntaxError):
            raise DataError(
                f"Row {index + 1} of '{name}' holds no image that can be read."
            ) from None

    return _Collection(name, len(found), open, labels, sorted=True)


def _classes(names: Sequence[str], config: Any, source: str) -> Tensor:
    """The model's number of each of a source's classes, (len(names),) int64."""
    known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    missing = [name for name in names if name not in known]
    if not missing:
        return torch.tensor([known[name] for name in names])
    if len(missing) == len(names) == config.num_labels:
        return torch.arange(len(names))
    some = ", ".join(map(repr, missing[:3]))
    raise DataError(
        f"{source} has {len(names)} classes, of which {len(missing)} ({some}) are not among the model's "
        f"{config.num_labels} ({', '.join(map(repr, list(known)[:3]))}, ...). Name its classes as the model does, or "
        "give as many as it has."
    )
