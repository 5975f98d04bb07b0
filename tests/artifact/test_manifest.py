"""The manifest is sealed with its digest; reading any file is an error of ours or a success."""

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.artifact import manifest
from optimum_order.errors import ArtifactError

GOOD = {
    "schema": 1,
    "order": "wanda:0.5 > gptq:4",
    "stages": [],
    "schedule": "stage",
    "format": "dense",
    "base_model": {},
    "layers": {},
    "bytes": {},
    "files": {},
    "versions": {},
    "metrics": {},
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def test_written_and_read_back(tmp_path):
    sealed = manifest.write(GOOD, tmp_path)
    assert manifest.load(tmp_path) == sealed and manifest.digest(sealed) == sealed["digest"]


def test_the_digest_is_of_the_content_not_its_spelling():
    assert manifest.digest(dict(reversed(GOOD.items()))) == manifest.digest(GOOD)
    assert manifest.digest(GOOD | {"seed": 1}) != manifest.digest(GOOD)
    assert manifest.digest(GOOD | {"digest": "x"}) == manifest.digest(GOOD)


def test_a_newer_schema_asks_for_an_upgrade(tmp_path):
    manifest.write(GOOD | {"schema": manifest.SCHEMA + 1}, tmp_path)
    with pytest.raises(ArtifactError, match="Upgrade"):
        manifest.load(tmp_path)


def test_no_manifest_and_missing_keys(tmp_path):
    with pytest.raises(ArtifactError, match="not a folder that optimum-order wrote"):
        manifest.load(tmp_path)
    for key in GOOD:
        manifest.write({k: v for k, v in GOOD.items() if k != key}, tmp_path)
        with pytest.raises(ArtifactError, match=key):
            manifest.load(tmp_path)


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b"[" * 100_000, b'{"schema": NaN}'])
)
def test_any_file_is_an_error_of_ours(content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, manifest.FILE).write_bytes(content)
        with pytest.raises(ArtifactError):
            manifest.load(folder)


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(sorted(GOOD)), value=JSON)
def test_any_value_is_read_or_refused(key, value):
    with tempfile.TemporaryDirectory() as folder:
        manifest.write(GOOD | {key: value}, Path(folder))
        with contextlib.suppress(ArtifactError):
            assert manifest.load(folder)[key] == value
