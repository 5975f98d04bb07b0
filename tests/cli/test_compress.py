"""`optimum-order compress`: results, resuming, errors before computation, and conversion."""

import contextlib
import errno
import inspect
import json
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from PIL import Image
from torch.distributed import TCPStore

from optimum_order import JointCompressor
from optimum_order import files as our_files
from optimum_order.artifact import manifest
from optimum_order.backends.learning import Student
from optimum_order.cli.compress import CompressCommand
from optimum_order.data.builtin import digits
from optimum_order.errors import FormatError
from optimum_order.evaluation.perplexity import Perplexity

KEYS = [
    "output",
    "order",
    "format",
    "schedule",
    "seconds",
    "bytes",
    "sparsity",
    "metrics",
    "coverage",
]


@pytest.fixture
def arguments(tiny_llama_folder, text_file, tmp_path):
    """A small run to `out`; later arguments win over earlier ones."""
    small = ["--calibration", text_file, "--calibration-samples", 4, "--sequence-length", 64]
    order = ["--order", "wanda:0.5 > gptq:4"]
    return ["compress", tiny_llama_folder, tmp_path / "out", *order, *small]


def files(folder):
    return {
        file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


def names(folder):
    return [file.name for file in folder.iterdir()]


# Results


def test_json_is_one_object_with_these_keys(program, arguments, text_file, tmp_path):
    done = program(*arguments, "--evaluate", text_file, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert list(result) == KEYS
    assert result["output"] == str(tmp_path / "out")
    assert result["order"] == "wanda:0.5 > gptq:4"
    assert (result["format"], result["schedule"]) == ("compressed-tensors", "stage")
    assert result["sparsity"] == 0.5
    assert set(result["bytes"]) == {"before", "after", "per_weight_bits"}
    weights = (tmp_path / "out").glob("*.safetensors")
    assert result["bytes"]["after"] == sum(file.stat().st_size for file in weights)
    assert 4 < result["bytes"]["per_weight_bits"] < 5
    perplexity = result["metrics"]["perplexity"]
    assert set(perplexity) == {"before", "after"} and perplexity["before"] != perplexity["after"]
    seconds = result["seconds"]
    assert list(seconds) == ["evaluate_before", "compress", "evaluate_after", "save", "total"]
    assert seconds["total"] >= seconds["compress"] > 0


def test_the_artifact_is_that_of_the_api(
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
    layers = ["--targets", "*_proj", "--ignore", "*.o_proj", "re:.*1.*"]
    assert program(*arguments, *options, *layers).code == 0
    facts = manifest.load(tmp_path / "out")
    assert (facts["format"], facts["schedule"]) == ("dense", "block")
    assert set(facts["layers"]) == {
        f"model.layers.0.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_defaults_are_those_of_the_api(program, monkeypatch):
    parsed = []
    monkeypatch.setattr(CompressCommand, "run", lambda self: parsed.append(vars(self.args)))
    program("compress", "model", "out", "--order", "rtn:4")
    (options,) = parsed
    parameters = inspect.signature(JointCompressor.from_pretrained).parameters
    for name in set(parameters) & set(options) - {"model"}:
        assert options[name] == parameters[name].default, name
    compress = inspect.signature(JointCompressor.compress).parameters
    assert options["schedule"] == compress["schedule"].default


def test_people_see_the_result(program, arguments, text_file, tmp_path):
    done = program(*arguments, "--evaluate", text_file)
    assert done.code == 0
    order = "wanda:0.5 → gptq:4"
    for text in (order, "perplexity", "50.0%", "compressed-tensors", str(tmp_path / "out")):
        assert text in done.out


def test_a_figure_is_measured_once_before_and_once_after(
    program, arguments, text_file, monkeypatch
):
    """Each figure takes one forward of every batch, and none is measured again for the manifest."""
    batches = []
    score = Perplexity.score

    def counted(self, model, batch):
        batches.append(len(batch["input_ids"]))
        return score(self, model, batch)

    monkeypatch.setattr(Perplexity, "score", counted)
    done = program(*arguments, "--evaluate", text_file, "--json")
    assert done.code == 0 and set(json.loads(done.out)["metrics"]) == {"perplexity"}
    half = len(batches) // 2
    windows = manifest.load(arguments[2])["metrics"]["perplexity"]["after"]["samples"]
    assert sum(batches[:half]) == windows and batches[:half] == batches[half:]


def test_a_model_is_measured_once_however_often_it_is_asked_for(
    tiny_llama_folder, text_file, monkeypatch
):
    measured = []
    measure = Perplexity.measure
    monkeypatch.setattr(
        Perplexity, "measure", lambda *a, **k: measured.append(1) or measure(*a, **k)
    )
    compressor = JointCompressor.from_pretrained(tiny_llama_folder, sequence_length=64)
    first = compressor.evaluate(str(text_file), progress=False)
    assert compressor.evaluate(str(text_file), progress=False) is first
    assert len(measured) == 1


def test_an_image_classifier(program, tmp_path):
    pixels, labels = digits("evaluation")
    for number in range(40):
        folder = tmp_path / "images" / str(labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    for model, format in (("tiny-vit", "compressed-tensors"), ("tiny-resnet", "dense")):
        options = ["--calibration-samples", 16, "--evaluate", tmp_path / "images", "--json"]
        order = ["--order", "wanda:0.3 > gptq:4"]
        done = program("compress", model, tmp_path / model, *order, *options)
        assert done.code == 0, done.err
        result = json.loads(done.out)
        assert result["format"] == format
        accuracy = result["metrics"]["accuracy"]
        assert accuracy["before"] > 0.9 and accuracy["after"] > 0.5
        assert program("verify", tmp_path / model).code == 0
        assert "accuracy" in program("inspect", tmp_path / model).out


def test_a_metric_by_name(program, arguments, text_file):
    done = program(*arguments, "--evaluate", text_file, "--metric", "fidelity", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)["metrics"]
    assert list(metrics) == ["fidelity"]
    assert metrics["fidelity"]["before"] == 0 < metrics["fidelity"]["after"]


def test_auto_takes_the_planned_order_and_says_why(program, arguments, tmp_path):
    done = program(*arguments, "--order", "auto", "--stages", "magnitude:0.6, rtn:3", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    plan = result["plan"]
    orders = {"magnitude:0.6 > rtn:3", "rtn:3 > magnitude:0.6"}
    assert result["order"] == plan["order"] in orders
    assert manifest.load(tmp_path / "out")["plan"] == plan
    assert {row["order"] for row in plan["ranking"]} == orders


def test_a_folder_that_is_not_empty_is_replaced_only_with_overwrite(program, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("precious")
    done = program(*arguments)
    assert done.code == 2 and "--overwrite" in done.err
    assert (tmp_path / "out" / "precious.txt").read_text() == "precious"
    done = program(*arguments, "--overwrite")
    assert done.code == 2 and "'precious.txt'" in done.err
    (tmp_path / "out" / "precious.txt").rename(tmp_path / "out" / "config.json")
    assert program(*arguments, "--overwrite").code == 0
    assert (tmp_path / "out" / "optimum_order.json").exists()


# Errors


def test_an_order_that_the_shell_cut_off_is_refused(arguments, tmp_path):
    words = ["compress", *map(str, arguments[1:3]), "--order", "wanda:0.5"]
    code = f"from optimum_order.cli import main; main({words!r})"
    for redirections in ("> gptq:4", "> gptq:4 > log.txt"):
        folder = tmp_path / redirections.replace(" ", "")
        folder.mkdir()
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirections}"
        done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and '--order "wanda:0.5 > gptq:4"' in done.stderr
    assert not (tmp_path / "out").exists()


AUTO = ["--order", "auto", "--stages"]
BAD = [
    (["--order", "wandaa:0.5"], "Did you mean 'wanda'?"),
    (["--order", "gptq(bits=4, grup_size=32)"], "Did you mean 'group_size'?"),
    (["--order", "gptq:9"], "or an integer in 2..8, got 9"),
    (["--order", "wanda:1"], "must be a number in [0, 1), got 1"),
    (["--order", ""], "at least one stage"),
    (["--order", "wanda:0.5 >"], "the name of a method"),
    (["--order", "auto"], "'--stages' need each other"),
    (["--stages", "wanda:0.5, gptq:4"], "'--stages' need each other"),
    ([*AUTO, "wanda:0.5, rtn:4", "--dry-run"], "plan first"),
    ([*AUTO, "wanda:0.5, rtn:4", "--low-memory"], "plan first"),
    ([*AUTO, "wanda:0.5"], "2 to 5 stages, got 1"),
    ([*AUTO, "wandaa:0.5, rtn:4"], "Did you mean 'wanda'?"),
    (["--low-memory", "--evaluate", "builtin"], "'--evaluate' needs the whole model in memory"),
    (["--order", "rtn(bits=4, group_size=48)"], "8, 16, 32, 64"),
    (["--format", "compresed-tensors"], "Did you mean 'compressed-tensors'?"),
    (["--metric", "acuracy"], "Did you mean 'accuracy'?"),
    (["--metric", "accuracy", "--evaluate", "builtin"], "for image classifiers"),
    (["--schedule", "blok"], "Did you mean 'block'?"),
    (["--dtype", "float8"], "bfloat16"),
    (["--device", "toaster"], "'toaster'"),
    (["--ignore", "*.q_prj"], "*.q_prj"),
    (["--calibration", "./missing.txt"], "missing.txt"),
    (["--evaluate", "./missing.txt"], "missing.txt"),
    (["--calibration-samples", "0"], "positive integer"),
    (["--order", "rtn:4", "--format", "bitsandbytes"], "compressed-tensors"),
]


def test_bad_input_is_one_line_and_writes_nothing(program, arguments, tmp_path):
    for options, message in BAD:
        assert names(tmp_path) == [], "the last bad input wrote nothing"
        done = program(*arguments, *options)
        assert done.code == 2 and done.out == "", options
        *progress, line = done.err.splitlines()
        assert line.startswith("optimum-order: error: ") and message in line
        assert not any("Traceback" in text for text in progress)
    assert names(tmp_path) == []


def test_a_format_that_only_the_values_rule_out_has_advice_that_works(
    program, arguments, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise FormatError("Its values are rounded.")

    command = [*arguments, "--order", "rtn:4", "--format", "compressed-tensors"]
    with monkeypatch.context() as patched:
        patched.setattr("optimum_order.compressed.CompressedModel.save_pretrained", refuse)
        *_, advice, line = program(*command).err.splitlines()
    assert line == "optimum-order: error: Its values are rounded."
    words = shlex.split(advice.partition("; to resume: ")[2])
    assert words[-2:] == ["--format", "auto"]
    assert program(*words[1:]).code == 0
    assert names(tmp_path) == ["out"]


def test_a_missing_model_is_one_line_after_the_order_was_read(program, tmp_path):
    done = program("compress", tmp_path / "missing", tmp_path / "out", "--order", "rtn:4")
    assert done.code == 2 and "missing" in done.err and done.err.count("\n") == 1
    done = program("compress", tmp_path / "missing", tmp_path / "out", "--order", "wandaa")
    assert "Did you mean 'wanda'?" in done.err


def test_a_method_that_needs_data_says_so(program, tiny_llama_folder, tmp_path):
    command = ["compress", tiny_llama_folder, tmp_path / "out", "--order"]
    done = program(*command, "rtn:4 > wanda:0.5")
    assert done.code == 2 and "calibration" in done.err and "magnitude" in done.err
    assert program(*command, "rtn:4 > magnitude:0.5").code == 0


# Runs that are cut off


@pytest.fixture
def command(arguments):
    """A run of two stages that takes long enough to be cut off."""
    order = ["--order", "sparsegpt:0.5 > gptq:4", "--json"]
    return [
        *map(str, arguments),
        *order,
        *["--calibration-samples", "64", "--sequence-length", "128"],
    ]


def progress(folder):
    """The number of blocks that a run of a model of two blocks has finished."""
    passes = [int(file.name[:3]) for file in folder.glob("*.state.safetensors")]
    return 2 * max(passes) + passes.count(max(passes)) if passes else 0


@pytest.mark.slow
def test_a_run_that_was_killed_three_times_ends_byte_for_byte_as_one_that_was_not(
    program, start, command, tmp_path
):
    output = tmp_path / "out"
    work = tmp_path / "out.work"
    assert program(*command).code == 0
    expected = files(output)
    shutil.rmtree(output)
    assert names(tmp_path) == [], "the work dir goes once the output is written"
    for number in range(3):
        before = progress(work)
        child = start(*command, *(["--resume"] if number else []))
        child.wait_until(lambda before=before: progress(work) > before)
        assert child.end(signal.SIGKILL) == -signal.SIGKILL and not output.exists()
    assert program(*command).code == 2, "without --resume"
    assert program(*command, "--resume", "--seed", 1).code == 2
    assert program(*command, "--resume").code == 0
    assert files(output) == expected
    assert names(tmp_path) == ["out"]


def test_an_interrupted_run_says_how_to_resume(program, start, command, tmp_path):
    for number, code, word in [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
    ]:
        child = start(*command)
        child.wait_until(lambda: progress(tmp_path / "out.work"))
        assert child.end(number) == code and child.output("out") == ""
        err = child.output("err")
        assert "Traceback" not in err
        *_, advice, last = err.splitlines()
        assert last == f"optimum-order: {word}"
        assert names(tmp_path) == ["out.work"]
        place, resume = advice.split("; to resume: ")
        assert place == f"optimum-order: the finished blocks are in '{tmp_path / 'out.work'}'"
        name, *words = shlex.split(resume)
        assert name == "optimum-order" and words == [*command, "--resume"]
        assert program(*words).code == 0
        shutil.rmtree(tmp_path / "out")


APPLY = "optimum_order.backends.base.Backend.apply"
WRITE = "optimum_order.formats.safetensors.Safetensors.write"
REMOVE = "optimum_order.engine.workdir.remove"
FULL = OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def failing(target, error):
    """Let a function of the package raise an error."""

    def fail(*_, **__):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, fail)
        yield


def test_a_run_that_has_finished_nothing_leaves_nothing(program, arguments, tmp_path):
    with failing(APPLY, KeyboardInterrupt()):
        done = program(*arguments)
    assert done.code == 130 and done.err.endswith("optimum-order: interrupted\n")
    assert "to resume" not in done.err
    assert names(tmp_path) == []


@pytest.mark.parametrize("stage", ["lora:3", "distill:3"])
def test_a_stage_that_learns_goes_on_where_it_was_interrupted(
    program, arguments, tmp_path, monkeypatch, stage
):
    monkeypatch.setattr("optimum_order.engine.workdir.SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr("optimum_order.engine.workdir._TIMES_WRITING", 0)
    samples = ["--calibration-samples", 8]
    command = [*arguments, *samples, "--order", f"rtn:3 > {stage}"]
    steps = []
    step = Student.step

    def counted(self, batch, optimizer):
        if len(steps) == 2:
            steps.append("interrupted")
            raise KeyboardInterrupt
        steps.append("taken")
        return step(self, batch, optimizer)

    monkeypatch.setattr(Student, "step", counted)
    done = program(*command)
    assert done.code == 130 and "to resume" in done.err
    assert names(tmp_path) == ["out.work"]
    monkeypatch.setattr("optimum_order.engine.workdir.SECONDS_BETWEEN", 60.0)
    assert program(*command, "--resume").code == 0
    assert names(tmp_path) == ["out"]
    assert steps.count("taken") == 3


def test_a_work_dir_may_be_elsewhere_and_of_another_run(program, arguments, tmp_path):
    command = [*arguments, "--work-dir", tmp_path / "elsewhere"]
    with failing(WRITE, FULL):
        done = program(*command)
    *_, advice, line = done.err.splitlines()
    assert done.code == 2 and "No space left on device" in line
    assert f"in '{tmp_path / 'elsewhere'}'; to resume: optimum-order compress" in advice
    assert names(tmp_path) == ["elsewhere"]

    done = program(*command)
    assert done.code == 2 and "not finished" in done.err and "to resume:" not in done.err
    done = program(*command, "--resume", "--schedule", "block")
    difference = "whose schedule was 'stage', and now is 'block'"
    assert done.code == 2 and difference in done.err.splitlines()[-1]
    assert "to resume:" not in done.err
    with failing(APPLY, AssertionError("everything is finished")):
        assert program(*command, "--resume", "--format", "dense").code == 0
    assert names(tmp_path) == ["out"]
    assert manifest.load(tmp_path / "out")["format"] == "dense"


def test_a_run_whose_order_was_planned_is_not_planned_again(program, arguments, tmp_path):
    auto = [*arguments, "--order", "auto", "--stages"]
    with failing(WRITE, FULL):
        assert program(*auto, "magnitude:0.6, rtn:3").code == 2
    planned = json.loads((tmp_path / "out.work" / "fingerprint.json").read_text())["plan"]
    done = program(*auto, "magnitude:0.6, rtn:4", "--resume")
    assert done.code == 2 and "whose order was" in done.err.splitlines()[-1], "other stages"
    plan = "optimum_order.compressor.JointCompressor.plan"
    with failing(plan, AssertionError("the order is planned already")):
        assert program(*auto, "rtn:3, magnitude(sparsity=0.6)", "--resume").code == 0
    assert manifest.load(tmp_path / "out")["plan"] == planned


def test_a_run_that_was_cut_off_when_all_was_written_ends(program, arguments, tmp_path):
    with failing(REMOVE, KeyboardInterrupt()):
        assert program(*arguments).code == 130
    expected = files(tmp_path / "out")
    assert expected and (tmp_path / "out.work").exists()
    done = program(*arguments, "--order", "rtn:4", "--resume")
    assert done.code == 2 and "whose order was" in done.err
    assert program(*arguments, "--resume").code == 0
    assert files(tmp_path / "out") == expected and not (tmp_path / "out.work").exists()
    program(*arguments, "--overwrite", "--format", "dense")
    with failing(REMOVE, KeyboardInterrupt()):
        assert program(*arguments, "--seed", 5, "--overwrite").code == 130
    (tmp_path / "out" / "optimum_order.json").unlink()
    done = program(*arguments, "--seed", 5, "--resume")
    assert done.code == 2 and "is not empty" in done.err, "OUTPUT holds something else"


def test_nothing_to_resume_is_one_line(program, arguments, tmp_path):
    done = program(*arguments, "--resume")
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"no work dir '{tmp_path / 'out.work'}'" in done.err
    assert names(tmp_path) == []


def test_an_order_without_anything_to_resume_leaves_no_work_dir(program, tmp_path):
    done = program("compress", "tiny-llama", str(tmp_path / "out"), "--order", "depth(skip=[1])")
    assert done.code == 0 and names(tmp_path) == ["out"]


# The Hub


@pytest.fixture
def pushed(hub, tiny_llama_folder, tmp_path):
    """Run `compress` to `out` and push that: its exit code and stdout."""
    command = ["compress", str(tiny_llama_folder), str(tmp_path / "out"), "--json"]
    return lambda *options: hub.call("program", *command, "--order", *options)


@pytest.mark.slow
def test_a_model_is_pushed_once_it_is_saved(hub, pushed, tmp_path):
    done = pushed("rtn:4", "--push-to-hub", "me/model", "--private")
    assert done["code"] == 0
    assert json.loads(done["out"])["url"].startswith(f"{hub.server.url}/me/model/commit/")
    assert hub.server.repositories["me/model"].private
    uploaded = hub.server.files("me/model")
    saved = [file for file in (tmp_path / "out").iterdir() if file.name != "README.md"]
    assert all(uploaded[file.name] == file.read_bytes() for file in saved)
    assert b'model="me/model"' in uploaded["README.md"]
    done = pushed("rtn:3", "--overwrite", "--push-to-hub", "me/model", "--create-pr")
    assert json.loads(done["out"])["url"] == f"{hub.server.url}/me/model/discussions/1"


def test_a_hub_that_refuses_is_asked_before_anything_is_computed(hub, pushed, tmp_path):
    hub.server.answer_with = 401
    assert pushed("rtn:4", "--push-to-hub", "me/model")["code"] == 2
    assert not (tmp_path / "out").exists()
    assert hub.server.requests == ["GET /api/whoami-v2"]


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_push_again(hub, pushed, tmp_path):
    hub.server.drop_from = 1
    assert pushed("rtn:4", "--push-to-hub", "me/model") == {"code": 2, "out": ""}
    assert f"'optimum-order push {tmp_path / 'out'} me/model' tries again" in hub.log.read_text()
    hub.server.recover()
    assert hub.call("program", "push", str(tmp_path / "out"), "me/model")["code"] == 0


# For an engine


def test_for_an_engine_the_format_is_one_that_loads_there(program, tmp_path):
    command = ["compress", "tiny-llama", tmp_path / "out", "--for", "vllm", "--order"]
    done = program(*command, "rtn(bits=4, group_size=64)", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == "compressed-tensors"
    done = program(*command, "rtn(bits=4, group_size=64)", "--json")
    assert json.loads(done.out)["format"] == "compressed-tensors"
    done = program("compress", tmp_path / "out", tmp_path / "again", "--for", "peft", "--json")
    assert json.loads(done.out)["format"] == "compressed-tensors"


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--order", "rtn:3"], ["It loads 4 bits symmetric as", "or peft or transformers"]),
        (["--order", "rtn:4", "--ignore", "*.v_proj"], ["fuses q_proj, k_proj, v_proj"]),
        (["--order", "rtn(bits=4, group_size=16)", "--for", "llama.cpp"], ["use group_size=32"]),
        (["--order", "rtn:4", "--for", "vlm"], ["Did you mean 'vllm'?"]),
        (["--order", "rtn:3", "--dry-run"], ["does not load 'compressed-tensors, 3 bits"]),
    ],
)
def test_what_an_engine_does_not_load_is_one_line_before_the_work(
    program, tmp_path, options, messages
):
    done = program("compress", "tiny-llama", tmp_path / "out", "--for", "vllm", *options)
    assert done.code == 2 and done.out == ""
    assert all(message in done.err.splitlines()[-1] for message in messages), done.err
    assert names(tmp_path) == []


def test_an_unknown_engine_is_the_first_error(program, tmp_path):
    done = program("compress", tmp_path / "missing", tmp_path / "out", "--for", "vlm")
    assert done.code == 2 and "Did you mean 'vllm'?" in done.err


def test_an_engine_can_be_overruled(program, tmp_path):
    command = ["compress", "tiny-llama", tmp_path / "out", "--for", "vllm", "--order", "rtn:3"]
    done = program(*command, "--format", "compressed-tensors", "--unproven", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["format"] == "compressed-tensors"


# Without an order


def test_without_an_order_a_saved_model_is_converted(program, saved, tmp_path):
    command = ["compress", saved, tmp_path / "sparse", "--format", "sparse"]
    done = program(*command, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    facts = manifest.load(saved)
    assert list(result) == KEYS
    assert (result["format"], result["order"]) == ("sparse", facts["order"])
    assert list(result["seconds"]) == ["total"]
    assert result["bytes"]["per_weight_bits"] < facts["bytes"]["per_weight_bits"]
    perplexity = facts["metrics"]["perplexity"]["after"]["value"]
    assert result["metrics"]["perplexity"]["after"] == perplexity
    assert program("verify", tmp_path / "sparse").code == 0
    done = program("compress", tmp_path / "sparse", tmp_path / "back")
    assert done.code == 0 and "compressed-tensors" in done.out
    assert "loads it from there by itself" in done.out
    done = program(*command, "--overwrite")
    assert "loads it from there after 'import optimum_order'" in done.out


def test_a_conversion_that_is_refused_is_one_line_and_writes_nothing(program, saved, tmp_path):
    for options, message in [
        (["--format", "spares"], "Did you mean 'sparse'?"),
        (["--format", "bitsandbytes"], "is not a grid of the bitsandbytes library"),
        (["--ignore", "*.q_proj"], "'--ignore' means nothing without '--order'"),
        (["--evaluate", "builtin"], "'--evaluate' means nothing without '--order'"),
        (["--calibration-samples", "5"], "'--calibration-samples' means nothing without"),
        (["--dry-run"], "'--dry-run' means nothing without '--order'"),
    ]:
        done = program("compress", saved, tmp_path / "out", *options)
        assert done.code == 2 and done.out == "" and message in done.err.splitlines()[-1]
        assert names(tmp_path) == []


def test_a_model_that_is_not_compressed_needs_an_order(program, tiny_llama_folder, tmp_path):
    for model in ("tiny-llama", tiny_llama_folder):
        done = program("compress", model, tmp_path / "out")
        message = f"'--order' must say what is to be done to '{model}'"
        assert done.code == 2 and message in done.err
    assert program("compress", tmp_path / "missing", tmp_path / "out").code == 2


# Without running


def test_a_dry_run_writes_nothing_and_is_right_about_the_bytes(program, arguments, tmp_path):
    done = program(*arguments, "--dry-run", "--json")
    assert done.code == 0, done.err
    estimate = json.loads(done.out)
    keys = ["order", "schedule", "pause", "format", "before", "loading", "steps", "total", "rates"]
    assert list(estimate) == keys
    assert [step["stages"] for step in estimate["steps"]] == ["wanda:0.5", "gptq:4"]
    assert not (tmp_path / "out").exists()
    real = json.loads(program(*arguments, "--json").out)
    assert estimate["total"]["bytes"] == real["bytes"]["after"]
    assert estimate["format"] == real["format"]


def test_people_see_what_a_run_would_take(program, arguments):
    done = program(*arguments, "--dry-run")
    assert done.code == 0
    columns = ("wanda:0.5", "gptq:4", "peak memory", "in all", "compressed-tensors")
    for text in (*columns, "Nothing was compressed"):
        assert text in done.out


def test_a_dry_run_finds_errors(program, arguments):
    done = program(*arguments, "--order", "gptq(bits=4, group_size=48)", "--dry-run")
    assert "does not divide" in done.err


def test_a_disk_without_room_is_refused_before_the_work(program, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(
        our_files.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 9})
    )
    monkeypatch.setattr(JointCompressor, "result_bytes", lambda *_: 10**6)
    with failing(APPLY, AssertionError("too late")):
        done = program(*arguments)
    assert done.code == 2 and "9 bytes free, and the result takes 1 MB" in done.err
    assert names(tmp_path) == []


def test_the_bytes_of_a_result_are_known_before_the_work(tiny_llama_folder, tmp_path):
    compressor = JointCompressor.from_pretrained(tiny_llama_folder)
    predicted = compressor.result_bytes("magnitude:0.5 > rtn:4", "compressed-tensors")
    compressed = compressor.compress("magnitude:0.5 > rtn:4", progress=False)
    compressed.save_pretrained(tmp_path / "out", format="compressed-tensors")
    assert our_files.weight_bytes(tmp_path / "out") == predicted
    assert compressor.result_bytes("rtn:4", "coded") is None, "which depends on the values"


# Several processes


@pytest.fixture
def start_ranks(fork):
    """Start `optimum-order` with these arguments in several processes, as torchrun does."""
    stores = []  # they outlive the processes

    def start(size, *arguments):
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        children = []
        for rank in range(size):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": stores[-1].port}
            variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
            words = [str(argument) for argument in arguments]
            text = {name: str(value) for name, value in variables.items()}
            children.append(
                fork(
                    f"import os; os.environ.update({text!r})\n"
                    f"from optimum_order.cli import main; main({words!r})"
                )
            )
        return children

    return start


def ended(children):
    """Return the exit codes, and all lines of stderr that are no progress, once all have ended."""
    codes = [child.end() for child in children]
    lines = [line for child in children for line in child.output("err").splitlines()]
    return codes, [line for line in lines if "error:" in line or "Traceback" in line]


@pytest.mark.slow
def test_processes_share_a_run_and_the_first_writes_and_speaks(
    program, start_ranks, arguments, text_file, tmp_path
):
    alone = [*arguments, "--evaluate", text_file, "--pause", "block", "--json"]
    assert program(*alone).code == 0
    (tmp_path / "out").rename(tmp_path / "alone")
    for size, extra in ((3, ["--evaluate", text_file]), (2, ["--low-memory"])):
        children = start_ranks(size, *arguments, *extra, "--json")
        assert ended(children) == ([0] * size, [])
        result = json.loads(children[0].output("out"))
        assert list(result) == KEYS
        for child in children[1:]:
            assert child.output("out") == child.output("err") == ""
        shared, expected = (manifest.load(tmp_path / name) for name in ("out", "alone"))
        assert shared["pause"] == "block" and shared["base_model"] == expected["base_model"]
        assert shared["calibration"] == expected["calibration"] | {"processes": size}
        ours, others = (
            JointCompressor.from_pretrained(tmp_path / name).source.states
            for name in ("out", "alone")
        )
        assert ours.keys() == others.keys() and ours
        for name, state in ours.items():
            apart = (state.weight != others[name].weight).float().mean()
            assert apart < 0.002, (size, name, apart)
        assert program("verify", tmp_path / "out").code == 0
        assert sorted(names(tmp_path)) == ["alone", "out"]
        shutil.rmtree(tmp_path / "out")


def test_what_processes_cannot_share_is_one_line_and_writes_nothing(
    start_ranks, arguments, saved, tmp_path
):
    for words, reason in [
        ([*arguments, "--order", "gptq:9"], "or an integer in 2..8, got 9"),
        ([*arguments, *AUTO, "wanda:0.5, rtn:4"], "'--order auto' is for one process"),
        ([*arguments, "--dry-run"], "'--dry-run' is for one process"),
        (["compress", saved, tmp_path / "out"], "give '--order'"),
        (["inspect", saved], "'inspect' runs in one process, and 2 were started"),
    ]:
        codes, (line,) = ended(start_ranks(2, *words))
        assert codes == [2, 2] and reason in line, line
        assert names(tmp_path) == []


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_run_is_resumed_in_another_number(
    program, start_ranks, command, tmp_path
):
    work = tmp_path / "out.work"
    for victim, number in ((1, 1), (0, 3)):
        children = start_ranks(2, *command)
        children[0].wait_until(lambda: progress(work))
        assert children[victim].end(signal.SIGKILL) == -signal.SIGKILL
        codes, lines = ended(children)
        assert codes[1 - victim] == 2 and not (tmp_path / "out").exists()
        (line,) = lines
        assert "Another process of this run has ended" in line
        advice = f"the finished blocks are in '{work}'; to resume: optimum-order compress"
        assert (advice in children[0].output("err")) == (victim == 1)
        if number == 1:
            assert program(*command, "--resume").code == 0
        else:
            assert ended(start_ranks(number, *command, "--resume")) == ([0] * number, [])
        assert names(tmp_path) == ["out"]
        assert manifest.load(tmp_path / "out")["pause"] == "block"
        assert program("verify", tmp_path / "out").code == 0
        shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_torchrun_starts_it(arguments, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--rdzv-endpoint", "127.0.0.1:0", "--rdzv-backend", "c10d"]
    words = [*launcher, "-m", "optimum_order", *map(str, arguments), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["order"]
    assert manifest.load(tmp_path / "out")["calibration"]["processes"] == 2
    # the launcher prints its own report; the program one line
    done = subprocess.run([*words, "--order", "gptq:9"], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("optimum-order: error: ") == done.stderr.count("got 9") == 1
