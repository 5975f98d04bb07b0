"""What several test files share: a tiny model in a folder, and text it can read. No test needs a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # on tiny tensors one thread is faster; inherited by child processes

import contextlib
import importlib.util
import io
import json
import multiprocessing
import pydoc_data.topics
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def prose() -> str:
    """About 60 kB of English that every machine has."""
    return "\n\n".join(
        pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:16]
    )


@pytest.fixture(scope="session")
def text_file(prose, tmp_path_factory) -> Path:
    """`prose` as a .txt file."""
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(prose, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_llama_folder(prose, tmp_path_factory) -> Path:
    """A saved Llama of random weights (two blocks, 64 wide) with a byte-level BPE tokenizer. Do not write into it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [prose],
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_compressor(tiny_llama_folder, text_file):
    """`make_compressor(calibration_samples=4)`: for `tiny_llama_folder`, windows of 32 tokens."""
    from optimum_order import JointCompressor

    def make(**changes) -> JointCompressor:
        options = {
            "calibration": str(text_file),
            "calibration_samples": 4,
            "sequence_length": 32,
            "device": "cpu",
        }
        return JointCompressor.from_pretrained(tiny_llama_folder, **options | changes)

    return make


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "albert": _SMALL | {"embedding_size": 16},
    "bert": _SMALL,
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma3_text": _GROUPED
    | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
    }
    | {"eos_token_id": 2},
    "gpt_neox": _SMALL,
    "gpt_oss": _GROUPED
    | _ROUTED
    | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "llama": _GROUPED,
    "mixtral": _GROUPED | _ROUTED,
    "opt": _SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3": _GROUPED | {"head_dim": 8},
    "qwen3_moe": _GROUPED
    | {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="session")
def make_model():
    """`make_model("llama")`: a two-block model of random weights, in evaluation mode. Any architecture above.

    Its weights, biases and norms are all large enough to matter, so that no mistake hides in a near-zero.
    """
    import torch
    import transformers

    def make(architecture, **changes):
        config = transformers.AutoConfig.for_model(
            architecture, **(ARCHITECTURES[architecture] | changes)
        )
        auto = (
            transformers.AutoModel
            if architecture in ("albert", "bert")
            else transformers.AutoModelForCausalLM
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.15)
        return model.eval()

    return make


_TRANSFORMER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
IMAGE_CLASSIFIERS = {
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "deit": _TRANSFORMER
    | {"image_size": 16, "patch_size": 4, "architectures": ["DeiTForImageClassification"]},
    "regnet": _STAGES | {"groups_width": 4},
    "resnet": _STAGES | {"layer_type": "basic"},
    "swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "image_size": 16,
        "patch_size": 2,
    }
    | {"window_size": 4},
    "vit": _TRANSFORMER | {"image_size": 16, "patch_size": 4},
}


@pytest.fixture(scope="session")
def make_image_model():
    """`make_image_model("resnet")`: an image classifier of random weights and ten classes, in evaluation mode."""
    import torch
    import transformers

    def make(architecture, **changes):
        options = {"num_labels": 10} | IMAGE_CLASSIFIERS[architecture] | changes
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(architecture, **options)
            model = transformers.AutoModelForImageClassification.from_config(config)
            with torch.no_grad():
                for name, tensor in model.named_buffers():
                    if name.endswith(
                        ("running_mean", "running_var")
                    ):  # what training would have left there
                        tensor.add_(torch.rand_like(tensor))
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def image_batches():
    """Three batches of pixels, one of them of a single image."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)} for count in (3, 1, 2)
    ]


@pytest.fixture(scope="session")
def batches():
    """Three batches of token ids, two of them of two sequences, none of the same length."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 64, shape, generator=generator)}
        for shape in [(2, 16), (1, 9), (2, 12)]
    ]


