"""Images -> pixels as a model reads them, with labels where they are known.

A source is a folder of images, a dataset `id[:config][:split][:column]`, `builtin`, a list of PIL
images or uint8 arrays, a tensor of pixels, or a pair of one of the last two and its labels. The
model's own image processor resizes and normalizes images, and only those that are taken are
decoded. Like text, images are only ever read.

A folder with one subfolder for each class gives labels, as a dataset with a column of them does.
Classes are matched with the model's by name; where no name is the model's, the n-th class in the
order of the source is the model's n-th.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseImageProcessor

from optimum_order.data.builtin import INSTALL_VISION, digits
from optimum_order.data.draws import choose, shortage
from optimum_order.data.samples import Images, MissingProcessorError, Purpose
from optimum_order.data.splits import find_column, load_split
from optimum_order.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_DIGITS = 10
_AT_ONCE = 64
_MOST_BYTES = 2**33
_UNREADABLE = (OSError, ValueError, SyntaxError)
"""The errors of Pillow for a file that is no image."""


@dataclass(frozen=True)
class _Collection:
    """Images that have not been read yet.

    Args:
        name: The name for messages and manifests.
        count: Number of images.
        open: Returns the image of an index.
        labels: (count,) int64 class numbers of the model, or None.
        by_class: Whether the images may lie class by class, so that the first few are no sample of
            all.
    """

    name: str
    count: int
    open: Callable[[int], Image]
    labels: Tensor | None = None
    by_class: bool = False


def load(
    source: Any,
    processor: Any,
    config: Any,
    *,
    samples: int | None,
    seed: int = 0,
    purpose: Purpose = "calibration",
) -> Images:
    """Return images of any source.

    Args:
        source: A folder of images, or one with a subfolder of images for each class; a dataset of
            the Hub or a local one as `id[:config][:split][:column]`; "builtin", the digits that
            come with scikit-learn; a list of PIL images or uint8 arrays, (h, w) or (h, w, 3);
            pixels as a float tensor (n, channels, h, w), which are taken unchanged; or a tuple of
            one of the last two and its class numbers.
        processor: The model's image processor, or a processor that has one; pixels need none.
        config: The model's configuration, with its channels and classes.
        samples: Images to take; None takes all. A source with fewer gives all of them and a note.
        seed: The permutation that a calibration draws from, without replacement. An evaluation
            takes the first images, or where the source may lie sorted by class (a folder, a
            dataset), the first of one fixed permutation.
        purpose: Chooses between calibration and evaluation images where a source has both
            (`builtin`; the train or test split of a dataset).

    Raises:
        DataError: If the source cannot be read or has no image, or its classes are not the model's.
    """
    if samples is not None and samples < 1:
        raise DataError(f"Images need samples of 1 or more, got {samples=}.")
    has_labels = isinstance(source, tuple) and len(source) == 2
    pictures, labels = source if has_labels else (source, None)
    if not isinstance(pictures, Tensor):
        _require_pillow()
    if isinstance(pictures, (Tensor, list, np.ndarray)):
        collection = _from_memory(pictures, labels)
    elif isinstance(source, (str, Path)):
        collection = _from_name(os.path.expanduser(str(source)), config, purpose)
    else:
        raise DataError(
            "Images are a folder, a dataset of the Hub, 'builtin', a list of PIL images or uint8 "
            "arrays, a float tensor of pixels, or a tuple of one of these two and labels, got "
            f"{type(source).__name__}."
        )
    if not collection.count:
        raise DataError(f"{collection.name} has no images. Give a source that has some.")
    permutation = 0 if collection.by_class else None
    index = choose(collection.count, samples, seed if purpose == "calibration" else permutation)
    if isinstance(pictures, Tensor):
        pixels = _checked_pixels(pictures)[index]
    else:
        pixels = _read(collection, index.tolist(), processor, config)
    note = shortage(collection.name, collection.count, samples, "image")
    return Images(pixels, collection.name, note=note, labels=_at(collection.labels, index))


def _at(labels: Tensor | None, index: Tensor) -> Tensor | None:
    return None if labels is None else labels[index]


# --- image -> pixels -----------------------------------------------------------------------------


def _read(collection: _Collection, index: list[int], processor: Any, config: Any) -> Tensor:
    """Return the pixels of some images, (n, channels, h, w) float32."""
    prepare = _image_processor(processor, collection.name)
    mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    pixels = torch.empty(0)
    for begin in range(0, len(index), _AT_ONCE):
        images = [
            _upright(collection.open(i)).convert(mode) for i in index[begin : begin + _AT_ONCE]
        ]
        part: Tensor = prepare(images=images, return_tensors="pt")["pixel_values"]
        if begin == 0:
            _check_size(len(index), part, collection.name)
            pixels = torch.empty((len(index), *part.shape[1:]))
        if part.ndim != 4 or part.shape[1:] != pixels.shape[1:]:
            raise DataError(
                f"{type(prepare).__name__} makes pixels of {tuple(part.shape[1:])} of an image of "
                f"{collection.name}, and all images must become (channels, height, width) of one "
                "size. Set its size and cropping."
            )
        pixels[begin : begin + len(part)] = part
    return pixels


def _image_processor(processor: Any, name: str) -> Any:
    if isinstance(processor, BaseImageProcessor):
        return processor
    prepare = getattr(processor, "image_processor", None)
    if prepare is None:
        raise MissingProcessorError(
            f"The images of {name} need an image processor, and there is none with the model. Save "
            "one beside the model, pass one as 'processor', or give pixels."
        )
    return prepare


def _check_size(count: int, part: Tensor, name: str) -> None:
    size = count * part[0].numel() * 4
    if size > _MOST_BYTES:
        raise DataError(
            f"{count} images of {name} take {size / 2**30:.0f} GiB of memory at "
            f"{'x'.join(map(str, part.shape[1:]))}. Name fewer, for example id:config:split[:5000]."
        )


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise DataError(
            f"Reading images needs the library Pillow, which is not installed. {INSTALL_VISION}"
        ) from None


# --- source -> images ----------------------------------------------------------------------------


def _checked_pixels(pixels: Tensor) -> Tensor:
    if not pixels.is_floating_point() or pixels.ndim != 4:
        raise DataError(
            "Pixels must be floats (n, channels, height, width), resized and normalized as the "
            f"model reads them, got {pixels.dtype} {tuple(pixels.shape)}. Give raw images as a "
            "list of uint8 arrays."
        )
    return pixels.detach().cpu().float()


def _checked_labels(labels: Any, count: int) -> Tensor | None:
    if labels is None:
        return None
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0)
    integers = not (numbers.is_floating_point() or numbers.is_complex())
    if numbers.shape != (count,) or not integers or numbers.dtype == torch.bool:
        raise DataError(
            f"The labels of {count} images must be as many integers, the model's class numbers."
        )
    return numbers.detach().cpu().long()


def _from_memory(
    pictures: Sequence[Any] | np.ndarray[Any, Any] | Tensor, labels: Any
) -> _Collection:
    def open(index: int) -> Image:
        from PIL import Image

        picture = pictures[index]
        if isinstance(picture, Image.Image):
            return picture
        if not isinstance(picture, np.ndarray):
            got = type(picture).__name__
        elif picture.dtype == np.uint8 and picture.ndim > 1 and picture.shape[2:] in ((), (3,)):
            return Image.fromarray(picture)
        else:
            got = f"{picture.dtype} {picture.shape}"
        raise DataError(
            f"Image {index + 1} must be a PIL image or a uint8 array (h, w) or (h, w, 3), "
            f"got {got}."
        )

    name = "pixels in memory" if isinstance(pictures, Tensor) else "images in memory"
    return _Collection(name, len(pictures), open, _checked_labels(labels, len(pictures)))


def _from_name(source: str, config: Any, purpose: Purpose) -> _Collection:
    if source == "builtin":
        return _builtin(config, purpose)
    path = Path(source)
    if path.is_file():
        raise DataError(
            f"'{path.name}' is a file. Give the folder that holds the images, or a dataset of the "
            "Hub."
        )
    if path.is_dir() and (files := _images_in(path)):
        return _from_folder(path, files, config)
    return _from_dataset(source, config, purpose)


def _builtin(config: Any, purpose: Purpose) -> _Collection:
    from PIL import Image

    if config.num_labels != _DIGITS:
        raise DataError(
            f"The built-in images are digits, for a model of {_DIGITS} classes; this one has "
            f"{config.num_labels}. Give a folder of images or a dataset of the Hub."
        )
    images, labels = digits(purpose)
    classes = _classes([str(digit) for digit in range(_DIGITS)], config, "builtin")
    return _Collection(
        "builtin", len(images), lambda index: Image.fromarray(images[index]), classes[labels]
    )


def _images_in(folder: Path) -> list[Path]:
    """Return the images anywhere in a folder, sorted, without hidden files and folders."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _ENDINGS)
    return [
        file
        for file in files
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _from_folder(folder: Path, files: list[Path], config: Any) -> _Collection:
    from PIL import Image

    def open(index: int) -> Image.Image:
        try:
            image = Image.open(files[index])
            with image:
                image.load()
        except (*_UNREADABLE, Image.DecompressionBombError):
            raise DataError(
                f"'{files[index].relative_to(folder)}' in '{folder.name}' is no image that can be "
                "read. Remove or repair it."
            ) from None
        return image

    name = folder.resolve().name
    flat = [file.parent == folder for file in files]
    if all(flat):
        return _Collection(name, len(files), open, by_class=True)
    if any(flat):
        raise DataError(
            f"The folder '{name}' holds images beside subfolders of images. Give one that holds "
            "images only, or one that holds a subfolder for each class only."
        )
    names = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    classes = _classes(names, config, name)
    numbers = torch.tensor([names.index(file.relative_to(folder).parts[0]) for file in files])
    return _Collection(name, len(files), open, classes[numbers], by_class=True)


def _from_dataset(source: str, config: Any, purpose: Purpose) -> _Collection:
    import datasets

    split = load_split(source, purpose, "a folder of images")
    name = split.name
    pictorial = {
        key: isinstance(feature, datasets.Image) for key, feature in split.data.features.items()
    }
    column = find_column(pictorial, split.column, usual="image", content="images", name=name)
    images = split.data.select_columns([column])

    def open(index: int) -> Image:
        try:
            image: Image = images[index][column]
        except _UNREADABLE:
            raise DataError(
                f"Row {index + 1} of '{name}' holds no image that can be read. Remove or repair it."
            ) from None
        return image

    labels = _dataset_labels(split.data, config, name)
    return _Collection(name, len(split.data), open, labels, by_class=True)


def _dataset_labels(data: Any, config: Any, name: str) -> Tensor | None:
    """Return the model's class number of each row, (rows,) int64; None without labels."""
    import datasets

    features = data.features
    usual = ("label", "labels")
    named = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = [key for key in usual if key in named] or (named if len(named) == 1 else [])
    if columns:
        numbers = torch.tensor(list(data[columns[0]]))
        if (numbers < 0).any():
            return None  # a test split may keep its labels to itself, and says -1
        return _classes(features[columns[0]].names, config, name)[numbers]
    for key in usual:
        if getattr(features.get(key), "dtype", None) == "int64":
            return torch.tensor(list(data[key]))
    return None


def _classes(names: Sequence[str], config: Any, source: str) -> Tensor:
    """Return the model's number of each class of a source, (len(names),) int64."""
    numbers = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    missing = [name for name in names if name not in numbers]
    if not missing:
        return torch.tensor([numbers[name] for name in names])
    if len(missing) == len(names) == config.num_labels:
        return torch.arange(len(names))
    raise DataError(
        f"{source} has {len(names)} classes, of which {len(missing)} "
        f"({', '.join(map(repr, missing[:3]))}) are not among the model's {config.num_labels} "
        f"({', '.join(map(repr, list(numbers)[:3]))}, ...). Name its classes as the model does, or "
        "give as many as it has."
    )
