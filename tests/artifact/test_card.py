"""The card says what the manifest says, no more; what it tells people to run makes that model."""

import copy
import io
import json
import shlex
import sys

import matplotlib.image
import pytest
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from optimum_order import JointCompressor
from optimum_order.artifact import card, manifest
from optimum_order.artifact.verify import verify
from optimum_order.cli import main
from optimum_order.errors import OptimumOrderError
from optimum_order.files import size


@pytest.fixture(scope="module")
def saved_folder(tiny_llama_folder, text_file, tmp_path_factory):
    """A measured artifact, and its manifest as it was read from disk."""
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder,
        calibration=str(text_file),
        calibration_samples=4,
        sequence_length=64,
        ignore=["*.o_proj"],
    )
    folder = tmp_path_factory.mktemp("card") / "model"
    compressed = compressor.compress("wanda:0.5 > gptq:4", "block", progress=False)
    compressor.evaluate(str(text_file), progress=False)
    compressed.evaluate(str(text_file), progress=False)
    compressed.save_pretrained(folder)
    return folder, manifest.load(folder)


@pytest.fixture(scope="module")
def stated(saved_folder):
    """The manifest. Do not change it."""
    return saved_folder[1]


@pytest.fixture
def facts(stated):
    """The same, to be changed."""
    return copy.deepcopy(stated)


def text_of(facts, auto=AutoModelForCausalLM, **options):
    return str(card.make(facts, "me/small", auto, **options))


def data_of(facts, auto=AutoModelForCausalLM, **options):
    return ModelCard(text_of(facts, auto, **options)).data


def test_metadata(stated):
    data = data_of(stated)
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["optimum-order", "quantization", "pruning", "wanda", "gptq"]
    # a local folder, and not ours to say
    assert "base_model" not in data.to_dict() and "license" not in data.to_dict()
    (result,) = data.eval_results
    assert (result.metric_type, result.task_type) == ("perplexity", "text-generation")
    assert result.metric_value == stated["metrics"]["perplexity"]["after"]["value"]
    assert (result.dataset_type, result.dataset_name) == ("local", "prose.txt")


def test_a_base_model_is_named_only_if_it_is_on_the_hub(facts):
    for base, named in [
        ({"id": "org/base", "revision": "0" * 40}, "org/base"),
        ({"id": "gpt2", "revision": "0" * 40}, "gpt2"),
        ({"id": "org/base", "revision": None}, "org/base"),
        ({"id": "my-folder", "revision": None}, None),
        ({"id": "/home/me/model", "revision": None}, None),
    ]:
        facts["base_model"].update(base)
        data = data_of(facts).to_dict()
        assert (data.get("base_model"), data.get("base_model_relation")) == (
            named,
            named and "quantized",
        )
    facts["base_model"].update(id="org/base", revision="0" * 40)
    assert "--revision " + "0" * 40 in card.command(facts)
    assert "[org/base](https://huggingface.co/org/base)" in text_of(facts)
    for layer in facts["layers"].values():
        layer["bits"] = 32
    # pruned only: the Hub has no word for it
    assert "base_model_relation" not in data_of(facts).to_dict()


def test_license_and_languages_are_those_of_the_base_model(facts):
    facts["base_model"] |= {"license": "apache-2.0", "language": ["en", "de"]}
    data = data_of(facts).to_dict()
    assert (data["license"], data["language"]) == ("apache-2.0", ["en", "de"])
    data = data_of(facts, metadata={"license": "mit"}).to_dict()
    assert data["license"] == "mit", "what people wrote stays"


def test_each_engine_is_named_with_what_serves_the_model_there(facts):
    text = text_of(facts)
    assert "- vLLM: `vllm serve me/small`. vllm" in text and "was seen to load such layers" in text
    assert "`optimum-order convert me/small OUTPUT --format gguf`" in text
    for layer in facts["layers"].values():
        layer["bits"] = 3
    assert "- vLLM: was not seen to load these layers as `compressed-tensors`" in text_of(facts)
    facts["format"] = "gguf"
    assert "- llama.cpp: `llama-server -hf me/small`" in text_of(facts)
    facts["format"] = "sparse"
    text = text_of(facts)
    assert "vLLM" not in text and "it alone imports `optimum_order`" in text
    assert "To serve it" not in text_of(facts, AutoModel)


