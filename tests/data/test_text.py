"""Sources, windows and draws; and that no text ever leaks into what a user sees."""

import json
import logging
import re
import traceback
import zipfile

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from optimum_order.data.text import docstrings, load, reference_topics, standard_library_docstrings
from optimum_order.errors import DataError

SECRET = "Zanzibar"  # stands for the user's text in everything that must fail


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    return AutoTokenizer.from_pretrained(tiny_llama_folder)


@pytest.fixture
def without_bos(tiny_llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.bos_token = None
    return tokenizer


def rows(windows):
    return {tuple(row) for row in windows.ids.tolist()}


class TestEvaluationWindows:
    def test_are_the_text_in_order_each_after_bos(self, tokenizer, prose):
        windows = load([prose], tokenizer, samples=None, length=32, purpose="evaluation")
        expected = tokenizer(prose, add_special_tokens=False, verbose=False)["input_ids"]
        assert windows.ids.dtype == torch.int64 and windows.ids.shape[1] == 32
        assert (windows.ids[:, 0] == tokenizer.bos_token_id).all()
        content = windows.ids[:, 1:].flatten().tolist()
        assert content == expected[: len(content)]
        assert 0 <= windows.dropped < 31 and len(content) + windows.dropped == len(expected)
        assert windows.tokens == windows.ids.numel()

    def test_without_bos_the_first_token_is_text(self, without_bos, prose):
        windows = load([prose], without_bos, samples=None, length=32, purpose="evaluation")
        expected = without_bos(prose, add_special_tokens=False, verbose=False)["input_ids"]
        assert windows.ids.flatten().tolist() == expected[: windows.tokens]

    def test_documents_are_joined_by_blank_lines(self, tokenizer):
        one = load(
            ["alpha " * 9, "beta " * 9], tokenizer, samples=None, length=8, purpose="evaluation"
        )
        other = load(
            ["alpha " * 9 + "\n\n" + "beta " * 9],
            tokenizer,
            samples=None,
            length=8,
            purpose="evaluation",
        )
        assert one.digest == other.digest

    def test_samples_takes_the_first(self, tokenizer, prose):
        few = load([prose], tokenizer, samples=3, length=32, purpose="evaluation", seed=7)
        every = load([prose], tokenizer, samples=None, length=32, purpose="evaluation")
        assert torch.equal(few.ids, every.ids[:3])
        assert few.dropped == every.dropped + 31 * (len(every.ids) - 3)

    @pytest.mark.parametrize("text", ["Plain words only. ", "Größe 日本語 🎉 naïve. "])
    def test_bytes_are_those_of_the_predicted_tokens(self, tokenizer, without_bos, text):
        for reader in (tokenizer, without_bos):
            windows = load([text * 40], reader, samples=None, length=20, purpose="evaluation")
            # byte-level tokens of the test vocabulary spell bytes, so a cut inside a character is worth up to 3
            spelled = sum(
                len(reader.backend_tokenizer.id_to_token(i))
                for i in windows.ids[:, 1:].flatten().tolist()
            )
            slack = 0 if text.isascii() else 3 * len(windows.ids)
            assert abs(windows.bytes - spelled) <= slack
            assert windows.bytes > 0.8 * len((text * 40).encode()) * 19 / 20

    def test_all_bytes_are_counted_when_nothing_is_dropped(self, tokenizer):
        text = "Größe 日本語 🎉"
        length = 1 + len(tokenizer(text, add_special_tokens=False)["input_ids"])
        windows = load([text], tokenizer, samples=None, length=length, purpose="evaluation")
        assert windows.bytes == len(text.encode()) and windows.dropped == 0

    def test_bytes_of_what_a_tokenizer_strips_are_counted(self):
        words = Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        reader = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=None)
        windows = load(["two  one   two    "], reader, samples=None, length=3, purpose="evaluation")
        assert windows.ids.tolist() == [[1, 0, 1]] and windows.bytes == len("  one   two    ")


