"""The settings of a session are checked once, and decide what a run is."""

import shutil

import psutil
import pytest
import torch
import transformers
from safetensors.torch import save_file

from optimum_order import JointCompressor
from optimum_order import session as module
from optimum_order.engine.recipe import Recipe
from optimum_order.errors import DataError, ModelError, OptimumOrderError, OrderError
from optimum_order.models import precision
from optimum_order.order import Order

T5 = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 48,
}
WAV2VEC2 = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 4],
    "conv_stride": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": 30,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
CLIP = {
    "text_config": TOWER | {"vocab_size": 64, "max_position_embeddings": 40},
    "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
    "projection_dim": 16,
}


@pytest.fixture
def session(make_compressor):
    return make_compressor()


@pytest.fixture
def choose(session):
    """`choose("auto", "gptq:4")`: where a run pauses."""

    def ask(pause, order, *, low_memory=False):
        recipe = Recipe.of(Order.parse(order))
        batches = session.draw().inputs() if recipe.needs_data else []
        return session.pause_for(pause, recipe, batches, low_memory=low_memory)

    return ask


class TestSettings:
    @pytest.mark.parametrize(
        "setting",
        [
            {"calibration_samples": 0},
            {"calibration_samples": 2.5},
            {"sequence_length": -1},
            {"device": "warp"},
            {"device": "cuda:99"},
            {"dtype": "int4"},
            {"calibration_dtype": "int8"},
        ],
    )
    def test_bad_ones_are_refused_in_one_line(self, make_compressor, setting):
        with pytest.raises(OptimumOrderError) as refusal:
            make_compressor(**setting)
        assert "\n" not in str(refusal.value)

    def test_windows_are_no_longer_than_the_model_has_positions(self, make_compressor):
        assert make_compressor(sequence_length=None).sequence_length == 128
        session = make_compressor(sequence_length=1000)
        assert session.sequence_length == 128
        message = (
            r"reads at most 128 tokens at once, got a sequence length of 1000\. Ask for 128 or"
        )
        for ask in (session.draw, lambda: session.evaluation_samples("builtin")):
            with pytest.raises(DataError, match=message):
                ask()

    def test_a_tokenizer_that_cannot_be_read_stops_only_who_reads_text(
        self, tiny_llama_folder, text_file, tmp_path
    ):
        folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
        (folder / "tokenizer.json").write_text('{"pre_tokenizer": {"type": "FromTheFuture"}}')
        settings = {"calibration": str(text_file), "device": "cpu"}
        compressor = JointCompressor.from_pretrained(folder, **settings)
        assert compressor.compress("rtn:4", progress=False).layers
        for order in ("wanda:0.5", "gptq:4"):
            with pytest.raises(ModelError, match=r"'tokenizer\.json' that cannot be used"):
                compressor.compress(order, progress=False)

    def test_an_embedded_model_has_embedded_calibration(self, make_compressor):
        assert JointCompressor.from_pretrained("tiny-resnet").calibration == "builtin"
        assert make_compressor(calibration=None).calibration is None

    def test_calibration_multiplies_as_told(self, make_compressor, session):
        model = session.source.load()
        usual = precision.choose("auto", torch.float32, torch.device("cpu"))
        assert session.execution(model).dtype == usual
        told = make_compressor(calibration_dtype="bfloat16").execution(model, "group")
        assert told.dtype == torch.bfloat16
        assert told.pause == "group"
        assert told.device is None, "the model is where it is"


