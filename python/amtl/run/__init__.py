"""Training: from settings and data to a model, its metrics and its files.

`config` (settings), `methods`, `model` and `backbones` (what is trained), `learner` (one model in
training), `race` (which settings), `teaching` (softened labels), `training` (the job), `folders`
(its files), `trained` (what comes out), `comparison`, `report` and `display` (how it is shown),
`demo`.
"""
