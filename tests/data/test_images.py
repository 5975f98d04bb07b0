"""Sources of images, the classes they are of, and draws; nothing of an image leaks into what a user sees."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

from optimum_order.data.images import digits, load
from optimum_order.errors import DataError

COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


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


def paint(colour, size=(6, 5)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def classes(tmp_path):
    """A folder of four images of each of three colours, one of them a level down, and things that are no images."""
    folder = tmp_path / "colours"
    for name, colour in COLOURS.items():
        (folder / name / "more").mkdir(parents=True)
        for index in range(3):
            paint(colour).save(folder / name / f"{index}.png")
        paint(colour).save(folder / name / "more" / "3.JPG")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").mkdir()
    paint("white").save(folder / ".hidden" / "white.png")
    return folder


def everything(source, processor, config, **options):
    return load(source, processor, config, **{"samples": None, "purpose": "evaluation"} | options)


def colours(images):
    """The names of the pure colours that these are."""
    names = {value: name for name, value in COLOURS.items()}
    return [
        names[tuple(255 * round(value) for value in mean)]
        for mean in images.pixels.mean((2, 3)).tolist()
    ]


class TestFolders:
    def test_subfolders_are_classes_by_the_models_names(self, classes, processor, config):
        images = everything(classes, processor, config)
        assert images.pixels.shape == (12, 3, 4, 4) and images.pixels.dtype == torch.float32
        assert images.labels.dtype == torch.int64
        assert images.labels.tolist() == [config.label2id[name] for name in colours(images)]
        assert images.source == "colours", "the folder it lies in is nobody's business"

    def test_other_names_are_the_models_classes_in_order(self, classes, processor):
        images = everything(classes, processor, ViTConfig(num_labels=3))
        assert images.labels.tolist() == [sorted(COLOURS).index(name) for name in colours(images)]

    def test_an_empty_class_counts(self, classes, processor):
        (classes / "amber").mkdir()
        images = everything(classes, processor, ViTConfig(num_labels=4))
        assert sorted(set(images.labels.tolist())) == [1, 2, 3]

    @pytest.mark.parametrize("known", [["blue", "lime", "violet"], ["a", "b"], ["blue", "lime"]])
    def test_classes_that_the_model_does_not_have(self, classes, processor, known):
        config = ViTConfig(
            id2label=dict(enumerate(known)), label2id={name: i for i, name in enumerate(known)}
        )
        match = rf"colours has 3 classes, of which .*'red'.* not among the model's {len(known)} \('{known[0]}'"
        with pytest.raises(DataError, match=match):
            everything(classes, processor, config)

    def test_a_flat_folder_has_no_labels(self, classes, processor, config):
        images = everything(classes / "red" / "more", processor, config)
        assert images.labels is None and colours(images) == ["red"] and images.source == "more"

    def test_both_kinds_at_once(self, classes, processor, config):
        paint("red").save(classes / "loose.png")
        with pytest.raises(DataError, match="'colours' holds images beside subfolders of images"):
            everything(classes, processor, config)

    def test_the_first_few_are_of_all_classes(self, classes, processor, config):
        """So that a proxy of a few images says something; a folder lies sorted."""
        whole = everything(classes, processor, config, seed=1)
        assert len(set(whole.head(6).labels.tolist())) == 3
        few = everything(
            classes, processor, config, samples=6, seed=2
        )  # the seed is for calibration
        assert torch.equal(few.pixels, whole.pixels[:6]) and torch.equal(
            few.labels, whole.labels[:6]
        )

    @pytest.mark.parametrize("damage", [b"", b"nothing at all", "cut"])
    def test_a_damaged_image_is_named(self, classes, processor, config, damage):
        file = classes / "red" / "1.png"
        file.write_bytes(file.read_bytes()[:50] if damage == "cut" else damage)
        with pytest.raises(
            DataError, match=r"'red/1\.png' in 'colours' is no image that can be read"
        ) as caught:
            everything(classes, processor, config)
        assert str(classes.parent) not in str(caught.value)

    def test_a_file(self, classes, processor, config):
        with pytest.raises(DataError, match=r"'0\.png' is a file\. Give the folder"):
            everything(classes / "red" / "0.png", processor, config)

    def test_what_is_not_there(self, tmp_path, processor, config):
        with pytest.raises(DataError, match="does not exist"):
            everything(tmp_path / "nowhere", processor, config)
        with pytest.raises(
            DataError, match=r"'nobody/nothing' is no file here.*or give a folder of images"
        ):
            everything("nobody/nothing", processor, config)

    def test_only_what_is_drawn_is_read(self, classes, processor, config):
        drawn = load(classes, processor, config, samples=1, seed=0)
        for file in classes.rglob("*.*"):  # all the others are broken now
            if (
                file.suffix in (".png", ".JPG")
                and Image.open(file).getpixel((0, 0)) != COLOURS[colours(drawn)[0]]
            ):
                file.write_bytes(b"")
        assert torch.equal(load(classes, processor, config, samples=1, seed=0).pixels, drawn.pixels)


class TestPictures:
    @pytest.mark.parametrize(
        ("image", "mean"),
        [
            (Image.new("RGBA", (5, 5), (0, 255, 0, 10)), [0, 1, 0]),
            (Image.new("L", (5, 5), 255), [1, 1, 1]),
            (Image.new("1", (5, 5), 1), [1, 1, 1]),
            (paint("red").quantize(4), [1, 0, 0]),
        ],
    )
    def test_every_kind_becomes_what_the_model_reads(
        self, tmp_path, processor, config, image, mean
    ):
        image.save(tmp_path / "a.png")
        assert everything(tmp_path, processor, config).pixels.mean((0, 2, 3)).tolist() == mean

    def test_a_camera_that_was_turned(self, tmp_path, processor, config):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        picture = Image.new("RGB", (8, 8), "red")
        picture.paste(Image.new("RGB", (4, 8), "blue"), (0, 0))
        picture.save(tmp_path / "a.png", exif=exif)
        (pixels,) = everything(tmp_path, processor, config).pixels
        assert (
            pixels[2, 0].mean() == 1 and pixels[0, -1].mean() == 1
        )  # blue on the left is blue above

    def test_a_model_of_one_channel(self, ten):
        grey = ViTImageProcessorPil(
            size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]
        )
        config = ViTConfig(num_labels=10, num_channels=1)
        images = everything("builtin", grey, config, samples=5)
        assert images.pixels.shape == (5, 1, 8, 8)
        assert torch.allclose(
            images.pixels[:, 0], torch.tensor(digits("evaluation")[0][:5]) / 127.5 - 1, atol=1e-6
        )

    def test_no_processor(self, classes, config):
        for nothing in (None, object()):
            with pytest.raises(
                DataError, match="images of colours need an image processor, and there is none"
            ):
                everything(classes, nothing, config)

    def test_a_processor_that_holds_one(self, classes, processor, config):
        holder = type("Holder", (), {"image_processor": processor})()
        found, expected = (everything(classes, each, config) for each in (holder, processor))
        assert found.digest == expected.digest

    def test_images_of_several_sizes_are_an_error(self, classes, config):
        free = ViTImageProcessorPil(do_resize=False)
        many = [np.zeros((4 + (index == 70), 4, 3), np.uint8) for index in range(80)]
        with pytest.raises(DataError, match=r"makes pixels of \(3, 5, 4\)|one size"):
            everything([*many[:64], *many[70:71]], free, config)

    def test_more_than_memory_is_refused_before_it_is_read(self, config):
        huge = ViTImageProcessorPil(size={"height": 512, "width": 512}, do_normalize=False)
        many = [paint("red")] * 20_000
        with pytest.raises(
            DataError,
            match=r"20000 images of images in memory take 59 GiB .* at 3x512x512\. Name few",
        ):
            everything(many, huge, config)


class TestMemory:
    def test_pil_images_and_arrays(self, processor, config):
        given = [paint("red"), np.full((5, 7, 3), 255, np.uint8), np.zeros((5, 7), np.uint8)]
        images = everything(given, processor, config)
        assert images.pixels.mean((2, 3)).tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
        assert images.labels is None and images.source == "images in memory"
        assert everything((given, [2, 0, 1]), processor, config).labels.tolist() == [2, 0, 1]
        whole = np.stack([np.asarray(paint(colour)) for colour in COLOURS])
        assert colours(everything(whole, processor, config)) == list(COLOURS)

    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((4, 4), np.float32),
            np.zeros((4, 4, 2), np.uint8),
            np.zeros(4, np.uint8),
            "red",
            None,
        ],
    )
    def test_what_is_no_image(self, processor, config, image):
        with pytest.raises(
            DataError, match=r"Image 2 must be a PIL image or a uint8 array \(h, w\) or \(h, w, 3\)"
        ):
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

    @pytest.mark.parametrize(
        "pixels", [torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4)]
    )
    def test_pixels_of_another_kind(self, config, pixels):
        with pytest.raises(
            DataError, match=r"Pixels must be floats \(n, channels, height, width\)"
        ):
            everything(pixels, None, config)

    @pytest.mark.parametrize(
        "labels", [[0], [0, 1, 2], [0.0, 1.0], [True, False], "ab", ["red", "blue"], [[0, 1]]]
    )
    def test_labels_that_are_none(self, config, labels):
        with pytest.raises(DataError, match="The labels of 2 images must be as many integers"):
            everything((torch.zeros(2, 3, 4, 4), labels), None, config)

    @pytest.mark.parametrize("source", [None, 3, {"image": 1}, (torch.zeros(1, 3, 4, 4), [0], 1)])
    def test_other_things(self, processor, config, source):
        with pytest.raises(
            DataError, match=f"Images are a folder, .*, got {type(source).__name__}"
        ):
            everything(source, processor, config)

    def test_none_at_all(self, processor, config):
        with pytest.raises(DataError, match="images in memory has no images"):
            everything([], processor, config)
        with pytest.raises(DataError, match="pixels in memory has no images"):
            everything(torch.zeros(0, 3, 4, 4), processor, config)


class TestDraws:
    def test_draws_of_one_seed_are_disjoint_and_cover_all(self):
        pixels = torch.arange(30.0).view(30, 1, 1, 1)
        config = ViTConfig(num_channels=1)
        draws = [
            load(pixels, None, config, samples=10, seed=1, draw=draw).pixels.flatten()
            for draw in range(3)
        ]
        assert sorted(torch.cat(draws).tolist()) == list(range(30))
        assert draws[0].tolist() != list(range(10))
        again = load(pixels, None, config, samples=10, seed=1).pixels.flatten()
        other = load(pixels, None, config, samples=10, seed=2).pixels.flatten()
        assert torch.equal(again, draws[0]) and not torch.equal(other, draws[0])
        with pytest.raises(
            DataError, match="has 30 images, enough for 3 disjoint draws of 10; asked for draw 3"
        ):
            load(pixels, None, config, samples=10, draw=3)

    def test_an_evaluation_of_ones_own_images_keeps_their_order(self):
        pixels = torch.arange(30.0).view(30, 1, 1, 1)
        found = everything(pixels, None, ViTConfig(), samples=4, seed=9)
        assert found.pixels.flatten().tolist() == [0, 1, 2, 3]

    def test_fewer_than_asked_for(self):
        found = load(torch.zeros(5, 1, 1, 1), None, ViTConfig(), samples=9)
        assert len(found) == 5 and found.note == "pixels in memory has 5 images, 9 were asked for"

    @pytest.mark.parametrize("bad", [{"samples": 0}, {"samples": 1, "draw": -1}])
    def test_settings(self, config, bad):
        with pytest.raises(DataError, match="samples of 1 or more and a draw of 0 or more"):
            load(torch.zeros(5, 1, 1, 1), None, config, **bad)


class TestBuiltin:
    def test_the_two_parts_are_all_digits_and_share_none(self):
        (train, held_out), labels = zip(digits("calibration"), digits("evaluation"), strict=True)
        assert (
            train.shape == (897, 8, 8) and held_out.shape == (900, 8, 8) and train.dtype == np.uint8
        )
        assert {image.tobytes() for image in train}.isdisjoint(
            image.tobytes() for image in held_out
        )
        assert all(np.bincount(part, minlength=10).min() > 70 for part in labels)
        assert (train.min(), train.max()) == (0, 255)

    def test_the_split_never_changes(self):
        """What is shipped was trained on one part; it must not be measured on it."""
        images, labels = digits("evaluation")
        assert labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]
        assert int(images.astype(np.int64).sum()) == 4_481_599

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

    @pytest.mark.parametrize(
        ("missing", "says"),
        [("sklearn", "scikit-learn, which is not installed"), ("PIL", "library Pillow")],
    )
    def test_a_library_that_is_missing(self, missing, says):
        code = f"""
