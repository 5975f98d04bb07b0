"""Rows that several commands print."""

from optimum_order.cli.tables import (
    arrows,
    console,
    metric_values,
    outcome_rows,
    smaller_text,
)

MEASURED = {
    "perplexity": {"before": {"value": 10.0}, "after": {"value": 12.34567}},
    "fidelity": {"before": None, "after": {"value": 0.5}},
}


def test_orders_are_printed_with_arrows():
    assert arrows("wanda:0.5 > gptq:4 > rtn:3") == "wanda:0.5 → gptq:4 → rtn:3"


def test_text_from_elsewhere_is_no_markup(capsys):
    console().print("[bold]as it is[/bold] 12")
    assert capsys.readouterr().out == "[bold]as it is[/bold] 12\n"


def test_the_rows_of_an_outcome():
    metrics = metric_values(MEASURED)
    assert metrics["fidelity"] == {"before": None, "after": 0.5}
    sizes = {"before": 11_720_000, "after": 999, "per_weight_bits": 4.253}
    manifest = {"metrics": metrics, "bytes": sizes, "sparsity": 0.5, "format": "coded"}
    assert outcome_rows(manifest) == [
        ("perplexity", "10 → 12.35"),
        ("fidelity", "not measured → 0.5"),
        ("weights on disk", "11.7 MB → 999 bytes"),
        ("bits per compressed weight", "4.25"),
        ("sparsity", "50.0%"),
    ]
    counted = manifest | {
        "coverage": {"weights": 1000, "compressed": 250, "layers": 4, "idle": 3},
        "unloaded": {"tensors": 10, "bytes": 1200},
    }
    assert outcome_rows(counted)[-4:] == [
        ("compressed", "25.0% of 1,000 weights"),
        ("sparsity", "50.0% of these, 12.5% of all"),
        (
            "no calibration token",
            "3 of 4 layers: give more --calibration-samples, or --ignore these",
        ),
        ("not loaded by the model", "10 tensors, 1.2 kB: copied as they are"),
    ]
    sizes["before"] = None
    assert ("weights on disk", "unknown → 999 bytes") in outcome_rows(manifest)


def test_pruning_that_saves_no_byte_is_said_to():
    sizes = {"before": 100, "after": 50, "per_weight_bits": 4.25}
    manifest = {"metrics": {}, "bytes": sizes, "sparsity": 0.5}
    for format, saves in (("dense", False), ("gptq", False), ("sparse", True), ("coded", True)):
        rows = dict(outcome_rows(manifest | {"format": format}))
        assert ("pruning" in rows) != saves, format
    assert "pruning" not in dict(outcome_rows(manifest | {"sparsity": 0.0, "format": "dense"}))


def test_what_made_a_model_smaller_is_a_row():
    sizes = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    assert smaller_text({"stage": "depth:1", "sizes": sizes, "removed": [2, 1]}) == (
        "num_hidden_layers 3: without 2, 1"
    )
    assert smaller_text({"stage": "width:0.2", "sizes": {"intermediate_size": 608}}) == (
        "intermediate_size 608"
    )
