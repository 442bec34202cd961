"""A listing has everything that is there from its start to its end, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import gc
import itertools
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from clerk_sync.clerk.api import Clerk, ClerkRefused
from clerk_sync.clerk.listing import AT_ONCE, OVERLAP, Page, Range, each_page, ranges_of
from clerk_sync.clerk.metrics import new_metrics
from tests import clerk_api
from tests.clerk_api import ClerkApi
from tests.waiting import until_true

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from typing import Literal

    LostCursor = clerk_api.LostCursor

# A thousand requests in ten seconds: no test waits for its turn.
KEY: Final = "sk_live_d2Fsa2luZyBvdmVyIHRoZSBzdGFuZC1pbg"
BORN: Final = 1_700_000_000_000
PATHS: Final = {
    "user": "/v1/users",
    "organization": "/v1/organizations",
    "organizationMembership": "/v1/organization_memberships",
}
LISTS: Final = ("organization", "organizationMembership")
LOST: Final[tuple[LostCursor, ...]] = ("refused", "empty", "first", "kept")


@asynccontextmanager
async def asking(api: ClerkApi) -> AsyncIterator[Clerk]:
    async with api.serving(), aiohttp.ClientSession() as http:
        yield Clerk(http, f"{api.url}/v1", lambda: api.key, share=1, metrics=new_metrics())


class Met:
    """The pages of a listing, and how often each id was on one."""

    def __init__(self) -> None:
        self.pages: list[Page] = []

    async def take(self, page: Page) -> None:
        self.pages.append(page)

    @property
    def ids(self) -> Counter[str]:
        return Counter(one["id"] for page in self.pages for one in page.objects)


async def walked(clerk: Clerk, *ranges: Range) -> Met:
    met = Met()
    async with asyncio.timeout(60):
        await each_page(clerk, ranges, met.take)
    return met


def name(kind: str, number: int) -> str:
    return f"{kind}_{number:05}"


def objects(api: ClerkApi, kind: str) -> dict[str, Any]:
    return {
        "user": api.users,
        "organization": api.organizations,
        "organizationMembership": api.memberships,
    }[kind]


def put(api: ClerkApi, kind: str, number: int, *, born: int) -> str:
    """Put what is just enough of an object to be listed: whole ones make large tests slow."""
    clerk_id = name(kind, number)
    ends = {}
    if kind == "organizationMembership":
        if not api.users:
            put(api, "user", 0, born=BORN)
            put(api, "organization", 0, born=BORN)
        ends = {
            "public_user_data": {"user_id": name("user", 0)},
            "organization": {"id": name("organization", 0)},
        }
    times = {"created_at": born, "updated_at": born}
    objects(api, kind)[clerk_id] = {"id": clerk_id, "email_addresses": [], **times, **ends}
    return clerk_id


def holding(kind: str, size: int, *, ties: int = 1, **options: Any) -> ClerkApi:
    """Make an instance with so many of a kind, numbered by age, `ties` of them of one moment."""
    api = ClerkApi(key=KEY, **options)
    for number in range(size):
        put(api, kind, number, born=BORN + number // ties * 1000)
    return api


def delete(api: ClerkApi, kind: str, numbers: range) -> None:
    for number in numbers:
        if name(kind, number) in objects(api, kind):
            if kind == "user":
                api.delete(name(kind, number))
            else:  # nobody reads the events, which take long to make
                del objects(api, kind)[name(kind, number)]


def delete_cursor(api: ClerkApi) -> None:
    """Delete the user whom the listing has reached: it continues from that moment, or after it."""
    query = api.asked[-1].query
    after, moment = query.get("starting_after"), query.get("created_at_after")
    if moment is not None and after is None:
        born = int(moment) + 1
        after = max(
            (one["id"] for one in api.users.values() if one["created_at"] == born), default=""
        )
    if after in api.users:
        api.delete(after)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("size", [0, 1, 500, 501, 1200])
async def test_all_are_met_once(kind: str, size: int) -> None:
    api = holding(kind, size)
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert met.ids == dict.fromkeys((name(kind, number) for number in range(size)), 1)
    assert [one["id"] for page in met.pages for one in page.objects] == sorted(met.ids)
    assert met.pages[-1].range.finished
    assert not any(page.range.finished for page in met.pages[:-1])
    assert met.pages[-1].range.seen == size
    assert not api.repeated


@pytest.mark.parametrize("lost_cursor", LOST)
@pytest.mark.parametrize("size", [7, 1000])
async def test_a_finished_part_is_not_walked_again(lost_cursor: LostCursor, size: int) -> None:
    api = holding("user", size, lost_cursor=lost_cursor)
    async with asking(api) as clerk:
        met = await walked(clerk, Range("user"))
        asked = len(api.asked)
        await walked(clerk, met.pages[-1].range)
        assert len(api.asked) == asked


@pytest.mark.parametrize("ties", [3, 250])
@pytest.mark.parametrize("kind", PATHS)
async def test_ties_across_the_border_of_a_page_are_met(kind: str, ties: int) -> None:
    api = holding(kind, 1200, ties=ties)
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert met.ids.keys() == objects(api, kind).keys()
    assert met.ids.total() <= 1200 + ties


@pytest.mark.parametrize(("size", "ties"), [(500, 500), (501, 501), (1000, 1000), (1300, 650)])
async def test_more_of_one_moment_than_a_page_holds_are_met(size: int, ties: int) -> None:
    api = holding("user", size, ties=ties)
    async with asking(api) as clerk:
        met = await walked(clerk, Range("user"))
    assert met.ids.keys() == api.users.keys()
    assert met.ids.total() <= size + ties
    assert len(api.asked) < 20


@pytest.mark.parametrize("lost_cursor", LOST)
@pytest.mark.parametrize(("size", "ties"), [(1000, 1), (1200, 3), (1200, 250)])
async def test_a_cursor_may_be_deleted_before_every_page(
    lost_cursor: LostCursor, size: int, ties: int
) -> None:
    api = holding("user", size, ties=ties, lost_cursor=lost_cursor)
    for page in range(1, 20):
        api.before_read(page, lambda: delete_cursor(api))
    async with asking(api) as clerk:
        met = await walked(clerk, Range("user"))
    assert size - 10 < len(api.users) < size
    assert api.users.keys() <= met.ids.keys()
    assert met.ids.total() <= size + ties * len(api.asked)


@pytest.mark.parametrize("lost_cursor", LOST)
async def test_cursors_may_be_deleted_among_many_of_one_moment(lost_cursor: LostCursor) -> None:
    api = holding("user", 1100, ties=1100, lost_cursor=lost_cursor)
    for page in (3, 5):
        api.before_read(page, lambda: delete_cursor(api))
    async with asking(api) as clerk:
        met = await walked(clerk, Range("user"))
    assert api.users.keys() <= met.ids.keys()


async def test_users_come_and_go_meanwhile() -> None:
    api = holding("user", 1200)
    before = set(api.users)
    api.before_read(1, lambda: put(api, "user", 2000, born=BORN + 5_000_000))
    api.before_read(2, lambda: delete(api, "user", range(100)))
    api.before_read(2, lambda: put(api, "user", 2001, born=BORN + 1))
    api.before_send(2, lambda: delete(api, "user", range(700, 710)))
    api.before_read(3, lambda: delete(api, "user", range(1100, 1200)))
    api.before_read(3, lambda: put(api, "user", 2002, born=BORN + 6_000_000))
    async with asking(api) as clerk:
        met = await walked(clerk, Range("user"))
    survivors = before & api.users.keys()
    assert len(survivors) == 990
    newest = {name("user", 2000), name("user", 2002)}
    assert survivors | newest <= met.ids.keys()


@pytest.mark.parametrize("most", [100, 10])
@pytest.mark.parametrize("kind", PATHS)
async def test_who_answers_may_have_a_limit_of_its_own(kind: str, most: int) -> None:
    api = holding(kind, 25 * most // 10, ties=3, most=most)
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert met.ids.keys() == objects(api, kind).keys()
    assert max(len(page.objects) for page in met.pages) == most


@pytest.mark.parametrize("most", [100, 10])
@pytest.mark.parametrize("beyond", [0, 1, 20])
async def test_a_limit_below_the_number_of_ties_ends_nothing_early(most: int, beyond: int) -> None:
    api = holding("user", 3 * most + 40, ties=most + beyond, most=most)
    async with asking(api) as clerk:
        met = await walked(clerk, Range("user"))
    assert met.ids.keys() == api.users.keys()


# Windows of users


async def test_a_crowd_is_walked_in_windows_at_once() -> None:
    api = clerk_api.crowd(60_000, ties=50, small=True, key=KEY)
    async with asking(api) as clerk:
        ranges = await ranges_of(clerk, "user", count=60_000)
        counted = len(api.asked)
        assert len(ranges) > AT_ONCE
        assert [range_.number for range_ in ranges] == list(range(len(ranges)))
        assert (ranges[0].from_ms, ranges[-1].to_ms) == (None, None)
        for range_, next_ in itertools.pairwise(ranges):
            assert range_.to_ms == next_.from_ms
        api.faults.append(clerk_api.slow(0.01, times=10_000))
        met = await walked(clerk, *ranges)
    assert set(met.ids.values()) == {1}
    assert len(met.ids) == 60_000
    assert api.most_at_once == AT_ONCE
    assert counted < 100
    assert not api.repeated


async def test_windows_end_where_all_are_of_one_moment() -> None:
    api = clerk_api.crowd(60_000, ties=60_000, key=KEY)
    async with asking(api) as clerk:
        ranges = await ranges_of(clerk, "user", count=60_000)
        assert len(ranges) == 1
        assert len(api.asked) < 50


@pytest.mark.parametrize(("kind", "count"), [("user", 49_999), *((kind, 10**6) for kind in LISTS)])
async def test_what_is_not_worth_splitting_is_one_part(kind: str, count: int) -> None:
    async with asking(api := ClerkApi(key=KEY)) as clerk:
        assert await ranges_of(clerk, kind, count=count) == [Range(kind)]
        assert not api.asked


async def test_who_comes_after_the_split_is_met() -> None:
    api = holding("user", 5000)
    async with asking(api) as clerk:
        ranges = await ranges_of(clerk, "user", count=5000)
        put(api, "user", 7000, born=BORN - 1)
        put(api, "user", 7001, born=BORN + 2_500_500)
        put(api, "user", 7002, born=ranges[-1].from_ms or 0)
        put(api, "user", 7003, born=BORN + 10**12)
        delete(api, "user", range(4500, 5000))
        met = await walked(clerk, *ranges)
    assert met.ids == dict.fromkeys(api.users, 1)


@pytest.mark.parametrize("size", [0, 1, 800])
async def test_a_count_may_be_old(size: int) -> None:
    api = holding("user", size)
    async with asking(api) as clerk:
        met = await walked(clerk, *await ranges_of(clerk, "user", count=10_000))
    assert met.ids.keys() == api.users.keys()


async def test_clerks_clock_may_be_ahead() -> None:
    api = ClerkApi(key=KEY)
    for number in range(5000):
        put(api, "user", number, born=4_000_000_000_000 + number)
    async with asking(api) as clerk:
        met = await walked(clerk, *await ranges_of(clerk, "user", count=5000))
    assert met.ids == dict.fromkeys(api.users, 1)


# Lists by offset


@pytest.mark.parametrize("gone", [1, 20, 500, 700])
@pytest.mark.parametrize("page", [2, 4])
async def test_a_list_moves_up_when_its_beginning_is_deleted(gone: int, page: int) -> None:
    kind = "organizationMembership"
    api = holding(kind, 2400)
    api.before_read(page, lambda: delete(api, kind, range(gone)), path=PATHS[kind])
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert len(api.memberships) == 2400 - gone
    assert api.memberships.keys() <= met.ids.keys()


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("gone", [range(480, 500), range(470, 510), range(480, 2000), range(2000)])
async def test_the_end_of_a_page_may_be_deleted(kind: str, gone: range) -> None:
    api = holding(kind, 2000)
    api.before_read(2, lambda: delete(api, kind, gone), path=PATHS[kind])
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert objects(api, kind).keys() == set(map(name, itertools.repeat(kind), range(2000))) - set(
        map(name, itertools.repeat(kind), gone)
    )
    assert objects(api, kind).keys() <= met.ids.keys()
    assert met.pages[-1].range.finished


async def test_a_list_that_moves_up_before_every_page_is_walked_to_its_end() -> None:
    kind = "organization"
    api = holding(kind, 2000)
    for page in range(2, 40):
        gone = range((page - 2) * 25, (page - 1) * 25)
        api.before_read(page, lambda gone=gone: delete(api, kind, gone), path=PATHS[kind])  # type: ignore[misc]
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert len(api.organizations) < 1900
    assert api.organizations.keys() <= met.ids.keys()


async def test_what_is_added_to_a_list_is_met() -> None:
    kind = "organization"
    api = holding(kind, 1200)
    for page in (1, 2, 3):
        number = 2000 + page
        born = BORN + number * 1000
        api.before_read(
            page,
            lambda number=number, born=born: put(api, kind, number, born=born),  # type: ignore[misc]
            path=PATHS[kind],
        )
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert met.ids == dict.fromkeys(api.organizations, 1)
    assert len(met.ids) == 1203


async def test_an_undisturbed_list_reads_its_overlaps_twice_and_no_more() -> None:
    api = holding("organization", 2400)
    async with asking(api) as clerk:
        await walked(clerk, Range("organization"))
    pages = ["0", "480", "960", "1440", "1920"]
    # What comes last is a look at what is behind the end: nothing, whatever Clerk counts.
    assert [asked.query["offset"] for asked in api.asked] == [*pages, "2380"]
    assert not api.repeated


# From where it was left off


@pytest.mark.parametrize(
    ("kind", "lost_cursor"),
    [
        *(("user", lost) for lost in (None, *LOST)),
        *((kind, lost) for kind in LISTS for lost in (None, "kept")),
    ],
)
async def test_a_walk_goes_on_from_any_page(kind: str, lost_cursor: LostCursor | None) -> None:
    size = 1300
    whole = holding(kind, size)
    async with asking(whole) as clerk:
        first = await walked(clerk, Range(kind))
    for index, page in enumerate(first.pages):
        api = holding(kind, size, lost_cursor=lost_cursor or "refused")
        if lost_cursor and page.range.after:
            api.delete(page.range.after)
        async with asking(api) as clerk:
            rest = await walked(clerk, page.range)
        earlier = {one["id"] for page in first.pages[: index + 1] for one in page.objects}
        assert objects(api, kind).keys() <= earlier | rest.ids.keys()
        if lost_cursor is None:
            again = len(earlier & rest.ids.keys())
            assert again <= (1 if kind == "user" else OVERLAP)


@pytest.mark.parametrize("gone", [range(30), range(400, 1300)])
@pytest.mark.parametrize("kind", PATHS)
async def test_much_may_be_deleted_before_a_walk_goes_on(kind: str, gone: range) -> None:
    async with asking(holding(kind, 1300)) as clerk:
        first = await walked(clerk, Range(kind))
    for index, page in enumerate(first.pages):
        api = holding(kind, 1300)
        delete(api, kind, gone)
        async with asking(api) as clerk:
            rest = await walked(clerk, page.range)
        earlier = {one["id"] for page in first.pages[: index + 1] for one in page.objects}
        assert objects(api, kind).keys() <= earlier | rest.ids.keys()


async def test_a_walk_goes_on_among_many_of_one_moment() -> None:
    async with asking(holding("user", 1200, ties=400)) as clerk:
        first = await walked(clerk, Range("user"))
    for index, page in enumerate(first.pages):
        api = holding("user", 1200, ties=400, lost_cursor="empty")
        api.delete(page.range.after or "")
        async with asking(api) as clerk:
            rest = await walked(clerk, page.range)
        earlier = {one["id"] for page in first.pages[: index + 1] for one in page.objects}
        assert api.users.keys() <= earlier | rest.ids.keys()


# How it ends


class TooManyReaders(Exception):
    """What a test's take() raises."""


