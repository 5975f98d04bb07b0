"""What an engine was seen to load decides what `--for` takes, and what it refuses."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from optimum_order import JointCompressor, formats
from optimum_order.errors import FormatError
from optimum_order.formats import engines
from optimum_order.formats.engines import FUSED, OK, READ, SEVERAL, SEVERAL_GROUPS, Case
from optimum_order.order import Order

ROOT = Path(__file__).parents[2]
QKV = ["q_proj", "k_proj", "v_proj"]


def entry(verdicts, **more):
    """An engine of the data in which these cases were tried."""
    results = [case.as_dict() | {"verdict": verdict} for case, verdict in verdicts.items()]
    return {"versions": {"x": "1.2"}, "processor": "a CPU", "results": results} | more


FOUR = {
    Case(format, "", 4, size): OK for format in ("compressed-tensors", "gptq") for size in (-1, 16)
}
ANY = {Case("compressed-tensors", "", bits, size): OK for bits in range(2, 9) for size in (-1, 16)}
SPECIAL = {Case("compressed-tensors", name): OK for name in (SEVERAL, SEVERAL_GROUPS, FUSED)}
REFUSED = {
    Case("compressed-tensors", "", 3, 16): "refuses: no kernel",
    Case("compressed-tensors", FUSED): "refuses: unlike",
}


@pytest.fixture
def known(monkeypatch):
    """`known(vllm=entry(...))`: data of these engines alone, with one that loads all widths."""

    def known(**entries):
        every = {Case("dense"): OK, **ANY, **SPECIAL}
        data = {"architecture": "LlamaForCausalLM", "engines": {"any": entry(every), **entries}}
        monkeypatch.setattr(engines, "content", lambda: data)
        formats._say.cache_clear()

    return known


@pytest.fixture
def vllm(known):
    """An engine that loads 4 bits, and fuses."""
    fused = {"LlamaForCausalLM": [QKV], "OPTForCausalLM": [QKV]}
    known(vllm=entry({Case("dense"): OK, **FOUR, **REFUSED}, fused=fused))


# The data


def test_the_data_is_of_names_that_formats_and_engines_have():
    data = engines.content()
    assert set(data["engines"]) == {"transformers", "peft", "vllm", "llama.cpp"}
    for name, tried in data["engines"].items():
        engine = engines.engine(name)
        assert engine.version and engine.place and tried["date"]
        assert len(engine.verdicts) == len(tried["results"]) > 50
        # coded is for transformers after 'import optimum_order' alone, where its own tests load it
        tried_formats = {case.format for case in engine.verdicts}
        own = {"gguf"}
        if name != "llama.cpp":
            own = set(formats.available()) - {"coded", "gguf"}
            assert engine.verdicts[Case("dense")] == OK
        assert tried_formats == own
        for verdict in engine.verdicts.values():
            assert verdict == OK or verdict.partition(": ")[2]
    assert engines.engine("vllm").fused["LlamaForCausalLM"] == [QKV, ["gate_proj", "up_proj"]]


def test_what_the_data_says_of_the_engines():
    every = {f"{bits} bits symmetric" for bits in range(2, 9)}
    for scales in ("token", "tensor"):
        every |= {f"{bits} bits symmetric, inputs int8 per {scales}" for bits in (4, 8)}
    for name in ("transformers", "peft"):
        assert set(engines.engine(name).loaded_widths("compressed-tensors")) == every
    widths = engines.engine("vllm").loaded_widths()
    assert widths == {
        "4 bits symmetric": ["compressed-tensors", "gptq"],
        "4 bits symmetric, inputs int8 per token": ["compressed-tensors"],
        "8 bits symmetric, inputs int8 per token": ["compressed-tensors"],
        "8 bits symmetric, inputs int8 per tensor": ["compressed-tensors"],
    }


def test_the_package_ships_the_data_and_the_page_shows_it():
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    module = benchmark()
    assert module.table(engines.content()) in text


def test_inputs_that_are_rounded_make_another_case(make_model, compressed, vllm):
    eight = "rtn(bits=8, group_size=-1)"
    for order, case in [
        (eight, "8 bits symmetric, whole rows"),
        (f"{eight} > activations:8", "8 bits symmetric, inputs int8 per token, whole rows"),
        ("rtn:fp8 > activations:fp8", "fp8, inputs fp8 per token"),
        ("rtn:fp8", "fp8"),
    ]:
        contents = compressed(make_model("llama"), order)
        codec = formats.choose(contents, unproven=True)
        (own,) = engines.cases_of(codec, contents.layers)
        assert str(own) == f"compressed-tensors, {case}"
        assert engines.case_of(own.as_dict()) == own
        with pytest.raises(FormatError, match=f"'compressed-tensors, {case}'"):
            formats.choose(contents, engine="vllm")


# The choice


def test_auto_takes_a_format_that_the_engine_loads(make_model, compressed, vllm):
    assert formats.choose(compressed(make_model("llama"), "rtn:4")).name == "compressed-tensors"
    contents = compressed(make_model("llama"), "rtn(bits=4, group_size=16)")
    assert formats.choose(contents, engine="vllm").name == "compressed-tensors"
    pruned = compressed(make_model("llama"), "magnitude:0.5")
    assert formats.choose(pruned, engine="vllm").name == "dense"


def test_auto_takes_a_format_beside_the_stock_ones(known, tmp_path):
    known(vllm=entry({Case("gptq", "", 4, 16): OK}, fused={"LlamaForCausalLM": [QKV]}))
    compressor = JointCompressor.from_pretrained("tiny-llama")
    compressed = compressor.compress("rtn(bits=4, group_size=16)", progress=False)
    assert compressed.save_pretrained(tmp_path / "stock") == "compressed-tensors"
    assert compressed.save_pretrained(tmp_path / "vllm", engine="vllm") == "gptq"


def test_a_width_that_it_does_not_load_is_one_line_that_says_what_would(
    make_model, compressed, vllm
):
    contents = compressed(make_model("llama"), "rtn(bits=3, group_size=16)")
    with pytest.raises(FormatError) as caught:
        formats.choose(contents, engine="vllm")
    assert str(caught.value) == (
        "vllm 1.2 (a CPU) does not load 'compressed-tensors, 3 bits symmetric, groups of 16' "
        "(refuses: no kernel). It loads 4 bits symmetric as compressed-tensors or gptq. Choose "
        "--format dense, or --for any, or insist with --format compressed-tensors --unproven."
    )
    assert formats.choose(contents, engine="any").name == "compressed-tensors"
    assert formats.choose(contents, "dense", engine="vllm").name == "dense"
    insisted = formats.choose(contents, "compressed-tensors", engine="vllm", unproven=True)
    assert insisted.name == "compressed-tensors"


def test_what_was_not_tried_is_not_claimed(make_model, compressed, vllm):
    contents = compressed(make_model("llama"), "rtn(bits=4, group_size=8)")
    for format in ("auto", "compressed-tensors"):
        with pytest.raises(FormatError, match="groups of 8' was not tried in vllm"):
            formats.choose(contents, format, engine="vllm")
    several = compressed(make_model("llama"), ["rtn(bits=4, group_size=16)", "rtn:4"])
    with pytest.raises(FormatError, match="was not tried"):
        formats.choose(several, engine="vllm")
    bert = compressed(make_model("bert"), "rtn(bits=4, group_size=16)")
    with pytest.raises(FormatError, match="not known to have the architecture Bert"):
        formats.choose(bert, engine="vllm")


@pytest.mark.parametrize(
    ("special", "text"),
    [
        ({"v_proj": None}, "q_proj 4 bits symmetric, k_proj 4 bits symmetric, v_proj dense"),
        ({"k_proj": "rtn:4"}, "q_proj groups of 16, k_proj whole rows, v_proj groups of 16"),
    ],
)
def test_fused_layers_must_be_alike(make_model, compressed, known, special, text):
    alike = {Case("dense"): OK, **FOUR, Case("compressed-tensors", SEVERAL_GROUPS): OK}
    fused = {"LlamaForCausalLM": [QKV, ["q_proj", "not_there"]]}
    known(vllm=entry({**alike, Case("compressed-tensors", FUSED): "refuses: no"}, fused=fused))
    contents = compressed(make_model("llama"), "rtn(bits=4, group_size=16)", special=special)
    with pytest.raises(
        FormatError, match=f"fuses q_proj, k_proj, v_proj .*: in '.*{text}"
    ) as error:
        formats.choose(contents, engine="vllm")
    assert "--ignore '*.q_proj' '*.k_proj' '*.v_proj'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert formats.choose(contents, engine="any").name == "compressed-tensors"
    unfused = {"k_proj": None, "q_proj": None, "v_proj": None}
    dense = compressed(make_model("llama"), "rtn(bits=4, group_size=16)", special=unfused)
    assert formats.choose(dense, engine="vllm").name == "compressed-tensors"


def test_a_caution_is_one_line(make_model, compressed, known, caplog):
    caplog.set_level(logging.WARNING, "optimum_order")
    fused = {"LlamaForCausalLM": [], "OPTForCausalLM": []}
    case = Case("compressed-tensors", "", 4, -1)
    known(vllm=entry({case: f"{READ}no kernel here"}, fused=fused))
    formats.choose(compressed(make_model("llama"), "rtn:4"), engine="vllm")
    assert caplog.messages == [
        "Stored as 'compressed-tensors': vllm 1.2 (a CPU) reads this folder right, but no kernel "
        "here."
    ]
    known(vllm=entry({case: OK}, fused=fused))
    formats.choose(compressed(make_model("opt"), "rtn:4"), engine="vllm")
    assert caplog.messages[1].endswith("tried with LlamaForCausalLM, not with OPTForCausalLM.")
    formats.choose(compressed(make_model("llama"), "rtn:4"), engine="vllm")
    assert len(caplog.messages) == 2


def test_an_engine_that_nothing_is_known_of(make_model, compressed):
    contents = compressed(make_model("llama"), "rtn:4")
    with pytest.raises(FormatError, match=r"'vlm'\. Did you mean 'vllm'\?"):
        formats.choose(contents, engine="vlm")


# Before the work


@pytest.mark.parametrize(
    ("order", "loads"),
    [
        ("rtn(bits=8, group_size=-1) > activations:8", True),
        ("rtn(bits=8, group_size=-1) > activations(bits=8, per=tensor)", True),
        ("rtn(bits=4, group_size=128) > activations:8", True),
        ("rtn(bits=4, group_size=128) > activations(bits=8, per=tensor)", False),
        ("rtn:fp8 > activations:fp8", True),
        ("rtn:fp8 > activations(bits=fp8, per=tensor)", False),
        ("rtn:fp8", False),
        ("rtn(bits=8, group_size=-1)", False),
    ],
)
def test_vllm_gets_rounded_inputs_that_it_was_seen_to_run(order, loads):
    compressor = JointCompressor.from_pretrained("tiny-llama", calibration="builtin")
    if loads:
        assert compressor.check_format(order, "auto", engine="vllm") == "compressed-tensors"
        return
    with pytest.raises(FormatError, match="does not load"):
        compressor.check_format(order, "auto", engine="vllm")


@pytest.mark.parametrize(
    ("order", "options", "match"),
    [
        ("rtn:3", {}, "does not load 'compressed-tensors, 3 bits"),
        ("rtn(bits=4, symmetric=false)", {}, "zero points"),
        ("mixed_precision(bits=4)", {}, "does not load"),
        ("mixed_precision(bits=4, widths=[4, 8])", {}, "does not load 'compressed-tensors, 8 bits"),
        ("rtn(bits=4, targets=*.q_proj)", {}, r"fuses q_proj, k_proj, v_proj"),
        ("rtn:4", {"ignore": ["*.gate_proj"]}, "fuses gate_proj, up_proj"),
    ],
)
def test_vllm_is_refused_what_it_does_not_load_before_the_work(
    order, options, match, monkeypatch, tmp_path
):
    compressor = JointCompressor.from_pretrained("tiny-llama", **options)
    monkeypatch.setattr("optimum_order.compressor.run", None)  # nothing is run
    with pytest.raises(FormatError, match=match):
        compressor.compress(order, engine="vllm", progress=False)
    with pytest.raises(FormatError, match=match):
        compressor.check_format(order, "auto", engine="vllm")


@pytest.mark.parametrize(
    ("engine", "order", "expected"),
    [
        ("vllm", "ecsq:3", "ecsq(max_code=7, rate=3.0)"),
        ("vllm", "ecsq(rate=3, max_code=15)", "ecsq(max_code=15, rate=3.0)"),  # who says so insists
        ("transformers", "ecsq:3", "ecsq:3.0"),
        ("vllm", "wanda:0.5 > gptq:4", "wanda:0.5 > gptq:4"),
    ],
)
def test_codes_of_a_rate_are_as_narrow_as_an_engine_loads(engine, order, expected):
    from optimum_order.engine.recipe import with_options

    options = formats.stage_options("auto", engine)
    assert with_options(Order.parse(order), options) == with_options(Order.parse(expected), {})


def test_a_rate_for_vllm_is_stored_in_four_bits(tmp_path):
    """At 3.5 bits on tiny-llama some code is beyond 7 if nothing says that only 4 bits load."""
    ids = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor.from_pretrained("tiny-llama", calibration=ids, sequence_length=32)
    compressed = compressor.compress("ecsq:3.5", engine="vllm", progress=False)
    assert compressed.save_pretrained(tmp_path / "out", engine="vllm") == "compressed-tensors"
    assert {state.grid.bits for state in compressed.layers.values()} == {4}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4}


def test_check_format_names_what_auto_will_take():
    compressor = JointCompressor.from_pretrained("tiny-llama")
    assert compressor.check_format("gptq:4", "auto", engine="vllm") == "compressed-tensors"
    assert compressor.check_format("wanda:0.5", "auto", engine="vllm") == "dense"
    one = "mixed_precision(bits=4, widths=[4])"
    assert compressor.check_format(one, "auto", engine="vllm") == "compressed-tensors"
    several = "mixed_precision(bits=4, group_size=64)"
    assert compressor.check_format(several, "auto", engine="transformers") == "compressed-tensors"
    assert compressor.check_format("gptq:3", "auto") == "auto"


def test_the_result_is_saved_and_converted_for_an_engine(tmp_path):
    from optimum_order.artifact.convert import convert

    compressor = JointCompressor.from_pretrained("tiny-llama")
    compressed = compressor.compress("rtn:4", engine="vllm", progress=False)
    assert compressed.save_pretrained(tmp_path / "out", engine="vllm") == "compressed-tensors"
    facts = convert(tmp_path / "out", tmp_path / "peft", engine="peft")
    assert facts["format"] == "compressed-tensors"
    compressed = compressor.compress("rtn:3", progress=False)
    compressed.save_pretrained(tmp_path / "three")
    for save in (
        lambda: compressed.save_pretrained(tmp_path / "vllm", engine="vllm"),
        lambda: convert(tmp_path / "three", tmp_path / "vllm", engine="vllm"),
    ):
        with pytest.raises(FormatError, match="does not load"):
            save()
        assert not (tmp_path / "vllm").exists()


# The benchmark


def benchmark():
    """The module benchmarks/engines.py."""
    file = ROOT / "benchmarks" / "engines.py"
    spec = importlib.util.spec_from_file_location("engines_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_compares_with_what_was_measured():
    module = benchmark()
    assert module.verdict({"logprobs": [-1.0, -2.05]}, [-1.0, -2.0]) == {
        "difference": 0.025,
        "verdict": OK,
    }
    wrong = module.verdict({"logprobs": [-1.0, -2.5]}, [-1.0, -2.0])
    assert wrong["verdict"] == "wrong: log-probabilities differ by 0.25"
    assert module.verdict({"logprobs": [float("nan")]}, [-1.0])["verdict"].startswith("wrong")
    stand_in = {"logprobs": [-1.0], "reference_kernel": True}
    assert module.verdict(stand_in, [-1.0])["verdict"].startswith(READ)
    assert module.verdict({"error": "x"}, [])["verdict"] == "refuses: x"


def test_transformers_loads_what_the_benchmark_builds_and_notices_a_change(tmp_path):
    from safetensors.torch import load_file, save_file

    module = benchmark()
    sample = module.Sample(Case("compressed-tensors", "", 4, 16), "rtn(bits=4, group_size=16)")
    entries = module.try_engines(["transformers"], [sample], tmp_path / "right")
    (row,) = entries["transformers"]["results"]
    assert (row["verdict"], engines.case_of(row)) == (OK, sample.case)
    prompt, expected = module.build(sample, tmp_path / "wrong")
    file = tmp_path / "wrong" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 2
    save_file(tensors, file, {"format": "pt"})
    job = {"folder": str(tmp_path / "wrong"), "prompt": prompt, "import_first": None}
    job |= {"packages": (), "answer": str(tmp_path / "answer.json")}
    module.answers("transformers", [job], tmp_path)
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert module.verdict(answer, expected)["verdict"].startswith("wrong")


def test_cases_that_are_not_tried_again_stay():
    module = benchmark()
    cases = [Case("dense"), Case("gptq", "", 4, 16)]
    rows = [case.as_dict() | {"verdict": "old"} for case in cases]
    facts = {"versions": {"x": "1"}, "processor": "p", "unsaved": []}
    new = {**facts, "results": [cases[1].as_dict() | {"verdict": "new"}]}
    module.keep_others(new, {**facts, "results": rows})
    assert [row["verdict"] for row in new["results"]] == ["old", "new"]
    with pytest.raises(SystemExit, match="another version"):
        module.keep_others({**new, "versions": {"x": "2"}}, {**facts, "results": rows})


def test_the_data_is_written_as_it_is_read():
    module = benchmark()
    data = engines.content()
    assert json.loads(module.dumps(data)) == data
