"""Write what a version leaves on the disk: artifacts, their logits, and a cut-off work dir.

Run with the environment of that version; README.md in this folder has the command.
"""

import multiprocessing
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import optimum_order
from optimum_order import JointCompressor

ORDER = "wanda:0.5 > gptq:4"
FORMATS = ("sparse", "compressed-tensors")
INPUTS = torch.arange(1, 25).view(2, 12) % 61
CALIBRATION = torch.arange(4 * 32).mul(7).remainder(61).view(4, 32)


def tiny_model():
    """Return a Llama of two blocks, 64 wide, whose weights are the same on every machine."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).eval()
    begin = 0
    for parameter in model.parameters():
        index = torch.arange(begin, begin + parameter.numel())
        # whole numbers in -2^15 .. 2^15, by a linear congruence, so that no rounding is involved
        hashed = index.mul(1103515245).add(12345).remainder(2**31) // 2**15 - 2**15
        values = hashed / 2**17 + (1 if parameter.ndim == 1 else 0)
        parameter.data.view(-1).copy_(values)
        begin += parameter.numel()
    return model


def compressor():
    """Return the `JointCompressor` of every run here."""
    return JointCompressor(
        tiny_model(),
        calibration=CALIBRATION,
        calibration_samples=4,
        sequence_length=32,
        calibration_dtype="float32",
        device="cpu",
    )


def cut_off(folder, files=3):
    """Begin a run and kill it (SIGKILL) in its second stage, once it has written so many files."""
    run = {"order": ORDER, "work_dir": folder, "progress": False}
    child = multiprocessing.get_context("fork").Process(target=compressor().compress, kwargs=run)
    child.start()
    names = set()
    while child.is_alive() and len(names) < files:
        names.update(file.name for file in folder.glob("*.safetensors"))
        time.sleep(0.0005)
    child.kill()
    child.join()
    if child.exitcode != -9:
        raise RuntimeError("The run ended before it was cut off; start this script again.")


def main(output):
    """Write all files into a folder, in place of those of the same version.

    Args:
        output: The folder.
    """
    torch.set_num_threads(1)
    version = optimum_order.__version__
    artifacts = output / f"artifact-{version}"
    work_dir = output / f"work-dir-{version}"
    for folder in (artifacts, work_dir):
        shutil.rmtree(folder, ignore_errors=True)
    compressed = compressor().compress(ORDER, progress=False)
    logits = {}
    for format in FORMATS:
        compressed.save_pretrained(artifacts / format, format)
        model = AutoModelForCausalLM.from_pretrained(artifacts / format)
        with torch.no_grad():
            logits[format] = model(INPUTS).logits
    torch.testing.assert_close(*logits.values(), rtol=0, atol=0)
    save_file({"logits": logits["sparse"]}, output / f"logits-{version}.safetensors")
    cut_off(work_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
