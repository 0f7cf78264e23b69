"""What tests try with a service's own account, from inside of its container: statements, and things at the broker."""

from __future__ import annotations

import json

from tests.containers.stack import Stack

# Prints the server's error code of each statement, 0 for none.
_TRY_SQL = """
import json, os, pymysql
password = open(os.environ["MYSQL_PASSWORD_FILE"]).read()
codes = []
for statement in json.loads({statements!r}):
    connection = pymysql.connect(host="mysql", user=os.environ["MYSQL_USER"], password=password, database="skipbus")
    try:
        connection.cursor().execute(statement)
        codes.append(0)
    except pymysql.MySQLError as error:
        codes.append(error.args[0])
    finally:
        connection.rollback()
        connection.close()
print(json.dumps(codes))
"""

# Prints what the broker says. The client's own check goes first out of the way: it refuses the names of federation's
# queues, and the broker does not.
_TRY_AMQP = """
import asyncio, os, re, aio_pika, pamqp.constants
pamqp.constants.DOMAIN_REGEX["queue-name"] = re.compile(".*")
async def main():
    url = {url}
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        try:
            await {attempt}
            print("allowed")
        except aio_pika.exceptions.ChannelClosed as error:
            print(str(error))
asyncio.run(main())
"""

_DENIED = {1142, 1044, 1227, 1370}

FORBIDDEN_TO_ALL = [
    "CREATE TABLE own (id INT)",
    "ALTER TABLE key_records ADD COLUMN own INT",
    "DROP TABLE inbox",
    "TRUNCATE TABLE outbox",
    "SELECT * FROM mysql.user",
    "CREATE USER own IDENTIFIED BY 'own'",
    "GRANT SELECT ON skipbus.* TO somebody",
    "SET GLOBAL innodb_flush_log_at_trx_commit = 0",
    "UPDATE alembic_version SET version_num = 'x'",
]


def allowed_statements(stack: Stack, service: str, statements: list[str]) -> list[str]:
    """Those of the statements that the service's account may do."""
    codes = json.loads(stack.python(service, _TRY_SQL.format(statements=json.dumps(statements))))
    return [statement for statement, code in zip(statements, codes, strict=True) if code not in _DENIED]


def try_at_broker(stack: Stack, service: str, attempt: str, url: str | None = None) -> str:
    """What the broker says to the service's account, or to the one in ``url``: `allowed`, or why not."""
    named = repr(url) if url else 'open(os.environ["RABBITMQ_URL_FILE"]).read()'
    return stack.python(service, _TRY_AMQP.format(attempt=attempt, url=named))
