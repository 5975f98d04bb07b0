"""What a study leaves to read: whole, true to its numbers, and fit for a real browser."""

import base64
import csv
import hashlib
import html
import html.parser
import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from optimum_order.errors import OutputError
from optimum_order.study import report
from optimum_order.study.analysis import summarize
from optimum_order.study.trials import Trials

HOSTILE = '<script>alert("x")</script> & <img src="http://example.com/x.png">'


def draws(mean, *shifts):
    return [
        [mean + shift + 0.01 * i * (-1) ** i for i in range(6)]
        for shift in shifts or (0.0, 0.004, -0.003)
    ]


def made_up(simulated=False):
    """Return performances, other figures and splits of a study with pictures of every kind."""
    scores = {"original": draws(-3.0)[:1]}
    more = {"original": {"bytes": {"dense": 9_000_000}}}
    pairs = {}
    for bits, m in {2: -6.0, 3: -4.0, 4: -3.5, 5: -3.2, 6: -3.1, 8: -3.05}.items():
        scores[f"rtn:{bits}"] = draws(m)[:1]
        more[f"rtn:{bits}"] = {
            "bytes": {"compressed-tensors": 1_000_000 * bits},
            "correlation": [[1, 0.1, 0.02], [0.1, 1, -0.03], [0.02, -0.03, 1]],
        }
    pruners = {"wanda:0.3": -3.3, "wanda:0.5": -4.5, "magnitude:0.5": -7.0, "wanda:0.65": -6.0}
    for number, (pruner, alone) in enumerate(pruners.items()):
        if simulated:
            name, sparsity = pruner.split(":")
            pruner = f"{name}(off_grid=true, sparsity={sparsity})"
        scores[pruner] = draws(alone)
        sizes = {"dense": 9_000_000, "sparse": 7_000_000}
        more[pruner] = {"bytes": sizes, "sparsity": 0.5, "bits": 16.0}
        for bits in (3, 4):
            first = f"{pruner} > rtn:{bits}"
            second = f"rtn:{bits} > {pruner}"
            scores[first] = draws(alone - 0.3)
            scores[second] = draws(alone - 0.3 + 0.01 * 4**number * (bits - 3.4))
            if (number, bits) == (1, 3):
                scores[second] = draws(alone - 0.3, -0.1, 0.0, 0.12)  # not decisive
            for order in (first, second):
                sizes = {"compressed-tensors": 1_000_000 * bits, "sparse": 700_000 * bits}
                more[order] = {"bytes": sizes, "sparsity": 0.5, "bits": float(bits)}
            for draw in range(3):
                layers = {"a": [0.3, 0.4, -0.1], "b": [-0.1, -0.05, -0.05]}
                pairs[f"{second} | {first}", draw] = layers
    a, b, c = "wanda:0.4", "gptq:4", "magnitude:0.55"
    permutations = [(a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a)]
    for number, order in enumerate(permutations):
        scores[" > ".join(order)] = draws(-4 - 0.1 * number)
    return scores, {"more": more, "pairs": pairs}


@pytest.fixture(scope="module")
def trials(store_trials, tmp_path_factory):
    """A finished study. Do not add to it."""
    scores, others = made_up()
    calibration = {"source": "calm.txt", "samples": 64, "sequence_length": 512, "seed": 0}
    folder = tmp_path_factory.mktemp("trials")
    settings = {"device": "cpu", "threads": 2, "dtype": "bfloat16"}
    settings |= {"versions": {"torch": "2.13.0", "transformers": "5.1"}}
    settings |= {"revision": None, "adapter": None, "targets": None, "ignore": None}
    settings |= {"calibration": calibration}
    stored = store_trials(folder, scores, **others, **settings)
    stored.note_command("optimum-order study made-up out")
    return stored


