"""What a study leaves to read: that it is whole, true to its numbers, and shows well in a real browser."""

import base64
import csv
import fcntl
import html
import html.parser
import json
import os
import re
import select
import shutil
import subprocess

import pytest

from optimum_order.errors import OutputError
from optimum_order.study import report
from optimum_order.study.analysis import summarize
from optimum_order.study.trials import Trials

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = '<script>alert("x")</script> & <img src="http://example.com/x.png">'


def draws(mean, *shifts):
    return [
        [mean + shift + 0.01 * i * (-1) ** i for i in range(6)]
        for shift in shifts or (0.0, 0.004, -0.003)
    ]


def grid(simulated=False):
    """Performances, other figures and splits of a made-up study: two pruners, rtn, three stages, and blocks."""
    scores = {"original": draws(-3.0)[:1]}
    more = {"original": {"bytes": {"dense": 9_000_000}}}
    pairs = {}
    for bits, m in {2: -6.0, 3: -4.0, 4: -3.5, 5: -3.2, 6: -3.1, 8: -3.05}.items():
        scores[f"rtn:{bits}"] = draws(m)[:1]
        more[f"rtn:{bits}"] = {
            "bytes": {"compressed-tensors": 1_000_000 * bits},
            "correlation": [[1, 0.1, 0.02], [0.1, 1, -0.03], [0.02, -0.03, 1]],
        }
    for at, (p, alone) in enumerate(
        {"wanda:0.3": -3.3, "wanda:0.5": -4.5, "magnitude:0.5": -7.0}.items()
    ):
        if simulated:
            p = f"{p.split(':')[0]}(off_grid=true, sparsity={p.split(':')[1]})"
        scores[p] = draws(alone)
        more[p] = {
            "bytes": {"dense": 9_000_000, "sparse": 7_000_000},
            "sparsity": 0.5,
            "bits": 16.0,
        }
        for bits in (3, 4):
            first, second = f"{p} > rtn:{bits}", f"rtn:{bits} > {p}"
            scores[first] = draws(alone - 0.3)
            scores[second] = draws(alone - 0.3 + 0.01 * 4**at * (bits - 3.4))
            for order in (first, second):
                size = {"compressed-tensors": 1_000_000 * bits, "sparse": 700_000 * bits}
                more[order] = {"bytes": size, "sparsity": 0.5, "bits": float(bits)}
            for draw in range(3):
                pairs[f"{second} | {first}", draw] = {
                    "a": [0.3, 0.4, -0.1],
                    "b": [-0.1, -0.05, -0.05],
                }
    a, b, c = "wanda:0.4", "gptq:4", "magnitude:0.55"
    for at, order in enumerate([(a, b, c), (a, c, b), (b, a, c), (b, c, a), (c, a, b), (c, b, a)]):
        scores[" > ".join(order)] = draws(-4 - 0.1 * at)
    return scores, {"more": more, "pairs": pairs}


