"""The package as pip installs it: programs, data files, requirements, third-party plug-ins.

Every environment here is thrown away, borrows its dependencies from this environment, and
downloads nothing.
"""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from optimum_order import formats
from optimum_order.engine import recipe
from optimum_order.models.source import EMBEDDED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""The variables of this process without PYTHONPATH, which would hide an installed package."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
INSTALL = [
    "install",
    "--quiet",
    "--no-deps",
    "--no-build-isolation",
    "--no-index",
    "--ignore-installed",
]


def run(*command, **options) -> str:
    """The output of a command; a failure shows all of it."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Return a copy of what a fresh clone holds, so that no build touches the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("optimum_order", "optimum"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module", params=["normal", "editable"])
def installed(request, source, tmp_path_factory) -> Path:
    """The bin folder of an environment with the package installed in one of the two ways."""
    environment = tmp_path_factory.mktemp(request.param)
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", env=CLEAN
        ).strip()
    )
    # Our dependencies, but none of the .pth files beside them, which would bring in the checkout.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    editable = ["--editable"] if request.param == "editable" else []
    run(*PIP, "--python", python, *INSTALL, *editable, source, env=CLEAN)
    where = run(
        python,
        "-c",
        "import optimum_order; print(optimum_order.__file__)",
        cwd=environment,
        env=CLEAN,
    ).strip()
    assert Path(where).is_relative_to(source if editable else site), (
        "another copy of the package is being tested"
    )
    return environment / "bin"


def test_optimum_order_knows_the_commands(installed, tmp_path):
    check_program([installed / "optimum-order"], tmp_path)


def test_optimum_cli_knows_the_commands(installed, tmp_path):
    # optimum's own script lies where optimum was installed; this is all it does
    main = "from optimum.commands.optimum_cli import main; main()"
    check_program([installed / "python", "-c", main, "order"], tmp_path)


def check_program(program, folder):
    text = run(*program, "--help", cwd=folder, env=CLEAN)
    assert all(name in text for name in ("compress", "inspect", "verify", "methods"))
    listed = json.loads(run(*program, "methods", "--json", cwd=folder, env=CLEAN))
    assert {"wanda", "gptq"} <= {method["name"] for method in listed["methods"]}


def test_the_embedded_models_are_installed(installed, tmp_path):
    code = """
        from importlib import resources
        for folder in (resources.files("optimum_order") / "assets").iterdir():
            print(*(f"{folder.name}/{file.name}" for file in folder.iterdir()))
    """
    printed = run(installed / "python", "-c", textwrap.dedent(code), cwd=tmp_path, env=CLEAN)
    files = set(printed.split())
    for model in EMBEDDED:
        reader = "tokenizer.json" if model == "tiny-llama" else "preprocessor_config.json"
        assert {
            f"{model}/{file}"
            for file in ("config.json", "model.safetensors", "recipe.json", reader)
        } <= files


@pytest.mark.parametrize("model", ["tiny-resnet", "tiny-vit"])
def test_the_vision_models_are_small(model):
    assert (
        sum(file.stat().st_size for file in (ROOT / "optimum_order" / "assets" / model).iterdir())
        < 1_000_000
    )


def test_the_wheel_holds_the_package_and_nothing_else(source, tmp_path):
    run(
        *PIP,
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
        source,
    )
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(source))
        for folder in ("optimum_order", "optimum")
        for file in (source / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert inside == expected
    assert not any(name.startswith("optimum/") and name.endswith("__init__.py") for name in inside)
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".pickle")) for name in inside)


def test_registering_the_commands_and_their_help_import_no_torch():
    code = """
        import sys
        import optimum.commands.register.register_order
        from optimum_order.cli import main
        for arguments in (["--help"], ["compress", "--help"], ["methods", "--help"]):
            try:
                main(arguments)
            except SystemExit as end:
                assert end.code == 0
        heavy = ("torch", "transformers", "datasets", "rich")
        print("heavy:", [name for name in heavy if name in sys.modules])
    """
    assert run(sys.executable, "-c", textwrap.dedent(code)).endswith("heavy: []\n")


CORE = {
    *("accelerate", "bitsandbytes", "evaluate", "optimum", "safetensors", "torch", "transformers"),
    *("compressed-tensors", "pcodec", "rich", "scipy", "wrapt"),
}
"""What `pip install optimum-order` must bring: the seven packages of the stack, then what
`compress` and `save` import that no package of the core requires."""


def test_the_core_is_small():
    assert set(names(setup()["options"]["install_requires"])) == CORE


def test_everything_imported_is_declared():
    imported = set()
    for folder in ("optimum_order", "optimum"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "optimum_order", "optimum"}
    # `bench` runs what is there, or in environments of others, and says what is not
    imported -= {"llama_cpp", "vllm"}
    imported -= {
        "triton"
    }  # comes with builds of PyTorch for GPUs; `kernels` does without elsewhere
    extras = setup()["options.extras_require"]
    declared = brought(CORE) | {
        name for extra in extras if extra != "dev" for name in names(extras[extra])
    }
    owners = packages_distributions()
    # a package that is not installed here has the name of its module: `lm_eval`, `gguf`
    missing = {
        name for name in imported if not set(map(normal, owners.get(name, [name]))) & declared
    }
    assert missing == set()


def test_all_brings_every_extra_that_is_used():
    extras = setup()["options.extras_require"]
    assert extras["all"].strip() == "optimum-order[adapters,gguf,hub,plots,study,vision]"
    assert set(extras) == {
        "adapters",
        "all",
        "completion",
        "dev",
        "docs",
        "gguf",
        "hub",
        "lm-eval",
        "plots",
        "ray",
        "study",
        "vision",
    }
    assert "optimum-order[all]" in extras["dev"].split()


def setup() -> configparser.ConfigParser:
    """What setup.cfg says."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def normal(name: str) -> str:
    """A distribution's name in its one normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(lines: str | Iterable[str]) -> list[str]:
    """The names of the distributions that these requirements name."""
    lines = lines.split("\n") if isinstance(lines, str) else lines
    return [normal(re.match(r"[A-Za-z0-9._-]+", line).group()) for line in lines if line.strip()]


def brought(roots: Iterable[str]) -> set[str]:
    """What pip installs with some distributions: they, and what they require on every machine."""
    reached, left = set(), list(roots)
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            left += names(line for line in requires(name) or [] if ";" not in line)
    return reached


EXTRA_MODULES = (
    "PIL",
    "datasets",
    "gguf",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "peft",
    "pyarrow",
    "ray",
    "rich",
    "sklearn",
)
"""What `compress` and `save` do without: the extras, and what commands or data sets need."""


def test_compress_and_save_need_no_extra(tmp_path):
    code = f"""
        import importlib.machinery
        import sys

        HIDDEN = {EXTRA_MODULES}
        finder = importlib.machinery.PathFinder


        class Hiding:
            invalidate_caches = finder.invalidate_caches
            find_distributions = finder.find_distributions

            @staticmethod
            def find_spec(name, path=None, target=None):
                if name.split(".")[0] in HIDDEN:
                    return None
                return finder.find_spec(name, path, target)


        sys.meta_path[sys.meta_path.index(finder)] = Hiding

        from optimum_order import JointCompressor

        text = ["The order of two methods changes the result. " * 40]
        small = dict(calibration=text, calibration_samples=2, sequence_length=32)
        compressor = JointCompressor.from_pretrained("tiny-llama", **small)
        compressed = compressor.compress("wanda:0.5 > gptq:4", progress=False)
        print(compressed.save_pretrained("out"))
        print(sorted(set(HIDDEN) & set(sys.modules)))
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    printed = run(sys.executable, "-c", textwrap.dedent(code), cwd=tmp_path, env=environment)
    assert printed.split("\n")[-3:-1] == ["compressed-tensors", "[]"]


