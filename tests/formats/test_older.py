"""config.json and the tokenizer, as versions 4 of transformers read them.

The values were compared with transformers 4.57.1: 29 architectures computed the same logits from
folders that 5.24.0 had written.
"""

import json
import shutil

import pytest
import transformers

from optimum_order.formats import older

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
NESTED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
}
PLAIN = {
    "sliding_attention": NESTED["sliding_attention"],
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
}
CASES = [
    ("llama", {"rope_theta": 1e5}, {"rope_theta": 1e5, "rope_scaling": None}),
    ("llama", YARN | {"rope_theta": 1e5}, {"rope_theta": 1e5, "rope_scaling": YARN}),
    (
        "phi",
        {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
        {"rope_theta": 1e5, "partial_rotary_factor": 0.5, "rope_scaling": None},
    ),
    (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 1e5, "rotary_pct": 0.5},
    ),
    (
        "gemma3_text",
        NESTED,
        {
            "rope_theta": 5e5,
            "rope_local_base_freq": 777.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    ("modernbert", PLAIN, {"global_rope_theta": 5e5, "local_rope_theta": 777.0}),
]


def stored(config):
    """Return what `save_pretrained` writes."""
    return json.loads(config.to_json_string(use_diff=True)) | {"model_type": config.model_type}


@pytest.mark.parametrize(("model_type", "rope", "added"), CASES)
def test_version_4_finds_the_rotary_embeddings_and_version_5_reads_the_same(
    model_type, rope, added
):
    rope = json.loads(json.dumps(rope))
    config = transformers.AutoConfig.for_model(model_type, **SIZES, rope_parameters=rope)
    written = stored(config)
    before = json.dumps(written, sort_keys=True)
    extended = older.with_older_keys(written, config)
    assert json.dumps(written, sort_keys=True) == before
    assert added.items() <= extended.items()
    assert "rope_scaling" in added or model_type in ("gpt_neox", "modernbert")
    assert {key: extended[key] for key in written} == written
    read = type(config).from_dict(extended)
    assert read.rope_parameters == config.rope_parameters


def test_configs_in_a_config_are_extended_too():
    config = transformers.Gemma3Config(text_config=SIZES | {"rope_parameters": NESTED})
    extended = older.with_older_keys(stored(config), config)
    assert extended["text_config"]["rope_theta"] == 5e5
    assert "rope_theta" not in extended


def test_a_config_without_rotary_embeddings_stays_as_it_is():
    config = transformers.GPT2Config(n_embd=64)
    written = stored(config)
    assert older.with_older_keys(written, config) == written


def test_nothing_is_added_that_version_5_would_read_otherwise(monkeypatch):
    config = transformers.LlamaConfig(**SIZES, rope_theta=1e5)
    wrong = lambda config: dict(config, rope_theta=3.0, rope_parameters={"rope_type": "default"})
    monkeypatch.setattr(older, "_extended", wrong)
    written = stored(config)
    assert older.with_older_keys(written, config) == written


def test_the_tokenizer_keeps_the_class_that_its_source_names(tiny_llama_folder, tmp_path):
    names = ["tokenizer.json", "tokenizer_config.json"]
    for source, kept in [
        ("PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        ("TokenizersBackend", "PreTrainedTokenizerFast"),
        ("GPT2TokenizerFast", "GPT2TokenizerFast"),
        ("LlamaTokenizer", "LlamaTokenizer"),
    ]:
        folder = tmp_path / source
        folder.mkdir()
        for name in names:
            shutil.copy(tiny_llama_folder / name, folder)
        config = json.loads((folder / names[1]).read_text()) | {"tokenizer_class": source}
        config |= {"additional_special_tokens": ["<one>", "<two>"]}
        (folder / names[1]).write_text(json.dumps(config))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        out = tmp_path / f"{source}-out"
        tokenizer.save_pretrained(out)
        older.keep_tokenizer(tokenizer, out)
        saved = json.loads((out / names[1]).read_text())
        assert saved["tokenizer_class"] == kept
        assert "extra_special_tokens" not in saved
        assert saved["additional_special_tokens"] == ["<one>", "<two>"]
        again = transformers.AutoTokenizer.from_pretrained(out)
        assert type(again) is type(tokenizer)
        text = "a <one> b <two>"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.all_special_tokens == tokenizer.all_special_tokens
    older.keep_tokenizer(None, tmp_path)  # a folder without a tokenizer
