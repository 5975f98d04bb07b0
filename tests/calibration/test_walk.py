"""A walk sees what hooks on the model's own forward see, in both modes, and leaves no trace."""

import gc
import itertools
import threading
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from optimum_order.calibration.execution import PAUSES
from optimum_order.engine.recipe import method
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Drift, Gram, SquaredNorms
from optimum_order.models.units import find_units
from optimum_order.order import Stage

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
IMAGES = ["vit", "deit", "resnet", "regnet", "swin", "convnext"]


def has_no_trace(model):
    modules = dict(model.named_modules())
    changed = [name for name, m in modules.items() if "forward" in vars(m)]
    hooked = [name for name, m in modules.items() if m._forward_pre_hooks or m._forward_hooks]
    return changed == hooked == []


class TestStatistics:
    @pytest.mark.parametrize("architecture", WALKED)
    def test_are_those_that_hooks_see_and_no_trace_is_left(
        self, make_model, batches, collect, observe, agree, architecture
    ):
        model = make_model(architecture)
        units = find_units(model)
        expected = observe(model, units, batches)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        implementation = getattr(model.config, "_experts_implementation", None)
        with torch.no_grad():
            output = model(**batches[0])[0]
        for pause in PAUSES:
            walked = collect(model, units, batches, pause=pause)
            assert walked.blocks == [unit.name for unit in units]
            assert sorted(walked.layers) == sorted(expected), "every layer is visited once"
            for name, X in expected.items():
                assert agree(walked.statistics[name], X), (pause, name)
            assert has_no_trace(model)
            assert getattr(model.config, "_experts_implementation", None) == implementation
            after = model.state_dict()
            assert all(torch.equal(value, before[name]) for name, value in after.items())
            with torch.no_grad():
                assert torch.equal(model(**batches[0])[0], output)

    @pytest.mark.parametrize("architecture", IMAGES)
    def test_of_images_are_those_that_hooks_see(
        self, make_image_model, image_batches, collect, observe, agree, architecture
    ):
        model = make_image_model(architecture)
        units = find_units(model)
        expected = observe(model, units, image_batches)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for pause in PAUSES:
            classified = []
            handle = model.classifier.register_forward_hook(lambda *_, n=classified: n.append(1))
            walked = collect(model, units, image_batches, pause=pause)
            handle.remove()
            assert walked.blocks == [unit.name for unit in units]
            assert sorted(walked.layers) == sorted(expected)
            for name, X in expected.items():
                assert agree(walked.statistics[name], X), (pause, name)
            if pause == "block":
                assert len(classified) <= 1, "the rest of the forward is run for one batch at most"
            # running averages of batch normalization too
            after = model.state_dict()
            assert all(torch.equal(value, before[name]) for name, value in after.items())

    @pytest.mark.parametrize("architecture", WALKED)
    def test_of_later_blocks_see_what_became_of_earlier_ones(
        self, make_model, batches, collect, observe, agree, halve, architecture
    ):
        for pause in PAUSES:
            model = make_model(architecture)
            units = find_units(model)
            untouched = observe(model, units, batches)

            def change(visit, first=units[0]):
                if visit.unit is first:
                    halve(visit)

            walked = collect(model, units, batches, change, pause=pause)
            changed = observe(model, units, batches)  # only the first block is changed
            for target in units[1].targets:
                assert agree(walked.statistics[target.name], changed[target.name]), target.name
            first = units[1].targets[0].name
            assert not agree(walked.statistics[first], untouched[first])

    @pytest.mark.parametrize("architecture", ["vit", "resnet", "regnet", "convnext"])
    def test_of_images_see_what_became_of_earlier_layers(
        self, make_image_model, image_batches, collect, observe, agree, halve, architecture
    ):
        for pause in PAUSES:
            model = make_image_model(architecture)
            units = find_units(model)

            def change(visit, last=units[-1]):
                if visit.unit is not last:
                    halve(visit)

            walked = collect(model, units, image_batches, change, pause=pause)
            changed = observe(model, units, image_batches)
            compared = units if pause == "group" else units[-1:]
            for target in itertools.chain.from_iterable(unit.targets for unit in compared):
                assert agree(walked.statistics[target.name], changed[target.name]), target.name

    def test_of_squared_norms_alone_hold_no_matrix(self, make_model, batches, collect, observe):
        model = make_model("llama")
        units = find_units(model)
        expected = observe(model, units, batches)
        for pause in PAUSES:
            walked = collect(model, units, batches, needs=[SquaredNorms], pause=pause)
            for name, statistics in walked.statistics.items():
                assert Gram not in statistics
                norms = statistics[SquaredNorms].double()
                assert torch.allclose(norms, expected[name].square().sum(0), rtol=1e-4)

    def test_know_padding_masks(self, make_model, batches, collect, observe, agree):
        """A padded batch, whose second sequence is half as long."""
        model = make_model("llama")
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, :8] = 0
        padded = [{**batches[0], "attention_mask": mask}]
        units = find_units(model)
        expected = observe(model, units, padded)
        unmasked = observe(model, units, batches[:1])
        name = "model.layers.1.mlp.down_proj"
        for pause in PAUSES:
            walked = collect(model, units, padded, pause=pause)
            assert agree(walked.statistics[name], expected[name])
            assert not agree(walked.statistics[name], unmasked[name])

    def test_of_pixels_are_in_the_dtype_of_the_model(
        self, make_image_model, image_batches, collect, observe, agree
    ):
        model = make_image_model("resnet").to(torch.bfloat16)
        units = find_units(model)
        rounded = [
            {"pixel_values": batch["pixel_values"].to(torch.bfloat16)} for batch in image_batches
        ]
        expected = observe(model, units, rounded)
        for pause in PAUSES:
            walked = collect(model, units, image_batches, pause=pause)
            assert all(agree(walked.statistics[name], X) for name, X in expected.items())

    def test_of_several_modalities_are_gathered_without_a_cache(
        self, batches, collect, observe, agree
    ):
        """The config of such a model holds `use_cache` in the part for text."""
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        small = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        text = small | {
            "vocab_size": 64,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = Gemma3Config(
            text_config=text,
            vision_config=small | {"image_size": 16, "patch_size": 8},
            mm_tokens_per_image=4,
            image_token_index=70,
            boi_token_index=61,
            eoi_token_index=62,
        )
        model = Gemma3ForConditionalGeneration(config).eval()
        units = find_units(model, targets=["*.language_model.*"])
        expected = observe(model, units, batches)
        for pause in PAUSES:
            walked = collect(model, units, batches, pause=pause)
            assert all(agree(walked.statistics[name], X) for name, X in expected.items())


class TestGroups:
    """What pausing at layers adds."""

    @pytest.mark.parametrize("architecture", [*WALKED])
    def test_a_layer_sees_what_became_of_all_layers_before(
        self, make_model, batches, collect, observe, agree, halve, architecture
    ):
        """True sequential: no layer reads what a later one computes, so the end shows every input."""
        model = make_model(architecture)
        units = find_units(model)
        walked = collect(model, units, batches, halve, pause="group")
        changed = observe(model, units, batches)
        assert sorted(walked.layers) == sorted(changed)
        for name, X in changed.items():
            assert agree(walked.statistics[name], X), name

    def test_pausing_at_blocks_does_not(self, make_model, batches, collect, observe, agree, halve):
        model = make_model("llama")
        walked = collect(model, find_units(model), batches, halve, pause="block")
        changed = observe(model, find_units(model), batches)
        o_proj = "model.layers.0.self_attn.o_proj"
        assert not agree(walked.statistics[o_proj], changed[o_proj])

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "qwen3_moe"])
    def test_what_flows_on_is_what_the_changed_model_computes(
        self, make_model, batches, collect, halve, architecture
    ):
        """No layer is multiplied before the change."""
        model = make_model(architecture)
        units = find_units(model)
        flowed = []
        place = {"gpt2": "transformer.ln_f", "bert": "pooler"}.get(architecture, "model.norm")
        last = model.get_submodule(place)
        handle = last.register_forward_pre_hook(lambda module, args: flowed.append(args[0].clone()))
        collect(model, units, batches, halve, pause="group")
        assert len(flowed) == len(batches)
        walked = flowed[:]
        flowed.clear()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        handle.remove()
        for one, other in zip(walked, flowed, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)

    def test_a_block_is_complete_at_its_last_pause(self, make_model, batches, collect):
        for architecture in ("llama", "mixtral"):
            model = make_model(architecture)
            walked = collect(model, find_units(model), batches, pause="group")
            places = [visit.unit.name for visit in walked.visits]
            for _, pauses in itertools.groupby(walked.visits, lambda visit: visit.unit.name):
                complete = [visit.complete for visit in pauses]
                assert complete == [False] * (len(complete) - 1) + [True]
            assert places == sorted(places), "no block is returned to"

    def test_only_wanted_blocks_are_paused_at(self, make_model, batches, collect, observe, agree):
        model = make_model("llama")
        units = find_units(model)
        expected = observe(model, units, batches)
        for pause in PAUSES:
            wanted = ["model.layers.1"]
            walked = collect(model, units, batches, pause=pause, wanted=wanted)
            assert walked.blocks == wanted
            for target in units[1].targets:
                assert agree(walked.statistics[target.name], expected[target.name])

    def test_outputs_cannot_be_asked_for(self, make_model, batches, run_walk):
        model = make_model("llama")
        with closing(run_walk(model, find_units(model), batches, pause="group")) as visits:
            with pytest.raises(InvariantError, match="where the walk pauses at it"):
                next(visits).outputs()

    def test_attention_is_computed_by_the_walk_which_has_all_cores(
        self, make_model, batches, run_walk
    ):
        class Seen(TorchDispatchMode):
            functions = []

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.functions.append(str(function))
                return function(*args, **(kwargs or {}))

        model = make_model("llama")
        visits = run_walk(model, find_units(model), batches, pause="group")
        with closing(visits), Seen() as seen:  # of this thread alone
            for _ in visits:
                pass
        assert any("scaled_dot_product" in name for name in seen.functions)