class TestCalibrationWindows:
    def test_draws_of_one_seed_are_disjoint_and_cover_the_text(self, tokenizer, prose):
        every = load([prose], tokenizer, samples=None, length=32)
        assert len(rows(every)) == len(every.ids), (
            "the text must not repeat for this test to mean anything"
        )
        size = len(every.ids) // 3
        draws = [rows(load([prose], tokenizer, samples=size, length=32, draw=k)) for k in range(3)]
        assert all(len(draw) == size for draw in draws)
        assert len(draws[0] | draws[1] | draws[2]) == 3 * size and set.union(*draws) <= rows(every)

    def test_no_draw_beyond_the_text(self, tokenizer, prose):
        count = len(load([prose], tokenizer, samples=None, length=32).ids)
        with pytest.raises(
            DataError, match=f"{count} windows, enough for 2 disjoint draws of {count // 2}"
        ):
            load([prose], tokenizer, samples=count // 2, length=32, draw=2)

    def test_the_seed_decides(self, tokenizer, prose):
        one, same, other = (
            load([prose], tokenizer, samples=8, length=32, seed=seed) for seed in (1, 1, 2)
        )
        assert one.digest == same.digest and torch.equal(one.ids, same.ids)
        assert one.digest != other.digest and rows(one) != rows(other)
        first = load([prose], tokenizer, samples=8, length=32, purpose="evaluation")
        assert rows(one) != rows(first), "windows are drawn, not taken from the front"

    def test_documents_are_separated(self, tokenizer, without_bos):
        texts = ["one two three", "four five", "six"]
        for reader, separator in (
            (tokenizer, tokenizer.bos_token_id),
            (without_bos, without_bos.eos_token_id),
        ):
            pieces = reader(texts, add_special_tokens=False)["input_ids"]
            stream = [*pieces[0], separator, *pieces[1], separator, *pieces[2]]
            begin = [] if reader is without_bos else [reader.bos_token_id]
            windows = load(texts, reader, samples=1, length=len(stream) + len(begin))
            assert windows.ids[0].tolist() == begin + stream
            assert windows.dropped == 0

    def test_blank_documents_are_left_out(self, tokenizer):
        given = load(["one two", "", " \n", "three"], tokenizer, samples=None, length=4)
        assert given.digest == load(["one two", "three"], tokenizer, samples=None, length=4).digest

    def test_fewer_than_asked_for_are_given_with_a_note(self, tokenizer, text_file, prose):
        few = load(text_file, tokenizer, samples=10**6, length=64)
        assert few.digest == load([prose], tokenizer, samples=len(few.ids), length=64).digest
        assert few.note == f"prose.txt has {len(few.ids)} windows, 1000000 were asked for"
        assert load(text_file, tokenizer, samples=4, length=64).note == ""

    def test_of_a_large_corpus_a_stretch_is_read(self, tokenizer, monkeypatch):
        texts = [f"document number {n}" for n in range(100)]
        monkeypatch.setattr("optimum_order.data.text._MOST_CHARACTERS", 200)
        found = set()
        for seed in range(4):
            windows = load(texts, tokenizer, samples=None, length=40, seed=seed)
            numbers = {
                int(n)
                for text in tokenizer.batch_decode(windows.ids)
                for n in re.findall(r"number (\d\d)", text)
            }
            assert 4 <= len(numbers) <= 12, (
                "200 characters are 11 documents, and the last window is not full"
            )
            found |= numbers
        assert len(found) > 15, "each seed reads elsewhere"
        assert load(texts, tokenizer, samples=None, length=8, purpose="evaluation").bytes > 1500

    def test_no_word_about_long_texts(self, tiny_llama_folder, prose, caplog, recwarn):
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder, model_max_length=16)
        logger = logging.getLogger("transformers")  # does not propagate to where caplog listens
        logger.addHandler(caplog.handler)
        try:
            load([prose], tokenizer, samples=2, length=64)
            load([prose], tokenizer, samples=2, length=64, purpose="evaluation")
            assert not caplog.records and not recwarn.list
            tokenizer(prose)
            assert "longer than" in caplog.text, "the tokenizer must be one that complains"
        finally:
            logger.removeHandler(caplog.handler)

    def test_a_tokenizer_without_offsets(self):
        windows = load(["some text " * 20], ByT5Tokenizer(), samples=None, length=16)
        assert windows.bytes is None and windows.ids.shape == (12, 16)

    def test_special_tokens_are_never_added_twice(self, tiny_llama_folder, prose):
        plain = AutoTokenizer.from_pretrained(tiny_llama_folder)
        adding = AutoTokenizer.from_pretrained(tiny_llama_folder)
        adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        assert adding("word")["input_ids"][0] == 0, (
            "the tokenizer must add BOS by itself for this test to mean anything"
        )
        assert (
            load([prose], adding, samples=4, length=32).digest
            == load([prose], plain, samples=4, length=32).digest
        )


