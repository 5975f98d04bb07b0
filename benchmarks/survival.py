"""What a run loses that is killed, starved of memory or room, or disturbed by another; and hostile files.

    python benchmarks/survival.py kills       kill -9 at random points, for each kind of stage and each format
    python benchmarks/survival.py terminate   the same with SIGTERM
    python benchmarks/survival.py memory      the kernel ends runs that want more memory than a cgroup has (needs root)
    python benchmarks/survival.py faults      writes that fail with EIO or ENOSPC or are cut short (needs gcc)
    python benchmarks/survival.py full-disk   a disk that is full half way (mounts a tmpfs: needs root)
    python benchmarks/survival.py concurrent  two runs into one OUT, one work dir, one study
    python benchmarks/survival.py fuzz        damaged artifacts and GGUF files: no crash, no hang, no memory above 2 x
    python benchmarks/survival.py overhead    with and without a work dir in turns, on a Llama of 88 M parameters

Every disturbed run goes on until it is done, by the same command with --resume where a work dir is there. A part fails
(exit code 1) unless each finished artifact is, file by file and byte for byte, that of a run that nobody disturbed, OUT
is whole or absent at every moment in between, and nothing else is left behind. Runs are forked from this process, which
has imported everything, so that moments of the run are hit and not those of Python's start.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import errno
import functools
import gc
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads should not be forked

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order import JointCompressor, cli
from optimum_order.errors import ArtifactError
from optimum_order.formats.gguf_file import GGUFFile

ORDERS = ("wanda:0.5", "gptq:4", "sparsegpt:0.5 > gptq:4")
"""What the part "overhead" measures."""
DOCS = Path(__file__).parents[1] / "docs"
CGROUP = Path("/sys/fs/cgroup/memory")
"""Where cgroups of version 1 with a limit of memory are made."""


@dataclass(frozen=True)
class Case:
    """A run to disturb.

    Args:
        name: Of the kind of stage, or of the format.
        order: What is done.
        format: What OUT is saved as.
    """

    name: str
    order: str
    format: str = "auto"


STAGES = [
    Case("pruner", "sparsegpt:0.5"),
    Case("quantizer", "gptq:4"),
    Case("pruner, quantizer", "sparsegpt:0.5 > gptq:4"),
    Case("rotation", "rotate > gptq:4"),
    Case("width", "width:0.25 > gptq:4"),
    Case("depth", "depth:1 > gptq:4"),
    Case("recovery", "gptq:4 > refit(steps=4)"),
    Case("ecsq", "ecsq(rate=2.5)", "coded"),
]
CONTAINERS = [
    Case("dense", "magnitude:0.5", "dense"),
    Case("compressed-tensors", "magnitude:0.5 > rtn(bits=4, group_size=32)", "compressed-tensors"),
    Case("gptq", "rtn(bits=4, group_size=32)", "gptq"),
    Case("sparse", "magnitude(pattern=2:4) > rtn(bits=3, group_size=16)", "sparse"),
    Case("coded", "magnitude:0.5 > rtn(bits=3, group_size=16)", "coded"),
    Case("gguf", "rtn(bits=4, group_size=32)", "gguf"),
    Case("bitsandbytes", "bitsandbytes(dtype=nf4, blocksize=32)", "bitsandbytes"),
]


class Child:
    """A process that is forked from this one.

    Args:
        work: What it does.
    """

    def __init__(self, work: Callable[[], object]):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._run(work)

    def _run(self, work: Callable[[], object]) -> None:
        code = 99
        try:
            os.dup2(self._log.fileno(), 1)
            os.dup2(self._log.fileno(), 2)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 600) -> int | None:
        """Return the exit code, minus the number of a signal; None if it runs on after so long."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def end(self) -> int:
        """Return the exit code once it has ended."""
        code = self.wait()
        assert code is not None, f"it runs on after 10 minutes: {self.log}"
        return code

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send a signal and return the exit code."""
        os.kill(self.pid, number)
        code = self.wait(30)
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"it ran on for 30 s after signal {number}: {self.log}")
        return code

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()


class Runs:
    """Runs of one case, in a folder of its own.

    Args:
        case: What is run.
        root: The folder, not there yet.
        samples: Of calibration.
    """

    def __init__(self, case: Case, root: Path, samples: int):
        root.mkdir()
        self.case = case
        self.root = root
        self.out = root / "out"
        self.work = root / "out.work"
        self.samples = samples
        self.text = root.with_name("text.txt")  # read faster than the text that is built in
        self.text.write_text((DOCS / "glossary.md").read_text()[:20000])
        self.expected: dict[str, str] = {}
        self.problems: list[str] = []
        self.seconds = 0.0
        self.saving = 0.0

    def words(self, out: Path) -> list[str]:
        """The command that writes a folder."""
        words = ["compress", "tiny-llama", str(out), "--order", self.case.order, "--quiet"]
        words += ["--format", self.case.format, "--overwrite", "--calibration", str(self.text)]
        return [*words, "--calibration-samples", str(self.samples), "--sequence-length", "64"]

    def start(self, **hooks) -> Child:
        """Start the command, or go on with what is left of it."""
        resume = ["--resume"] if self.work.exists() else []
        return command([*self.words(self.out), *resume], **hooks)

    def undisturbed(self) -> None:
        """Run twice, and take the time."""
        for number in (1, 2):
            begin = time.perf_counter()
            child = self.start()
            saving = None
            while child.wait(0.01) is None:
                if saving is None and self.is_saving():
                    saving = time.perf_counter()
            assert child.code == 0, child.log
            self.seconds = time.perf_counter() - begin
            self.saving = time.perf_counter() - (saving or begin)
            files = digests(self.out)
            if number == 2 and files != self.expected:
                self.problems.append("two undisturbed runs differ")
            self.expected = files
            shutil.rmtree(self.out)
        self.check("undisturbed")

    def is_saving(self) -> bool:
        """Whether OUT is being written."""
        return any(self.root.glob(".out.*.partial"))

    def check(self, moment: str) -> None:
        """Note a result that is neither whole nor absent."""
        if self.out.exists() and digests(self.out) != self.expected:
            self.problems.append(f"{moment}: OUT is neither whole nor absent")

    def finish(self, moment: str) -> None:
        """Go on to the end, undisturbed; the result must be right, and nothing else be left."""
        if not self.out.exists() or self.work.exists():
            child = self.start()
            if child.wait() != 0:
                self.problems.append(f"{moment}: it does not go on: {child.log[-500:]}")
        self.check(moment)
        left = {path.name for path in self.root.iterdir()} - {"out"}
        if left or not self.out.exists():
            self.problems.append(f"{moment}: left behind: {sorted(left)}")
        for path in self.root.iterdir():
            shutil.rmtree(path)


def command(
    words: list[str],
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> Child:
    """Start a command of the program.

    Args:
        words: Its arguments.
        before: What the process does first.
        after: What it does last.
    """

    def work() -> None:
        before()
        try:
            cli.main(words)
        finally:
            after()

    return Child(work)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def progress(work: Path) -> str:
    """How far a run has come, in words."""
    files = sorted(work.glob("*.state.safetensors")) if work.is_dir() else []
    passes = [int(file.name[:3]) for file in files]
    return (
        f"stage {max(passes) + 1}, {passes.count(max(passes))} of 4 blocks" if files else "nothing"
    )


@functools.cache
def warm_up() -> None:
    """Have this process load and compile all that its children would, each anew."""
    with tempfile.TemporaryDirectory() as folder:
        words = Runs(STAGES[2], Path(folder) / "runs", 2).words(Path(folder) / "out")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            cli.main(words)
    gc.collect()


@contextlib.contextmanager
def runs(case: Case, args: argparse.Namespace) -> Iterator[Runs]:
    """Runs of a case that have run twice undisturbed."""
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        made = Runs(case, Path(folder) / "runs", args.samples)
        made.undisturbed()
        yield made


def report(part: str, disturbed: Runs, count: int, what: str) -> bool:
    """Print a row of a table, and what went wrong."""
    for problem in disturbed.problems:
        print(f"    {problem}", file=sys.stderr)
    case = disturbed.case
    good = count - len(disturbed.problems)
    print(
        f"| {part}: {case.name} | `{case.order}` | {case.format} | {disturbed.seconds:.1f} s | {what} | "
        f"{max(good, 0)} of {count} |",
        flush=True,
    )
    return not disturbed.problems


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases that were asked for."""
    return [case for case in STAGES + CONTAINERS if not args.cases or case.name in args.cases]


