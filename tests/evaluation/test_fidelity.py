"""Fidelity against torch's own KL divergence, and what it must refuse."""

import copy
import math

import pytest
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from optimum_order.data.arguments import Arguments
from optimum_order.errors import DataError, ModelError
from optimum_order.evaluation import Images, Windows, available, choose, fidelity
from optimum_order.evaluation.fidelity import Fidelity
from optimum_order.testing import MetricContract

BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
}


def vit(**changes):
    torch.manual_seed(0)
    settings = VIT | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 5} | changes
    return ViTForImageClassification(ViTConfig(**settings)).eval()


def disturbed(model, scale=0.1):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(
                parameter.dtype
            )
    return other


def counted(model):
    """The sizes of the batches that the model is run on, in order."""
    sizes = []
    forward = model.forward

    def count(*args, **inputs):
        sizes.append(len(next(iter(inputs.values()))))
        return forward(*args, **inputs)

    model.forward = count
    return sizes


@pytest.fixture
def windows():
    return Windows(
        torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0)), "made up"
    )


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return Images(
        torch.randn(5, 1, 8, 8, generator=generator), "made up", torch.tensor([0, 1, 2, 3, 4])
    )


@pytest.fixture
def model(make_model):
    return make_model("llama")


def measure(reference, model, samples, **options):
    return Fidelity(reference).measure(model, samples, progress=False, **options)


def test_it_is_found_by_name():
    assert available()["fidelity"] is Fidelity


class TestContract(MetricContract):
    @pytest.fixture(autouse=True)
    def original(self, model, windows):
        self._original = model
        self._windows = windows

    def metric(self):
        return Fidelity(self._original)

    def model(self):
        return disturbed(self._original, 0.02)

    def samples(self):
        return self._windows


def test_the_mean_kl_divergence_from_the_original(make_model, windows, images):
    torch.manual_seed(0)
    for original, samples in [
        (make_model("llama"), windows),
        (BertForMaskedLM(BertConfig(**BERT)).eval(), windows),
        (BertForSequenceClassification(BertConfig(**BERT, num_labels=3)).eval(), windows),
        (vit(), images),
    ]:
        other = disturbed(original)
        if samples is images:
            inputs = {"pixel_values": images.pixels}
        else:
            inputs = {"input_ids": windows.ids}
        with torch.no_grad():
            p, q = (m(**inputs).logits.double().log_softmax(-1) for m in (original, other))
        positions = 12 if p.ndim == 3 else 1
        expected = [
            functional.kl_div(q[i], p[i], log_target=True, reduction="sum").item() / positions
            for i in range(5)
        ]
        result = measure(original, other, samples, batch_size=2)
        assert min(expected) > 1e-5
        # of float32 logits of other batches
        assert result.scores == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert result.value == pytest.approx(sum(expected) / 5, rel=1e-3)
        assert result.performance == -result.value and not result.higher_is_better
        reverse = measure(other, original, samples, batch_size=2)
        assert reverse.value != pytest.approx(result.value, rel=1e-3)


def test_a_model_is_exactly_like_itself(make_model, windows, images):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("llama").to(dtype)
        metric = Fidelity(model)
        for _ in range(2):  # the second time against the cached logits
            result = metric.measure(model, windows, batch_size=2, progress=False)
            assert result.scores == (0,) * 5
    original = vit()
    assert measure(original, copy.deepcopy(original), images).scores == (0,) * 5


def test_labels_do_not_matter(images):
    original = vit()
    other = disturbed(original)
    unlabeled = Images(images.pixels, "made up")
    scores = [measure(original, other, samples).scores for samples in (images, unlabeled)]
    assert scores[0] == scores[1]


def test_a_small_difference_is_not_lost_in_rounding():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(8, 1000, generator=generator) * 3
    q = p + 1e-4 * torch.randn(8, 1000, generator=generator)
    probabilities = p.double().softmax(-1)
    change = (q - p).double()
    variance = (probabilities * change.square()).sum(-1) - (probabilities * change).sum(-1).square()
    # to second order, KL is half the variance of the change of the logits: 1e-9, lost in float32
    assert fidelity._divergence(p, q).item() == pytest.approx(variance.mean().item() / 2, rel=1e-3)


def test_logits_of_any_size():
    p, q = torch.tensor([[3e4, 0.0, -3e4]]), torch.tensor([[0.0, 3e4, -3e4]])
    assert fidelity._divergence(p, q).item() == 3e4
    ruled_out = torch.tensor([[0.0, 0.0, -math.inf]])
    divergence = fidelity._divergence(ruled_out, torch.tensor([[1.0, 0.0, -math.inf]]))
    assert divergence.item() == pytest.approx(math.log1p(math.e) - math.log(2) - 0.5)
    assert fidelity._divergence(torch.zeros(1, 3), ruled_out).item() == math.inf


def test_slices_add_up(model, windows, monkeypatch):
    other = disturbed(model)
    expected = measure(model, other, windows).scores
    monkeypatch.setattr(fidelity, "_SLICE", 64 * 5)  # 12 positions as 5, 5 and 2
    assert measure(model, other, windows).scores == pytest.approx(expected, rel=1e-12)


