"""Prune first or quantize first? Do both to the same model, and compare.

python examples/compress_in_two_orders.py
"""

from pydoc_data.topics import topics

from optimum_order import JointCompressor, Order

# any texts do; float32 is the fast dtype of processors without bfloat16 units
compressor = JointCompressor.from_pretrained(
    "tiny-llama", dtype="float32", calibration=[topics["compound"]], calibration_samples=16
)
texts = [topics["import"]]
print("before:", compressor.evaluate(texts).value)

results = []
for order in Order.parse("magnitude:0.5 > gptq:3").permutations():
    compressed = compressor.compress(order)  # starts again from the checkpoint
    perplexity = compressed.evaluate(texts).value
    print(f"{order}: {perplexity}")
    results.append((perplexity, compressed))

best = min(results, key=lambda result: result[0])[1]
print("saved as", best.save_pretrained("best-order", overwrite=True), "in best-order")