def test_the_same_bytes_without_pruning_are_named(facts):
    words = f"**The same order without its pruning takes the same {size(facts['bytes']['after'])}**"
    assert words in text_of(facts)
    assert words not in text_of(facts | {"format": "sparse"}), "where zeros save bytes"
    assert words not in text_of(facts | {"sparsity": 0.0})


def test_a_public_dataset_is_named_as_the_hub_names_it(facts):
    facts["metrics"]["perplexity"]["after"]["source"] = "org/text:raw:test"
    (result,) = data_of(facts).eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "org/text",
        "raw",
        "test",
    )


def test_what_people_added_stays_and_what_is_ours_is_new(stated):
    metadata = {"license": "mit", "language": "en"}
    metadata |= {"tags": ["old"], "model-index": [], "base_model": "org/old"}
    data = data_of(stated, metadata=metadata).to_dict()
    assert (data["license"], data["language"]) == ("mit", "en")
    assert "old" not in data["tags"] and "base_model" not in data and data["model-index"]


def test_the_order_is_drawn_and_every_stage_is_in_the_table(stated):
    drawn = card.diagram(stated).split("\n")
    assert len(drawn) % 4 == 0 and max(map(len, drawn)) <= 46, "as wide as a telephone shows"
    names = " ".join(drawn[1::4]).split("│")
    boxes = [box.strip() for box in names if box.strip(" →")]
    assert boxes == [stated["base_model"]["id"], "wanda:0.5", "gptq:4", "compressed-tensors"]
    text = text_of(stated)
    assert card.diagram(stated) in text
    for index, stage in enumerate(stated["stages"]):
        errors = {
            name: layer["stages"][index]["relative_error"]
            for name, layer in stated["layers"].items()
        }
        worst = max(errors, key=errors.get)
        (row,) = [line for line in text.split("\n") if line.startswith(f"| `{stage['stage']}` |")]
        cells = [cell.strip() for cell in row.replace("\\|", "").strip("|").split("|")]
        assert cells[2:4] == [
            f"{sum(errors.values()) / len(errors):.2g}",
            f"{errors[worst]:.2g} in `{worst}`",
        ]


def test_a_long_order_is_drawn_on_several_lines(facts):
    facts["stages"] *= 6
    for layer in facts["layers"].values():
        layer["stages"] *= 6
    drawn = card.diagram(facts).split("\n")
    assert len(drawn) % 4 == 0 and len(drawn) > 4 and max(map(len, drawn)) < 130
    assert sum(line.count("wanda:0.5") for line in drawn) == 6


def test_metrics_and_bytes_before_and_after(stated):
    text = text_of(stated)
    both = stated["metrics"]["perplexity"]
    tokens = both["after"]["tokens"]
    row = f"| {both['before']['value']:.4g} | **{both['after']['value']:.4g}** |"
    assert f"| perplexity on `prose.txt` ({tokens:,} tokens) {row}" in text
    sizes = " | ".join(size(stated["bytes"][when]) for when in ("before", "after"))
    assert f"| weights on disk | {sizes} |" in text


def test_tables_are_tables_and_paragraphs_stand_alone(stated):
    """A line of a template that leaves a blank line, or none, takes a table apart."""
    lines = text_of(stated).split("\n")
    tables = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    assert len(tables) == 2
    for start, rows in zip(tables, (4, 2), strict=True):
        assert lines[start - 1].startswith("|") and lines[start - 2] == ""
        assert all(line.startswith("|") for line in lines[start : start + 1 + rows])
        assert lines[start + 1 + rows] == ""
    for i, line in enumerate(lines):
        assert not line.startswith(("#", "With `pip")) or lines[i - 1] == lines[i + 1] == ""
    assert "\n\n\n" not in text_of(stated) and text_of(stated).endswith(".\n")


