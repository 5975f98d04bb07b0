"""Sources and windows of text; no text ever leaks into a message."""

import itertools
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

from optimum_order import JointCompressor
from optimum_order.data import text as module
from optimum_order.data.builtin import reference_topics
from optimum_order.data.splits import Split
from optimum_order.data.text import load
from optimum_order.errors import DataError

SECRET = "Zanzibar"  # stands for the user's text in everything that must fail
PURPOSES = ("calibration", "evaluation")


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

    def test_bytes_are_those_of_the_predicted_tokens(self, tokenizer, without_bos):
        texts = ["Plain words only. ", "Größe 日本語 🎉 naïve. "]
        for reader, text in itertools.product((tokenizer, without_bos), texts):
            windows = load([text * 40], reader, samples=None, length=20, purpose="evaluation")
            # tokens of the test vocabulary spell bytes: a cut inside a character is up to 3
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
    def test_more_windows_of_a_seed_begin_with_fewer(self, tokenizer, prose):
        """Draws are blocks of one permutation, which covers the whole text."""
        every = load([prose], tokenizer, samples=None, length=32)
        assert len(rows(every)) == len(every.ids), "the text must not repeat for this test"
        few = load([prose], tokenizer, samples=8, length=32)
        assert torch.equal(few.ids, every.ids[:8])
        evaluation = load([prose], tokenizer, samples=None, length=32, purpose="evaluation")
        assert rows(evaluation) == rows(every) and not torch.equal(evaluation.ids, every.ids)

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
        texts = ["one two", "", " \n", "three"]
        windows = load(texts, tokenizer, samples=None, length=4)
        plain = load(["one two", "three"], tokenizer, samples=None, length=4)
        assert windows.digest == plain.digest

    def test_fewer_than_asked_for_are_given_with_a_note(self, tokenizer, text_file, prose):
        few = load(text_file, tokenizer, samples=10**6, length=64)
        assert few.digest == load([prose], tokenizer, samples=len(few.ids), length=64).digest
        assert few.note == f"prose.txt has {len(few.ids)} windows, 1000000 were asked for"
        assert load(text_file, tokenizer, samples=4, length=64).note == ""

    def test_of_a_large_corpus_a_stretch_is_read(self, tokenizer, monkeypatch):
        texts = [f"document number {n}" for n in range(100)]
        monkeypatch.setattr("optimum_order.data.text._MOST_CHARACTERS", 200)
        documents = set()
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
            documents |= numbers
        assert len(documents) > 15, "each seed reads elsewhere"
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

    def test_jsonl(self, tokenizer, tmp_path):
        for column, source in [("text", "a.jsonl"), ("body", "a.jsonl"), ("body", "A.JSONL:body")]:
            lines = [json.dumps({"id": n, column: text}) for n, text in enumerate(self.texts)]
            lines.insert(1, "")
            lines.append(json.dumps({"id": 9, column: None}))
            (tmp_path / source.split(":")[0]).write_text("\n".join(lines), encoding="utf-8")
            self.check(str(tmp_path / source), tokenizer, source)

    def test_parquet(self, tokenizer, tmp_path):
        sources = [("text", "a.parquet"), ("body", "a.parquet"), ("body", "a.parquet:body")]
        kinds = (pyarrow.string(), pyarrow.large_string())
        for (column, source), kind in itertools.product(sources, kinds):
            texts = pyarrow.array([*self.texts, None], kind)
            parquet.write_table(
                pyarrow.table({"id": [1, 2, 3, 4], column: texts}), tmp_path / "a.parquet"
            )
            self.check(str(tmp_path / source), tokenizer, source)

    def test_text_wins_over_other_columns(self, tokenizer, tmp_path):
        line = {"title": "no", "text": self.texts[0]}
        (tmp_path / "a.jsonl").write_text(json.dumps(line), encoding="utf-8")
        windows = load(tmp_path / "a.jsonl", tokenizer, samples=None, length=8)
        assert windows.digest == self.reference(tokenizer, [self.texts[0]])

    def test_ids(self):
        ids = torch.arange(40).view(5, 8)
        for source in (ids, ids.int(), ids.flatten()):
            windows = load(source, None, samples=None, length=8, purpose="evaluation")
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

    @pytest.mark.slow
    def test_builtin(self, tokenizer, monkeypatch):
        monkeypatch.setattr("optimum_order.data.text._MOST_CHARACTERS", 2**20)
        calibration = load("builtin", tokenizer, samples=64, length=64)
        evaluation = load("builtin", tokenizer, samples=None, length=64, purpose="evaluation")
        assert calibration.ids.shape == (64, 64) and calibration.note == ""
        assert calibration.dropped > 10**5
        assert calibration.source == evaluation.source == "builtin"
        joined = "\n\n".join(reference_topics())
        assert 0.99 * len(joined.encode()) < evaluation.bytes <= len(joined.encode())
        whole = load([joined], tokenizer, samples=None, length=64, purpose="evaluation")
        assert evaluation.digest == whole.digest


