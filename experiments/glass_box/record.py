"""Record the page of `dsv3 serve` as an animated picture, and take the guide's pictures.

`python experiments/glass_box/record.py runs/demo` serves the demo's model and drives its page in a
headless Chromium. A rehearsal compiles all programs; what is recorded then is as fast as it came.
"""

import argparse
import base64
import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser  # noqa: E402

PORT = 8765
WIDTH, HEIGHT, CAPTION = 1320, 700, 44  # pixels; the caption is below the page
PROMPT = "class Stack:\n    def __init__(self, items):"
NEW = 72  # tokens
FONT = font_manager.findfont("DejaVu Sans")


class Camera:
    """Frames of the page, each with a caption and the time that it is shown."""

    def __init__(self, browser: Browser):
        self.browser = browser
        self.frames: list[Image.Image] = []
        self.times: list[int] = []  # milliseconds
        self.caption = ""
        self.pointer: tuple[float, float] | None = None
        self.rehearses = False

    def page(self) -> Image.Image:
        """The page as it is now."""
        picture = self.browser.send("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")

    def take(self, seconds: float) -> None:
        """Add a frame; one that equals the last one makes that one longer."""
        if self.rehearses:
            return
        frame = Image.new("RGB", (WIDTH, HEIGHT + CAPTION), "#1c1e21")
        frame.paste(self.page())
        draw = ImageDraw.Draw(frame)
        font = ImageFont.truetype(FONT, 19)
        draw.text((18, HEIGHT + 10), self.caption, fill="#ffffff", font=font)
        if self.pointer:
            x, y = self.pointer
            arrow = [(x, y), (x, y + 17), (x + 4, y + 13), (x + 11, y + 12)]
            draw.polygon(arrow, fill="#000000", outline="#ffffff")
        if self.frames and frame.tobytes() == self.frames[-1].tobytes():
            self.times[-1] += round(1000 * seconds)
        else:
            self.frames.append(frame)
            self.times.append(round(1000 * seconds))

    def follow(self, until: str, shortest: float = 0.08) -> None:
        """Take frames while the page changes, until an expression is true."""
        ends = False
        while not ends:
            begin = time.monotonic()
            ends = self.browser.run(until)
            self.take(0)
            time.sleep(max(0.0, shortest - (time.monotonic() - begin)))
            if self.times:
                self.times[-1] += round(1000 * (time.monotonic() - begin))

    def point(self, element: str, seconds: float, *, click: bool = False) -> None:
        """Move the pointer onto an element, an expression of JavaScript, and maybe click there."""
        box = f"(b => [b.left, b.top, b.width, b.height])({element}.getClientRects()[0])"
        left, top, width, height = self.browser.run(box)
        self.pointer = left + width / 2, top + height / 2
        x, y = self.pointer
        for kind in ("Moved", "Pressed", "Released")[: 3 if click else 1]:
            button = "none" if kind == "Moved" else "left"
            at = {"x": x, "y": y, "button": button, "clickCount": 1}
            self.browser.send("Input.dispatchMouseEvent", type=f"mouse{kind}", **at)
        self.browser.settle()
        self.take(seconds)

    def save(self, path: Path) -> None:
        """Write the frames as one animated picture."""
        first, *others = self.frames
        first.save(path, save_all=True, append_images=others, duration=self.times, loop=0,
                   quality=70, method=6, minimize_size=True)  # fmt: skip
        size = path.stat().st_size / 1e6
        print(f"{path}: {len(self.frames)} frames, {sum(self.times) / 1000:.0f} s, {size:.2f} MB")


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """Serve a model while the block runs. Yields the address."""
    command = [sys.executable, "-m", "dsv3_jax.cli", "serve", model, "--port", str(PORT)]
    server = subprocess.Popen([*command, "--draft", "mtp"])
    try:
        yield f"http://127.0.0.1:{PORT}/"
    finally:
        server.terminate()
        server.wait()


def open_page(browser: Browser, address: str) -> None:
    """Open the page, as soon as the server answers."""
    window = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.send("Emulation.setDeviceMetricsOverride", **window)
    ready = "document.querySelector('#layer')?.options.length > 0"
    for _ in range(600):
        browser.send("Page.navigate", url=address)
        time.sleep(0.5)
        if browser.run(ready):
            return
    raise SystemExit(f"{address} does not answer")


