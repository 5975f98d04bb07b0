"""Loads saved models with stock transformers and writes down what came out; never imports optimum_order.

Run as `python reload_stock.py RESULTS FOLDER...`: for the n-th folder, `RESULTS/n.safetensors` holds the logits (or
last hidden state) for `inputs` below and every parameter by name, dequantised, as it was before the first forward
pass. It takes most of a second for each folder and most of ten to start, so give it all there are at once.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

INPUTS = torch.arange(1, 25).view(2, 12) % 61
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(
    2, 3, 32, 32
)  # a model of smaller images gets a corner of these


def outputs(model):
    """The logits of a language model or an image classifier, or an encoder's last hidden state."""
    model.eval()
    size = getattr(model.config, "image_size", 32)
    inputs = PIXELS[..., :size, :size] if model.main_input_name == "pixel_values" else INPUTS
    with torch.no_grad():
        return model(inputs.to(model.device)).to_tuple()[0]


def main(results, folders):
    torch.set_num_threads(1)
    for index, folder in enumerate(folders):
        config = json.loads(Path(folder, "config.json").read_text())
        name = config["architectures"][0]
        auto = AutoModelForCausalLM if name.endswith(("LM", "LMHeadModel")) else AutoModel
        auto = AutoModelForImageClassification if name.endswith("ForImageClassification") else auto
        model = auto.from_pretrained(folder, device_map="cpu")
        if hasattr(model, "ct_decompress_hook"):
            logits = outputs(model)  # the first forward pass unpacks
        tensors = {}
        for name, parameter in model.named_parameters():
            module = model.get_submodule(name.rpartition(".")[0])
            state = getattr(module, "state", None)
            tensors[name] = (
                dequantize_bnb_weight(parameter, state) if name.endswith(".weight") else parameter
            )
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        if not hasattr(model, "ct_decompress_hook"):
            logits = outputs(model)  # bitsandbytes may repack its weights here
        save_file(
            {"outputs": logits.contiguous(), **tensors}, Path(results, f"{index}.safetensors")
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    assert not any(name.startswith("optimum_order") for name in sys.modules)
