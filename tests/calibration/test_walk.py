import collections
import copy
import dataclasses
import functools
import threading

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum_order.calibration.walk import walk as walk_in
from optimum_order.engine.recipe import method
from optimum_order.errors import ModelError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms
from optimum_order.models.units import find_units
from optimum_order.order import Stage

walk = functools.partial(walk_in, dtype=torch.float32)
"""With products exact enough to be compared with those of hooks."""

WALKED = [
    "llama",
    "qwen3",
    "gpt2",
    "opt",
    "gpt_neox",
    "gemma",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "bert",
]
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def observe(model, units, batches):
    """For each layer, all its inputs X (tokens, in) in float64, seen by hooks on the whole model's own forward."""
    seen = {target.name: [] for unit in units for target in unit.targets}
    handles = []

    def see(name, x):
        seen[name].append(x.reshape(-1, x.shape[-1]).double())

    def see_experts(module, name, args, kwargs):
        hidden, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
        for expert in range(len(module.down_proj)):
            rows = hidden[(chosen == expert).any(-1)]
            see(f"{name}.gate_up_proj.{expert}", rows)
            weight = module.gate_up_proj[expert]
            gate_up = rows @ (weight if module.is_transposed else weight.T)
            if module.has_bias:
                gate_up = gate_up + module.gate_up_proj_bias[expert]
            see(f"{name}.down_proj.{expert}", module._apply_gate(gate_up))

    def see_patches(module, name, x):
        """The patches that a convolution without zeros around them cuts out of an image, by a loop."""
        padded = torch.nn.functional.pad(
            x, [side for side in module.padding[::-1] for _ in range(2)]
        )
        (kh, kw), (sh, sw) = module.kernel_size, module.stride
        for group, channels in enumerate(padded.chunk(module.groups, 1)):
            for top in range(0, padded.shape[2] - kh + 1, sh):
                for left in range(0, padded.shape[3] - kw + 1, sw):
                    patch = channels[:, :, top : top + kh, left : left + kw].flatten(1)
                    see(name if module.groups == 1 else f"{name}.weight.{group}", patch)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d) and {name, f"{name}.weight.0"} & set(seen):
            hook = lambda m, args, name=name: see_patches(m, name, args[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
        elif isinstance(module, (torch.nn.Linear, Conv1D)) and name in seen:
            handles.append(
                module.register_forward_pre_hook(lambda m, args, name=name: see(name, args[0]))
            )
        elif hasattr(module, "is_transposed"):
            hook = lambda m, args, kwargs, name=name: see_experts(m, name, args, kwargs)  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def collect(model, units, batches, change=lambda visit: None, gram=True):
    """The statistics of every layer by name, and the units in the order of the walk."""
    statistics, visited = {}, []

    def visit(at):
        visited.append(at.unit.name)
        assert set(at.statistics) == {target.name for target in at.unit.targets}
        statistics.update(at.statistics)
        change(at)

    walk(model, units, batches, visit, gram=gram)
    return statistics, visited


def agree(statistics, X):
    gram = X.T @ X
    scale = gram.diagonal().max().clamp(min=1e-9)
    return (
        statistics.tokens == len(X)
        and torch.allclose(statistics[Gram].double(), gram, rtol=1e-4, atol=1e-5 * scale)
        and torch.allclose(
            statistics[SquaredNorms].double(), gram.diagonal(), rtol=1e-4, atol=1e-5 * scale
        )
    )


@pytest.mark.parametrize("architecture", WALKED)
def test_sees_what_hooks_on_the_whole_model_see_and_leaves_no_trace(
    make_model, batches, architecture
):
    model = make_model(architecture)
    units = find_units(model)
    expected = observe(model, units, batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = getattr(model.config, "_experts_implementation", None)
    with torch.no_grad():
        output = model(**batches[0])[0]

    statistics, visited = collect(model, units, batches)

    assert visited == [unit.name for unit in units]
    assert set(statistics) == set(expected)
    for name, X in expected.items():
        assert agree(statistics[name], X), name
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert getattr(model.config, "_experts_implementation", None) == implementation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(**batches[0])[0], output)


@pytest.mark.parametrize("architecture", ["vit", "deit", "resnet", "regnet", "swin", "convnext"])
def test_image_classifiers_are_walked_likewise(make_image_model, image_batches, architecture):
    model = make_image_model(architecture)
    units = find_units(model)
    expected = observe(model, units, image_batches)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    computed = []
    handle = model.classifier.register_forward_hook(lambda *_: computed.append(1))

    statistics, visited = collect(model, units, image_batches)

    handle.remove()
    assert visited == [unit.name for unit in units] and len(computed) <= 1
    assert set(statistics) == set(expected)
    for name, X in expected.items():
        assert agree(statistics[name], X), name
    # running averages of batch normalisation too
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_later_blocks_of_an_image_classifier_see_what_changed_earlier_ones_produce(
    make_image_model, image_batches, architecture
):
    model = make_image_model(architecture)
    units = find_units(model)

    def change(at):
        if at.unit is units[0]:
            for target in at.unit.targets:
                target.write(target.read() * 0.5)

    statistics, _ = collect(model, units, image_batches, change)
    changed = observe(model, units, image_batches)
    for target in units[1].targets:
        assert agree(statistics[target.name], changed[target.name]), target.name


def test_a_position_of_an_image_is_a_token(make_image_model, image_batches):
    model = make_image_model("resnet")
    found = {}

    def visit(at):
        found[at.unit.name] = at.outputs()

    walk(model, find_units(model), image_batches, visit, gram=False)
    with torch.no_grad():
        hidden = [model.resnet.embedder(batch["pixel_values"]) for batch in image_batches[:2]]
        expected = torch.cat([model.resnet.encoder.stages[0](x) for x in hidden])
    assert torch.allclose(
        found["resnet.encoder.stages.0.layers.0"],
        expected.permute(0, 2, 3, 1).flatten(0, 2),
        atol=1e-5,
    )


def test_pixels_are_given_in_the_dtype_of_the_model(make_image_model, image_batches):
    model = make_image_model("resnet").to(torch.bfloat16)
    statistics, _ = collect(model, find_units(model), image_batches)
    batches = [
        {"pixel_values": batch["pixel_values"].to(torch.bfloat16)} for batch in image_batches
    ]
    expected = observe(model, find_units(model), batches)
    assert all(agree(statistics[name], X) for name, X in expected.items())


@pytest.mark.parametrize("architecture", WALKED)
def test_later_blocks_see_what_changed_earlier_ones_produce(make_model, batches, architecture):
    model = make_model(architecture)
    units = find_units(model)
    untouched = observe(model, units, batches)

    def change(at):
        if at.unit is units[0]:
            for target in at.unit.targets:
                target.write(target.read() * 0.5)

    statistics, _ = collect(model, units, batches, change)

    changed = observe(
        model, units, batches
    )  # of the model as it is now, with only its first block changed
    for target in units[1].targets:
        assert agree(statistics[target.name], changed[target.name]), target.name
    first = units[1].targets[0].name
    assert not agree(statistics[first], untouched[first])


def test_padding_masks_reach_the_blocks(make_model, batches):
    """A padded batch, whose second sequence is half as long."""
    model = make_model("llama")
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :8] = 0
    padded = [{**batches[0], "attention_mask": mask}]
    units = find_units(model)
    expected, unmasked = observe(model, units, padded), observe(model, units, batches[:1])
    statistics, _ = collect(model, units, padded)
    name = "model.layers.1.mlp.down_proj"
    assert agree(statistics[name], expected[name])
    assert not agree(statistics[name], unmasked[name])


@pytest.mark.parametrize(
    ("architecture", "shared"),
    [
        (
            "llama",
            [
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
            ],
        ),
        ("bert", [["attention.self.query", "attention.self.key", "attention.self.value"]]),
        ("opt", [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"]]),
        ("mixtral", [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]]),
        ("gpt2", []),
    ],
)
def test_layers_that_read_one_input_share_one_set_of_statistics(
    make_model, batches, architecture, shared
):
    model = make_model(architecture)
    groups = {}

    def visit(at):
        for target in at.unit.targets:
            name = target.name.removeprefix(f"{at.unit.name}.")
            if target.name in at.leaders:  # an expert may have been idle
                leader = at.leaders[target.name].removeprefix(f"{at.unit.name}.")
                groups.setdefault(leader, set()).add(name)
                assert at.statistics[target.name] is at.statistics[at.leaders[target.name]]

    walk(model, find_units(model), batches, visit, gram=True)
    assert sorted(map(sorted, (group for group in groups.values() if len(group) > 1))) == sorted(
        map(sorted, shared)
    )


@pytest.mark.parametrize("architecture", MIXTURES)
def test_every_expert_sees_the_tokens_routed_to_it(make_model, batches, architecture):
    """Two experts for each of the tokens, and at least one expert for a different number of them."""
    model = make_model(architecture)
    statistics, _ = collect(model, find_units(model), batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    for block in range(2):
        for name in ("gate_up_proj", "down_proj"):
            seen = [
                statistics[f"model.layers.{block}.mlp.experts.{name}.{i}"].tokens for i in range(4)
            ]
            assert sum(seen) == 2 * tokens
            assert len(set(seen)) > 1


@pytest.mark.parametrize("architecture", MIXTURES)
def test_an_idle_expert_has_no_tokens_and_is_compressed_with_a_note(make_model, architecture):
    model = make_model(architecture)
    units = find_units(model)
    one_token = [{"input_ids": torch.tensor([[5]])}]
    statistics, _ = collect(model, units, one_token)
    idle = [t for t in units[0].targets if statistics[t.name].tokens == 0]
    assert len(idle) == 4  # of two experts, both matrices
    for stage in (Stage("gptq", 4), Stage("sparsegpt", 0.5), Stage("wanda", 0.5)):
        state = method(stage).apply(LayerState(idle[0].read()), statistics[idle[0].name])
        assert "no calibration token reached this layer" in state.notes[0]


def test_norms_alone_hold_no_matrix(make_model, batches):
    model = make_model("llama")
    statistics, _ = collect(model, find_units(model), batches, gram=False)
    expected = observe(model, find_units(model), batches)
    for name, known in statistics.items():
        assert known[Gram] is None
        assert torch.allclose(
            known[SquaredNorms].double(), expected[name].square().sum(0), rtol=1e-4
        )


def test_only_the_units_it_is_given_are_visited(make_model, batches):
    model = make_model("llama")
    units = find_units(model, targets=["model.layers.1.mlp.*"])
    expected = observe(model, units, batches)
    statistics, visited = collect(model, units, batches)
    assert visited == ["model.layers.1"]
    assert all(agree(statistics[name], X) for name, X in expected.items())


def test_a_head_is_visited_after_the_blocks(make_model, batches):
    model = make_model("llama")
    units = find_units(model, targets=["lm_head", "*.q_proj"])
    expected = observe(model, units, batches)
    statistics, visited = collect(model, units, batches)
    assert visited == ["model.layers.0", "model.layers.1", "lm_head"]
    assert agree(statistics["lm_head"], expected["lm_head"])


def test_logits_are_not_computed(make_model, batches):
    model = make_model("llama")
    computed = []
    handle = model.lm_head.register_forward_hook(lambda *_: computed.append(1))
    collect(model, find_units(model), batches)
    assert not computed
    handle.remove()


def test_outputs_are_those_of_the_unit_as_it_is(make_model, batches):
    model = make_model("llama")
    found = {}

    def visit(at):
        before = at.outputs()
        target = at.unit.targets[-1]
        weight = target.read()
        target.write(torch.zeros_like(weight))
        without = at.outputs()
        target.write(weight)
        found[at.unit.name] = (before, without, at.outputs())

    walk(model, find_units(model), batches, visit, gram=False)
    with torch.no_grad():
        hidden = [
            model.model(**batch, output_hidden_states=True).hidden_states[1]
            for batch in batches[:2]
        ]
    before, without, after = found["model.layers.0"]
    assert torch.allclose(before, torch.cat([h.flatten(0, 1) for h in hidden]), atol=1e-5)
    assert not torch.allclose(before, without, atol=1e-2)
    assert torch.equal(before, after)


class TestCutOff:
    """A walk that goes on from where another was cut off sees what that one would have seen."""

    def cut(self, model, units, batches, after):
        """What a walk keeps at its units, up to and including unit `after`, by the units' names."""
        kept = {}

        def keep(unit, crossing):
            kept[unit.name] = copy.deepcopy(
                crossing()
            )  # an output that is held is one that may be used
            if unit.name == units[after].name:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            walk(model, units, batches, halve, gram=True, keep=keep)
        return kept

    def go_on(self, model, units, batches, kept, crossing):
        """The statistics at the units to come, by layer, what is kept there, and how often each unit ran."""
        statistics, after, runs = {}, {}, collections.Counter()

        def visit(at):
            statistics.update(at.statistics)
            halve(at)

        def counting(unit):
            run = type(unit.module).forward

            def forward(module, *args, **kwargs):
                runs[next(name for name, known in names.items() if known is module)] += 1
                return run(module, *args, **kwargs)

            return forward

        names = {unit.name: unit.module for unit in units}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(units[0].module), "forward", counting(units[0]))
            walk(
                *(model, units, batches, visit),
                gram=True,
                finished=list(kept),
                crossing=lambda: copy.deepcopy(crossing),
                keep=lambda unit, crossing: after.update({unit.name: copy.deepcopy(crossing())}),
            )
        return statistics, after, runs

    @pytest.mark.parametrize(
        ("architecture", "stored"),
        [
            ("llama", True),
            ("llama", False),
            ("gpt2", True),
            ("gemma3_text", True),
            ("gpt_oss", True),
            ("bert", True),
        ],
    )
    def test_the_blocks_to_come_see_the_same_bits(self, make_model, batches, architecture, stored):
        layers = {"n_layer": 4} if architecture == "gpt2" else {"num_hidden_layers": 4}
        if architecture in ("gemma3_text", "gpt_oss"):
            layers["layer_types"] = ["sliding_attention", "full_attention"] * 2
        whole, part = (make_model(architecture, **layers) for _ in range(2))
        expected, _ = collect(whole, find_units(whole), batches, halve)

        units = find_units(part)
        kept = self.cut(part, units, batches, after=1)
        assert all(kept.values()), "in these, a block's output is all that flows on"
        crossing = kept[units[1].name] if stored else None
        statistics, after, runs = self.go_on(part, units, batches, kept, crossing)
        assert set(statistics) == {target.name for unit in units[2:] for target in unit.targets}
        for name, found in statistics.items():
            assert (
                torch.equal(found.gram, expected[name].gram)
                and found.tokens == expected[name].tokens
            )
        assert after[units[2].name] is not None and after[units[3].name] is None
        assert [runs[unit.name] for unit in units[:2]] == ([0, 0] if stored else [len(batches)] * 2)
        assert [runs[unit.name] for unit in units[2:]] == [2 * len(batches), len(batches)], (
            "no run for nothing"
        )

    @pytest.mark.parametrize(
        "how", ["plain", "skip", "held", "changed", "cache", "shared", "list", "looked at"]
    )
    def test_what_more_flows_between_blocks_is_noticed(self, make_chain, batches, how):
        plain = how in ("plain", "looked at", "shared")  # what is shared is seen once it is missing
        whole, part = make_chain(how), make_chain(how)
        expected, _ = collect(whole, find_units(whole), batches, halve)
        units = find_units(part)
        kept = self.cut(part, units, batches, after=2)
        assert (kept[units[2].name] is not None) == plain
        statistics, after, _ = self.go_on(part, units, batches, kept, kept[units[2].name])
        assert (after[units[3].name] is not None) == plain
        for name, found in statistics.items():
            assert torch.equal(found.gram, expected[name].gram)

    @pytest.mark.parametrize("stale", ["arguments", "batches"])
    def test_outputs_that_do_not_fit_are_not_used(self, make_model, batches, stale):
        whole, part = (
            make_model("llama", num_hidden_layers=4),
            make_model("llama", num_hidden_layers=4),
        )
        expected, _ = collect(whole, find_units(whole), batches, halve)
        units = find_units(part)
        kept = self.cut(part, units, batches, after=1)
        crossing = kept[units[1].name]
        changed = {
            "arguments": {"arguments": "0" * 64},
            "batches": {"outputs": crossing.outputs[:2]},
        }[stale]
        statistics, _, runs = self.go_on(
            part, units, batches, kept, dataclasses.replace(crossing, **changed)
        )
        assert all(
            torch.equal(found.gram, expected[name].gram) for name, found in statistics.items()
        )
        assert runs[units[0].name] == len(batches)


def halve(at):
    for target in at.unit.targets:
        target.write(target.read() * 0.5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, more=None):
        if isinstance(more, dict):  # a block that leaves something to later ones
            more[id(self)] = x * 0.1
            x = x + sum(left for block, left in more.items() if block != id(self))
        elif isinstance(more, Tensor):
            x = x + more
        return self.linear(torch.tanh(x))


class Chain(PreTrainedModel):
    """Five blocks, and one of the things that may flow between them."""

    config_class = PretrainedConfig

    def __init__(self, how):
        super().__init__(PretrainedConfig())
        self.how = how
        self.embedding, self.blocks = (
            nn.Embedding(64, 8),
            nn.ModuleList([Block() for _ in range(5)]),
        )

    def forward(self, input_ids):
        x, earlier, shared = self.embedding(input_ids), [], {}
        for number, block in enumerate(self.blocks):
            if self.how == "skip":
                earlier.append(x)
                x = block(x, earlier[max(0, number - 2)])
            elif self.how == "held":  # and used after blocks that do not see it
                earlier.append(x)
                x = block(x, earlier[1] if number == 4 else None)
            elif self.how == "changed":
                x = block(x.tanh(), None)
            elif self.how == "cache":
                x = block(x, self)
            elif self.how == "shared":
                x = block(x, shared)
            elif self.how == "list":
                earlier.append(x * 2 if number == 1 else x)
                x = block(x, earlier[1] if number == 4 else None)
            elif self.how == "looked at":
                assert (
                    x.shape[-1] == x.size(-1) == 8
                    and x.dtype is torch.float32
                    and x.device.type == "cpu"
                )
                x = block(x, None)
            else:
                x = block(x)
        return x


@pytest.fixture
def make_chain():
    def make(how):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Chain(how).eval()

    return make


class TestFailing:
    def unharmed(self, model, batches, expected):
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
        assert not [name for name, module in model.named_modules() if module._forward_pre_hooks]
        with torch.no_grad():
            return torch.equal(model(**batches[0])[0], expected)

    @pytest.fixture
    def model(self, make_model):
        return make_model("mixtral")

    @pytest.fixture
    def expected(self, model, batches):
        with torch.no_grad():
            return model(**batches[0])[0]

    @pytest.mark.parametrize("block", [0, 1])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_visitor_that_raises(self, model, batches, expected, block, error):
        def change(at):
            if at.unit.name.endswith(str(block)):
                raise error("enough")

        with pytest.raises(error, match="enough"):
            collect(model, find_units(model), batches, change)
        assert self.unharmed(model, batches, expected)

    @pytest.mark.parametrize(
        "where", ["model.embed_tokens", "model.layers.0.mlp", "model.layers.1.self_attn"]
    )
    def test_a_forward_that_raises(self, model, batches, expected, where):
        def fail(*_):
            raise RuntimeError("out of memory, say")

        handle = model.get_submodule(where).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory, say"):
            collect(model, find_units(model), batches)
        handle.remove()
        assert self.unharmed(model, batches, expected)

    def test_a_forward_that_raises_between_blocks(self, model, batches, expected):
        """On a thread of the walk: a norm after the last block, and a rotary embedding before the first."""
        for where in ("model.norm", "model.rotary_emb"):
            handle = model.get_submodule(where).register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                collect(model, find_units(model), batches)
            handle.remove()
        assert self.unharmed(model, batches, expected)

    def test_one_batch_that_does_not_fit_the_model(self, model, batches, expected):
        with pytest.raises(IndexError):
            collect(model, find_units(model), [*batches, {"input_ids": torch.tensor([[64]])}])
        assert self.unharmed(model, batches, expected)

    @pytest.mark.parametrize("groups", [1, 3])
    def test_a_model_that_runs_a_block_twice(self, make_model, batches, groups):
        model = make_model("albert", num_hidden_layers=6, num_hidden_groups=groups)
        visited = []
        with pytest.raises(
            ModelError,
            match=r"runs 'encoder\.albert_layer_groups\.0' more than once .* \(shared layers\)",
        ):
            walk(
                model,
                find_units(model),
                batches,
                lambda at: visited.append(at.unit.name),
                gram=True,
            )
        assert len(visited) < groups  # refused before the last unit is worked on

    def test_a_block_that_is_never_run(self, model, batches, expected):
        units = find_units(model)
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        with pytest.raises(
            ModelError, match=r"does not run the blocks model\.layers\.1 for every input"
        ):
            collect(model, units, batches)

    def test_inputs_that_overflow(self, make_model, batches):
        model = make_model("llama")
        model.model.embed_tokens.weight.data[:, 3] = torch.inf
        with pytest.raises(
            ModelError,
            match=r"The inputs of 'model\.layers\.0\.self_attn\.q_proj' are NaN or infinite",
        ):
            collect(model, find_units(model), batches)


def test_a_model_of_several_modalities_is_walked_without_a_cache(batches):
    """Its config holds `use_cache` in the part for text."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = small | {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    config = Gemma3Config(
        text_config=text
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config=small | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=70,
        boi_token_index=61,
        eoi_token_index=62,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    units = find_units(model, targets=["*.language_model.*"])
    expected = observe(model, units, batches)
    statistics, _ = collect(model, units, batches)
    assert all(agree(statistics[name], X) for name, X in expected.items())
