"""Prune first or quantise first? Do both to the same model, and compare.

python examples/compress_in_two_orders.py
"""

from optimum_order import JointCompressor, Order

compressor = JointCompressor.from_pretrained("tiny-llama", calibration_samples=16)
print("before:", compressor.evaluate("builtin").value)

results = []
for order in Order.parse("magnitude:0.5 > gptq:3").permutations():
    compressed = compressor.compress(order)  # starts again from the checkpoint
    perplexity = compressed.evaluate("builtin").value
    print(f"{order}: {perplexity}")
    results.append((perplexity, compressed))

best = min(results, key=lambda result: result[0])[1]
print("saved as", best.save_pretrained("best-order", overwrite=True), "in best-order")
