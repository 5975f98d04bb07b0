"""Sounds of every source, as a speech model reads them."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.io import wavfile
from transformers import AutoTokenizer, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from optimum_order.data.audio import load
from optimum_order.data.fit import fitted
from optimum_order.data.samples import MissingProcessorError
from optimum_order.errors import DataError
from optimum_order.models.rehearsal import outline
from optimum_order.models.source import InMemory

RATE = 4000


@dataclasses.dataclass
class Processor:
    feature_extractor: Any
    tokenizer: Any = None


def whisper(name="WhisperModel"):
    model_class = getattr(transformers, name)
    config = transformers.WhisperConfig(
        vocab_size=400,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=50,
        max_target_positions=80,
        num_mel_bins=8,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=7,
    )
    return model_class(config).eval()


def wav2vec2(name="Wav2Vec2Model"):
    model_class = getattr(transformers, name)
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=[16, 16],
        conv_kernel=[10, 4],
        conv_stride=[8, 4],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        vocab_size=30,
    )
    return model_class(config).eval()


@pytest.fixture
def hearing(tiny_llama_folder):
    """Whisper, which reads stretches of one second."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    extractor = WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, hop_length=RATE // 100, chunk_length=1, n_fft=80
    )
    return InMemory.of(whisper(), Processor(extractor, tokenizer))


@pytest.fixture
def listening():
    """Wav2Vec2, which reads anything."""
    return InMemory.of(wav2vec2(), Wav2Vec2FeatureExtractor(sampling_rate=RATE))


def tone(seconds, rate=RATE, pitch=200.0):
    times = np.arange(int(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def test_a_model_of_fixed_stretches_gets_each_sound_padded_and_text_to_decode(hearing):
    samples = load([tone(2.5), tone(0.3)], hearing, samples=None, purpose="evaluation")
    assert samples.tensors["input_features"].shape == (4, 8, 100)
    ids = samples.tensors["decoder_input_ids"]
    assert ids.shape == (4, 64) and (ids[:, 0] == 7).all() and len(ids[:, 1:].unique()) > 20
    ready = fitted(samples, outline(hearing))
    for name in ("WhisperModel", "WhisperForConditionalGeneration"):
        whisper(name)(**ready.inputs()[0])
    again = load([tone(2.5), tone(0.3)], hearing, samples=2, seed=1)
    assert len(again) == 2
    assert again.digest == load([tone(2.5), tone(0.3)], hearing, samples=2, seed=1).digest


def test_sounds_for_any_other_model_are_one_stream_without_padding(listening, monkeypatch):
    monkeypatch.setattr("optimum_order.data.audio._SECONDS", 1)
    samples = load([tone(0.6), tone(0.7), tone(0.9)], listening, samples=None)
    assert samples.tensors["input_values"].shape == (2, RATE)
    short = load([tone(0.6)], listening, samples=None)
    assert short.tensors["input_values"].shape == (1, int(0.6 * RATE)), "all that there is"
    for name in ("Wav2Vec2Model", "Wav2Vec2ForCTC"):
        model = wav2vec2(name)
        model(**fitted(samples, outline(InMemory.of(model))).inputs()[0])


def test_every_source_gives_the_same_sound(listening, tmp_path):
    sound = tone(1.0)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    wavfile.write(tmp_path / "one.wav", RATE, sound)
    wavfile.write(tmp_path / "folder" / "a" / "1.WAV", RATE, sound)
    wavfile.write(tmp_path / "loud.wav", RATE, (sound * 32767).astype(np.int16))
    wavfile.write(tmp_path / "coarse.wav", RATE, (sound * 127 + 128).astype(np.uint8))
    wavfile.write(tmp_path / "stereo.wav", RATE, np.stack([sound, sound], 1))
    wavfile.write(tmp_path / "fast.wav", 2 * RATE, tone(1.0, 2 * RATE))
    expected = load([sound], listening, samples=None).tensors["input_values"]
    for source, name, tolerance in (
        ([torch.from_numpy(sound)], "1 sounds in memory", 0),
        ([sound.astype(np.float64)], "1 sounds in memory", 0),
        ([(sound, RATE)], "1 sounds in memory", 0),
        ([{"array": sound, "sampling_rate": RATE}], "1 sounds in memory", 0),
        ([(tone(1.0, 3 * RATE), 3 * RATE)], "1 sounds in memory", 0.1),
        (tmp_path / "one.wav", "one.wav", 0),
        (str(tmp_path / "folder"), "folder", 0),
        (tmp_path / "loud.wav", "loud.wav", 1e-3),
        (tmp_path / "coarse.wav", "coarse.wav", 0.05),
        (tmp_path / "stereo.wav", "stereo.wav", 1e-6),
        (tmp_path / "fast.wav", "fast.wav", 0.1),
    ):
        samples = load(source, listening, samples=None)
        values = samples.tensors["input_values"]
        assert samples.source == name and values.shape == expected.shape
        middle = slice(100, -100)  # the ends of a resampled sound ring
        assert (values - expected)[:, middle].abs().max() <= tolerance, source


def test_a_dataset_with_a_column_of_sounds(listening, tmp_path):
    import datasets

    wavfile.write(tmp_path / "one.wav", RATE, tone(1.0))
    stored = {"bytes": (tmp_path / "one.wav").read_bytes(), "path": None}
    data = datasets.Dataset.from_dict({"id": ["a", "b"], "audio": [stored, stored]})
    data = data.cast_column("audio", datasets.Audio(decode=False))
    data.save_to_disk(tmp_path / "corpus")
    samples = load(str(tmp_path / "corpus"), listening, samples=None)
    both = load([tone(1.0)] * 2, listening, samples=None)
    assert samples.source == "corpus" and samples.digest == both.digest


def test_what_is_no_sound_is_one_line(listening, hearing, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF" + b"\xff" * 40)
    for reader, source, message in (
        (listening, "builtin", "no built-in sounds.*Give a folder of .wav files"),
        (listening, tmp_path / "a.wav", "'a.wav' is no .wav file that can be read"),
        (listening, tmp_path / "missing.wav", "'missing.wav' is no .wav file"),
        (listening, [np.zeros((2, 9))], r"Sound 1 must be an array .samples,. of floats"),
        (listening, [np.zeros(9, np.int16)], "Sound 1 must be an array"),
        (listening, [], "0 sounds in memory has no sounds"),
        (listening, 3, "Sounds are a .wav file, a folder of them"),
        (InMemory.of(wav2vec2()), [tone(1.0)], "need a feature extractor, and there is none"),
        (InMemory.of(whisper(), hearing.processor.feature_extractor), [tone(1.0)], "needs a tok"),
    ):
        with pytest.raises(DataError, match=message) as error:
            load(source, reader, samples=None)
        assert "\n" not in str(error.value)
    with pytest.raises(MissingProcessorError):
        load([tone(1.0)], InMemory.of(wav2vec2()), samples=None)
