import errno
import inspect
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from PIL import Image

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.cli.export import ExportCommand
from optimum_order.data.images import digits


@pytest.fixture
def arguments(tiny_llama_folder, text_file, tmp_path):
    """A small export to `out`; later arguments win over earlier ones."""
    small = ["--calibration-samples", 4, "--sequence-length", 64]
    order = ["--order", "wanda:0.5 > gptq:4"]
    return [
        "export",
        tiny_llama_folder,
        tmp_path / "out",
        *order,
        "--calibration",
        text_file,
        *small,
    ]


def test_auto_takes_the_order_that_is_planned_and_says_why(program, arguments, tmp_path):
    done = program(*arguments, "--order", "auto", "--stages", "magnitude:0.6, rtn:3", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert (
        result["order"]
        == result["plan"]["order"]
        in {"magnitude:0.6 > rtn:3", "rtn:3 > magnitude:0.6"}
    )
    assert manifest.load(tmp_path / "out")["plan"] == result["plan"]
    assert {each["order"] for each in result["plan"]["ranking"]} == {
        "magnitude:0.6 > rtn:3",
        "rtn:3 > magnitude:0.6",
    }


def test_json_is_one_object_with_these_keys(program, arguments, text_file, tmp_path):
    done = program(*arguments, "--evaluate", text_file, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert list(result) == [
        "output",
        "order",
        "format",
        "schedule",
        "seconds",
        "bytes",
        "sparsity",
        "metrics",
    ]
    assert result["output"] == str(tmp_path / "out")
    assert result["order"] == "wanda:0.5 > gptq:4"
    assert (result["format"], result["schedule"]) == ("compressed-tensors", "stage")
    assert result["sparsity"] == 0.5
    assert set(result["bytes"]) == {"before", "after", "per_weight_bits"}
    assert result["bytes"]["after"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")
    )
    assert 4 < result["bytes"]["per_weight_bits"] < 5
    perplexity = result["metrics"]["perplexity"]
    assert set(perplexity) == {"before", "after"} and perplexity["before"] != perplexity["after"]
    seconds = result["seconds"]
    assert list(seconds) == ["evaluate_before", "compress", "evaluate_after", "save", "total"]
    assert seconds["total"] >= seconds["compress"] > 0


def test_what_it_writes_is_what_the_api_would_have_written(
    program, arguments, tiny_llama_folder, text_file, tmp_path
):
    assert program(*arguments, "--seed", "3").code == 0
    compressor = JointCompressor.from_pretrained(
        tiny_llama_folder,
        calibration=str(text_file),
        calibration_samples=4,
        sequence_length=64,
        seed=3,
    )
    expected = compressor.compress("wanda:0.5 > gptq:4", progress=False).model
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_every_option_reaches_the_run(program, arguments, tmp_path):
    options = ["--format", "dense", "--schedule", "block", "--dtype", "bfloat16", "--device", "cpu"]
    assert (
        program(
            *arguments, *options, "--targets", "*_proj", "--ignore", "*.o_proj", "re:.*1.*"
        ).code
        == 0
    )
    stated = manifest.load(tmp_path / "out")
    assert (stated["format"], stated["schedule"]) == ("dense", "block")
    assert set(stated["layers"]) == {
        f"model.layers.0.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_people_see_the_result(program, arguments, text_file, tmp_path):
    done = program(*arguments, "--evaluate", text_file)
    assert done.code == 0
    for text in (
        "wanda:0.5 → gptq:4",
        "perplexity",
        "50.0%",
        "compressed-tensors",
        str(tmp_path / "out"),
    ):
        assert text in done.out


@pytest.mark.parametrize("model", ["tiny-vit", "tiny-resnet"])
def test_an_image_classifier(program, model, tmp_path):
    images = tmp_path / "images"
    for number, (pixels, label) in enumerate(
        zip(*(part[:40] for part in digits("evaluation")), strict=True)
    ):
        (images / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(images / str(label) / f"{number}.png")
    done = program(
        "export", model, tmp_path / "out", "--order", "wanda:0.3 > gptq:4", "--calibration-samples", 16, "--json",
        "--evaluate", images,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["format"] == ("compressed-tensors" if model == "tiny-vit" else "dense")
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["before"] > 0.9 and accuracy["after"] > 0.5
    assert program("verify", tmp_path / "out").code == 0
    assert "accuracy" in program("inspect", tmp_path / "out").out


def test_a_metric_by_name(program, arguments, text_file):
    done = program(*arguments, "--evaluate", text_file, "--metric", "fidelity", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)["metrics"]
    assert (
        list(metrics) == ["fidelity"]
        and metrics["fidelity"]["before"] == 0 < metrics["fidelity"]["after"]
    )


def test_a_folder_that_is_not_empty_is_replaced_only_if_told(program, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("precious")
    done = program(*arguments)
    assert done.code == 2 and "--overwrite" in done.err
    assert (tmp_path / "out" / "precious.txt").read_text() == "precious"
    assert program(*arguments, "--overwrite").code == 0
    assert not (tmp_path / "out" / "precious.txt").exists()


BAD = {
    "an unknown method": (["--order", "wandaa:0.5"], "Did you mean 'wanda'?"),
    "an unknown option": (["--order", "gptq(bits=4, grup_size=32)"], "Did you mean 'group_size'?"),
    "a value that is not allowed": (["--order", "gptq:9"], "must be an integer in 2..8, got 9"),
    "all weights removed": (["--order", "wanda:1"], "must be a number in [0, 1), got 1"),
    "no stage": (["--order", ""], "at least one stage"),
    "an order that cannot be read": (["--order", "wanda:0.5 >"], "the name of a method"),
    "auto without stages": (["--order", "auto"], "'--stages' need each other"),
    "stages without auto": (["--stages", "wanda:0.5, gptq:4"], "'--stages' need each other"),
    "auto without running": (
        ["--order", "auto", "--stages", "wanda:0.5, rtn:4", "--dry-run"],
        "plan first",
    ),
    "one stage to order": (["--order", "auto", "--stages", "wanda:0.5"], "2 to 5 stages, got 1"),
    "an unknown stage to order": (
        ["--order", "auto", "--stages", "wandaa:0.5, rtn:4"],
        "Did you mean 'wanda'?",
    ),
    "a group size that does not divide": (
        ["--order", "rtn(bits=4, group_size=48)"],
        "8, 16, 32, 64",
    ),
    "an unknown format": (["--format", "compresed-tensors"], "Did you mean 'compressed-tensors'?"),
    "a format that cannot hold it": (
        ["--order", "rtn:4", "--format", "bitsandbytes"],
        "compressed-tensors",
    ),
    "an unknown metric": (["--metric", "acuracy"], "Did you mean 'accuracy'?"),
    "a metric of another kind of model": (
        ["--metric", "accuracy", "--evaluate", "builtin"],
        "for image classifiers",
    ),
    "an unknown schedule": (["--schedule", "blok"], "Did you mean 'block'?"),
    "an unknown dtype": (["--dtype", "float8"], "bfloat16"),
    "an unknown device": (["--device", "toaster"], "'toaster'"),
    "a pattern that matches nothing": (["--ignore", "*.q_prj"], "*.q_prj"),
    "a calibration file that is missing": (["--calibration", "./missing.txt"], "missing.txt"),
    "an evaluation file that is missing": (["--evaluate", "./missing.txt"], "missing.txt"),
    "no samples": (["--calibration-samples", "0"], "positive integer"),
}


@pytest.mark.parametrize(("extra", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(program, arguments, tmp_path, extra, says):
    done = program(*arguments, *extra)
    assert done.code == 2 and done.out == ""
    *progress, line = done.err.splitlines()
    assert line.startswith("optimum-order: error: ") and says in line
    assert not any("Traceback" in each for each in progress)
    # a format is chosen for what was compressed, and that is not thrown away
    assert [file.name for file in tmp_path.iterdir()] == (
        ["out.work"] if "bitsandbytes" in extra else []
    )


def test_a_model_that_is_missing(program, tmp_path):
    done = program("export", tmp_path / "missing", tmp_path / "out", "--order", "rtn:4")
    assert done.code == 2 and "missing" in done.err and done.err.count("\n") == 1


def test_a_method_that_needs_data_says_so(program, tiny_llama_folder, tmp_path):
    done = program("export", tiny_llama_folder, tmp_path / "out", "--order", "rtn:4 > wanda:0.5")
    assert done.code == 2 and "calibration" in done.err and "magnitude" in done.err
    assert (
        program(
            "export", tiny_llama_folder, tmp_path / "out", "--order", "rtn:4 > magnitude:0.5"
        ).code
        == 0
    )


def test_the_order_is_read_before_the_model(program, tmp_path):
    done = program("export", tmp_path / "missing", tmp_path / "out", "--order", "wandaa")
    assert "Did you mean 'wanda'?" in done.err


def test_the_defaults_are_those_of_the_api(program, monkeypatch):
    seen = []
    monkeypatch.setattr(ExportCommand, "run", lambda self: seen.append(vars(self.args)))
    program("export", "model", "out", "--order", "rtn:4")
    (given,) = seen
    parameters = inspect.signature(JointCompressor.from_pretrained).parameters
    for name in set(parameters) & set(given) - {"model"}:
        assert given[name] == parameters[name].default, name
    assert (
        given["schedule"]
        == inspect.signature(JointCompressor.compress).parameters["schedule"].default
    )


@pytest.fixture
def start(tiny_llama_folder, text_file, tmp_path):
    """Start an export of two stages to `tmp_path / "out"` in a process of its own."""
    command = [
        "export",
        tiny_llama_folder,
        tmp_path / "out",
        "--order",
        "sparsegpt:0.5 > gptq:4",
        "--json",
    ]
    command += ["--calibration", text_file, "--calibration-samples", 64, "--sequence-length", 128]
    command = [str(argument) for argument in command]

    def start(*more):
        program = [
            sys.executable,
            "-c",
            "from optimum_order.cli import main; main()",
            *command,
            *more,
        ]
        return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start.command = command
    return start


def progress(folder):
    """How many times a run of a model of two blocks has finished a block."""
    passes = [int(file.name[:3]) for file in folder.glob("*.state.safetensors")]
    return 2 * max(passes) + passes.count(max(passes)) if passes else 0


def until(child, condition):
    while not condition():
        assert child.poll() is None, f"it ended before: {child.communicate()}"
        time.sleep(0.001)


def files(folder):
    return {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


@pytest.mark.slow
def test_a_run_that_was_killed_three_times_ends_byte_for_byte_as_one_that_was_not(
    program, start, tmp_path
):
    output, work = tmp_path / "out", tmp_path / "out.work"
    assert program(*start.command).code == 0
    expected = files(output)
    shutil.rmtree(output)
    assert list(tmp_path.iterdir()) == [], "the work dir goes once the output is written"
    for number in range(3):
        before, child = progress(work), start(*(["--resume"] if number else []))
        until(child, lambda before=before: progress(work) > before)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL and not output.exists()
    assert program(*start.command).code == 2, "without --resume"
    assert program(*start.command, "--resume", "--seed", 1).code == 2
    assert program(*start.command, "--resume").code == 0
    assert files(output) == expected
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_an_interrupted_run_says_how_to_go_on(program, start, tmp_path, sent, code, word):
    child = start()
    until(child, lambda: progress(tmp_path / "out.work"))
    child.send_signal(sent)
    out, err = child.communicate(timeout=120)
    assert child.returncode == code and out == "" and "Traceback" not in err
    *_, advice, last = err.splitlines()
    assert last == f"optimum-order: {word}"
    assert [file.name for file in tmp_path.iterdir()] == ["out.work"]
    said, command = advice.split("; to go on: ")
    assert said == f"optimum-order: what was finished is kept in '{tmp_path / 'out.work'}'"
    name, *arguments = shlex.split(command)
    assert name == "optimum-order" and arguments == [*start.command, "--resume"]
    assert program(*arguments).code == 0


def test_what_has_finished_nothing_leaves_nothing(program, arguments, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_order.backends.base.Backend.apply", interrupt)
    done = program(*arguments)
    assert (
        done.code == 130
        and done.err.endswith("optimum-order: interrupted\n")
        and "to go on" not in done.err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_work_dir_may_be_elsewhere_and_of_another_run(program, arguments, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("optimum_order.formats.safetensors.write", full)
    done = program(*arguments, "--work-dir", tmp_path / "elsewhere")
    assert done.code == 2 and "No space left on device" in done.err.splitlines()[-1]
    assert (
        f"kept in '{tmp_path / 'elsewhere'}'; to go on: optimum-order export"
        in done.err.splitlines()[-2]
    )
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]

    done = program(*arguments, "--work-dir", tmp_path / "elsewhere")
    assert done.code == 2 and "not finished" in done.err and "to go on:" not in done.err
    done = program(
        *arguments, "--work-dir", tmp_path / "elsewhere", "--resume", "--schedule", "block"
    )
    assert (
        done.code == 2
        and "whose schedule was 'stage', and now it is 'block'" in done.err.splitlines()[-1]
    )
    assert "to go on:" not in done.err
    monkeypatch.setattr(
        "optimum_order.engine.run._Passes._apply", lambda *_: pytest.fail("it is finished")
    )
    assert (
        program(
            *arguments, "--work-dir", tmp_path / "elsewhere", "--resume", "--format", "dense"
        ).code
        == 0
    )
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert manifest.load(tmp_path / "out")["format"] == "dense"


def test_a_run_whose_order_was_planned_is_not_planned_again(
    program, arguments, monkeypatch, tmp_path
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    auto = [*arguments, "--order", "auto", "--stages"]
    monkeypatch.setattr("optimum_order.formats.safetensors.write", full)
    assert program(*auto, "magnitude:0.6, rtn:3").code == 2
    monkeypatch.undo()
    planned = json.loads((tmp_path / "out.work" / "fingerprint.json").read_text())["plan"]
    done = program(*auto, "magnitude:0.6, rtn:4", "--resume")
    assert done.code == 2 and "whose order was" in done.err.splitlines()[-1], (
        "those are other stages"
    )
    monkeypatch.setattr(
        "optimum_order.compressor.JointCompressor.plan",
        lambda *_, **__: pytest.fail("it is planned"),
    )
    assert program(*auto, "rtn:3, magnitude(sparsity=0.6)", "--resume").code == 0
    assert manifest.load(tmp_path / "out")["plan"] == planned


def test_a_run_that_was_stopped_when_all_was_written_ends(
    program, arguments, monkeypatch, tmp_path
):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_order.engine.workdir.remove", interrupt)
    assert program(*arguments).code == 130
    monkeypatch.undo()
    expected = files(tmp_path / "out")
    assert expected and (tmp_path / "out.work").exists()
    done = program(*arguments, "--order", "rtn:4", "--resume")
    assert done.code == 2 and "whose order was" in done.err
    assert program(*arguments, "--resume").code == 0
    assert files(tmp_path / "out") == expected and not (tmp_path / "out.work").exists()
    program(*arguments, "--overwrite", "--format", "dense")
    monkeypatch.setattr("optimum_order.engine.workdir.remove", interrupt)
    assert program(*arguments, "--seed", 5, "--overwrite").code == 130
    monkeypatch.undo()
    (tmp_path / "out" / "optimum_order.json").unlink()
    done = program(*arguments, "--seed", 5, "--resume")
    assert done.code == 2 and "is not empty" in done.err, "what is there is something else"


def test_nothing_to_resume_is_said_at_once(program, arguments, tmp_path):
    done = program(*arguments, "--resume")
    assert (
        done.code == 2
        and f"no work dir '{tmp_path / 'out.work'}'" in done.err
        and done.err.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


def test_it_is_pushed_once_it_is_saved(hub, tiny_llama_folder, tmp_path):
    command = [
        "export",
        str(tiny_llama_folder),
        str(tmp_path / "out"),
        "--order",
        "rtn:4",
        "--json",
    ]
    done = hub.call("program", *command, "--push-to-hub", "me/model", "--private")
    assert done["code"] == 0
    assert json.loads(done["out"])["url"].startswith(f"{hub.server.url}/me/model/commit/")
    assert hub.server.repositories["me/model"].private
    there = hub.server.files("me/model")
    assert all(there[file.name] == file.read_bytes() for file in (tmp_path / "out").iterdir())

    command[4] = "rtn:3"
    done = hub.call("program", *command, "--overwrite", "--push-to-hub", "me/model", "--create-pr")
    assert json.loads(done["out"])["url"] == f"{hub.server.url}/me/model/discussions/1"


def test_what_cannot_be_pushed_is_said_before_anything_is_computed(
    hub, tiny_llama_folder, tmp_path
):
    command = [
        "export",
        str(tiny_llama_folder),
        str(tmp_path / "out"),
        "--order",
        "rtn:4",
        "--push-to-hub",
    ]
    hub.server.answer_with = 401
    assert (
        hub.call("program", *command, "me/model")["code"] == 2 and not (tmp_path / "out").exists()
    )
    assert hub.server.requests == ["GET /api/whoami-v2"]


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_go_on(
    hub, tiny_llama_folder, tmp_path
):
    hub.server.drop_from = 1
    done = hub.call(
        *("program", "export", str(tiny_llama_folder), str(tmp_path / "out"), "--order", "rtn:4"),
        *("--push-to-hub", "me/model"),
    )
    assert done == {"code": 2, "out": ""}
    assert f"'optimum-order push {tmp_path / 'out'} me/model' tries again" in hub.log.read_text()
    hub.server.recover()
    assert hub.call("program", "push", str(tmp_path / "out"), "me/model")["code"] == 0


def test_without_an_order_a_saved_model_is_converted(program, saved, tmp_path):
    done = program("export", saved, tmp_path / "sparse", "--format", "sparse", "--json")
    assert done.code == 0, done.err
    result, stated = json.loads(done.out), manifest.load(saved)
    assert list(result) == [
        "output",
        "order",
        "format",
        "schedule",
        "seconds",
        "bytes",
        "sparsity",
        "metrics",
    ]
    assert (result["format"], result["order"], list(result["seconds"])) == (
        "sparse",
        stated["order"],
        ["total"],
    )
    assert result["bytes"]["per_weight_bits"] < stated["bytes"]["per_weight_bits"]
    assert (
        result["metrics"]["perplexity"]["after"]
        == stated["metrics"]["perplexity"]["after"]["value"]
    )
    assert program("verify", tmp_path / "sparse").code == 0
    done = program("export", tmp_path / "sparse", tmp_path / "back")
    assert (
        done.code == 0
        and "compressed-tensors" in done.out
        and "loads it from there by itself" in done.out
    )
    done = program("export", saved, tmp_path / "sparse", "--format", "sparse", "--overwrite")
    assert "loads it from there after 'import optimum_order'" in done.out


CONVERTING = {
    "an unknown format": (["--format", "spares"], "Did you mean 'sparse'?"),
    "a format that cannot hold it": (
        ["--format", "bitsandbytes"],
        "is not a grid of the bitsandbytes library",
    ),
    "an option for compressing": (
        ["--ignore", "*.q_proj"],
        "'--ignore' means nothing without '--order'",
    ),
    "something to measure on": (
        ["--evaluate", "builtin"],
        "'--evaluate' means nothing without '--order'",
    ),
    "a number of samples": (
        ["--calibration-samples", "5"],
        "'--calibration-samples' means nothing without",
    ),
}


@pytest.mark.parametrize(("extra", "says"), CONVERTING.values(), ids=CONVERTING)
def test_what_cannot_be_converted_is_one_line_and_writes_nothing(
    program, saved, tmp_path, extra, says
):
    done = program("export", saved, tmp_path / "out", *extra)
    assert done.code == 2 and done.out == "" and says in done.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["tiny-llama", "tiny_llama_folder"])
def test_a_model_that_is_not_compressed_needs_an_order(program, tiny_llama_folder, model, tmp_path):
    model = tiny_llama_folder if model == "tiny_llama_folder" else model
    done = program("export", model, tmp_path / "out")
    assert done.code == 2 and f"'--order' must say what is to be done to '{model}'" in done.err
    assert program("export", tmp_path / "missing", tmp_path / "out").code == 2


def test_a_dry_run_writes_nothing(program, arguments, tmp_path):
    done = program(*arguments, "--dry-run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert list(found) == [
        "order",
        "schedule",
        "format",
        "before",
        "loading",
        "steps",
        "total",
        "rates",
    ]
    assert [step["stages"] for step in found["steps"]] == ["wanda:0.5", "gptq:4"]
    assert not (tmp_path / "out").exists()
    real = json.loads(program(*arguments, "--json").out)
    assert (found["total"]["bytes"], found["format"]) == (real["bytes"]["after"], real["format"])


def test_people_see_what_it_would_take(program, arguments):
    done = program(*arguments, "--dry-run")
    assert done.code == 0
    for text in (
        "wanda:0.5",
        "gptq:4",
        "peak memory",
        "in all",
        "compressed-tensors",
        "Nothing was compressed",
    ):
        assert text in done.out


def test_a_dry_run_finds_errors(program, arguments, saved, tmp_path):
    assert (
        "does not divide"
        in program(*arguments, "--order", "gptq(bits=4, group_size=48)", "--dry-run").err
    )
    assert (
        "means nothing without '--order'"
        in program("export", saved, tmp_path / "out", "--dry-run").err
    )
