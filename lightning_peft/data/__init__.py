"""Data modules: where the rows of each task come from.

`rows.RowData` holds what all share: `origin` (files, hub, packages), `sources` (formats),
`bad_rows`, `splits`, `by_length`, the settings of `choices`. A module of a task says what a row is.
"""
