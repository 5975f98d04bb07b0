"""What commands that save a model print of it."""

from pathlib import Path

from optimum_order.cli import results

MANIFEST = {
    "order": "wanda:0.5 > gptq:4",
    "format": "compressed-tensors",
    "schedule": "stage",
    "bytes": {"before": 2_000_000, "after": 500_000, "per_weight_bits": 4.25},
    "sparsity": 0.5,
    "metrics": {"perplexity": {"before": {"value": 10.0}, "after": {"value": 12.5}}},
    "tokens": "secret",
}


def test_a_result_holds_what_a_script_asks_for_and_no_more():
    watch = results.Stopwatch()
    watch.lap("compress")
    result = results.saved(MANIFEST, Path("out"), watch)
    assert result["output"] == "out" and result["order"] == MANIFEST["order"]
    assert result["metrics"] == {"perplexity": {"before": 10.0, "after": 12.5}}
    assert list(result["seconds"]) == ["compress", "total"]
    assert result["seconds"]["total"] >= result["seconds"]["compress"] >= 0
    assert not {"plan", "search", "coverage", "unloaded", "tokens"} & set(result)
    searched = results.saved(MANIFEST | {"search": {"reason": "least loss"}}, Path("out"), watch)
    assert searched["search"] == {"reason": "least loss"}


def test_people_see_the_order_the_reason_and_how_to_load(capsys):
    for format, how in {
        "compressed-tensors": "transformers loads it from there by itself.",
        "coded": "transformers loads it from there after 'import optimum_order'.",
        "gguf": "with gguf_file='model.gguf', where ",
    }.items():
        watch = results.Stopwatch()
        manifest = MANIFEST | {"format": format, "plan": {"reason": "it was surely ahead"}}
        results.show_saved(results.saved(manifest, Path("out"), watch) | {"url": "hub/me/it"})
        text = capsys.readouterr().out
        assert "wanda:0.5 → gptq:4" in text and "it was surely ahead" in text
        assert how in text
        assert "Uploaded: hub/me/it" in text


def test_people_see_that_transformers_alone_leaves_an_adapter_out(capsys):
    for format, more in {
        "compressed-tensors": "",
        "sparse": ", after 'import optimum_order'",
    }.items():
        manifest = MANIFEST | {"format": format, "bytes": MANIFEST["bytes"] | {"adapter": 318440}}
        results.show_saved(results.saved(manifest, Path("out"), results.Stopwatch()))
        text = " ".join(capsys.readouterr().out.split())
        assert f"from there without its adapter, and PEFT adds that{more}." in text
        assert "of these the adapter" in text and "318 kB" in text