def test_the_package_is_typed(installed):
    code = """
        from importlib import resources
        print((resources.files("optimum_order") / "py.typed").is_file())
    """
    printed = run(installed / "python", "-c", textwrap.dedent(code), env=CLEAN)
    assert printed.strip() == "True"


PLUGIN = """
    import dataclasses

    from optimum_order import Backend
    from optimum_order.backends import option
    from optimum_order.formats.dense import Dense


    @dataclasses.dataclass(frozen=True)
    class Options:
        every: int = option(2, "prune each n-th", check=lambda v: v >= 2, allowed="2 or more")


    class Stripes(Backend):
        name = "stripes"
        summary = "prune every n-th input"
        kind = "prune"
        Options = Options

        def compress(self, state, statistics):
            pruned = state.weight.new_zeros(state.weight.shape, dtype=bool)
            pruned[:, :: self.options.every] = True
            if state.pruned is not None:
                pruned |= state.pruned
            weight = state.weight.masked_fill(pruned, 0.0)
            return dataclasses.replace(state, weight=weight, pruned=pruned)


    class Plain(Dense):
        name = "plain"
        summary = "dense under another name"
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """Return a folder with a third-party package installed into it, for PYTHONPATH."""
    project, site = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("site")
    (project / "stripes.py").write_text(textwrap.dedent(PLUGIN))
    (project / "pyproject.toml").write_text(
        textwrap.dedent("""
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"

            [project]
            name = "somebody-elses-stripes"
            version = "1.0"

            [project.entry-points."optimum_order.backends"]
            stripes = "stripes:Stripes"

            [project.entry-points."optimum_order.formats"]
            plain = "stripes:Plain"

            [tool.setuptools]
            py-modules = ["stripes"]
        """)
    )
    run(*PIP, *INSTALL, "--target", site, project)
    return site


def test_a_third_party_backend_and_format_are_used_by_their_names(
    plugin, tiny_llama_folder, text_file, tmp_path
):
    out = tmp_path / "out"
    small = ["--calibration", text_file, "--calibration-samples", 2, "--sequence-length", 64]
    order = ["--order", "stripes:4 > gptq:4 > stripes:8", "--format", "plain"]
    compress = ["compress", tiny_llama_folder, out, *order, *small]
    commands = [["methods", "--json"], [*compress, "--json"], ["verify", out]]
    code = """
        import contextlib
        import io
        import json
        import sys
        from optimum_order.cli import main

        for command in json.loads(sys.argv[1]):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                try:
                    main(command)
                except SystemExit as ended:
                    assert ended.code == 0, command
            print(json.dumps(printed.getvalue()))

        import transformers
        model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2])
        print(model.model.layers[1].mlp.up_proj.weight[:, ::4].count_nonzero().item())
    """
    words = [[str(word) for word in command] for command in commands]
    environment = os.environ | {"PYTHONPATH": f"{plugin}{os.pathsep}{ROOT}"}
    program = [sys.executable, "-c", textwrap.dedent(code), json.dumps(words), out]
    methods, result, _, count = run(*program, env=environment).splitlines()
    listed, result = (json.loads(json.loads(line)) for line in (methods, result))
    (stripes,) = [method for method in listed["methods"] if method["name"] == "stripes"]
    assert stripes["options"][0]["allowed"] == "2 or more"
    assert "plain" in [entry["name"] for entry in listed["formats"]]
    assert (result["format"], result["sparsity"]) == ("plain", 0.25)
    assert count == "0"


def test_without_the_package_its_names_are_unknown():
    assert "stripes" not in recipe.available() and "plain" not in formats.available()