@pytest.fixture(scope="module")
def trials(store_trials, tmp_path_factory):
    """A study that is finished. Do not add to it."""
    scores, others = grid()
    calibration = {"source": "calm.txt", "samples": 64, "sequence_length": 512, "seed": 0}
    return store_trials(
        tmp_path_factory.mktemp("trials"), scores, **others, calibration=calibration
    )


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
    """All of a page's texts, attributes and tags."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [
            (tag, key, value)
            for key, value in attrs
            if key in ("src", "href", "srcset", "data", "action")
        ]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_everything_is_written(trials, written):
    folder, summary = written
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    groups = ("magnitude-rtn", "wanda-rtn")
    pictures = ["intensity-all", "bytes-stock", "bytes-any", "correlation", "ranking-1"]
    pictures += [f"{kind}-{group}" for kind in ("intensity", "map", "split") for group in groups]
    assert left == {
        "trials.csv",
        "summary.json",
        "report.html",
        *(f"plots/{name}.png" for name in pictures),
    }
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary == json.loads(json.dumps(summarize(trials)))


def test_a_new_report_replaces_the_old_one(trials, written, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "stale.png").write_bytes(b"")
    (tmp_path / "report.html").write_text("old")
    report.write(trials, tmp_path)
    assert not (tmp_path / "plots" / "stale.png").exists()
    assert (tmp_path / "report.html").read_bytes() == (written[0] / "report.html").read_bytes(), (
        "the same trials give the same report, byte for byte"
    )


def test_the_csv_has_a_row_for_each_trial(trials, written):
    with (written[0] / "trials.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    rows = trials.rows("trials")
    assert [(row["order"], int(row["draw"])) for row in found] == list(rows)
    for row, stored in zip(found, rows.values(), strict=True):
        assert float(row["performance"]) == stored["performance"]
        assert float(row["value"]) == stored["value"]
        assert row["bytes_sparse"] == str((stored.get("bytes") or {}).get("sparse", ""))
        assert not any("[" in value or "{" in value for value in row.values()), (
            "numbers and text, nothing nested"
        )


def test_the_page_needs_nothing_else(written):
    text = (written[0] / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert page.links and all(
        value.startswith(("data:image/png;base64,", "data:,")) for _, _, value in page.links
    )
    assert "http" not in re.sub(r"http-equiv", "", text), "no address of any kind"
    assert "url(" not in text and "@import" not in text
    inside = {
        base64.b64decode(value.partition(",")[2]) for tag, _, value in page.links if tag == "img"
    }
    assert inside == {file.read_bytes() for file in (written[0] / "plots").iterdir()}
    assert all(png.startswith(b"\x89PNG") for png in inside)


def test_the_numbers_are_those_of_the_summary(written):
    folder, summary = written
    text = Page((folder / "report.html").read_text()).text
    found = summary["all"]
    for pair in summary["pairs"]:
        assert (
            f"{pair['first']}, {pair['second']} {report.signed(pair['advantage']['mean'])}" in text
        )
    assert (
        f"In {found['pairs']} pairs the two orders differ by {found['mean_absolute_advantage']:.2g}"
        in text
    )
    assert f"The interval excludes 0 in {found['decisive']}." in text
    rho = found["spearman"]
    assert (
        f"{report.signed(rho['rho'])} [{report.signed(rho['low'])}, {report.signed(rho['high'])}]"
        in text
    )
    for entry in summary["orders"]:
        assert entry["order"].replace(" > ", " → ") in text
        assert f"{entry['performance']:.4f}".replace("-", "−") in text
    assert "made-up, 2 layers compressed" in text
    assert "64 samples of 512 tokens of calm.txt in each draw, seed 0" in text
    assert "3 (number 0, 1, 2)" in text and "On the grid" in text and "off the grid" not in text


def test_what_was_simulated_says_so(make_trials, tmp_path, no_pictures):
    scores, others = grid(simulated=True)
    report.write(make_trials(scores, **others), tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Simulated, off the grid:" in text and "cannot be saved quantised" in text
    assert "wanda × rtn, off the grid" in text and "On the grid" not in text


def test_text_from_outside_is_escaped(make_trials, tmp_path, no_pictures):
    scores, others = grid()
    broken = {"performance": None, "value": None, "error": HOSTILE}
    others["more"]["rtn:8"] = broken
    evaluation = {"source": HOSTILE, "samples": 6, "digest": ""}
    calibration = {"source": HOSTILE, "samples": 4, "seed": 0}
    trials = make_trials(
        scores, **others, model=HOSTILE, evaluation=evaluation, calibration=calibration
    )
    report.write(trials, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text and text.count(html.escape(HOSTILE, quote=False)[:20]) >= 4
    page = Page(text)
    assert "script" not in page.tags and HOSTILE in page.text
    assert not [link for link in page.links if "example.com" in link[2]]


@pytest.mark.parametrize("metric", ["accuracy", "fidelity", "somebody's own"])
def test_other_metrics_have_their_own_words(make_trials, tmp_path, no_pictures, metric):
    scores, others = grid()
    summary = report.write(make_trials(scores, **others, metric=metric), tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    assert summary["measure"]["difference"] in text and "log-perplexity" not in text
    if metric == "accuracy":
        assert f"{100 * summary['all']['mean_absolute_advantage']:.2g} points of accuracy" in text


def test_an_unfinished_study_says_what_is_missing(make_trials, tmp_path, no_pictures):
    scores, others = grid()
    trials = make_trials(scores, **others)
    trials.plan([("wanda:0.9 > rtn:4", 2)])
    report.write(trials, tmp_path)
    text = Page((tmp_path / "report.html").read_text()).text
    done = len(trials.rows("trials")) - 1
    assert f"not finished: {done} of {done + 1} trials" in text.replace("</b>", "")
    assert "wanda:0.9 → rtn:4, draw 2" in text


@pytest.mark.parametrize("count", [0, 1, 4, 9, 14, 20])
def test_a_study_cut_anywhere_has_a_report(trials, tmp_path, count):
    part = Trials(tmp_path / "part", trials.settings)
    part.add({("trials", *key): row for key, row in list(trials.rows("trials").items())[:count]})
    summary = report.write(part, tmp_path / "part")
    text = Page((tmp_path / "part" / "report.html").read_text()).text
    assert len(summary["orders"]) == len({order for order, _ in part.rows("trials")} - {"original"})
    if not summary["pairs"]:
        assert "nothing to compare" in text


def test_a_folder_that_cannot_be_written(trials, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the trials are kept"):
        report.write(trials, tmp_path / "file" / "study")


def test_findings_are_careful_where_there_is_little(make_trials):
    one = {
        "wanda:0.5 > rtn:4": draws(-4),
        "rtn:4 > wanda:0.5": draws(-4.001, -0.1, 0.0, 0.1),
        "wanda:0.5": draws(-3.5),
        "rtn:4": draws(-3)[:1],
    }
    found = dict(report.findings(summarize(make_trials(one))))
    assert "no difference is shown" in found["Does the order matter?"]
    assert "cannot say" in found["Is it better to apply the weaker method first?"]


def test_findings_follow_the_numbers(trials):
    summary = summarize(trials)
    rule, rho = summary["all"]["rules"]["weaker_first"], summary["all"]["spearman"]

    def verdict(right, low, high):
        rule["right"], rho["low"], rho["high"] = right, low, high
        return dict(report.findings(summary))["Is it better to apply the weaker method first?"]

    assert rule["decisive"] >= 5
    assert verdict(0.9, 0.1, 0.8).startswith("Yes")
    assert verdict(0.9, -0.1, 0.8).startswith("Only in part")
    assert verdict(0.4, -0.1, 0.8).startswith("No,")
    assert verdict(0.9, -0.8, -0.1).startswith("No,")


# In a real browser

FINE = {"broken": [], "wider": 0, "outside": [], "errors": []}

# Opens what is folded, then says which pictures did not load, and what is wider than the window.
LOOK = """(() => {
  document.querySelectorAll("details").forEach(each => each.open = true);
  const outside = [...document.body.querySelectorAll("*")].filter(each => {
    const box = each.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1);
  });
  return {
    broken: [...document.images].filter(each => !each.complete || !each.naturalWidth).map(each => each.alt),
    wider: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    outside: outside.slice(0, 5).map(each => each.tagName + ": " + each.textContent.trim().slice(0, 30)),
    window: innerWidth, pictures: document.images.length,
    text: getComputedStyle(document.body).color, back: getComputedStyle(document.body).backgroundColor,
  };
})()"""


class Browser:
    """Chromium without a window, spoken to by its DevTools protocol: JSON between zero bytes, on two pipes."""

    def __init__(self, profile):
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [
            fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)
        ]  # out of the way of 3 and 4
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-pipe", "about:blank"],
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self.out, self.inp, self.sent = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb"), 0
        self.rest, self.events, self.session = b"", [], {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.inp.close()

    def ask(self, method, **parameters):
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters, **self.session}
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        answer = self.until(lambda found: found.get("id") == self.sent)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, wanted):
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.inp], [], [], 60)[0], "the browser says nothing"
                piece = os.read(self.inp.fileno(), 2**20)
                assert piece, "the browser has gone"
                self.rest += piece
            text, self.rest = self.rest.split(b"\0", 1)
            found = json.loads(text)
            self.events.append(found)
            if wanted(found):
                return found

    def see(self, page, width, scheme="light"):
        """What it makes of a page: pictures that do not load, what is too wide, errors, and what it asks of others."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.ask(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.until(lambda event: event.get("method") == "Page.loadEventFired")
        found = self.ask("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]["value"]
        assert found.pop("window") == width
        assert found.pop("pictures") == page.read_text().count("<img ")
        colours = [
            [int(part) for part in re.findall(r"\d+", found.pop(key))] for key in ("text", "back")
        ]
        assert abs(sum(colours[0]) - sum(colours[1])) > 400, (
            "text that can be told from its background"
        )
        assert (sum(colours[1]) > 380) == (scheme == "light")
        errors = []
        for event in self.events:
            method, about = event.get("method"), event.get("params", {})
            if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                errors.append(json.dumps(about))
            elif method == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
                ("file:", "data:")
            ):
                errors.append(about["request"]["url"])
        return found | {"errors": errors}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("there is no chromium here")
    browser = Browser(tmp_path_factory.mktemp("profile"))
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
            p = f"sparsegpt(damping=0.015, off_grid=true, sparsity=0.{sparsity})"
            for group in (16, 32):
                q = f"gptq(act_order=true, bits=4, group_size={group}, symmetric=false)"
                scores |= {f"{p} > {q}": draws(-4), f"{q} > {p}": draws(-4.1)}
        scores |= {f"{p} > {q} > wanda:0.9": draws(-5), f"{q} > {p} > wanda:0.9": draws(-6)}
        report.write(make_trials(scores, model="an-organisation/" + 90 * "a"), tmp_path)
        for width in (1280, 400):
            assert browser.see(tmp_path / "report.html", width) == FINE

    def test_what_does_not_show_well_would_be_seen(self, browser, written, tmp_path):
        text = (written[0] / "report.html").read_text()
        bad = '<img alt="bad" src="data:image/png;base64,AAAA"><p style="width: 500px">wide</p>'
        bad += '<img alt="far" src="http://127.0.0.1:9/x.png">'
        (tmp_path / "bad.html").write_text(text.replace("</body>", f"{bad}</body>"))
        found = browser.see(tmp_path / "bad.html", 400)
        assert (
            found["broken"] == ["bad", "far"]
            and found["wider"] > 50
            and found["outside"]
            and found["errors"]
        )