def test_it_is_honest_about_speed(facts):
    assert "**unstructured sparsity can save bytes, not time**" in text_of(facts)
    assert "each still takes as many bits as any other weight" in text_of(facts)
    facts["bytes"]["per_weight_bits"] = 3.2
    assert "On disk they are left out" in text_of(facts)
    for layer in facts["layers"].values():
        layer["pattern"] = "2:4"
    text = text_of(facts)
    assert "stock transformers does not use them" in text and "unstructured" not in text
    facts["sparsity"] = 0
    assert "are zero" not in text_of(facts)


def test_what_each_format_lets_expect_is_said(facts):
    for format, expected in {
        "compressed-tensors": "An engine with kernels for packed weights can be faster",
        "sparse": "No engine computes on the `sparse` format",
        "dense": "is stored and multiplied as a dense value",
        "gptq": "run on the kernels of the packages above",
        "bitsandbytes": "run on the kernels of the packages above",
    }.items():
        text = text_of(facts | {"format": format})
        assert expected in text
        assert ("can be faster" in text) == (format == "compressed-tensors")
    for layer in facts["layers"].values():
        layer["bits"] = 16
    assert "kernels for packed" not in text_of(facts) and "grid" not in text_of(facts)


def test_no_path_or_text_of_its_author_is_told(stated, tiny_llama_folder, text_file, prose):
    text = text_of(stated)
    assert str(tiny_llama_folder) not in text and str(text_file.parent) not in text
    assert prose[200:260] not in text and "prose.txt" in text


def test_the_command_makes_the_same_model_again(
    stated, tiny_llama_folder, text_file, tmp_path, monkeypatch
):
    code = text_of(stated).split("```bash\n")[1].split("```")[0]
    program, *arguments = shlex.split(code.replace("\\\n", " "))
    assert program == "optimum-order" and "--ignore" in arguments and "block" in arguments
    assert arguments[arguments.index("--calibration-dtype") + 1] == stated["calibration"]["dtype"]
    for path in (tiny_llama_folder, text_file):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    again = manifest.load(tmp_path / "OUTPUT")
    for facts in (again, varies := copy.deepcopy(stated)):
        for key in ("files", "digest", "versions"):
            del facts[key]
    assert again == varies


def test_without_data_or_metrics_the_command_is_short(facts):
    facts.update(calibration=None, metrics={}, ignore=None, order="rtn:4")
    options = ["--order", "rtn:4", "--format", "compressed-tensors", "--schedule", "block"]
    options += ["--pause", facts["pause"], "--dtype", "float32"]
    assert shlex.split(card.command(facts).replace("\\\n", " "))[4:] == options


def test_the_branch_and_the_task_are_in_the_code(stated):
    expected = 'pipeline("feature-extraction", model="me/small", revision="dev")'
    assert expected in text_of(stated, AutoModel, revision="dev")


