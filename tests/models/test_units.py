import fnmatch

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

from optimum_order.errors import ModelError, OrderError
from optimum_order.models.units import find_units

LLAMA = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}
ATTENTION = {name: shape for name, shape in LLAMA.items() if name.startswith("self_attn")}


def experts(gate_up, down):
    return {
        f"mlp.experts.{name}.{i}": shape
        for name, shape in [("gate_up_proj", gate_up), ("down_proj", down)]
        for i in range(4)
    }


EXPECTED = {
    "albert": (
        "encoder.albert_layer_groups",
        1,
        {
            f"albert_layers.0.attention.{name}": (32, 32)
            for name in ("query", "key", "value", "dense")
        }
        | {"albert_layers.0.ffn": (48, 32), "albert_layers.0.ffn_output": (32, 48)},
    ),
    "bert": (
        "encoder.layer",
        2,
        {f"attention.self.{name}": (32, 32) for name in ("query", "key", "value")}
        | {
            "attention.output.dense": (32, 32),
            "intermediate.dense": (48, 32),
            "output.dense": (32, 48),
        },
    ),
    "gemma": ("model.layers", 2, LLAMA),
    "gemma3_text": ("model.layers", 2, LLAMA),
    "gpt2": (
        "transformer.h",
        2,
        {
            "attn.c_attn": (96, 32),
            "attn.c_proj": (32, 32),
            "mlp.c_fc": (128, 32),
            "mlp.c_proj": (32, 128),
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        2,
        {
            "attention.query_key_value": (96, 32),
            "attention.dense": (32, 32),
            "mlp.dense_h_to_4h": (48, 32),
            "mlp.dense_4h_to_h": (32, 48),
        },
    ),
    "gpt_oss": ("model.layers", 2, ATTENTION | experts((96, 32), (32, 48))),
    "llama": ("model.layers", 2, LLAMA),
    "mixtral": ("model.layers", 2, ATTENTION | experts((96, 32), (32, 48))),
    "opt": (
        "model.decoder.layers",
        2,
        {f"self_attn.{name}_proj": (32, 32) for name in "kvq"}
        | {"self_attn.out_proj": (32, 32), "fc1": (48, 32), "fc2": (32, 48)},
    ),
    "qwen3": ("model.layers", 2, LLAMA),
    "qwen3_moe": ("model.layers", 2, ATTENTION | experts((48, 32), (32, 24))),
}


def names(units):
    return [target.name for unit in units for target in unit.targets]


def linear_input(model, target, x):
    """What the model's own module makes of x (tokens, in), less its bias."""
    if target.kind == "expert":
        parameter = target.parameter[target.expert]
        return x @ parameter if target.transposed else nn.functional.linear(x, parameter)
    module = model.get_submodule(target.name)
    bias = 0 if module.bias is None else module.bias
    return module(x) - bias


def test_every_block_and_layer_by_name_and_shape(make_model):
    for architecture, (blocks, count, layers) in EXPECTED.items():
        units = find_units(make_model(architecture))
        assert [unit.name for unit in units] == [f"{blocks}.{i}" for i in range(count)]
        for unit in units:
            shapes = {target.name: tuple(target.view.shape) for target in unit.targets}
            assert shapes == {f"{unit.name}.{name}": shape for name, shape in layers.items()}


@torch.no_grad()
def test_the_view_is_what_multiplies_an_input(make_model):
    for architecture in EXPECTED:
        model = make_model(architecture)
        for target in find_units(model)[0].targets:
            x = torch.randn(5, target.view.shape[1], generator=torch.Generator().manual_seed(0))
            product = linear_input(model, target, x)
            assert torch.allclose(product, x @ target.view.T, atol=1e-5), target.name


def test_what_is_written_is_what_the_model_has_and_nothing_else_changes(
    make_model, make_image_model
):
    models = [make_model(name) for name in ("llama", "gpt2", "mixtral", "gpt_oss")]
    for model in [*models, make_image_model("regnet")]:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for target in find_units(model)[0].targets:
            weight = target.read()
            assert weight.is_contiguous()
            assert torch.equal(weight, target.view)
            assert weight.data_ptr() != target.view.data_ptr()
            new = torch.randn_like(weight)
            target.write(new)
            assert torch.equal(target.read(), new)
            assert torch.equal(target.view, new)
            target.write(weight)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_target_sees_a_parameter_that_was_put_in_place_of_another(make_model):
    model = make_model("gpt2")
    target = find_units(model)[0].targets[0]
    module = model.transformer.h[0].attn.c_attn
    assert target.parameter is module.weight and target.parameter_name in model.state_dict()
    module.weight = nn.Parameter(torch.randn(32, 48))
    assert target.parameter is module.weight and target.view.shape == (48, 32)
    target.write(torch.zeros(48, 32))
    assert not module.weight.any()


def test_a_target_finds_its_part_in_any_tensor_of_the_parameters_shape(make_model):
    """In the tensor's own memory: a checkpoint is read and written so, one layer at a time."""
    for architecture in ("gpt2", "gpt_oss", "llama"):
        model = make_model(architecture)
        for target in find_units(model)[1].targets:
            tensor = target.parameter.detach().clone()
            assert torch.equal(target.matrix_of(tensor), target.view)
            target.matrix_of(tensor).zero_()
            zeros = (tensor == 0).sum()
            assert zeros == target.view.numel() and target.view.all()


def test_an_expert_is_one_slice(make_model):
    model = make_model("gpt_oss")
    target = next(
        t
        for t in find_units(model)[1].targets
        if t.name == "model.layers.1.mlp.experts.gate_up_proj.2"
    )
    parameter = model.model.layers[1].mlp.experts.gate_up_proj
    before = parameter.detach().clone()
    target.write(torch.zeros(96, 32))
    assert not parameter[2].any()
    others = [0, 1, 3]
    assert torch.equal(parameter[others], before[others])


def stage(index, depth, first):
    """Return the layers of a stage of 3 x 3 convolutions, with a shortcut in its first block."""
    width = 8 * (index + 1)
    shapes = {}
    for block in range(depth):
        name = f"resnet.encoder.stages.{index}.layers.{block}"
        if block == 0 and first != width:
            shapes[f"{name}.shortcut.convolution"] = (width, first)
        shapes[f"{name}.layer.0.convolution"] = (width, 9 * (width if block else first))
        shapes[f"{name}.layer.1.convolution"] = (width, 9 * width)
    return shapes


class TestConvolutions:
    def test_the_blocks_of_a_resnet_are_those_inside_its_stages(self, make_image_model):
        units = find_units(make_image_model("resnet"))
        assert [unit.name for unit in units] == [
            f"resnet.encoder.stages.{block}" for block in ("0.layers.0", "1.layers.0", "1.layers.1")
        ]
        shapes = {
            target.name: tuple(target.view.shape) for unit in units for target in unit.targets
        }
        assert shapes == stage(0, 1, 8) | stage(1, 2, 8)  # neither the stem nor the classifier
        assert {target.kind for unit in units for target in unit.targets} == {"conv2d"}

    @pytest.mark.parametrize("architecture", ["vit", "deit"])
    def test_patches_and_heads_are_left_alone(self, make_image_model, architecture):
        units = find_units(make_image_model(architecture))
        assert [unit.name for unit in units] == [f"{architecture}.layers.{i}" for i in range(2)]
        layers = {name.removeprefix(f"{architecture}.layers.0.") for name in names(units[:1])}
        assert layers == {f"attention.{x}_proj" for x in "qkvo"} | {"mlp.fc1", "mlp.fc2"}

    def test_a_stem_can_be_asked_for(self, make_image_model):
        model = make_image_model("resnet")
        (unit,) = find_units(model, targets=["*.embedder.*"])
        assert unit.module is model.resnet.embedder.embedder.convolution
        assert tuple(unit.targets[0].view.shape) == (8, 3 * 7 * 7)

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("kernel", [1, (3, 2)])
    def test_the_view_is_what_multiplies_a_patch(self, groups, kernel):
        block = nn.Conv2d(8, 6, kernel, groups=groups, bias=False)
        targets = find_units(
            nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"a": block})])})
        )[0].targets
        assert len(targets) == groups
        x = torch.randn(5, 8, *block.kernel_size, generator=torch.Generator().manual_seed(0))
        parts = [
            part.flatten(1) @ target.view.T
            for part, target in zip(x.chunk(groups, 1), targets, strict=True)
        ]
        with torch.no_grad():
            assert torch.allclose(block(x)[:, :, 0, 0], torch.cat(parts, 1), atol=1e-5)

    def test_a_group_is_its_filters_alone(self, make_image_model):
        model = make_image_model("regnet")
        unit = find_units(model)[-1]
        grouped = [target for target in unit.targets if target.rows]
        name = "regnet.encoder.stages.1.layers.1.layer.1.convolution"
        assert [target.name for target in grouped] == [f"{name}.weight.{i}" for i in range(4)]
        assert {tuple(target.view.shape) for target in grouped} == {(4, 36)}
        parameter = model.get_parameter(f"{name}.weight")
        before = parameter.detach().clone()
        weight = grouped[2].read()
        assert weight.is_contiguous() and torch.equal(weight, before[8:12].flatten(1))
        grouped[2].write(torch.zeros(4, 36))
        assert not parameter[8:12].any()
        others = [*range(8), *range(12, 16)]
        assert torch.equal(parameter[others], before[others])

    def test_groups_outside_the_blocks_are_one_unit(self):
        model = nn.ModuleDict(
            {"layers": nn.ModuleList([nn.Linear(4, 4)]), "stem": nn.Conv2d(4, 8, 3, groups=2)}
        )
        (unit,) = find_units(model, targets=["stem.*"])
        assert unit.module is model["stem"] and names([unit]) == ["stem.weight.0", "stem.weight.1"]

    def test_depthwise_convolutions_stay_dense_and_one_line_says_so(self, make_image_model, caplog):
        layers = names(find_units(make_image_model("convnext")))
        assert not any("dwconv" in name for name in layers) and any(
            "downsampling_layer" in name for name in layers
        )
        (line,) = caplog.messages
        assert line.startswith(
            "2 depthwise convolutions, such as 'convnext.encoder.stages.0.layers.0.dwconv', stay"
        )

    def test_what_changes_its_weight_before_it_is_used_stays_dense(self, caplog):
        class Standardised(nn.Conv2d):
            def forward(self, x):
                weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
                return self._conv_forward(x, weight, self.bias)

        block = nn.ModuleDict(
            {"a": Standardised(4, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.ConvTranspose2d(4, 4, 3)}
        )
        model = nn.ModuleDict({"layers": nn.ModuleList([block])})
        assert names(find_units(model)) == ["layers.0.b"]
        assert [message.split(" is not")[0] for message in caplog.messages] == [
            f"'layers.0.{name}.weight' (4, 4, 3, 3)" for name in "ac"
        ]

    def test_a_wrapper_of_more_than_a_sequential_is_one_block(self):
        def blocks():
            return nn.Sequential(*[nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2)])

        wrapper = nn.ModuleDict({"layers": blocks()})
        both = nn.ModuleDict({"layers": blocks(), "norm": nn.LayerNorm(4)})
        layers = nn.ModuleDict(
            {"layers": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))}
        )
        model = nn.ModuleDict({"stages": nn.ModuleList([wrapper, both, layers])})
        units = find_units(model)
        assert [unit.name for unit in units] == [
            "stages.0.layers.0",
            "stages.0.layers.1",
            "stages.1",
            "stages.2",
        ]
        assert [len(unit.targets) for unit in units] == [1, 1, 2, 2]


