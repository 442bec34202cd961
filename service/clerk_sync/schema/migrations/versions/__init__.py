"""One module per version of clerk-sync's own tables.

`TABLES` are those that it makes, in `upgrade`. `COLUMNS`, by table, are those that it adds to
tables of versions before it: `Migration.completed` adds them, which looks whether they are there.
"""
