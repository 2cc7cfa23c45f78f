"""Gathers units of a stated size from files of a folder and rows of tables, and reads them as strictly as shards."""
