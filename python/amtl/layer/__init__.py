"""Tables whose rows learn their own width.

`frequency` (groups of rows with equal counts), `budget` (sizes that meet it), `laws` (sizes that
counts deserve), `size_head` and `sizes` (what learns them), `table` and `table_rows` (the two
phases), `sharing` (rows that keep nothing), `tiers` (frozen storage), `fusing` (optimizers that a
backward applies), `embedding` (the layers), `collection` (many tables in one),
`conversion` (whole models), `names` (what walks over them meet), `graphs` (models that torch.fx
traces).
"""