def stopped(args: argparse.Namespace, number: int) -> bool:
    """Send signals to runs at random moments, half of the time while OUT is written."""
    all_good = True
    part = signal.Signals(number).name
    for case in cases(args):
        draw = random.Random(f"{args.seed} {case.name}")
        with runs(case, args) as disturbed:
            seen: collections.Counter[str] = collections.Counter()
            hits = tries = 0
            while hits < args.count and tries < 5 * args.count:
                tries += 1
                child = disturbed.start()
                if hits % 2:
                    while child.wait(0.003) is None and not disturbed.is_saving():
                        pass
                    code = child.wait(draw.uniform(0, disturbed.saving))
                else:
                    code = child.wait(draw.uniform(0, disturbed.seconds))
                if code is None:
                    moment = "while saving" if disturbed.is_saving() else "before"
                    code = child.kill(number)
                    hits += 1
                    seen[moment] += 1
                    if code not in (0, -number, 128 + number if number == signal.SIGTERM else 0):
                        disturbed.problems.append(f"exit code {code}: {child.log[-500:]}")
                elif code != 0:
                    disturbed.problems.append(f"exit code {code}: {child.log[-500:]}")
                disturbed.check(f"{part} {hits}, {moment if hits else ''}")
                if code == 0:
                    disturbed.finish(f"after {part} {hits}")
            disturbed.finish("at the end")
            what = f"{seen['before']} before OUT is written, {seen['while saving']} while it is"
            all_good &= report(part, disturbed, hits, what) and hits == args.count
    return all_good


