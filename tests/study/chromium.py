"""A real browser for the tests of the report."""

import fcntl
import json
import os
import re
import select
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Opens what is folded; returns the pictures that did not load, and what is wider than the window.
LOOK = """(() => {
  document.querySelectorAll("details").forEach(details => details.open = true);
  const outside = [...document.body.querySelectorAll("*")].filter(element => {
    const box = element.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1);
  });
  const broken = [...document.images].filter(image => !image.complete || !image.naturalWidth);
  const say = element => element.tagName + ": " + element.textContent.trim().slice(0, 30);
  const style = getComputedStyle(document.body);
  return {
    broken: broken.map(image => image.alt),
    wider: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    outside: outside.slice(0, 5).map(say),
    window: innerWidth, pictures: document.images.length,
    text: style.color, back: style.backgroundColor,
  };
})()"""


class Browser:
    """Chromium without a window, driven by the DevTools protocol: JSON between zero bytes.

    Args:
        profile: An empty folder.
    """

    def __init__(self, profile):
        their_input, our_output = os.pipe()
        our_input, their_output = os.pipe()
        # out of the way of 3 and 4
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (their_input, their_output)]
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-pipe", "about:blank"],
            stderr=subprocess.DEVNULL,
            pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
        )
        for descriptor in (their_input, their_output, *high):
            os.close(descriptor)
        self.output = os.fdopen(our_output, "wb")
        self.input = os.fdopen(our_input, "rb")
        self.sent = 0
        self.rest = b""
        self.events = []
        self.session = {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": session["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def close(self):
        self.process.kill()
        self.process.wait()
        self.output.close()
        self.input.close()

    def ask(self, method, **parameters):
        """Send a command and return its result."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters, **self.session}
        self.output.write(json.dumps(message).encode() + b"\0")
        self.output.flush()
        answer = self.until(lambda event: event.get("id") == self.sent)
        assert "error" not in answer, answer
        return answer["result"]

    def until(self, wanted):
        """Read events up to a wanted one and return it."""
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.input], [], [], 60)[0], "the browser says nothing"
                piece = os.read(self.input.fileno(), 2**20)
                assert piece, "the browser has gone"
                self.rest += piece
            text, self.rest = self.rest.split(b"\0", 1)
            event = json.loads(text)
            self.events.append(event)
            if wanted(event):
                return event

    def see(self, page, width, scheme="light"):
        """Open a page; return broken pictures, what is too wide, errors, and requests to others.

        Args:
            page: An HTML file.
            width: Of the window.
            scheme: "light" or "dark".
        """
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.ask("Page.navigate", url=page.as_uri())
        if not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.until(lambda event: event.get("method") == "Page.loadEventFired")
        result = self.ask("Runtime.evaluate", expression=LOOK, returnByValue=True)["result"]
        seen = result["value"]
        assert seen.pop("window") == width
        assert seen.pop("pictures") == page.read_text().count("<img ")
        text, back = (
            sum(int(part) for part in re.findall(r"\d+", seen.pop(key))) for key in ("text", "back")
        )
        assert abs(text - back) > 400, "text that can be told from its background"
        assert (back > 380) == (scheme == "light")
        errors = []
        for event in self.events:
            method = event.get("method")
            details = event.get("params", {})
            if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                errors.append(json.dumps(details))
            elif method == "Network.requestWillBeSent":
                url = details["request"]["url"]
                errors += [] if url.startswith(("file:", "data:")) else [url]
        return seen | {"errors": errors}
