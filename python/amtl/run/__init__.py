"""Training: from settings and data to a model, its metrics and its files.

`config` (settings), `methods`, `model` and `backbones` (what is trained), `metrics`, `memory` (what
a run takes), `learner` (one model in training), `searching` (methods that train twice), `race`
(which settings, at the start), `teaching` (softened labels), `contest` (which models are trained to
their end, and when) and `contenders` (how each is), `ahead` (trainings side by side), `done` (those
a stopped run finds again), `training` (the job), `folders` (its files), `trained` (what comes out),
`comparison`, `progress`, `report`, `html` and `display` (how it is shown), `demo`.
"""