def memory(args: argparse.Namespace) -> bool:
    """Give runs less memory than they want, in a cgroup."""
    group = CGROUP / f"optimum-order-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2**33))
    except OSError as error:
        sys.exit(
            f"No cgroup can be made in {CGROUP} ({error.strerror}): this part needs root and version 1."
        )

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    all_good = True
    try:
        for case in cases(args):
            draw = random.Random(f"{args.seed} {case.name}")
            with runs(case, args) as disturbed:
                (group / "memory.force_empty").write_text("1")
                (group / "memory.limit_in_bytes").write_text(str(2**33))
                (group / "memory.max_usage_in_bytes").write_text("0")
                assert disturbed.start(before=enter).wait() == 0
                disturbed.finish("with enough memory")
                peak = int((group / "memory.max_usage_in_bytes").read_text())
                codes: collections.Counter[int] = collections.Counter()
                while codes[-signal.SIGKILL] < args.count and codes.total() < 5 * args.count:
                    (group / "memory.force_empty").write_text("1")
                    limit = int(peak * draw.uniform(0.05, 0.95))
                    (group / "memory.limit_in_bytes").write_text(str(limit))
                    child = disturbed.start(before=enter)
                    codes[code := child.wait()] += 1
                    if code not in (0, -signal.SIGKILL):
                        disturbed.problems.append(f"exit code {code}: {child.log[-500:]}")
                    disturbed.check(f"{limit} bytes")
                    if code == 0:
                        disturbed.finish(f"within {limit} bytes")
                disturbed.finish("at the end")
                what = f"5 to 95 % of {peak / 1e6:.0f} MB; {codes[0]} runs did with less"
                all_good &= report("out of memory", disturbed, codes[-signal.SIGKILL], what)
    finally:
        group.rmdir()
    return all_good