class TestDrift:
    """What the inputs were before the walk began to change the model."""

    @pytest.mark.parametrize("architecture", WALKED)
    def test_is_that_of_the_model_as_it_was(
        self, make_model, batches, collect, observe, halve, architecture
    ):
        model = make_model(architecture)
        units = find_units(model)
        before = observe(model, units, batches)
        walked = collect(model, units, batches, halve, needs=[Gram, Drift], pause="group")
        changed = observe(model, units, batches)
        experts = {t.name for unit in units for t in unit.targets if t.expert is not None}
        drifted = 0
        for name, X in changed.items():
            drift = walked.statistics[name][Drift].double()
            if name in experts:
                assert not drift.any(), "other tokens may reach an expert now"
                continue
            expected = (before[name] - X).T @ X
            assert (drift - expected).norm() <= 1e-3 * (X.T @ X).norm(), name
            drifted += bool(expected.norm() > 0.01 * (X.T @ X).norm())
        assert drifted > 4, "the change is large"
        assert has_no_trace(model)

    def test_knows_what_was_there_before_blocks_that_were_finished(
        self, make_model, batches, collect, observe, halve, run_walk
    ):
        """A run that goes on changes finished blocks once the model as it was has passed them."""
        model = make_model("llama")
        units = find_units(model)
        whole = collect(model, units, batches, halve, needs=[Gram, Drift], pause="group")
        left = {t.name: t.read().clone() for t in units[0].targets}
        model = make_model("llama")
        units = find_units(model)

        def finish():
            for target in units[0].targets:
                target.write(left[target.name])

        walked = collect(
            model,
            units,
            batches,
            halve,
            needs=[Gram, Drift],
            pause="group",
            wanted=[unit.name for unit in units[1:]],
            finished={units[0].name: finish},
        )
        for name, statistics in walked.statistics.items():
            for kind in (Gram, Drift):
                assert torch.equal(statistics[kind], whole.statistics[name][kind]), name

    def test_is_not_gathered_where_the_walk_pauses_at_blocks(self, make_model, batches, collect):
        model = make_model("llama")
        walked = collect(model, find_units(model), batches, needs=[Gram, Drift], pause="block")
        assert not any(Drift in statistics for statistics in walked.statistics.values())


