"""Questions of lm-eval: one score each, tasks from a name, a file or a config, and errors in a line.

Without lm-eval, which is an extra, a small one of the same interface stands in where nothing is asked.
"""

import json
import random
import sys

import numpy as np
import pytest
import torch
import transformers

from optimum_order import JointCompressor, evaluation
from optimum_order.data.samples import Windows
from optimum_order.errors import DataError, ModelError, OptimumOrderError
from optimum_order.evaluation.comparison import Comparison
from optimum_order.evaluation.lm_eval import LMEval
from optimum_order.testing import MetricContract

WORDS = ["cat", "dog", "bird", "fish", "tree", "stone", "river"]
DOCS = [
    {"question": f"The {WORDS[n % 7]} and the", "choices": [WORDS[(n + k) % 7] for k in (1, 2, 3)], "answer": n % 3}
    for n in range(12)
]  # fmt: skip
ACC = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
]
TASK = {
    "task": "mine",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": ACC,
}


def config(**changes):
    import datasets

    def read(**_):
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(DOCS)})

    return TASK | {"custom_dataset": read} | changes


def yaml_task(folder, **changes):
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "docs.jsonl")}}
    file = folder / "mine.yaml"
    file.write_text(json.dumps(TASK | data | {"test_split": "train"} | changes))  # JSON is YAML
    return file


class TestNames:
    def test_tasks_follow_a_colon(self):
        metric = evaluation.named("lm_eval:arc_easy, ./some/mine.yaml")
        assert issubclass(metric, LMEval) and metric.tasks == ("arc_easy", "./some/mine.yaml")
        assert metric.name == "lm_eval:arc_easy,mine", "no path of this machine"
        assert evaluation.named("lm_eval") is LMEval
        with pytest.raises(ModelError, match="'accuracy' takes nothing after a colon, got 'x'"):
            evaluation.named("accuracy:x")
        with pytest.raises(ModelError, match="Did you mean 'lm_eval'"):
            evaluation.named("lm_evl:arc_easy")

    def test_without_tasks_or_a_tokenizer_nothing_is_read(self, tiny_llama_folder, make_model):
        compressor = JointCompressor.from_pretrained(tiny_llama_folder, device="cpu")
        with pytest.raises(DataError, match=r"needs tasks: .* \(--metric lm_eval:arc_easy\)"):
            compressor.evaluate(metric="lm_eval", progress=False)
        with pytest.raises(DataError, match="has no tokenizer"):
            JointCompressor(make_model("llama"), device="cpu").evaluate(metric="lm_eval:arc_easy")

    def test_the_extra_that_is_missing_is_named(self, tiny_llama_folder, monkeypatch):
        from optimum_order.evaluation import lm_eval

        lm_eval._manager.cache_clear()
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
        compressor = JointCompressor.from_pretrained(tiny_llama_folder, device="cpu")
        with pytest.raises(OptimumOrderError, match=r"pip install 'optimum-order\[lm-eval\]'"):
            compressor.evaluate(metric="lm_eval:mine.yaml", progress=False)


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="run by make clients")