@pytest.fixture(scope="module")
def written(trials, tmp_path_factory):
    """The folder of its report, and its summary."""
    folder = tmp_path_factory.mktemp("written")
    return folder, report.write(trials, folder)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave the pictures out, which take most of the time."""
    monkeypatch.setattr(report.plots, "draw", lambda summary: [])


class Page(html.parser.HTMLParser):
    """All texts, attributes and tags of a page."""

    def __init__(self, text):
        super().__init__()
        self.texts = []
        self.tags = []
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = ("src", "href", "srcset", "data", "action")
        self.links += [(tag, key, value) for key, value in attrs if key in names]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def read(folder):
    return Page((folder / "report.html").read_text())


def test_everything_is_written(trials, written):
    folder, summary = written
    # magnitude has two pairs only
    pictures = ["intensity-all", "bytes-stock", "bytes-any", "correlation", "ranking-1"]
    pictures += [f"{kind}-wanda-rtn" for kind in ("intensity", "map", "split")]
    expected = {"trials.csv", "summary.json", "report.html"}
    expected |= {f"plots/{name}.{end}" for name in pictures for end in ("png", "svg", "csv")}
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == expected
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary == json.loads(json.dumps(summarize(trials)))


def test_a_new_report_replaces_the_old_one(trials, written, tmp_path):
    """The same trials give the same report, byte for byte."""
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "stale.png").write_bytes(b"")
    (tmp_path / "plots" / "notes.txt").write_bytes(b"of somebody")
    (tmp_path / "report.html").write_text("old")
    report.write(trials, tmp_path)
    assert not (tmp_path / "plots" / "stale.png").exists()
    assert (tmp_path / "plots" / "notes.txt").exists()
    for file in written[0].rglob("*.*"):
        assert (tmp_path / file.relative_to(written[0])).read_bytes() == file.read_bytes()


def test_the_csv_has_a_row_for_each_trial(trials, written):
    with (written[0] / "trials.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = trials.rows("trials")
    assert [(line["order"], int(line["draw"])) for line in table] == list(rows)
    for line, row in zip(table, rows.values(), strict=True):
        assert float(line["performance"]) == row["performance"]
        assert float(line["value"]) == row["value"]
        assert line["bytes_sparse"] == str((row.get("bytes") or {}).get("sparse", ""))
        nested = [value for value in line.values() if "[" in value or "{" in value]
        assert nested == [], "numbers and text"


def test_the_page_needs_nothing_else(written):
    text = (written[0] / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}';" in policy, "no other script may run"
    assert "iframe" not in page.tags
    assert page.links
    inside = ("data:image/png;base64,", "data:,")
    assert all(value.startswith(inside) for _, _, value in page.links)
    assert "http" not in re.sub(r"http-equiv", "", text), "no address of any kind"
    assert "url(" not in text
    assert "@import" not in text
    pictures = {
        base64.b64decode(value.partition(",")[2]) for tag, _, value in page.links if tag == "img"
    }
    assert pictures == {file.read_bytes() for file in (written[0] / "plots").glob("*.png")}
    assert all(png.startswith(b"\x89PNG") for png in pictures)


def test_the_numbers_are_those_of_the_summary(written):
    folder, summary = written
    text = read(folder).text
    figures = summary["all"]
    for pair in summary["pairs"]:
        advantage = report.signed(pair["advantage"]["mean"])
        assert f"{pair['first']}, {pair['second']} {advantage}" in text
    size = f"{figures['mean_absolute_advantage']:.2g}"
    assert f"In {figures['pairs']} pairs the two orders differ by {size}" in text
    assert f"The interval excludes 0 in {figures['decisive']}." in text
    rho, low, high = (report.signed(figures["spearman"][key]) for key in ("rho", "low", "high"))
    assert f"{rho} [{low}, {high}]" in text
    for entry in summary["orders"]:
        assert entry["order"].replace(" > ", " → ") in text
        assert f"{entry['performance']:.4f}".replace("-", "−") in text
    assert "made-up, 2 layers compressed" in text
    assert "64 samples of 512 tokens of calm.txt in each draw, seed 0" in text
    assert "3 (number 0, 1, 2)" in text
    assert "On the grid" in text
    assert "off the grid" not in text


def test_the_user_is_answered_first(written):
    """What to use stands before all symbols, whose meaning stands before their first use."""
    folder, summary = written
    text = read(folder).text
    model = summary["recommendation"]["model"]
    assert model["order"] == "rtn:8"
    assert f"What to use: {model['order']} {report.advice(summary)}" in text
    assert "8 MB, 89 % of the original, for a loss of 0.05 in log-perplexity" in text
    places = ["What to use", "The models to choose from", "What the order is worth", "A(Q → P)"]
    places += ["Does the order matter?", "Methods"]
    assert [text.find(place) for place in places] == sorted(text.find(place) for place in places)
    for model in summary["models"][:-1]:
        assert " ".join(model["command"].split()) in text
    assert summary["models"][-1]["order"] == "original"


def test_the_page_tells_what_a_manifest_tells(written):
    text = read(written[0]).text
    assert "computed in bfloat16 on cpu, 2 threads" in text
    assert "versions torch 2.13.0, transformers 5.1" in text
    assert "command optimum-order study made-up out" in text


def test_beside_each_picture_are_its_numbers(written):
    folder, summary = written
    with (folder / "plots" / "map-wanda-rtn.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = {(pair["first"], pair["second"]): pair["advantage"] for pair in summary["pairs"]}
    assert len(rows) == 6
    for row in rows:
        advantage = pairs[row["first"], row["second"]]
        assert float(row["advantage"]) == advantage["mean"]
        assert row["decisive"] == str(advantage["decisive"])
    with (folder / "plots" / "bytes-stock.csv").open(newline="") as file:
        rows = {row["order"]: row for row in csv.DictReader(file)}
    models = {entry["order"]: entry for entry in summary["orders"]}
    for name in ("rtn:4", "wanda:0.3 > rtn:3"):
        assert float(rows[name]["shown"]) == pytest.approx(math.exp(-models[name]["performance"]))
    svg = (folder / "plots" / "bytes-stock.svg").read_text()
    assert svg.startswith("<?xml") and "<svg" in svg


def test_what_was_simulated_says_so(make_trials, tmp_path, no_pictures):
    scores, others = made_up(simulated=True)
    report.write(make_trials(scores, **others), tmp_path)
    text = read(tmp_path).text
    assert "Simulated, off the grid:" in text
    assert "cannot be saved quantized" in text
    assert "wanda × rtn, off the grid" in text
    assert "On the grid" not in text


def test_text_from_outside_is_escaped(make_trials, tmp_path, no_pictures):
    scores, others = made_up()
    others["more"]["rtn:8"] = {"performance": None, "value": None, "error": HOSTILE}
    evaluation = {"source": HOSTILE, "samples": 6, "digest": ""}
    calibration = {"source": HOSTILE, "samples": 4, "seed": 0}
    settings = {"model": HOSTILE, "evaluation": evaluation, "calibration": calibration}
    report.write(make_trials(scores, **others, **settings), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<script") == 1, "that of the page alone"
    assert text.count(html.escape(HOSTILE, quote=False)[:20]) >= 4
    page = Page(text)
    assert page.tags.count("script") == 1
    assert HOSTILE in page.text
    assert not [link for link in page.links if "example.com" in link[2]]


def test_other_metrics_have_their_own_words(store_trials, tmp_path, no_pictures):
    scores, others = made_up()
    for metric in ("accuracy", "fidelity", "somebody's own"):
        folder = tmp_path / metric
        summary = report.write(store_trials(folder, scores, **others, metric=metric), folder)
        text = read(folder).text
        assert summary["measure"]["difference"] in text
        assert "log-perplexity" not in text
        if metric == "accuracy":
            size = f"{100 * summary['all']['mean_absolute_advantage']:.2g}"
            assert f"{size} points of accuracy" in text


def test_an_unfinished_study_says_what_is_missing(make_trials, tmp_path, no_pictures):
    scores, others = made_up()
    trials = make_trials(scores, **others)
    trials.plan([("wanda:0.9 > rtn:4", 2)])
    report.write(trials, tmp_path)
    text = read(tmp_path).text
    done = len(trials.rows("trials")) - 1
    assert f"not finished: {done} of {done + 1} trials" in text.replace("</b>", "")
    assert "wanda:0.9 → rtn:4, draw 2" in text


def test_a_study_cut_anywhere_has_a_report(trials, tmp_path):
    rows = [(("trials", *key), row) for key, row in trials.rows("trials").items()]
    for count in (0, 1, 9, 20):
        part = Trials(tmp_path / str(count), trials.settings)
        part.add(dict(rows[:count]))
        summary = report.write(part, part.folder)
        orders = {order for order, _ in part.rows("trials")} - {"original"}
        assert len(summary["orders"]) == len(orders)
        if not summary["pairs"]:
            assert "nothing to compare" in read(part.folder).text


def test_a_folder_that_cannot_be_written(trials, tmp_path, no_pictures):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the trials are kept"):
        report.write(trials, tmp_path / "file" / "study")


def test_findings_are_careful_where_there_is_little(make_summary):
    orders = {
        "wanda:0.5 > rtn:4": draws(-4),
        "rtn:4 > wanda:0.5": draws(-4.001, -0.1, 0.0, 0.1),
        "wanda:0.5": draws(-3.5),
        "rtn:4": draws(-3)[:1],
    }
    findings = dict(report.findings(make_summary(orders)))
    assert "no difference is shown" in findings["Does the order matter?"]
    assert "cannot say" in findings["Is it better to apply the weaker method first?"]


def test_findings_follow_the_numbers(trials):
    summary = summarize(trials)
    rule = summary["all"]["rules"]["weaker_first"]
    rho = summary["all"]["spearman"]

    def verdict(right, low, high):
        rule["right"] = right
        rho["low"] = low
        rho["high"] = high
        return dict(report.findings(summary))["Is it better to apply the weaker method first?"]

    assert rule["decisive"] >= 5
    assert verdict(0.9, 0.1, 0.8).startswith("Yes")
    assert verdict(0.9, -0.1, 0.8).startswith("Only in part")
    assert verdict(0.4, -0.1, 0.8).startswith("No,")
    assert verdict(0.9, -0.8, -0.1).startswith("No,")


# In a real browser

FINE = {"broken": [], "wider": 0, "outside": [], "errors": []}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    file = Path(__file__).with_name("chromium.py")
    spec = importlib.util.spec_from_file_location("chromium", file)
    chromium = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chromium)
    if not chromium.CHROMIUM:
        pytest.skip("there is no chromium here")
    browser = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.browser
class TestBrowser:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 400])
    def test_the_report_shows_well(self, browser, written, width, scheme):
        assert browser.see(written[0] / "report.html", width, scheme) == FINE

    def test_long_orders_and_many_pairs_fit(self, browser, make_trials, tmp_path):
        scores = {}
        for sparsity in range(10, 95, 5):
            pruner = f"sparsegpt(damping=0.015, off_grid=true, sparsity=0.{sparsity})"
            for group in (16, 32):
                quantizer = f"gptq(act_order=true, bits=4, group_size={group}, symmetric=false)"
                first = f"{pruner} > {quantizer}"
                second = f"{quantizer} > {pruner}"
                scores |= {first: draws(-4), second: draws(-4.1)}
        scores |= {f"{first} > wanda:0.9": draws(-5), f"{second} > wanda:0.9": draws(-6)}
        report.write(make_trials(scores, model="an-organization/" + 90 * "a"), tmp_path)
        for width in (1280, 400):
            assert browser.see(tmp_path / "report.html", width) == FINE

    def test_a_click_on_a_heading_sorts(self, browser, written):
        browser.see(written[0] / "report.html", 1280)

        def column(click, number):
            """Click on a heading of the models; return what its cells hold."""
            script = """(() => {
              const table = document.querySelector("table.sortable");
              table.querySelectorAll("th button")[CLICK].click();
              return [...table.tBodies[0].rows].map(row => row.cells[NUMBER].dataset.value);
            })()"""
            script = script.replace("CLICK", str(click)).replace("NUMBER", str(number))
            result = browser.ask("Runtime.evaluate", expression=script, returnByValue=True)
            return [float(value) for value in result["result"]["value"]]

        values = column(1, 1)
        assert values == sorted(values) and len(set(values)) > 3
        assert column(1, 1) == values[::-1]
        sizes = column(3, 3)
        assert sizes == sorted(sizes)

    def test_another_script_does_not_run(self, browser, written, tmp_path):
        text = (written[0] / "report.html").read_text()
        bad = "<script>document.title = 'bad'</script>"
        (tmp_path / "bad.html").write_text(text.replace("</body>", f"{bad}</body>"))
        assert browser.see(tmp_path / "bad.html", 1280)["errors"]
        result = browser.ask("Runtime.evaluate", expression="document.title", returnByValue=True)
        assert result["result"]["value"] != "bad"

    def test_what_does_not_show_well_would_be_seen(self, browser, written, tmp_path):
        text = (written[0] / "report.html").read_text()
        bad = '<img alt="bad" src="data:image/png;base64,AAAA"><p style="width: 500px">wide</p>'
        bad += '<img alt="far" src="http://127.0.0.1:9/x.png">'
        (tmp_path / "bad.html").write_text(text.replace("</body>", f"{bad}</body>"))
        seen = browser.see(tmp_path / "bad.html", 400)
        assert seen["broken"] == ["bad", "far"]
        assert seen["wider"] > 50
        assert seen["outside"]
        assert seen["errors"]