class TestModelsOfAllKinds:
    """In memory, from token ids: each is calibrated, or refused before the work."""

    SIZES = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }

    def compressor(self, name, calibration=None, **settings):
        model_class = getattr(transformers, name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**settings))
        ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
        given = ids if calibration is None else calibration
        return JointCompressor(model, calibration=given, sequence_length=16, device="cpu")

    def test_a_classifier_without_a_pad_token_is_pruned_by_the_inputs_of_its_layers(self):
        for pause in ("block", "group"):
            pruned = []
            for token in (None, 0):
                compressor = self.compressor(
                    "LlamaForSequenceClassification", **self.SIZES, pad_token_id=token
                )
                compressed = compressor.compress("wanda:0.5", pause=pause, progress=False)
                pruned.append({name: state.pruned for name, state in compressed.layers.items()})
            assert all(torch.equal(mask, pruned[1][name]) for name, mask in pruned[0].items())
        fidelity = compressed.evaluate(compressor.calibration, metric="fidelity", progress=False)
        assert fidelity.value > 0

    def test_models_without_a_head_and_with_a_decoder(self):
        for name, settings in (
            ("T5Model", T5),
            ("T5ForConditionalGeneration", T5),
            ("BartModel", BART),
            ("RobertaModel", self.SIZES | {"max_position_embeddings": 18}),
        ):
            compressed = self.compressor(name, **settings).compress("wanda:0.5", progress=False)
            assert compressed.layers, name

    def test_arguments_of_a_forward_calibrate_any_model(self, tmp_path):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 64, (4, 16), generator=generator)
        pixels = torch.rand(4, 3, 16, 16, generator=generator)
        clip = {"input_ids": ids, "pixel_values": pixels}
        save_file(clip, tmp_path / "inputs.safetensors")
        sounds = {"input_values": torch.rand(4, 2000, generator=generator)}
        for name, settings, source in (
            ("CLIPModel", CLIP, clip),
            ("CLIPModel", CLIP, str(tmp_path / "inputs.safetensors")),
            ("T5Model", T5, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}),
            ("Wav2Vec2Model", WAV2VEC2, sounds),
        ):
            compressor = self.compressor(name, source, **settings)
            assert compressor.compress("wanda:0.5", progress=False).layers, name
            assert compressor.estimate("wanda:0.5")

    def test_what_cannot_be_read_is_refused_before_a_layer_is_touched(self, monkeypatch):
        monkeypatch.setattr("optimum_order.compressor.run", None)
        ids = torch.full((4, 16), 70)
        for name, settings, source, message in (
            ("BertModel", self.SIZES, ids, "knows tokens 0 to 63, got token 70"),
            ("LlamaForCausalLM", self.SIZES, ids, "knows tokens 0 to 63, got token 70"),
            ("CLIPModel", CLIP, None, "takes input_ids, pixel_values"),
            (
                "RobertaModel",
                self.SIZES | {"max_position_embeddings": 17},
                None,
                "at most 15 tokens at once, got a sequence length of 16",
            ),
        ):
            with pytest.raises(DataError, match=message):
                self.compressor(name, source, **settings).compress("wanda:0.5", progress=False)


class TestDraws:
    def test_are_disjoint_and_the_source_is_read_once(self, make_compressor, monkeypatch):
        reads = []
        load = module.load_samples

        def counted(*args, **options):
            reads.append(options["samples"])
            return load(*args, **options)

        monkeypatch.setattr(module, "load_samples", counted)
        session = make_compressor()
        runner = session.runner(progress=False)
        session.draw(2)
        draws = [
            {tuple(row) for batch in runner.batches(draw) for row in batch["input_ids"].tolist()}
            for draw in (0, 1, 2)
        ]
        assert [len(rows) for rows in draws] == [4, 4, 4]
        assert len(set.union(*draws)) == 12
        assert reads == [12]

    def test_depend_on_the_seed(self, make_compressor):
        digests = [make_compressor(seed=seed).draw().digest for seed in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]

    def test_too_few_windows_are_refused(self, make_compressor):
        session = make_compressor(calibration_samples=300)
        message = r"enough for \d disjoint draws of 300, and 9 are needed"
        with pytest.raises(DataError, match=message):
            session.draw(8)


