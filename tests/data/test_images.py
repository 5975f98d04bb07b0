"""Sources of images, their classes, and the images that are taken."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

from optimum_order.data.builtin import digits
from optimum_order.data.images import load
from optimum_order.errors import DataError

COLORS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def processor():
    """Scales to 4 x 4 and leaves the values between 0 and 1."""
    return ViTImageProcessorPil(size={"height": 4, "width": 4}, do_normalize=False)


@pytest.fixture(scope="module")
def config():
    return ViTConfig(
        label2id={"blue": 0, "lime": 1, "red": 2}, id2label={0: "blue", 1: "lime", 2: "red"}
    )


@pytest.fixture(scope="module")
def ten():
    return ViTConfig(num_labels=10)


def paint(color, size=(6, 5)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture
def classes(tmp_path):
    """A folder of four images of each of three colors, one a level down, and of other files."""
    folder = tmp_path / "colors"
    for name, color in COLORS.items():
        (folder / name / "more").mkdir(parents=True)
        for index in range(3):
            paint(color).save(folder / name / f"{index}.png")
        paint(color).save(folder / name / "more" / "3.JPG")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    paint("white").save(folder / ".hidden" / "white.png")
    return folder


def everything(source, processor, config, **options):
    return load(source, processor, config, **{"samples": None, "purpose": "evaluation"} | options)


def colors(images):
    """The names of the pure colors that these are."""
    names = {value: name for name, value in COLORS.items()}
    return [
        names[tuple(255 * round(value) for value in mean)]
        for mean in images.pixels.mean((2, 3)).tolist()
    ]


class TestFolders:
    def test_subfolders_are_classes_by_the_models_names(self, classes, processor, config):
        images = everything(classes, processor, config)
        assert images.pixels.shape == (12, 3, 4, 4) and images.pixels.dtype == torch.float32
        assert images.labels.dtype == torch.int64
        assert images.labels.tolist() == [config.label2id[name] for name in colors(images)]
        assert images.source == "colors", "the path to the folder stays private"

    def test_other_names_are_the_models_classes_in_order(self, classes, processor):
        images = everything(classes, processor, ViTConfig(num_labels=3))
        assert images.labels.tolist() == [sorted(COLORS).index(name) for name in colors(images)]

    def test_an_empty_class_counts(self, classes, processor):
        (classes / "amber").mkdir()
        images = everything(classes, processor, ViTConfig(num_labels=4))
        assert sorted(set(images.labels.tolist())) == [1, 2, 3]

    def test_classes_that_the_model_does_not_have(self, classes, processor):
        for names in (["blue", "lime", "violet"], ["a", "b"], ["blue", "lime"]):
            numbers = {name: number for number, name in enumerate(names)}
            config = ViTConfig(id2label=dict(enumerate(names)), label2id=numbers)
            message = (
                "colors has 3 classes, of which .*'red'.* not among the model's "
                rf"{len(names)} \('{names[0]}'"
            )
            with pytest.raises(DataError, match=message):
                everything(classes, processor, config)

    def test_a_flat_folder_has_no_labels(self, classes, processor, config):
        images = everything(classes / "red" / "more", processor, config)
        assert images.labels is None and colors(images) == ["red"] and images.source == "more"

    def test_both_kinds_at_once(self, classes, processor, config):
        paint("red").save(classes / "loose.png")
        with pytest.raises(DataError, match="'colors' holds images beside subfolders of images"):
            everything(classes, processor, config)

    def test_the_first_few_are_of_all_classes(self, classes, processor, config):
        """So that a proxy of a few images says something; a folder lies sorted."""
        whole = everything(classes, processor, config, seed=1)
        assert len(set(whole.labels[:6].tolist())) == 3
        few = everything(
            classes, processor, config, samples=6, seed=2
        )  # only calibration has seeds
        assert torch.equal(few.pixels, whole.pixels[:6])
        assert torch.equal(few.labels, whole.labels[:6])

    def test_a_damaged_image_is_named(self, classes, processor, config):
        file = classes / "red" / "1.png"
        image = file.read_bytes()
        for damaged in (b"", b"nothing at all", image[:50]):
            file.write_bytes(damaged)
            message = r"'red/1\.png' in 'colors' is no image that can be read"
            with pytest.raises(DataError, match=message) as error:
                everything(classes, processor, config)
            assert str(classes.parent) not in str(error.value)

    def test_a_file(self, classes, processor, config):
        with pytest.raises(DataError, match=r"'0\.png' is a file\. Give the folder"):
            everything(classes / "red" / "0.png", processor, config)

    def test_a_source_that_does_not_exist(self, tmp_path, processor, config):
        with pytest.raises(DataError, match="does not exist"):
            everything(tmp_path / "nowhere", processor, config)
        message = r"'nobody/nothing' is no file here.*or give a folder of images"
        with pytest.raises(DataError, match=message):
            everything("nobody/nothing", processor, config)

    def test_only_the_drawn_images_are_read(self, classes, processor, config):
        drawn = load(classes, processor, config, samples=1, seed=0)
        color = COLORS[colors(drawn)[0]]
        images = [file for file in classes.rglob("*.*") if file.suffix in (".png", ".JPG")]
        for file in images:
            if Image.open(file).getpixel((0, 0)) != color:
                file.write_bytes(b"")
        assert torch.equal(load(classes, processor, config, samples=1, seed=0).pixels, drawn.pixels)


class TestPictures:
    def test_every_mode_becomes_what_the_model_reads(self, tmp_path, processor, config):
        for image, mean in [
            (Image.new("RGBA", (5, 5), (0, 255, 0, 10)), [0, 1, 0]),
            (Image.new("L", (5, 5), 255), [1, 1, 1]),
            (Image.new("1", (5, 5), 1), [1, 1, 1]),
            (paint("red").quantize(4), [1, 0, 0]),
        ]:
            image.save(tmp_path / "a.png")
            assert everything(tmp_path, processor, config).pixels.mean((0, 2, 3)).tolist() == mean

    def test_a_camera_that_was_turned(self, tmp_path, processor, config):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        picture = Image.new("RGB", (8, 8), "red")
        picture.paste(Image.new("RGB", (4, 8), "blue"), (0, 0))
        picture.save(tmp_path / "a.png", exif=exif)
        (pixels,) = everything(tmp_path, processor, config).pixels
        # blue on the left is blue above
        assert pixels[2, 0].mean() == 1 and pixels[0, -1].mean() == 1

    def test_a_model_of_one_channel(self, ten):
        size = {"height": 8, "width": 8}
        gray = ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5])
        config = ViTConfig(num_labels=10, num_channels=1)
        images = everything("builtin", gray, config, samples=5)
        assert images.pixels.shape == (5, 1, 8, 8)
        expected = torch.tensor(digits("evaluation")[0][:5]) / 127.5 - 1
        assert torch.allclose(images.pixels[:, 0], expected, atol=1e-6)

    def test_no_processor(self, classes, config):
        for processor in (None, object()):
            message = "images of colors need an image processor, and there is none"
            with pytest.raises(DataError, match=message):
                everything(classes, processor, config)

    def test_a_processor_that_holds_one(self, classes, processor, config):
        holder = type("Holder", (), {"image_processor": processor})()
        images = everything(classes, holder, config)
        assert images.digest == everything(classes, processor, config).digest

    def test_images_of_several_sizes_are_an_error(self, classes, config):
        free = ViTImageProcessorPil(do_resize=False)
        many = [np.zeros((4 + (index == 70), 4, 3), np.uint8) for index in range(80)]
        with pytest.raises(DataError, match=r"makes pixels of \(3, 5, 4\)|one size"):
            everything([*many[:64], *many[70:71]], free, config)

    def test_more_than_memory_is_refused_before_it_is_read(self, config):
        huge = ViTImageProcessorPil(size={"height": 512, "width": 512}, do_normalize=False)
        message = r"20000 images of images in memory take 59 GiB .* at 3x512x512\. Name few"
        with pytest.raises(DataError, match=message):
            everything([paint("red")] * 20_000, huge, config)


class TestMemory:
    def test_pil_images_and_arrays(self, processor, config):
        pictures = [paint("red"), np.full((5, 7, 3), 255, np.uint8), np.zeros((5, 7), np.uint8)]
        images = everything(pictures, processor, config)
        assert images.pixels.mean((2, 3)).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
        assert images.labels is None and images.source == "images in memory"
        assert everything((pictures, [2, 0, 1]), processor, config).labels.tolist() == [2, 0, 1]
        whole = np.stack([np.asarray(paint(color)) for color in COLORS])
        assert colors(everything(whole, processor, config)) == list(COLORS)

    def test_an_image_of_another_kind(self, processor, config):
        message = r"Image 2 must be a PIL image or a uint8 array \(h, w\) or \(h, w, 3\)"
        for image in [
            np.zeros((4, 4), np.float32),
            np.zeros((4, 4, 2), np.uint8),
            np.zeros(4, np.uint8),
            "red",
            None,
        ]:
            with pytest.raises(DataError, match=message):
                everything([paint("red"), image], processor, config)

    def test_pixels_are_taken_as_they_are(self, config):
        pixels = torch.randn(6, 3, 5, 5)
        labels = torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32)
        images = everything((pixels, labels), None, config)
        assert torch.equal(images.pixels, pixels) and torch.equal(images.labels, labels.long())
        assert everything(pixels.half(), None, config).pixels.dtype == torch.float32
        drawn = load((pixels, labels), None, config, samples=4, seed=3)
        for image, label in zip(drawn.pixels, drawn.labels, strict=True):
            (index,) = [i for i in range(6) if torch.equal(pixels[i], image)]
            assert label == labels[index]

    def test_pixels_of_another_kind(self, config):
        message = r"Pixels must be floats \(n, channels, height, width\)"
        for pixels in (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)):
            with pytest.raises(DataError, match=message):
                everything(pixels, None, config)

    def test_labels_that_are_no_class_numbers(self, config):
        message = "The labels of 2 images must be as many integers"
        for labels in (
            [0],
            [0, 1, 2],
            [0.0, 1.0],
            [True, False],
            "ab",
            ["red", "blue"],
            [[0, 1]],
        ):
            with pytest.raises(DataError, match=message):
                everything((torch.zeros(2, 3, 4, 4), labels), None, config)

    def test_other_things(self, processor, config):
        for source in (None, 3, {"image": 1}, (torch.zeros(1, 3, 4, 4), [0], 1)):
            message = f"Images are a folder, .*, got {type(source).__name__}"
            with pytest.raises(DataError, match=message):
                everything(source, processor, config)

    def test_none_at_all(self, processor, config):
        with pytest.raises(DataError, match="images in memory has no images"):
            everything([], processor, config)
        with pytest.raises(DataError, match="pixels in memory has no images"):
            everything(torch.zeros(0, 3, 4, 4), processor, config)


class TestChoice:
    """Pixels that are told apart by their value."""

    pixels = torch.arange(30.0).view(30, 1, 1, 1)
    config = ViTConfig(num_channels=1)

    def values(self, **options):
        options = {"samples": None} | options
        return load(self.pixels, None, self.config, **options).pixels.flatten().tolist()

    def test_more_images_of_a_seed_begin_with_fewer(self):
        """Draws are blocks of one permutation, which covers all images."""
        whole = self.values(seed=1)
        assert sorted(whole) == list(range(30)) and whole != list(range(30))
        assert self.values(seed=1, samples=10) == whole[:10]
        assert self.values(seed=2) != whole

    def test_an_evaluation_of_images_in_memory_keeps_their_order(self):
        assert self.values(samples=4, seed=9, purpose="evaluation") == [0, 1, 2, 3]

    def test_fewer_than_asked_for(self):
        images = load(self.pixels[:5], None, self.config, samples=9)
        assert len(images) == 5 and images.note == "pixels in memory has 5 images, 9 were asked for"

    def test_settings(self):
        with pytest.raises(DataError, match="samples of 1 or more, got samples=0"):
            self.values(samples=0)


class TestBuiltin:
    def test_purposes(self, processor, ten):
        calibration = load("builtin", processor, ten, samples=None)
        evaluation = everything("builtin", processor, ten)
        assert (len(calibration), len(evaluation)) == (897, 900) and evaluation.source == "builtin"
        assert evaluation.labels.tolist() == digits("evaluation")[1].tolist()

    def test_a_model_that_names_its_digits_in_another_order(self, processor):
        names = {i: str(9 - i) for i in range(10)}
        config = ViTConfig(id2label=names, label2id={name: i for i, name in names.items()})
        assert everything("builtin", processor, config, samples=3).labels.tolist() == [7, 1, 7]

    def test_a_model_of_other_classes(self, processor, config):
        with pytest.raises(DataError, match="digits, for a model of 10 classes; this one has 3"):
            everything("builtin", processor, config)

    def test_a_library_that_is_missing(self, ten, monkeypatch):
        for library, message in [
            ("sklearn.datasets", "scikit-learn, which is not installed"),
            ("PIL", "library Pillow, which is not installed"),
        ]:
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, library, None)
                with pytest.raises(DataError, match=message) as error:
                    load("builtin", None, ten, samples=1)
            assert "pip install 'optimum-order[vision]'" in str(error.value)


class TestDatasets:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @staticmethod
    def write(folder, split, columns, **features):
        import datasets

        folder.mkdir(exist_ok=True)
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")

    @staticmethod
    def encoded(color):
        file = io.BytesIO()
        paint(color).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    @pytest.fixture
    def folder(self, tmp_path):
        """Its classes are in an order that is neither the alphabet's nor the model's."""
        import datasets

        label = datasets.ClassLabel(names=["red", "blue", "lime"])
        for split, repeats in (("train", 2), ("test", 1)):
            columns = {
                "image": [self.encoded(c) for c in COLORS] * repeats,
                "label": list(COLORS) * repeats,
            }
            self.write(tmp_path / "data", split, columns, image=datasets.Image(), label=label)
        return tmp_path / "data"

    def test_classes_by_name_and_the_split_by_the_purpose(self, folder, processor, config):
        evaluation = everything(str(folder), processor, config)
        calibration = load(str(folder), processor, config, samples=None)
        assert (len(evaluation), len(calibration)) == (3, 6) and evaluation.source == "data"
        for images in (evaluation, calibration):
            assert images.labels.tolist() == [config.label2id[name] for name in colors(images)]
        assert everything(f"{folder}::train[:4]", processor, config).source == "data::train[:4]"
        assert len(everything(f"{folder}::train[:4]", processor, config)) == 4

    def test_columns(self, tmp_path, processor, config):
        import datasets

        columns = {
            "front": [self.encoded("red")],
            "back": [self.encoded("blue")],
            "labels": [1],
            "name": ["x"],
        }
        pictures = {"front": datasets.Image(), "back": datasets.Image()}
        others = {"labels": datasets.Value("int64"), "name": datasets.Value("string")}
        self.write(tmp_path / "two", "test", columns, **pictures, **others)
        images = everything(f"{tmp_path / 'two'}:::back", processor, config)
        assert colors(images) == ["blue"] and images.labels.tolist() == [1]
        message = (
            r"'two' has several columns of images\. Its columns of images are: front, back; "
            "others: labels, name"
        )
        with pytest.raises(DataError, match=message):
            everything(tmp_path / "two", processor, config)

    def test_labels_that_are_withheld(self, tmp_path, processor, config):
        import datasets

        columns = {"image": [self.encoded(c) for c in COLORS], "label": [-1, -1, -1]}
        label = datasets.ClassLabel(names=["red", "blue", "lime"])
        self.write(tmp_path / "hidden", "test", columns, image=datasets.Image(), label=label)
        assert everything(tmp_path / "hidden", processor, config).labels is None

    def test_a_damaged_row(self, tmp_path, processor, config):
        import datasets

        columns = {"image": [self.encoded("red"), {"bytes": b"nothing at all", "path": None}]}
        self.write(tmp_path / "bad", "test", columns, image=datasets.Image())
        with pytest.raises(DataError, match="Row 2 of 'bad' holds no image that can be read"):
            everything(tmp_path / "bad", processor, config)

    def test_text(self, tmp_path, processor, config):
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "test.jsonl").write_text('{"text": "a"}\n')
        with pytest.raises(
            DataError, match=r"no column 'image' of images\. Its columns of images are: none"
        ):
            everything(tmp_path / "text", processor, config)