class TestWindows:
    def test_batches_are_all_windows_in_order(self, tokenizer, prose):
        windows = load([prose], tokenizer, samples=7, length=32)
        batches = [batch["input_ids"] for batch in windows.batches(3)]
        assert [tuple(batch.shape) for batch in batches] == [(3, 32), (3, 32), (1, 32)]
        assert torch.equal(torch.cat(batches), windows.ids)

    def test_the_digest_covers_ids_and_shape(self):
        def digest(ids, length):
            return load(ids, None, samples=None, length=length, purpose="evaluation").digest

        ids = torch.arange(12)
        digests = {digest(ids, 3), digest(ids, 4), digest(ids, 6), digest(ids.flip(0), 6)}
        assert len(digests) == 4 and all(len(digest) == 64 for digest in digests)
        assert digest(ids, 6) == digest(ids.int(), 6)


class TestSources:
    def reference(self, tokenizer, texts):
        return load(texts, tokenizer, samples=None, length=8).digest

    texts = ("the first document of three", "the second document", "and the third one")

    def check(self, source, tokenizer, name):
        windows = load(source, tokenizer, samples=None, length=8)
        assert windows.digest == self.reference(tokenizer, list(self.texts))
        assert windows.source == name

    def test_list(self, tokenizer):
        assert load(self.texts, tokenizer, samples=None, length=8).source == "3 documents in memory"

    def test_txt_is_one_document_and_its_folder_is_not_named(self, tokenizer, tmp_path):
        (tmp_path / "a.txt").write_text("\ufeff" + self.texts[0], encoding="utf-8")
        windows = load(tmp_path / "a.txt", tokenizer, samples=None, length=8)
        assert (
            windows.digest == self.reference(tokenizer, [self.texts[0]])
            and windows.source == "a.txt"
        )

    @pytest.mark.parametrize(
        "column, source", [("text", "a.jsonl"), ("body", "a.jsonl"), ("body", "A.JSONL:body")]
    )
    def test_jsonl(self, tokenizer, tmp_path, column, source):
        lines = [json.dumps({"id": n, column: text}) for n, text in enumerate(self.texts)]
        lines.insert(1, "")
        lines.append(json.dumps({"id": 9, column: None}))
        (tmp_path / source.split(":")[0]).write_text("\n".join(lines), encoding="utf-8")
        self.check(str(tmp_path / source), tokenizer, source)

    @pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
    @pytest.mark.parametrize(
        "column, source", [("text", "a.parquet"), ("body", "a.parquet"), ("body", "a.parquet:body")]
    )
    def test_parquet(self, tokenizer, tmp_path, column, source, kind):
        table = pyarrow.table(
            {"id": [1, 2, 3, 4], column: pyarrow.array([*self.texts, None], kind)}
        )
        parquet.write_table(table, tmp_path / "a.parquet")
        self.check(str(tmp_path / source), tokenizer, source)

    def test_text_wins_over_other_columns(self, tokenizer, tmp_path):
        line = {"title": "no", "text": self.texts[0]}
        (tmp_path / "a.jsonl").write_text(json.dumps(line), encoding="utf-8")
        found = load(tmp_path / "a.jsonl", tokenizer, samples=None, length=8)
        assert found.digest == self.reference(tokenizer, [self.texts[0]])

    def test_ids(self):
        ids = torch.arange(40).view(5, 8)
        for given in (ids, ids.int(), ids.flatten()):
            windows = load(given, None, samples=None, length=8, purpose="evaluation")
            assert (
                torch.equal(windows.ids, ids)
                and windows.bytes is None
                and windows.source == "ids in memory"
            )
        drawn = load(ids, None, samples=2, length=8)
        assert rows(drawn) < set(map(tuple, ids.tolist()))

    def test_a_processor_with_a_tokenizer(self, tokenizer, prose):
        class Processor:
            pass

        processor = Processor()
        processor.tokenizer = tokenizer
        assert (
            load([prose], processor, samples=2, length=8).digest
            == load([prose], tokenizer, samples=2, length=8).digest
        )

    def test_builtin(self, tokenizer):
        calibration = load("builtin", tokenizer, samples=64, length=64)
        evaluation = load("builtin", tokenizer, samples=None, length=64, purpose="evaluation")
        assert (
            calibration.ids.shape == (64, 64)
            and calibration.note == ""
            and calibration.dropped > 10**5
        )
        assert calibration.source == evaluation.source == "builtin"
        joined = "\n\n".join(reference_topics())
        assert (
            evaluation.digest
            == load([joined], tokenizer, samples=None, length=64, purpose="evaluation").digest
        )
        assert 0.99 * len(joined.encode()) < evaluation.bytes <= len(joined.encode())


