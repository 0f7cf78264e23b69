"""The table of leases: which of several processes does what one alone should do."""

from __future__ import annotations

from alembic import op
from sqlalchemy.schema import CreateTable

from skipbus.shared.store.schema import LEASES

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # It is there already: migrations themselves run under a lease. This revision makes stores of before have it.
    op.execute(CreateTable(LEASES, if_not_exists=True))
