"""Group commit on real servers: bad events, full queues, databases that go and come back."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import pytest

from clerk_sync.database.connection import (
    Connection,
    Statement,
    connect,
    engine_of,
)
from clerk_sync.database.errors import (
    DatabaseUnavailable,
    RejectedByDatabase,
    translate_engine_errors,
)
from clerk_sync.database.session import CONNECT_SECONDS
from clerk_sync.database.url import InvalidDatabaseUrl, target_of
from clerk_sync.mapping.change import Change, Delivered, Quarantine
from clerk_sync.outcomes import Reason
from clerk_sync.schema.migrate import migrate
from clerk_sync.store.committer import AWAY_SECONDS
from clerk_sync.store.writer import Trouble
from tests.histories import Clerk, Committing, Database, Halting, mapped, told
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from clerk_sync.store.store import Store
    from tools.servers import Managed

PEOPLE: Final = mapped("""
tables:
  user:
    table: people
    key: clerk_id
    columns: {username: username, age: age}
""")
DDL: Final = """CREATE TABLE people (
    clerk_id VARCHAR(128) EXACT PRIMARY KEY, username VARCHAR(8), age INTEGER CHECK (age <> 13)
) OPTIONS"""
DATABASE: Final = ["unavailable: database"]
_databases: Final = count(1)


@pytest.fixture(scope="module")
def prepared(shared_url: str) -> str:
    async def prepare() -> None:
        async with Database.at(shared_url) as database:
            await database.ddl(DDL)
            await migrate(database.engine, PEOPLE)

    asyncio.run(prepare())
    return shared_url


@pytest.fixture
async def people(prepared: str) -> AsyncIterator[tuple[Database, Store]]:
    async with Database.at(prepared) as database:
        await database.empty("people")
        yield database, await database.store(PEOPLE)


@asynccontextmanager
async def on(server: Managed) -> AsyncIterator[tuple[Database, Store]]:
    """A new database on a server that the test is going to hurt."""
    url = server.create_database(f"committer_{next(_databases)}")
    async with Database.at(url) as database:
        await database.ddl(DDL)
        await migrate(database.engine, PEOPLE)
        yield database, await database.store(PEOPLE)


async def test_concurrent_changes_share_one_transaction(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store) as committing:
        answers = await committing.commit(*(clerk.user(f"user_{n}") for n in range(100)))
        assert answers == ["applied"] * 100
        assert committing.transactions == 1
    assert await database.value("SELECT COUNT(*) FROM people") == 100


async def test_batches_end_at_their_limit(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store, batch_limit=10) as committing:
        await committing.commit(*(clerk.user(f"user_{n}") for n in range(100)))
        assert committing.transactions == 10


async def test_one_bad_event_is_found_in_few_transactions(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    changes = [clerk.user(f"user_{n:03}", age=n) for n in range(64)]
    changes[40] = clerk.user("user_bad", svix_id="bad", age=13)
    changes[13] = clerk.user("user_013", age=1)
    async with Committing(database, store) as committing:
        answers = await committing.commit(*changes)
        # The seven halves beside the way down to it, and its own for the quarantine.
        assert committing.transactions <= 8
    assert answers[40] == "quarantined: refused"
    assert answers[:40] + answers[41:] == ["applied"] * 63
    assert await database.value("SELECT COUNT(*) FROM people") == 63
    assert await database.quarantined() == {"bad": "refused"}


async def test_order_within_a_batch_survives_its_halving(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store) as committing:
        answers = await committing.commit(
            clerk.user("user_1", 1, username="one"),
            clerk.user("user_1", 3, age=13),
            clerk.user("user_1", 2, username="two"),
            clerk.user("user_2", 1),
        )
    assert answers[1] == "quarantined: refused"
    assert await database.value("SELECT username FROM people WHERE clerk_id = 'user_1'") == "two"


async def test_full_queue_is_answered_at_once(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store, queue_limit=5) as committing:
        answers = await committing.commit(*(clerk.user(f"user_{n}") for n in range(8)))
    assert answers == ["applied"] * 5 + ["unavailable: queue_full"] * 3


async def test_a_schema_not_looked_at_yet_is_answered_at_once(
    people: tuple[Database, Store],
) -> None:
    database, _ = people
    async with Committing(database, None) as committing:
        answers = await committing.commit(Clerk(PEOPLE).user("user_1"))
    assert answers == ["unavailable: database"]


async def test_suspended_it_refuses_with_the_reason_until_resumed(
    people: tuple[Database, Store],
) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store) as committing:
        committer = committing.committer
        waiting = asyncio.create_task(committer.commit(clerk.user("user_1")))
        await asyncio.sleep(0)
        committer.suspend(Reason.SCHEMA)
        assert told([await waiting]) == ["unavailable: schema"]
        assert await committing.commit(clerk.user("user_2")) == ["unavailable: schema"]
        committer.resume(store)
        assert await committing.commit(clerk.user("user_3")) == ["applied"]
        waiting = asyncio.create_task(committer.commit(clerk.user("user_4")))
        await asyncio.sleep(0)
        committer.suspend(Reason.DATABASE)
        assert told([await waiting]) == DATABASE
        assert await committing.commit(clerk.user("user_4")) == DATABASE
        committer.resume(store)
        assert await committing.commit(clerk.user("user_5")) == ["applied"]
    assert await database.rows("SELECT clerk_id FROM people ORDER BY 1") == [
        ("user_3",),
        ("user_5",),
    ]


async def test_suspended_by_a_check_that_was_wrong_it_resumes_with_the_first_commit(
    people: tuple[Database, Store],
) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store) as committing:
        committing.committer.suspend(Reason.DATABASE)

        async def commits() -> bool:
            return await committing.commit(clerk.user("user_1")) in (["applied"], ["stale"])

        await until(commits)
        assert await committing.commit(clerk.user("user_2")) == ["applied"]
        assert await committing.commit(clerk.user("user_3")) == ["applied"]


async def test_trouble_is_returned_once_and_the_schema_s_counts_most(
    people: tuple[Database, Store],
) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    connects = False

    async def opened() -> Connection:
        if not connects:
            raise DatabaseUnavailable("no connection")
        return await connect(target_of(database.url), seconds=5)

    async with Committing(database, store, connect=opened) as committing:
        next_trouble = committing.committer.trouble
        assert await committing.commit(clerk.user("user_1")) == DATABASE
        assert await next_trouble() is Trouble.CONNECTION
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(next_trouble(), 0)
        connects = True
        committing.committer.resume(store)
        await database.execute("ALTER TABLE people RENAME TO gone")
        try:
            assert await committing.commit(clerk.user("user_1")) == ["unavailable: schema"]
        finally:
            await database.execute("ALTER TABLE gone RENAME TO people")
        committing.committer.status.report(Trouble.CONNECTION)
        assert await next_trouble() is Trouble.SCHEMA
        assert await committing.commit(clerk.user("user_1")) == ["applied"]


async def test_waiter_that_was_cancelled_is_dropped(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    async with Committing(database, store, batch_limit=1) as committing:
        waiting = [
            asyncio.create_task(committing.committer.commit(clerk.user(f"user_{n}")))
            for n in range(3)
        ]
        await asyncio.sleep(0)
        waiting[2].cancel()
        assert told(await asyncio.gather(*waiting[:2])) == ["applied", "applied"]
    assert sorted(await database.rows("SELECT clerk_id FROM people")) == [
        ("user_0",),
        ("user_1",),
    ]


async def test_close_commits_what_waits(people: tuple[Database, Store]) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    committing = Committing(database, store, batch_limit=3, writers=2)
    async with committing:
        tasks = [
            asyncio.create_task(committing.committer.commit(clerk.user(f"user_{n}")))
            for n in range(20)
        ]
        await asyncio.sleep(0)
    assert all(task.done() for task in tasks)
    assert told([task.result() for task in tasks]) == ["applied"] * 20
    assert await database.value("SELECT COUNT(*) FROM people") == 20


@pytest.mark.parametrize(
    ("hurt", "heal"),
    [
        (
            "ALTER TABLE people RENAME COLUMN username TO nickname",
            "ALTER TABLE people RENAME COLUMN nickname TO username",
        ),
        ("ALTER TABLE people RENAME TO gone", "ALTER TABLE gone RENAME TO people"),
    ],
    ids=["column", "table"],
)
async def test_changed_schema_is_retried_and_never_quarantined(
    people: tuple[Database, Store], hurt: str, heal: str
) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    changes = [clerk.user(f"user_{n}") for n in range(2)]
    async with Committing(database, store) as committing:
        assert await committing.commit(clerk.user("user_9")) == ["applied"]
        await database.execute(hurt)
        try:
            async with asyncio.timeout(10):
                answers = await committing.commit(*changes)
                assert answers == ["unavailable: schema"] * 2
                assert await committing.committer.trouble() is Trouble.SCHEMA
                assert await committing.commit(changes[0]) == ["unavailable: schema"]
        finally:
            await database.execute(heal)
        committing.committer.resume(await database.store(PEOPLE))
        assert await committing.commit(*changes) == ["applied", "applied"]
    assert await database.quarantined() == {}


async def test_two_writers_on_the_same_users_end_with_the_newest(
    people: tuple[Database, Store],
) -> None:
    database, store = people
    clerk = Clerk(PEOPLE)
    changes = [
        clerk.user(f"user_{n}", version, username=f"v{version}")
        for version in (3, 1, 4, 2)
        for n in range(20)
    ]
    async with Committing(database, store, writers=2, batch_limit=7) as committing:
        answers = await committing.commit(*changes)
    assert set(answers) <= {"applied", "stale"}
    assert set(await database.rows("SELECT username FROM people")) == {("v4",)}


# Trouble is the sender's to retry.


async def test_database_that_died_is_answered_fast_and_used_again_when_it_is_back(
    mysql_server: Managed,
) -> None:
    clerk = Clerk(PEOPLE)
    async with (
        on(mysql_server) as (database, store),
        Committing(database, store) as committing,
    ):
        assert await committing.commit(clerk.user("user_1")) == ["applied"]
        await database.engine.dispose()
        mysql_server.kill()
        started = time.monotonic()
        for number in range(30):
            assert await committing.commit(clerk.user(f"down_{number}")) == DATABASE
        assert time.monotonic() - started < 3
        mysql_server.start()

        async def works() -> bool:
            return await committing.commit(clerk.user("user_2")) == ["applied"]

        await until(works)
        assert await database.value("SELECT COUNT(*) FROM people") == 2


async def test_frozen_server_is_answered_within_the_time_limit(mysql_server: Managed) -> None:
    clerk = Clerk(PEOPLE)
    async with (
        on(mysql_server) as (database, store),
        Committing(database, store, seconds=1) as committing,
    ):
        assert await committing.commit(clerk.user("user_1")) == ["applied"]
        mysql_server.freeze()
        try:
            started = time.monotonic()
            late = clerk.user("user_2", svix_id="late")
            assert await committing.commit(late) == DATABASE
            # The one that is frozen is given up, and then a new one is tried.
            assert time.monotonic() - started < 1 + CONNECT_SECONDS + 1
        finally:
            mysql_server.thaw()

        async def settled() -> bool:
            return await committing.commit(late) in (["applied"], ["duplicate"])

        await until(settled)
        assert await database.value("SELECT COUNT(*) FROM people") == 2


async def test_database_that_is_away_is_not_asked_for_every_event(mysql_server: Managed) -> None:
    attempts = 0

    async def refused() -> Connection:
        nonlocal attempts
        attempts += 1
        raise DatabaseUnavailable("no connection")

    clerk = Clerk(PEOPLE)
    async with (
        on(mysql_server) as (database, store),
        Committing(database, store, connect=refused) as committing,
    ):
        for number in range(50):
            assert await committing.commit(clerk.user(f"user_{number}")) == DATABASE
    assert attempts <= 2
    assert AWAY_SECONDS <= 2


async def waiting_for_locks(server: Managed) -> bool:
    """Whether a transaction waits; InnoDB looks anew when not asked for a tenth of a second."""
    sql = "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT'"
    return bool(server.execute(sql)[0][0])


async def test_deadlocked_batch_is_retried_whole(mysql_server: Managed) -> None:
    clerk = Clerk(PEOPLE)
    async with (
        on(mysql_server) as (database, store),
        Committing(database, store) as committing,
        database.engine.connect() as other,
    ):
        await committing.commit(*(clerk.user(f"user_{n}", age=0) for n in range(50)))
        # The other has written more, so the server ends ours.
        await other.exec_driver_sql("UPDATE people SET age = 1")
        batch = asyncio.create_task(
            committing.commit(*(clerk.user(f"user_{n}", 2, age=2) for n in range(3)))
        )

        await until(lambda: waiting_for_locks(mysql_server), pause=0.2)
        await other.exec_driver_sql("UPDATE clerk_sync_entities SET source = source")
        await other.exec_driver_sql("UPDATE clerk_sync_entities SET synced_at = NOW()")
        await other.commit()
        assert await batch == ["applied"] * 3
        assert committing.counted("clerk_sync_contention_retries_total") >= 1
        assert await database.value("SELECT COUNT(*) FROM people WHERE age = 2") == 3
        assert await database.quarantined() == {}


async def test_a_locked_row_holds_up_no_neighbour(mysql_server: Managed) -> None:
    clerk = Clerk(PEOPLE)
    async with (
        on(mysql_server) as (database, store),
        Committing(database, store, seconds=2.5) as committing,
        database.engine.connect() as other,
    ):
        await committing.commit(clerk.user("user_5"))
        await other.exec_driver_sql(
            "SELECT * FROM clerk_sync_entities WHERE clerk_id = 'user_5' FOR UPDATE"
        )
        changes = [clerk.user(f"user_{n}", 2, username=f"new{n}") for n in range(10)]
        async with asyncio.timeout(5):
            answers = await committing.commit(*changes)
        assert answers == ["unavailable: database" if n == 5 else "applied" for n in range(10)]
        await other.rollback()
        assert await committing.commit(changes[5]) == ["applied"]
        name = "SELECT username FROM people WHERE clerk_id = 'user_5'"
        assert await database.value(name) == "new5"


async def test_an_event_larger_than_the_server_takes_stands_alone(mysql_server: Managed) -> None:
    clerk = Clerk(PEOPLE)
    mysql_server.execute("SET GLOBAL max_allowed_packet = 1048576")
    try:
        async with (
            on(mysql_server) as (database, store),
            Committing(database, store) as committing,
        ):
            payload = "'" * 900_000  # which escaping doubles
            source = Delivered("msg_big", "user.updated", payload=payload)
            big = Change(source, Quarantine(Reason.REFUSED))
            answers = await committing.commit(clerk.user("user_1"), big, clerk.user("user_2"))
            assert answers == ["applied", "quarantined: refused", "applied"]
            assert await database.value("SELECT payload FROM clerk_sync_quarantine") is None
    finally:
        mysql_server.execute("SET GLOBAL max_allowed_packet = 67108864")


async def test_connection_lost_between_decision_and_write_keeps_nothing(
    mysql_server: Managed,
) -> None:
    clerk = Clerk(PEOPLE)
    async with on(mysql_server) as (database, store):
        halting = Halting(await database.connect())
        change = clerk.user("user_1")
        applying = asyncio.create_task(store.apply(halting, [change], now_ms=0))
        await halting.decided.wait()
        await database.engine.dispose()
        mysql_server.kill()
        mysql_server.start()
        halting.go_on.set()
        with pytest.raises(DatabaseUnavailable):
            await applying
        assert await database.value("SELECT COUNT(*) FROM clerk_sync_entities") == 0
        again = await database.connect()
        assert await database.apply(store, change, connection=again) == ["applied"]


# Connections.


async def test_connection_is_strict_about_data(people: tuple[Database, Store]) -> None:
    database, store = people
    long = Clerk(PEOPLE).user("user_1", username="nine char")
    assert await database.apply(store, long) == ["quarantined: too_long"]
    if not database.sqlite:
        connection = await database.connect()
        statement = store.targets["user"].upsert
        with pytest.raises(RejectedByDatabase):
            await connection.run([(statement, [["user_1", "nine char", 1]])])


async def cipher(url: str) -> str:
    connection = await connect(target_of(url), seconds=5)
    try:
        (result,) = await connection.run([(Statement("SHOW STATUS LIKE 'Ssl_cipher'"), [()])])
        return str(result.rows[0][1])
    finally:
        connection.close()


async def test_tls_is_verified_by_the_ca_that_the_url_names(mysql_server: Managed) -> None:
    url = mysql_server.create_database("tls")
    assert await cipher(f"{url}?tls=verify&tls_ca={mysql_server.ca_file}")
    assert not await cipher(url), "loopback needs none"


async def test_tls_of_another_ca_or_host_is_unavailable_and_says_why(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("tls")
    with pytest.raises(DatabaseUnavailable, match="certificate verify failed: self-signed"):
        await cipher(f"{url}?tls=verify&tls_ca={mysql_server.wrong_ca_file}")
    with pytest.raises(
        DatabaseUnavailable, match=r"certificate verify failed: (unable|self-signed)"
    ):
        await cipher(f"{url}?tls=verify")
    # The same address, by a name that is not on the certificate.
    elsewhere = url.replace("127.0.0.1", "127.1")
    with pytest.raises(DatabaseUnavailable, match=r"Hostname mismatch.*127\.1"):
        await cipher(f"{elsewhere}?tls_ca={mysql_server.ca_file}")


async def test_a_ca_that_is_not_known_tells_how_to_name_it(mysql_server: Managed) -> None:
    url = f"{mysql_server.create_database('tls')}?tls=verify"
    ways = r"name it in \?tls_ca=/path/ca\.pem or DATABASE_TLS_CA; .* \?tls=disable"
    with pytest.raises(DatabaseUnavailable, match=ways):
        await pooled(url)
    elsewhere = url.replace("127.0.0.1", "127.1")
    with pytest.raises(DatabaseUnavailable, match="Hostname mismatch") as failed:
        await pooled(f"{elsewhere}&tls_ca={mysql_server.ca_file}")
    assert "DATABASE_TLS_CA" not in str(failed.value), "another CA mends no name"


async def pooled(url: str) -> None:
    engine = engine_of(lambda: target_of(url), size=1)
    try:
        with translate_engine_errors():
            async with engine.connect():
                pass
    finally:
        await engine.dispose()


async def test_wrong_password_is_unavailable_and_repeats_neither_name_nor_password(
    mysql_server: Managed,
) -> None:
    url = mysql_server.create_database("login").replace("p%40ss%3Aw%2Frd", "wr0ng")
    with pytest.raises(DatabaseUnavailable) as refused:
        await connect(target_of(url), seconds=5)
    assert "1045" in str(refused.value)
    assert "wr0ng" not in str(refused.value)


def test_ca_that_is_no_certificate_is_an_invalid_url(tmp_path: Any) -> None:
    with pytest.raises(InvalidDatabaseUrl, match="tls_ca"):
        target_of(f"mysql://a:b@127.0.0.1/c?tls=verify&tls_ca={tmp_path}/none.pem")
