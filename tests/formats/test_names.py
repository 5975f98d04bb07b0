"""Names that hold under any head, and that mean one layer only."""

import json
import re

import torch
import transformers
from compressed_tensors.utils.match import match_targets
from torch import nn

from optimum_order import formats
from optimum_order.formats import names
from optimum_order.formats.names import Names
from optimum_order.testing import same_bits

MIXED = [
    "rtn(bits=3, group_size=16)",
    "rtn(bits=8, group_size=-1)",
    "magnitude:0.5",
    "rtn(bits=2, group_size=-1)",
]


def two_towers(tmp_path):
    """A model in which one layer's name ends with the whole inner name of another."""

    class Towers(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        base_model_prefix = "model"

        def __init__(self, config):
            super().__init__(config)
            inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])})
            inner["vision"] = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(64, 64)])})
            self.model = inner
            self.lm_head = nn.Linear(64, 64)
            self.post_init()

    return Towers(transformers.PretrainedConfig())


def test_a_pattern_means_a_name_after_any_prefix():
    pattern = re.compile(names.suffix_pattern("layers.1.mlp"))
    for name, is_meant in {
        "layers.1.mlp": True,
        "model.layers.1.mlp": True,
        "a.b.layers.1.mlp": True,
        "xlayers.1.mlp": False,
        "layers.11.mlp": False,
        "layers.1.mlp.x": False,
        "layersX1.mlp": False,
    }.items():
        assert (
            (pattern.match(name) is not None) == is_meant == names.ends_with(name, "layers.1.mlp")
        )
    assert names.suffix_of(pattern.pattern) == "layers.1.mlp"
    for other in ("(a+)+$", "(?:.*\\.)?a+$", "(?:.*\\.)?a.b$", "", "layers\\.1$"):
        assert names.suffix_of(other) is None


def test_a_suffix_that_two_towers_share_means_neither(tmp_path, target_of):
    model = two_towers(tmp_path)
    known = Names(model)
    assert known.inner("model.layers.0") == "layers.0" and known.inner("lm_head") == "lm_head"
    assert [known.is_unique(f"model.{name}") for name in ("layers.0", "layers.1")] == [False, True]
    assert known.is_unique("model.vision.layers.0")
    assert known.spellings("model.layers.0") == ["model.layers.0", "layers.0"]
    assert known.spellings("layers.0") == ["layers.0", "model.layers.0"]


def test_each_layer_of_two_towers_has_its_own_width(tmp_path, compressed):
    model = two_towers(tmp_path)
    orders = {"layers.0": "rtn:4", "layers.1": "rtn:8", "vision.layers.0": "rtn:2", "lm_head": None}
    contents = compressed(model, "rtn:4", ["*"], {"vision": "rtn:2"} | orders)
    codec = formats.choose(contents, "compressed-tensors", unproven=True)
    states = {k: v for k, v in contents.layers.states.items() if k != "lm_head"}
    layers = formats.Layers(contents.layers.targets, states)
    entry = codec.quantization_config(contents.layout, layers)
    config = {"quantization_config": json.loads(json.dumps(entry))}
    for full, state in states.items():
        for name in (full, full.removeprefix("model.")):
            assert codec.scheme_in(config, [name])["bits"] == state.grid.bits
            targets = {t: g for g in entry["config_groups"].values() for t in g["targets"]}
            match = match_targets(name, nn.Linear(1, 1), targets)[0]
            assert targets[match]["weights"]["num_bits"] == state.grid.bits
    assert entry["ignore"] == ["lm_head"]


def same_hidden_states(model, folder, classes):
    """Check that the base model has the same outputs, whatever head it is loaded with."""
    ids = torch.arange(1, 17)[None]
    for cls in classes:
        loaded, info = cls.from_pretrained(folder, output_loading_info=True)
        heads = ("score", "class", "pooler")
        assert [name for name in info["missing_keys"] if not name.startswith(heads)] == []
        with torch.no_grad():
            # The first forward of the whole model unpacks layers of several widths.
            hidden = loaded.eval()(ids, output_hidden_states=True).hidden_states[-1]
            expected = model(ids, output_hidden_states=True).hidden_states[-1]
        assert same_bits(hidden, expected), cls


def write(contents, folder, format="compressed-tensors"):
    """Write a folder in a format."""
    codec = formats.choose(contents, format)
    folder.mkdir(exist_ok=True)
    formats.container(codec.name).write(contents, codec, folder, header={})


def test_mixed_folders_load_with_a_head_and_without(make_model, compressed, tmp_path):
    model = make_model("llama")
    write(compressed(model, MIXED), tmp_path / "head")
    same_hidden_states(model, tmp_path / "head", [type(model), transformers.AutoModel])
    write(compressed(model.model, MIXED), tmp_path / "base")
    same_hidden_states(model.model, tmp_path / "base", [transformers.AutoModel])
    config = {}
    for name in ("head", "base"):
        entry = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        config[name] = entry["config_groups"], [key for key in entry["ignore"] if key != "lm_head"]
    assert config["head"] == config["base"]  # so each loads as the other


def test_folders_of_one_scheme_load_under_heads_that_are_new(make_model, compressed, tmp_path):
    llama = make_model("llama")
    bert = transformers.BertForMaskedLM(make_model("bert").config).eval()
    other_heads = ("LlamaForSequenceClassification", "BertForTokenClassification")
    for model, head in zip((llama, bert), other_heads, strict=True):
        write(compressed(model, ["rtn(bits=3, group_size=16)", "magnitude:0.5"]), tmp_path / head)
        classes = [type(model), transformers.AutoModel, getattr(transformers, head)]
        same_hidden_states(model, tmp_path / head, classes)


def test_bitsandbytes_leaves_the_same_layers_dense_under_any_head(make_model, compressed, tmp_path):
    model = make_model("llama")
    contents = compressed(model, ["bitsandbytes:int8", "magnitude:0.5"])
    write(contents, tmp_path, "bitsandbytes")
    for cls in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        base = cls.from_pretrained(tmp_path).base_model
        for name, state in contents.layers.states.items():
            weight = base.get_submodule(name.removeprefix("model.")).weight
            assert (weight.dtype == torch.int8) == (state.grid is not None), (cls, name)
            if state.grid is None:
                assert same_bits(weight.float(), state.weight)