@pytest.fixture
async def complaints() -> AsyncIterator[list[str]]:
    """What the event loop would log: errors that nobody waited for."""
    told: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(str(context["message"])))
    yield told
    gc.collect()
    await asyncio.sleep(0)
    assert told == []


# So many pages are answered before some are on their way while one is taken.
@pytest.mark.parametrize(("kind", "good"), [("user", 1), *((kind, 2) for kind in LISTS)])
async def test_a_take_that_fails_cancels_what_is_on_its_way(
    kind: str, good: int, complaints: list[str]
) -> None:
    api = holding(kind, 2600)
    api.faults.append(clerk_api.hanging(skip=good, times=100))
    met = Met()

    async def take(page: Page) -> None:
        await met.take(page)
        if len(met.pages) == good:
            await until_true(lambda: len(api.asked) > good)
            raise TooManyReaders

    async with asking(api) as clerk:
        others = asyncio.all_tasks()
        with pytest.raises(TooManyReaders):
            await asyncio.wait_for(each_page(clerk, [Range(kind)], take), 2)
        asked = len(api.asked)
        await asyncio.sleep(0.05)
        assert len(api.asked) == asked
        assert not [task for task in asyncio.all_tasks() - others if "clerk.py" in str(task)]


@pytest.mark.parametrize("fails", ["take", "page"])
@pytest.mark.parametrize(("kind", "good"), [("user", 1), *((kind, 2) for kind in LISTS)])
async def test_pages_that_nobody_waits_for_fail_in_silence(
    kind: str, good: int, fails: Literal["take", "page"], complaints: list[str]
) -> None:
    api = holding(kind, 2600)
    api.faults.append(clerk_api.failing(401, skip=good, times=100))
    met = Met()

    async def take(page: Page) -> None:
        await met.take(page)
        if len(met.pages) == good:
            expected = 1 if kind == "user" else 3
            await until_true(lambda: [asked.status for asked in api.asked].count(401) == expected)
            await asyncio.sleep(0.05)
            if fails == "take":
                raise TooManyReaders

    async with asking(api) as clerk:
        with pytest.raises(TooManyReaders if fails == "take" else ClerkRefused):
            await each_page(clerk, [Range(kind)], take)