def test_the_original_is_run_once(model, windows):
    others = [disturbed(model, scale) for scale in (0.1, 0.2)]
    runs = counted(model)
    metric = Fidelity(model)
    first = [metric.measure(other, windows, batch_size=2, progress=False).value for other in others]
    assert runs == [2, 2, 1]
    again = [measure(model, other, windows, batch_size=2).value for other in others]
    assert first == again and first[0] < first[1]


def test_cached_logits_are_of_the_very_same_batch(model, windows):
    other = disturbed(model)
    metric = Fidelity(model)
    metric.measure(other, windows, progress=False)
    changed = Windows(windows.ids.clone(), "made up")
    changed.ids[0, 0] = (changed.ids[0, 0] + 1) % 64
    expected = measure(model, other, changed).scores
    assert metric.measure(other, changed, progress=False).scores == expected


def test_no_more_is_cached_than_allowed(model, windows):
    other = disturbed(model)
    runs = counted(model)
    one_batch = 2 * 12 * 64 * 4
    metric = Fidelity(model, cache_bytes=2 * one_batch - 1)
    expected = metric.measure(other, windows, batch_size=2, progress=False).value
    assert runs == [2, 2, 1]
    # the first batch and the last, half as large, are cached
    assert metric.measure(other, windows, batch_size=2, progress=False).value == expected
    assert runs == [2, 2, 1, 2]


def test_it_needs_the_original():
    with pytest.raises(
        ModelError, match="'fidelity' compares with the original model: give it as 'reference'"
    ):
        Fidelity()


def test_an_original_in_training_mode(model, windows):
    with pytest.raises(ModelError, match="training mode"):
        measure(copy.deepcopy(model).train(), model, windows)


def test_a_model_without_logits(windows):
    encoder = BertModel(BertConfig(**BERT)).eval()
    with pytest.raises(
        ModelError, match=r"BertModel computes no logits\. Load .*AutoModelForMaskedLM"
    ):
        measure(encoder, encoder, windows)


def test_a_model_with_one_output(images):
    with pytest.raises(ModelError, match=r"logits of the shape \(5, 1\)"):
        measure(vit(num_labels=1), vit(num_labels=1), images)


def test_outputs_that_are_no_distribution(images):
    for problem in ("regression", "multi_label_classification"):
        with pytest.raises(ModelError, match=problem):
            measure(vit(problem_type=problem), vit(), images)


def t5(**changes):
    torch.manual_seed(1)
    settings = {"vocab_size": 64, "d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(
        **settings
        | {
            "eos_token_id": None,
            "decoder_start_token_id": 0,
            "initializer_factor": 3.0,
        }
        | changes
    )
    return T5ForConditionalGeneration(config).eval()


def whisper():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=10,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
        init_std=0.5,
    )
    return WhisperForConditionalGeneration(config).eval()


def said_by(model, ids, count=64):
    """What `generate` says after the first token of the decoder, (b, count)."""
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    return model.generate(ids, **options)[:, 1:]


def test_an_encoder_decoder_says_what_the_original_says(windows):
    model = t5()
    other = disturbed(model, 0.02)
    assert measure(model, model, windows).value == 0
    ids = windows.ids
    decoder = torch.cat(
        [torch.zeros(len(ids), 1, dtype=torch.int64), said_by(model, ids)[:, :-1]], 1
    )
    with torch.no_grad():
        p, q = (
            m(input_ids=ids, decoder_input_ids=decoder).logits.double().log_softmax(-1)
            for m in (model, other)
        )
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(1)
    assert measure(model, other, windows).scores == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_comes_after_the_end_of_an_answer_does_not_count(windows):
    ids = windows.ids[:1]
    one = Windows(ids, "one")
    said = said_by(t5(), ids)[0].tolist()
    length = next(n for n in range(2, 64) if said[n - 1] not in said[: n - 1])
    ending = t5(eos_token_id=said[length - 1])
    decoder = torch.tensor([[0, *said[: length - 1]]])
    other = disturbed(ending, 0.02)
    with torch.no_grad():
        p, q = (
            m(input_ids=ids, decoder_input_ids=decoder).logits.double().log_softmax(-1)
            for m in (ending, other)
        )
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    assert measure(ending, other, one).value == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_of_speech():
    generator = torch.Generator().manual_seed(0)
    sounds = {
        "input_features": torch.randn(3, 8, 40, generator=generator),
        "decoder_input_ids": torch.full((3, 4), 2),
    }
    samples = Arguments(sounds, "sounds")
    model = whisper()
    assert measure(model, model, samples).value == 0
    assert measure(model, disturbed(model), samples).value > 0
    assert choose(model) is Fidelity


def test_an_encoder_decoder_that_says_nothing(windows):
    model = T5Model(t5().config).eval()
    with pytest.raises(ModelError, match="T5Model has no head that says anything"):
        measure(model, model, windows)


def test_another_model_than_the_original(images):
    with pytest.raises(ModelError, match=r"the shape \(5, 5\).* \(5, 4\)"):
        measure(vit(), vit(num_labels=4), images)


def test_samples_that_one_of_the_two_cannot_read(model, images):
    with pytest.raises(DataError, match="LlamaForCausalLM reads 'input_ids'"):
        measure(model, vit(), images)


def test_a_model_that_computes_no_numbers(model, windows):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="fidelity of window 1 of 5 is not finite"):
        measure(model, broken, windows)
