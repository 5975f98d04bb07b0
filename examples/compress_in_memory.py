"""Compress a model that is already in memory, with texts of your own, and look at its layers.

python examples/compress_in_memory.py
"""

import transformers

from optimum_order import JointCompressor

# Any causal language model and its tokenizer; this one is untrained.
config = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=384,
)
model = transformers.LlamaForCausalLM(config)
tokenizer = transformers.ByT5Tokenizer()  # one token per byte, no file needed

texts = ["The order of two compression methods changes the result. " * 40] * 8
compressor = JointCompressor(
    model, tokenizer, calibration=texts, calibration_samples=8, sequence_length=128
)
compressed = compressor.compress("sparsegpt:0.5 > rtn:8")

for name, layer in compressed.layers.items():
    first = layer.weight[0, :4].tolist()
    print(f"{name}: {layer.sparsity:.0%} pruned, {layer.bits} bits, first weights {first}")
# `model` is unchanged; `compressed.model` is a transformers model with the new weights.
