"""Round a GGUF file by llama.cpp's own rule, embeddings and head apart: run by `run_llama.py`.

.venv-llama/bin/python benchmarks/llama_quantize.py IN.gguf OUT.gguf [TYPE] [IMPORTANCE.npz]

TYPE is q4_0 by default. The file of importances holds for each tensor the mean squares of its
inputs, which is what llama.cpp calls an importance matrix.
"""

import ctypes
import sys

import llama_cpp
import numpy as np

BF16 = 30
TYPES = {"q4_0": 2, "q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18}
"""Of whole files; all tensors get the type of the name."""
MIXES = {"q4_k_m": 15}
"""Of whole files whose tensors get the types that llama.cpp gives them by their names."""


def main() -> None:
    source, target, kind, *files = [*sys.argv[1:], *(["q4_0"] if len(sys.argv) < 4 else [])]
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = {**TYPES, **MIXES}[kind]
    options.pure = kind not in MIXES
    options.quantize_output_tensor = False
    options.token_embedding_type = BF16
    if files:
        importances = dict(np.load(files[0]))
        entries = (
            llama_cpp.llama_model_imatrix_data * (len(importances) + 1)
        )()  # the last is empty
        for entry, (name, values) in zip(entries, importances.items(), strict=False):
            entry.name = name.encode()
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = values.size
        options.imatrix = ctypes.cast(entries, type(options.imatrix))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), options):
        raise SystemExit(f"llama.cpp cannot quantize {source}")


if __name__ == "__main__":
    main()