class TestDatasets:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def folder(self, tmp_path):
        folder = tmp_path / "corpus"
        for split, word in (("train", "learning"), ("test", "testing")):
            (folder / "data").mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"title": f"{n}", "text": f"{word} number {n}"}) for n in range(20)]
            (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder

    def text(self, windows, tokenizer):
        return tokenizer.decode(windows.ids.flatten())

    def test_the_purpose_chooses_the_split(self, folder, tokenizer):
        calibration = load(str(folder), tokenizer, samples=None, length=16)
        evaluation = load(str(folder), tokenizer, samples=None, length=16, purpose="evaluation")
        assert "learning" in self.text(calibration, tokenizer) and "testing" in self.text(
            evaluation, tokenizer
        )
        assert "testing" not in self.text(calibration, tokenizer)
        assert calibration.source == "corpus", "the folder it lies in is nobody's business"

    def test_config_split_and_column(self, folder, tokenizer):
        windows = load(f"{folder}:default:test[:5]:title", tokenizer, samples=1, length=8)
        assert windows.source == "corpus:default:test[:5]:title"
        assert self.text(windows, tokenizer).replace("<s>", " ").split() == list("0123")

    @pytest.mark.parametrize(
        "rest, message",
        [
            ("::nope", "nope"),
            (":nope", "nope"),
            (":::nope", "no column 'nope' of text.*are: title, text"),
            (":a:b:c:d", r"id\[:config\]"),
        ],
    )
    def test_what_is_not_there(self, folder, tokenizer, rest, message):
        with pytest.raises(DataError, match=message):
            load(f"{folder}{rest}", tokenizer, samples=1, length=8)

    def test_no_split_for_the_purpose(self, folder, tokenizer):
        (folder / "data" / "test.jsonl").unlink()
        with pytest.raises(
            DataError, match=r"no split 'test' or 'validation' for evaluation.*are: train"
        ):
            load(str(folder), tokenizer, samples=1, length=8, purpose="evaluation")

    def test_the_hub_out_of_reach(self, tokenizer):
        with pytest.raises(
            DataError, match=r"'nobody/nothing:en' is no file here.*Couldn't reach"
        ) as caught:
            load("nobody/nothing:en", tokenizer, samples=1, length=8)
        assert "\n" not in str(caught.value)


class TestErrors:
    """One line that says what to do, and nothing of the text: not even in the chain of causes."""

    @staticmethod
    def fail(source, tokenizer, match, **options):
        with pytest.raises(DataError, match=match) as caught:
            load(source, tokenizer, **{"samples": 1, "length": 64} | options)
        assert "\n" not in str(caught.value)
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
    def test_too_short(self, tokenizer, tmp_path, purpose):
        file = tmp_path / "a.txt"
        file.write_text(f"{SECRET} is short", encoding="utf-8")
        count = len(tokenizer(f"{SECRET} is short", add_special_tokens=False)["input_ids"])
        match = rf"a.txt has {count} tokens of text, and one window of 64 needs 63.*at most {count + 1}\."
        self.fail(file, tokenizer, match, purpose=purpose)
        assert load(file, tokenizer, samples=1, length=count + 1, purpose=purpose).ids.shape == (
            1,
            count + 1,
        )

    @pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
    @pytest.mark.parametrize("content", ["", " \n\n "])
    def test_empty(self, tokenizer, tmp_path, content, purpose):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
        for file in ("a.txt", "a.jsonl"):
            self.fail(tmp_path / file, tokenizer, f"{file} has 0 tokens of text", purpose=purpose)
        self.fail([], tokenizer, "0 documents in memory has 0 tokens", purpose=purpose)

    def test_missing(self, tokenizer, tmp_path):
        self.fail(tmp_path / "a.txt", tokenizer, "a.txt' does not exist")
        self.fail(tmp_path / "nowhere" / "at_all", tokenizer, "at_all' does not exist")
        (tmp_path / "b.txt").mkdir()
        self.fail(tmp_path / "b.txt", tokenizer, "is a folder")

    def test_unknown_extension(self, tokenizer, tmp_path):
        (tmp_path / "a.csv").write_text(SECRET, encoding="utf-8")
        self.fail(tmp_path / "a.csv", tokenizer, r"'a.csv' is not a .txt, .jsonl or .parquet file")

    def test_encoding(self, tokenizer, tmp_path):
        for file in ("a.txt", "a.jsonl"):
            (tmp_path / file).write_bytes(SECRET.encode() + b"\xff\xfe")
            self.fail(
                tmp_path / file, tokenizer, f"'{file}' is not UTF-8 text: see byte {len(SECRET)}"
            )

    def test_lone_surrogates(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": SECRET + "\ud800"}), encoding="utf-8")
        self.fail(tmp_path / "a.jsonl", tokenizer, "lone surrogates")

    @pytest.mark.parametrize("line", [SECRET, f'["{SECRET}"]', f'{{"text": "{SECRET}"'])
    def test_bad_json(self, tokenizer, tmp_path, line):
        (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
        self.fail(tmp_path / "a.jsonl", tokenizer, "'a.jsonl', line 2: expected a JSON object")

    def test_a_row_that_is_no_text(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_text(
            f'{{"text": "{SECRET}"}}\n{{"text": ["{SECRET}"]}}', encoding="utf-8"
        )
        self.fail(tmp_path / "a.jsonl", tokenizer, "line 2: 'text' must be a string, got list")

    @pytest.mark.parametrize("file", ["a.jsonl", "a.parquet"])
    def test_columns(self, tokenizer, tmp_path, file):
        def write(**columns):
            if file == "a.jsonl":
                (tmp_path / file).write_text(
                    json.dumps({k: v[0] for k, v in columns.items()}), encoding="utf-8"
                )
            else:
                parquet.write_table(pyarrow.table(columns), tmp_path / file)

        write(title=[SECRET], body=[SECRET], year=[1])
        self.fail(
            tmp_path / file, tokenizer, "has several columns of text.*title, body; others: year"
        )
        self.fail(f"{tmp_path / file}:year", tokenizer, "has no column 'year' of text")
        self.fail(f"{tmp_path / file}:nope", tokenizer, "has no column 'nope' of text")
        write(year=[1])
        self.fail(
            tmp_path / file, tokenizer, "has no column 'text' of text.*are: none; others: year"
        )

    def test_damaged_parquet(self, tokenizer, tmp_path):
        with zipfile.ZipFile(tmp_path / "a.parquet", "w") as archive:
            archive.writestr("a", SECRET)
        self.fail(tmp_path / "a.parquet", tokenizer, "'a.parquet' is not a parquet file")

    def test_a_column_of_plain_text(self, tokenizer, text_file):
        self.fail(f"{text_file}:body", tokenizer, "no column 'body'")

    def test_no_tokenizer(self, prose):
        self.fail([prose], None, "needs a tokenizer")
        self.fail([prose], object(), "needs a tokenizer")

    def test_a_text_in_place_of_its_name(self, tokenizer):
        self.fail(f"{SECRET}\nis the text", tokenizer, "Text itself is given as a list of strings")
        self.fail(SECRET * 100, tokenizer, "Text itself is given as a list of strings")
        self.fail(" ", tokenizer, "an empty name")

    @pytest.mark.parametrize("source", [3, None, [1, 2], {"text": SECRET}])
    def test_no_source_at_all(self, tokenizer, source):
        self.fail(source, tokenizer, "Data is a .txt, .jsonl or .parquet path")

    @pytest.mark.parametrize(
        "ids, match",
        [
            (torch.rand(64), "must be integers, got a tensor of torch.float32"),
            (torch.ones(64, dtype=torch.bool), "must be integers"),
            (
                torch.ones(2, 63, dtype=torch.long),
                r"must be \(tokens,\) or \(samples, 64\).*got \(2, 63\)",
            ),
            (torch.full((2, 64), -100), "must not be negative, got -100"),
            (
                torch.ones(63, dtype=torch.long),
                "has 63 tokens of text, and one window of 64 needs 64",
            ),
            (torch.empty(0, dtype=torch.long), "has 0 tokens"),
        ],
    )
    def test_ids(self, ids, match):
        self.fail(ids, None, match)

    @pytest.mark.parametrize("options", [{"samples": 0}, {"length": 1}, {"draw": -1}])
    def test_settings(self, tokenizer, prose, options):
        self.fail(
            [prose],
            tokenizer,
            "samples of 1 or more, a length of 2 or more and a draw of 0 or more",
            **options,
        )


class TestBuiltin:
    def test_docstrings_of_a_file(self, tmp_path):
        file = tmp_path / "a.py"
        file.write_text(
            '"""Module."""\nclass A:\n    """Class \\d."""\n    async def f(self):\n        """Method."""\n'
        )
        assert list(docstrings(file)) == ["Module.", "Class \\d.", "Method."]
        file.write_text("def f(:\n")
        assert list(docstrings(file)) == []

    def test_the_standard_library_is_read_in_one_order_without_its_tests(
        self, tmp_path, monkeypatch
    ):
        for file in (
            "b.py",
            "a/z.py",
            "a/c.py",
            "test/t.py",
            "a/tests/t.py",
            "site-packages/s.py",
            "pydoc_data/p.py",
        ):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(
                f'"""In {file}."""\ndef f():\n    """The same everywhere."""\n'
            )
        (tmp_path / "a" / "notes.txt").write_text('"""No source."""')
        monkeypatch.setattr("sysconfig.get_path", {"stdlib": str(tmp_path)}.get)
        found = standard_library_docstrings.__wrapped__()
        assert found == ("In b.py.", "The same everywhere.", "In a/c.py.", "In a/z.py.")

    def test_the_standard_library_is_enough_for_disjoint_draws(self):
        texts = standard_library_docstrings()
        assert sum(len(text.encode()) for text in texts) > 1e6
        assert len(set(texts)) == len(texts)
        assert any("JSON (JavaScript Object Notation)" in text for text in texts)
        import pytest as outside

        assert outside.__doc__ not in texts, "installed packages are not the standard library"

    def test_evaluation_text_is_not_calibrated_on(self):
        calibration = {
            line.strip() for text in standard_library_docstrings() for line in text.splitlines()
        }
        lines = [
            line.strip()
            for text in reference_topics()
            for line in text.splitlines()
            if len(line.strip()) >= 40
        ]
        assert len(lines) > 1000
        assert sum(line in calibration for line in lines) < 0.01 * len(lines)
