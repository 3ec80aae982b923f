"""The page of ./run.sh serve: its files by themselves, and all of it in a real browser."""

import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from test_engine import Scripted
from test_server import Running, engine_of, small  # noqa: F401

from data import Tokenizer
from inference.engine import Engine
from inference.server import FILES, PAGE, Limits

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BYTES = Tokenizer("bytes", [bytes([i]) for i in range(256)])
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;</div>"


# --- Its files


def read(name):
    return (PAGE / name).read_text(encoding="utf-8")


def test_nothing_in_it_is_inline_or_from_elsewhere():
    html = read("index.html")
    assert not re.search(r"<script(?![^>]*\ssrc=)|\sstyle=|\son\w+=|javascript:", html)
    for name, _ in FILES.values():
        addresses = set(re.findall(r"https?://[^\s\"')]+", read(name)))
        assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", read("page.js"))


def test_what_the_script_looks_for_is_there():
    html = read("index.html")
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    wanted = set(re.findall(r'\$\("([^"]+)"\)', read("page.js")))
    assert wanted and wanted <= ids
    # What labels and roles refer to
    assert set(re.findall(r'\b(?:for|aria-controls|aria-labelledby)="([^"]+)"', html)) <= ids


@pytest.mark.parametrize("path", FILES)
def test_it_is_served_with_a_strict_policy(path, small):  # noqa: F811
    with Running(engine_of(small)) as running:
        status, headers, body = running.call(path)
        name, kind = FILES[path]
        assert status == 200 and body == (PAGE / name).read_bytes()
        assert headers["Content-Type"].startswith(kind)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


# --- In a browser


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium here")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Function of a server and of the context's options: its page, where nothing may go wrong."""
    contexts = []
    wrong = []

    def visit(running, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def note_message(message):
            if message.type in ("error", "warning"):
                wrong.append(message.text)

        def note_request(request):
            if not request.url.startswith(running.url):
                wrong.append(request.url)

        page.on("console", note_message)
        page.on("request", note_request)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: wrong.append(d.message))
        page.goto(running.url)
        page.wrong = wrong
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def ready(page):
    page.locator("#about:not(:empty)").wait_for()
    return page


def send(page, text, n=1):
    """Send a message, and wait for so many answers in all."""
    page.fill("#entry", text)
    page.keyboard.press("Enter")
    page.locator(".answer:not(.going)").nth(n - 1).wait_for()


def scripted(text):
    """An engine that says this text."""
    script = [bytes([b]) for b in text.encode()]
    return Engine(Scripted(BYTES, *script), None, BYTES, 2000)


def picture(page, name):
    """What one looks at: in the temporary folder, by name."""
    folder = Path(tempfile.gettempdir(), "stopwatch-page")
    folder.mkdir(exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


@pytest.mark.slow
def test_text_of_a_model_is_text(visit):
    text = f"é🙂 {HOSTILE}"
    with Running(scripted(text), tokens=len(text.encode())) as running:
        page = ready(visit(running))
        send(page, HOSTILE)
        assert page.locator(".mine .body").text_content() == HOSTILE
        assert page.locator(".answer .body").text_content() == text
        assert page.locator("#log img, #log script").count() == 0
        page.click("#tab-text")
        page.fill("#entry", HOSTILE)
        page.click("#send")
        page.locator(".answer:not(.going)").wait_for()
        assert page.locator(".answer .body").text_content() == HOSTILE + text


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_conversation_with_alternatives(visit, small, scheme):  # noqa: F811
    with Running(engine_of(small), tokens=40) as running:
        page = ready(visit(running, color_scheme=scheme, viewport=dict(width=1200, height=800)))
        picture(page, f"{scheme}-start")
        page.fill("#seed", "4")
        send(page, "def foo")
        send(page, "return", n=2)
        assert page.locator(".mine").count() == 2
        numbers = page.locator(".answer .numbers").first.text_content()
        assert "tokens/s" in numbers and "first after" in numbers

        # By pointer
        page.locator(".answer .token").nth(3).hover()
        rows = page.locator("#alternatives tr")
        assert rows.count() >= 6
        assert page.locator("#alternatives tr.chosen").count() == 1
        picture(page, f"{scheme}-alternatives")
        page.mouse.move(5, 5)
        assert page.locator("#alternatives").is_hidden()
        # By keyboard: one stop for an answer, arrows within it
        page.locator(".answer .token").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.locator("#alternatives").is_visible()
        assert page.evaluate("document.activeElement.className").startswith("token")
        assert page.locator(".answer").first.locator(".token[tabindex='0']").count() == 1

        page.check("#shade")
        picture(page, f"{scheme}-shaded")
        # Light and dark by hand, kept over a visit
        background = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(background)
        page.click("#theme")
        after = page.evaluate(background)
        assert after != before
        page.reload()
        assert page.evaluate(background) == after


@pytest.mark.slow
def test_knobs_reach_the_server(visit, small):  # noqa: F811
    with Running(engine_of(small), tokens=40) as running:
        page = ready(visit(running))
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "7")
        page.fill("#stops", "never to be\\n")
        page.fill("#seed", "12")
        with page.expect_request("**/v1/chat/completions") as asked:
            send(page, "a")
        body = asked.value.post_data_json
        assert body["temperature"] == 0 and body["max_tokens"] == 7 and body["seed"] == 12
        assert body["stop"] == ["never to be\n"]
        page.reload()
        ready(page)
        assert page.input_value("#max_tokens") == "7"  # kept
        page.click("#defaults")
        assert page.input_value("#seed") == ""


