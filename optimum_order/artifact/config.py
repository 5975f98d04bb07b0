"""`recipe.yaml`: the options of a run in a file, written into every saved model.

A recipe holds no token, no path of anybody's machine and no calibration text. Whoever gets one from
elsewhere runs nothing of its author's: code that comes with a model is for the command line to
allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from optimum_order.artifact.card import is_public
from optimum_order.errors import OptimumOrderError, OrderError, unknown
from optimum_order.models.source import EMBEDDED

FILE = "recipe.yaml"
_MOST_BYTES = 2**18
_QUOTE = "'*' begins a reference; put text that begins so in quotes"
_OTHER_NAMES = {"for": "engine"}
"""Options that the command line calls otherwise."""
_ELSEWHERE = {
    "token": "a token does not belong in a file: give it with --token, or set HF_TOKEN",
    "trust_remote_code": "whether code of a model is run is not for a file to say: give "
    "--trust-remote-code",
    "output": "where to write is given on the command line, not in a file",
}


ARGUMENTS = (
    *("revision", "base", "merge_adapter", "dtype", "attn_implementation"),
    *("calibration", "calibration_samples", "sequence_length", "seed", "calibration_dtype"),
    *("device", "targets", "ignore", "embeddings"),
)
"""Options that make a `JointCompressor`."""
RUN = (
    *("order", "stages", "budget", "max_loss", "schedule", "pause"),
    *("format", "unproven", "engine", "low_memory"),
)
"""Options of its `compress`."""


class Config(BaseModel):
    """The options of a run; None where nothing is said.

    Their meaning is that of the arguments of `JointCompressor` and its methods, and of the options
    of `optimum-order compress`, which have the same names.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    model: str | None = None
    revision: str | None = None
    base: str | None = None
    merge_adapter: bool | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    order: str | None = None
    stages: str | None = None
    budget: str | None = None
    max_loss: float | None = None
    schedule: str | None = None
    pause: str | None = None
    targets: list[str] | None = None
    ignore: list[str] | None = None
    embeddings: str | None = None
    calibration: str | None = None
    calibration_samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    calibration_dtype: str | None = None
    evaluate: str | None = None
    evaluation_samples: int | None = None
    metric: str | None = None
    protocol: str | None = None
    strategy: str | None = None
    draws: int | None = None
    format: str | None = None
    engine: str | None = None
    unproven: bool | None = None
    max_shard_size: str | None = None
    low_memory: bool | None = None
    device: str | None = None
    num_threads: int | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that are not None, by name."""
        return self.model_dump(exclude_none=True)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.given().items())
        return f"Config({values})"

    __str__ = __repr__


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Plain values only: nothing refers to anything else, and no key stands twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None,
                None,
                _QUOTE,
                self.peek_event().start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [str(key.value) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{name}' stands there twice", node.start_mark
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read(file: str | Path) -> Config:
    """Read a recipe.

    Args:
        file: The path of a recipe.yaml, or of the folder that holds one.

    Raises:
        OrderError: If it cannot be read, has an option that does not exist, or a wrong value.
    """
    path = Path(file).expanduser()
    path = path / FILE if path.is_dir() else path
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise OrderError(f"'{path}' is no recipe: it is longer than {_MOST_BYTES} bytes.")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OptimumOrderError):
            raise
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise OrderError(f"The recipe '{path}' cannot be read: {reason}.") from error
    if text.count("[") + text.count("{") > _MOST_BYTES // 64:
        raise OrderError(f"The recipe '{path}' is no recipe: its lists are nested too deep.")
    try:
        # a subclass of SafeLoader that takes fewer documents still
        options = yaml.load(text, Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        if "alias" in (getattr(error, "context", None) or ""):
            problem = _QUOTE
        raise OrderError(f"The recipe '{path}' is no YAML{place}: {problem}.") from error
    return of(options if options is not None else {}, f"The recipe '{path}'")


def of(options: Any, where: str = "The recipe") -> Config:
    """Return the recipe of some options by name.

    Args:
        options: A mapping; "-" in a name is "_".
        where: What messages call it.

    Raises:
        OrderError: If there is no such option, or its value is of another kind.
    """
    if not isinstance(options, Mapping):
        raise OrderError(
            f"{where} must hold options by name, such as 'order: wanda:0.5 > gptq:4', got "
            f"{type(options).__name__}."
        )
    named: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        name = _OTHER_NAMES.get(name, name)
        if name in _ELSEWHERE:
            raise OrderError(f"{where} has '{key}', and {_ELSEWHERE[name]}.")
        if name not in Config.model_fields:
            raise OrderError(f"{where}: {unknown('option', str(key), Config.model_fields)}")
        if name in named:
            raise OrderError(f"{where} has '{name}' twice.")
        named[name] = value
    try:
        return Config(**named)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        advice = " Put text in quotes." if first["type"] == "string_type" else ""
        raise OrderError(
            f"{where}: '{name}' {first['msg'][:1].lower()}{first['msg'][1:]}, got "
            f"{str(first['input'])[:60]!r}.{advice}"
        ) from error


def recipe(facts: Mapping[str, Any]) -> Config:
    """Return the recipe of a saved model.

    Args:
        facts: Its manifest.
    """
    base = facts["base_model"]
    named = base["id"] in EMBEDDED or base.get("revision") is not None
    continued = "continues" in base or facts.get("continues") is not None
    calibration = facts.get("calibration") or {}
    public = bool(calibration) and is_public(calibration["source"])
    return Config(
        model=base["id"] if named and "adapter" not in base else None,
        revision=base.get("revision"),
        dtype=None if continued else base.get("dtype"),
        order=facts["order"],
        schedule=facts["schedule"],
        pause=facts.get("pause"),
        targets=facts.get("targets"),
        ignore=facts.get("ignore"),
        calibration=calibration["source"] if public else None,
        calibration_samples=calibration.get("samples"),
        calibration_dtype=calibration.get("dtype"),
        # also that of a run without data: the model is measured with it
        sequence_length=facts.get("sequence_length", calibration.get("sequence_length")),
        seed=facts.get("seed"),
        format=facts["format"],
    )


def text(facts: Mapping[str, Any]) -> str:
    """Return the recipe of a saved model as a file holds it, with the command that repeats it.

    Args:
        facts: Its manifest.
    """
    config = recipe(facts)
    base = facts["base_model"]
    calibration = facts.get("calibration") or {}
    lines = ["# How this model was made. To make it again:"]
    words = ["optimum-order compress"]
    if config.model is None:
        name = "".join(filter(str.isprintable, str(base["id"])))[:80]
        lines.append(f"# (MODEL is '{name}', sha256 of its weights {base['digest'][:12]}...)")
        words.append("MODEL")
    words.append("OUTPUT --config recipe.yaml")
    if calibration and config.calibration is None:
        lines.append(
            f"# (SRC is data of its author, sha256 of the samples {calibration['digest'][:12]}...)"
        )
        words.append("--calibration SRC")
    lines.append(f"#   {' '.join(words)}")
    body: str = yaml.safe_dump(config.given(), sort_keys=False, width=10**6)
    return "\n".join(lines) + "\n" + body