import sys
sys.modules[{missing!r}] = None
from optimum_order.data.images import load
from optimum_order.errors import DataError
from transformers import ViTConfig
try:
    load("builtin", None, ViTConfig(num_labels=10), samples=1)
except DataError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert says in done.stdout and "pip install 'optimum-order[vision]'" in done.stdout


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
    def encoded(colour):
        file = io.BytesIO()
        paint(colour).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    @pytest.fixture
    def folder(self, tmp_path):
        """Its classes are in an order that is neither the alphabet's nor the model's."""
        import datasets

        label = datasets.ClassLabel(names=["red", "blue", "lime"])
        for split, repeats in (("train", 2), ("test", 1)):
            columns = {
                "image": [self.encoded(c) for c in COLOURS] * repeats,
                "label": list(COLOURS) * repeats,
            }
            self.write(tmp_path / "data", split, columns, image=datasets.Image(), label=label)
        return tmp_path / "data"

    def test_classes_by_name_and_the_split_by_the_purpose(self, folder, processor, config):
        evaluation = everything(str(folder), processor, config)
        calibration = load(str(folder), processor, config, samples=None)
        assert (len(evaluation), len(calibration)) == (3, 6) and evaluation.source == "data"
        for images in (evaluation, calibration):
            assert images.labels.tolist() == [config.label2id[name] for name in colours(images)]
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
        found = everything(f"{tmp_path / 'two'}:::back", processor, config)
        assert colours(found) == ["blue"] and found.labels.tolist() == [1]
        match = r"'two' has no column 'image' of images\. Its columns of images are: front, back; others: labels, name"
        with pytest.raises(DataError, match=match):
            everything(tmp_path / "two", processor, config)

    def test_labels_that_are_kept_back(self, tmp_path, processor, config):
        import datasets

        columns = {"image": [self.encoded(c) for c in COLOURS], "label": [-1, -1, -1]}
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