def test_names_cannot_break_the_page(facts):
    facts["metrics"]["perplexity"]["after"]["source"] = "a|b`\n{{ 7 * 7 }}.txt"
    facts["base_model"]["id"] = "{% raw %}"
    text = text_of(facts)
    rows = [line for line in text.split("\n") if line.startswith("| perplexity")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 4
    assert "{{ 7 * 7 }}" in rows[0] and "`{% raw %}`" in text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_one_line_says_what_to_install(stated, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for needs in (card.check, lambda: text_of(stated), lambda: card.plot(stated)):
        with pytest.raises(OptimumOrderError) as caught:
            needs()
        assert str(caught.value) == (
            f"The package '{package}' is not installed. Install it with "
            "pip install 'optimum-order[hub]'."
        )


def picture(facts):
    return matplotlib.image.imread(io.BytesIO(card.plot(facts)))


def test_the_plot_shows_each_stage_and_reads_on_any_background(facts):
    first = picture(facts)
    height, width, _ = first.shape
    assert height > 1.5 * width  # two stages and the sparsity, one below the other
    assert width < 700  # whose letters a screen of 400 pixels shows at half their size or more
    assert (first[..., 3] == 1).all() and (first[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all()
    layer = facts["layers"]["model.layers.1.mlp.up_proj"]
    layer["stages"][0]["relative_error"] *= 2
    changed = (picture(facts) != first).any(axis=(1, 2)).nonzero()[0]
    assert len(changed) and changed.max() < height / 3 + 20  # in the first panel, and nowhere else
    # the panel of the sparsity has gone, that of the bits has come
    facts["sparsity"] = 0
    layer["bits"] = 3
    assert picture(facts).shape == first.shape


def test_a_layer_has_a_block_and_a_name_in_it():
    for name, place in {
        "model.layers.3.mlp.up_proj": (3, "mlp.up_proj"),
        "model.layers.11.mlp.experts.down_proj.7": (11, "mlp.experts.down_proj"),
        "vit.encoder.layer.0.attention.query": (0, "attention.query"),
        "lm_head": (0, "lm_head"),
    }.items():
        assert card._place(name) == place


def test_the_same_manifest_makes_the_same_card_and_plot(stated):
    again = json.loads(json.dumps(stated))
    assert text_of(again) == text_of(stated) and card.plot(again) == card.plot(stated)


def test_stages_that_leave_layers_alone_or_change_none(facts):
    """A stage that makes the MLPs narrower, one that removes blocks, and one with targets."""
    order = ("width:0.2", "depth:1", "gptq:4")
    facts["order"] = " > ".join(order)
    facts["stages"] = [
        {"stage": stage, "method": stage.partition(":")[0], "summary": "a summary"}
        for stage in order
    ]
    figures = {"relative_error": 0.25, "measured_on": "weights"}
    for name, layer in facts["layers"].items():
        made = [{"stage": "gptq:4", **figures, "relative_error": 0.5}]
        layer["stages"] = [{"stage": "width:0.2", **figures}] * (".mlp." in name) + made
    text = text_of(facts)
    assert "| `width:0.2` | a summary | 0.25 | 0.25 in `model.layers.0.mlp" in text
    assert "| `depth:1` | a summary |  | | |" in text
    assert "| `gptq:4` | a summary | 0.5 | 0.5 in" in text
    assert card.diagram(facts).count("error") == 2
    assert card.plot(facts).startswith(b"\x89PNG")


def test_a_saved_folder_has_a_card_without_a_picture_that_loads_the_folder(saved_folder):
    folder, stated = saved_folder
    text = (folder / card.FILE).read_text(encoding="utf-8")
    assert card.is_untouched(text) and ModelCard(text).data["tags"][0] == "optimum-order"
    assert f'model="{folder.name}"' in text and f"vllm serve {folder.name}" in text
    assert manifest.PLOT not in text and not (folder / manifest.PLOT).exists()
    assert card.FILE not in stated["files"]


def test_a_model_of_a_class_that_no_auto_class_loads_is_saved_without_a_card(tmp_path, caplog):
    """The code in a card could not load it; users load it by their own class."""

    class Config(PreTrainedConfig):
        model_type = "of_ones_own"

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 32)) for _ in range(2)])
            self.post_init()

    compressed = JointCompressor(Model(Config())).compress("rtn:4", progress=False)
    with caplog.at_level("INFO"):
        compressed.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / card.FILE).exists() and "No model card is written" in caplog.text
    assert verify(tmp_path / "out") == []


def test_a_card_that_was_edited_is_told_from_one_that_was_not(stated, tmp_path):
    text = card.local(stated, tmp_path, AutoModelForCausalLM)
    assert card.is_untouched(text) and card.is_untouched(text + "\n")
    assert not card.is_untouched(text.replace("wanda", "Wanda"))
    assert not card.is_untouched(text_of(stated)) and not card.is_untouched("")


def test_llama_cpp_is_told_the_file_of_a_folder_and_the_id_on_the_hub(facts, tmp_path):
    facts["format"] = "gguf"
    folder = tmp_path / "a model"
    text = card.local(facts, folder, AutoModelForCausalLM)
    assert "llama-server -m 'a model/model.gguf'" in text and "-hf" not in text
    assert "llama-server -hf me/small" in text_of(facts)
