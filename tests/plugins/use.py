"""Run orders on a model as a user would, in a process that knows the plug-ins by name alone.

    python use.py MODEL TEXT FOLDER ORDER [ORDER ...]

Each result is saved under FOLDER, verified, loaded by stock transformers, and printed as a line of
JSON.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify


def main(model: str, text: str, folder: str, *orders: str) -> None:
    compressor = JointCompressor.from_pretrained(
        model, calibration=text, calibration_samples=8, sequence_length=48
    )
    ids = compressor.draw().inputs()[0]
    with torch.inference_mode():
        original = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        before = original(**ids).logits
        for number, order in enumerate(orders):
            with torch.inference_mode(False):
                compressed = compressor.compress(order, progress=False)
                path = Path(folder, str(number))
                compressed.save_pretrained(path, format="dense")
                loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
            logits = loaded(**ids).logits
            mlp = loaded.get_submodule("model.layers.1.mlp")
            answer = {
                "order": str(compressed.order),
                "problems": verify(path),
                "as_measured": torch.equal(compressed.model(**ids).logits, logits),
                "distance": ((logits - before).norm() / before.norm()).item(),
                "intermediate_size": loaded.config.intermediate_size,
                "shapes": [list(layer.weight.shape) for layer in (mlp.up_proj, mlp.down_proj)],
                "sizes": len(mlp.up_proj.weight[0].abs().unique()),
                "zeros": (mlp.up_proj.weight == 0).float().mean().item(),
                "same_rows": torch.equal(
                    mlp.up_proj.weight, original.get_submodule("model.layers.1.mlp").up_proj.weight
                ),
            }
            print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