@pytest.mark.client
@pytest.mark.usefixtures("harness")
class TestAnswers:
    @pytest.fixture
    def compressor(self, tiny_llama_folder):
        return JointCompressor.from_pretrained(
            tiny_llama_folder, calibration="builtin", calibration_samples=4, device="cpu"
        )

    def test_each_question_is_answered_by_the_most_likely_choice(self, compressor, tmp_path):
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        measured = compressor.evaluate([config()], "lm_eval", progress=False)
        assert measured.names == tuple(f"mine/{number}" for number in range(12))
        assert (measured.name, measured.source) == ("lm_eval", "mine")
        tokenizer = compressor.source.processor
        model = compressor.source.load()
        expected = []
        with torch.no_grad():
            for doc in DOCS:
                sums = []
                for choice in doc["choices"]:
                    start = tokenizer(doc["question"], return_tensors="pt").input_ids
                    ids = tokenizer(f"{doc['question']} {choice}", return_tensors="pt").input_ids
                    logs = model(ids).logits.log_softmax(-1)[0, start.shape[1] - 1 : -1]
                    sums.append(logs.gather(1, ids[0, start.shape[1] :, None]).sum().item())
                expected.append(float(sums.index(max(sums)) == doc["answer"]))
        assert list(measured.scores) == expected and 0 < measured.value < 1
        assert measured.value == measured.details["mine acc"] == sum(expected) / 12
        assert set(measured.details) == {"mine acc", "mine acc_norm"}
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])

        of_file = compressor.evaluate(metric=f"lm_eval:{yaml_task(tmp_path)}", progress=False)
        assert (of_file.name, of_file.scores) == ("lm_eval:mine", measured.scores)
        few = compressor.evaluate([config()], "lm_eval", samples=5, progress=False)
        assert few.names == ("mine/0", "mine/2", "mine/4", "mine/7", "mine/9")
        assert few.scores == tuple(measured.scores[n] for n in (0, 2, 4, 7, 9))
        assert few.digest != measured.digest

    def test_another_question_or_wording_has_another_digest(self):
        def digest(**changes):
            return LMEval.own_samples([config(**changes)], object(), None).digest

        one = digest()
        assert digest() == one
        assert digest(doc_to_text="Q: {{question}}") != one
        assert digest(task="yours") != one

    def test_what_cannot_be_asked_is_refused_in_one_line(self, compressor, tmp_path):
        for specs, message in [
            ("arc_esy", "lm-eval has no task 'arc_esy'"),
            (str(tmp_path / "none.yaml"), "There is no file"),
            ([config(test_split="nothing")], "lm-eval cannot read the questions"),
            ([config(output_type="loglikelihood_rolling", doc_to_target="{{question}}", doc_to_choice=None,
                     metric_list=[{"metric": "word_perplexity"}])], "no metric that scores each question"),
        ]:  # fmt: skip
            with pytest.raises(DataError, match=message) as error:
                compressor.evaluate(specs, "lm_eval", progress=False)
            assert "\n" not in str(error.value)

    def test_it_goes_into_manifests_and_studies(self, compressor, tmp_path):
        compressor.evaluate([config()], "lm_eval", progress=False)
        compressed = compressor.compress("rtn:3", progress=False)
        after = compressed.evaluate([config()], "lm_eval", progress=False)
        compressed.save_pretrained(tmp_path / "out")
        both = compressed.manifest["metrics"]["lm_eval"]
        assert both["after"]["value"] == after.value and both["before"]["samples"] == 12
        loaded = JointCompressor.from_pretrained(tmp_path / "out", device="cpu")
        again = loaded.evaluate([config()], "lm_eval", progress=False)
        assert again.scores == after.scores
        study = compressor.study(
            ["magnitude:0.5", "rtn:3"], tmp_path / "study", metric=f"lm_eval:{yaml_task(tmp_path)}",
            evaluation_samples=6, progress=False,
        )  # fmt: skip
        assert study is not None

    def test_two_models_are_compared_question_by_question(self, compressor):
        before = compressor.evaluate([config()], "lm_eval", progress=False)
        model = compressor.source.load()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
        questions = LMEval.own_samples([config()], compressor.source.processor, None)
        after = LMEval().measure(model, questions, progress=False)
        compared = Comparison.of(after, before)
        changed = {*compared.flips.to_right, *compared.flips.to_wrong}
        pairs = zip(after.names, after.scores, before.scores, strict=True)
        assert changed == {name for name, one, other in pairs if one != other} and changed


@pytest.mark.client
@pytest.mark.usefixtures("harness")
class TestContract(MetricContract):
    """The contract of every metric, but that noise in random weights makes no model worse at chance."""

    @pytest.fixture(autouse=True)
    def folder(self, tiny_llama_folder):
        TestContract.tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_folder)
        TestContract.saved = tiny_llama_folder

    def metric(self):
        return LMEval()

    def model(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.saved).eval()

    def samples(self):
        return LMEval.own_samples([config()], self.tokenizer, None)

    def test_a_worse_model_has_a_lower_performance(self):
        pytest.skip("a model of random weights guesses")

    def test_windows_are_no_questions(self):
        with pytest.raises(DataError, match="asks questions, got counting"):
            self.metric().measure(self.model(), Windows(torch.ones(4, 8).long(), "counting"))
