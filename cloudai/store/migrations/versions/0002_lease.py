"""Workers keep the lease and grace that they were told. Of those that joined before, they are the controller's."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.add_column("workers", sa.Column("lease", BIG, nullable=False, server_default="0"))