class TestDatasets:
    def test_split_and_column_are_read(self, tokenizer, tmp_path, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        folder = tmp_path / "corpus"
        folder.mkdir()
        for split, word in (("train", "learning"), ("test", "testing")):
            lines = [json.dumps({"title": f"{n}", "text": f"{word} {n}"}) for n in range(20)]
            (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")

        def text(source, purpose):
            windows = load(source, tokenizer, samples=None, length=8, purpose=purpose)
            return windows.source, tokenizer.decode(windows.ids.flatten())

        for purpose, word, other in [
            ("calibration", "learning", "testing"),
            ("evaluation", "testing", "learning"),
        ]:
            name, content = text(str(folder), purpose)
            assert name == "corpus" and word in content and other not in content
        name, content = text(f"{folder}:default:test[:5]:title", "calibration")
        assert name == "corpus:default:test[:5]:title"
        assert content.replace("<s>", " ").split() == list("0123")
        with pytest.raises(DataError, match=r"no column 'nope' of text.*are: title, text"):
            text(f"{folder}:::nope", "calibration")

    def streamed(self, count, column="text", make=lambda n: f"document number {n}"):
        """A dataset that comes row by row, and the rows that were asked for."""
        import datasets

        pulled = []

        def generate():
            for number in range(count):
                pulled.append(number)
                yield {"id": f"a{number}", column: make(number)}

        return datasets.IterableDataset.from_generator(generate), pulled

    def test_of_a_hub_dataset_only_what_is_needed_is_read(self, tokenizer, monkeypatch):
        import datasets

        asked = []

        def load_dataset(*args, **options):
            asked.append((args, options))
            return {"train": data, "validation": data}

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr("optimum_order.data.text._STREAMED_CHARACTERS", 2000)
        monkeypatch.setattr("optimum_order.data.text._SHUFFLED_ROWS", 50)
        data, pulled = self.streamed(10**6)
        windows = load("c4", tokenizer, samples=4, length=16)
        assert asked == [(("allenai/c4", "en"), {"split": None, "streaming": True})]
        assert windows.source == "c4" and len(windows) == 4
        assert 100 < len(pulled) < 400, "of a million documents"
        draws = load("c4", tokenizer, samples=8, length=16)
        assert torch.equal(draws.ids[:4], windows.ids), "more samples only add to fewer"
        other = load("c4", tokenizer, samples=4, length=16, seed=1)
        assert other.digest != windows.digest
        long = load("c4", tokenizer, samples=100, length=16)
        assert len(long) == 100, "a longer stretch for more tokens"
        first = load("c4", tokenizer, samples=2, length=16, purpose="evaluation")
        assert tokenizer.decode(first.ids[0]).startswith("<s>document number 0\n\nd")

    def test_a_stream_that_breaks_is_one_line(self, tokenizer):
        def make(number):
            if number == 99:
                raise RuntimeError(SECRET)
            return "two words"

        data, _ = self.streamed(200, make=make)
        TestErrors.fail(data, tokenizer, "'a dataset in memory' could not be read to its end: Run")

    def test_a_folder_that_save_to_disk_wrote(self, tokenizer, tmp_path):
        import datasets

        texts = [f"document number {n}" for n in range(99)]
        data = datasets.Dataset.from_dict({"id": [f"a{n}" for n in range(99)], "body": texts})
        data.save_to_disk(tmp_path / "one")
        datasets.DatasetDict(train=data, other=data.select([0])).save_to_disk(tmp_path / "splits")
        expected = load(texts, tokenizer, samples=None, length=8).digest
        for source in ("one", "one:::body", "splits", "splits::train", "splits::train:body"):
            windows = load(str(tmp_path / source), tokenizer, samples=None, length=8)
            assert windows.digest == expected and windows.source == source
        assert load(data, tokenizer, samples=None, length=8).digest == expected
        few = load(str(tmp_path / "splits::other"), tokenizer, samples=None, length=4)
        assert few.dropped + few.ids[:, 1:].numel() < 20
        message = "has the splits train, other, got 'nope'"
        TestErrors.fail(str(tmp_path / "splits::nope"), tokenizer, message)
        splits = datasets.DatasetDict(train=data)
        TestErrors.fail(splits, tokenizer, r"has the splits train\. Give one of them")

    def test_conversations_of_a_dataset(self, tokenizer, tmp_path, monkeypatch):
        import datasets

        turns = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a tree"}]
        data = datasets.Dataset.from_dict({"id": ["a7f3"] * 70, "conversations": [turns] * 70})
        data.save_to_disk(tmp_path / "chats")
        monkeypatch.setattr(
            tokenizer,
            "chat_template",
            "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}",
        )
        windows = load(str(tmp_path / "chats"), tokenizer, samples=None, length=32)
        text = tokenizer.decode(windows.ids[0])
        assert "user: what is it assistant: a tree" in text and "a7f3" not in text


class TestErrors:
    """One line that says what to do, and nothing of the text: not even in the chain of causes."""

    @staticmethod
    def fail(source, tokenizer, match, **options):
        with pytest.raises(DataError, match=match) as caught:
            load(source, tokenizer, **{"samples": 1, "length": 64} | options)
        assert "\n" not in str(caught.value)
        assert SECRET not in "".join(traceback.format_exception(caught.value))

    def test_too_short(self, tokenizer, tmp_path):
        file = tmp_path / "a.txt"
        file.write_text(f"{SECRET} is short", encoding="utf-8")
        count = len(tokenizer(f"{SECRET} is short", add_special_tokens=False)["input_ids"])
        needed = rf"a.txt has {count} tokens of text, and one window of 64 needs 63"
        for purpose in PURPOSES:
            advice = rf"{needed}.*at most {count + 1}\."
            self.fail(file, tokenizer, advice, purpose=purpose)
            windows = load(file, tokenizer, samples=1, length=count + 1, purpose=purpose)
            assert windows.ids.shape == (1, count + 1)

    def test_empty(self, tokenizer, tmp_path):
        for content, purpose in itertools.product(["", " \n\n "], PURPOSES):
            for name in ("a.txt", "a.jsonl"):
                (tmp_path / name).write_text(content, encoding="utf-8")
                message = f"{name} has 0 tokens of text"
                self.fail(tmp_path / name, tokenizer, message, purpose=purpose)
            self.fail([], tokenizer, "0 documents in memory has 0 tokens", purpose=purpose)

    def test_missing(self, tokenizer, tmp_path):
        self.fail(tmp_path / "a.txt", tokenizer, "a.txt' does not exist")
        self.fail(tmp_path / "nowhere" / "at_all", tokenizer, "at_all' does not exist")
        (tmp_path / "b.txt").mkdir()
        self.fail(tmp_path / "b.txt", tokenizer, "is a folder")

    def test_unknown_extension(self, tokenizer, tmp_path):
        (tmp_path / "a.xml").write_text(SECRET, encoding="utf-8")
        self.fail(tmp_path / "a.xml", tokenizer, r"'a.xml' is not a .txt, .csv, .*.parquet file")

    def test_encoding(self, tokenizer, tmp_path):
        for file in ("a.txt", "a.jsonl"):
            (tmp_path / file).write_bytes(SECRET.encode() + b"\xff\xfe")
            self.fail(
                tmp_path / file, tokenizer, f"'{file}' is not UTF-8 text: see byte {len(SECRET)}"
            )

    def test_lone_surrogates(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": SECRET + "\ud800"}), encoding="utf-8")
        self.fail(tmp_path / "a.jsonl", tokenizer, "lone surrogates")

    def test_bad_json(self, tokenizer, tmp_path):
        for line in (SECRET, f'["{SECRET}"]', f'{{"text": "{SECRET}"'):
            (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
            self.fail(tmp_path / "a.jsonl", tokenizer, "'a.jsonl', line 2: expected a JSON object")

    def test_a_row_that_is_no_text(self, tokenizer, tmp_path):
        (tmp_path / "a.jsonl").write_text(
            f'{{"text": "{SECRET}"}}\n{{"text": ["{SECRET}"]}}', encoding="utf-8"
        )
        self.fail(tmp_path / "a.jsonl", tokenizer, "line 2: the text must be a string, got list")

    def test_columns(self, tokenizer, tmp_path):
        def write(file, **columns):
            if file.suffix == ".jsonl":
                row = {name: values[0] for name, values in columns.items()}
                file.write_text(json.dumps(row), encoding="utf-8")
            else:
                parquet.write_table(pyarrow.table(columns), file)

        for file in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
            write(file, title=[SECRET], body=[SECRET], year=[1])
            self.fail(file, tokenizer, "has several columns of text.*title, body; others: year")
            self.fail(f"{file}:year", tokenizer, "has no column 'year' of text")
            self.fail(f"{file}:nope", tokenizer, "has no column 'nope' of text")
            write(file, year=[1])
            self.fail(file, tokenizer, "has no column 'text' of text.*are: none; others: year")

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

    def test_no_source_at_all(self, tokenizer):
        for source in (3, None, [1, 2], {"text": SECRET}):
            self.fail(
                source, tokenizer, "Data is a .txt, .csv, .tsv, .json, .jsonl or .parquet path"
            )

    def test_ids(self):
        long = torch.long
        for ids, message in [
            (torch.rand(64), "must be integers, got a tensor of torch.float32"),
            (torch.ones(64, dtype=torch.bool), "must be integers"),
            (torch.ones(2, 63, dtype=long), r"be \(tokens,\) or \(samples, 64\).*got \(2, 63\)"),
            (torch.full((2, 64), -100), "must not be negative, got -100"),
            (torch.ones(63, dtype=long), "63 tokens of text, and one window of 64 needs 64"),
            (torch.empty(0, dtype=long), "has 0 tokens"),
        ]:
            self.fail(ids, None, message)

    def test_settings(self, tokenizer, prose):
        message = "samples of 1 or more and a length of 2 or more"
        self.fail([prose], tokenizer, message, samples=0)
        self.fail([prose], tokenizer, message, length=1)


def test_the_literature_reads_one_stream_with_the_special_tokens_of_the_tokenizer(monkeypatch):
    """As GPTQ's code does: all lines, empty ones too, joined by blank lines and tokenized at once."""
    rows = ["", " = Title = \n", "", *(f"line {number} of the text \n" for number in range(900))]
    asked = []

    def load_split(source, purpose, alternative):
        asked.append(source)
        return Split("wikitext2::test", {"text": rows}, None)

    monkeypatch.setattr(module, "load_split", load_split)
    monkeypatch.setattr(module, "_LITERATURE_LENGTH", 64)
    tokenizer = JointCompressor.from_pretrained("tiny-llama").source.processor
    windows = load("literature", tokenizer, samples=None, length=512, purpose="evaluation")
    stream = tokenizer("\n\n".join(rows))["input_ids"]
    count = len(stream) // 64
    assert asked == ["wikitext2::test"] and windows.source == "literature"
    assert windows.ids.tolist() == torch.tensor(stream[: count * 64]).view(count, 64).tolist()
    assert len(load("literature", tokenizer, samples=2, length=9, purpose="evaluation")) == 2
    with pytest.raises(DataError, match="nobody calibrates on it"):
        load("literature", tokenizer, samples=2, length=64)
    with pytest.raises(DataError, match="needs a tokenizer"):
        load("literature", None, samples=2, length=64, purpose="evaluation")