async def test_of_many_failures_the_first_is_told(complaints: list[str]) -> None:
    api = clerk_api.crowd(60_000, small=True, key=KEY)
    async with asking(api) as clerk:
        ranges = await ranges_of(clerk, "user", count=60_000)
        api.faults.append(clerk_api.failing(401, times=1000))
        with pytest.raises(ClerkRefused, match="401"):
            await each_page(clerk, ranges, Met().take)


@pytest.mark.parametrize("kind", PATHS)
async def test_a_walk_may_be_cancelled(kind: str, complaints: list[str]) -> None:
    api = holding(kind, 2600)
    api.faults.append(clerk_api.hanging(skip=1, times=100))
    others = asyncio.all_tasks()
    async with asking(api) as clerk:
        walking = asyncio.create_task(each_page(clerk, [Range(kind)], Met().take))
        await until_true(lambda: len(api.asked) > 1)
        walking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await walking
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= others


async def test_the_next_page_is_on_its_way_while_one_is_taken() -> None:
    api = holding("user", 1200)

    async def take(page: Page) -> None:
        if not page.range.finished and page.range.seen < 1200:
            asked = page.range.seen // 500 + 1
            await until_true(lambda: len(api.asked) >= asked)

    async with asking(api) as clerk:
        await each_page(clerk, [Range("user")], take)


