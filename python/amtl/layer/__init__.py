"""Tables whose rows learn their own width.

`options`, `frequency` (groups of rows with equal counts), `budget` (sizes that meet it), `laws`
(sizes that counts deserve), `size_head` and `sizes` (what learns them), `noise` (how they vary in
training), `table`, `table_rows` and `table_states` (the two phases), `lookups` (in either),
`sharing` (rows that keep nothing), `tiers` (frozen storage), `rounding` (numbers of few bits),
`fusing` (optimizers that a backward applies), `embedding` (the layers), `collection` (many tables
in one), `conversion` (whole models), `shares` (one budget for their tables), `bypass` (models that
look up past the masks), `names` (what walks over them meet), `graphs` (models that torch.fx
traces), `replicas` (DistributedDataParallel), `hosts` (other libraries).
"""