def faults(args: argparse.Namespace) -> bool:
    """Have writes fail at random calls, or be cut short."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "faults_arm"):  # start anew with the injector
        compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
        if compiler is None:
            sys.exit("This part needs a C compiler (gcc, cc or clang), and there is none.")
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "faults.so"
            source = Path(__file__).with_name("faults.c")
            subprocess.run(
                [compiler, "-shared", "-fPIC", "-O2", source, "-o", built, "-ldl"], check=True
            )
            environment = os.environ | {"LD_PRELOAD": str(built)}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    all_good = True
    for case in cases(args):
        draw = random.Random(f"{args.seed} {case.name}")
        with runs(case, args) as disturbed:
            below = str(disturbed.root).encode()
            calls = disturbed.root.with_name("calls")

            def note(calls: Path = calls) -> None:
                calls.write_text(str(library.faults_calls()))

            def arm(kind: int, call: int = 0, below: bytes = below) -> Callable[[], None]:
                return functools.partial(library.faults_arm, below, kind, ctypes.c_long(call))

            assert disturbed.start(before=arm(0), after=note).wait() == 0
            disturbed.finish("counted")
            total = int(calls.read_text())
            for name, kind in (("EIO", errno.EIO), ("ENOSPC", errno.ENOSPC)):
                codes: collections.Counter[int] = collections.Counter()
                for _ in range(args.count):
                    call = draw.randint(1, total)
                    child = disturbed.start(before=arm(kind, call))
                    code = child.wait()
                    codes[code] += 1
                    reason = os.strerror(kind)
                    if code != 2 or reason not in child.log or "Traceback" in child.log:
                        disturbed.problems.append(
                            f"{name} at call {call}: exit code {code}: {child.log[-800:]}"
                        )
                    disturbed.check(f"{name} at call {call}")
                    disturbed.finish(f"after {name} at call {call}")
                all_good &= report(name, disturbed, args.count, f"from one of {total} calls on")
                disturbed.problems.clear()
            for _ in range(args.count):
                child = disturbed.start(before=arm(-1), after=note)
                if child.wait() != 0:
                    disturbed.problems.append(
                        f"short writes: exit code {child.code}: {child.log[-800:]}"
                    )
                disturbed.finish("after short writes")
                if args.count > 3 and not disturbed.problems:
                    break  # every call was cut short, and the next run would do the same
            all_good &= report("short writes", disturbed, 1, f"{calls.read_text()} calls")
    return all_good


def full_disk(args: argparse.Namespace) -> bool:
    """Run on a disk too small for the work dir, then make room and go on."""
    with runs(STAGES[2], args) as disturbed:
        disk = disturbed.root.with_name("disk")
        disk.mkdir()
        disturbed.work = disk / "work"
        size = f"size={args.kilobytes}k"
        subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=True)

        def start() -> Child:
            resume = ["--resume"] if disturbed.work.exists() else []
            words = [*disturbed.words(disturbed.out), "--work-dir", str(disturbed.work), *resume]
            return command(words)

        try:
            for _ in range(2):
                code = (child := start()).wait()
                print(f"exit code {code}; {progress(disturbed.work)}")
                print("".join(f"    {line}\n" for line in child.log.splitlines()[-2:]), end="")
                assert code == 2 and "No space left on device" in child.log, child.log
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            child = start()
            if child.wait() != 0:
                disturbed.problems.append(child.log[-500:])
        finally:
            subprocess.run(["umount", disk], check=True)
        disturbed.work = disk
        disturbed.check("resumed once there was room")
        return report("full disk", disturbed, 1, f"{args.kilobytes} kB for the work dir")


def concurrent(args: argparse.Namespace) -> bool:
    """Start two runs at once that write into one place."""
    case = STAGES[2]
    all_good = True
    for place in ("OUT", "work dir"):
        with runs(case, args) as disturbed:
            ended: collections.Counter[str] = collections.Counter()
            for number in range(args.count):
                words = disturbed.words(disturbed.out)
                if place == "OUT":
                    words.remove("--overwrite")
                    works = [disturbed.root / f"work-{which}" for which in (1, 2)]
                else:
                    works = [disturbed.work] * 2
                children = [command([*words, "--work-dir", str(work)]) for work in works]
                codes = sorted(child.end() for child in children)
                ended[str(codes)] += 1
                logs = "\n".join(child.log for child in children)
                if codes not in ([0, 2], [0, 0]):
                    disturbed.problems.append(
                        f"{place}, round {number}: exit codes {codes}: {logs[-800:]}"
                    )
                for path in list(
                    disturbed.root.glob("out-*")
                ):  # a result that another was faster than
                    if digests(path) != disturbed.expected:
                        disturbed.problems.append(
                            f"{place}, round {number}: '{path.name}' is not right"
                        )
                    shutil.rmtree(path)
                for work in disturbed.root.glob("work-*"):  # of the one that was not faster
                    shutil.rmtree(work)
                disturbed.finish(f"{place}, round {number}")
            what = ", ".join(f"exit codes {codes} {count} times" for codes, count in ended.items())
            all_good &= report(f"two runs, one {place}", disturbed, args.count, what)
    return all_good & one_study(args)


def one_study(args: argparse.Namespace) -> bool:
    """Start two processes of one study at once, and the refused one again when the first has ended."""
    problems = []
    ended: collections.Counter[str] = collections.Counter()
    begin = time.perf_counter()
    trials: dict[str, str] = {}
    for number in range(args.count):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "study"
            orders = Path(folder) / "orders"
            orders.write_text("magnitude:0.5\nmagnitude:0.5 > rtn:4\n")
            words = ["study", "tiny-llama", str(out), "--orders", str(orders), "--quiet"]
            words += [
                "--calibration-samples",
                "4",
                "--sequence-length",
                "64",
                "--evaluation-samples",
                "4",
            ]
            children = [command(words), command(words)]
            codes = sorted(child.end() for child in children)
            ended[str(codes)] += 1
            logs = "\n".join(child.log for child in children)
            if codes not in ([0, 2], [0, 0]):
                problems.append(f"round {number}: exit codes {codes}: {logs[-800:]}")
            again = command(words)
            if again.wait() != 0:
                problems.append(f"round {number}: again: {again.log[-800:]}")
            with contextlib.closing(sqlite3.connect(out / "trials.sqlite")) as database:
                if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                    problems.append(f"round {number}: the trials are damaged")
                rows = database.execute("SELECT orders, draw, data FROM trials").fetchall()
                planned = database.execute("SELECT orders, draw FROM planned").fetchall()
            done = {(order, draw) for order, draw, _ in rows} - {("original", 0)}
            if done != set(planned):
                problems.append(f"round {number}: trials differ from those planned")
            values = {order: json.loads(data)["performance"] for order, _, data in rows}
            trials = trials or values
            if values != trials:
                problems.append(f"round {number}: trials differ from those of the first round")
    for problem in problems:
        print(f"    {problem}", file=sys.stderr)
    what = ", ".join(f"exit codes {codes} {count} times" for codes, count in ended.items())
    seconds = (time.perf_counter() - begin) / args.count
    print(
        f"| two runs, one study | {len(trials)} trials | | {seconds:.1f} s | {what} | "
        f"{args.count - len(problems)} of {args.count} |"
    )
    return not problems


class Hung(BaseException):
    """Reading took longer than 10 s; nothing that expects ordinary errors catches it."""


def fuzz(args: argparse.Namespace) -> bool:
    """Read damaged artifacts and GGUF files, made by the generators of tests/test_fuzz.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import test_fuzz as generators  # type: ignore[import-not-found]

    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        root = Path(folder)
        child = Child(functools.partial(make_artifacts, generators, root))
        assert child.wait() == 0, child.log
        gc.collect()
        gc.freeze()
        counts: collections.Counter[str] = collections.Counter()
        problems: list[str] = []
        begin = time.perf_counter()
        for first in range(0, args.inputs, 1000):
            last = min(first + 1000, args.inputs)
            result = root / "result.json"
            result.write_text("[]")
            child = Child(functools.partial(read_many, generators, root, args.seed, first, last))
            code = child.wait(3600)
            if code is None:
                child.kill()
            if code != 0:
                problems.append(f"inputs {first} to {last}: exit code {code}: {child.log[-800:]}")
                continue
            outcome = json.loads(result.read_text())
            counts.update(outcome["counts"])
            problems += outcome["problems"]
            print(
                f"{last} inputs, {time.perf_counter() - begin:.0f} s, {len(problems)} problems",
                file=sys.stderr,
            )
        for problem in problems:
            print(f"    {problem}", file=sys.stderr)
        print("| what is damaged | inputs |\n|---|---|")
        for kind, count in sorted(counts.items()):
            print(f"| {kind} | {count:,} |")
        print(
            f"{counts.total():,} of {args.inputs:,} inputs in {time.perf_counter() - begin:.0f} s; "
            f"{len(problems)} crashes, hangs, wrong values or allocations above the limit; "
            f"formats: {', '.join([*generators.FORMATS, 'gguf'])}"
        )
    return not problems and counts.total() == args.inputs