class TestPause:
    def test_auto_takes_groups_where_activations_fit_in_half_of_the_memory(
        self, session, choose, monkeypatch
    ):
        waiting = module.in_flight(session.source, session.draw().inputs())
        assert waiting > 0

        def with_memory(available):
            memory = psutil.virtual_memory()._replace(available=available)
            monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
            return choose("auto", "gptq:4")

        assert with_memory(4 * waiting + 2) == "group"  # of the model as it was, too
        assert with_memory(4 * waiting) == "block"

    def test_auto_keeps_to_blocks_where_nothing_is_known_of_the_activations(
        self, choose, monkeypatch
    ):
        monkeypatch.setattr(module, "in_flight", lambda *args, **options: None)
        assert choose("auto", "gptq:4") == "block"
        assert choose("group", "gptq:4") == "group", "unless told so"

    def test_low_memory_and_orders_without_data_pause_at_blocks(self, choose):
        assert choose("auto", "gptq:4", low_memory=True) == "block"
        assert choose("auto", "rtn:4") == "block"
        assert choose("group", "rtn:4") == "block", "no forward is run"
        with pytest.raises(OrderError, match=r"leave out pause='group' \(--pause group\)"):
            choose("group", "gptq:4", low_memory=True)

    def test_runs_that_are_compared_pause_at_the_same_places(self, session, monkeypatch):
        """Where the one that takes most memory fits; that is one with the model as it was."""
        seen = []

        def pause_for(pause, recipe, batches, *, low_memory):
            seen.append((str(recipe.order), len(batches) > 0))
            return pause

        recipes = [Recipe.of(Order.parse(order)) for order in ("rtn:4", "wanda:0.5", "gptq:4")]
        monkeypatch.setattr(session, "pause_for", pause_for)
        assert session.shared_pause("group", recipes) == "group"
        assert session.shared_pause("block", recipes[:2]) == "block"
        assert seen == [("gptq:4", True), ("wanda:0.5", True)]

    def test_a_study_says_where_it_pauses_unless_at_blocks(self, session):
        """Studies of earlier versions paused at blocks and did not say so; they are resumed."""
        model = session.source.load()
        assert session.study_settings(model, None, "group")["pause"] == "group"
        assert "pause" not in session.study_settings(model, None, "block")

    def test_another_choice_is_refused_with_a_hint(self, choose):
        message = r"Unknown pause 'blocks'\. Did you mean 'block'\? Allowed: auto, block, group\."
        with pytest.raises(OrderError, match=message):
            choose("blocks", "gptq:4")

    def test_the_layers_that_are_left_out_do_not_wait(self, make_compressor):
        batches = make_compressor().draw().inputs()
        source = make_compressor().source
        everything = module.in_flight(source, batches)
        last = module.in_flight(source, batches, targets=["*.layers.1.mlp.down_proj"])
        assert 0 < last <= everything
        twice = [{"input_ids": torch.cat([batch["input_ids"]] * 2)} for batch in batches]
        assert module.in_flight(source, twice) == pytest.approx(2 * everything, rel=0.2)

    def test_nothing_is_known_of_a_model_that_multiplies_a_layer_twice(self, make_model):
        albert = JointCompressor(make_model("albert"), device="cpu")
        assert module.in_flight(albert.source, [{"input_ids": torch.ones(1, 8).long()}]) is None


class TestEvaluationSamples:
    def test_are_all_or_some_from_all_over(self, session, text_file):
        everything = session.evaluation_samples(str(text_file))
        some = session.evaluation_samples(str(text_file), 5)
        assert len(some) == 5 < len(everything)
        rows = [row.tolist() for row in everything.ids]
        places = [rows.index(row.tolist()) for row in some.ids]
        assert places == sorted(places)
        assert places[-1] > len(everything) // 2
        assert session.usual_samples == 64
        assert JointCompressor.from_pretrained("tiny-vit").usual_samples == 1000

    def test_a_metric_that_compares_has_the_original_model(self, session):
        model = session.source.load()
        assert session.metric(model, "auto").name == "perplexity"
        compared = session.metric(model, "fidelity")
        assert compared.reference is not model
        with pytest.raises(ModelError, match="Did you mean 'perplexity'"):
            session.metric(model, "perplexty")


class TestFingerprint:
    def test_differs_in_all_that_decides_what_a_run_computes(self, make_compressor):
        def fingerprint(order="wanda:0.5", pause="block", schedule="stage", **settings):
            session = make_compressor(**settings)
            recipe = Recipe.of(Order.parse(order), schedule)
            model = session.source.load()
            base = session.base_model(model, model.state_dict())
            execution = session.execution(model, pause)
            return session.fingerprint(base, recipe, session.draw(), execution, model.config)

        usual = fingerprint()
        assert fingerprint() == usual
        changes = {
            "order": {"order": "wanda:0.6"},
            "pause": {"pause": "group"},
            "schedule": {"schedule": "block"},
            "calibration": {"seed": 1},
            "targets": {"targets": ["*.q_proj"]},
            "ignore": {"ignore": ["*.q_proj"]},
        }
        for field, change in changes.items():
            other = fingerprint(**change)
            differing = {name for name in usual if usual[name] != other[name]}
            assert differing == {field}
        rounded = fingerprint(calibration_dtype="float32")["calibration_dtype"]
        assert rounded == "torch.float32"
        assert usual["model"]["architecture"] == "LlamaForCausalLM"