@pytest.mark.slow
def test_an_answer_can_be_stopped(visit, small):  # noqa: F811
    with Running(engine_of(small), tokens=400) as running:
        step = running.engine.step
        running.engine.step = lambda: time.sleep(0.02) or step()
        page = ready(visit(running))
        for how in "button", "escape", "clear":
            page.fill("#entry", "def ")
            page.keyboard.press("Enter")
            page.locator(".going .token").nth(1).wait_for()
            assert page.locator("#send").is_hidden()
            if how == "button":
                page.click("#stop")
            elif how == "escape":
                page.keyboard.press("Escape")
            else:
                page.click("#clear")
            page.locator("#send").wait_for()
            if how != "clear":
                assert "stopped" in page.locator(".numbers").last.text_content()
            running.until_idle(5)
        assert page.locator(".turn").count() == 0
        assert page.locator("#error").is_hidden()
        # What was stopped is part of the conversation
        send(page, "a")


@pytest.mark.slow
def test_errors_are_said_and_it_goes_on(visit, small):  # noqa: F811
    with Running(engine_of(small, places=1), Limits(queue=1)) as running:
        page = ready(visit(running))
        running.server.worker.queue = -1
        page.fill("#entry", "def ")
        page.keyboard.press("Enter")
        page.locator("#error").wait_for()
        assert "busy" in page.locator("#error").text_content()
        picture(page, "error")
        running.server.worker.queue = 5
        page.click("#error button")
        page.locator(".answer:not(.going)").wait_for()
        assert page.locator("#error").is_hidden()

        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.fill("#entry", "def ")
        page.keyboard.press("Enter")
        page.locator("#error").wait_for()
        assert "cannot be reached" in page.locator("#error").text_content()
        # The browser itself reports what we provoked
        provoked = [w for w in page.wrong if "503" in w or "ERR_FAILED" in w]
        assert page.wrong == provoked and len(provoked) == 2
        page.wrong.clear()


@pytest.mark.slow
def test_a_key_is_asked_for(visit, small):  # noqa: F811
    with Running(engine_of(small), api_key="secret") as running:
        page = visit(running)
        page.locator("#key-field").wait_for()
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        ready(page)
        send(page, "a")
        assert all("401" in w for w in page.wrong)
        page.wrong.clear()


@pytest.mark.slow
def test_on_a_phone(visit):
    phone = dict(viewport=dict(width=390, height=780), device_scale_factor=2, has_touch=True)
    with Running(scripted("some words of a text "), tokens=100) as running:
        page = ready(visit(running, **phone, is_mobile=True))
        picture(page, "phone-start")
        send(page, "x" * 200)
        page.locator(".answer .token").nth(2).tap()
        assert page.locator("#alternatives").is_visible()
        picture(page, "phone-alternatives")
        wide = "document.documentElement.scrollWidth - innerWidth"
        assert page.evaluate(wide) <= 0
        page.click("#open-knobs")
        assert page.locator("#temperature").is_visible()
        picture(page, "phone-settings")
        assert page.evaluate(wide) <= 0
        page.click("#close-knobs")
        assert page.locator("#knobs").is_hidden()


@pytest.mark.slow
def test_text_goes_on_from_where_it_is(visit, small):  # noqa: F811
    with Running(engine_of(small), tokens=12) as running:
        page = ready(visit(running))
        page.click("#tab-text")
        page.fill("#entry", "def ")
        page.keyboard.press("Control+Enter")
        page.locator(".answer:not(.going)").wait_for()
        first = page.locator(".answer .body").text_content()
        page.get_by_text("Go on from here").click()
        page.locator(".answer:not(.going) .token").first.wait_for()
        # A field of a page has line feeds alone
        assert page.input_value("#entry") == first.replace("\r\n", "\n").replace("\r", "\n")
        first = page.input_value("#entry")
        assert page.locator(".answer .body").text_content().startswith(first)
        picture(page, "text")


@pytest.mark.slow
def test_by_keyboard_alone(visit, small):  # noqa: F811
    """Each control is reached, and says what it is."""
    with Running(engine_of(small)) as running:
        page = ready(visit(running))
        send(page, "a")
        page.locator("#entry").focus()
        names = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            names.add(
                page.evaluate(
                    "(e => e.getAttribute('aria-label') || e.labels?.[0]?.textContent "
                    "|| e.textContent)(document.activeElement)"
                ).strip()
            )
        assert {"Send", "Clear", "Temperature", "Seed", "Defaults", "Chat"} <= names
        assert "" not in names - {page.locator(".token").first.text_content().strip()}
        page.locator("#tab-chat").focus()
        page.keyboard.press("ArrowRight")
        assert page.get_attribute("#tab-text", "aria-selected") == "true"
