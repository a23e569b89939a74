"""The page in a real browser, before a real server: what a viewer sees, does, and sees next."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from serving.client import FeedClient
from serving.security import ServerSecurity
from serving.server import FeedServer

sys.path.insert(0, str(Path(__file__).parent))
from browser import chromium
from servers import CONFIG, running

WEB = replace(CONFIG, web_port=0, default_deadline_ms=20_000)
SENT = "**/api/LogEvents"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(world, browser, tmp_path_factory) -> Iterator[FeedServer]:
    with running(world.registry, tmp_path_factory.mktemp("page") / "s.sqlite", WEB) as server:
        yield server


@pytest.fixture
def page(browser, server) -> Iterator:
    with browser.new_context(viewport={"width": 1200, "height": 760}, reduced_motion="reduce") as context:
        page = context.new_page()
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.web_port}/")
        page.wait_for_selector(".card.now")
        yield page
        assert wrong == [], "scripts failed"


def current(page) -> tuple[str, str]:
    """Video and author on the screen."""
    card = page.locator(".card.now")
    return card.get_attribute("data-video"), card.get_attribute("data-author")


def swipe(page) -> tuple[str, str]:
    """To the next card, once there is one."""
    before = current(page)[0]
    page.wait_for_selector(f'.card[data-video="{before}"] + .card[data-video]')
    page.keyboard.press("ArrowDown")
    page.wait_for_selector(f'.card.now:not([data-video="{before}"])')
    return current(page)


def pick(page, user_id: int) -> None:
    """Another viewer than the first."""
    page.select_option("#user", "")
    page.fill("#other-id", str(user_id))
    page.keyboard.press("Enter")
    page.wait_for_selector(".card.now")


def test_the_panel_says_what_grpc_says(server, page):
    user, (video, _) = int(page.input_value("#user")), current(page)
    asked = datetime.fromisoformat(page.get_attribute("#why time", "datetime"))
    request_id = page.inner_text("#why dt:text-is('request') + dd")
    with FeedClient(f"127.0.0.1:{server.port}", timeout_s=20) as client:
        answer = client.get_feed(user, k=6, request_id=request_id, now_ms=round(asked.timestamp() * 1000))
    item = answer.items[0]
    assert str(item.video_id) == video
    for table, expected in (
        ("scores", dict(zip(answer.tasks, item.scores, strict=True))),
        ("terms", item.value_terms | {"value": item.value}),
    ):
        rows = page.locator(f"#{table} tr").all()
        shown = {row.get_attribute("data-name"): float(row.locator("td").last.inner_text()) for row in rows}
        assert shown == pytest.approx(expected, abs=5.1e-5)
    assert float(page.inner_text("#why dt:text-is('chance of this slot') + dd")) == pytest.approx(
        item.propensity, abs=5.1e-5
    )
    assert page.inner_text("#why dt:text-is('source') + dd").startswith(item.sources[0])
    assert page.inner_text("#why dt:text-is('bundle') + dd") == answer.bundle_version == "v1"
    assert page.get_attribute("#why .level", "data-level") == "LEVEL_FULL"


def test_no_video_is_shown_twice_over_many_pages(page):
    """Also none that is on the page already and was not looked at: each request continues the answer before it."""
    answers = []
    page.on("response", lambda response: answers.append(response) if response.url.endswith("GetFeed") else None)
    page.select_option("#user", "-1")
    page.wait_for_selector(".card.now")
    shown = [current(page)[0], *(swipe(page)[0] for _ in range(25))]
    assert len(set(shown)) == 26
    tokens = [json.loads(answer.request.post_data)["page_token"] for answer in answers]
    assert tokens == ["", *(answer.json()["page"]["next_page_token"] for answer in answers[:-1])]
    assert len(tokens) >= 5


def test_not_interested_hides_the_author_from_what_is_there_and_from_the_next_pages(world, server, page):
    user = int(world.dataset.users.ids[11])
    pick(page, user)
    video, author = current(page)
    with page.expect_request("**/api/GetFeed") as asked, page.expect_response(SENT):
        page.click(".card.now [data-do=hate]")
        page.wait_for_selector(f'.card.now:not([data-video="{video}"])')
        for _ in range(5):  # to where more is asked for
            swipe(page)
    assert json.loads(asked.value.post_data)["blocked_author_ids"] == [author]
    assert page.locator(f'.card[data-author="{author}"]').count() == 1, "only what was shown already"
    shown = [current(page), *(swipe(page) for _ in range(10))]
    assert author not in [by for _, by in shown]
    state = server.store.user(user)
    assert int(video) in state.video_id_E[(state.signals_E >> 7 & 1).astype(bool)], "and hate is in the log"


def test_likes_follows_and_the_time_spent_are_logged(world, server, page):
    user = int(world.dataset.users.ids[12])
    pick(page, user)
    video, author = current(page)
    page.wait_for_timeout(250)
    for kind in ("like", "follow"):
        with page.expect_response(SENT):
            page.click(f".card.now [data-do={kind}]")
        assert page.get_attribute(f".card.now [data-do={kind}]", "aria-pressed") == "true"
    with page.expect_response(SENT) as sent:
        swipe(page)
    (event,) = json.loads(sent.value.request.post_data)["events"]
    assert (event["video_id"], event["user_id"]) == (video, str(user))
    assert (event["like"], event["follow"], event["hate"]) == (True, True, False)
    assert event["watch_ms"] >= 250
    state = server.store.user(user)
    assert state.followed_authors.tolist() == [int(author)]
    assert int(video) in state.seen_ids


def test_the_end_says_why_and_leads_back(page):
    def last(route):
        answer = route.fetch()
        body = answer.json()
        body["page"]["shortfall_reason"] = "6 candidates passed the filters"
        route.fulfill(response=answer, json=body)

    page.route("**/api/GetFeed", last)
    page.select_option("#user", "-1")
    page.wait_for_selector(".card.now")
    shown = [current(page), *(swipe(page) for _ in range(5))]
    with page.expect_response(SENT):
        page.keyboard.press("ArrowDown")
    assert "6 candidates passed the filters" in page.inner_text(".end")
    assert page.locator(".card.now").count() == 0, "nothing plays, so no time is counted"
    page.keyboard.press("ArrowUp")
    page.wait_for_selector(".card.now")
    assert current(page) == shown[-1]


def test_markup_in_an_answer_is_text(page):
    hostile = "<img src=x onerror=document.title='owned'>"

    def poisoned(route):
        answer = route.fetch()
        body = answer.json()
        for item in body["page"]["items"]:
            item["reason"] = hostile
        body["page"]["policy_id"] = hostile
        route.fulfill(response=answer, json=body)

    page.route("**/api/GetFeed", poisoned)
    page.select_option("#user", "-1")
    page.wait_for_selector(".card.now .reason:has-text('onerror')")
    assert hostile in page.inner_text("#why")
    assert page.locator("img").count() == 0
    assert page.title() == "reelrank: the feed"


def test_trouble_is_said_plainly_and_mended_by_trying_again(page):
    page.route("**/api/GetFeed", lambda route: route.abort())
    page.select_option("#user", "-1")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "The server does not answer." in page.inner_text("#trouble")
    page.unroute("**/api/GetFeed")
    page.click("#trouble button")
    page.wait_for_selector(".card.now")
    assert not page.is_visible("#trouble")
    page.evaluate("document.getElementById('surface').append(new Option('x', 'nowhere'))")
    page.select_option("#surface", "nowhere")
    page.wait_for_selector("#trouble:has-text(\"surface: 'nowhere' is not known\")")


def test_on_a_phone_the_reasons_open_over_the_video_and_nothing_is_cut_off(page):
    page.set_viewport_size({"width": 360, "height": 640})
    assert not page.is_visible("#why h2")
    page.click(".card.now [data-do=why]")
    page.wait_for_selector("#why h2", state="visible")
    page.click("#why .close")
    page.wait_for_selector("#why h2", state="hidden")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for button in page.locator(".card.now .do button").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert 0 <= box["y"] <= 640 - box["height"]


def test_a_server_with_tokens_is_asked_with_one(world, browser, tmp_path):
    (tmp_path / "tokens").write_text("a-long-enough-secret")
    config = replace(WEB, security=ServerSecurity(token_file=tmp_path / "tokens"))
    with running(world.registry, tmp_path / "s.sqlite", config) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{server.web_port}/")
        for token in ("not-the-right-secret", "a-long-enough-secret"):
            page.wait_for_selector("#ask[open]")
            assert page.locator(".card").count() == 0, "nothing is shown to who has no token"
            page.fill("#token", token)
            page.click("#ask button")
        page.wait_for_selector(".card.now")
        assert page.locator("#ask[open]").count() == 0