class TestChoosing:
    def test_targets_alone_are_compressed(self, make_model):
        model = make_model("llama")
        assert names(find_units(model, targets=["*.q_proj", "*.v_proj"])) == [
            f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"
        ]
        units = find_units(model, targets=[r"re:model\.layers\.1\.mlp\..*"])
        assert [unit.name for unit in units] == ["model.layers.1"]
        assert len(names(units)) == 3

    def test_ignore_wins(self, make_model):
        model = make_model("llama")
        every = names(find_units(model))
        assert names(find_units(model, ignore=["*.down_proj"])) == [
            n for n in every if not n.endswith("down_proj")
        ]
        both = find_units(model, targets=["*.q_proj"], ignore=["model.layers.0.*"])
        assert names(both) == ["model.layers.1.self_attn.q_proj"]

    def test_single_experts_can_be_chosen(self, make_model):
        layers = names(find_units(make_model("mixtral"), targets=["*.experts.*.3"]))
        assert layers == fnmatch.filter(names(find_units(make_model("mixtral"))), "*.experts.*.3")
        assert len(layers) == 4

    def test_heads_embeddings_and_routers_are_left_alone(self, make_model):
        spared = {"lm_head", "embed_tokens", "embed_positions", "wte", "wpe", "gate", "router"}
        spared |= {"gate_up_proj_bias", "down_proj_bias"}
        for architecture in ("llama", "mixtral", "qwen3_moe", "gpt_oss", "opt", "gpt2", "gemma"):
            model = make_model(architecture)
            chosen = {id(target.parameter) for unit in find_units(model) for target in unit.targets}
            assert id(model.get_output_embeddings().weight) not in chosen
            assert id(model.get_input_embeddings().weight) not in chosen
            left = {
                name.removesuffix(".weight").rsplit(".", 1)[-1]
                for name, parameter in model.named_parameters()
                if parameter.ndim > 1 and id(parameter) not in chosen
            }
            assert left <= spared, architecture

    def test_a_linear_router_is_left_alone_unless_asked_for(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate, self.up = nn.Linear(4, 2), nn.Linear(4, 4)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers, self.head = nn.ModuleList([Block()]), nn.Linear(4, 2)

        assert names(find_units(Model())) == ["layers.0.up"]
        assert names(find_units(Model(), targets=["*.gate"])) == ["layers.0.gate"]
        outside = find_units(Model(), targets=["head", "*.up"])
        assert [(unit.name, [t.name for t in unit.targets]) for unit in outside] == [
            ("layers.0", ["layers.0.up"]),
            ("head", ["head"]),
        ]

    def test_an_untied_head_can_be_asked_for(self, make_model):
        model = make_model("llama")
        (unit,) = find_units(model, targets=["lm_head"])
        assert unit.module is model.lm_head
        assert tuple(unit.targets[0].view.shape) == (64, 32)


class TestEmbeddings:
    def test_are_taken_where_a_pattern_names_them(self, make_model):
        model = make_model("llama")
        named = find_units(model, embeddings=["*.layers.*", "*embed_tokens"])
        assert [unit.name for unit in named][-1] == "model.embed_tokens"
        (target,) = named[-1].targets
        assert target.kind == "embedding"
        assert target.view.shape == model.model.embed_tokens.weight.shape
        assert named[:-1] == find_units(model)

    def test_are_not_taken_by_a_pattern_for_all(self, make_model):
        model = make_model("llama")
        for pattern in ("*", "model.*", "re:.*"):
            units = find_units(model, embeddings=[pattern])
            assert all(target.kind != "embedding" for unit in units for target in unit.targets)

    def test_are_named_in_a_stage_not_among_layers(self, make_model):
        with pytest.raises(ModelError, match=r"rtn\(bits=8, targets=\*embed_tokens\)"):
            find_units(make_model("llama"), ["*.layers.*", "*embed_tokens"])

    def test_of_a_tied_head_go_with_the_head(self):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        *_, unit = find_units(model, embeddings=["model.embed_tokens"])
        unit.targets[0].write(torch.full((64, 32), 0.5))
        assert (model.lm_head.weight == 0.5).all()

    def test_inside_blocks_are_left_alone(self):
        """Such as T5's table of relative positions."""
        sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
        model = T5EncoderModel(T5Config(vocab_size=64, **sizes))
        assert any(isinstance(module, nn.Embedding) for module in model.encoder.block.modules())
        with pytest.raises(ModelError, match="matches no layer"):
            find_units(model, ["*relative_attention_bias"])


def test_a_router_inside_a_router_is_left_alone():
    """JetMoe and DBRX keep the router's matrix a level deeper."""
    block = nn.ModuleDict(
        {"router": nn.ModuleDict({"layer": nn.Linear(4, 2)}), "up": nn.Linear(4, 4)}
    )
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    assert [target.name for unit in find_units(model) for target in unit.targets] == ["layers.0.up"]


def test_three_dimensional_weights_that_are_not_understood_are_named(caplog):
    block = nn.Linear(4, 4)
    block.experts = nn.Parameter(torch.zeros(2, 4, 4))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": block})])})
    find_units(model)
    assert "'layers.0.up.experts' (2, 4, 4)" in caplog.text and "stays dense" in caplog.text


class TestRefusing:
    @pytest.mark.parametrize("architecture", ["gpt2", "gemma", "opt"])
    def test_a_tied_head(self, make_model, architecture):
        with pytest.raises(
            ModelError, match=r"'lm_head' shares its weight with .*embed_tokens\.weight|wte\.weight"
        ):
            find_units(make_model(architecture), targets=["lm_head"])

    def test_a_pattern_that_matches_nothing(self, make_model):
        with pytest.raises(
            ModelError,
            match=r"'\*\.query' matches no layer of LlamaForCausalLM\. .* 'model\.layers\.0",
        ):
            find_units(make_model("llama"), targets=["*.q_proj", "*.query"])
        with pytest.raises(ModelError, match="'nothing' matches no layer"):
            find_units(make_model("llama"), ignore=["nothing"])

    def test_a_pattern_that_is_no_regular_expression(self, make_model):
        with pytest.raises(OrderError, match=r"'re:\(' is not a regular expression"):
            find_units(make_model("llama"), targets=["re:("])

    def test_a_choice_that_leaves_nothing(self, make_model):
        with pytest.raises(
            ModelError, match=r"no layer to compress.* targets=\['\*\.q_proj'\], ignore=\['model"
        ):
            find_units(make_model("llama"), targets=["*.q_proj"], ignore=["model.*"])

    def test_a_model_without_blocks(self):
        with pytest.raises(
            ModelError, match=r"Sequential has no layer to compress\. .* it has 0 blocks\."
        ):
            find_units(nn.Sequential(nn.Linear(4, 4)))