def make_artifacts(generators: ModuleType, root: Path) -> None:
    """Write artifacts of a few kilobytes and of a few megabytes in each format, and a GGUF file."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    larger = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}
    for name, shape, shard in (("small", sizes, "8KB"), ("larger", larger, "1MB")):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=4, **shape)
        generators.saved_in_each_format(LlamaForCausalLM(config), root / name, shard)
    compressor = JointCompressor.from_pretrained("tiny-llama")
    compressor.compress("rtn(bits=4, group_size=32)", progress=False).save_pretrained(
        root / "gguf", format="gguf"
    )


def read_many(generators: ModuleType, root: Path, seed: int, first: int, last: int) -> None:
    """Read some of the damaged inputs, and note what came of it."""

    def hung(*_: object) -> None:
        raise Hung

    signal.signal(signal.SIGALRM, hung)
    for made in (root / "small").iterdir():  # libraries that a format needs are loaded at its first
        generators.read_or_refused(made, None)
    gc.collect()
    gc.freeze()  # what these libraries made is not collected again before each input
    counts: collections.Counter[str] = collections.Counter()
    problems = []
    for number in range(first, last):
        kind, read = damage(generators, root, random.Random(f"{seed} {number}"))
        signal.alarm(10)
        try:
            read()
        except (Exception, Hung) as error:
            problems.append(f"input {number}, {kind}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
        counts[kind] += 1
    (root / "result.json").write_text(json.dumps({"counts": counts, "problems": problems}))


def damage(
    generators: ModuleType, root: Path, random: random.Random
) -> tuple[str, Callable[[], None]]:
    """Damage something in one place.

    Returns:
        What was damaged, and a function that reads it.
    """
    kind = random.choice(["JSON", "header", "bytes of a tensor", "kind of a tensor", "GGUF"])
    if kind == "GGUF":
        file = next((root / "gguf").glob("*.gguf"))
        data = changed_gguf(generators, bytearray(file.read_bytes()), random)
        return "GGUF file", functools.partial(read_gguf, generators, root / "changed.gguf", data)
    size = "larger" if random.random() < 0.02 else "small"
    made = root / size / random.choice(sorted(generators.FORMATS))
    how = random.choice(["set", "set", "drop", "copy", "rename"])
    new = generators.some_value(random)
    if kind == "JSON":
        file = random.choice(["config.json", generators.manifest.FILE, generators.INDEX])
        changes = generators.value_in_json(made, file, random, how, new)
        kind = file
    elif kind == "header":
        changes = generators.value_in_header(made, random, how, new)
    elif kind == "bytes of a tensor":
        changes = generators.bytes_in_a_tensor(made, random)
        kind += f", {made.name}"
    else:
        reshape = random.choice(generators.RESHAPES)
        changes = generators.tensor_of_another_kind(
            made, random, random.choice(generators.DTYPES), reshape
        )
    total = 2 * sum(file.stat().st_size for file in made.iterdir())
    spare = total if size == "larger" else generators.SPARE
    return kind, functools.partial(generators.survives, made, changes, spare)


def changed_gguf(generators: ModuleType, data: bytearray, random: random.Random) -> bytes:
    """Change, insert, remove or cut bytes of a file, mostly in its header."""
    at = random.randrange(random.choice([100, 2000, len(data)]))
    how = random.choice(["flip", "number", "cut", "insert", "remove"])
    if how != "number":
        changed: bytes = generators.changed_at(data, at, random, how)
        return changed
    data[at : at + 8] = random.choice(
        [b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0", b"\0" * 8]
    )
    return bytes(data)


def read_gguf(generators: ModuleType, path: Path, data: bytes) -> None:
    """Read all of a GGUF file, in twice its memory."""
    path.write_bytes(data)
    with generators.at_most(2 * len(data) + 2**20), contextlib.suppress(ArtifactError):
        file = GGUFFile(path)
        assert file.fields is not None
        for name in file.tensors:
            file.bytes_of(name)


def overhead(rounds: int, orders: list[str], schedule: str) -> bool:
    """Compress with and without a work dir, in turns."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (32, 512))
    compressor = JointCompressor(model, calibration=ids, calibration_samples=32, device="cpu")
    print(
        f"{model.num_parameters() / 1e6:.0f} M parameters, 32 x 512 tokens, {torch.get_num_threads()} threads"
    )
    worst = 0.0
    for order in orders:
        ratios = []
        for number in range(rounds):
            seconds = {}
            for keeps in (False, True) if number % 2 else (True, False):
                with tempfile.TemporaryDirectory(dir=".") as folder:
                    work = Path(folder) / "work" if keeps else None
                    seconds[keeps] = compressor.compress(
                        order, schedule, work_dir=work, progress=False
                    ).seconds
            ratios.append(seconds[True] / seconds[False])
            print(
                f"{order} ({schedule}): without {seconds[False]:.1f} s, with {seconds[True]:.1f} s",
                flush=True,
            )
        print(
            f"{order} ({schedule}): overhead {statistics.median(ratios) - 1:+.1%} (median of {rounds}; target <= 5 %)"
        )
        worst = max(worst, statistics.median(ratios))
    return worst <= 1.05


PARTS = {
    "kills": lambda args: stopped(args, signal.SIGKILL),
    "terminate": lambda args: stopped(args, signal.SIGTERM),
    "memory": memory,
    "faults": faults,
    "full-disk": full_disk,
    "concurrent": concurrent,
    "fuzz": fuzz,
    "overhead": lambda args: overhead(args.rounds, args.orders, args.schedule),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, default=20, help="disturbances of each case")
    parser.add_argument("--cases", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--samples", type=int, default=8, help="of calibration, in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kilobytes", type=int, default=1000, help="size of the small disk")
    parser.add_argument("--inputs", type=int, default=100_000, help="of the part 'fuzz'")
    parser.add_argument("--rounds", type=int, default=3, help="of the part 'overhead'")
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), help="of 'overhead'")
    parser.add_argument("--schedule", default="stage", help="of 'overhead'")
    args = parser.parse_args()
    unknown = set(args.cases or []) - {case.name for case in STAGES + CONTAINERS}
    if unknown:
        parser.error(
            f"no such case: {', '.join(unknown)}; there are {[case.name for case in cases(args)]}"
        )
    sys.exit(not PARTS[args.part](args))


if __name__ == "__main__":
    main()