# Whatever happens

Change = tuple[int, str, int, int]

changes = st.lists(
    st.tuples(
        st.integers(1, 8),
        st.sampled_from(["delete", "delete", "cursor", "put", "put old"]),
        st.integers(0, 1300),
        st.sampled_from([1, 19, 20, 21, 100, 600]),
    ),
    max_size=5,
)


def happening(api: ClerkApi, kind: str, what: str, first: int, many: int) -> None:
    match what:
        case "delete":
            delete(api, kind, range(first, first + many))
        case "cursor":
            delete_cursor(api)
        case "put":
            numbers = unused(api, kind)
            for _ in range(min(many, 100)):
                number = next(numbers)
                put(api, kind, number, born=BORN + number * 1000)
        case "put old" if kind == "user":  # a list by offset would move down, and all be met
            put(api, kind, next(unused(api, kind)), born=BORN + first * 500)


def unused(api: ClerkApi, kind: str) -> Iterator[int]:
    return itertools.count(5000 + len(objects(api, kind)) + len(api.asked) * 10_000)


async def check(api: ClerkApi, kind: str, said: Sequence[Change]) -> None:
    before = set(objects(api, kind))
    for page, what, first, many in said:
        api.before_read(
            page,
            lambda what=what, first=first, many=many: happening(api, kind, what, first, many),  # type: ignore[misc]
            path=PATHS[kind],
        )
    async with asking(api) as clerk:
        met = await walked(clerk, Range(kind))
    assert before & objects(api, kind).keys() <= met.ids.keys()
    assert met.pages[-1].range.finished


@given(
    kind=st.sampled_from(["user", "user", *LISTS]),
    size=st.one_of(st.integers(0, 1300), st.sampled_from([500, 501, 980, 1000])),
    ties=st.sampled_from([1, 1, 2, 40, 499, 500, 700]),
    most=st.sampled_from([500, 500, 500, 100]),
    lost_cursor=st.sampled_from(LOST),
    said=changes,
)
@example(
    kind="user",
    size=1300,
    ties=700,
    most=500,
    lost_cursor="empty",
    said=[(2, "cursor", 0, 1), (3, "cursor", 0, 1), (4, "delete", 690, 20)],
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)
def test_survivors_are_met(
    *, kind: str, size: int, ties: int, most: int, lost_cursor: LostCursor, said: list[Change]
) -> None:
    api = holding(kind, size, ties=ties, most=most, lost_cursor=lost_cursor)
    asyncio.run(check(api, kind, said))
