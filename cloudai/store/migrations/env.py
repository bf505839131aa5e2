"""Run by Alembic, on the connection and inside the transaction that cloudai.store.migrate opened."""

from alembic import context
from sqlmodel import SQLModel

from cloudai.store import tables

assert tables.TASKS is not None  # the tables are known to the metadata once their module is imported
connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=SQLModel.metadata, transactional_ddl=True)
context.run_migrations()
