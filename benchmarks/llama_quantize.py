"""Round a GGUF file by llama.cpp's own rule, embeddings and head apart: run by `run_llama.py`.

.venv-llama/bin/python benchmarks/llama_quantize.py IN.gguf OUT.gguf
"""

import sys

import llama_cpp

Q4_0 = 2
BF16 = 30


def main() -> None:
    source, target = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = Q4_0
    options.pure = True
    options.quantize_output_tensor = False
    options.token_embedding_type = BF16
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), options):
        raise SystemExit(f"llama.cpp cannot quantize {source}")


if __name__ == "__main__":
    main()
