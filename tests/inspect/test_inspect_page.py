"""The page of the inspector, opened as a file in a real browser."""

import json
import shutil

import pytest

from helpers.records import SETTINGS, answer, mixed_group, record, rescued_group, search
from tspo_trl import Turn
from tspo_trl.inspect import load_run, render_page, write_page
from tspo_trl.rollout.log import append_rollouts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs a Chromium (Debian: apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!-- {{texts}}"


def evil_group(step):
    """A text that tries to run a script, a failed search, an invalid turn, letters outside the BMP."""
    hint = Turn(token_ids=[5], text="hmm <b>bold</b>", action="invalid", observation_ids=[6, 7])
    return [
        record(
            [search("🙂 her", f"🙂 {EVIL} Oslo"), answer(EVIL)],
            [0.5, 0.0],
            [0.7, 0.0],
            place=(step, 2, 0),
            question=EVIL,
        ),
        record(
            [hint, search("x", retrieval="timeout")],
            [None, None],
            [0.0, 0.0],
            outcome=None,
            status="retrieval_failed",
            place=(step, 2, 1),
            question=EVIL,
        ),
    ]


LONG_ANSWERS = [f"the {'very ' * 14}long answer of rollout {number}" for number in range(1, 9)]


def wide_group(step, group):
    """Eight incorrect rollouts, whose long answers differ only at their ends."""
    return [
        record([search("her", "nothing"), answer(text)], [0.0, 0.0], [0.0, 0.0], place=(step, group, number))
        for number, text in enumerate(LONG_ANSWERS)
    ]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "run <b>&amp;"
    for step in range(6):
        groups = [*rescued_group(step), *mixed_group(step), *(evil_group(step) if step in (2, 4) else [])]
        append_rollouts(folder / "trajectories" / "train-rank000.jsonl", groups)
    append_rollouts(folder / "trajectories" / "eval-rank000.jsonl", wide_group(6, 0))
    (folder / "trajectories" / "settings.json").write_text(json.dumps(SETTINGS))
    with (folder / "trajectories" / "train-rank000.jsonl").open("a") as log:
        log.write("half a line")
    write_page(load_run(folder), folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # containers do not provide a sandbox
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, page_file):
    """A function that opens the page. Afterwards, the page must have made no requests and reported no errors."""
    complaints, requests, contexts = [], [], []

    def open_it(place="train/2/3/1", scheme="light", size=(1280, 900)):
        context = browser.new_context(color_scheme=scheme, viewport={"width": size[0], "height": size[1]})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{page_file.as_uri()}#{place}")
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    assert {url.split("#")[0] for url in requests} == {page_file.as_uri()}


def place(page):
    return page.evaluate("location.hash")


def test_a_turn_shows_the_reason_of_its_reward(open_page):
    page = open_page("train/0/1/2")
    assert page.title() == "run <b>&amp;: rollouts"
    turn = page.locator("#turn-0")
    assert turn.locator("dd").all_text_contents() == ["0.50", "+0.71"]
    assert turn.locator(".why p").all_text_contents() == [
        "+0.50: its passages are the first to contain “Oslo”, and the rollout is not correct.",
        "No rollout of the group is correct, so turns are compared: this one got 0.50, the mean of turn 1 over 2 rollouts "
        "is 0.25 → advantage +0.71, made more likely.",
    ]
    assert turn.locator(".first").text_content() == "golden answer first found here: +0.50"
    assert turn.locator(".seen mark").all_text_contents() == ["Oslo"]
    assert "read, not trained: 5 tokens masked" in turn.locator(".seen header").text_content()
    assert page.locator(".tile").first.get_attribute("class") == "tile rescued"
    assert page.locator(".kind").text_content() == "all wrong, rescued"
    # the colour depends on the sign
    colors = page.locator("tbody tr:first-child .cell").evaluate_all(
        "cells => cells.map((c) => getComputedStyle(c).backgroundColor)"
    )
    assert len(set(colors)) == 2
    assert "partial reward α = 0.5" in page.locator("#settings").text_content()
    assert "half a line" in page.locator("#notes summary").text_content()


def test_the_page_of_an_evaluation_does_not_speak_of_training(open_page):
    page = open_page("eval/6/1/2")
    text = page.locator("#rollout").text_content()
    assert "3 tokens written, 5 read" in text
    for word in ("trained", "masked", "learned", "more likely", "less likely"):
        assert word not in page.locator("#group").text_content() + page.locator("#rollout").text_content()
    assert "not used: this is an evaluation" in page.locator("#turn-0 .why").text_content()


def test_rollouts_beyond_the_window_are_counted(open_page):
    page = open_page("eval/6/1/1", size=(1280, 900))
    assert page.locator(".beyond").text_content() == "2 more rollouts →"
    page.locator(".beyond").click()
    sync_api.expect(page.locator(".beyond")).to_contain_text("←")
    page.set_viewport_size({"width": 1900, "height": 900})
    sync_api.expect(page.locator(".beyond")).to_be_hidden()


def test_different_answers_look_different(open_page):
    page = open_page("eval/6/1/1")
    shown = page.locator(".column em").all_text_contents()
    assert len(set(shown)) == len(LONG_ANSWERS)
    assert all(len(text) <= 60 for text in shown)
    cut = page.locator(".column em").evaluate_all("all => all.filter((em) => em.scrollWidth > em.clientWidth).length")
    assert cut == 0


def test_foreign_text_is_shown_and_never_executed(open_page, page_file):
    page = open_page("train/2/3/1")
    assert page.locator("#group h2").text_content() == EVIL
    assert EVIL in page.locator("#turn-0 .passage").text_content()
    assert page.locator("#turn-0 .passage mark").all_text_contents() == [
        "Oslo"
    ]  # the position is correct after letters of two UTF-16 units
    assert page.locator("#turn-1 .says").text_content() == f"<answer>{EVIL}</answer>"
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, main script, main b b").count() == 0
    assert "window.hacked" not in page_file.read_text(encoding="utf-8")
    # the policy of the page would also prevent scripts from running
    page.evaluate("document.body.append(Object.assign(document.createElement('p'), {innerHTML: 'x'}))")
    assert "unsafe-inline" not in page_file.read_text(encoding="utf-8")


def test_failures_and_invalid_turns_are_labelled(open_page):
    page = open_page("train/2/3/2")
    badges = page.locator("#rollout .badge").all_text_contents()
    assert badges == ["not scored", "retrieval failed", "invalid: no well-formed action", "search", "search timed out"]
    assert page.locator("#turn-0 .why p").first.text_content() == "No reward: a search of it failed."
    assert "Its text needs the tokenizer" in page.locator("#turn-0 .seen").text_content()


def test_filters_find_rollouts_in_all_steps(open_page):
    page = open_page("train/0/1/1")
    page.locator("#filters").get_by_role("button", name="near miss").click()
    assert page.locator("#matches").text_content() == "14 rollouts in 6 steps"
    assert place(page) == "#train/0/1/2"  # the first match
    page.locator("#filters").get_by_role("button", name="failed retrieval").click()
    assert page.locator("#matches").text_content() == "0 rollouts in 0 steps"
    page.locator("#filters").get_by_role("button", name="near miss").click()
    assert page.locator("#matches").text_content() == "2 rollouts in 2 steps"
    assert place(page) == "#train/2/3/2"
    assert page.locator(".tile").count() == 1
    page.locator("#next").click()
    assert place(page) == "#train/4/3/2"
    page.keyboard.press("n")  # after the last match, the first follows
    assert place(page) == "#train/2/3/2"
    page.keyboard.press("Escape")
    assert page.locator("#matches").text_content() == ""
    assert page.locator(".tile").count() == 3


def test_search_finds_all_texts(open_page):
    page = open_page("train/0/1/1")
    page.keyboard.press("/")
    page.keyboard.type("onERROR")
    page.keyboard.press("Enter")
    assert (
        page.locator("#matches").text_content() == "4 rollouts in 2 steps"
    )  # both rollouts of a group have the same question
    assert place(page) == "#train/2/3/1"
    page.locator("#search").fill("in oslo, 1900")  # only in a passage
    sync_api.expect(page.locator("#matches")).to_contain_text("6 rollouts in")
    page.locator("#search").fill("nowhere to be found")
    sync_api.expect(page.locator("#matches")).to_contain_text("0 rollouts in")
    assert page.locator(".empty").text_content() == "No rollout of this step matches."


def test_the_keyboard_moves_through_the_run(open_page):
    page = open_page("train/0/1/1")
    for key, expected in (
        ("ArrowRight", "train/1/1/1"),
        ("j", "train/1/2/1"),
        ("j", "train/1/2/1"),  # the last group
        ("l", "train/1/2/2"),
        ("l", "train/1/2/2"),  # the last rollout
        ("h", "train/1/2/1"),
        ("k", "train/1/1/1"),
        ("ArrowLeft", "train/0/1/1"),
        ("ArrowLeft", "train/0/1/1"),  # the first step
        ("1", "train/0/1/2"),
        ("1", "train/0/1/2"),
        ("e", "eval/6/1/1"),
        ("e", "train/0/1/1"),
    ):
        page.keyboard.press(key)
        assert place(page) == f"#{expected}", key
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    assert page.locator("#keys dt").count() == 10
    page.keyboard.press("ArrowRight")  # ignored while the help is open
    assert place(page) == "#train/0/1/1"
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.locator("#step").fill("5")
    assert place(page).startswith("#train/5/")
    page.locator(".cell").nth(1).click()
    assert place(page) == "#train/5/1/2"
    page.locator(".tile").nth(1).click()
    assert place(page) == "#train/5/2/1"


def test_light_and_dark_themes(open_page):
    def background(page):
        return sum(
            map(
                int,
                page.evaluate("getComputedStyle(document.documentElement).backgroundColor").strip("rgb()").split(","),
            )
        )

    assert background(open_page(scheme="light")) > 600
    page = open_page(scheme="dark")
    assert background(page) < 150
    page.keyboard.press("t")
    assert background(page) > 600
    page.locator("#theme").click()
    assert background(page) < 150


@pytest.mark.parametrize("size", [(400, 800), (820, 1100), (1920, 1080)])
def test_no_viewport_scrolls_horizontally(open_page, size):
    page = open_page(size=size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_page_of_many_rollouts_stays_small(make_trainer, browser, tmp_path):
    trainer = make_trainer(max_steps=4, num_generations=8, per_device_train_batch_size=32)
    trainer.train()
    run = load_run(trainer.args.output_dir)
    real = run.modes["train"]
    run.modes["train"] = [
        type(g)(100 * copy + g.step, g.rollouts) for copy in range(79) for g in real
    ]  # 10 112 rollouts
    assert sum(len(group.rollouts) for group in run.modes["train"]) > 10_000
    html = render_page(run).encode()
    assert len(html) < 20_000_000
    (tmp_path / "page.html").write_bytes(html)
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    page.keyboard.press("1")
    assert page.locator("#matches").text_content().endswith("steps")
    page.close()
