"""`optimum-order evaluate` measures a model as it is."""

import json
import math

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.compressor import JointCompressor as Front
from optimum_order.evaluation.fidelity import Fidelity
from optimum_order.models.source import Checkpoint

SMALL = ["--sequence-length", 64]


def test_a_figure_is_that_of_the_api(program, tiny_llama_folder, text_file):
    done = program("evaluate", tiny_llama_folder, "--evaluate", text_file, *SMALL, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    compressor = JointCompressor.from_pretrained(tiny_llama_folder, sequence_length=64)
    expected = compressor.evaluate(str(text_file), progress=False).as_dict()
    assert result == {"model": str(tiny_llama_folder), **expected}
    words = ["evaluate", tiny_llama_folder, "--evaluate", text_file, *SMALL]
    done = program(*words, "--evaluation-samples", 3)
    assert "perplexity" in done.out and "3 samples, 192 tokens" in done.out


def test_a_saved_model_has_the_figure_of_its_manifest(program, saved, text_file):
    done = program("evaluate", saved, "--evaluate", text_file, *SMALL, "--json")
    assert done.code == 0, done.err
    figure = manifest.load(saved)["metrics"]["perplexity"]["after"]
    result = json.loads(done.out)
    assert (result["value"], result["digest"]) == (figure["value"], figure["digest"])


def test_the_protocol_of_the_literature_is_a_source_and_a_metric(program, monkeypatch):
    asked = []

    class Enough(Exception):
        pass

    def evaluate(self, source, metric, **options):
        asked.append((source, metric))
        raise Enough

    monkeypatch.setattr(Front, "evaluate", evaluate)
    assert program("evaluate", "tiny-llama", "--protocol", "literature").code == 70
    assert asked == [("literature", "perplexity")]
    for options in (["--metric", "fidelity"], ["--evaluate", "c4"]):
        done = program("evaluate", "tiny-llama", "--protocol", "literature", *options)
        assert done.code == 2 and "leave out --evaluate and --metric" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "perplexty"], "Did you mean 'perplexity'?"),
        (["--protocol", "papers"], "Unknown protocol 'papers'"),
        (["--evaluate", "./missing.txt"], "missing.txt"),
        (["--num-threads", "0"], "'--num-threads' must be 1 or more"),
    ],
)
def test_bad_input_is_one_line(program, options, message):
    done = program("evaluate", "tiny-llama", *options)
    assert done.code == 2 and message in done.err.splitlines()[-1]


def test_two_models_are_measured_side_by_side(program, saved, tiny_llama_folder, text_file):
    words = ["evaluate", saved, "--evaluate", text_file, *SMALL]
    done = program(*words, "--against", tiny_llama_folder, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    alone = json.loads(program(*words, "--json").out)
    other = ["evaluate", tiny_llama_folder, *words[2:], "--json"]
    assert result["against"] == json.loads(program(*other).out)
    assert {key: result[key] for key in alone} == alone
    assert set(result) == {*alone, "against", "difference", "flips"}
    performances = [-math.log(figures["value"]) for figures in (alone, result["against"])]
    assert result["difference"]["mean"] == pytest.approx(performances[0] - performances[1])
    assert result["difference"]["over"] == "samples" and result["flips"] is None
    done = program(*words, "--against", tiny_llama_folder)
    assert "Difference in M: " in done.out and "Flips" not in done.out
    assert f"{alone['value']:.6g}" in done.out and f"{result['against']['value']:.6g}" in done.out


def test_a_dry_run_reads_no_weight(program, tiny_llama_folder, text_file, monkeypatch):
    def load(self):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "load", load)
    words = ["evaluate", tiny_llama_folder, "--evaluate", text_file, *SMALL, "--dry-run"]
    done = program(*words, "--json")
    assert done.code == 0, done.err
    (alone,) = json.loads(done.out)["forecasts"]
    assert alone["samples"] == alone["tokens"] / 64 > 1
    assert alone["seconds"] > 0 and alone["memory"] > alone["weights"] > 0
    done = program(*words, "--against", tiny_llama_folder)
    assert done.out.count(" samples of ") == 2 and "Nothing was measured." in done.out
    words += ["--metric", "fidelity", "--against", tiny_llama_folder, "--json"]
    (both,) = json.loads(program(*words).out)["forecasts"]
    assert both["weights"] == 2 * alone["weights"], "the original is in memory too"


def test_a_metric_with_a_reference_compares_with_the_original(
    program, saved, tiny_llama_folder, text_file
):
    words = ["evaluate", saved, "--evaluate", text_file, *SMALL, "--metric", "fidelity"]
    done = program(*words)
    assert done.code == 2 and "name the original with --against" in done.err
    assert "Loading" not in done.err
    done = program(*words, "--against", tiny_llama_folder, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    original, compressed = (
        JointCompressor.from_pretrained(folder, sequence_length=64)
        for folder in (tiny_llama_folder, saved)
    )
    samples = original.evaluation_samples(str(text_file))
    by_hand = Fidelity(original.source.load()).measure(
        compressed.source.load(), samples, progress=False
    )
    assert result["value"] == pytest.approx(by_hand.value) and result["value"] > 1e-5
    assert result["original"] == str(tiny_llama_folder)
    assert "against" not in result and compressed.measured == {}
    out = program(*words, "--against", tiny_llama_folder).out
    assert "compared with" in out and f"{result['value']:.6g}" in out


def test_the_usual_metric_of_an_encoder_compares_with_the_original(program, tmp_path):
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=64, hidden_size=32, max_position_embeddings=32, **sizes)
    BertModel(config).save_pretrained(tmp_path / "bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text("a b c d e f g h i j k l m n o p " * 40)
    words = ["compress", tmp_path / "bert", tmp_path / "out", "--order", "rtn:3"]
    assert program(*words).code == 0
    words = ["evaluate", tmp_path / "out", "--evaluate", tmp_path / "text.txt"]
    done = program(*words)
    assert done.code == 2 and "'embedding' says how far" in done.err
    done = program(*words, "--against", tmp_path / "bert", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["name"] == "embedding" and result["value"] > 1e-9  # that of the original is 1e-16


def test_images_that_flip_are_counted(program, tmp_path):
    words = ["--order", "magnitude:0.7", "--calibration", "builtin"]
    assert program("compress", "tiny-resnet", tmp_path / "out", *words).code == 0
    words = ["evaluate", tmp_path / "out", "--evaluation-samples", 200, "--against", "tiny-resnet"]
    done = program(*words, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    flips = result["flips"]
    lost = len(flips["to_wrong"]) - len(flips["to_right"])
    assert lost == round(200 * (result["against"]["value"] - result["value"])) > 0
    assert 0 <= flips["p"] < 0.05 and all(1 <= int(name) <= 200 for name in flips["to_wrong"])
    out = program(*words).out
    assert f"{len(flips['to_right'])} to right, {len(flips['to_wrong'])} to wrong, p = " in out
