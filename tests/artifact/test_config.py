"""`recipe.yaml`: options in a file, of known or unknown origin."""

import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.artifact import config
from optimum_order.artifact.config import ARGUMENTS, RUN, Config
from optimum_order.errors import OrderError


@pytest.fixture
def read(tmp_path):
    """Read a recipe of this text."""

    def read(text):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return config.read(tmp_path / "recipe.yaml")

    return read


def test_options_are_read_by_either_spelling(read, tmp_path):
    recipe = read(
        "order: wanda:0.5 > gptq:4\ncalibration-samples: 4\nfor: vllm\nmax_loss: 0.03\n"
        "targets: ['*.q_proj']\nunproven: true\nseed: null\n"
    )
    assert recipe.given() == {
        "order": "wanda:0.5 > gptq:4",
        "calibration_samples": 4,
        "engine": "vllm",
        "max_loss": 0.03,
        "targets": ["*.q_proj"],
        "unproven": True,
    }
    assert config.read(tmp_path) == recipe, "a folder that holds one will do"
    assert repr(recipe).startswith("Config(order='wanda:0.5 > gptq:4', max_loss=")
    assert read("") == Config()


BAD = [
    ("ordr: rtn:4", "Unknown option 'ordr'. Did you mean 'order'?"),
    ("- rtn:4", "must hold options by name"),
    ("order: 4", "'order' input should be a valid string, got '4'. Put text in quotes."),
    ("revision: 123", "Put text in quotes"),
    ("seed: '4'", "'seed' input should be a valid integer"),
    ("seed: true", "'seed' input should be a valid integer"),
    ("targets: q_proj", "'targets' input should be a valid list"),
    ("targets: [1]", "'targets.0' input should be a valid string"),
    ("targets: [*.q_proj]", "begins a reference"),
    ("order: &a rtn:4\nformat: *a", "in line 2: '*' begins a reference"),
    ("order: rtn:4\norder: rtn:3", "'order' stands there twice"),
    ("max-loss: 1.0\nmax_loss: 2.0", "'max_loss' twice"),
    ("order: [", "is no YAML in line"),
    ("order: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ("a: " + "[" * 20_000, "nested too deep"),
    ("token: hf_secret", "a token does not belong in a file"),
    ("trust-remote-code: true", "give --trust-remote-code"),
    ("output: out", "given on the command line"),
    ("x" * 300_000, "longer than 262144 bytes"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_what_is_no_recipe_is_one_line(read, text, message):
    with pytest.raises(OrderError) as error:
        read(text)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "hf_secret" not in str(error.value)


def test_what_is_no_text_is_one_line(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OrderError, match="no UTF-8 text"):
        config.read(tmp_path)
    with pytest.raises(OrderError, match="cannot be read: No such file"):
        config.read(tmp_path / "missing.yaml")


TEXT = st.text(string.printable, min_size=1, max_size=40) | st.text(min_size=1, max_size=20)
TEXT = TEXT.filter(lambda text: all(c == " " or c.isprintable() for c in text))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "order": TEXT,
            "calibration": TEXT,
            "seed": st.integers(0, 9),
            "targets": st.lists(TEXT),
        },
    )
)
@settings(deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, options):
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    assert config.read(file).given() == options


@given(st.text())
@settings(deadline=None)
def test_no_text_is_any_other_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    try:
        config.read(file)
    except OrderError as error:
        assert "\n" not in str(error)


FACTS = {
    "base_model": {"id": "tiny-llama", "revision": None, "dtype": "bfloat16", "digest": "ab" * 32},
    "order": "wanda:0.5 > gptq:4",
    "schedule": "stage",
    "pause": "group",
    "targets": None,
    "ignore": ["*.o_proj"],
    "calibration": {
        "source": "builtin",
        "samples": 4,
        "sequence_length": 64,
        "dtype": "bfloat16",
        "digest": "cd" * 32,
    },
    "seed": 3,
    "format": "sparse",
}


def test_the_recipe_of_a_model_holds_what_decides_its_values(read):
    recipe = config.recipe(FACTS)
    assert recipe.given() == {
        "model": "tiny-llama",
        "dtype": "bfloat16",
        "order": "wanda:0.5 > gptq:4",
        "schedule": "stage",
        "pause": "group",
        "ignore": ["*.o_proj"],
        "calibration": "builtin",
        "calibration_samples": 4,
        "calibration_dtype": "bfloat16",
        "sequence_length": 64,
        "seed": 3,
        "format": "sparse",
    }
    assert read(config.text(FACTS)) == recipe
    assert "#   optimum-order compress OUTPUT --config recipe.yaml\n" in config.text(FACTS)


def test_what_only_the_author_has_is_a_fingerprint(read):
    private = FACTS | {
        "base_model": FACTS["base_model"] | {"id": "my\nmodel"},
        "calibration": FACTS["calibration"] | {"source": "secret-notes.txt"},
    }
    text = config.text(private)
    recipe = read(text)
    assert recipe.model is None and recipe.calibration is None and recipe.calibration_samples == 4
    assert "secret-notes" not in text and "'mymodel', sha256 of its weights abababababab" in text
    assert "compress MODEL OUTPUT --config recipe.yaml --calibration SRC" in text
    hub = FACTS | {"base_model": FACTS["base_model"] | {"id": "some/model", "revision": "c" * 40}}
    assert (config.recipe(hub).model, config.recipe(hub).revision) == ("some/model", "c" * 40)
    for public in ("wikitext2", "c4::train", "some/dataset:config"):
        named = FACTS | {"calibration": FACTS["calibration"] | {"source": public}}
        assert config.recipe(named).calibration == public


def test_a_model_that_goes_on_from_another_keeps_its_dtype():
    assert config.recipe(FACTS | {"continues": {"digest": "ef"}}).dtype is None


def test_the_length_of_a_run_without_data_is_kept():
    without = config.recipe(FACTS | {"calibration": None, "sequence_length": 96})
    assert without.sequence_length == 96 and without.calibration is None


def test_a_merged_adapter_is_no_model_of_the_hub():
    base = FACTS["base_model"] | {"id": "some/model", "revision": "c" * 40, "adapter": {"id": "x"}}
    assert config.recipe(FACTS | {"base_model": base}).model is None


def test_every_option_is_for_somebody():
    assert set(ARGUMENTS) | set(RUN) <= set(Config.model_fields)
