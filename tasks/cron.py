"""When a schedule strikes: a cron line and a time zone, checked before any server is asked, and the next times. Pure."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from infra.errors import UserError

FIELDS = 5


def next_times(cron: str, timezone: str, now: datetime, count: int = 3) -> list[datetime]:
    """The next `count` times after `now`, in that time zone. Raises UserError where there are none."""
    way_out = 'Write minute, hour, day of month, month and day of week: "0 2 * * *" is every night at two.'
    if len(cron.split()) != FIELDS:
        raise UserError(f"--cron {cron!r} does not have five fields.", way_out)
    try:
        found = list(islice(CronSim(cron, now.astimezone(_zone(timezone))), count))
    except CronSimError as error:
        raise UserError(f"--cron {cron!r} is no schedule: {_plain(error)}.", way_out) from None
    if len(found) < count:
        raise UserError(f"--cron {cron!r} never comes.", way_out)
    return found


def _plain(error: CronSimError) -> str:
    return str(error).lower() or "it cannot be read"


def _zone(timezone: str) -> ZoneInfo:
    try:
        return ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):  # no such zone, no such name, or a folder of zones
        raise UserError(f"--timezone {timezone!r} is no time zone.", "Write it as Europe/Berlin or UTC.") from None