class Hub:
    """A Hub on this machine, and a process that talks to it as a user's would: see hub_server.py and hub_client.py."""

    def __init__(self, home: Path):
        spec = importlib.util.spec_from_file_location("hub_server", HERE / "hub_server.py")
        module = sys.modules["hub_server"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.tokens = {user: token for token, user in module.TOKENS.items()}
        self.server = module.HubServer()
        self.environment = {
            key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"
        } | {
            "HF_ENDPOINT": self.server.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.tokens["me"],
            "HF_HUB_DISABLE_XET": "1",  # for Xet there would have to be a second server
            "NO_PROXY": "127.0.0.1",
        }
        self.home, self.log = home, home / "stderr"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, HERE / "hub_client.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                cwd=home,
            )

    def ask(self, name, *arguments, **options) -> dict:
        """What a function of hub_client.py returns as "result", or raises."""
        asked = {"call": name, "arguments": arguments, "options": options}
        self._process.stdin.write(json.dumps(asked, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the client has ended:\n{self.log.read_text()[-3000:]}"
        return json.loads(answer)

    def call(self, name, *arguments, **options):
        """What a function of hub_client.py returns."""
        answer = self.ask(name, *arguments, **options)
        assert "error" not in answer, answer["traceback"]
        return answer["result"]

    def fail(self, name, *arguments, **options) -> dict:
        """The "error" that a function of hub_client.py raises, its "message" and "traceback"."""
        answer = self.ask(name, *arguments, **options)
        assert "error" in answer, answer
        return answer

    def fresh(self, code: str, home: Path, *arguments, **variables) -> str:
        """The output of Python code in a new process with nothing in its cache."""
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = self.environment | {"HF_HOME": str(home)} | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
        assert done.returncode == 0, (
            f"{code}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def close(self):
        self._process.stdin.close()
        self._process.wait(30)
        self.server.close()


@pytest.fixture(scope="session")
def hub_process(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp("hub"))
    yield hub
    hub.close()


@pytest.fixture
def hub(hub_process):
    """A Hub with nothing on it, `hub.server`, and someone logged in there: `hub.call("push", folder, "me/model")`."""
    hub_process.server.clear()
    return hub_process


@pytest.fixture(scope="session")
def large_llama(tmp_path_factory):
    """A Llama of twelve blocks, 100 MB in bfloat16 and in three files, and the folder it is in. Change neither."""
    import torch
    import transformers

    sizes = {
        "vocab_size": 64,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
    }
    config = transformers.LlamaConfig(
        **sizes,
        num_hidden_layers=12,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=64,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(-1).copy_(torch.arange(parameter.numel()) % 251 / 251)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder, max_shard_size="50MB")
    return model, folder


# The output goes to files, so that no pipe can fill up.
_REDIRECT = """
import os, signal, sys
for stream, file in ((1, {out!r}), (2, {err!r})):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
os.chdir({folder!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in the background
"""


class Child:
    """Python code in a process of its own, forked from one that has imported everything."""

    def __init__(self, context, code: str, outputs: Path, folder: Path) -> None:
        files = {"out": outputs / "out", "err": outputs / "err"}
        self._files = files
        names = {name: str(file) for name, file in files.items()}
        code = _REDIRECT.format(**names, folder=str(folder)) + code
        self._process = context.Process(target=exec, args=(code, {"__name__": "child"}))
        self._process.start()

    def wait_until(self, condition) -> None:
        """Wait for a condition that the running process makes true."""
        while not condition():
            assert self._process.is_alive(), f"the process has ended: {self.output('err')}"
            time.sleep(0.001)

    def end(self, signal: int | None = None) -> int:
        """Wait for the end, after sending a signal; return the exit code, or minus a signal."""
        if signal is not None:
            os.kill(self._process.pid, signal)
        self._process.join(600)
        return self._process.exitcode

    def output(self, stream: str) -> str:
        """Return the text of "out" or "err"."""
        file = self._files[stream]
        return file.read_text() if file.exists() else ""


@pytest.fixture(scope="session")
def fork_context():
    """A server that forks processes, which need not import anything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["optimum_order.compressor", "transformers.models.llama.modeling_llama"]
    )
    return context


@pytest.fixture
def fork(fork_context, tmp_path_factory, tmp_path):
    """Run Python code in a process of its own, in `tmp_path` or another folder."""

    def start(code: str, folder: Path = tmp_path) -> Child:
        return Child(fork_context, code, tmp_path_factory.mktemp("child"), folder)

    return start


@pytest.fixture(scope="session")
def free_port():
    """`free_port()`: a port of this machine that nobody listens on."""

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def in_ranks(free_port):
    """`in_ranks(2, function)`: what `function(ranks)` returns in each of two forked processes, by rank."""
    import torch

    from optimum_order.calibration.ranks import Ranks

    def work(rank, size, port, function, pipe):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT=str(port))
        os.environ.update(MASTER_ADDR="127.0.0.1")
        file = io.BytesIO()
        try:
            with Ranks.joined() as ranks:
                torch.save((True, function(ranks)), file)
        except BaseException as error:
            torch.save((False, repr(error)), file)
        pipe.send_bytes(file.getvalue())
        pipe.recv_bytes()  # the store of rank 0 outlives all others

    def run(size, function):
        context = multiprocessing.get_context("fork")  # closures and models need not be pickled
        port = free_port()
        pipes = []
        processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
                process = context.Process(target=work, args=(rank, size, port, function, theirs))
                process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = []
        try:
            for pipe in pipes:
                assert pipe.poll(240), "a rank does not answer"
                results.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
        finally:
            for pipe in pipes:
                with contextlib.suppress(OSError):
                    pipe.send_bytes(b"done")
            for pipe, process in zip(pipes, processes, strict=True):
                process.join(10)
                process.kill()
                pipe.close()
        wrong = [result for fine, result in results if not fine]
        assert not wrong, wrong
        return [result for _, result in results]

    return run