IDLE = "running.size === 0 && !document.querySelector('#send').disabled"
ANSWER = "[...document.querySelectorAll('.pair .tokens span:not(.before)')]"
PROMPT_END = "[...document.querySelectorAll('.pair .tokens span.before')].at(-1)"


def write_and_send(camera: Camera) -> None:
    """Type the prompt, send it, and follow the answer."""
    browser = camera.browser
    browser.run(f"document.querySelector('#ask').elements.max_tokens.value = {NEW}")
    camera.caption = "A text to continue. The model is the demo's, trained in minutes on two cores."
    for end in range(0, len(PROMPT), 6):
        browser.type("#words", PROMPT[:end])
        camera.take(0.15)
    browser.type("#words", PROMPT)
    camera.take(1.0)
    camera.caption = "Tokens stream in the colour of their first expert in layer 1."
    camera.point("document.querySelector('#send')", 0.1, click=True)
    camera.follow(IDLE)
    camera.take(3.0)


def choose_colours(camera: Camera) -> None:
    """Show each layer, then all of them, then layer 1 again."""
    select = "document.querySelector('#layer')"
    options = camera.browser.run(f"[...{select}.options].map(o => [o.value, o.textContent])")
    for value, name in [*options[1:], options[0]]:
        camera.browser.run(f"{select}.value = {json.dumps(value)}; {select}.onchange()")
        camera.caption = f"The first expert in {name}."
        if name == "all layers":
            camera.caption = (
                "All layers: a stripe below each token, from the first layer to the last."
            )
        camera.take(2.0)


def look_inside(camera: Camera) -> None:
    """Point at some tokens: an accepted draft, a rejected one, and others."""
    accepted = f"{ANSWER}.filter(s => s.matches('.accepted'))"
    rejected = f"{ANSWER}.filter(s => s.previousElementSibling?.tagName === 'S')"
    for caption, tokens in (
        ("A token's probability, five alternatives, its experts and their gates.", ANSWER),
        ("Underlined: the model's own head drafted it, and the model accepted.", accepted),
        ("A small mark: another draft was rejected here.", rejected),
    ):
        camera.caption = caption
        for index in (2, 4):
            camera.point(f"{tokens}[{index}]", 2.5)


def intervene(camera: Camera) -> None:
    """Leave an expert out behind the colon, then two more."""
    camera.caption = "A click keeps a token. This colon opens a block: the next line is indented."
    camera.point(PROMPT_END, 3.5, click=True)
    for layer, expert, caption in (
        (1, 13, "Expert 13 of layer 2 reads nearly every colon. Without it, the text goes on so:"),
        (2, 0, "Without expert 0 of layer 3, too:"),
        (0, 4, "And without expert 4 of layer 1:"),
    ):
        camera.caption = caption
        change = "document.querySelector('#change')"
        fill = f"{change}.elements.layer.value = {layer}; {change}.elements.expert.value = {expert}"
        camera.browser.run(fill)
        camera.point(f"{change}.querySelector('[value=off]')", 0.8, click=True)
        camera.follow(f"{IDLE} && document.querySelector('[role=status]').textContent !== ''")
        camera.take(3.5)
    camera.caption = "Below the texts: what the old one is worth to the changed model, in nats."
    camera.take(4.0)
    camera.caption = "And each of its tokens: the indentation behind the colon, before and after."
    camera.browser.run("close()")
    camera.point(f"{ANSWER}[0]", 5.0)


def main() -> None:
    """Rehearse, record, and write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the demo's run")
    parser.add_argument("--address", help="of a server that runs already")
    parser.add_argument("--out", type=Path, default=ROOT / "assets")
    args = parser.parse_args()
    server = contextlib.nullcontext(args.address) if args.address else serving(args.model)
    with server as address, contextlib.closing(Browser()) as browser:
        for rehearses in (True, False):
            open_page(browser, address)
            camera = Camera(browser)
            camera.rehearses = rehearses
            write_and_send(camera)
            choose_colours(camera)
            look_inside(camera)
            camera.page().save(args.out / "glass_token.png", optimize=True)
            intervene(camera)
        camera.page().save(args.out / "glass_expert_off.png", optimize=True)
        camera.save(args.out / "glass_box.webp")


if __name__ == "__main__":
    main()