class TestSharedInputs:
    @pytest.mark.parametrize(
        ("architecture", "groups"),
        [
            ("llama", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"]),
            ("bert", ["attention.self.query attention.self.key attention.self.value"]),
            ("opt", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj"]),
            ("mixtral", ["self_attn.q_proj self_attn.k_proj self_attn.v_proj"]),
            ("gpt2", []),
        ],
    )  # fmt: skip
    def test_layers_of_one_input_share_one_set_of_statistics(
        self, make_model, batches, collect, halve, architecture, groups
    ):
        for pause in PAUSES:
            model = make_model(architecture)
            walked = collect(model, find_units(model), batches, halve, pause=pause)
            members = {}
            for visit in walked.visits:
                for name, leader in visit.leaders.items():
                    statistics = walked.statistics[name]
                    assert statistics is walked.statistics[leader]
                    short = name.removeprefix(f"{visit.unit.name}.")
                    members.setdefault(id(statistics), []).append(short)
            shared = {" ".join(names) for names in members.values() if len(names) > 1}
            assert shared == set(groups)
            assert len({id(one) for one in walked.statistics.values()}) == len(members) or (
                architecture == "mixtral"  # some of whose experts are idle
            )


class TestExperts:
    @pytest.mark.parametrize("architecture", MIXTURES)
    def test_each_sees_the_tokens_routed_to_it(self, make_model, batches, collect, architecture):
        """Two experts for each token, and some experts for more of the tokens than others."""
        model = make_model(architecture)
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        for pause in PAUSES:
            statistics = collect(model, find_units(model), batches, pause=pause).statistics
            for block in range(2):
                for name in ("gate_up_proj", "down_proj"):
                    prefix = f"model.layers.{block}.mlp.experts.{name}"
                    seen = [statistics[f"{prefix}.{i}"].tokens for i in range(4)]
                    assert sum(seen) == 2 * tokens
                    assert len(set(seen)) > 1

    @pytest.mark.parametrize("architecture", MIXTURES)
    def test_groups_see_what_blocks_see_where_nothing_is_changed(
        self, make_model, collect, architecture
    ):
        """Batches of one token each, so that every batch leaves other experts idle."""
        model = make_model(architecture)
        units = find_units(model)
        tokens = [{"input_ids": torch.tensor([[token]])} for token in (5, 9, 33)]
        blocks = collect(model, units, tokens, pause="block")
        groups = collect(model, units, tokens, pause="group")
        assert sorted(groups.layers) == sorted(blocks.layers)
        assert len(groups.layers) == len(set(groups.layers))
        for name, statistics in blocks.statistics.items():
            assert statistics.tokens == groups.statistics[name].tokens
            torch.testing.assert_close(statistics[Gram], groups.statistics[name][Gram])

    @pytest.mark.parametrize("architecture", MIXTURES)
    def test_an_idle_one_has_no_tokens_and_is_compressed_with_a_note(
        self, make_model, collect, architecture
    ):
        model = make_model(architecture)
        units = find_units(model)
        for pause in PAUSES:
            token = [{"input_ids": torch.tensor([[5]])}]
            statistics = collect(model, units, token, pause=pause).statistics
            idle = [t for t in units[0].targets if statistics[t.name].tokens == 0]
            assert len(idle) == 4  # of two experts, both matrices
            for stage in (Stage("gptq", 4), Stage("sparsegpt", 0.5), Stage("wanda", 0.5)):
                backend = method(stage)
                state = backend.apply(LayerState(idle[0].read()), statistics[idle[0].name])
                assert "no calibration token reached this layer" in state.notes[0]


class TestRange:
    """Which parts of a model are run and visited."""

    def test_only_given_units_are_visited(self, make_model, batches, collect, observe, agree):
        model = make_model("llama")
        units = find_units(model, targets=["model.layers.1.mlp.*"])
        expected = observe(model, units, batches)
        for pause in PAUSES:
            walked = collect(model, units, batches, pause=pause)
            assert walked.blocks == ["model.layers.1"]
            assert all(agree(walked.statistics[name], X) for name, X in expected.items())

    def test_a_head_is_visited_after_the_blocks(self, make_model, batches, collect, observe, agree):
        model = make_model("llama")
        units = find_units(model, targets=["lm_head", "*.q_proj"])
        expected = observe(model, units, batches)
        for pause in PAUSES:
            walked = collect(model, units, batches, pause=pause)
            assert walked.blocks == ["model.layers.0", "model.layers.1", "lm_head"]
            assert agree(walked.statistics["lm_head"], expected["lm_head"])

    def test_logits_are_not_computed(self, make_model, batches, collect):
        model = make_model("llama")
        computed = []
        handle = model.lm_head.register_forward_hook(lambda *_: computed.append(1))
        for pause in PAUSES:
            collect(model, find_units(model), batches, pause=pause)
        handle.remove()
        assert not computed

    @pytest.mark.parametrize(("pause", "runs"), [("block", [6, 3]), ("group", [3, 3])])
    def test_no_block_is_run_for_nothing(self, make_model, batches, collect, pause, runs):
        """A block runs once to be seen, and in block mode once more where a later block is to come."""
        model = make_model("llama")
        counts = []
        for layer in model.model.layers:
            counts.append([])
            layer.input_layernorm.register_forward_hook(lambda *_, n=counts[-1]: n.append(1))
        collect(model, find_units(model), batches, pause=pause)
        assert [len(count) for count in counts] == runs


class TestOutputs:
    def test_are_those_of_the_block_as_it_is(self, make_model, batches, run_walk):
        model = make_model("llama")
        outputs = {}
        with closing(run_walk(model, find_units(model), batches)) as visits:
            for visit in visits:
                before = visit.outputs()
                target = visit.targets[-1]
                weight = target.read()
                target.write(torch.zeros_like(weight))
                without = visit.outputs()
                target.write(weight)
                outputs[visit.unit.name] = (before, without, visit.outputs())
        with torch.no_grad():
            hidden = [
                model.model(**batch, output_hidden_states=True).hidden_states[1]
                for batch in batches[:2]
            ]
        before, without, after = outputs["model.layers.0"]
        assert torch.allclose(before, torch.cat([h.flatten(0, 1) for h in hidden]), atol=1e-5)
        assert not torch.allclose(before, without, atol=1e-2)
        assert torch.equal(before, after)

    def test_have_a_token_for_each_position_of_an_image(
        self, make_image_model, image_batches, run_walk
    ):
        model = make_image_model("resnet")
        with closing(run_walk(model, find_units(model), image_batches)) as visits:
            outputs = next(visits).outputs()
        with torch.no_grad():
            hidden = [model.resnet.embedder(batch["pixel_values"]) for batch in image_batches[:2]]
            expected = torch.cat([model.resnet.encoder.stages[0](x) for x in hidden])
        assert torch.allclose(outputs, expected.permute(0, 2, 3, 1).flatten(0, 2), atol=1e-5)


class TestGenerator:
    """However a walk ends, its threads end and the model is as it was."""

    @pytest.fixture
    def model(self, make_model):
        return make_model("mixtral")

    @pytest.fixture
    def unharmed(self, model, batches):
        with torch.no_grad():
            expected = model(**batches[0])[0]

        def check():
            with torch.no_grad():
                return has_no_trace(model) and torch.equal(model(**batches[0])[0], expected)

        return check

    @pytest.mark.parametrize("pause", PAUSES)
    @pytest.mark.parametrize("pauses", [1, 3])
    def test_closed_early(self, model, batches, run_walk, unharmed, pause, pauses):
        before = threading.active_count()
        visits = run_walk(model, find_units(model), batches, pause=pause)
        assert threading.active_count() == before, "nothing runs before the first pause"
        for _ in range(pauses if pause == "group" else 1):
            next(visits)
        assert threading.active_count() > before
        visits.close()
        assert threading.active_count() == before
        assert next(visits, None) is None
        assert unharmed()

    def test_forgotten(self, model, batches, run_walk, unharmed):
        visits = run_walk(model, find_units(model), batches, pause="group")
        next(visits)
        del visits
        gc.collect()
        assert unharmed()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_visitor_that_raises(self, model, batches, collect, unharmed, error):
        for pause in PAUSES:
            for block in "01":

                def change(visit, block=block):
                    if visit.unit.name.endswith(block):
                        raise error("enough")

                with pytest.raises(error, match="enough"):
                    collect(model, find_units(model), batches, change, pause=pause)
                assert unharmed()

    def test_a_forward_that_raises(self, model, batches, collect, unharmed):
        places = ["model.embed_tokens", "model.layers.0.mlp", "model.layers.1.self_attn"]
        for pause in PAUSES:
            for place in (*places, "model.norm", "model.rotary_emb"):
                if pause == "block" and place == "model.norm":
                    continue  # run for one batch only
                handle = model.get_submodule(place).register_forward_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    collect(model, find_units(model), batches, pause=pause)
                handle.remove()
        assert unharmed()

    def test_a_batch_that_does_not_fit_the_model(self, model, batches, collect, unharmed):
        for pause in PAUSES:
            bad = {"input_ids": torch.tensor([[64]])}
            with pytest.raises(IndexError):
                collect(model, find_units(model), [*batches, bad], pause=pause)
        assert unharmed()

    @pytest.mark.parametrize("pause", PAUSES)
    def test_a_forward_of_the_instance_is_called_and_restored(self, model, batches, collect, pause):
        """As accelerate's hooks leave one."""
        block = model.model.layers[0]
        own = block.forward
        calls = []

        def hooked(*args, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        block.forward = hooked
        collect(model, find_units(model), batches, pause=pause)
        assert len(calls) == len(batches) * (2 if pause == "block" else 1)
        assert vars(block)["forward"] is hooked
        assert "forward" not in vars(model.model.layers[1])

    @pytest.mark.parametrize("pause", PAUSES)
    def test_the_hooks_of_accelerate_run_and_remain(self, make_model, batches, collect, pause):
        from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

        class Counting(ModelHook):
            calls = 0

            def pre_forward(self, module, *args, **kwargs):
                self.calls += 1
                return args, kwargs

        model = make_model("llama")
        hook = Counting()
        block = add_hook_to_module(model.model.layers[1], hook)
        forward = vars(block)["forward"]
        collect(model, find_units(model), batches, pause=pause)
        assert hook.calls >= len(batches)
        assert vars(block)["forward"] is forward
        remove_hook_from_module(block)

    def test_the_number_of_threads_is_that_of_before(self, model, batches, collect):
        """A forward computes alone on its core; neither this thread nor later ones do."""
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            for pause in PAUSES:
                inside = []
                embedding = model.model.embed_tokens
                handle = embedding.register_forward_hook(
                    lambda *_, n=inside: n.append(torch.get_num_threads())
                )
                outside = []
                collect(
                    model,
                    find_units(model),
                    batches,
                    lambda _, n=outside: n.append(torch.get_num_threads()),
                    pause=pause,
                )
                handle.remove()
                assert inside == [1] * len(batches)
                assert set(outside) == {3}
                assert torch.get_num_threads() == 3
                later = []
                thread = threading.Thread(target=lambda n=later: n.append(torch.get_num_threads()))
                thread.start()
                thread.join()
                assert later == [3]
        finally:
            torch.set_num_threads(before)


class Block(nn.Module):
    """A layer, and a product with its weight."""

    def __init__(self, product):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.product = product

    def forward(self, x, more=None):
        if isinstance(more, dict):  # the block leaves something to later ones
            more[id(self)] = x * 0.1
            x = x + sum(left for block, left in more.items() if block != id(self))
        elif isinstance(more, Tensor):
            x = x + more
        x = torch.tanh(x)
        return self.linear(x) if self.product is None else self.product(x, self.linear.weight)


class Chain(PreTrainedModel):
    """Five blocks, and one of the things that may flow between them."""

    config_class = PretrainedConfig

    def __init__(self, flow="plain", product=None):
        super().__init__(PretrainedConfig())
        self.flow = flow
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList([Block(product) for _ in range(5)])

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        earlier = []
        shared = {}
        for number, block in enumerate(self.blocks):
            if self.flow == "a skip":
                earlier.append(x)
                x = block(x, earlier[max(0, number - 2)])
            elif self.flow == "an early output, late":
                earlier.append(x)
                x = block(x, earlier[1] if number == 4 else None)
            elif self.flow == "more than blocks compute":
                x = block(x.tanh(), None)
            elif self.flow == "an object":
                x = block(x, self)
            elif self.flow == "a dict that blocks write into":
                x = block(x, shared)
            else:
                x = block(x)
        return x


@pytest.fixture
def make_chain():
    def make(flow="plain", product=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Chain(flow, product).eval()

    return make


class TestFlow:
    @pytest.mark.parametrize(
        "flow",
        [
            "plain",
            "a skip",
            "an early output, late",
            "more than blocks compute",
            "an object",
            "a dict that blocks write into",
        ],
    )
    def test_whatever_flows_between_blocks_arrives(
        self, make_chain, batches, collect, observe, agree, halve, flow
    ):
        for pause in PAUSES:
            model = make_chain(flow)
            units = find_units(model)
            untouched = observe(model, units, batches)
            walked = collect(model, units, batches, halve, pause=pause)
            changed = observe(model, units, batches)
            for name, X in changed.items():
                assert agree(walked.statistics[name], X), (pause, name)
            assert not agree(walked.statistics[name], untouched[name])


SEEN = {
    "linear by names": lambda x, w: functional.linear(input=x, weight=w),
    "linear by one name": lambda x, w: functional.linear(x, weight=w),
    "the weight on the left": lambda x, w: (w @ x.transpose(-1, -2)).transpose(-1, -2),
    "the weight on the right": lambda x, w: x @ w.T,
    "matmul": lambda x, w: torch.matmul(x, w.T),
}
UNSEEN = {
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "bmm": lambda x, w: torch.bmm(x, w.T.expand(len(x), -1, -1)),
    "a copy of the weight": lambda x, w: functional.linear(x, w.clone()),
    "the weight transposed": lambda x, w: x @ w,
    "halves of the weight": lambda x, w: torch.cat(
        [functional.linear(x, w[:4]), functional.linear(x * 2, w[4:])], -1
    ),
}


class TestProducts:
    @pytest.mark.parametrize("product", SEEN)
    def test_are_seen_exactly(self, make_chain, batches, collect, observe, agree, halve, product):
        for pause in PAUSES:
            model = make_chain(product=SEEN[product])
            units = find_units(model)
            walked = collect(model, units, batches, halve, pause=pause)
            inputs = observe_products(model, batches)
            for unit in units:
                (target,) = unit.targets
                assert agree(walked.statistics[target.name], inputs[unit.name]), (pause, unit.name)

    @pytest.mark.parametrize("product", UNSEEN)
    def test_that_are_not_understood_are_refused_by_name(
        self, make_chain, batches, run_walk, product
    ):
        for pause in PAUSES:
            model = make_chain(product=UNSEEN[product])
            with pytest.raises(ModelError) as refusal:
                next(run_walk(model, find_units(model), batches, pause=pause))
            message = str(refusal.value)
            assert "Running 'blocks.0' (Block) did not multiply blocks.0.linear" in message
            assert "ignore=['blocks.0.linear']" in message
            assert "magnitude, rtn, bitsandbytes" in message
            assert "\n" not in message
            assert has_no_trace(model)

    def test_of_experts_that_are_not_understood_are_refused(self, make_model, batches, run_walk):
        """Idle experts are allowed; a block whose experts are all unseen is another thing."""
        model = make_model("mixtral")
        experts = model.model.layers[0].mlp.experts
        units = find_units(model)

        def with_copies(hidden, chosen, weights):
            total = torch.zeros_like(hidden)
            down = experts.down_proj.clone()
            for expert in range(4):
                token, place = torch.where(chosen == expert)
                gate, up = functional.linear(hidden[token], experts.gate_up_proj[expert]).chunk(
                    2, -1
                )
                product = functional.linear(experts.act_fn(gate) * up, down[expert])
                total.index_add_(0, token, product * weights[token, place, None])
            return total

        experts.forward = with_copies
        for pause in PAUSES:
            with pytest.raises(ModelError, match=r"did not multiply .*experts\.down_proj\.0"):
                list(run_walk(model, units, batches, pause=pause))


def observe_products(model, batches):
    """Return the inputs X (tokens, in) of the products in a chain's blocks, by block."""
    seen = {}
    for name, block in model.named_modules():
        if isinstance(block, Block):

            def product(x, weight, name=name, inner=block.product):
                seen.setdefault(name, []).append(x.reshape(-1, 8).double())
                return inner(x, weight)

            block.product = product
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


class TestRefusals:
    def test_a_layer_that_is_multiplied_twice_in_a_block(
        self, make_chain, batches, collect, run_walk
    ):
        def twice(x, w):
            return functional.linear(torch.tanh(functional.linear(x, w)), w)

        model = make_chain(product=twice)
        with pytest.raises(ModelError) as refusal:
            list(run_walk(model, find_units(model), batches, pause="group"))
        message = str(refusal.value)
        assert "'blocks.0' multiplies 'blocks.0.linear' more than once" in message
        assert "pause='block'" in message
        assert "\n" not in message
        walked = collect(model, find_units(model), batches, pause="block")
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        assert {one.tokens for one in walked.statistics.values()} == {2 * tokens}

    @pytest.mark.parametrize("pause", PAUSES)
    @pytest.mark.parametrize("groups", [1, 3])
    def test_a_model_that_runs_a_block_twice(self, make_model, batches, run_walk, groups, pause):
        model = make_model("albert", num_hidden_layers=6, num_hidden_groups=groups)
        complete = []
        message = r"runs 'encoder\.albert_layer_groups\.0' more than once .* \(shared layers\)"
        with pytest.raises(ModelError, match=message):
            for visit in run_walk(model, find_units(model), batches, pause=pause):
                complete += [visit.unit.name] * visit.complete
        if pause == "block":
            assert len(complete) < groups, "refused before the last block is worked on"

    def test_a_block_that_is_never_run(self, make_model, batches, run_walk):
        for pause in PAUSES:
            model = make_model("mixtral")
            units = find_units(model)
            model.model.layers = model.model.layers[:1]
            model.config.num_hidden_layers = 1
            message = r"does not run the blocks model\.layers\.1 for every input"
            with pytest.raises(ModelError, match=message):
                list(run_walk(model, units, batches, pause=pause))

    def test_inputs_that_overflow(self, make_model, batches, run_walk):
        model = make_model("llama")
        model.model.embed_tokens.weight.data[:, 3] = torch.inf
        message = r"The inputs of 'model\.layers\.0\.self_attn\.q_proj' are NaN or infinite"
        for pause in PAUSES:
            with pytest.raises(ModelError, match=message):
                next(run_walk(model, find_units(model), batches, pause=pause))


class TestEmbeddings:
    """An embedding that was asked for is changed before anybody reads what is looked up."""

    PATTERNS = ("*.layers.*", "*embed_tokens")

    @pytest.mark.parametrize("pause", PAUSES)
    def test_later_layers_see_what_became_of_it(
        self, make_model, batches, collect, observe, agree, pause
    ):
        model = make_model("llama")
        units = find_units(model, embeddings=self.PATTERNS)
        (embedding,) = [unit for unit in units if unit.targets[0].kind == "embedding"]

        def change(visit):
            if visit.unit is embedding:
                visit.targets[0].write(visit.targets[0].read() * 2 + 1)

        walked = collect(model, units, batches, change, pause=pause)
        assert walked.blocks[0] == embedding.name
        white = walked.statistics[embedding.name]
        assert white.tokens and torch.equal(white[Gram], torch.eye(len(white[Gram])))
        changed = observe(model, [unit for unit in units if unit is not embedding], batches)
        for name, X in changed.items():
            assert agree(walked.statistics[name], X), name

    def test_drift_knows_what_it_was(self, make_model, batches, collect, observe):
        model = make_model("llama")
        units = find_units(model, embeddings=self.PATTERNS)
        layers = [unit for unit in units if unit.targets[0].kind != "embedding"]
        before = observe(model, layers, batches)

        def change(visit):
            for target in visit.targets:
                if target.kind == "embedding":
                    target.write(target.read() * 1.5 + 1)

        walked = collect(model, units, batches, change, needs=[Gram, Drift], pause="group")
        after = observe(model, layers, batches)
        name = "model.layers.0.mlp.down_proj"
        expected = (before[name] - after[name]).T @ after[name]
        drift = walked.statistics[name][Drift].double()
        assert (drift - expected).norm() <= 1e-3 * expected.norm()
