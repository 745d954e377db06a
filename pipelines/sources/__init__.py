"""Raw formats, one module each.

A module has `read(spark, source, files, root)`, which gives the declared columns and four of ours: `_file`
(path relative to `root`), `_line` (line or record number, from 1), `_raw` (the text as it stands in the file) and
`_reason` (why the row does not fit; null where it fits).
"""
